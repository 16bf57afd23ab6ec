"""A GEMM whose configuration never depends on the number of rows: out = x · weightᵀ.

    out[t, n] = Σ_k x[t, k] · weight[n, k]      fp32 accumulation, k in tiles of BK from 0 to K

Every output tile is one program's loop over the whole of K, in one order, so a row's bits depend on the
row, the weight and the configuration alone, and the configuration on the device class, element size and
alignment alone. Rows past the end only fill up the last tile. Programs are persistent: one for each
multiprocessor, which takes every P-th tile, so that a tile's loads overlap the end of the one before.

Two kernels, one for tensor descriptors (TMA, sm_90), one for pointers (everything else, and rows that do
not start at multiples of 16 bytes). Both multiply the same tiles in the same order.

Tiles are ordered in bands of GROUP row tiles, which share their part of the weight through the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
# Row tiles that are taken together for each column of weight tiles.
GROUP = 8
# Programs under the interpreter: enough for each to take several tiles.
INTERPRETED_PROGRAMS = 2


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows, columns, depth), launch options and which of the two kernels."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    use_descriptors: bool = False


# (device class, bytes of an element, rows aligned for descriptors) -> configuration.
# 128x256 tiles read 85 FLOP of operands a byte from the L2 cache, 128x128 only 64.
CONFIGS: dict[tuple[str, int, bool], Config] = {
    ("sm_90", 2, True): Config(128, 256, 64, num_warps=8, num_stages=4, use_descriptors=True),
    ("sm_90", 2, False): Config(128, 256, 64, num_warps=8, num_stages=3),
    ("sm_90", 4, False): Config(64, 64, 32, num_warps=8, num_stages=3),
    # Fits the 99 KB of shared memory of consumer GPUs.
    ("sm_80", 2, False): Config(128, 128, 32, num_warps=8, num_stages=3),
    ("sm_80", 4, False): Config(64, 64, 32, num_warps=8, num_stages=2),
}


@lru_cache
def device_class(device: torch.device) -> str:
    """Which configurations a device uses; under the interpreter those of sm_90."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9:
        return "sm_90"
    return "sm_80"


@lru_cache
def number_of_programs(device: torch.device) -> int:
    """Persistent programs: one for each multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def tile_of(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: bands of GROUP row tiles, column by column."""
    first = i_tile // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = i_tile % (GROUP * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def add_product(b_x, b_weight, b_out):
    """b_out + b_x · b_weightᵀ: [BM, BK], [BN, BK], [BM, BN]."""
    if INTERPRET:  # the interpreter multiplies bf16 bit patterns
        b_x, b_weight = b_x.to(tl.float32), b_weight.to(tl.float32)
    return tl.dot(b_x, b_weight.T, b_out, input_precision="ieee")


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x,  # [T, K]
    weight,  # [N, K]
    out,  # [T, N]
    stride_xt,
    stride_wn,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m = tl.cdiv(T, BM)
    tiles_n = tl.cdiv(N, BN)
    o_k = tl.arange(0, BK)  # [BK]
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        i_m, i_n = tile_of(i_tile, tiles_m, tiles_n, GROUP)
        o_t = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
        o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
        # Rows past the end repeat the first: in bounds without a mask, and never stored.
        p_x = x + tl.where(o_t < T, o_t, 0)[:, None] * stride_xt + o_k[None, :]
        p_weight = weight + tl.where(o_n < N, o_n, 0)[:, None] * stride_wn + o_k[None, :]
        b_out = tl.zeros([BM, BN], tl.float32)
        for i_k in range(0, K, BK):
            if K % BK == 0:
                b_x = tl.load(p_x + i_k)  # [BM, BK]
                b_weight = tl.load(p_weight + i_k)  # [BN, BK]
            else:
                m_k = (i_k + o_k < K)[None, :]
                b_x = tl.load(p_x + i_k, mask=m_k, other=0.0)
                b_weight = tl.load(p_weight + i_k, mask=m_k, other=0.0)
            b_out = add_product(b_x, b_weight, b_out)
        m = (o_t < T)[:, None] & (o_n < N)[None, :]
        p_out = out + o_t[:, None] * N + o_n[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T"])
def linear_descriptor_kernel(
    x,  # descriptor of [T, K], block [BM, BK]
    weight,  # descriptor of [N, K], block [BN, BK]
    out,  # descriptor of [T, N], block [BM, BN // 2]
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m = tl.cdiv(T, BM)
    tiles_n = tl.cdiv(N, BN)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        i_m, i_n = tile_of(i_tile, tiles_m, tiles_n, GROUP)
        b_out = tl.zeros([BM, BN], tl.float32)
        for i_k in range(0, K, BK):
            b_x = x.load([i_m * BM, i_k])  # [BM, BK], zeros past the end
            b_weight = weight.load([i_n * BN, i_k])  # [BN, BK]
            b_out = add_product(b_x, b_weight, b_out)
        # In two halves, so that the staging buffer leaves room for a fourth stage.
        b_halves = tl.permute(tl.reshape(b_out, (BM, 2, BN // 2)), (0, 2, 1))
        b_left, b_right = tl.split(b_halves)  # [BM, BN // 2]
        out.store([i_m * BM, i_n * BN], b_left.to(out.dtype))
        out.store([i_m * BM, i_n * BN + BN // 2], b_right.to(out.dtype))


def fits_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether TMA can address these matrices: every row starts at a multiple of 16 bytes."""
    for t in tensors:
        stride, unit = t.stride()
        if t.data_ptr() % 16 or stride * t.element_size() % 16:
            return False
        if unit != 1 or not 0 < t.shape[1] <= stride:
            return False
    return True


def config_for(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Config:
    """The configuration of a problem; the number of rows has no part in it."""
    name, size = device_class(x.device), x.element_size()
    aligned = (name, size, True) in CONFIGS and fits_descriptors(x, weight, out)
    return CONFIGS[name, size, aligned]


def launch_linear(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, config: Config | None = None
) -> None:
    """Fills `out` (T, N), contiguous; `config` takes the place of the shipped one (benchmarks)."""
    T, K = x.shape
    N = weight.shape[0]
    if T == 0 or N == 0:
        return
    config = config or config_for(x, weight, out)
    tiles = triton.cdiv(T, config.BM) * triton.cdiv(N, config.BN)
    grid = (min(tiles, number_of_programs(x.device)),)
    constants = {
        "N": N,
        "K": K,
        "BM": config.BM,
        "BN": config.BN,
        "BK": config.BK,
        "GROUP": GROUP,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.use_descriptors:
        linear_descriptor_kernel[grid](
            TensorDescriptor.from_tensor(x, [config.BM, config.BK]),
            TensorDescriptor.from_tensor(weight, [config.BN, config.BK]),
            TensorDescriptor.from_tensor(out, [config.BM, config.BN // 2]),
            T,
            **constants,
        )
    else:
        linear_kernel[grid](x, weight, out, x.stride(0), weight.stride(0), T, **constants)
