"""What fused projections on Hopper share: x · weightᵀ tile by tile, in Gluon.

A persistent program takes tiles of 128 rows and BN columns of the product. Two consumer warpgroups have 64 rows of it
each and a producer warp feeds them by TMA through a ring of STAGES steps of K. Results leave by TMA too, by way of
shared memory, so that a consumer goes on with its next tile while they are written. On an H200 the card's power is the
limit: what counts is how many instructions there are and bytes moved, not their order (bench/log_epilogues.md).

Each tile is one loop over the whole of K, in one order, and the configuration is fixed: a row gives the same bits in
any batch. Tiles are ordered in bands of GROUP row tiles, which share their part of the weight through the L2 cache.

The weight is seen as [PARTS, rows, K]; a tile has BN / PARTS rows of each part.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from jv5kernels.kernels.hopper import (
    advance,
    block_barrier,
    block_descriptor,
    descriptor,
    load_tile,
    multiprocessors,
    ring,
    store_tile,
    wait_for_the_kernel_before,
)
from jv5kernels.kernels.linear import device_class, fits_descriptors

CONSUMERS = gl.constexpr(2)
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
ROWS = gl.constexpr(64)  # of one consumer, the height of a wgmma
BN = gl.constexpr(256)
BK = gl.constexpr(64)
STAGES = gl.constexpr(4)
# Columns that an epilogue takes at a time.
BC = gl.constexpr(128)
# Row tiles that are taken together for each column of weight tiles.
GROUP = gl.constexpr(8)


@gluon.jit
def tile_of(i_tile, tiles_m, tiles_n: gl.constexpr):
    """Row and column of a tile: bands of GROUP row tiles, column by column."""
    first = i_tile // (GROUP * tiles_n) * GROUP
    rows = gl.minimum(tiles_m - first, GROUP)
    within = i_tile % (GROUP * tiles_n)
    return first + within % rows, within // rows


@gluon.jit
def allocate(x_desc, w_desc, PARTS: gl.constexpr):
    """Memory of the ring, for x and the weight, and of the consumers' results; and the ring's barriers.

    Behind it the kernel before is done.
    """
    dtype: gl.constexpr = x_desc.dtype
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * CONSUMERS, ROWS, BK], x_desc.layout)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES, PARTS, BN // PARTS, BK], w_desc.layout)
    results = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, BC], x_desc.layout)
    bars = ring(STAGES, CONSUMERS)
    block_barrier()
    wait_for_the_kernel_before()
    return (x_smem, w_smem, results), bars


@gluon.jit
def produce(
    x_desc, w_desc, memory, bars, T, TILES_N: gl.constexpr, K: gl.constexpr, PARTS: gl.constexpr
):
    """Feeds the consumers: per step of K, 64 rows of x for each of them and a tile of the weight."""
    x_smem, w_smem, _ = memory
    full, empty = bars
    tiles_m = gl.cdiv(T, CONSUMERS * ROWS)
    stage = 0
    phase = 0
    for i_tile in range(gl.program_id(0), tiles_m * TILES_N, gl.num_programs(0)):
        i_m, i_n = tile_of(i_tile, tiles_m, TILES_N)
        for i_k in range(0, K, BK):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, (CONSUMERS * ROWS + BN) * BK * 2)
            for c in gl.static_range(CONSUMERS):
                row = (i_m * CONSUMERS + c) * ROWS
                load_tile(x_desc, [row, i_k], bar, x_smem.index(stage * CONSUMERS + c))
            load_tile(w_desc, [0, i_n * (BN // PARTS), i_k], bar, w_smem.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def multiply(C: gl.constexpr, memory, bars, stage, phase, K: gl.constexpr):
    """The products [ROWS, BN] of a consumer's rows of a tile, in fp32, and the place in the ring after them."""
    x_smem, w_smem, _ = memory
    full, empty = bars
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    b_out = gl.zeros([ROWS, BN], gl.float32, layout)
    for _ in range(0, K, BK):
        mbarrier.wait(full.index(stage), phase)
        b_x = x_smem.index(stage * CONSUMERS + C)
        b_weight = w_smem.index(stage).reshape([BN, BK]).permute((1, 0))
        b_out = warpgroup_mma(b_x, b_weight, b_out, is_async=True)
        b_out = warpgroup_mma_wait(0, [b_out])
        mbarrier.arrive(empty.index(stage))
        stage, phase = advance(stage, phase, STAGES)
    return b_out, stage, phase


@gluon.jit
def store(b, out_desc, memory, C: gl.constexpr, first_row, first_column):
    """Has [ROWS, BC] rounded and written; `finish` waits for the last of them."""
    results = memory[2].index(C)
    b = b.to(out_desc.dtype)
    # The one before has left the shared memory.
    tma.store_wait(0)
    block_barrier()
    results.store(b)
    fence_async_shared()
    block_barrier()
    store_tile(out_desc, [first_row, first_column], results)


@gluon.jit
def finish():
    """Waits until shared memory may go."""
    tma.store_wait(0)


def descriptors(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, parts: int = 1
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """Of x (T, K), of the weight (parts · rows, K) and of the output, in the blocks that are loaded and stored."""
    rows, K = weight.shape
    stride = weight.stride(0)
    weight_desc = descriptor(
        weight,
        (parts, rows // parts, K),
        (rows // parts * stride, stride, 1),
        (parts, BN.value // parts, BK.value),
    )
    return (
        block_descriptor(x, ROWS.value, BK.value),
        weight_desc,
        block_descriptor(out, ROWS.value, BC.value),
    )


def programs(tokens: int, tiles_n: int, device: torch.device) -> int:
    """Persistent programs for so many rows and column tiles."""
    return min(-(-tokens // (CONSUMERS.value * ROWS.value)) * tiles_n, multiprocessors(device))


def reason_against(x: torch.Tensor, weight: torch.Tensor, columns: int) -> str | None:
    """Why no kernel of this kind computes x · weightᵀ into so many columns, or None."""
    if device_class(x.device) != "sm_90" or x.element_size() != 2:
        return "the kernel is for 16-bit values on sm_90"
    if columns % 8 or not fits_descriptors(x, weight):
        return "rows do not start at multiples of 16 bytes"
    return None
