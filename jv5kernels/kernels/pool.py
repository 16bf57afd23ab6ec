"""Pooling of packed tokens into float32 rows: one token, the mean of a sequence, the mean of a span.

    token:  out[i] = hidden[cu_seqlens[i+1] - 1]  or  hidden[cu_seqlens[i]]
    mean:   out[i] = weight · Σ_t hidden[t] · scale[t] / length
            scale[t] = 1, or rsqrt(mean(hidden[t]²) + eps): the mean of RMS-normalised tokens
    spans:  out[i] = Σ_t hidden[t] / length over rows spans[i, 0]:spans[i, 1]

The mean takes two launches. The first gives every chunk of CHUNK tokens a program that writes the
chunk's sum; the second adds a sequence's chunks, split over columns so that one long sequence also
occupies many programs. Chunks start at the sequence's first token and their length is a constant, so
a sequence's bits depend on nothing else. Traffic: hidden once, 4·C/CHUNK bytes a token for the sums.

Chunk c of sequence i is program cu_seqlens[i] // CHUNK + i + c: a map with at most one unused
program a sequence that the host can size from T and B alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 64
# Elements of a chunk program's tile: 8 rows of 1024, 16 KB of bf16 in flight a program.
TILE_ELEMENTS = 8192
CHUNK_WARPS = 4
# Tile of the programs that add partial sums: rows, columns.
COMBINE_ROWS, COMBINE_COLUMNS = 128, 32
# Tile of a span program: tokens, columns.
SPAN_ROWS, SPAN_COLUMNS = 64, 64


@triton.jit
def find_chunk(cu_seqlens, i_program, B, CHUNK: tl.constexpr):
    """The sequence that a chunk program belongs to, and the chunk's number in it."""
    low = 0
    high = B
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // CHUNK + middle <= i_program:
            low = middle
        else:
            high = middle
    return low, i_program - (tl.load(cu_seqlens + low) // CHUNK + low)


@triton.jit(do_not_specialize=["B"])
def chunk_sum_kernel(
    hidden,  # [T, C]
    cu_seqlens,  # [B + 1]
    partials,  # [chunks, C] fp32
    stride_ht,
    B,
    eps,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_sequence, i_chunk = find_chunk(cu_seqlens, i_program, B, CHUNK)
    start = tl.load(cu_seqlens + i_sequence) + i_chunk * CHUNK
    end = tl.minimum(tl.load(cu_seqlens + i_sequence + 1), start + CHUNK)
    if start >= end:
        return
    o_c = tl.arange(0, BC)  # [BC]
    b_sum = tl.zeros([BC], dtype=tl.float32)
    for i_t in range(start, end, BT):
        o_t = i_t + tl.arange(0, BT).to(tl.int64)  # [BT]
        m = (o_t < end)[:, None] & (o_c < C)[None, :]  # [BT, BC]
        b_hidden = tl.load(hidden + o_t[:, None] * stride_ht + o_c[None, :], mask=m, other=0.0)
        b_hidden = b_hidden.to(tl.float32)
        if HAS_NORM:
            b_mean = tl.sum(b_hidden * b_hidden, axis=1) / C  # [BT]
            # A masked row with eps = 0 would be 0 · inf.
            b_scale = 1.0 / tl.sqrt_rn(tl.where(o_t < end, b_mean + eps, 1.0))
            b_hidden = b_hidden * b_scale[:, None]
        b_sum += tl.sum(b_hidden, axis=0)
    tl.store(partials + i_program.to(tl.int64) * C + o_c, b_sum, mask=o_c < C)


@triton.jit
def combine_kernel(
    partials,  # [chunks, C] fp32
    cu_seqlens,  # [B + 1]
    weight,  # [C] or None
    out,  # [B, C] fp32
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    i_sequence = tl.program_id(0)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    m_c = o_c < C
    start = tl.load(cu_seqlens + i_sequence)
    length = tl.load(cu_seqlens + i_sequence + 1) - start
    chunks = tl.cdiv(length, CHUNK)
    first = (start // CHUNK + i_sequence).to(tl.int64)
    b_sum = tl.zeros([BC], dtype=tl.float32)
    for i_n in range(0, chunks, BN):
        o_n = i_n + tl.arange(0, BN)  # [BN]
        m = (o_n < chunks)[:, None] & m_c[None, :]
        p_partial = partials + (first + o_n)[:, None] * C + o_c[None, :]
        b_sum += tl.sum(tl.load(p_partial, mask=m, other=0.0), axis=0)
    b_mean = b_sum / tl.maximum(length, 1).to(tl.float32)
    if HAS_WEIGHT:
        b_mean *= tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(out + i_sequence.to(tl.int64) * C + o_c, b_mean, mask=m_c)


@triton.jit
def span_mean_kernel(
    hidden,  # [T, C]
    spans,  # [N, 2]
    out,  # [N, C] fp32
    stride_ht,
    stride_sn,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_span = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    m_c = o_c < C
    start = tl.load(spans + i_span * stride_sn)
    end = tl.load(spans + i_span * stride_sn + 1)
    b_sum = tl.zeros([BC], dtype=tl.float32)
    for i_t in range(start, end, BT):
        o_t = i_t + tl.arange(0, BT).to(tl.int64)  # [BT]
        m = (o_t < end)[:, None] & m_c[None, :]
        b_hidden = tl.load(hidden + o_t[:, None] * stride_ht + o_c[None, :], mask=m, other=0.0)
        b_sum += tl.sum(b_hidden.to(tl.float32), axis=0)
    b_mean = b_sum / tl.maximum(end - start, 1).to(tl.float32)
    tl.store(out + i_span * C + o_c, b_mean, mask=m_c)


@triton.jit
def token_kernel(
    hidden,  # [T, C]
    cu_seqlens,  # [B + 1]
    out,  # [B, C] fp32
    stride_ht,
    C: tl.constexpr,
    BC: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    i_sequence = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)  # [BC]
    start = tl.load(cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(cu_seqlens + i_sequence + 1).to(tl.int64)
    i_t = end - 1 if IS_LAST else start
    columns = tl.where(start < end, C, 0)
    b_hidden = tl.load(hidden + i_t * stride_ht + o_c, mask=o_c < columns, other=0.0)
    tl.store(out + i_sequence * C + o_c, b_hidden.to(tl.float32), mask=o_c < C)


def number_of_chunks(total_tokens: int, sequences: int) -> int:
    """Chunk programs, and rows of partial sums, that any sequences of so many tokens need at most."""
    return total_tokens // CHUNK + sequences


def launch_pool_mean(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    partials: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fills `out` (B, C) with means; with `weight`, of RMS-normalised tokens times the weight."""
    T, C = hidden.shape
    B = cu_seqlens.shape[0] - 1
    if B == 0:
        return
    BC = triton.next_power_of_2(C)
    chunk_sum_kernel[(number_of_chunks(T, B),)](
        hidden,
        cu_seqlens,
        partials,
        hidden.stride(0),
        B,
        eps,
        C=C,
        CHUNK=CHUNK,
        BT=min(CHUNK, max(1, TILE_ELEMENTS // BC)),
        BC=BC,
        HAS_NORM=weight is not None,
        num_warps=CHUNK_WARPS,
    )
    combine_kernel[(B, triton.cdiv(C, COMBINE_COLUMNS))](
        partials,
        cu_seqlens,
        weight,
        out,
        C=C,
        CHUNK=CHUNK,
        BN=COMBINE_ROWS,
        BC=COMBINE_COLUMNS,
        HAS_WEIGHT=weight is not None,
        num_warps=4,
    )


def launch_pool_spans(hidden: torch.Tensor, spans: torch.Tensor, out: torch.Tensor) -> None:
    """Fills `out` (N, C) with the mean over each span."""
    N, C = out.shape
    if N == 0:
        return
    span_mean_kernel[(N, triton.cdiv(C, SPAN_COLUMNS))](
        hidden,
        spans,
        out,
        hidden.stride(0),
        spans.stride(0),
        C=C,
        BT=SPAN_ROWS,
        BC=SPAN_COLUMNS,
        num_warps=4,
    )


def launch_pool_token(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, is_last: bool, out: torch.Tensor
) -> None:
    """Fills `out` (B, C) with the last or the first token of each sequence."""
    B, C = out.shape
    if B == 0:
        return
    BC = triton.next_power_of_2(C)
    token_kernel[(B,)](
        hidden, cu_seqlens, out, hidden.stride(0), C=C, BC=BC, IS_LAST=is_last, num_warps=4
    )
