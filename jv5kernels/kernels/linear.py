"""A GEMM whose configuration never depends on the number of rows: out = x · weightᵀ.

    out[t, n] = Σ_k x[t, k] · weight[n, k]      fp32 accumulation, k in tiles of BK from 0 to K

Every output tile is one program's loop over the whole of K, in one order, so a row's bits depend on the
row, the weight and the configuration alone. The configuration is chosen by (device class, element size);
rows past the end only fill up the last tile. Programs are persistent: one for each multiprocessor, which
takes every P-th tile, so that a tile's loads overlap the end of the one before.

Tiles are ordered in bands of GROUP row tiles, which share their part of the weight through the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
# Row tiles that are taken together for each column of weight tiles.
GROUP = 8


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows, columns, depth) and launch options."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# (device class, bytes of an element) -> configuration.
CONFIGS: dict[tuple[str, int], Config] = {
    ("sm_90", 2): Config(128, 256, 64, num_warps=8, num_stages=3),
    ("sm_90", 4): Config(64, 64, 32, num_warps=8, num_stages=3),
    # Fits the 99 KB of shared memory of consumer GPUs.
    ("sm_80", 2): Config(128, 128, 32, num_warps=8, num_stages=3),
    ("sm_80", 4): Config(64, 64, 32, num_warps=8, num_stages=2),
}


@lru_cache
def device_class(index: int) -> str:
    """Which configurations a CUDA device uses."""
    return "sm_90" if torch.cuda.get_device_capability(index)[0] == 9 else "sm_80"


@lru_cache
def multiprocessors(index: int) -> int:
    """Number of streaming multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@triton.jit
def tile_of(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: bands of GROUP row tiles, column by column."""
    first = i_tile // (GROUP * tiles_n) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = i_tile % (GROUP * tiles_n)
    return first + within % rows, within // rows


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
            if INTERPRET:  # the interpreter multiplies bf16 bit patterns
                b_x, b_weight = b_x.to(tl.float32), b_weight.to(tl.float32)
            b_out = tl.dot(b_x, b_weight.T, b_out, input_precision="ieee")
        m = (o_t < T)[:, None] & (o_n < N)[None, :]
        p_out = out + o_t[:, None] * N + o_n[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m)


def launch_linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Fills `out` (T, N), contiguous."""
    T, K = x.shape
    N = weight.shape[0]
    if T == 0 or N == 0:
        return
    on_gpu = x.device.type == "cuda"
    index = x.device.index or 0
    config = CONFIGS[device_class(index) if on_gpu else "sm_90", x.element_size()]
    tiles = triton.cdiv(T, config.BM) * triton.cdiv(N, config.BN)
    programs = min(tiles, multiprocessors(index) if on_gpu else 2)
    linear_kernel[(programs,)](
        x,
        weight,
        out,
        x.stride(0),
        weight.stride(0),
        T,
        N=N,
        K=K,
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        GROUP=GROUP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
