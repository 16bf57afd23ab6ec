"""quantize_int8 and quantize_binary against Sentence Transformers' quantize_embeddings: the same bytes.

python bench/bench_quantize.py
"""

from __future__ import annotations

from functools import lru_cache

import torch
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import quantize_binary, quantize_int8

NAME = "quantize"
ROWS, DIM = 100_000, 1024
PEER = "Sentence Transformers"


@lru_cache
def inputs(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and the ranges of their dimensions."""
    x = torch.randn(ROWS, DIM, generator=torch.Generator(device).manual_seed(0), device=device)
    return x, torch.stack([x.min(0).values, x.max(0).values])


def theirs(device: str, precision: str) -> torch.Tensor:
    """Embeddings on `device` to quantised bytes in the CPU's memory, where their function leaves them."""
    from sentence_transformers.util import quantize_embeddings

    x, ranges = inputs(device)
    return torch.from_numpy(quantize_embeddings(x, precision, ranges=ranges.cpu().numpy()))


def works(device: str) -> list[Work]:
    """Both kinds of output, from embeddings that lie on the device."""
    return [work(device, precision) for precision in ("ubinary", "int8")]


def work(device: str, precision: str) -> Work:
    ours = "torch" if device == "cuda" else "cpp"
    x, ranges = inputs(device)

    def quantised() -> torch.Tensor:
        if precision == "ubinary":
            return quantize_binary(x, precision, impl=ours).cpu()
        return quantize_int8(x, ranges, precision, impl=ours).cpu()

    written = ROWS * (DIM // 8 if precision == "ubinary" else DIM)
    return Work(
        name=f"{precision} {ROWS}x{DIM} float32",
        variants={f"ours ({ours})": quantised, PEER: lambda: theirs(device, precision)},
        reference=lambda: theirs(device, precision),
        tolerance=0.0,
        bytes=x.nbytes + written,
        peer=PEER,
    )


test_quantize = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
