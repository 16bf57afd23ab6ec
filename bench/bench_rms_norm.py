"""rms_norm and add_rms_norm against torch and the device's copy bandwidth.

python bench/bench_rms_norm.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import add_rms_norm, rms_norm
from jv5kernels.ops.float24 import FLOAT24, from_float24, to_float24

EPS = 1e-6
NAME = "rms_norm"


def works(device: str) -> list[Work]:
    """The widths of nano and small, at the tokens of one full batch.

    On the GPU with a residual stream in float24, as the backbone has it, in float32, and in bfloat16 throughout.
    """
    if device == "cuda":
        streams = (FLOAT24, torch.float32, torch.bfloat16)
        problems = [
            Problem(32768, c, torch.bfloat16, stream, device)
            for stream in streams
            for c in (768, 1024)
        ]
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
        stream = "float24" if self.stream == FLOAT24 else str(self.stream)[6:]
        return shape if self.stream == self.dtype else f"{shape}, {stream} stream"

    @property
    def ours(self) -> str:
        return "triton" if self.device == "cuda" else "torch"

    @property
    def tolerance(self) -> float:
        return 5e-3 if self.dtype == torch.bfloat16 else 1e-6

    def draw(self, dtype: torch.dtype, seed: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def draw_stream(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream as the kernels take it, and as the peers do: those have float32 for float24."""
        shortens = self.stream == FLOAT24
        stream = self.draw(torch.float32 if shortens else self.stream, 1, self.tokens, self.width)
        short = to_float24(stream) if shortens else stream
        return short, from_float24(short) if shortens else stream


def plain(problem: Problem) -> Work:
    """The norm of the residual stream and what attention adds to it, which is not written."""
    dtype, width, ours = problem.dtype, problem.width, problem.ours
    y = problem.draw(dtype, 0, problem.tokens, width)
    stream, peers_stream = problem.draw_stream()
    weight = problem.draw(dtype, 2, width)

    def eager() -> torch.Tensor:
        total = peers_stream + y
        return F.rms_norm(total, (width,), weight.to(total.dtype), EPS).to(dtype)

    return Work(
        name=f"rms_norm {problem.name}",
        variants={
            f"ours ({ours})": lambda: rms_norm(
                stream, weight, EPS, added=y, dtype=dtype, impl=ours
            ),
            "torch": eager,
        },
        reference=lambda: rms_norm(
            peers_stream.double() + y.double(), weight.double(), EPS, impl="torch"
        ),
        tolerance=problem.tolerance,
        bytes=stream.nbytes + 2 * y.nbytes + weight.nbytes,
        memory_bound=True,
    )


def added(problem: Problem) -> Work:
    """The residual stream takes on what attention and the MLP give, and is normed."""
    dtype, width, ours = problem.dtype, problem.width, problem.ours
    y, z = (problem.draw(dtype, seed, problem.tokens, width) for seed in (0, 3))
    stream, peers_stream = problem.draw_stream()
    weight = problem.draw(dtype, 2, width)

    def eager() -> torch.Tensor:
        total = peers_stream + y + z
        return F.rms_norm(total, (width,), weight.to(total.dtype), EPS).to(dtype)

    return Work(
        name=f"add_rms_norm {problem.name}",
        variants={
            f"ours ({ours})": lambda: add_rms_norm(y, stream, weight, EPS, also=z, impl=ours)[0],
            "torch": eager,
        },
        reference=lambda: rms_norm(
            peers_stream.double() + y.double() + z.double(), weight.double(), EPS, impl="torch"
        ),
        tolerance=problem.tolerance,
        bytes=2 * stream.nbytes + 3 * y.nbytes + weight.nbytes,
        memory_bound=True,
    )


test_rms_norm = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
