"""Which implementations run where, for the operators that also have a C++ kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

needs_native = pytest.mark.skipif(
    find_spec("jv5kernels._C") is None, reason="installed without jv5kernels._C (JV5_NATIVE=0)"
)

CPU_RUNS = [
    pytest.param("triton", "cpu", id="triton-cpu"),
    pytest.param("cpp", "cpu", id="cpp", marks=needs_native),
    pytest.param("torch", "cpu", id="torch-cpu"),
]
RUNS = [
    *CPU_RUNS,
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
    pytest.param("torch", "cuda", id="torch-cuda", marks=pytest.mark.gpu),
]
# torch's own reductions choose their order by address and shape, so bits are promised for these alone.
KERNEL_RUNS = [run for run in RUNS if run.values[0] != "torch"]


def levels() -> list[str]:
    """The instruction sets that this processor supports; none without the extension."""
    if find_spec("jv5kernels._C") is None:
        return []
    from jv5kernels import _C

    return _C.dispatch_levels()


@contextmanager
def dispatch_level(level: str) -> Iterator[None]:
    """Runs the C++ kernels of one instruction set."""
    from jv5kernels import _C

    before = _C.dispatch_level()
    _C.set_dispatch_level(level)
    try:
        yield
    finally:
        _C.set_dispatch_level(before)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Runs with a number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


CANARY = 16


@contextmanager
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets torch.empty hand out the middle of a marked buffer; fails when a margin was written to."""
    buffers = []
    empty = torch.empty

    def guarded(*shape, dtype=None, device=None):
        size = torch.Size(shape[0] if not isinstance(shape[0], int) else shape)
        count, mark = size.numel(), 77
        buffer = empty(count + 2 * CANARY, dtype=dtype, device=device).fill_(mark)
        buffers.append((buffer, count))
        return buffer[CANARY : CANARY + count].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", guarded)
        yield
    assert buffers, "the operator allocated nothing through torch.empty"
    for buffer, count in buffers:
        margins = torch.cat([buffer[:CANARY], buffer[CANARY + count :]])
        assert (margins == 77).all(), f"wrote outside an output of {count} elements"
