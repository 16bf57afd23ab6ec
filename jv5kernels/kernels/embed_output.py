"""The last step of encoding: pooled tokens become the bytes of embeddings.

    row   = hidden[t] · rsqrt(mean(hidden[t]²) + eps) · weight      one token a row, or
    row   = Σ_p partials[p] / length · weight                       the mean, from the sums of pool.py
    row   = row[:dim]
    row   = row / max(‖row‖, 1e-12)                                 when normalising
    out   = cast(row), a byte a column, or a bit a column           see quantize.py
    flag  = 1 unless the floats of out and ‖row‖ are finite

`token_kernel` is the whole of last-token and cls pooling: B rows in, B rows out. `mean_kernel` is the
second launch of a mean. A row of few chunks has one program. For a longer one, several programs add
its chunks, each over its own columns; the last of them to arrive does the rest. Which one that is
changes no bit, nor does the number of programs: sums go in an order that the row's length fixes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from jv5kernels.kernels.pool import CHUNK
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

TOKEN_WARPS = 4
MEAN_WARPS = 8
# Chunks that one program adds alone, eight loads at a time.
FEW_CHUNKS = 16
# Tile of the programs that share a row: chunks, columns.
SHARED_CHUNKS, SHARED_COLUMNS = 256, 32
# Programs that a second launch starts for the sake of long rows: about what runs at a time, and two a row.
SHARED_PROGRAMS, LEAST_SHARES = 512, 2


@triton.jit
def is_finite(b):
    """1 where a value is finite."""
    return (tl.abs(b) < float("inf")).to(tl.int32)


@triton.jit
def store_embedding(
    b,
    i_row,
    ranges,
    out,
    flags,
    stride_rr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KIND: tl.constexpr,
    FLIP: tl.constexpr,
):
    """Slices a pooled row [BC], normalises it, stores what the output holds of it, and its flag."""
    o_c = tl.arange(0, BC)
    m_out = o_c < DIM
    b = tl.where(m_out, b, 0.0)
    finite = 1
    if NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(b * b, axis=0))
        finite = is_finite(norm)
        b = tl.div_rn(b, tl.full([BC], 0.0, tl.float32) + tl.maximum(norm, 1e-12))
    b_float = b
    p_out = out + i_row * WIDTH
    if KIND == 0:
        b_out = b.to(out.dtype.element_ty)
        b_float = b_out.to(tl.float32)
        tl.store(p_out + o_c, b_out, mask=m_out)
    elif KIND == 1:
        b_min, b_step = range_steps(ranges, stride_rr, o_c, m_out)
        store_bytes(p_out + o_c, codes_of(b, b_min, b_step), m_out, FLIP)
    else:
        o_byte = tl.arange(0, BC // 8)
        store_bytes(p_out + o_byte, bits_of(b, BC), o_byte < WIDTH, FLIP)
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
    stride_ht,
    stride_rr,
    eps,
    C: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BC: tl.constexpr,
    STEP: tl.constexpr,
    IS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KIND: tl.constexpr,
    FLIP: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)  # [BC]
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
    store_embedding(b, i_row, ranges, out, flags, stride_rr, DIM, WIDTH, BC, NORMALIZE, KIND, FLIP)


@triton.jit
def sum_few(p, chunks, o_c, C: tl.constexpr):
    """The sum of some columns over `chunks` rows, eight at a time."""
    b_sum = tl.zeros(o_c.shape, dtype=tl.float32)
    for i in range(0, chunks, 8):
        b = ()
        for k in tl.static_range(8):
            m = o_c < tl.where(i + k < chunks, C, 0)
            b += (tl.load(p + (i + k) * C + o_c, mask=m, other=0.0, cache_modifier=".cg"),)
        b_sum += ((b[0] + b[1]) + (b[2] + b[3])) + ((b[4] + b[5]) + (b[6] + b[7]))
    return b_sum


@triton.jit
def sum_many(p, chunks, o_c, C: tl.constexpr, BN: tl.constexpr):
    """The sum of some columns over `chunks` rows, BN at a time."""
    b_sum = tl.zeros(o_c.shape, dtype=tl.float32)
    for i in range(0, chunks, BN):
        o_n = i + tl.arange(0, BN)[:, None]  # [BN, 1]
        m = (o_n < chunks) & (o_c < C)[None, :]
        b_sum += tl.sum(tl.load(p + o_n * C + o_c[None, :], mask=m, other=0.0), axis=0)
    return b_sum


@triton.jit
def mean_kernel(
    partials,  # [chunks, C] fp32; the first row of a shared sum is overwritten
    cu_seqlens,  # [B + 1], or None
    table,  # [B, 2] length and first chunk, or None
    arrivals,  # [B] int32, zero
    weight,  # [C] or None
    ranges,  # [2, DIM] fp32 or None
    out,  # [B, WIDTH]
    flags,  # [B] uint8
    stride_rr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW_CHUNKS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KIND: tl.constexpr,
    FLIP: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_share = tl.program_id(1)
    shares = tl.num_programs(1)
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + i_row)
        length = tl.load(cu_seqlens + i_row + 1) - start
        first = start // CHUNK + i_row
    else:
        length = tl.load(table + 2 * i_row)
        first = tl.load(table + 2 * i_row + 1).to(tl.int64)
    p_row = partials + first * C
    chunks = tl.cdiv(length, CHUNK)
    finishes = i_share == 0
    if chunks > FEW_CHUNKS:
        for i_c in range(i_share * BS, C, shares * BS):
            o_s = i_c + tl.arange(0, BS)  # [BS]
            b_share = sum_many(p_row, chunks, o_s, C, BN)
            # No other program reads these columns before all have arrived.
            tl.store(p_row + o_s, b_share, mask=o_s < C)
        # The stores of all threads come before the one that reports them.
        tl.debug_barrier()
        finishes = tl.atomic_add(arrivals + i_row, 1, sem="acq_rel") == shares - 1
        chunks = tl.minimum(chunks, 1)
    if finishes:
        o_c = tl.arange(0, BC)  # [BC]
        b = sum_few(p_row, chunks, o_c, C)
        b = tl.div_rn(b, tl.full([BC], 0.0, tl.float32) + tl.maximum(length, 1).to(tl.float32))
        if weight is not None:
            b = b * tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        store_embedding(
            b, i_row, ranges, out, flags, stride_rr, DIM, WIDTH, BC, NORMALIZE, KIND, FLIP
        )


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

    def constants(self, width: int) -> dict[str, int | bool]:
        """Arguments that both kernels share, for rows of `width` columns."""
        kind = FLOATS if self.out.is_floating_point() else BITS if self.ranges is None else CODES
        return {
            "C": width,
            "DIM": self.dim,
            "WIDTH": self.out.shape[1],
            "BC": block_of_columns(width),
            "NORMALIZE": self.normalize,
            "KIND": kind,
            "FLIP": flip_of(self.out.dtype),
            # Contracted, a product and the minimum that is subtracted from it would round once.
            "enable_fp_fusion": False,
        }

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
    token_kernel[(B,)](
        hidden,
        bounds,
        weight,
        target.ranges,
        target.out,
        target.flags,
        hidden.stride(0),
        target.range_stride,
        eps,
        STEP=bounds.ndim,
        IS_LAST=is_last,
        num_warps=TOKEN_WARPS,
        **target.constants(hidden.shape[1]),
    )


def launch_means(
    partials: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    table: torch.Tensor | None,
    arrivals: torch.Tensor,
    weight: torch.Tensor | None,
    target: Target,
) -> None:
    """Fills the target from the sums of chunks; `table` (B, 2) says where those of spans are."""
    B = target.out.shape[0]
    if B == 0:
        return
    shares = 1
    # Short of that many chunks beyond one a row, no row has more than FEW_CHUNKS (empty spans aside).
    if partials.shape[0] - B >= FEW_CHUNKS:
        blocks = triton.cdiv(partials.shape[1], SHARED_COLUMNS)
        shares = min(blocks, max(LEAST_SHARES, SHARED_PROGRAMS // B))
    mean_kernel[(B, shares)](
        partials,
        cu_seqlens,
        table,
        arrivals,
        weight,
        target.ranges,
        target.out,
        target.flags,
        target.range_stride,
        CHUNK=CHUNK,
        FEW_CHUNKS=FEW_CHUNKS,
        BN=SHARED_CHUNKS,
        BS=SHARED_COLUMNS,
        num_warps=MEAN_WARPS,
        **target.constants(partials.shape[1]),
    )
