"""Whole backbones at the real geometry in bf16: ours against Transformers sdpa, and the peak memory at full context.

    python bench/bench_backbone.py [--no-compile] [--only small-64x512 small-memory ...]      (needs a CUDA GPU)

One shape is also timed against Transformers under torch.compile, which takes half a minute to compile it. Rows
are full (no padding), which flatters Transformers; ours computes the last layer for the pooled tokens alone, as it does
in use.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from typing import Any

import torch
from checkpoints import FAMILIES
from harness import record, time_interleaved, write_records
from models import (
    batch_of,
    last_token_embeddings,
    our_backbone,
    random_weights,
    real_spec,
    token_ids,
    transformers_model,
)

from jv5kernels.output import OutputFormat

# (family, rows, tokens a row): 32768 tokens a batch
SHAPES = [
    ("small", 64, 512),
    ("small", 16, 2048),
    ("small", 4, 8192),
    ("small", 1, 32768),
    ("nano", 64, 512),
    ("nano", 16, 2048),
    ("nano", 4, 8192),
]
# Where torch.compile takes part: at longer rows it is slower than without.
COMPILED = "small-64x512"
# Two bf16 runs of 12 to 28 layers against each other; each is within 1e-4 of fp32 (bench_parity.py).
MIN_COSINE = 0.9995


@torch.inference_mode()
def bench_shape(
    family: str, rows: int, length: int, ours: Any, peer: torch.nn.Module, with_compile: bool
) -> list[dict[str, Any]]:
    spec = ours.spec
    sequences = token_ids(spec, [length] * rows)
    batch = batch_of(sequences, "cuda")
    ids = batch.input_ids.view(rows, length).long()
    output = OutputFormat("lasttoken", spec.hidden_size)

    def run_ours() -> torch.Tensor:
        hidden, cu_seqlens = ours.forward_pooled(batch, "lasttoken")
        return output.apply(hidden, cu_seqlens, ours.norm_weight, spec.rms_norm_eps)[0]

    def run_peer() -> torch.Tensor:
        return last_token_embeddings(peer, ids)

    cosine = torch.nn.functional.cosine_similarity(run_ours(), run_peer()).min().item()
    assert cosine >= MIN_COSINE, f"{family} {rows}x{length}: cosine {cosine}"
    calls = {"jv5kernels": run_ours, "transformers sdpa": run_peer}
    compile_seconds = None
    if with_compile:
        compiled = torch.compile(peer, dynamic=False)
        calls["transformers torch.compile"] = lambda: last_token_embeddings(compiled, ids)
        start = time.perf_counter()
        calls["transformers torch.compile"]()
        torch.cuda.synchronize()
        compile_seconds = time.perf_counter() - start
        print(
            f"{family:6} {rows:3}x{length:<6} torch.compile took {compile_seconds:.0f} s",
            flush=True,
        )
    timings = time_interleaved(calls)
    a = timings["jv5kernels"]
    lines = []
    for name in list(calls)[1:]:
        b = timings[name]
        print(
            f"{family:6} {rows:3}x{length:<6} {a.p50:8.2f} ms  {name} {b.p50:8.2f} ms  {b.p50 / a.p50:5.2f}x",
            flush=True,
        )
        lines.append(
            record(
                f"{family} {rows}x{length} bfloat16",
                "jv5kernels",
                "ms",
                a.p50,
                "ms",
                device="cuda",
                peer=name,
                peer_value=b.p50,
                ratio=b.p50 / a.p50,
                p20=a.p20,
                p80=a.p80,
                tokens_per_s=1e3 * rows * length / a.p50,
                cosine_min=cosine,
                **({"compile_seconds": compile_seconds} if name.endswith("compile") else {}),
            )
        )
    return lines


@torch.inference_mode()
def peak_bytes(call: Any) -> int:
    """Bytes that a call takes beyond what was allocated before it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bench_memory(family: str, length: int, ours: Any, peer: torch.nn.Module) -> dict[str, Any]:
    batch = batch_of(token_ids(ours.spec, [length]), "cuda")
    mine = peak_bytes(lambda: ours.forward_pooled(batch, "lasttoken"))
    ids = batch.input_ids.view(1, length).long()
    theirs = peak_bytes(lambda: last_token_embeddings(peer, ids))
    print(
        f"{family:6}   1x{length:<6} peak {mine / 1e9:.3f} GB  transformers {theirs / 1e9:.3f} GB over the weights"
    )
    return record(
        f"{family} 1x{length} bfloat16",
        "jv5kernels",
        "peak_bytes_over_weights",
        mine,
        "byte",
        device="cuda",
        peer="transformers sdpa",
        peer_value=theirs,
        ratio=theirs / mine,
    )


def name_of(family: str, rows: int, length: int) -> str:
    return f"{family}-{rows}x{length}"


def bench(family: str, only: list[str], with_compile: bool) -> Iterator[list[dict[str, Any]]]:
    """The records of one model, as they come."""
    spec = real_spec(family)
    weights = random_weights(spec, seed=0, dtype=torch.bfloat16, device="cuda")
    peer = transformers_model(spec, weights, torch.bfloat16)
    ours = our_backbone(spec, weights, torch.bfloat16)
    for shape in SHAPES:
        name = name_of(*shape)
        if shape[0] == family and name in only:
            yield bench_shape(*shape, ours, peer, with_compile and name == COMPILED)
    if f"{family}-memory" in only:
        yield [bench_memory(family, spec.max_position_embeddings, ours, peer)]


def main() -> None:
    names = [name_of(*shape) for shape in SHAPES] + [f"{family}-memory" for family in FAMILIES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}")  # fmt: skip
    arguments = parser.parse_args()
    records = []
    for family in FAMILIES:
        if any(name.startswith(family) for name in arguments.only):
            for found in bench(family, arguments.only, not arguments.no_compile):
                records += found
                print(write_records("backbone", records), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
