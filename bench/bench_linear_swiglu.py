"""SwiGLU in the epilogue of the gate and up projections, against the library's GEMM and our separate kernel.

python bench/bench_linear_swiglu.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import linear_swiglu, swiglu

NAME = "linear_swiglu"
# name -> (F, K) of the two models.
MLPS = {"small": (3072, 1024), "nano": (3072, 768)}
TOKENS = (32768, 4096, 512, 64, 16)


def works(device: str) -> list[Work]:
    """Both models, from a full batch down to one query."""
    if device == "cpu":
        return [make("small", 128, torch.float32, device)]
    shapes = [(name, T) for name in MLPS for T in TOKENS]
    return [make(name, T, torch.bfloat16, device) for name, T in shapes]


def make(name: str, tokens: int, dtype: torch.dtype, device: str) -> Work:
    width, K = MLPS[name]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, K, generator=generator, device=device).to(dtype)
    weight = torch.randn(2 * width, K, generator=generator, device=device) / K**0.5
    weight = weight.to(dtype)
    variants: dict[str, Callable[[], torch.Tensor]] = {}
    if device == "cuda":
        variants["ours (fused)"] = lambda: linear_swiglu(x, weight, impl="gluon")
    variants["GEMM, ours apart"] = lambda: swiglu(F.linear(x, weight))
    return Work(
        name=f"linear_swiglu {name} T={tokens} {str(dtype)[6:]}",
        variants=variants,
        reference=lambda: swiglu(x.double() @ weight.double().T, impl="torch"),
        tolerance=6e-3 if dtype == torch.bfloat16 else 1e-5,
        bytes=x.nbytes + weight.nbytes + tokens * width * x.element_size(),
        flops=2 * tokens * 2 * width * K,
        peer="GEMM, ours apart",
    )


test_linear_swiglu = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
