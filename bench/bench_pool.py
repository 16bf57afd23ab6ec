"""pool against torch and the device's copy bandwidth.

python bench/bench_pool.py
"""

from __future__ import annotations

import torch
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import pool

NAME = "pool"


def works(device: str) -> list[Work]:
    """One full batch of short texts and one long text, at the widths of nano and small."""
    tokens, dtype = (32768, torch.bfloat16) if device == "cuda" else (8192, torch.float32)
    ours = "triton" if device == "cuda" else "cpp"
    shapes = [(sequences, tokens // sequences) for sequences in (tokens // 512, 1)]
    return [
        make(sequences, length, width, dtype, device, ours)
        for width in (768, 1024)
        for sequences, length in shapes
        for make in (mean, lasttoken)
    ]


def inputs(sequences: int, length: int, width: int, dtype: torch.dtype, device: str):
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(sequences * length, width, generator=generator, device=device).to(dtype)
    offsets = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
    return hidden, offsets


def mean(
    sequences: int, length: int, width: int, dtype: torch.dtype, device: str, ours: str
) -> Work:
    hidden, offsets = inputs(sequences, length, width, dtype, device)
    padded = hidden.view(sequences, length, width)
    return Work(
        name=f"pool mean {sequences}x{length} C={width} {str(dtype)[6:]}",
        variants={
            f"ours ({ours})": lambda: pool(hidden, offsets, "mean", impl=ours),
            "torch": lambda: padded.mean(1, dtype=torch.float32),
        },
        reference=lambda: padded.double().mean(1),
        tolerance=1e-6,
        bytes=hidden.nbytes + sequences * width * 4,
    )


def lasttoken(
    sequences: int, length: int, width: int, dtype: torch.dtype, device: str, ours: str
) -> Work:
    hidden, offsets = inputs(sequences, length, width, dtype, device)
    return Work(
        name=f"pool lasttoken {sequences}x{length} C={width} {str(dtype)[6:]}",
        variants={
            f"ours ({ours})": lambda: pool(hidden, offsets, "lasttoken", impl=ours),
            "torch": lambda: hidden[offsets[1:].long() - 1].float(),
        },
        reference=lambda: hidden[offsets[1:].long() - 1].double(),
        tolerance=0.0,
        bytes=sequences * width * (hidden.element_size() + 4),
    )


test_pool = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
