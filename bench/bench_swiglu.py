"""swiglu against torch and the device's copy bandwidth.

python bench/bench_swiglu.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import swiglu

NAME = "swiglu"
WIDTH = 3072  # intermediate size of small and of nano
FULL_BATCH = 32768


def works(device: str) -> list[Work]:
    """One full batch, and on the GPU one short query."""
    if device == "cuda":
        return [make(tokens, torch.bfloat16, device, "triton") for tokens in (FULL_BATCH, 12)]
    return [make(512, torch.float32, device, "torch")]


def eager(gate_up: torch.Tensor) -> torch.Tensor:
    """What Transformers computes, rounding silu(gate)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def make(tokens: int, dtype: torch.dtype, device: str, ours: str) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    gate_up = torch.randn(tokens, 2 * WIDTH, generator=generator, device=device).to(dtype)
    variants: dict[str, Callable[[], torch.Tensor]] = {
        f"ours ({ours})": lambda: swiglu(gate_up, impl=ours),
        "torch": lambda: eager(gate_up),
    }
    if device == "cuda":
        compiled = torch.compile(eager)
        variants["torch.compile"] = lambda: compiled(gate_up)
    return Work(
        name=f"swiglu T={tokens} F={WIDTH} {str(dtype)[6:]}",
        variants=variants,
        reference=lambda: swiglu(gate_up.double(), impl="torch"),
        tolerance=5e-3 if dtype == torch.bfloat16 else 1e-6,
        bytes=gate_up.nbytes * 3 // 2,
        memory_bound=tokens >= FULL_BATCH,
    )


test_swiglu = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
