"""The output projections: x · Wᵀ added to the fp32 residual stream, in the epilogue of the GEMM where that pays."""

from __future__ import annotations

import torch
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.linear import linear
from jv5kernels.ops.registry import Implementation, Operator, Reason, triton_unavailable

# Fewer rows leave multiprocessors without a tile; there the library's GEMM, with smaller tiles, and a kernel
# for the rest are faster. Not with batch_invariant, which knows one way for every number of rows.
FUSED_ROWS = 4096


def linear_add(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    *,
    batch_invariant: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Adds x · weightᵀ to the residual in place, and returns the residual.

    Args:
        x: (T, K), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        weight: (N, K), dtype of x; rows may be strided.
        residual: (T, N), float32 (float64 with x in float64), overwritten; rows may be strided.
        batch_invariant: as in `linear`.
        impl: "auto", "triton" (one kernel, fp32 throughout; sm_90, 16-bit x, rows that start at multiples of 16 bytes)
            or "torch" (`linear` by its own "auto", whose result is rounded to the dtype of x, and an addition).
            "auto" is "triton" where that can run and there are FUSED_ROWS rows or batch_invariant.

    Returns:
        `residual`.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, rows of the residual that overlap, inputs that require gradients, an `impl`
            that cannot run here or cannot be batch invariant.

    Example:
        >>> linear_add(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]]))
        tensor([[11.5000]])
    """
    check_tensor("x", x, ndim=2, dtypes=REFERENCE_DTYPES)
    check_tensor("weight", weight, shape=(None, x.shape[1]), dtypes=(x.dtype,), device=x.device)
    check_tensor(
        "residual",
        residual,
        shape=(x.shape[0], weight.shape[0]),
        dtypes=(torch.promote_types(x.dtype, torch.float32),),
        device=x.device,
    )
    if residual.shape[0] > 1 and residual.stride(0) < residual.shape[1]:
        raise ValueError(
            f"residual is written in place: its rows overlap (strides {residual.stride()})"
        )
    if impl == "auto" and not batch_invariant and x.shape[0] < FUSED_ROWS:
        impl = "torch"
    _linear_add(x, weight, residual, batch_invariant, impl)
    return residual


def adds_in_gemm(x: Tensor, weight: Tensor, residual: Tensor, batch_invariant: bool) -> bool:
    """Whether "auto" adds these in the GEMM; a caller that has more to do with the sum can otherwise fuse that."""
    if not batch_invariant and x.shape[0] < FUSED_ROWS:
        return False
    first = _linear_add.auto[x.device.type][0]
    inputs = (x, weight, residual, batch_invariant)
    return first == "triton" and _linear_add.reason_against(first, x.device, inputs) is None


def _linear_add_torch(x: Tensor, weight: Tensor, residual: Tensor, batch_invariant: bool) -> None:
    residual.add_(linear(x, weight, batch_invariant=batch_invariant))


def _linear_add_triton(x: Tensor, weight: Tensor, residual: Tensor, batch_invariant: bool) -> None:
    from jv5kernels.kernels.linear_add import launch_linear_add

    launch_linear_add(x, weight, residual)


def _triton_unsupported(x: Tensor, weight: Tensor, residual: Tensor, *_: object) -> Reason:
    if x.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float16 and bfloat16, not {x.dtype}"
    from jv5kernels.kernels.linear_add import reason_against

    return reason_against(x, weight, residual)


_linear_add = Operator(
    name="linear_add",
    schema=("(Tensor x, Tensor weight, Tensor(a!) residual, bool batch_invariant, str impl) -> ()"),
    implementations={
        "triton": Implementation(_linear_add_triton, triton_unavailable, _triton_unsupported),
        "torch": Implementation(_linear_add_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda *_: None,
)
