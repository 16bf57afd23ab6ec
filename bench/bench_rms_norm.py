"""rms_norm and add_rms_norm against torch and the device's copy bandwidth.

python bench/bench_rms_norm.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import add_rms_norm, rms_norm

EPS = 1e-6
NAME = "rms_norm"


def works(device: str) -> list[Work]:
    """The widths of nano and small, at the tokens of one full batch."""
    tokens, dtype = (32768, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    ours = "triton" if device == "cuda" else "torch"
    return [
        make(tokens, width, dtype, device, ours) for width in (768, 1024) for make in (plain, added)
    ]


def inputs(tokens: int, width: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(tokens, width), (tokens, width), (width,)]
    return [torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes]


def plain(tokens: int, width: int, dtype: torch.dtype, device: str, ours: str) -> Work:
    x, _, weight = inputs(tokens, width, dtype, device)
    return Work(
        name=f"rms_norm T={tokens} C={width} {str(dtype)[6:]}",
        variants={
            f"ours ({ours})": lambda: rms_norm(x, weight, EPS, impl=ours),
            "torch": lambda: F.rms_norm(x, (width,), weight, EPS),
        },
        reference=lambda: rms_norm(x.double(), weight.double(), EPS, impl="torch"),
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-6,
        bytes=2 * x.nbytes + weight.nbytes,
    )


def added(tokens: int, width: int, dtype: torch.dtype, device: str, ours: str) -> Work:
    x, residual, weight = inputs(tokens, width, dtype, device)
    return Work(
        name=f"add_rms_norm T={tokens} C={width} {str(dtype)[6:]}",
        variants={
            f"ours ({ours})": lambda: add_rms_norm(x, residual, weight, EPS, impl=ours)[0],
            "torch": lambda: F.rms_norm(x + residual, (width,), weight, EPS),
        },
        reference=lambda: rms_norm(
            x.double() + residual.double(), weight.double(), EPS, impl="torch"
        ),
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-6,
        bytes=4 * x.nbytes + weight.nbytes,
    )


test_rms_norm = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
