"""Sums of packed tokens over chunks of sequences or spans, the first of the two kernels of a mean.

    partials[p] = Σ_t hidden[t] · scale[t]          over the tokens t of chunk p
    scale[t]    = 1, or rsqrt(mean(hidden[t]²) + eps): the sum of RMS-normalised tokens

Chunks start at the first token of their sequence (or span) and hold CHUNK tokens, so a sum's bits
depend on nothing else. Chunk c of sequence i is program cu_seqlens[i] // CHUNK + i + c: a map with at
most one unused program a sequence that the host can size from T and B alone. Spans may overlap, so
theirs is a table that the host writes.

A warp takes a whole row at a time and keeps its own sums, so the loop needs no barrier; the sums of
the warps are added at the end. Traffic: hidden once, and 4·C/CHUNK bytes a token for the partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from jv5kernels.kernels.rms_norm import NUM_WARPS, load_chunks, tile

# Timed on an H200 for 32768 x 1024 to bits, µs at 64x512 / 182x180 / 1x32768: fp32 52 / 56 / 55, bf16 45 / 45 / 42;
# with 64 tokens and 64 values 57 / 60 / 61 and 48 / 57 / 53; more: `python bench/bench_embed_output.py --sweep`.
CHUNK = 128
# Values that a lane loads before it computes with the first: four rows of 1024.
LANE_VALUES = 128
# Sequences whose offsets a program compares at a time.
SEARCH_BLOCK = 256


@triton.jit
def find_chunk(cu_seqlens, i_program, B, CHUNK: tl.constexpr, BB: tl.constexpr):
    """The sequence that a chunk program belongs to, and the chunk's number in it."""
    # Counted rather than bisected: the loads do not wait for each other.
    count = 0
    for i_b in range(0, B, BB):
        o_b = i_b + tl.arange(0, BB)  # [BB]
        b_first = tl.load(cu_seqlens + o_b, mask=o_b < B, other=0) // CHUNK + o_b
        count += tl.sum(((o_b < B) & (b_first <= i_program)).to(tl.int32), axis=0)
    i_sequence = count - 1
    return i_sequence, i_program - (tl.load(cu_seqlens + i_sequence) // CHUNK + i_sequence)


@triton.jit(do_not_specialize=["B"])
def chunk_sum_kernel(
    hidden,  # [T, C]
    cu_seqlens,  # [B + 1], or None
    table,  # [chunks, 2] first and last + 1 token, or None
    partials,  # [chunks, C] fp32
    arrivals,  # [B] int32, or None
    stride_ht,
    B,
    eps,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BB: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    i_program = tl.program_id(0)
    if cu_seqlens is not None:
        i_sequence, i_chunk = find_chunk(cu_seqlens, i_program, B, CHUNK, BB)
        if i_chunk == 0:
            tl.store(arrivals + i_sequence, 0)
        start = tl.load(cu_seqlens + i_sequence) + i_chunk * CHUNK
        end = tl.minimum(tl.load(cu_seqlens + i_sequence + 1), start + CHUNK)
    else:
        start = tl.load(table + 2 * i_program)
        end = tl.load(table + 2 * i_program + 1)
    if start >= end:
        return
    o_t = tl.arange(0, BT)[:, None]  # [BT, 1]
    o_c = tl.arange(0, BC)[None, :]  # [1, BC]

    b_sums = ()
    for _ in tl.static_range(TILES):
        b_sums += (tl.zeros([BT, BC], dtype=tl.float32),)
    for i_t in range(start, end, BT * UNROLL):
        # The loads of all rows before the first sum that waits for one.
        b_rows = ()
        for u in tl.static_range(UNROLL):
            i_row = (i_t + u * BT + o_t).to(tl.int64)
            p_row = hidden + i_row * stride_ht + o_c
            b_rows += (load_chunks(p_row, i_row < end, o_c, C, TILES, BC),)
        for u in tl.static_range(UNROLL):
            b_scale = tl.full([BT, 1], 1.0, dtype=tl.float32)
            if HAS_NORM:
                b_square = tl.zeros([BT, BC], dtype=tl.float32)
                for i in tl.static_range(TILES):
                    b = b_rows[u][i].to(tl.float32)
                    b_square += b * b
                b_mean = tl.sum(b_square, axis=1)[:, None] / C
                # A masked row with eps = 0 would be 0 · inf.
                is_token = i_t + u * BT + o_t < end
                b_scale = 1.0 / tl.sqrt_rn(tl.where(is_token, b_mean + eps, 1.0))
            b_next = ()
            for i in tl.static_range(TILES):
                b_next += (b_sums[i] + b_rows[u][i].to(tl.float32) * b_scale,)
            b_sums = b_next
    o_c = tl.arange(0, BC)
    p_partial = partials + i_program.to(tl.int64) * C + o_c
    for i in tl.static_range(TILES):
        tl.store(p_partial + i * BC, tl.sum(b_sums[i], axis=0), mask=i * BC + o_c < C)


def number_of_chunks(total_tokens: int, sequences: int) -> int:
    """Chunk programs, and rows of partial sums, that any sequences of so many tokens need at most."""
    return total_tokens // CHUNK + sequences


def launch_chunk_sums(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    table: torch.Tensor | None,
    has_norm: bool,
    eps: float,
    partials: torch.Tensor,
    arrivals: torch.Tensor | None,
) -> None:
    """Fills `partials` (chunks, C) with the sums of the chunks of sequences, or of a table of them."""
    C = hidden.shape[1]
    if partials.shape[0] == 0:
        return
    tiles, rows, columns = tile(C, hidden.element_size())
    lane_values = max(1, tiles * rows * columns // (32 * NUM_WARPS))
    chunk_sum_kernel[(partials.shape[0],)](
        hidden,
        cu_seqlens,
        table,
        partials,
        arrivals,
        hidden.stride(0),
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        eps,
        C=C,
        CHUNK=CHUNK,
        TILES=tiles,
        UNROLL=max(1, min(CHUNK // rows, LANE_VALUES // lane_values)),
        BT=rows,
        BC=columns,
        BB=SEARCH_BLOCK,
        HAS_NORM=has_norm,
        num_warps=NUM_WARPS,
    )
