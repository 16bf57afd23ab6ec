"""Test configuration: Triton's interpreter where there is no GPU, poisoned memory, and the `gpu` marker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads the flag when a kernel is decorated, so it is set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

settings.register_profile("default", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that kernels are tested on: the CPU (through the interpreter) and the GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For models so small that more threads mostly wait for each other, on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets torch.empty and its relatives return NaN (or large integers): a value that nobody wrote shows."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max if tensor.dtype != torch.bool else True)

    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _f=original, **k: poison(_f(*a, **k)))


def ragged(lengths: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """cu_seqlens (B+1,) int32 of given sequence lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(
        0, dtype=torch.int32
    )
