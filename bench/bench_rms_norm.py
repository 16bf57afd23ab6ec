"""rms_norm and add_rms_norm against torch and the device's copy bandwidth.

python bench/bench_rms_norm.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import add_rms_norm, rms_norm

EPS = 1e-6
NAME = "rms_norm"


def works(device: str) -> list[Work]:
    """The widths of nano and small, at the tokens of one full batch.

    On the GPU with a residual stream in float32, as the backbone has it, and in bfloat16 throughout.
    """
    if device == "cuda":
        pairs = [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
        problems = [Problem(32768, c, *dtypes, device) for dtypes in pairs for c in (768, 1024)]
    else:
        problems = [Problem(2048, c, torch.float32, torch.float32, device) for c in (768, 1024)]
    return [make(problem) for problem in problems for make in (plain, added)]


@dataclass(frozen=True)
class Problem:
    """Tokens and width; the dtype of what comes in and goes out, and that of the residual stream."""

    tokens: int
    width: int
    dtype: torch.dtype
    stream: torch.dtype
    device: str

    @property
    def name(self) -> str:
        shape = f"T={self.tokens} C={self.width} {str(self.dtype)[6:]}"
        return shape if self.stream == self.dtype else f"{shape}, {str(self.stream)[6:]} stream"

    @property
    def ours(self) -> str:
        return "triton" if self.device == "cuda" else "torch"

    @property
    def tolerance(self) -> float:
        return 5e-3 if self.dtype == torch.bfloat16 else 1e-6

    def draw(self, dtype: torch.dtype, seed: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)


def plain(problem: Problem) -> Work:
    """The norm of the residual stream alone."""
    dtype, width, ours = problem.dtype, problem.width, problem.ours
    x = problem.draw(problem.stream, 0, problem.tokens, width)
    weight = problem.draw(dtype, 2, width)
    return Work(
        name=f"rms_norm {problem.name}",
        variants={
            f"ours ({ours})": lambda: rms_norm(x, weight, EPS, dtype=dtype, impl=ours),
            "torch": lambda: F.rms_norm(x, (width,), weight.to(x.dtype), EPS).to(dtype),
        },
        reference=lambda: rms_norm(x.double(), weight.double(), EPS, impl="torch"),
        tolerance=problem.tolerance,
        bytes=x.nbytes + x.numel() * dtype.itemsize + weight.nbytes,
        memory_bound=True,
    )


def added(problem: Problem) -> Work:
    """The residual stream takes x on, and is normed."""
    dtype, width, ours = problem.dtype, problem.width, problem.ours
    x = problem.draw(dtype, 0, problem.tokens, width)
    residual = problem.draw(problem.stream, 1, problem.tokens, width)
    weight = problem.draw(dtype, 2, width)

    def eager() -> torch.Tensor:
        total = x + residual
        return F.rms_norm(total, (width,), weight.to(total.dtype), EPS).to(dtype)

    return Work(
        name=f"add_rms_norm {problem.name}",
        variants={
            f"ours ({ours})": lambda: add_rms_norm(x, residual, weight, EPS, impl=ours)[0],
            "torch": eager,
        },
        reference=lambda: rms_norm(
            x.double() + residual.double(), weight.double(), EPS, impl="torch"
        ),
        tolerance=problem.tolerance,
        bytes=2 * (x.nbytes + residual.nbytes) + weight.nbytes,
        memory_bound=True,
    )


test_rms_norm = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
