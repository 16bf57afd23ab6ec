"""Projections: x · Wᵀ, by the library's GEMM or by one whose bits do not depend on the number of rows.

cuBLAS and MKL choose their kernel, and with it the order of the sum over K, by the shape of the whole
problem, so a row's last bits change with the rows beside it. The Triton GEMM has one configuration for
(dtype, device class, N, K), walks over K in one fixed order and never splits it: a row gives the same
bits alone, in any batch and at any place in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.registry import Implementation, Operator, Reason, triton_unavailable


def linear(
    x: Tensor, weight: Tensor, *, batch_invariant: bool = False, impl: str = "auto"
) -> Tensor:
    """Returns x · weightᵀ, accumulated in fp32 and rounded once.

    Args:
        x: (T, K), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        weight: (N, K), dtype of x; rows may be strided.
        batch_invariant: whether a row's bits must not depend on T or on the other rows. Only "triton"
            can promise that, so on a CPU this raises; there a caller gets the same promise by passing
            the rows of one text a call, without this flag.
        impl: "auto", "torch" (cuBLAS or the CPU's BLAS) or "triton". "auto" is "torch" unless
            batch_invariant.

    Returns:
        (T, N), dtype of x, contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, inputs that require gradients, an `impl` that cannot run here
            or cannot be batch invariant.

    Example:
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
        tensor([[11., 17.]])
    """
    check_tensor("x", x, ndim=2, dtypes=REFERENCE_DTYPES)
    check_tensor("weight", weight, shape=(None, x.shape[1]), dtypes=(x.dtype,), device=x.device)
    if not batch_invariant and _linear.choose_name(impl, x.device) == "torch":
        # F.linear needs no operator around it: torch.compile knows it, and a call is 3 times cheaper.
        _linear.refuse_gradients((x, weight))
        return F.linear(x, weight)
    return _linear(x, weight, batch_invariant, impl)


def _linear_torch(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    return F.linear(x, weight)


def _linear_triton(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    from jv5kernels.kernels.linear import launch_linear

    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    launch_linear(x, weight, out)
    return out


def _torch_unsupported(x: Tensor, weight: Tensor, batch_invariant: bool) -> Reason:
    if batch_invariant:
        return (
            "the library's GEMM is chosen by the number of rows, so it is not batch invariant "
            "(without a GPU, pass one text a call and leave batch_invariant out)"
        )
    return None


def _triton_unsupported(x: Tensor, *_: object) -> Reason:
    if x.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {x.dtype}"
    return None


_linear = Operator(
    name="linear",
    schema="(Tensor x, Tensor weight, bool batch_invariant, str impl) -> Tensor",
    implementations={
        "torch": Implementation(_linear_torch, unsupported=_torch_unsupported),
        "triton": Implementation(_linear_triton, triton_unavailable, _triton_unsupported),
    },
    auto={"cuda": ("torch", "triton"), "cpu": ("torch",)},
    fake=lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[0])),
)
