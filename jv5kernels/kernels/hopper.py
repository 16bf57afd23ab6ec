"""What Gluon kernels for Hopper share: rings of buffers, words in shared memory, TMA descriptors of packed tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Names that Gluon changed after Triton 3.6.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
SharedMemory = gl.shared_memory_descriptor
is_renamed = hasattr(SharedMemory, "reinterpret")
view_memory = SharedMemory.reinterpret if is_renamed else SharedMemory._reinterpret
block_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# How Gluon kernels are launched (see launch.py): the warps of the first partition, and chained.
OPTIONS = (("num_warps", 4), ("launch_pdl", True))

# Where the row dimension of a ragged descriptor ends: at the end of the sequence.
RAGGED_END = gl.constexpr(0x40000000)


@gluon.jit
def wait_for_the_kernel_before():
    """As in launch.py: every thread that follows sees its results, and the kernel after may start."""
    gdc_wait()
    gdc_launch_dependents()


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and its phase."""
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def left_and_right(b):
    """[R, 2 * N] -> its two halves [R, N]: registers of their own, without a move, in layouts of products."""
    R: gl.constexpr = b.shape[0]
    N: gl.constexpr = b.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(b, [R, 2, N]), [0, 2, 1]))


@gluon.jit
def put(memory, index, value, WARPS: gl.constexpr):
    """Writes one integer to shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    memory.index(index).store(gl.full([1], value, gl.int32, layout))


@gluon.jit
def get(memory, index, WARPS: gl.constexpr):
    """Reads one integer from shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(memory.index(index).load(layout), 0)


@gluon.jit
def ring(COUNT: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of a ring of buffers: filled by one producer, emptied by all consumers."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return full, empty


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Persistent programs: one for each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class Memory(NamedTuple):
    """What a descriptor wants to know of a tensor, which would live on with it."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=4096)
def _kept_descriptor(
    memory: Memory, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(128, 8 * memory.dtype.itemsize, rank=len(block))
    descriptor = TensorDescriptor(memory, list(shape), list(strides), list(block), layout)
    descriptor.kind = (memory.dtype, block)
    return descriptor


def descriptor(
    x: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    """A descriptor of x's memory, seen with another shape and strides (in elements), for tiles of the size `block`.

    Tiles lie in shared memory as wgmma reads them. It is made once for weights and for buffers that come again.
    """
    return _kept_descriptor(Memory(x.data_ptr(), x.dtype), shape, strides, block)


def block_descriptor(x: torch.Tensor, *block: int) -> TensorDescriptor:
    """A descriptor of the blocks of a matrix, or of matrices."""
    return descriptor(x, tuple(x.shape), x.stride(), block)


def ragged_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of tiles [rows, D] of x (T, H, D) that end where a sequence does.

    What lies behind it is read as zeros and not written.

    Two leading dimensions shift the origin (their strides cancel in 64-bit arithmetic), so that row 2^30, where the
    third dimension ends, is the end of the sequence; triton.tools.ragged_tma explains the trick.
    """
    _, H, D = x.shape
    stride = x.stride(0)
    shape = (0x7FFF0000, 0x7FFF0000, RAGGED_END.value, H * D)
    strides = (2**34 - stride, stride, stride, 1)
    return descriptor(x, shape, strides, (1, 1, rows, D))


def row_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of tiles [rows, D] of x (T, H, D), whatever sequence the rows belong to."""
    T, H, D = x.shape
    return descriptor(x, (T, H * D), (x.stride(0), 1), (rows, D))
