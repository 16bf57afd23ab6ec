"""RMSNorm over the last dimension, alone or together with the residual addition before it.

y = x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, arXiv 1910.07467). All arithmetic is in
fp32 with one rounding at the end; Transformers rounds once more, before it multiplies by the weight.

The residual stream may be float24 (ops/float24.py): a tensor of bytes, 3·C a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.float24 import FLOAT24, GRANULE, columns_of, from_float24, to_float24
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
        x: (T, C), float32, float16 or bfloat16 (float64 with impl="torch"); or (T, 3·C), float24. Rows may be strided.
        weight: (C,), any of these dtypes but float24.
        eps: added to the mean square.
        added: (T, C), any of these dtypes but float24; the sum is taken in fp32.
        dtype: of the result, any of these but float24; that of x by default, and float32 for float24.
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
    width = _width_of_stream("x", x, REFERENCE_DTYPES)
    check_tensor("weight", weight, shape=(width,), dtypes=REFERENCE_DTYPES, device=x.device)
    _check_dtype("dtype", dtype, REFERENCE_DTYPES)
    _check_addend("added", added, (x.shape[0], width), x.device)
    return _rms_norm(x, added, weight, float(eps), dtype, impl)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    also: Tensor | None = None,
    total_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns RMSNorm(x + residual) and the sum itself, in one pass; with `also`, that of (x + residual) + also.

    The sum is taken in fp32 and normalised before it is rounded. A float32 sum is not rounded at all, and a float24
    one 256 times as finely as bfloat16: the residual stream of a 28-layer model otherwise takes 56 roundings, which are
    most of its bf16 error.

    Args:
        x: (T, C), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        residual: (T, C), dtype of x or float32; or (T, 3·C), float24.
        weight: (C,), any of these dtypes.
        eps: added to the mean square.
        also: (T, C), dtype of x or float32.
        total_dtype: of the sum: dtype of x, float32 or `FLOAT24`; that of residual by default.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, C) normalised, dtype of x, and (T, C) sum, or (T, 3·C) where it is float24; both contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, inputs that require gradients, an `impl` that cannot run here.

    Example:
        >>> normed, total = add_rms_norm(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.0)
        >>> total
        tensor([[2., 2.]])
    """
    check_tensor("x", x, ndim=2, dtypes=REFERENCE_DTYPES)
    rows, width = x.shape
    check_tensor("weight", weight, shape=(width,), dtypes=REFERENCE_DTYPES, device=x.device)
    dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    _width_of_stream("residual", residual, dtypes)
    columns = columns_of(width, residual.dtype)
    check_tensor("residual", residual, shape=(rows, columns), device=x.device)
    _check_addend("also", also, (rows, width), x.device)
    _check_dtype("total_dtype", total_dtype, (*dtypes, FLOAT24))
    if total_dtype == FLOAT24:
        _check_float24("total_dtype", width)
    return _add_rms_norm(x, residual, also, weight, float(eps), total_dtype, impl)


def _width_of_stream(name: str, stream: Tensor, dtypes: Sequence[torch.dtype]) -> int:
    """Values a row of a tensor of one of the dtypes, or of float24."""
    check_tensor(name, stream, ndim=2, dtypes=(*dtypes, FLOAT24))
    columns = stream.shape[1]
    if stream.dtype != FLOAT24:
        return columns
    if columns % 3:
        raise ValueError(f"{name} is float24, whose rows have 3 bytes a value, not {columns} bytes")
    _check_float24(name, columns // 3)
    return columns // 3


def _check_float24(name: str, width: int) -> None:
    if width % GRANULE:
        raise ValueError(
            f"{name} is float24, whose rows have a multiple of {GRANULE} values, not {width}"
        )


def _check_dtype(name: str, dtype: torch.dtype | None, allowed: Sequence[torch.dtype]) -> None:
    if dtype is not None and dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} is {str(dtype).removeprefix('torch.')}: allowed are {names}")


def _check_addend(
    name: str, addend: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> None:
    if addend is not None:
        check_tensor(name, addend, shape=shape, dtypes=REFERENCE_DTYPES, device=device)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _normed(total: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * inverse * weight.to(total.dtype)).to(dtype)


def _values(x: Tensor) -> Tensor:
    return from_float24(x) if x.dtype == FLOAT24 else x


def _sum(x: Tensor, *addends: Tensor | None) -> Tensor:
    total = _values(x)
    total = total.to(_accumulation_dtype(total))
    for addend in addends:
        total = total if addend is None else total + _values(addend)
    return total


def _rms_norm_torch(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
) -> Tensor:
    return _normed(_sum(x, added), weight, eps, dtype or _default_dtype(x))


def _default_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == FLOAT24 else x.dtype


def _add_rms_norm_torch(
    x: Tensor,
    residual: Tensor,
    also: Tensor | None,
    weight: Tensor,
    eps: float,
    total_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    total = _sum(x, residual, also)
    wanted = total_dtype or residual.dtype
    rounded = to_float24(total) if wanted == FLOAT24 else total.to(wanted)
    return _normed(total, weight, eps, x.dtype), rounded


def _rms_norm_triton(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
) -> Tensor:
    from jv5kernels.kernels.rms_norm import launch_rms_norm

    out = _empty_norm(x, weight, dtype)
    launch_rms_norm(x, added, None, weight, eps, out, None)
    return out


def _add_rms_norm_triton(
    x: Tensor,
    residual: Tensor,
    also: Tensor | None,
    weight: Tensor,
    eps: float,
    total_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    from jv5kernels.kernels.rms_norm import launch_rms_norm

    out, total = _empty_norm_and_total(x, residual, total_dtype)
    launch_rms_norm(x, residual, also, weight, eps, out, total)
    return out, total


def _empty_norm(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype or _default_dtype(x))


def _empty_norm_and_total(
    x: Tensor, residual: Tensor, total_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    wanted = total_dtype or residual.dtype
    total = x.new_empty((rows, columns_of(width, wanted)), dtype=wanted)
    return x.new_empty((rows, width)), total


def _triton_unsupported(*inputs: object) -> Reason:
    for tensor in inputs:
        if isinstance(tensor, Tensor) and tensor.dtype not in (*FLOAT_DTYPES, FLOAT24):
            return f"the kernel takes float32, float16, bfloat16 and float24, not {tensor.dtype}"
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
    fake=lambda x, added, weight, eps, dtype, impl: _empty_norm(x, weight, dtype),
)

_add_rms_norm = Operator(
    name="add_rms_norm",
    schema=(
        "(Tensor x, Tensor residual, Tensor? also, Tensor weight, float eps, "
        "ScalarType? total_dtype, str impl) -> (Tensor, Tensor)"
    ),
    implementations={
        "triton": Implementation(_add_rms_norm_triton, triton_unavailable, _triton_unsupported),
        "torch": Implementation(_add_rms_norm_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda x, residual, also, weight, eps, total_dtype, impl: _empty_norm_and_total(
        x, residual, total_dtype
    ),
)
