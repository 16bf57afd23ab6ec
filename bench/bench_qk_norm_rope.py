"""qk_norm_rope against torch and the device's copy bandwidth.

python bench/bench_qk_norm_rope.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import qk_norm_rope, rope_table

EPS = 1e-6
NAME = "qk_norm_rope"
SEQUENCE = 2048
FULL_BATCH = 32768


@dataclass(frozen=True)
class Model:
    """Query heads, key heads and head_dim; whether the heads are normed."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    norm: bool


SMALL = Model("small", 16, 8, 128, True)
NANO = Model("nano", 12, 12, 64, False)


def works(device: str) -> list[Work]:
    """Both models at one full batch, and on the GPU one short query."""
    if device == "cuda":
        shapes = [(model, tokens) for model in (SMALL, NANO) for tokens in (FULL_BATCH, 12)]
        return [make(model, tokens, torch.bfloat16, device, "triton") for model, tokens in shapes]
    return [make(model, 256, torch.float32, device, "torch") for model in (SMALL, NANO)]


def eager(
    heads: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """What Transformers computes, in the dtype of `heads`, on q and k together: heads (T, H, D)."""
    if weight is not None:
        heads = F.rms_norm(heads, heads.shape[-1:], None, EPS) * weight
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def make(model: Model, tokens: int, dtype: torch.dtype, device: str, ours: str) -> Work:
    generator = torch.Generator(device).manual_seed(0)
    sizes = (model.heads, model.kv_heads, model.head_dim)
    rotated = (model.heads + model.kv_heads) * model.head_dim
    width = rotated + model.kv_heads * model.head_dim
    qkv = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    # Written in place: the timed calls rotate it on and on, the gate sees the first.
    in_place = qkv.clone()
    positions = torch.arange(tokens, dtype=torch.int32, device=device) % SEQUENCE
    table = rope_table(SEQUENCE, model.head_dim, 1e6, device)
    weights = [torch.full((model.head_dim,), w, dtype=dtype, device=device) for w in (0.5, 1.5)]
    per_head = torch.stack([weights[0]] * model.heads + [weights[1]] * model.kv_heads)
    q_weight, k_weight = weights if model.norm else (None, None)
    angles = table.to(dtype)[positions.long()][:, None]
    cos, sin = (half.repeat(1, 1, 2) for half in angles.chunk(2, dim=-1))

    def run(x: torch.Tensor, impl: str) -> torch.Tensor:
        qk_norm_rope(
            x,
            positions,
            table,
            num_heads=sizes[0],
            num_kv_heads=sizes[1],
            head_dim=sizes[2],
            q_weight=q_weight,
            k_weight=k_weight,
            eps=EPS,
            impl=impl,
        )
        return x[:, :rotated].unflatten(1, (-1, model.head_dim))

    heads = qkv[:, :rotated].unflatten(1, (-1, model.head_dim))
    return Work(
        name=f"qk_norm_rope {model.name} T={tokens} {str(dtype)[6:]}",
        variants={
            f"ours ({ours})": lambda: run(in_place, ours),
            "torch": lambda: eager(heads, per_head if model.norm else None, cos, sin),
        },
        reference=lambda: run(qkv.double(), "torch"),
        # In bfloat16 that of the peer, which also rounds the norm, the cosines and every product.
        tolerance=1e-2 if dtype == torch.bfloat16 else 1e-6,
        bytes=2 * heads.numel() * heads.element_size()
        + positions.nbytes
        + min(tokens, SEQUENCE) * table[0].nbytes,
        memory_bound=tokens >= FULL_BATCH,
    )


test_qk_norm_rope = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
