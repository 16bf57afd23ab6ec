"""The gate of the MLP inside its GEMM: out = silu(x · Wgᵀ) · (x · Wuᵀ).

    g[t, f] = Σ_k x[t, k] · weight[f, k]        u[t, f] = Σ_k x[t, k] · weight[F + f, k]
    out     = g / (1 + exp(-g)) · u             all in fp32, rounded once

A tile of BF output columns takes BF gate rows of the weight and the BF up rows that belong to them in one load: the
weight is seen as [2, F, K]. They are one operand and one accumulator of 2·BF columns, gate left and up right, which
the epilogue splits, so the loop is that of a plain GEMM and the intermediate exists in registers alone. (Two
accumulators of BF columns cost more: ptxas serialises their wgmmas when the loop over tiles is flattened.)

Each tile is one program's loop over the whole of K, and the configuration depends on (device class, element size)
alone: a row gives the same bits in any batch.

For tensor descriptors (TMA, sm_90) only. Traffic: x and weight through the L2 cache, out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from jv5kernels.kernels.linear import (
    GROUP,
    Config,
    add_product,
    device_class,
    fits_descriptors,
    number_of_programs,
    tile_of,
)

# (device class, bytes of an element) -> configuration; BN counts gate and up columns together.
CONFIGS: dict[tuple[str, int], Config] = {
    ("sm_90", 2): Config(128, 256, 64, num_warps=8, num_stages=4, use_descriptors=True),
}


@triton.jit(do_not_specialize=["T"])
def linear_swiglu_kernel(
    x,  # descriptor of [T, K], block [BM, BK]
    weight,  # descriptor of [2, F, K], block [2, BF, BK]
    out,  # descriptor of [T, F], block [BM, BF]
    T,
    F: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles_m = tl.cdiv(T, BM)
    tiles_f = tl.cdiv(F, BF)
    for i_tile in tl.range(
        tl.program_id(0), tiles_m * tiles_f, tl.num_programs(0), flatten=FLATTEN
    ):
        i_m, i_f = tile_of(i_tile, tiles_m, tiles_f, GROUP)
        b_both = tl.zeros([BM, 2 * BF], tl.float32)
        for i_k in range(0, K, BK):
            b_x = x.load([i_m * BM, i_k])  # [BM, BK], zeros past the end
            b_weight = weight.load([0, i_f * BF, i_k])  # [2, BF, BK]
            b_both = add_product(b_x, tl.reshape(b_weight, (2 * BF, BK)), b_both)
        b_gate, b_up = tl.split(tl.permute(tl.reshape(b_both, (BM, 2, BF)), (0, 2, 1)))
        b_out = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
        out.store([i_m * BM, i_f * BF], b_out.to(out.dtype))


def reason_against(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernel has no configuration for these matrices or cannot address them, or None."""
    key = (device_class(x.device), x.element_size())
    if key not in CONFIGS:
        return f"no configuration for {8 * key[1]}-bit values on {key[0]}"
    # Rows of the output must start at multiples of 16 bytes as well.
    is_aligned = weight.shape[0] // 2 * x.element_size() % 16 == 0
    if not is_aligned or not fits_descriptors(x, weight):
        return "rows do not start at multiples of 16 bytes"
    return None


def launch_linear_swiglu(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, config: Config | None = None
) -> None:
    """Fills `out` (T, F), contiguous; `config` takes the place of the shipped one (benchmarks)."""
    T, K = x.shape
    F = out.shape[1]
    if T == 0 or F == 0:
        return
    config = config or CONFIGS[device_class(x.device), x.element_size()]
    BM, BF, BK = config.BM, config.BN // 2, config.BK
    tiles = triton.cdiv(T, BM) * triton.cdiv(F, BF)
    linear_swiglu_kernel[(min(tiles, config.programs * number_of_programs(x.device)),)](
        TensorDescriptor.from_tensor(x, [BM, BK]),
        TensorDescriptor.from_tensor(weight.unflatten(0, (2, F)), [2, BF, BK]),
        TensorDescriptor.from_tensor(out, [BM, BF]),
        T,
        F=F,
        K=K,
        BM=BM,
        BF=BF,
        BK=BK,
        GROUP=GROUP,
        FLATTEN=config.flatten,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
