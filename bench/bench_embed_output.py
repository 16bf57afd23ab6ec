"""embed_output against the same steps in eager torch and the device's copy bandwidth.

python bench/bench_embed_output.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import embed_output

EPS = 1e-6
NAME = "embed_output"


def works(device: str) -> list[Work]:
    """One full batch of short texts and one long text, at the width of small."""
    tokens, dtype = (32768, torch.bfloat16) if device == "cuda" else (8192, torch.float32)
    ours = "triton" if device == "cuda" else "cpp"
    works = [
        work(mode, sequences, tokens // sequences, dim, dtype, device, ours)
        for mode in ("mean", "lasttoken")
        for sequences in (tokens // 512, 1)
        for dim in (1024, 256)
    ]
    return works + ([empty_kernel()] if device == "cuda" else [])


def eager(hidden, offsets, weight, mode: str, length: int, dim: int) -> torch.Tensor:
    """What the vendor's and Sentence Transformers' code does: norm all tokens, pool, slice, normalise."""
    width = hidden.shape[1]
    normed = F.rms_norm(hidden, (width,), weight, EPS)
    if mode == "mean":
        pooled = normed.view(-1, length, width).float().mean(1)
    else:
        pooled = normed[offsets[1:].long() - 1].float()
    return F.normalize(pooled[:, :dim], dim=-1)


def work(
    mode: str, sequences: int, length: int, dim: int, dtype: torch.dtype, device: str, ours: str
) -> Work:
    width = 1024
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(sequences * length, width, generator=generator, device=device).to(dtype)
    weight = torch.rand(width, generator=generator, device=device).to(dtype)
    offsets = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
    options = {"mode": mode, "norm_weight": weight, "eps": EPS, "truncate_dim": dim}
    read = hidden.nbytes if mode == "mean" else sequences * width * hidden.element_size()
    return Work(
        name=f"embed_output {mode} {sequences}x{length} C={width} dim={dim} {str(dtype)[6:]}",
        variants={
            f"ours ({ours})": lambda: embed_output(hidden, offsets, **options, impl=ours)[0],
            "torch": lambda: eager(hidden, offsets, weight, mode, length, dim),
        },
        reference=lambda: eager(hidden.double(), offsets, weight.double(), mode, length, dim),
        tolerance=5e-3 if dtype == torch.bfloat16 else 2e-6,
        bytes=read + weight.nbytes + sequences * (4 * dim + 1),
    )


def empty_kernel() -> Work:
    """The shortest launch there is, the yardstick of last-token pooling."""
    out = torch.empty(1, device="cuda")
    return Work("one-element fill", {"torch": out.zero_}, lambda: out * 0, 0.0, bytes=4)


test_embed_output = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
