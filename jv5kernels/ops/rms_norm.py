"""RMSNorm over the last dimension, alone or together with the residual addition before it.

y = x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, arXiv 1910.07467). All arithmetic is in
fp32 with one rounding at the end; Transformers rounds once more, before it multiplies by the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.registry import Implementation, Operator, Reason, triton_unavailable


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    added: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns the RMSNorm of every row of x, or of x + added: a sum that is not wanted itself is not written.

    Args:
        x: (T, C), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        weight: (C,), any of these dtypes.
        eps: added to the mean square.
        added: (T, C), any of these dtypes; the sum is taken in fp32.
        dtype: of the result, any of these; that of x by default.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, C), `dtype`, contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, inputs that require gradients, an `impl` that cannot run here.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
        tensor([[0.8485, 1.1314]])
    """
    _check(x, weight)
    if dtype is not None and dtype not in REFERENCE_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in REFERENCE_DTYPES)
        raise TypeError(f"dtype is {str(dtype).removeprefix('torch.')}: allowed are {allowed}")
    _check_addend("added", added, x)
    return _rms_norm(x, added, weight, float(eps), dtype, impl)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    also: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns RMSNorm(x + residual) and the sum itself, in one pass; with `also`, that of (x + residual) + also.

    The sum is taken in fp32 and normalised before it is rounded. With a float32 residual it is not
    rounded at all: the residual stream of a 28-layer model otherwise takes 56 roundings, which are most
    of its bf16 error.

    Args:
        x: (T, C), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        residual: (T, C), dtype of x or float32.
        weight: (C,), any of these dtypes.
        eps: added to the mean square.
        also: (T, C), dtype of x or float32.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, C) normalised, dtype of x, and (T, C) sum, dtype of residual; both contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, inputs that require gradients, an `impl` that cannot run here.

    Example:
        >>> normed, total = add_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.0)
        >>> total
        tensor([[2., 2.]])
    """
    _check(x, weight)
    dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    check_tensor("residual", residual, shape=tuple(x.shape), dtypes=dtypes, device=x.device)
    _check_addend("also", also, x)
    return _add_rms_norm(x, residual, also, weight, float(eps), impl)


def _check(x: Tensor, weight: Tensor) -> None:
    check_tensor("x", x, ndim=2, dtypes=REFERENCE_DTYPES)
    check_tensor("weight", weight, shape=(x.shape[1],), dtypes=REFERENCE_DTYPES, device=x.device)


def _check_addend(name: str, addend: Tensor | None, x: Tensor) -> None:
    if addend is not None:
        shape = tuple(x.shape)
        check_tensor(name, addend, shape=shape, dtypes=REFERENCE_DTYPES, device=x.device)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _normed(total: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * inverse * weight.to(total.dtype)).to(dtype)


def _sum(x: Tensor, *addends: Tensor | None) -> Tensor:
    total = x.to(_accumulation_dtype(x))
    for addend in addends:
        total = total if addend is None else total + addend
    return total


def _rms_norm_torch(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
) -> Tensor:
    return _normed(_sum(x, added), weight, eps, dtype or x.dtype)


def _add_rms_norm_torch(
    x: Tensor, residual: Tensor, also: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = _sum(x, residual, also)
    return _normed(total, weight, eps, x.dtype), total.to(residual.dtype)


def _rms_norm_triton(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
) -> Tensor:
    from jv5kernels.kernels.rms_norm import launch_rms_norm

    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    launch_rms_norm(x, added, None, weight, eps, out, None)
    return out


def _add_rms_norm_triton(
    x: Tensor, residual: Tensor, also: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from jv5kernels.kernels.rms_norm import launch_rms_norm

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    launch_rms_norm(x, residual, also, weight, eps, out, total)
    return out, total


def _triton_unsupported(*inputs: object) -> Reason:
    for tensor in inputs:
        if isinstance(tensor, Tensor) and tensor.dtype not in FLOAT_DTYPES:
            return f"the kernel takes float32, float16 and bfloat16, not {tensor.dtype}"
    return None


def _rms_norm_unsupported(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
) -> Reason:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        return f"the kernel gives float32, float16 and bfloat16, not {dtype}"
    return _triton_unsupported(x, added)


_rms_norm = Operator(
    name="rms_norm",
    schema=(
        "(Tensor x, Tensor? added, Tensor weight, float eps, ScalarType? dtype, str impl) -> Tensor"
    ),
    implementations={
        "triton": Implementation(_rms_norm_triton, triton_unavailable, _rms_norm_unsupported),
        "torch": Implementation(_rms_norm_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda x, added, weight, eps, dtype, impl: x.new_empty(x.shape, dtype=dtype or x.dtype),
)

_add_rms_norm = Operator(
    name="add_rms_norm",
    schema=(
        "(Tensor x, Tensor residual, Tensor? also, Tensor weight, float eps, str impl) "
        "-> (Tensor, Tensor)"
    ),
    implementations={
        "triton": Implementation(_add_rms_norm_triton, triton_unavailable, _triton_unsupported),
        "torch": Implementation(_add_rms_norm_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda x, residual, also, weight, eps, impl: (
        x.new_empty(x.shape),
        residual.new_empty(x.shape),
    ),
)
