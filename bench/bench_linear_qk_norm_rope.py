"""Norm and rotation of queries and keys in the epilogue of their projection, against the library's GEMM and our kernel.

python bench/bench_linear_qk_norm_rope.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench_qk_norm_rope import EPS, NANO, SEQUENCE, SMALL, Model
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import linear_qk_norm_rope, qk_norm_rope, rope_table

NAME = "linear_qk_norm_rope"
WIDTHS = {"small": 1024, "nano": 768}
TOKENS = (32768, 4096, 512)
APART = "GEMM, ours apart"


def works(device: str) -> list[Work]:
    """Both models, from a full batch down to a text."""
    if device == "cpu":
        return [make(SMALL, 128, torch.float32, device)]
    return [
        make(model, tokens, torch.bfloat16, device) for model in (SMALL, NANO) for tokens in TOKENS
    ]


def make(model: Model, tokens: int, dtype: torch.dtype, device: str) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    K, N = WIDTHS[model.name], (model.heads + 2 * model.kv_heads) * model.head_dim
    x = torch.randn(tokens, K, generator=generator, device=device).to(dtype)
    weight = (torch.randn(N, K, generator=generator, device=device) / K**0.5).to(dtype)
    positions = torch.arange(tokens, dtype=torch.int32, device=device) % SEQUENCE
    table = rope_table(SEQUENCE, model.head_dim, 1e6, device)
    norms = [torch.full((model.head_dim,), w, dtype=dtype, device=device) for w in (0.5, 1.5)]
    q_weight, k_weight = norms if model.norm else (None, None)
    options = {
        "num_heads": model.heads,
        "num_kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "eps": EPS,
    }

    def apart(x: torch.Tensor, weight: torch.Tensor, **choice: str) -> torch.Tensor:
        return qk_norm_rope(F.linear(x, weight), positions, table, **options, **choice)

    variants: dict[str, Callable[[], torch.Tensor]] = {}
    if device == "cuda":
        fused = partial(linear_qk_norm_rope, x, weight, positions, table, impl="gluon", **options)
        variants["ours (fused)"] = fused
    variants[APART] = lambda: apart(x, weight)
    return Work(
        name=f"linear_qk_norm_rope {model.name} T={tokens} {str(dtype)[6:]}",
        variants=variants,
        reference=lambda: apart(x.double(), weight.double(), impl="torch"),
        # Of the peer, which rounds twice.
        tolerance=6e-3 if dtype == torch.bfloat16 else 1e-5,
        bytes=x.nbytes + weight.nbytes + tokens * N * x.element_size(),
        flops=2 * tokens * N * K,
        peer=APART,
    )


test_linear_qk_norm_rope = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
