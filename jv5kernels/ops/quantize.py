"""Quantisation of embeddings to bytes, exactly as Sentence Transformers defines them.

The definitions are those of sentence_transformers.util.quantize_embeddings (6.x, NumPy 2), and the
bytes are equal to its bytes for the same floats. Unlike it, nothing passes through NumPy, ranges are
never taken from the batch itself, and NaN gives a defined byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jv5kernels.ops.checks import REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.pool import check_native_status, cpp_unsupported, triton_unsupported
from jv5kernels.ops.registry import (
    Implementation,
    Operator,
    cpp_unavailable,
    triton_unavailable,
)

INT8_PRECISIONS = ("int8", "uint8")
BINARY_PRECISIONS = ("ubinary", "binary")


def quantize_int8(
    x: Tensor, ranges: Tensor, precision: str = "int8", *, impl: str = "auto"
) -> Tensor:
    """Returns one byte a value: 256 equal steps between a minimum and a maximum per dimension.

        step = (max - min) / 255, or 1 where that is 0
        code = min(max(floor((x - min) / step), 0), 255)

    Values outside the range saturate. NaN has the code 0.

    Args:
        x: (B, dim), float32, float16, bfloat16 or float64; rows may be strided. The arithmetic is
            float32, or float64 for a float64 input.
        ranges: (2, dim), minima and maxima, float32 (other float dtypes are rounded to it).
        precision: "uint8": the byte is the code. "int8": the byte is code - 128 in two's complement,
            that is the code with its top bit flipped.
        impl: "auto", "triton", "cpp" (float32 on the CPU) or "torch".

    Returns:
        (B, dim), int8 or uint8, contiguous: byte c of a row is dimension c.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: an unknown precision, shapes that do not fit, inputs that require gradients, an
            `impl` that cannot run here.

    Example:
        >>> ranges = torch.tensor([[0.0, 0.0], [255.0, 255.0]])
        >>> quantize_int8(torch.tensor([[1.9, 1e6]]), ranges, "uint8")
        tensor([[  1, 255]], dtype=torch.uint8)
    """
    check_tensor("x", x, ndim=2, dtypes=REFERENCE_DTYPES)
    check_tensor("ranges", ranges, shape=(2, x.shape[1]), dtypes=REFERENCE_DTYPES, device=x.device)
    check_precision(precision, INT8_PRECISIONS)
    return _quantize_int8(x, ranges, precision, impl)


def quantize_binary(x: Tensor, precision: str = "ubinary", *, impl: str = "auto") -> Tensor:
    """Returns one bit a value, 1 where it is above zero (0.0, -0.0 and NaN give 0).

    Args:
        x: (B, dim), float32, float16, bfloat16 or float64; rows may be strided.
        precision: "ubinary": bytes as packed. "binary": the same bytes minus 128 as int8, that is
            with the top bit flipped.
        impl: "auto", "triton", "cpp" (float32 on the CPU) or "torch".

    Returns:
        (B, ceil(dim / 8)), uint8 or int8, contiguous. Dimension 8j + k is bit 7 - k of byte j (the
        first dimension is the most significant bit); unused low bits of the last byte are 0 before
        the flip.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: an unknown precision, inputs that require gradients, an `impl` that cannot run here.

    Example:
        >>> quantize_binary(torch.tensor([[0.1, -0.2, 0.0, 0.3, -0.1, 0.5, 0.2, -0.9]]))
        tensor([[150]], dtype=torch.uint8)
    """
    check_tensor("x", x, ndim=2, dtypes=REFERENCE_DTYPES)
    check_precision(precision, BINARY_PRECISIONS)
    return _quantize_binary(x, precision, impl)


def check_precision(precision: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `precision` is one of the allowed ones."""
    if precision not in allowed:
        raise ValueError(f"precision={precision!r} is unknown: choose one of {list(allowed)}")


def _signed(codes: Tensor, precision: str) -> Tensor:
    """Codes 0 to 255 minus 128 as int8, for the signed precisions."""
    return codes if precision in ("uint8", "ubinary") else (codes ^ 0x80).view(torch.int8)


def _quantize_int8_torch(x: Tensor, ranges: Tensor, precision: str) -> Tensor:
    minima, maxima = ranges.float()
    # A Python scalar would be multiplied by its reciprocal on CUDA: another last bit.
    steps = (maxima - minima) / torch.full_like(minima, 255.0)
    steps = torch.where(steps == 0, 1.0, steps)
    codes = ((x - minima) / steps).floor().clamp(0, 255).nan_to_num(0.0)
    return _signed(codes.to(torch.uint8), precision)


def _quantize_binary_torch(x: Tensor, precision: str) -> Tensor:
    bits = torch.nn.functional.pad((x > 0).to(torch.uint8), (0, -x.shape[1] % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=x.device)
    codes = (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return _signed(codes, precision)


def _quantize_int8_triton(x: Tensor, ranges: Tensor, precision: str) -> Tensor:
    from jv5kernels.kernels.quantize import launch_quantize

    out = torch.empty(x.shape, dtype=_output_dtype(precision), device=x.device)
    launch_quantize(x, ranges.float().contiguous(), out)
    return out


def _quantize_binary_triton(x: Tensor, precision: str) -> Tensor:
    from jv5kernels.kernels.quantize import launch_quantize

    shape = (x.shape[0], -(-x.shape[1] // 8))
    out = torch.empty(shape, dtype=_output_dtype(precision), device=x.device)
    launch_quantize(x, None, out)
    return out


def _quantize_int8_cpp(x: Tensor, ranges: Tensor, precision: str) -> Tensor:
    from jv5kernels import _C

    ranges = ranges.float().contiguous()
    out = torch.empty(x.shape, dtype=_output_dtype(precision))
    status = _C.quantize_int8_float32(
        x.data_ptr(),
        ranges.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        0x80 if precision == "int8" else 0,
        torch.get_num_threads(),
    )
    check_native_status(status)
    return out


def _quantize_binary_cpp(x: Tensor, precision: str) -> Tensor:
    from jv5kernels import _C

    out = torch.empty((x.shape[0], -(-x.shape[1] // 8)), dtype=_output_dtype(precision))
    status = _C.quantize_binary_float32(
        x.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        0x80 if precision == "binary" else 0,
        torch.get_num_threads(),
    )
    check_native_status(status)
    return out


def _output_dtype(precision: str) -> torch.dtype:
    return torch.uint8 if precision in ("uint8", "ubinary") else torch.int8


_quantize_int8 = Operator(
    name="quantize_int8",
    schema="(Tensor x, Tensor ranges, str precision, str impl) -> Tensor",
    implementations={
        "triton": Implementation(_quantize_int8_triton, triton_unavailable, triton_unsupported),
        "cpp": Implementation(_quantize_int8_cpp, cpp_unavailable, cpp_unsupported),
        "torch": Implementation(_quantize_int8_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")},
    fake=lambda x, ranges, precision, impl: x.new_empty(x.shape, dtype=_output_dtype(precision)),
)

_quantize_binary = Operator(
    name="quantize_binary",
    schema="(Tensor x, str precision, str impl) -> Tensor",
    implementations={
        "triton": Implementation(_quantize_binary_triton, triton_unavailable, triton_unsupported),
        "cpp": Implementation(_quantize_binary_cpp, cpp_unavailable, cpp_unsupported),
        "torch": Implementation(_quantize_binary_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")},
    fake=lambda x, precision, impl: x.new_empty(
        (x.shape[0], (x.shape[1] + 7) // 8), dtype=_output_dtype(precision)
    ),
)
