"""One short query, text in and vector out: ours against Sentence Transformers and Transformers, and the GPU's part.

    python bench/bench_query.py [--tokenizer DIR] [--kernels]        (needs a CUDA GPU)

All load the same folder with random weights in bf16. The GPU's part is a replay of the query's CUDA graph, back to
back; reading the weights once at the speed of a copy is its floor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_corpus import cosine_min, in_float32
from checkpoints import add_arguments, real_checkpoint
from gpu_busy import profile
from harness import copy_bandwidth_work, record, time_interleaved, write_records

from jv5kernels import FastEncoder
from jv5kernels.graphs import ShortInputs

QUERY = "How fast does light travel in a vacuum?"
MIN_COSINE = 0.9999
REPLAYS = 200
# What a replay owes to each: it is timed again without.
PARTS = {
    "chained launches": "jv5kernels.kernels.short_layer.has_sm_90",
    "short layers": "jv5kernels.graphs.takes_short_layers",
}


def milliseconds(call: Callable[[], Any], runs: int) -> list[float]:
    """Times of single calls, in order of length."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)


def replay_milliseconds(encoder: FastEncoder) -> float:
    """One replay of the graph that was used last, the mean of many back to back."""
    assert encoder._short is not None
    replay = encoder._short.latest().replay
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        replay()
    start.record()
    for _ in range(REPLAYS):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPLAYS


def replay_without(encoder: FastEncoder, name: str) -> float:
    """The same where the package's function `name`, which says whether a device can do something, says no."""
    with patch(name, lambda *_: False):
        encoder._short = ShortInputs(encoder.device)
        encoder.encode_query([QUERY])
    return replay_milliseconds(encoder)


def bench(family: str, folder: Path, show_kernels: bool, runs: int) -> list[dict[str, Any]]:
    from sentence_transformers import SentenceTransformer

    ours = FastEncoder(folder, device="cuda")
    peer = SentenceTransformer(str(folder), device="cuda", model_kwargs={"dtype": torch.bfloat16})
    prompt = ours.prompts["query"]
    tokens = len(ours.tokenize([QUERY], prompt=prompt)[0])
    bare, tokenizer = peer[0].auto_model, peer.tokenizer

    def transformers() -> np.ndarray:
        inputs = tokenizer([prompt + QUERY], return_tensors="pt").to("cuda")
        with torch.inference_mode():
            hidden = bare(**inputs, use_cache=False).last_hidden_state[:, -1].float()
            return torch.nn.functional.normalize(hidden, dim=-1).cpu().numpy()

    calls = {
        "jv5kernels": lambda: ours.encode_query([QUERY]),
        "sentence-transformers": lambda: peer.encode(
            [QUERY], prompt=prompt, normalize_embeddings=True
        ),
        "transformers": transformers,
    }
    exact = in_float32(folder, [QUERY], "cuda", prompt)
    cosine = cosine_min(calls["jv5kernels"](), exact)
    assert cosine >= MIN_COSINE, f"{family}: cosine {cosine}"
    for call in calls.values():
        milliseconds(call, 5)
    times = {name: milliseconds(call, runs) for name, call in calls.items()}
    p50 = {name: statistics.median(found) for name, found in times.items()}
    ours.encode_query([QUERY])
    replay = replay_milliseconds(ours)
    weights = sum(
        p.weight.nbytes
        for layer in ours._backbones.get(None).layers
        for p in (layer.qkv, layer.o, layer.gate_up, layer.down)
    )
    copy = time_interleaved(copy_bandwidth_work().variants, rounds=1)["copy"].p50
    floor = weights / (copy_bandwidth_work().bytes / copy)
    traced = profile(lambda: ours._short.latest().replay())
    without = {label: replay_without(ours, name) for label, name in PARTS.items()}
    print(f"{family}, {tokens} tokens, cosine to fp32 {cosine:.7f}")
    print(
        f"  GPU {replay:.3f} ms in {traced.launches} kernels; reading {weights / 1e9:.2f} GB {floor:.3f} ms; "
        + ", ".join(f"without {label} {value:.3f} ms" for label, value in without.items())
    )
    for name, value in p50.items():
        print(f"  {name:22} {value:8.3f} ms  p90 {times[name][runs * 9 // 10]:8.3f}")
    if show_kernels:
        for name, count, seconds in traced.kernels[:16]:
            print(f"  {count:5} x {1e6 * seconds / count:7.2f} us  {name[:100]}")
    work = f"{family} one query, {tokens} tokens, bfloat16"
    lines = [
        record(
            f"{work}, text in, vector out",
            "jv5kernels",
            "ms",
            p50["jv5kernels"],
            "ms",
            device="cuda",
            peer=name,
            peer_value=p50[name],
            ratio=p50[name] / p50["jv5kernels"],
            p20=times["jv5kernels"][runs // 5],
            p80=times["jv5kernels"][runs * 4 // 5],
            cosine_min=cosine,
        )
        for name in ("sentence-transformers", "transformers")
    ]
    lines.append(
        record(
            f"{work}, GPU part",
            "jv5kernels",
            "ms",
            replay,
            "ms",
            device="cuda",
            peer="reading the weights once",
            peer_value=floor,
            ratio=floor / replay,
            kernels=traced.launches,
            ms_without=without,
        )
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a replay")
    parser.add_argument("--runs", type=int, default=100)
    arguments = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as root:
        for family in arguments.models:
            folder = real_checkpoint(Path(root), family, arguments.tokenizer)
            records += bench(family, folder, arguments.kernels, arguments.runs)
            write_records("query", records)
            torch.cuda.empty_cache()
    print(write_records("query", records))


if __name__ == "__main__":
    main()
