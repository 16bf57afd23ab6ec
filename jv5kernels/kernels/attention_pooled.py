"""Attention of one query a sequence over packed keys and values, split over the keys.

    out[b] = softmax(softmax_scale · q[b] · kᵀ) · v      keys 0 … query_positions[b] of sequence b (all without it)

A sequence is cut into splits of SPLIT keys, a constant, so that one long sequence fills the GPU and the order
of the additions depends on the sequence alone. One program takes one split and one kv head with all query
heads that share it, so keys and values are read once. A sequence of one split is written at once; the others
leave fp32 partial results, which the second kernel adds up in order. Splits are found as the tiles of
attention_varlen are: slot cu_seqlens[b] // SPLIT + b is the first of sequence b.

Traffic: keys and values once, and per split of a long sequence (D + 2) · HQ floats written and read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from jv5kernels.kernels.attention import LOG2_E, attend, find_sequence, search_steps

SPLIT = 512
# Partial results that the second kernel takes at a time.
SPLITS_TOGETHER = 16
# (bytes of an element, head_dim) -> keys a tile, warps, stages.
CONFIGS: dict[tuple[int, int], tuple[int, int, int]] = {
    (2, 32): (128, 4, 3),
    (2, 64): (128, 4, 3),
    (2, 128): (64, 4, 3),
    (2, 256): (32, 4, 3),
    (4, 32): (64, 4, 2),
    (4, 64): (32, 4, 2),
    (4, 128): (32, 8, 2),
    (4, 256): (16, 8, 2),
}


@triton.jit
def visible_keys(cu_seqlens, query_positions, i_b, HAS_POSITIONS: tl.constexpr):
    """First token of sequence i_b and the number of its keys that its query sees."""
    begin = tl.load(cu_seqlens + i_b)
    keys = tl.load(cu_seqlens + i_b + 1) - begin
    if HAS_POSITIONS:
        keys = tl.minimum(keys, tl.load(query_positions + i_b) + 1)
    return begin, tl.maximum(keys, 0)


@triton.jit(do_not_specialize=["B", "steps"])
def attention_pooled_kernel(
    q,  # [B, HKV * GROUP, D]
    k,  # [T, HKV, D]
    v,  # [T, HKV, D]
    out,  # [B, HKV * GROUP, D], contiguous
    partial_out,  # [slots, HKV * GROUP, D] fp32
    partial_max,  # [slots, HKV * GROUP] fp32
    partial_sum,  # [slots, HKV * GROUP] fp32
    cu_seqlens,  # [B + 1]
    query_positions,  # [B] or None
    stride_qb,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    scale,  # softmax_scale · log2(e)
    B,
    steps,  # of the search for a sequence
    HKV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    i_h = tl.program_id(0) % HKV
    slot = tl.program_id(0) // HKV
    i_b = find_sequence(cu_seqlens, slot, B, steps, SPLIT)
    begin, keys = visible_keys(cu_seqlens, query_positions, i_b, HAS_POSITIONS)
    i_s = slot - begin // SPLIT - i_b
    if (i_s > 0) & (i_s * SPLIT >= keys):
        return

    o_d = tl.arange(0, D)
    o_g = tl.arange(0, BG)
    m_g = o_g < GROUP
    q += tl.cast(i_b, tl.int64) * stride_qb + i_h * GROUP * tl.cast(stride_qh, tl.int64)
    k += begin.to(tl.int64) * stride_kt + i_h * tl.cast(stride_kh, tl.int64)
    v += begin.to(tl.int64) * stride_vt + i_h * tl.cast(stride_vh, tl.int64)
    p_q = q + o_g[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_g[:, None], other=0.0)  # [BG, D]

    b_out = tl.zeros([BG, D], tl.float32)
    b_max = tl.full([BG], float("-inf"), tl.float32)
    b_sum = tl.zeros([BG], tl.float32)
    start = i_s * SPLIT
    end = tl.minimum(start + SPLIT, keys)
    unmasked = end // BN * BN
    b_out, b_max, b_sum = attend(
        b_q, b_out, b_max, b_sum, k, v, stride_kt, stride_vt, begin, keys, 0, 0,
        start, unmasked, scale, BG, BN, D, False, False, False,
    )  # fmt: skip
    b_out, b_max, b_sum = attend(
        b_q, b_out, b_max, b_sum, k, v, stride_kt, stride_vt, begin, keys, 0, 0,
        unmasked, end, scale, BG, BN, D, False, True, False,
    )  # fmt: skip

    o_h = i_h * GROUP + o_g  # [BG]
    if keys <= SPLIT:
        b_out = b_out / tl.where(keys > 0, b_sum, 1.0)[:, None]
        p_out = out + (tl.cast(i_b, tl.int64) * (HKV * GROUP) + o_h[:, None]) * D + o_d[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_g[:, None])
    else:
        o_row = slot.to(tl.int64) * (HKV * GROUP) + o_h
        tl.store(partial_out + o_row[:, None] * D + o_d[None, :], b_out, mask=m_g[:, None])
        tl.store(partial_max + o_row, b_max, mask=m_g)
        tl.store(partial_sum + o_row, b_sum, mask=m_g)


@triton.jit
def combine_splits_kernel(
    out,  # [B, HQ, D], contiguous
    partial_out,  # [slots, HQ, D] fp32
    partial_max,  # [slots, HQ] fp32
    partial_sum,  # [slots, HQ] fp32
    cu_seqlens,  # [B + 1]
    query_positions,  # [B] or None
    HQ: tl.constexpr,
    D: tl.constexpr,
    BS: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64) // HQ
    i_h = tl.program_id(0) % HQ
    begin, keys = visible_keys(cu_seqlens, query_positions, i_b, HAS_POSITIONS)
    if keys <= SPLIT:
        return
    splits = tl.cdiv(keys, SPLIT)
    first_slot = begin // SPLIT + i_b

    o_d = tl.arange(0, D)
    b_out = tl.zeros([D], tl.float32)
    b_max = float("-inf")
    b_sum = 0.0
    for first in range(0, splits, BS):
        o_s = first + tl.arange(0, BS)
        m_s = o_s < splits
        o_row = (first_slot + o_s) * HQ + i_h  # [BS]
        b_part = tl.load(
            partial_out + o_row[:, None] * D + o_d[None, :], mask=m_s[:, None], other=0.0
        )  # [BS, D]
        b_part_max = tl.load(partial_max + o_row, mask=m_s, other=float("-inf"))
        b_part_sum = tl.load(partial_sum + o_row, mask=m_s, other=0.0)
        b_new_max = tl.maximum(b_max, tl.max(b_part_max, 0))
        b_decay = tl.math.exp2(b_max - b_new_max)
        b_weight = tl.math.exp2(b_part_max - b_new_max)
        b_out = b_out * b_decay + tl.sum(b_part * b_weight[:, None], 0)
        b_sum = b_sum * b_decay + tl.sum(b_part_sum * b_weight, 0)
        b_max = b_new_max
    p_out = out + (i_b * HQ + i_h) * D + o_d
    tl.store(p_out, (b_out / b_sum).to(out.dtype.element_ty))


def slots_for(total_tokens: int, sequences: int) -> int:
    """How many splits sequences with this many tokens in all can have."""
    return total_tokens // SPLIT + sequences


def launch_attention_pooled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    softmax_scale: float,
    query_positions: torch.Tensor | None,
    out: torch.Tensor,
    partial_out: torch.Tensor,
    partial_max: torch.Tensor,
    partial_sum: torch.Tensor,
) -> None:
    """Fills `out`, contiguous (B, HQ, D); the partial tensors have `slots_for` rows."""
    B, HQ, D = q.shape
    if B == 0:
        return
    HKV = k.shape[1]
    BN, num_warps, num_stages = CONFIGS[q.element_size(), D]
    attention_pooled_kernel[(partial_out.shape[0] * HKV,)](
        q,
        k,
        v,
        out,
        partial_out,
        partial_max,
        partial_sum,
        cu_seqlens,
        query_positions,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        softmax_scale * LOG2_E,
        B,
        search_steps(B),
        HKV=HKV,
        GROUP=HQ // HKV,
        D=D,
        BG=max(16, triton.next_power_of_2(HQ // HKV)),
        BN=BN,
        SPLIT=SPLIT,
        HAS_POSITIONS=query_positions is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if max_seqlen <= SPLIT:
        return
    combine_splits_kernel[(B * HQ,)](
        out,
        partial_out,
        partial_max,
        partial_sum,
        cu_seqlens,
        query_positions,
        HQ=HQ,
        D=D,
        BS=SPLITS_TOGETHER,
        SPLIT=SPLIT,
        HAS_POSITIONS=query_positions is not None,
        num_warps=4,
    )
