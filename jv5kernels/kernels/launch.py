"""Launches of kernels that Triton has compiled before, without its look at every argument.

Triton finds the compiled kernel of a call by the type of each argument, by which numbers are 1 or multiples of 16,
and by the constants: some 13 µs for the kernel of means, three times what the launch itself takes, and 60 µs for one
with descriptors. Here the caller says which arguments can change what is compiled, and the rest is passed on.

Kernels of a layer are chained: each is launched while the one before it still runs, and waits for its results at the
place where it calls `wait_for_the_kernel_before` (programmatic dependent launch). What stands before that place may
read nothing that a kernel writes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# (kernel, device, fixed arguments, options, kinds of descriptors, dtypes of tensors) -> Triton's CompiledKernel, which
# Triton keeps as well.
COMPILED: dict[tuple[Any, ...], Any] = {}


@triton.jit
def wait_for_the_kernel_before():
    """Everything behind this sees the results of the kernel before; the kernel after may start, up to this point."""
    gdc_wait()
    gdc_launch_dependents()


@lru_cache
def has_sm_90(device: torch.device) -> bool:
    """Whether the device can do what came with Hopper: chained launches, a prefetch of many bytes at once."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch(
    kernel: Any,
    device: torch.device,
    programs: int,
    tensors: tuple[torch.Tensor | None, ...],
    free: tuple[int | float, ...],
    fixed: tuple[Any, ...],
    options: tuple[tuple[str, Any], ...] = (),
    descriptors: tuple[Any, ...] = (),
) -> None:
    """Launches `kernel` on the current stream; its parameters are descriptors, tensors, free and fixed ones in turn.

    Args:
        kernel: a function under triton.jit or gluon.jit, also under Triton's interpreter.
        device: the current device.
        programs: their number, at least 1.
        tensors: on that device, or None.
        free: floats, and integers that the kernel does not specialise on (`do_not_specialize`) and that always need
            32 bits or always 64.
        fixed: hashable constants, and integers that few different values are passed for.
        options: num_warps and the like.
        descriptors: TMA descriptors, each with an attribute `kind` that is equal where dtype and block are.
    """
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    kinds = tuple([d.kind for d in descriptors])
    key = (kernel, device, fixed, options, kinds, dtypes)
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    compiled = COMPILED.get(key)
    if compiled is None or addresses % 16:
        compiled = kernel[(programs,)](*descriptors, *tensors, *free, *fixed, **dict(options))
        if compiled is not None and addresses % 16 == 0:
            COMPILED[key] = compiled
    else:
        compiled[(programs, 1, 1)](*descriptors, *tensors, *free, *fixed)
