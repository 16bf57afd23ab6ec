"""RMSNorm, with or without the residual addition, one pass over the rows.

    total = x (+ residual)                       [T, C], fp32 in registers
    out   = total · rsqrt(mean(total²) + eps) · weight

Traffic: x, residual and both outputs once each; the weight stays in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of a program's tile: rows of 1024 bf16 are taken two at a time.
TILE_ELEMENTS = 2048
NUM_WARPS = 4


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x,  # [T, C]
    residual,  # [T, C] or None
    weight,  # [C]
    out,  # [T, C]
    total,  # [T, C] or None
    stride_xt,
    stride_rt,
    T,
    eps,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    o_c = tl.arange(0, BC)  # [BC]
    m = (o_t < T)[:, None] & (o_c < C)[None, :]  # [BT, BC]

    b_total = tl.load(x + o_t[:, None] * stride_xt + o_c[None, :], mask=m, other=0.0)
    b_total = b_total.to(tl.float32)
    o_out = o_t[:, None] * C + o_c[None, :]
    if HAS_RESIDUAL:
        b_residual = tl.load(residual + o_t[:, None] * stride_rt + o_c[None, :], mask=m, other=0.0)
        b_total += b_residual.to(tl.float32)
        tl.store(total + o_out, b_total.to(total.dtype.element_ty), mask=m)

    b_mean = tl.sum(b_total * b_total, axis=1) / C  # [BT]
    b_inverse = 1.0 / tl.sqrt_rn(b_mean + eps)
    b_weight = tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_out = b_total * b_inverse[:, None] * b_weight[None, :]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m)


def launch_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """Fills `out` (and `total`, the sum with `residual`); both are contiguous (T, C)."""
    T, C = x.shape
    if T == 0:
        return
    BC = triton.next_power_of_2(C)
    BT = max(1, TILE_ELEMENTS // BC)
    rms_norm_kernel[(triton.cdiv(T, BT),)](
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        T,
        eps,
        C=C,
        BT=BT,
        BC=BC,
        HAS_RESIDUAL=residual is not None,
        num_warps=NUM_WARPS,
    )
