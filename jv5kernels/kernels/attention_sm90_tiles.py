"""The row tiles of attention on Hopper: in which order programs take them, and the warp that feeds its consumers.

Programs take row tiles from a list in order. As in kernels/attention.py, tile slots of sequence i begin at
cu_seqlens[i] // BM + i and a search finds the sequence of a slot; with batches packed longest first, long work comes
first. The producer finds a tile while the consumers still have key tiles in the ring, so it reads as few times as it
can: a row tile of 512 tokens is done in 3 to 9 µs, and six reads one after the other took 2.5.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from jv5kernels.kernels.attention_sm90_softmax import ROWS
from jv5kernels.kernels.hopper import RAGGED_END, advance, get, load_tile, put

CONSUMERS = gl.constexpr(3)
Q_SLOTS = gl.constexpr(2)
# What the producer tells the consumers of a row tile.
BEGIN, LENGTH, END_ROW, HEAD, ONLINE = (gl.constexpr(i) for i in range(5))
FIELDS = gl.constexpr(5)
# Sequences that a step of the search tells apart.
FAN = gl.constexpr(128)


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
    """The next tile that no program has; `total` when each program had the only one it gets.

    For every tile that it was given a program asks once more, so the last of `total` questions leaves zero behind.
    """
    tile = total
    if total > gl.num_programs(0):
        count = gl.atomic_add(counter, 1, sem="relaxed")
        if count == total - 1:
            gl.store(counter, 0)
        tile = gl.num_programs(0) + count
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
    q_smem, kv_smem = memory
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
            load_tile(k_desc, where, k_bars[0].index(stage), kv_smem.index(stage))
            mbarrier.wait(v_bars[1].index(stage), phase ^ 1)
            mbarrier.expect(v_bars[0].index(stage), BN * D * 2)
            load_tile(v_desc, where, v_bars[0].index(stage), kv_smem.index(STAGES + stage))
            stage, phase = advance(stage, phase, STAGES)
        slot, slot_phase = advance(slot, slot_phase, Q_SLOTS)
