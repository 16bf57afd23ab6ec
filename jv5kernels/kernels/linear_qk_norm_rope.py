"""The fused projection with q/k norm and rotary embedding in its epilogue: a persistent, warp-specialised Gluon kernel.

    out     = x · weightᵀ                                     [T, (HQ + 2 HK) D], then for every query or key head n
    n       = n · rsqrt(mean(n²) + eps) · norm weight         Qwen3 alone
    y[:h]   = n[:h] · cos - n[h:] · sin                       h = D / 2
    y[h:]   = n[h:] · cos + n[:h] · sin                       all in fp32, rounded once

The products are those of linear_sm90.py. A thread of a wgmma holds columns c and c + h of the same head for the same
rows, so halves meet in registers and a mean square passes between the four lanes of a row. Cosines, sines and the
norm's weight are on their way from the caches to registers while the products run; without that, every tile waits for
them at its end. The configuration is fixed: a row gives the same bits in any batch.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from jv5kernels.kernels import linear_sm90
from jv5kernels.kernels.hopper import OPTIONS, left_and_right
from jv5kernels.kernels.launch import launch
from jv5kernels.kernels.linear_sm90 import (
    BC,
    BN,
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    ROWS,
    allocate,
    descriptors,
    finish,
    multiply,
    produce,
    programs,
    store,
    tile_of,
)

HEAD_DIMS = (64, 128)


@gluon.jit
def halves_of_heads(b, D: gl.constexpr):
    """[ROWS, BC] -> the left and the right halves of its heads, [ROWS, BC / D, D / 2] each, without a move."""
    b = gl.reshape(b, [ROWS, BC // D, 2, D // 2])
    return gl.split(gl.permute(b, [0, 1, 3, 2]))


@gluon.jit
def heads_of_halves(b_1, b_2, D: gl.constexpr):
    """The inverse of halves_of_heads."""
    return gl.reshape(gl.permute(gl.join(b_1, b_2), [0, 1, 3, 2]), [ROWS, BC])


@gluon.jit
def rotated(b, b_cos, b_sin, b_weights, eps, D: gl.constexpr):
    """Heads [ROWS, BC] after their norm, where b_weights has the halves of its weight, and their rotation."""
    b_1, b_2 = halves_of_heads(b, D)
    if b_weights is not None:
        # Summed apart, a square and its addition are one instruction.
        b_mean = (gl.sum(b_1 * b_1, 2) + gl.sum(b_2 * b_2, 2)) / D  # [ROWS, BC / D]
        b_inverse = gl.expand_dims(gl.rsqrt(b_mean + eps), 2)
        b_1 = b_1 * b_inverse * of_all_heads(b_weights[0])
        b_2 = b_2 * b_inverse * of_all_heads(b_weights[1])
    b_cos = gl.expand_dims(b_cos, 1)
    b_sin = gl.expand_dims(b_sin, 1)
    return heads_of_halves(b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin, D)


@gluon.jit
def of_all_heads(b):
    """[D / 2] of any dtype -> [1, 1, D / 2] in fp32."""
    return gl.expand_dims(gl.expand_dims(b.to(gl.float32), 0), 1)


@gluon.jit
def consume(
    C: gl.constexpr, out_desc, positions, cos_sin, q_weight, k_weight, memory, bars, T, P, eps,
    HQ: gl.constexpr, HK: gl.constexpr, D: gl.constexpr, K: gl.constexpr, HAS_NORM: gl.constexpr,
):  # fmt: skip
    """Computes 64 rows of every tile of this program."""
    N: gl.constexpr = (HQ + 2 * HK) * D
    tiles_m = gl.cdiv(T, CONSUMERS * ROWS)
    tiles_n: gl.constexpr = N // BN
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    # The layout in which halves of heads come out of the products, of which cosines are a slice.
    b_left, b_right = left_and_right(gl.zeros([ROWS, BN], gl.float32, layout))
    b_1, b_2 = halves_of_heads(b_left, D)
    half_layout: gl.constexpr = gl.SliceLayout(1, b_1.type.layout)
    o_d = gl.arange(0, D // 2, gl.SliceLayout(0, half_layout))
    stage = 0
    phase = 0
    for i_tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        i_m, i_n = tile_of(i_tile, tiles_m, tiles_n)
        first_row = (i_m * CONSUMERS + C) * ROWS
        o_t = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, half_layout))
        i_position = gl.load(positions + o_t, mask=o_t < T, other=0)
        i_position = gl.minimum(gl.maximum(i_position, 0), P - 1)
        is_rotated = i_n * BN < (HQ + HK) * D
        m = (o_t < T)[:, None] & (o_d < gl.where(is_rotated, D, 0))[None, :]
        p_cos = cos_sin + i_position[:, None].to(gl.int64) * D + o_d[None, :]
        b_cos = gl.load(p_cos, mask=m, other=0.0)
        b_sin = gl.load(p_cos + D // 2, mask=m, other=0.0)
        b_weights: gl.constexpr = None
        if HAS_NORM:
            p_weight = k_weight
            if HQ > 0:
                p_weight = q_weight
                if HK > 0:
                    p_weight = gl.where(i_n * BN < HQ * D, q_weight, k_weight)
            b_weights = (gl.load(p_weight + o_d), gl.load(p_weight + D // 2 + o_d))

        b_out, stage, phase = multiply(C, memory, bars, stage, phase, K)
        b_parts = left_and_right(b_out)
        for part in gl.static_range(2):
            first_column = i_n * BN + part * BC
            if is_rotated:
                b = rotated(b_parts[part], b_cos, b_sin, b_weights, eps, D)
                store(b, out_desc, memory, C, first_row, first_column)
            else:
                store(b_parts[part], out_desc, memory, C, first_row, first_column)
    finish()


@gluon.jit(do_not_specialize=["T", "P"])
def linear_qk_norm_rope_kernel(
    x_desc,  # [T, K], block [ROWS, BK]
    w_desc,  # [1, N, K], block [1, BN, BK]
    out_desc,  # [T, N], block [ROWS, BC]
    positions,  # [T] int32
    cos_sin,  # [P, D] fp32
    q_weight,  # [D] or None
    k_weight,  # [D] or None
    T,
    P,
    eps,
    HQ: gl.constexpr,
    HK: gl.constexpr,
    D: gl.constexpr,
    K: gl.constexpr,
):
    N: gl.constexpr = (HQ + 2 * HK) * D
    HAS_NORM: gl.constexpr = q_weight is not None or k_weight is not None
    memory, bars = allocate(x_desc, w_desc, 1)
    # These tuples stand inline: through a variable their constexprs would become tensors.
    gl.warp_specialize(
        [
            (consume, (0, out_desc, positions, cos_sin, q_weight, k_weight, memory, bars, T, P, eps,
                       HQ, HK, D, K, HAS_NORM)),
            (consume, (1, out_desc, positions, cos_sin, q_weight, k_weight, memory, bars, T, P, eps,
                       HQ, HK, D, K, HAS_NORM)),
            (produce, (x_desc, w_desc, memory, bars, T, N // BN, K, 1)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def reason_against(
    x: torch.Tensor, weight: torch.Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> str | None:
    """Why the kernel does not compute this projection, or None."""
    if head_dim not in HEAD_DIMS:
        return f"the kernel takes head_dim {HEAD_DIMS[0]} and {HEAD_DIMS[1]}, not {head_dim}"
    # All heads of a tile are queries, keys or values.
    heads = BN.value // head_dim
    if num_heads % heads or num_kv_heads % heads:
        return f"the kernel takes {heads} heads at a time, not {num_heads} and {num_kv_heads}"
    return linear_sm90.reason_against(x, weight, weight.shape[0])


def launch_linear_qk_norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
) -> None:
    """Fills `out` (T, (num_heads + 2·num_kv_heads)·head_dim), contiguous."""
    T, K = x.shape
    N = weight.shape[0]
    if T == 0 or N == 0:
        return
    launch(
        linear_qk_norm_rope_kernel,
        x.device,
        programs(T, N // BN.value, x.device),
        (positions, cos_sin, q_weight, k_weight),
        (T, cos_sin.shape[0], eps),
        (num_heads, num_kv_heads, head_dim, K),
        OPTIONS,
        descriptors(x, weight, out),
    )
