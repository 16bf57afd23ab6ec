"""Checks of operator arguments: errors that name the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The references are also run in float64, which no kernel takes.
REFERENCE_DTYPES = (*FLOAT_DTYPES, torch.float64)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    ndim: int | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
    unit_stride: bool = True,
) -> None:
    """Checks one tensor argument.

    Args:
        shape: expected sizes; None leaves a dimension open.
        unit_stride: whether the last dimension must be contiguous.

    Raises:
        TypeError: not a tensor, or a dtype that is not allowed.
        ValueError: wrong number of dimensions, sizes, device or strides.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if dtypes is not None and tensor.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}: allowed are {allowed}"
        )
    sizes = tensor.shape
    if shape is not None:
        ndim = len(shape)
    if ndim is not None and len(sizes) != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not shape {tuple(sizes)}")
    if shape is not None:
        # A plain loop: operators are called some hundred times a batch, and any() over pairs takes thrice as long.
        for want, have in zip(shape, sizes, strict=True):
            if want is not None and want != have:
                wanted = ", ".join("*" if size is None else str(size) for size in shape)
                raise ValueError(f"{name} must have shape ({wanted}), not {tuple(sizes)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other inputs are on {device}")
    if unit_stride and len(sizes) and sizes[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, not have strides {tensor.stride()}"
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor, device: torch.device) -> None:
    """Checks the dtype, shape and device of cu_seqlens (B+1,); its values are not read (no host sync)."""
    check_tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=(torch.int32,), device=device)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have length B+1, so at least 1, not 0")
