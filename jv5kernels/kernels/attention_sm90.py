"""Attention inside packed sequences on Hopper: a persistent, warp-specialised Gluon kernel.

    out[i] = softmax(softmax_scale · q[i] · kᵀ) · v      keys of the same sequence, j <= i when causal

A program has CONSUMERS warpgroups, each with 64 query rows of one head, and one warp that feeds them by TMA: a ring of
STAGES tiles of BN keys and values, which all consumers share, and two slots for queries, so that the next row tile
comes in while this one is computed. Results take the place of their queries and leave by TMA while the next row tile
begins; then the slot is free. The order of the products is that of FlashAttention-3 (arXiv 2407.08608).

Softmax with a static offset. The first key tile of a row (that of its diagonal, or the last one) fixes the offset

    c = max of that tile's scaled scores + HEADROOM,      p = 2^(score - c)

for all its keys: no running maximum, no rescaling. A sum above 2^HEADROOM means that some score exceeds the first
tile's by far; the same program then does those rows again with the online softmax. Numerator and denominator sum
the same rounded p, so a row that one key dominates is exact. Values between 2^-86 and 2^86 in magnitude neither
vanish nor overflow on the way.

At head_dim 64 exponentials are the limit: they are spread among the multiplications, and the product with the values
sums the weights as well (attention_sm90_ptx.py). At head_dim 128, where tensor cores have no time left, lanes add p up,
the first two times in bf16, two additions an instruction: that rounds four p to 2^-9 of their sum once or twice,
independently for every four, and adds 1 to 3 % to the error, which the p themselves decide.

Which program computes a row tile, and after which, never changes a bit of it: attention_sm90_tiles.py hands them out.

What the speed depends on is checked in the machine code by tests without a GPU: no spills; the wait for p·v behind the
exponentials (an mbarrier wait between them keeps ptxas from hoisting it); no wgmma in flight over a back edge, which
would make ptxas serialise them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from jv5kernels.kernels.attention import LOG2_E, heads_together
from jv5kernels.kernels.attention_sm90_ptx import write_ones
from jv5kernels.kernels.attention_sm90_softmax import (
    ROWS,
    add_weights,
    exponentials,
    finish,
    issue_output,
    issue_scores,
    no_output,
    no_sums,
    online_pass,
    static_pass,
    weights,
)
from jv5kernels.kernels.attention_sm90_tiles import (
    BEGIN,
    CONSUMERS,
    END_ROW,
    FIELDS,
    HEAD,
    LENGTH,
    ONLINE,
    Q_SLOTS,
    key_tiles,
    produce,
)
from jv5kernels.kernels.hopper import (
    OPTIONS,
    RAGGED_END,
    advance,
    block_barrier,
    get,
    multiprocessors,
    put,
    ragged_descriptor,
    ring,
    row_descriptor,
    store_tile,
    view_memory,
    wait_for_the_kernel_before,
)
from jv5kernels.kernels.launch import launch

CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(160), gl.constexpr(32)
HEADROOM = gl.constexpr(40.0)
LIMIT = gl.constexpr(2.0**40)  # of a row's sum under the static offset


@dataclass(frozen=True)
class Config:
    """Keys of a tile, stages of their ring, and whether exponentials, not tensor cores, are the limit."""

    BN: int
    STAGES: int
    EXP_BOUND: bool


# head_dim -> configuration. Timed on an H200 and an H100 against cuDNN; bench/log_attention.md has what lost.
CONFIGS = {
    64: Config(BN=128, STAGES=4, EXP_BOUND=True),
    128: Config(BN=64, STAGES=4, EXP_BOUND=False),
}

# Captured calls whose counter is made ahead, on a device: 28 layers in 146 graphs. Later ones fill theirs themselves.
GRAPH_CALLS = 4096
_COUNTERS_OF_GRAPHS: dict[torch.device, Iterator[torch.Tensor]] = {}


@gluon.jit
def release(q_bars, slot):
    """Gives a slot back whose results have left; -1 stands for none."""
    if slot >= 0:
        tma.store_wait(0)
        block_barrier()
        mbarrier.arrive(q_bars[1].index(slot))


@gluon.jit
def consume(
    C: gl.constexpr, out_desc, scale, memory, notes, q_bars, k_bars, v_bars,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
    EXP_BOUND: gl.constexpr,
):  # fmt: skip
    """Computes 64 rows of every row tile of this program."""
    q_smem, kv_smem = memory
    tiles, again = notes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = q_smem.dtype
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    leaving = -1  # the slot from which results are on their way out
    mbarrier.wait(q_bars[0].index(slot), slot_phase)
    tile_end = get(tiles, END_ROW, 4)
    while tile_end >= 0:
        begin = get(tiles, slot * FIELDS + BEGIN, 4)
        length = get(tiles, slot * FIELDS + LENGTH, 4)
        i_h = get(tiles, slot * FIELDS + HEAD, 4)
        online = get(tiles, slot * FIELDS + ONLINE, 4)
        first_row = tile_end + (C - CONSUMERS) * ROWS
        n = gl.where(first_row >= 0, key_tiles(first_row + ROWS, length, BN, IS_CAUSAL), 0)
        # Rows are done again for those that asked.
        n = gl.where((online == 0) | (get(again, slot * CONSUMERS + C, 4) != 0), n, 0)
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
            b_s = warpgroup_mma_wait(0, [issue_scores(b_q, kv_smem.index(stage), D, BN)])
            mbarrier.arrive(k_bars[1].index(stage))
            o_n = (n - 1) * BN + gl.arange(0, BN, gl.SliceLayout(0, s_layout))
            if IS_CAUSAL:
                o_m = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
                b_s = gl.where(o_m[:, None] >= o_n[None, :], b_s, float("-inf"))
            else:
                b_s = gl.where((o_n < length)[None, :], b_s, float("-inf"))
            b_offset = gl.max(b_s, 1) * scale + gl.where(online != 0, 0.0, HEADROOM)
            b_e = exponentials(b_s, scale, b_offset, n, EXP_BOUND)
            b_p = weights(b_e, D, dtype, EXP_BOUND)
            release(q_bars, leaving)
            b_out = no_output(D, EXP_BOUND)
            b_sum = no_sums(b_p)
            keys = (b_q, kv_smem, k_bars, v_bars)
            state = (b_p, b_out, b_sum, stage, phase)
            if online == 0:
                state = static_pass(keys, state, n, scale, b_offset, D, BN, STAGES, EXP_BOUND)
            else:
                state = online_pass(keys, state, n, scale, b_offset, D, BN, STAGES, EXP_BOUND)
            b_p, b_out, b_sum, stage, phase = state
            b_sum = add_weights(b_sum, b_p, EXP_BOUND)
            mbarrier.wait(v_bars[0].index(stage), phase)
            b_out = issue_output(b_p, kv_smem, stage, b_out, D, BN, STAGES, EXP_BOUND)
            b_out, b_p = warpgroup_mma_wait(0, [b_out, b_p])
            mbarrier.arrive(v_bars[1].index(stage))
            stage, phase = advance(stage, phase, STAGES)
            b_out, b_total = finish(b_out, b_sum, D, EXP_BOUND)
            b_total = gl.convert_layout(b_total, o_rows)

            if online == 0:
                # False for NaN too. Rows past the end hold whatever follows the sequence, and do not count.
                is_fine = (b_total <= LIMIT) | (first_row + gl.arange(0, ROWS, o_rows) >= length)
                wants_online = 1 - gl.min(is_fine.to(gl.int32), 0)
            put(again, slot * CONSUMERS + C, wants_online, 4)
            if wants_online == 0:
                # Results take the place of the queries, which are read no more.
                b_o = (b_out * (1.0 / b_total)[:, None]).to(dtype)
                b_q.store(b_o)
                fence_async_shared()
                block_barrier()
                row = RAGGED_END - length + first_row
                where = [RAGGED_END, begin + length, row, i_h * D]
                store_tile(
                    out_desc, where, view_memory(b_q, dtype, [1, 1, ROWS, D], out_desc.layout)
                )
                leaving = slot
            else:
                mbarrier.arrive(q_bars[1].index(slot))
                leaving = -1
        else:
            release(q_bars, leaving)
            leaving = -1
            put(again, slot * CONSUMERS + C, 0, 4)
            mbarrier.arrive(q_bars[1].index(slot))
        slot, slot_phase = advance(slot, slot_phase, Q_SLOTS)
        mbarrier.wait(q_bars[0].index(slot), slot_phase)
        tile_end = get(tiles, slot * FIELDS + END_ROW, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["slots", "B", "section", "total"])
def attention_sm90_kernel(
    q_desc,  # [T, HQ * D], block [64, D]
    k_desc,  # ragged descriptor of [T, HQ // GROUP * D], block [1, 1, BN, D]
    v_desc,  # likewise
    out_desc,  # ragged descriptor of [T, HQ * D], block [1, 1, 64, D]
    cu_seqlens,  # [B + 1]
    counter,  # [1] int32, zero before and after
    scale,  # softmax_scale · log2(e)
    slots,
    B,
    section,  # query heads taken together
    total,  # slots · HQ
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    EXP_BOUND: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [Q_SLOTS * CONSUMERS, ROWS, D], q_desc.layout)
    # Keys of all stages, then values, then ones.
    TILES: gl.constexpr = 2 * STAGES + EXP_BOUND
    kv_smem = gl.allocate_shared_memory(dtype, [TILES, 1, 1, BN, D], k_desc.layout)
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = gl.allocate_shared_memory(gl.int32, [Q_SLOTS * FIELDS, 1], word)
    again = gl.allocate_shared_memory(gl.int32, [Q_SLOTS * CONSUMERS, 1], word)
    for i in gl.static_range(Q_SLOTS * CONSUMERS):
        put(again, i, 0, 4)
    q_bars = ring(Q_SLOTS, CONSUMERS)
    k_bars = ring(STAGES, CONSUMERS)
    v_bars = ring(STAGES, CONSUMERS)
    block_barrier()
    if EXP_BOUND:
        write_ones(kv_smem, 2 * STAGES)
    wait_for_the_kernel_before()
    memory = (q_smem, kv_smem)
    notes = (tiles, again)
    descriptors = (q_desc, k_desc, v_desc)
    # These tuples stand inline: through a variable their constexprs would become tensors.
    gl.warp_specialize(
        [
            (consume, (0, out_desc, scale, memory, notes, q_bars, k_bars, v_bars,
                       D, BN, STAGES, IS_CAUSAL, EXP_BOUND)),
            (consume, (1, out_desc, scale, memory, notes, q_bars, k_bars, v_bars,
                       D, BN, STAGES, IS_CAUSAL, EXP_BOUND)),
            (consume, (2, out_desc, scale, memory, notes, q_bars, k_bars, v_bars,
                       D, BN, STAGES, IS_CAUSAL, EXP_BOUND)),
            (produce, (descriptors, cu_seqlens, counter, memory, notes, q_bars, k_bars, v_bars,
                       slots, B, section, total, D, BN, STAGES, GROUP, IS_CAUSAL)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@lru_cache
def _tile_counter_of_stream(device: torch.device, stream: int) -> torch.Tensor:
    if device not in _COUNTERS_OF_GRAPHS:
        # 16 bytes each: launch.py wants addresses on that grid.
        counters = torch.zeros((GRAPH_CALLS, 4), dtype=torch.int32, device=device)
        _COUNTERS_OF_GRAPHS.setdefault(device, map(counters.__getitem__, range(GRAPH_CALLS)))
    return torch.zeros(1, dtype=torch.int32, device=device)


def tile_counter(device: torch.device) -> torch.Tensor:
    """A zero that no other call uses at the same time: calls on a stream follow each other and leave it zero.

    A graph may be replayed on any stream, so each of its calls gets one of its own, made by the first call outside of a
    capture: a fill in the graph would take 1 to 2 µs each time.
    """
    if not torch.cuda.is_current_stream_capturing():
        return _tile_counter_of_stream(device, torch.cuda.current_stream(device).cuda_stream)
    counter = next(_COUNTERS_OF_GRAPHS.get(device, iter(())), None)
    if counter is None:
        counter = torch.zeros(1, dtype=torch.int32, device=device)
    return counter


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
    section = heads_together(HQ, HKV, max_seqlen, 2 * D * k.element_size())
    launch(
        attention_sm90_kernel,
        q.device,
        programs,
        (cu_seqlens, tile_counter(q.device)),
        (softmax_scale * LOG2_E, slots, B, section, slots * HQ),
        (HQ // HKV, D, config.BN, config.STAGES, causal, config.EXP_BOUND),
        OPTIONS,
        (
            row_descriptor(q, ROWS.value),
            ragged_descriptor(k, config.BN),
            ragged_descriptor(v, config.BN),
            ragged_descriptor(out, ROWS.value),
        ),
    )
