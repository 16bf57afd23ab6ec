"""Attention inside packed sequences on Hopper: a persistent, warp-specialised Gluon kernel.

    out[i] = softmax(softmax_scale · q[i] · kᵀ) · v      keys of the same sequence, j <= i when causal

A program has CONSUMERS warpgroups, each with 64 query rows of one head, and one warp that feeds them by TMA: a ring of
STAGES tiles of BN keys and values, which all consumers share, and two slots for queries, so that the next row tile
comes in while this one is computed. The order of the products is that of FlashAttention-3 (arXiv 2407.08608).

Softmax with a static offset. The first key tile of a row (that of its diagonal, or the last one) fixes the offset

    c = max of that tile's scaled scores + HEADROOM,      p = 2^(score - c)

for all its keys: no running maximum, no rescaling. A sum above 2^HEADROOM means that some score exceeds the first
tile's by far; the same program then does the row tile again with the online softmax. Numerator and denominator sum
the same rounded p, so a row that one key dominates is exact. Values between 2^-86 and 2^86 in magnitude neither
vanish nor overflow on the way.

Programs take row tiles from a list in order. As in kernels/attention.py, tile slots of sequence i begin at
cu_seqlens[i] // BM + i and a search finds the sequence of a slot; with batches packed longest first, long work comes
first. Which program computes a tile, and after which, never changes a bit of it.

What the speed depends on is checked in the machine code by tests without a GPU: no spills; the wait for p·v behind the
exponentials (an mbarrier wait between them keeps ptxas from hoisting it); no wgmma in flight over a back edge, which
would make ptxas serialise them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma_wait,
)

from jv5kernels.kernels.attention import LOG2_E, heads_together
from jv5kernels.kernels.attention_sm90_softmax import (
    ROWS,
    add_rows,
    exponentials,
    issue_output,
    issue_scores,
    lane_sums,
    online_pass,
    static_pass,
    weights,
)
from jv5kernels.kernels.hopper import (
    RAGGED_END,
    advance,
    block_barrier,
    get,
    load_tile,
    multiprocessors,
    put,
    ragged_descriptor,
    ring,
    row_descriptor,
    wait_for_the_kernel_before,
)

CONSUMERS = gl.constexpr(3)
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(160), gl.constexpr(32)
HEADROOM = gl.constexpr(40.0)
LIMIT = gl.constexpr(2.0**40)  # of a row's sum under the static offset
Q_SLOTS = gl.constexpr(2)
# What the producer tells the consumers of a row tile.
BEGIN, LENGTH, END_ROW, HEAD, ONLINE = (gl.constexpr(i) for i in range(5))
FIELDS = gl.constexpr(5)
# Sequences that a step of the search tells apart.
FAN = gl.constexpr(128)


@dataclass(frozen=True)
class Config:
    """Keys of a tile, stages of their ring, and how a row's weights are summed: by products with ones, or by lanes."""

    BN: int
    STAGES: int
    SUM_BY_MMA: bool


# head_dim -> configuration. Timed on an H200 and an H100 against cuDNN; bench/log_attention.md has what lost.
CONFIGS = {
    64: Config(BN=128, STAGES=4, SUM_BY_MMA=True),
    128: Config(BN=64, STAGES=3, SUM_BY_MMA=False),
}


@gluon.jit
def key_tiles(end_row, length, BN: gl.constexpr, IS_CAUSAL: gl.constexpr):
    """How many key tiles the rows before end_row see."""
    end = length
    if IS_CAUSAL:
        end = gl.minimum(end_row, length)
    return gl.cdiv(end, BN)


