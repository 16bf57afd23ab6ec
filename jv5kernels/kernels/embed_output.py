"""The last step of encoding: pooled tokens become the bytes of embeddings, in one launch.

    row   = hidden[t] · rsqrt(mean(hidden[t]²) + eps) · weight          one token a row, or
    row   = Σ_t hidden[t] · rsqrt(mean(hidden[t]²) + eps) · weight / length     the mean, see pool.py
    row   = row[:dim]
    row   = row / max(‖row‖, 1e-12)                                     when normalising
    out   = cast(row), a byte a column, or a bit a column               see quantize.py
    flag  = 1 unless the floats of out and ‖row‖ are finite

`token_kernel` is the whole of last-token and cls pooling, `mean_kernel` of means. A program of the latter
has the sum of a chunk of tokens. The sums of a row are the leaves of a tree (tree.py), and the program that
reaches its root does the rest.

Traffic: hidden once, and 8·C/CHUNK bytes a token for the partial sums, which stay in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from jv5kernels.kernels.launch import launch
from jv5kernels.kernels.pool import (
    NUM_WARPS,
    ask_for_tokens,
    can_ask_early,
    find_chunk,
    reading,
    sum_of_tokens,
)
from jv5kernels.kernels.quantize import (
    BITS,
    CODES,
    FLOATS,
    bits_of,
    block_of_columns,
    codes_of,
    flip_of,
    range_steps,
    store_bytes,
)
from jv5kernels.kernels.tree import climb, load_counter, next_call

# Contracted, a product and the minimum that is subtracted from it would round once. In means no product is followed by
# a sum but those of the reading, where contraction saves a fifth of the instructions.
TOKEN_OPTIONS = (("num_warps", 4), ("enable_fp_fusion", False))


@lru_cache
def mean_options(width: int, has_table: bool) -> tuple[tuple[str, int], ...]:
    """Launch options of means of tokens of `width` values.

    With 96 registers five programs fit a multiprocessor. Blocks of 1024 columns get by with them in every version of
    Triton, others would spill. Those of spans take no more of their own accord, and one would spill under the limit.
    """
    options = (("num_warps", NUM_WARPS),)
    is_limited = block_of_columns(width) == 1024 and not has_table
    return (*options, ("maxnreg", 96)) if is_limited else options


class Output(NamedTuple):
    """Constants of the kernels' side that writes embeddings.

    Args:
        DIM, WIDTH: columns that are kept, values that are stored a row.
        BC: columns of a block that holds a row of the hidden states.
        NORMALIZE: whether to divide by the length of what is kept.
        KIND, FLIP: what an output holds, and what its bytes are xored with: see quantize.py.
    """

    DIM: int
    WIDTH: int
    BC: int
    NORMALIZE: bool
    KIND: int
    FLIP: int


@lru_cache
def output(
    width: int, dim: int, stored: int, dtype: torch.dtype, has_ranges: bool, normalize: bool
) -> Output:
    """The constants for rows of `width` columns, of which `dim` are kept as `stored` values."""
    kind = FLOATS if dtype.is_floating_point else CODES if has_ranges else BITS
    return Output(dim, stored, block_of_columns(width), normalize, kind, flip_of(dtype))


@triton.jit
def is_finite(b):
    """1 where a value is finite."""
    return (tl.abs(b) < float("inf")).to(tl.int32)


@triton.jit
def store_embedding(b, i_row, ranges, out, flags, stride_rr, OUT: tl.constexpr):
    """Slices a pooled row [BC], normalises it, stores what the output holds of it, and its flag."""
    o_c = tl.arange(0, OUT.BC)
    m_out = o_c < OUT.DIM
    b = tl.where(m_out, b, 0.0)
    finite = 1
    if OUT.NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(b * b, axis=0))
        finite = is_finite(norm)
        b = tl.div_rn(b, tl.full([OUT.BC], 0.0, tl.float32) + tl.maximum(norm, 1e-12))
    b_float = b
    p_out = out + i_row * OUT.WIDTH
    if OUT.KIND == 0:
        b_out = b.to(out.dtype.element_ty)
        b_float = b_out.to(tl.float32)
        tl.store(p_out + o_c, b_out, mask=m_out)
    elif OUT.KIND == 1:
        b_min, b_step = range_steps(ranges, stride_rr, o_c, m_out)
        store_bytes(p_out + o_c, codes_of(b, b_min, b_step), m_out, OUT.FLIP)
    else:
        o_byte = tl.arange(0, OUT.BC // 8)
        store_bytes(p_out + o_byte, bits_of(b, OUT.BC), o_byte < OUT.WIDTH, OUT.FLIP)
    finite = tl.minimum(finite, tl.min(is_finite(b_float), axis=0))
    tl.store(flags + i_row, (1 - finite).to(tl.uint8))


@triton.jit
def token_kernel(
    hidden,  # [T, C]
    bounds,  # [B + 1] offsets with STEP = 1, or [B, 2] spans with STEP = 2
    weight,  # [C] or None
    ranges,  # [2, DIM] fp32 or None
    out,  # [B, WIDTH]
    flags,  # [B] uint8
    eps,
    stride_ht,
    stride_rr,
    C: tl.constexpr,
    STEP: tl.constexpr,
    IS_LAST: tl.constexpr,
    OUT: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, OUT.BC)  # [BC]
    start = tl.load(bounds + i_row * STEP).to(tl.int64)
    end = tl.load(bounds + i_row * STEP + 1).to(tl.int64)
    i_t = end - 1 if IS_LAST else start
    m_c = o_c < tl.where(start < end, C, 0)
    if weight is not None:
        b_weight = tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b = tl.load(hidden + i_t * stride_ht + o_c, mask=m_c, other=0.0).to(tl.float32)
    if weight is not None:
        mean_square = tl.sum(b * b, axis=0) / C
        # An empty sequence with eps = 0 would be 0 · inf.
        b = b * (1.0 / tl.sqrt_rn(tl.where(start < end, mean_square + eps, 1.0))) * b_weight
    store_embedding(b, i_row, ranges, out, flags, stride_rr, OUT)


@triton.jit(do_not_specialize=["B", "call"])
def mean_kernel(
    hidden,  # [T, C]
    cu_seqlens,  # [B + 1], or None
    table,  # [programs, 4] row, its chunk, its first token and its length, or None
    partials,  # [programs, row_stride] fp32, see tree.py
    weight,  # [C] or None
    ranges,  # [2, DIM] fp32 or None
    out,  # [B, WIDTH]
    flags,  # [B] uint8
    B,
    call,  # of next_call
    eps,
    stride_ht,
    stride_rr,
    READ: tl.constexpr,
    OUT: tl.constexpr,
):
    C: tl.constexpr = READ.C
    i_program = tl.program_id(0)
    if cu_seqlens is not None:
        if READ.ASKED > 0:
            ask_for_tokens(hidden, i_program, B, READ)
        i_row, i_chunk = find_chunk(cu_seqlens, i_program, B, READ)
        start = tl.load(cu_seqlens + i_row)
        length = tl.load(cu_seqlens + i_row + 1) - start
    else:
        p_chunk = table + 4 * i_program
        i_row, i_chunk = tl.load(p_chunk), tl.load(p_chunk + 1)
        start, length = tl.load(p_chunk + 2), tl.load(p_chunk + 3)
    chunks = tl.cdiv(length, READ.CHUNK)
    if i_chunk >= tl.maximum(chunks, 1):
        return
    i_first = i_program - i_chunk
    # Loaded here, so that nothing waits for it.
    found = load_counter(partials, i_first, i_chunk, chunks, C)

    begin = start + i_chunk * READ.CHUNK
    end = tl.minimum(start + length, begin + READ.CHUNK)
    b = sum_of_tokens(hidden, begin, end, stride_ht, eps, weight is not None, READ)

    o_c = tl.arange(0, READ.BC)  # [BC]
    # On its way while sums are waited for. For 16-bit values and spans there is no register for that: a fifth program
    # would not fit an SM.
    IS_WIDE: tl.constexpr = hidden.dtype.element_ty == tl.float32
    IS_EARLY: tl.constexpr = IS_WIDE and weight is not None and table is None
    if IS_EARLY:
        b_weight = tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b, finishes = climb(b, partials, i_first, i_chunk, chunks, found, call, C)
    if finishes:
        if weight is not None:
            if not IS_EARLY:
                b_weight = tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
            b = b * b_weight
        # Behind the product: a division is contracted with nothing.
        b = tl.div_rn(b, tl.full([OUT.BC], 0.0, tl.float32) + tl.maximum(length, 1).to(tl.float32))
        store_embedding(b, i_row.to(tl.int64), ranges, out, flags, stride_rr, OUT)


@dataclass(frozen=True)
class Target:
    """What becomes of a pooled row.

    Args:
        out: (B, width): floats, a byte a column, or bytes of eight columns.
        flags: (B,) uint8.
        dim: columns that are kept.
        normalize: whether to divide by the length of what is kept.
        ranges: (2, dim) fp32 when `out` holds a byte a column, else None.
    """

    out: torch.Tensor
    flags: torch.Tensor
    dim: int
    normalize: bool
    ranges: torch.Tensor | None

    def constants(self, width: int) -> Output:
        """What the kernels know of it, for rows of `width` columns."""
        stored, dtype = self.out.shape[1], self.out.dtype
        return output(width, self.dim, stored, dtype, self.ranges is not None, self.normalize)

    @property
    def range_stride(self) -> int:
        return 0 if self.ranges is None else self.ranges.stride(0)


def launch_tokens(
    hidden: torch.Tensor,
    bounds: torch.Tensor,
    is_last: bool,
    weight: torch.Tensor | None,
    eps: float,
    target: Target,
) -> None:
    """Fills the target from one token a row; `bounds` are offsets (B + 1,) or contiguous spans (B, 2)."""
    B = target.out.shape[0]
    if B == 0:
        return
    width = hidden.shape[1]
    launch(
        token_kernel,
        hidden.device,
        B,
        (hidden, bounds, weight, target.ranges, target.out, target.flags),
        (eps,),
        (
            hidden.stride(0),
            target.range_stride,
            width,
            bounds.ndim,
            is_last,
            target.constants(width),
        ),
        TOKEN_OPTIONS,
    )


def launch_means(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    table: torch.Tensor | None,
    partials: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    target: Target,
) -> None:
    """Fills the target with means of sequences, or of spans by a table (programs, 4) of their chunks.

    `partials` has a row for each program: number_of_chunks of them, or as many as the table.
    """
    B, width = target.out.shape[0], hidden.shape[1]
    if B == 0:
        return
    reads = reading(width, table is None and can_ask_early(hidden))
    launch(
        mean_kernel,
        hidden.device,
        partials.shape[0],
        (hidden, cu_seqlens, table, partials, weight, target.ranges, target.out, target.flags),
        (B, next_call(), eps),
        (hidden.stride(0), target.range_stride, reads, target.constants(width)),
        mean_options(width, table is not None),
    )
