"""A projection that adds to the residual stream: residual += x · weightᵀ.

    residual[t, n] += Σ_k x[t, k] · weight[n, k]        fp32, k in tiles of BK from 0 to K

The product is never rounded to the dtype of x, nor written by itself. Each tile is one program's loop over the whole
of K, in one order, then one fp32 addition, and the configuration depends on (device class, element size) alone: a row
gives the same bits in any batch.

A tile of the residual is larger than the operands of two steps over K, and no MMA runs while a program reads it. So it
is asked for before the loop, into the L2 cache, and added to there by TMA (cp.reduce): the program stages the product
and is done, without reading the residual. Every element takes one addition a launch, so no order plays a part. The
product is staged in pieces of PIECE columns, which leaves room for the operands' stages.

For tensor descriptors (TMA, sm_90) only. Traffic: x and weight through the L2 cache, residual read and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from jv5kernels.kernels.linear import (
    GROUP,
    INTERPRET,
    Config,
    add_product,
    device_class,
    fits_descriptors,
    number_of_programs,
    tile_of,
)

# (device class, bytes of an element of x) -> configuration.
CONFIGS: dict[tuple[str, int], Config] = {
    ("sm_90", 2): Config(128, 256, 64, num_warps=8, num_stages=4, use_descriptors=True),
}
# Columns that are staged at once: 128 rows of 64 fp32 are 32 KB, what four stages of operands leave.
PIECE = 64


@triton.jit
def fetch_into_l2(p_row, m_row, BYTES: tl.constexpr):
    """Asks for BYTES of device memory behind every pointer of p_row [BM], without waiting for them."""
    if not INTERPRET:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; "
            "@p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [p_row.to(tl.int64), m_row.to(tl.int32), tl.full(m_row.shape, BYTES, tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def add_pieces(residual, b_out, i_t, i_n, BM: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr):
    """Adds [BM, BN] to the residual from row i_t and column i_n on, in pieces of BP columns."""
    if BN > BP:
        HALF: tl.constexpr = BN // 2
        b_left, b_right = tl.split(tl.permute(tl.reshape(b_out, (BM, 2, HALF)), (0, 2, 1)))
        add_pieces(residual, b_left, i_t, i_n, BM, HALF, BP)
        add_pieces(residual, b_right, i_t, i_n + HALF, BM, HALF, BP)
    elif INTERPRET:  # which knows no addition through a descriptor
        residual.store([i_t, i_n], residual.load([i_t, i_n]) + b_out)
    else:
        residual.atomic_add([i_t, i_n], b_out)


@triton.jit(do_not_specialize=["T"])
def linear_add_kernel(
    x,  # descriptor of [T, K], block [BM, BK]
    weight,  # descriptor of [N, K], block [BN, BK]
    residual,  # descriptor of fp32 [T, N], block [BM, BP]
    p_residual,  # pointer to the same
    stride_rt,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tiles_m = tl.cdiv(T, BM)
    tiles_n = tl.cdiv(N, BN)
    for i_tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN
    ):
        i_m, i_n = tile_of(i_tile, tiles_m, tiles_n, GROUP)
        if N % BN == 0:
            o_t = i_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
            fetch_into_l2(p_residual + o_t * stride_rt + i_n * BN, o_t < T, 4 * BN)
        b_out = tl.zeros([BM, BN], tl.float32)
        for i_k in range(0, K, BK):
            b_x = x.load([i_m * BM, i_k])  # [BM, BK], zeros past the end
            b_weight = weight.load([i_n * BN, i_k])  # [BN, BK]
            b_out = add_product(b_x, b_weight, b_out)
        add_pieces(residual, b_out, i_m * BM, i_n * BN, BM, BN, BP)


def reason_against(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> str | None:
    """Why the kernel has no configuration for these matrices or cannot address them, or None."""
    key = (device_class(x.device), x.element_size())
    if key not in CONFIGS:
        return f"no configuration for {8 * key[1]}-bit values on {key[0]}"
    if not fits_descriptors(x, weight, residual):
        return "rows do not start at multiples of 16 bytes"
    return None


def launch_linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    config: Config | None = None,
    piece: int = PIECE,
) -> None:
    """Adds to `residual` (T, N) in place; `config` and `piece` take the place of the shipped ones (benchmarks)."""
    T, K = x.shape
    N = weight.shape[0]
    if T == 0 or N == 0 or K == 0:
        return
    config = config or CONFIGS[device_class(x.device), x.element_size()]
    BM, BN, BK = config.BM, config.BN, config.BK
    tiles = triton.cdiv(T, BM) * triton.cdiv(N, BN)
    linear_add_kernel[(min(tiles, config.programs * number_of_programs(x.device)),)](
        TensorDescriptor.from_tensor(x, [BM, BK]),
        TensorDescriptor.from_tensor(weight, [BN, BK]),
        TensorDescriptor.from_tensor(residual, [BM, piece]),
        residual,
        residual.stride(0),
        T,
        N=N,
        K=K,
        BM=BM,
        BN=BN,
        BK=BK,
        BP=piece,
        GROUP=GROUP,
        FLATTEN=config.flatten,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
