"""The batch-invariant GEMM against the library's.

python bench/bench_linear.py
JV5_BENCH_SWEEP=1 python bench/bench_linear.py      also other tile sizes, to choose the shipped one
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import linear

NAME = "linear"
# name -> (N, K): the projections of the two models.
PROJECTIONS = {
    "small qkv": (4096, 1024),
    "small o": (1024, 2048),
    "small gate_up": (6144, 1024),
    "small down": (1024, 3072),
    "nano qkv": (2304, 768),
    "nano o": (768, 768),
    "nano gate_up": (6144, 768),
    "nano down": (768, 3072),
}


def works(device: str) -> list[Work]:
    """All projections at one full batch, and on the GPU two at one short query."""
    if device == "cpu":
        shapes = [("small qkv", 128), ("nano down", 128)]
        return [make(name, tokens, torch.float32, device) for name, tokens in shapes]
    shapes = [(name, 32768) for name in PROJECTIONS] + [("small gate_up", 12), ("small down", 12)]
    return [make(name, tokens, torch.bfloat16, device) for name, tokens in shapes]


def make(name: str, tokens: int, dtype: torch.dtype, device: str) -> Work:
    N, K = PROJECTIONS[name]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, K, generator=generator, device=device).to(dtype)
    weight = torch.randn(N, K, generator=generator, device=device).to(dtype)
    variants: dict[str, Callable[[], torch.Tensor]] = {}
    if device == "cuda":
        variants["ours (batch invariant)"] = lambda: linear(x, weight, batch_invariant=True)
        variants |= other_configurations(x, weight)
    else:
        variants["ours (torch)"] = lambda: linear(x, weight)
    variants["torch"] = lambda: F.linear(x, weight)
    return Work(
        name=f"linear {name} T={tokens} {str(dtype)[6:]}",
        variants=variants,
        reference=lambda: F.linear(x.double(), weight.double()),
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-5,
        bytes=x.nbytes + weight.nbytes + tokens * N * x.element_size(),
        flops=2 * tokens * N * K,
    )


def other_configurations(
    x: torch.Tensor, weight: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    """The kernel without descriptors, and in a sweep other tiles."""
    from jv5kernels.kernels.linear import CONFIGS, Config, launch_linear

    def run(config: Config) -> torch.Tensor:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
        launch_linear(x, weight, out, config)
        return out

    configs = [CONFIGS["sm_90", 2, False]]
    if os.environ.get("JV5_BENCH_SWEEP") == "1":
        configs += [
            Config(128, 256, 64, num_warps=8, num_stages=3, use_descriptors=True),
            Config(256, 128, 64, num_warps=8, num_stages=4, use_descriptors=True),
            Config(128, 128, 64, num_warps=8, num_stages=4, use_descriptors=True),
            Config(128, 128, 64, num_warps=4, num_stages=4, use_descriptors=True),
            Config(128, 256, 32, num_warps=8, num_stages=6, use_descriptors=True),
            Config(128, 128, 64, num_warps=8, num_stages=3),
        ]
    return {label(config): partial(run, config) for config in configs}


def label(config: object) -> str:
    """A configuration in a few characters: tile, warps, stages."""
    c = vars(config)
    kind = "tma" if c["use_descriptors"] else "ptr"
    return f"{kind} {c['BM']}x{c['BN']}x{c['BK']} w{c['num_warps']} s{c['num_stages']}"


test_linear = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
