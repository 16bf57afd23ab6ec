"""Sums of packed tokens over chunks of rows: the reading half of a mean.

    sum      = Σ_t hidden[t] · scale[t]                     over the tokens t of a chunk
    scale[t] = 1, or rsqrt(mean(hidden[t]²) + eps): the sum of RMS-normalised tokens

A row is a sequence or a span. Its chunks start at its first token and hold CHUNK tokens, so a sum's bits
depend on nothing else. Chunk c of sequence i is program cu_seqlens[i] // CHUNK + i + c: a map with at
least one program a sequence and at most one unused that the host can size from T and B alone. Spans may
overlap, so theirs is a table that the host writes.

The warps of a program lie along the columns and take BT tokens at a time: a lane keeps the sums of its
own columns, and only the BT mean squares of a block pass between warps. With a warp a token, the sums of
the warps had to be added at the end, which took longer than half of the reading.

A program finds its sequence by a read that every byte of the tokens waits for. So it asks for tokens before:
those from CHUNK times its own number on, which are the first that it needs or that another program does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from jv5kernels.kernels.launch import has_sm_90
from jv5kernels.kernels.linear import fits_descriptors
from jv5kernels.kernels.quantize import block_of_columns

# Timed on an H200 for 32768 x 1024 to bits, repeated over inputs, µs at 64x512 / 182x180 / 1x32768: fp32 37 / 37 / 39,
# bf16 25 / 24 / 28. 32 tokens 40 / 40 / 45 and 28 / 27 / 33, 128 tokens 44 / 46 / 46 and 32 / 34 / 34; 128 tokens
# with 128 values 38 / 47 / 41 and 28 / 37 / 31; two warps, or one, 45 / 43 / 50 and 32 / 29 / 37. (Since tokens are
# asked for early and products are contracted, 36 / 37 / 38 and 23 / 23 / 26.)
CHUNK = 64
NUM_WARPS = 4
# Values of a block that a lane holds: eight tokens of 1024 values.
LANE_VALUES = 64
# Sequences whose offsets a program compares at a time.
SEARCH_BLOCK = 256


class Reading(NamedTuple):
    """Constants of the side that reads tokens, in one constexpr: Triton spends time on each of a launch's arguments.

    Args:
        C, CHUNK: columns of a token, tokens of a chunk.
        BT, BC: tokens and columns of a block.
        BB: offsets that the search for a program's sequence compares at a time.
        ASKED: tokens that a program asks for before the search.
    """

    C: int
    CHUNK: int
    BT: int
    BC: int
    BB: int
    ASKED: int


@lru_cache
def reading(width: int, asks_early: bool) -> Reading:
    """The constants for tokens of `width` values."""
    columns = block_of_columns(width)
    tokens = min(CHUNK, max(1, LANE_VALUES * 32 * NUM_WARPS // columns))
    # More would come again from memory before it is read: timed at 2 to 64 tokens of 1024 values.
    asked = max(1, tokens // 2) if asks_early else 0
    return Reading(width, CHUNK, tokens, columns, SEARCH_BLOCK, asked)


def can_ask_early(hidden: torch.Tensor) -> bool:
    """Whether tokens lie without gaps on the 16-byte grid, on a device that takes one instruction for many bytes."""
    return has_sm_90(hidden.device) and hidden.is_contiguous() and fits_descriptors(hidden)


@triton.jit
def ask_for_tokens(hidden, i_program, B, READ: tl.constexpr):
    """Asks memory for ASKED tokens at the place of this program: the L2 cache will have them, and nothing waits."""
    ROW_BYTES: tl.constexpr = READ.C * (hidden.dtype.element_ty.primitive_bitwidth // 8)
    # Of T // CHUNK + B programs, those below T // CHUNK.
    size = tl.where(i_program < tl.num_programs(0) - B, READ.ASKED * ROW_BYTES, 0)
    tl.inline_asm_elementwise(
        """{
        .reg .pred is_first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 is_first, thread, 0;
        setp.gt.and.s32 is_first, $2, 0, is_first;
        @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [hidden + i_program.to(tl.int64) * (READ.CHUNK * READ.C), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def find_chunk(cu_seqlens, i_program, B, READ: tl.constexpr):
    """The sequence that a program belongs to, and the number of its chunk."""
    # Counted rather than bisected: the loads do not wait for each other.
    count = 0
    for i_b in range(0, B, READ.BB):
        o_b = i_b + tl.arange(0, READ.BB)  # [BB]
        b_first = tl.load(cu_seqlens + o_b, mask=o_b < B, other=0) // READ.CHUNK + o_b
        count += tl.sum(((o_b < B) & (b_first <= i_program)).to(tl.int32), axis=0)
    i_sequence = count - 1
    return i_sequence, i_program - (tl.load(cu_seqlens + i_sequence) // READ.CHUNK + i_sequence)


@triton.jit
def sum_of_tokens(hidden, start, end, stride_ht, eps, HAS_NORM: tl.constexpr, READ: tl.constexpr):
    """The sum [BC] of tokens [start, end)."""
    o_t = tl.arange(0, READ.BT)  # [BT]
    o_c = tl.arange(0, READ.BC)[None, :]  # [1, BC]
    b_sum = tl.full([READ.BC], 0.0, dtype=tl.float32)
    for i_t in range(start, end, READ.BT):
        i_token = (i_t + o_t).to(tl.int64)
        m_t = i_token < end
        p = hidden + i_token[:, None] * stride_ht + o_c
        m = m_t[:, None] & (o_c < READ.C)
        # Read once: what else is in the L2 cache may stay.
        b = tl.load(p, mask=m, other=0.0, eviction_policy="evict_first").to(tl.float32)  # [BT, BC]
        if HAS_NORM:
            b_mean = tl.sum(b * b, axis=1) / READ.C
            # A masked token with eps = 0 would be 0 · inf. The approximation is off by 2⁻²² at most.
            b *= tl.rsqrt(tl.where(m_t, b_mean + eps, 1.0))[:, None]
        b_sum += tl.sum(b, axis=0)
    return b_sum


def number_of_chunks(total_tokens: int, sequences: int) -> int:
    """Programs, and rows of partial sums, that any sequences of so many tokens need at most."""
    return total_tokens // CHUNK + sequences
