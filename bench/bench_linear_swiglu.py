"""SwiGLU in the epilogue of the gate and up projections, against the library's GEMM and our separate kernel.

python bench/bench_linear_swiglu.py
python bench/bench_linear_swiglu.py --sweep     only small and a full batch, with other tiles, to choose one
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench_linear import label
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import linear_swiglu, swiglu

NAME = "linear_swiglu"
# name -> (F, K) of the two models.
MLPS = {"small": (3072, 1024), "nano": (3072, 768)}
TOKENS = (32768, 4096, 512, 64, 16)
SWEEP = "--sweep" in sys.argv


def works(device: str) -> list[Work]:
    """Both models, from a full batch down to one query."""
    if device == "cpu":
        return [make("small", 128, torch.float32, device)]
    shapes = [(name, T) for name in MLPS for T in TOKENS]
    return [make(name, T, torch.bfloat16, device) for name, T in shapes[: 1 if SWEEP else None]]


def make(name: str, tokens: int, dtype: torch.dtype, device: str) -> Work:
    width, K = MLPS[name]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, K, generator=generator, device=device).to(dtype)
    weight = torch.randn(2 * width, K, generator=generator, device=device) / K**0.5
    weight = weight.to(dtype)
    variants: dict[str, Callable[[], torch.Tensor]] = {}
    if device == "cuda":
        variants["ours (fused)"] = lambda: linear_swiglu(x, weight, impl="triton")
        variants |= other_configurations(x, weight) if SWEEP else {}
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


def other_configurations(
    x: torch.Tensor, weight: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """Tiles that fit into shared memory, by the same kernel."""
    from jv5kernels.kernels.linear import Config
    from jv5kernels.kernels.linear_swiglu import launch_linear_swiglu

    def run(config: Config) -> torch.Tensor:
        out = torch.empty((len(x), len(weight) // 2), dtype=x.dtype, device=x.device)
        launch_linear_swiglu(x, weight, out, config)
        return out

    tma = partial(Config, use_descriptors=True)
    configs = [
        tma(128, 256, 64, 8, 4, flatten=False),
        tma(128, 256, 64, 8, 3),
        tma(128, 256, 128, 8, 2, flatten=False),
        tma(256, 128, 64, 8, 4),
        tma(128, 128, 64, 4, 3, programs=2),
        tma(128, 128, 64, 8, 3, programs=2),
        tma(64, 256, 64, 4, 2, programs=2),
    ]
    return {label(config): partial(run, config) for config in configs}


test_linear_swiglu = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if a != "--sweep"]
    main(NAME + "_sweep" * SWEEP, works, __file__)
