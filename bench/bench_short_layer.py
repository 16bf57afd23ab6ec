"""The kernels of a short layer, each in one CUDA graph over the weights of many layers: the weights come from memory.

    python bench/bench_short_layer.py [--sweep] [--tokens 12]            (needs a CUDA GPU)

The peer is what the usual layer loop takes for the same step: cuBLAS, and a kernel of its own for the activation.
--sweep also times other tiles.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from harness import copy_bandwidth_work, record, relative_error, time_interleaved, write_records
from triton.runtime.errors import OutOfResources

from jv5kernels.kernels import short_layer
from jv5kernels.ops import (
    add_rms_norm,
    attention_varlen,
    linear,
    qk_norm_rope,
    rope_table,
    short_attention,
    short_linear,
    short_norm,
    swiglu,
)

LAYERS = 28
EPS = 1e-6
# name: (columns, inner, SwiGLU)
PROJECTIONS = {
    "small qkv": (4096, 1024, False),
    "small o": (1024, 2048, False),
    "small gate_up": (3072, 1024, True),
    "small down": (1024, 3072, False),
    "nano qkv": (2304, 768, False),
    "nano o": (768, 768, False),
    "nano gate_up": (3072, 768, True),
    "nano down": (768, 3072, False),
}
NORMS = {"small norm": 1024, "nano norm": 768}
# name: (heads, kv heads, head_dim, causal)
ATTENTIONS = {"small attention": (16, 8, 128, True), "nano attention": (12, 12, 64, False)}
SWEEP = {"BN": (8, 16, 32), "num_warps": (4, 8, 16), "max_BK": (256, 512, 1024, 2048)}
TOLERANCE = 1e-2
Step = Callable[[int], torch.Tensor]


def microseconds(step: Step, replays: int = 20) -> float:
    """Time of one step, in a graph of a step for each layer."""
    step(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            step(layer)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / replays / LAYERS


def projection_steps(
    columns: int, inner: int, is_swiglu: bool, tokens: int
) -> tuple[Step, Step, int]:
    """Ours, the peer's, and the bytes of one weight."""
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    rows = columns * (1 + is_swiglu)
    weights = [torch.randn(rows, inner, **like) / inner**0.5 for _ in range(LAYERS)]
    x = torch.randn(tokens, inner, **like)

    def ours(layer: int) -> torch.Tensor:
        return short_linear(x, weights[layer], is_swiglu=is_swiglu)

    def peer(layer: int) -> torch.Tensor:
        out = linear(x, weights[layer])
        return swiglu(out) if is_swiglu else out

    return ours, peer, weights[0].nbytes


def norm_steps(inner: int, tokens: int) -> tuple[Step, Step, int]:
    """As above; what a norm reads and writes."""
    like: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    x = torch.randn(tokens, inner, device="cuda")
    y, weight = torch.randn(tokens, inner, **like), torch.rand(inner, **like)
    return (
        lambda _: short_norm(x, y, weight, EPS)[0],
        lambda _: add_rms_norm(y, x, weight, EPS)[0],
        2 * x.nbytes + 2 * y.nbytes,
    )


def attention_steps(
    heads: int, kv_heads: int, dim: int, causal: bool, tokens: int
) -> tuple[Step, Step, int]:
    """As a query's bucket holds it: one sequence of `tokens`, one that takes the rest of 16."""
    total = max(16, tokens)
    width = (heads + 2 * kv_heads) * dim
    qkv = torch.randn(total, width, dtype=torch.bfloat16, device="cuda")
    bounds = torch.tensor([0, tokens, total], dtype=torch.int32, device="cuda")
    positions = torch.cat([torch.arange(tokens), torch.arange(total - tokens)]).int().cuda()
    table = rope_table(total, dim, 1e6, "cuda")
    norm = torch.rand(dim, dtype=torch.bfloat16, device="cuda") if causal else None
    sizes: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    sizes |= {"q_weight": norm, "k_weight": norm, "eps": EPS}

    def ours(layer: int) -> torch.Tensor:
        return short_attention(qkv, table, bounds, total, causal=causal, **sizes)

    def peer(layer: int) -> torch.Tensor:
        # In place, so every layer rotates it further; the time is the same.
        qk_norm_rope(qkv, positions, table, **sizes)
        q, k, v = qkv.unflatten(-1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)
        return attention_varlen(q, k, v, bounds, total, causal=causal).flatten(1)

    return ours, peer, qkv.nbytes


def sweep(name: str, step: Step) -> None:
    """Prints the best tiles of a projection."""
    columns, inner, is_swiglu = PROJECTIONS[name]
    found = []
    for values in itertools.product(*SWEEP.values()):
        config = short_layer.Config(*values)
        step_of = min(config.max_BK, inner & -inner)
        registers = config.BN * (1 + is_swiglu) * inner // (64 * config.num_warps)
        if registers > 160 or step_of // config.num_warps < 16 or step_of < config.max_BK // 2:
            continue
        with patch.dict(short_layer.CONFIGS, dict.fromkeys(short_layer.CONFIGS, config)):
            try:
                found.append((microseconds(step, 5), str(config)))
            except OutOfResources:
                continue
    for time_us, config_name in sorted(found)[:5]:
        print(f"  {name:14} {time_us:6.2f} us  {config_name}", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--sweep", nargs="*", metavar="NAME", help="projections; default all")
    arguments = parser.parse_args()
    copy = time_interleaved(copy_bandwidth_work().variants, rounds=1)["copy"].p50
    bandwidth = copy_bandwidth_work().bytes / copy / 1e6
    steps = {n: projection_steps(*shape, arguments.tokens) for n, shape in PROJECTIONS.items()}
    steps |= {n: norm_steps(inner, arguments.tokens) for n, inner in NORMS.items()}
    steps |= {n: attention_steps(*shape, arguments.tokens) for n, shape in ATTENTIONS.items()}
    records = []
    for name, (ours, peer, size) in steps.items():
        error = relative_error(ours(0), peer(0).double()) if name not in ATTENTIONS else 0.0
        assert error <= TOLERANCE, f"{name}: relative error {error}"
        mine, theirs = microseconds(ours), microseconds(peer)
        rate = size / mine / 1e3
        print(
            f"{name:16} {mine:7.2f} us {rate:7.0f} GB/s  usual {theirs:7.2f} us {theirs / mine:5.2f}x",
            flush=True,
        )
        records.append(
            record(
                f"short layer, {name} T={arguments.tokens} bfloat16",
                "ours (triton)",
                "ms",
                mine / 1e3,
                "ms",
                device="cuda",
                peer="usual kernels",
                peer_value=theirs / 1e3,
                ratio=theirs / mine,
                GB_per_s=rate,
                copy_GB_per_s=bandwidth,
            )
        )
        write_records("short_layer", records)
    if arguments.sweep is not None:
        for name in arguments.sweep or PROJECTIONS:
            sweep(name, steps[name][0])
    print(write_records("short_layer", records))


if __name__ == "__main__":
    main()
