"""The gate of the MLP inside its GEMM, for Hopper: out = silu(x · Wgᵀ) · (x · Wuᵀ).

    g[t, f] = Σ_k x[t, k] · weight[f, k]        u[t, f] = Σ_k x[t, k] · weight[F + f, k]
    out     = g / (1 + exp(-g)) · u             all in fp32, rounded once

The products are those of linear_sm90.py. A tile has BC gate rows of the weight and the BC up rows that belong to them,
loaded at once: the weight is seen as [2, F, K]. They are one operand and one accumulator, gate left and up right, which
the epilogue splits without a move, and the intermediate exists in registers alone.

The configuration is fixed: a row gives the same bits in any batch. Traffic: x, weight through the L2 cache, out once.
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


@gluon.jit
def sigmoid(b):
    """1 / (1 + exp(-b)) in four instructions; the compiler takes eleven, for denormals that this cannot meet."""
    asm: gl.constexpr = """{
        .reg .f32 x;
        mul.rn.f32 x, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 x, x;
        add.rn.f32 x, x, 0f3F800000;
        rcp.approx.ftz.f32 $0, x;
    }"""
    return gl.inline_asm_elementwise(asm, "=f,f", [b], gl.float32, is_pure=True, pack=1)


@gluon.jit
def consume(C: gl.constexpr, out_desc, memory, bars, T, TILES_F: gl.constexpr, K: gl.constexpr):
    """Computes 64 rows of every tile of this program."""
    tiles_m = gl.cdiv(T, CONSUMERS * ROWS)
    stage = 0
    phase = 0
    for i_tile in range(gl.program_id(0), tiles_m * TILES_F, gl.num_programs(0)):
        i_m, i_f = tile_of(i_tile, tiles_m, TILES_F)
        b_both, stage, phase = multiply(C, memory, bars, stage, phase, K)
        b_gate, b_up = left_and_right(b_both)
        b_out = b_gate * sigmoid(b_gate) * b_up
        store(b_out, out_desc, memory, C, (i_m * CONSUMERS + C) * ROWS, i_f * BC)
    finish()


@gluon.jit(do_not_specialize=["T"])
def linear_swiglu_kernel(
    x_desc,  # [T, K], block [ROWS, BK]
    w_desc,  # [2, F, K], block [2, BC, BK]
    out_desc,  # [T, F], block [ROWS, BC]
    T,
    TILES_F: gl.constexpr,
    K: gl.constexpr,
):
    memory, bars = allocate(x_desc, w_desc, 2)
    # These tuples stand inline: through a variable their constexprs would become tensors.
    gl.warp_specialize(
        [
            (consume, (0, out_desc, memory, bars, T, TILES_F, K)),
            (consume, (1, out_desc, memory, bars, T, TILES_F, K)),
            (produce, (x_desc, w_desc, memory, bars, T, TILES_F, K, 2)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def reason_against(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why the kernel does not compute this projection, or None."""
    return linear_sm90.reason_against(x, weight, weight.shape[0] // 2)


def launch_linear_swiglu(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Fills `out` (T, F), contiguous."""
    T, K = x.shape
    F = out.shape[1]
    if T == 0 or F == 0:
        return
    tiles_f = -(-F // BC.value)
    launch(
        linear_swiglu_kernel,
        x.device,
        programs(T, tiles_f, x.device),
        (),
        (T,),
        (tiles_f, K),
        OPTIONS,
        descriptors(x, weight, out, parts=2),
    )
