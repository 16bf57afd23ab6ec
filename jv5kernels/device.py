"""Where and in which dtype a model computes."""

from __future__ import annotations

import torch

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Returns the device asked for, with its index; by default the current CUDA device, otherwise the CPU.

    Raises:
        ValueError: a device that this machine does not have, or that is neither CUDA nor CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={str(device)!r}: choose 'cuda' or 'cpu'") from error
    if resolved.type == "cpu":
        return resolved
    if resolved.type != "cuda":
        raise ValueError(f"device={str(device)!r}: choose 'cuda' or 'cpu'")
    if not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch finds no CUDA device on this machine")
    index = torch.cuda.current_device() if resolved.index is None else resolved.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return torch.device("cuda", index)


def resolve_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Returns the compute dtype asked for; by default bfloat16 on CUDA and float32 on a CPU.

    Raises:
        ValueError: a dtype that no kernel computes in.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {[str(d) for d in COMPUTE_DTYPES]}")
    return dtype
