"""Adding to the residual stream in the GEMM and then norming it, against the library's GEMM and add_rms_norm.

python bench/bench_linear_add.py
python bench/bench_linear_add.py --sweep     only small and a full batch, with other tiles, to choose one

Every variant is the whole step: y projected, the residual renewed, the norm of it in the dtype of x.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench_linear import PROJECTIONS, label
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import add_rms_norm, rms_norm

NAME = "linear_add"
TOKENS = (32768, 4096, 512, 64, 16)
EPS = 1e-6
SWEEP = "--sweep" in sys.argv


def works(device: str) -> list[Work]:
    """The projections that end in the residual stream, from a full batch down to one query."""
    if device == "cpu":
        return [make("small o", 128, torch.float32, device)]
    names = ("small o", "small down", "nano o", "nano down")
    shapes = [(name, T) for name in names for T in TOKENS]
    if SWEEP:
        shapes = [(name, TOKENS[0]) for name in names[:2]]
    return [make(name, T, torch.bfloat16, device) for name, T in shapes]


def make(name: str, tokens: int, dtype: torch.dtype, device: str) -> Work:
    N, K = PROJECTIONS[name]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, K, generator=generator, device=device).to(dtype)
    weight = (torch.randn(N, K, generator=generator, device=device) / K**0.5).to(dtype)
    before = torch.randn(tokens, N, generator=generator, device=device)
    norm = torch.randn(N, generator=generator, device=device).to(dtype)
    variants: dict[str, Callable[[], torch.Tensor]] = {}
    if device == "cuda":
        from jv5kernels.kernels.linear_add import launch_linear_add

        def fused(**options: object) -> torch.Tensor:
            # The residual grows from call to call, which takes no time; `sample` sees the first one.
            launch_linear_add(x, weight, residual, **options)
            return rms_norm(residual, norm, EPS, dtype=dtype)

        variants["ours (fused)"] = fused
        variants |= other_configurations(fused) if SWEEP else {}
    variants["GEMM, ours apart"] = lambda: add_rms_norm(F.linear(x, weight), before, norm, EPS)[0]
    residual = before.clone()

    def sample(out: torch.Tensor) -> torch.Tensor:
        residual.copy_(before)
        return out

    return Work(
        name=f"linear_add, norm {name} T={tokens} {str(dtype)[6:]}",
        variants=variants,
        reference=lambda: rms_norm(
            before.double() + x.double() @ weight.double().T, norm.double(), EPS, impl="torch"
        ),
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-5,
        bytes=x.nbytes + weight.nbytes + 2 * before.nbytes + tokens * N * x.element_size(),
        flops=2 * tokens * N * K,
        peer="GEMM, ours apart",
        sample=sample,
    )


def other_configurations(
    fused: Callable[..., torch.Tensor],
) -> dict[str, Callable[[], torch.Tensor]]:
    """Tiles, and columns staged at once, that fit into shared memory, by the same kernel."""
    from jv5kernels.kernels.linear import Config

    tma = partial(Config, use_descriptors=True)
    configs = [
        (tma(128, 256, 64, 8, 4, flatten=False), 64),
        (tma(128, 256, 64, 8, 3), 64),
        (tma(128, 256, 64, 8, 3), 128),
        (tma(256, 128, 64, 8, 4), 32),
        (tma(128, 128, 64, 4, 3, programs=2), 32),
        (tma(128, 128, 64, 8, 3, programs=2), 32),
        (tma(128, 128, 64, 8, 5), 64),
    ]
    return {f"{label(c)} p{p}": partial(fused, config=c, piece=p) for c, p in configs}


test_linear_add = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if a != "--sweep"]
    main(NAME + "_sweep" * SWEEP, works, __file__)
