"""SwiGLU over the fused gate and up projections, one pass.

    out[t, f] = g / (1 + exp(-g)) · u      g = gate_up[t, f], u = gate_up[t, F + f]

Arithmetic is fp32. Traffic: gate_up once, out once: 3·F values a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Widest tile; 1024 bf16 are 16 bytes for each lane of 4 warps.
MAX_COLUMNS = 1024
# Elements of a program's tile, of gate and of up each: 4 loads of 16 bytes a lane, all issued at once.
# With twice as many the compiler puts the later loads behind arithmetic.
TILE_ELEMENTS = 4096
NUM_WARPS = 8


@triton.jit(do_not_specialize=["T"])
def swiglu_kernel(
    gate_up,  # [T, 2 * F]
    out,  # [T, F]
    stride_gt,
    T,
    F: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    program = tl.program_id(0)
    o_t = (program // BLOCKS).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    o_f = (program % BLOCKS) * BF + tl.arange(0, BF)  # [BF]
    m = (o_t < T)[:, None] & (o_f < F)[None, :]  # [BT, BF]

    p_gate = gate_up + o_t[:, None] * stride_gt + o_f[None, :]
    b_gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + F, mask=m, other=0.0).to(tl.float32)
    b_out = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(out + o_t[:, None] * F + o_f[None, :], b_out.to(out.dtype.element_ty), mask=m)


def tile(width: int) -> tuple[int, int]:
    """Rows and columns of a program's tile for F columns."""
    BF = min(MAX_COLUMNS, triton.next_power_of_2(width))
    return TILE_ELEMENTS // BF, BF


def launch_swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Fills `out` (T, F), contiguous, from `gate_up` (T, 2·F)."""
    T, F = out.shape
    if T == 0 or F == 0:
        return
    BT, BF = tile(F)
    swiglu_kernel[(triton.cdiv(T, BT) * triton.cdiv(F, BF),)](
        gate_up, out, gate_up.stride(0), T, F=F, BT=BT, BF=BF, num_warps=NUM_WARPS
    )