@gluon.jit
def find_sequence(cu_seqlens, slot, B, BM: gl.constexpr):
    """The sequence that owns a tile slot: the last i < B with cu_seqlens[i] // BM + i <= slot.

    Each step keeps one of FAN parts of what is left: many reads at once take no longer than one.
    """
    o = gl.arange(0, FAN, gl.BlockedLayout([FAN // 32], [32], [1], [0]))
    low = 0
    size = B
    while size > 1:
        part = gl.cdiv(size, FAN)
        o_i = o * part
        first_token = gl.load(cu_seqlens + low + o_i, mask=o_i < size, other=0)
        is_left = (o_i < size) & (first_token // BM + low + o_i <= slot)
        chosen = (gl.sum(is_left.to(gl.int32), 0) - 1) * part
        low += chosen
        size = gl.minimum(part, size - chosen)
    return low


@gluon.jit
def claim(counter, total):
    """The next tile that no program has; `total` when each program had the only one it gets."""
    tile = total
    if total > gl.num_programs(0):
        tile = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
    return tile


@gluon.jit
def wants_again(again, slot):
    """Whether a consumer asked for the slot's row tile to be done online."""
    result = get(again, slot * CONSUMERS, 1)
    for c in gl.static_range(1, CONSUMERS):
        result |= get(again, slot * CONSUMERS + c, 1)
    return result


@gluon.jit
def produce(
    descriptors, cu_seqlens, counter, memory, notes, q_bars, k_bars, v_bars, slots, B, section, total,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """Feeds the consumers row tile by row tile, and ends with one whose end row is negative."""
    q_desc, k_desc, v_desc = descriptors
    q_smem, k_smem, v_smem = memory
    tiles, again = notes
    BM: gl.constexpr = ROWS * CONSUMERS
    tile = gl.program_id(0)
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    is_blank = False
    is_running = True
    while is_running:
        # A slot is free when its row tile is finished; then it is known whether that must be done again.
        mbarrier.wait(q_bars[1].index(slot), slot_phase ^ 1)
        online = wants_again(again, slot)
        begin = get(tiles, slot * FIELDS + BEGIN, 1)
        length = get(tiles, slot * FIELDS + LENGTH, 1)
        end_row = get(tiles, slot * FIELDS + END_ROW, 1)
        i_h = get(tiles, slot * FIELDS + HEAD, 1)
        if online != 0:
            is_blank = False
        else:
            end_row = -1
            while (end_row <= 0) & (tile < total):
                i_slot = tile // section % slots
                i_h = tile // section // slots * section + tile % section
                i_b = find_sequence(cu_seqlens, i_slot, B, BM)
                begin = gl.load(cu_seqlens + i_b)
                length = gl.load(cu_seqlens + i_b + 1) - begin
                # Last rows first: they have the most keys when causal. Row tiles end where the sequence does, so the
                # one that is not full is the first, where the least is to do.
                end_row = gl.cdiv(length, ROWS) * ROWS - (i_slot - begin // BM - i_b) * BM
                if end_row <= 0:
                    tile = claim(counter, total)
            if end_row <= 0:
                # The other slot's tile may still ask to be done again, which is known when its slot comes round:
                # a blank tile goes in between, and the end after that.
                length = 0
                end_row = gl.where(is_blank, -1, 0)
                is_blank = True
        put(tiles, slot * FIELDS + BEGIN, begin, 1)
        put(tiles, slot * FIELDS + LENGTH, length, 1)
        put(tiles, slot * FIELDS + END_ROW, end_row, 1)
        put(tiles, slot * FIELDS + HEAD, i_h, 1)
        put(tiles, slot * FIELDS + ONLINE, online, 1)
        n = key_tiles(end_row, length, BN, IS_CAUSAL)
        if n <= 0:
            mbarrier.arrive(q_bars[0].index(slot))
            is_running = end_row >= 0
        else:
            mbarrier.expect(q_bars[0].index(slot), BM * D * 2)
            for c in gl.static_range(CONSUMERS):
                row = begin + end_row + (c - CONSUMERS) * ROWS
                load_tile(
                    q_desc,
                    [row, i_h * D],
                    q_bars[0].index(slot),
                    q_smem.index(slot * CONSUMERS + c),
                )
            if online == 0:
                # While the queries are on their way.
                tile = claim(counter, total)
        for i in range(n):
            # Last key tile first.
            row = RAGGED_END - length + (n - 1 - i) * BN
            where = [RAGGED_END, begin + length, row, i_h // GROUP * D]
            mbarrier.wait(k_bars[1].index(stage), phase ^ 1)
            mbarrier.expect(k_bars[0].index(stage), BN * D * 2)
            load_tile(k_desc, where, k_bars[0].index(stage), k_smem.index(stage))
            mbarrier.wait(v_bars[1].index(stage), phase ^ 1)
            mbarrier.expect(v_bars[0].index(stage), BN * D * 2)
            load_tile(v_desc, where, v_bars[0].index(stage), v_smem.index(stage))
            stage, phase = advance(stage, phase, STAGES)
        slot, slot_phase = advance(slot, slot_phase, Q_SLOTS)


@gluon.jit
def consume(
    C: gl.constexpr, out, scale, memory, notes, q_bars, k_bars, v_bars,
    HQ: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr, SUM_BY_MMA: gl.constexpr,
):  # fmt: skip
    """Computes 64 rows of every row tile of this program."""
    q_smem, k_smem, v_smem = memory
    tiles, again = notes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    l_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    # 16 bytes a lane, rows where the products leave them.
    columns: gl.constexpr = [[0, 32], [0, 64]] if D == 128 else [[0, 32]]
    store_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]] + columns + [[8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, D],
    )  # fmt: skip
    dtype: gl.constexpr = q_smem.dtype
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    mbarrier.wait(q_bars[0].index(slot), slot_phase)
    tile_end = get(tiles, END_ROW, 4)
    while tile_end >= 0:
        begin = get(tiles, slot * FIELDS + BEGIN, 4)
        length = get(tiles, slot * FIELDS + LENGTH, 4)
        i_h = get(tiles, slot * FIELDS + HEAD, 4)
        online = get(tiles, slot * FIELDS + ONLINE, 4)
        first_row = tile_end + (C - CONSUMERS) * ROWS
        n = gl.where(first_row >= 0, key_tiles(first_row + ROWS, length, BN, IS_CAUSAL), 0)
        # Key tiles that these rows do not see pass by.
        for _ in range(key_tiles(tile_end, length, BN, IS_CAUSAL) - n):
            mbarrier.wait(k_bars[0].index(stage), phase)
            mbarrier.arrive(k_bars[1].index(stage))
            mbarrier.wait(v_bars[0].index(stage), phase)
            mbarrier.arrive(v_bars[1].index(stage))
            stage, phase = advance(stage, phase, STAGES)
        wants_online = 0
        if n > 0:
            b_q = q_smem.index(slot * CONSUMERS + C)
            mbarrier.wait(k_bars[0].index(stage), phase)
            b_s = warpgroup_mma_wait(0, [issue_scores(b_q, k_smem.index(stage), D, BN)])
            mbarrier.arrive(k_bars[1].index(stage))
            o_n = (n - 1) * BN + gl.arange(0, BN, gl.SliceLayout(0, s_layout))
            if IS_CAUSAL:
                o_m = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
                b_s = gl.where(o_m[:, None] >= o_n[None, :], b_s, float("-inf"))
            else:
                b_s = gl.where((o_n < length)[None, :], b_s, float("-inf"))
            b_offset = gl.max(b_s, 1) * scale + gl.where(online != 0, 0.0, HEADROOM)
            b_p = weights(exponentials(b_s, scale, b_offset), D, dtype)
            b_out = gl.zeros([ROWS, D], gl.float32, o_layout)
            if SUM_BY_MMA:
                b_sum = gl.zeros([ROWS, 8], gl.float32, l_layout)
            else:
                b_sum = lane_sums(b_p)
            keys = (b_q, k_smem, v_smem, k_bars, v_bars)
            state = (b_p, b_out, b_sum, stage, phase)
            if online == 0:
                state = static_pass(keys, state, n, scale, b_offset, D, BN, STAGES, SUM_BY_MMA)
            else:
                state = online_pass(keys, state, n, scale, b_offset, D, BN, STAGES, SUM_BY_MMA)
            b_p, b_out, b_sum, stage, phase = state
            if SUM_BY_MMA:
                b_total = gl.convert_layout(gl.max(add_rows(b_sum, b_p, BN), 1), o_rows)
            else:
                b_total = gl.convert_layout(gl.sum(b_sum, 1), o_rows)
            mbarrier.wait(v_bars[0].index(stage), phase)
            b_out = issue_output(b_p, v_smem.index(stage), b_out, D, BN)
            b_out, b_p = warpgroup_mma_wait(0, [b_out, b_p])
            mbarrier.arrive(v_bars[1].index(stage))
            stage, phase = advance(stage, phase, STAGES)

            if online == 0:
                # False for NaN too. Rows past the end hold whatever follows the sequence, and do not count.
                is_fine = (b_total <= LIMIT) | (first_row + gl.arange(0, ROWS, o_rows) >= length)
                wants_online = 1 - gl.min(is_fine.to(gl.int32), 0)
            b_o = gl.convert_layout((b_out * (1.0 / b_total)[:, None]).to(dtype), store_layout)
            o_t = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, store_layout))
            o_d = gl.arange(0, D, gl.SliceLayout(0, store_layout))
            p_out = out + (begin.to(gl.int64) * (HQ * D) + i_h * D)
            p_out = p_out + o_t[:, None].to(gl.int64) * (HQ * D) + o_d[None, :]
            gl.store(p_out, b_o, mask=(o_t < length)[:, None] & (o_d < D)[None, :])
        put(again, slot * CONSUMERS + C, wants_online, 4)
        mbarrier.arrive(q_bars[1].index(slot))
        slot, slot_phase = advance(slot, slot_phase, Q_SLOTS)
        mbarrier.wait(q_bars[0].index(slot), slot_phase)
        tile_end = get(tiles, slot * FIELDS + END_ROW, 4)


@gluon.jit(do_not_specialize=["slots", "B", "section", "total"])
def attention_sm90_kernel(
    q_desc,  # [T, HQ * D], block [64, D]
    k_desc,  # ragged descriptor of [T, HQ // GROUP * D], block [1, 1, BN, D]
    v_desc,  # likewise
    out,  # [T, HQ, D], contiguous
    cu_seqlens,  # [B + 1]
    counter,  # [1] int32, zero; unread when every tile has a program of its own
    scale,  # softmax_scale · log2(e)
    slots,
    B,
    section,  # query heads taken together
    total,  # slots · HQ
    HQ: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    SUM_BY_MMA: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [Q_SLOTS * CONSUMERS, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], v_desc.layout)
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = gl.allocate_shared_memory(gl.int32, [Q_SLOTS * FIELDS, 1], word)
    again = gl.allocate_shared_memory(gl.int32, [Q_SLOTS * CONSUMERS, 1], word)
    for i in gl.static_range(Q_SLOTS * CONSUMERS):
        put(again, i, 0, 4)
    q_bars = ring(Q_SLOTS, CONSUMERS)
    k_bars = ring(STAGES, CONSUMERS)
    v_bars = ring(STAGES, CONSUMERS)
    block_barrier()
    wait_for_the_kernel_before()
    memory = (q_smem, k_smem, v_smem)
    notes = (tiles, again)
    descriptors = (q_desc, k_desc, v_desc)
    # These tuples stand inline: through a variable their constexprs would become tensors.
    gl.warp_specialize(
        [
            (consume, (0, out, scale, memory, notes, q_bars, k_bars, v_bars,
                       HQ, D, BN, STAGES, IS_CAUSAL, SUM_BY_MMA)),
            (consume, (1, out, scale, memory, notes, q_bars, k_bars, v_bars,
                       HQ, D, BN, STAGES, IS_CAUSAL, SUM_BY_MMA)),
            (consume, (2, out, scale, memory, notes, q_bars, k_bars, v_bars,
                       HQ, D, BN, STAGES, IS_CAUSAL, SUM_BY_MMA)),
            (produce, (descriptors, cu_seqlens, counter, memory, notes, q_bars, k_bars, v_bars,
                       slots, B, section, total, D, BN, STAGES, GROUP, IS_CAUSAL)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def launch_attention_sm90(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    causal: bool,
    softmax_scale: float,
    out: torch.Tensor,
) -> None:
    """Fills `out`, contiguous (T, HQ, D); all in bfloat16, D of CONFIGS, rows on the 16-byte grid."""
    T, HQ, D = q.shape
    HKV = k.shape[1]
    B = cu_seqlens.shape[0] - 1
    if T == 0:
        return
    config = CONFIGS[D]
    slots = T // (ROWS.value * CONSUMERS.value) + B
    programs = min(multiprocessors(q.device), slots * HQ)
    # Nothing is left to take where every tile has a program.
    counter = cu_seqlens if programs == slots * HQ else cu_seqlens.new_zeros(1)
    attention_sm90_kernel[(programs,)](
        row_descriptor(q, ROWS.value),
        ragged_descriptor(k, config.BN),
        ragged_descriptor(v, config.BN),
        out,
        cu_seqlens,
        counter,
        softmax_scale * LOG2_E,
        slots,
        B,
        heads_together(HQ, HKV, max_seqlen, 2 * D * k.element_size()),
        slots * HQ,
        HQ=HQ,
        GROUP=HQ // HKV,
        D=D,
        BN=config.BN,
        STAGES=config.STAGES,
        IS_CAUSAL=causal,
        SUM_BY_MMA=config.SUM_BY_MMA,
        num_warps=4,
        launch_pdl=True,
    )
