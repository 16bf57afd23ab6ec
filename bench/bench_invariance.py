"""Batch invariance at the real geometry: the same text alone and among others, and what exact equality costs.

python bench/bench_invariance.py            (needs a CUDA GPU)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bench_parity import embed
from harness import record, time_interleaved, write_records
from models import batch_of, our_backbone, random_weights, real_spec, token_ids

COMPANY = (2, 7, 64)
LENGTHS = (1, 12, 63, 200, 513, 2048)
# Shapes whose time is compared: short texts, and the lengths of a mixed batch.
TIMED = {
    "64x512": [512] * 64,
    "mixed lengths": [
        int(n) for n in np.random.default_rng(3).lognormal(np.log(180), 1.0, 100).clip(8, 8192)
    ],
    "1x32768": [32768],
}
MUST_COSINE = 0.99999


@torch.inference_mode()
def compare_company(backbone: Any) -> tuple[int, int, float]:
    """Texts whose bits changed in company, texts compared, and the smallest cosine to the text alone."""
    random = np.random.default_rng(0)
    changed = compared = 0
    cosine = 1.0
    for length in LENGTHS:
        (text,) = token_ids(backbone.spec, [length], seed=length)
        alone = embed(backbone, [text], "cuda")[0]
        for company in COMPANY:
            others = token_ids(
                backbone.spec, random.integers(1, 900, company - 1).tolist(), seed=company
            )
            for place in {0, company // 2, company - 1}:
                sequences = [*others[:place], text, *others[place:]]
                there = embed(backbone, sequences, "cuda")[place]
                compared += 1
                changed += not torch.equal(alone, there)
                similarity = torch.nn.functional.cosine_similarity(
                    alone.double(), there.double(), 0
                )
                cosine = min(cosine, similarity.item())
    return changed, compared, cosine


def judge(label: str, backbone: Any, family: str) -> dict[str, Any]:
    """Compares texts alone and in company; AssertionError when a guarantee is missed."""
    changed, compared, cosine = compare_company(backbone)
    print(f"{family:6} {label:22} {changed} of {compared} changed bits, cosine {cosine:.8f}")
    assert cosine >= MUST_COSINE, f"{family}, {label}: cosine {cosine}"
    assert label == "default" or changed == 0, f"{family}: {changed} of {compared} changed bits"
    work = f"{family} bfloat16, a text alone and in company"
    shared = {"device": "cuda", "texts": compared, "changed": changed}
    return record(work, label, "cosine_min", cosine, "1", **shared)


@torch.inference_mode()
def cost(shape: str, invariant: Any, plain: Any, family: str) -> dict[str, Any]:
    """Times one shape with and without the guarantee."""
    batch = batch_of(token_ids(plain.spec, TIMED[shape]), "cuda")
    timings = time_interleaved(
        {
            "batch_invariant=True": lambda: invariant.forward_pooled(batch, "lasttoken"),
            "default": lambda: plain.forward_pooled(batch, "lasttoken"),
        }
    )
    slow, fast = timings["batch_invariant=True"].p50, timings["default"].p50
    percent = 100 * (slow / fast - 1)
    print(f"{family:6} {shape:14} {slow:8.2f} ms, default {fast:8.2f} ms: {percent:.1f} % more")
    return record(
        f"{family} {shape} bfloat16",
        "batch_invariant=True",
        "ms",
        slow,
        "ms",
        device="cuda",
        peer="default",
        peer_value=fast,
        ratio=fast / slow,
        cost_percent=percent,
    )


def bench(family: str) -> list[dict[str, Any]]:
    spec = real_spec(family)
    weights = random_weights(spec, seed=2, dtype=torch.bfloat16, device="cuda")
    plain = our_backbone(spec, weights, torch.bfloat16)
    invariant = our_backbone(spec, weights, torch.bfloat16, batch_invariant=True)
    records = [judge("batch_invariant=True", invariant, family), judge("default", plain, family)]
    shapes = [s for s, lengths in TIMED.items() if max(lengths) <= spec.max_position_embeddings]
    return records + [cost(shape, invariant, plain, family) for shape in shapes]


def main() -> None:
    records: list[dict[str, Any]] = []
    for family in ("small", "nano"):
        records += bench(family)
        print(write_records("invariance", records), flush=True)


if __name__ == "__main__":
    main()
