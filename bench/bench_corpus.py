"""Text in, vectors out, over texts of mixed lengths: ours against Sentence Transformers at its best batch size.

    python bench/bench_corpus.py        (CUDA: real geometry, bf16; CPU: a small one, fp32)

With --corpus FILE and --tokenizer DIR it takes other texts and the real vocabularies. Both load the same folder, a
merged checkpoint with random weights. On CUDA the texts have log-normal lengths (median 180 tokens, at most 8192), cut
from real text: the docstrings of Python's standard library unless --corpus names a JSONL file. The peer's best batch
size is found on a part of the texts. A sample of the embeddings is held against Sentence Transformers in fp32 before
anything is written. The last run of ours is traced: the share of its time in which the GPU works.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import (
    CPU_GEOMETRY,
    CPU_NAME,
    add_arguments,
    add_corpus_argument,
    real_checkpoint,
)
from gpu_busy import profile
from harness import record, write_records

from jv5kernels import FastEncoder
from jv5kernels.comparison.stdlib_texts import standard_library_texts
from jv5kernels.synthetic.checkpoint import write_checkpoint

MEDIAN_TOKENS, SIGMA, LONGEST_TOKENS = 180, 1.02, 8192
CHARACTERS_A_TOKEN = 3.6
BATCH_SIZES = {"cuda": (32, 128), "cpu": (4, 16)}
MIN_COSINE = {"cuda": 0.9999, "cpu": 0.999999}
SAMPLE = 60
# Texts on which the peer's batch sizes are compared.
TRIAL = 1000


def read_texts(path: Path) -> list[str]:
    """The texts of a JSONL file, plain or gzipped: "text", or else "description", a str or one for each language."""
    opener = gzip.open if path.suffix == ".gz" else open
    found: list[str] = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            text = line.get("text", line.get("description", ""))
            found += [text] if isinstance(text, str) else text.values()
    return found


def mixed_lengths(sources: list[str], count: int, seed: int = 0) -> list[str]:
    """`count` texts of log-normal length, each a stretch of the sources laid end to end."""
    random = np.random.default_rng(seed)
    everything = "\n".join(sources)
    tokens = random.lognormal(np.log(MEDIAN_TOKENS), SIGMA, count).clip(4, LONGEST_TOKENS)
    sizes = (tokens * CHARACTERS_A_TOKEN).astype(int)
    starts = random.integers(0, max(1, len(everything) - int(sizes.max())), count)
    return [everything[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def seconds(call: Callable[[], Any], runs: int) -> tuple[float, Any]:
    """Median seconds of several calls, and the last result."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def in_float32(
    folder: Path, texts: list[str], device: str, prompt: str | None = None
) -> np.ndarray:
    """Sentence Transformers' embeddings in fp32, one text at a time; prompt None is the checkpoint's default."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": torch.float32})
    return model.encode(texts, batch_size=1, normalize_embeddings=True, prompt=prompt)


def cosine_min(a: np.ndarray, b: np.ndarray) -> float:
    """Lowest cosine of paired rows of unit length."""
    return float((a.astype(np.float64) * b.astype(np.float64)).sum(1).min())


def bench(
    folder: Path, texts: list[str], label: str, device: str, runs: int
) -> list[dict[str, Any]]:
    from sentence_transformers import SentenceTransformer

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ours = FastEncoder(folder, device=device, dtype=dtype)
    peer = SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype})
    tokens = sum(map(len, ours.tokenize(texts)))
    warm = ours.warmup()
    mine, embeddings = seconds(lambda: ours.encode(texts), runs)
    print(
        f"{label}: {len(texts)} texts, {tokens} tokens; jv5kernels {tokens / mine:.0f} tokens/s; "
        f"warm-up {warm.seconds:.1f} s, {warm.bytes / 1e6:.0f} MB"
    )
    extra: dict[str, Any] = {}
    if device == "cuda":
        traced = profile(lambda: ours.encode(texts))
        extra |= {"gpu_busy_share": traced.share, "gpu_idle_first_s": traced.lead}
        print(
            f"  GPU busy {100 * traced.share:.1f} % of {traced.wall:.3f} s (traced), "
            f"idle for {1e3 * traced.lead:.0f} ms before the first kernel"
        )
    trial: dict[int, float] = {}
    for size in BATCH_SIZES[device]:
        peer.encode(texts[:size], batch_size=size)
        trial[size], _ = seconds(lambda size=size: peer.encode(texts[:TRIAL], batch_size=size), 1)
    best = min(trial, key=lambda size: trial[size])
    peer_seconds, theirs = seconds(
        lambda: peer.encode(texts, batch_size=best, normalize_embeddings=True),
        1 if device == "cuda" else runs,
    )
    print(f"  sentence-transformers batch {best:4}: {tokens / peer_seconds:10.0f} tokens/s")
    sample = slice(0, None, max(1, len(texts) // SAMPLE))
    exact = in_float32(folder, texts[sample], device)
    cosine, peer_cosine = (cosine_min(e[sample], exact) for e in (embeddings, theirs))
    print(f"  lowest cosine to fp32: {cosine:.7f}, sentence-transformers {peer_cosine:.7f}")
    assert cosine >= MIN_COSINE[device], f"{label}: cosine {cosine}"
    ratio = peer_seconds / mine
    print(f"  {ratio:.2f}x batch {best}")
    return [
        record(
            f"{label}, {len(texts)} texts, {tokens} tokens, {str(dtype)[6:]}",
            "jv5kernels",
            "tokens_per_s",
            tokens / mine,
            "1/s",
            device=device,
            cpu_cores=len(os.sched_getaffinity(0)),
            peer=f"sentence-transformers, batch_size {best}",
            peer_value=tokens / peer_seconds,
            ratio=ratio,
            cosine_min=cosine,
            peer_cosine_min=peer_cosine,
            trial_seconds_by_batch_size={str(size): t for size, t in trial.items()},
            **extra,
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    add_corpus_argument(parser)
    add_arguments(parser)
    parser.add_argument("--count", type=int, default=4000, help="texts on CUDA")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each")
    arguments = parser.parse_args()
    device = arguments.device
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    documents = (
        standard_library_texts() if device == "cpu" else standard_library_texts(20_000, 1_000)
    )
    sources = read_texts(arguments.corpus) if arguments.corpus else [d.text for d in documents]
    records = []
    with tempfile.TemporaryDirectory() as root:
        if device == "cpu":
            folder = write_checkpoint(
                Path(root) / "cpu", family="small", layout="merged", geometry=CPU_GEOMETRY
            )
            records += bench(
                folder, sources, f"{CPU_NAME}, stdlib docstrings", "cpu", arguments.runs
            )
        else:
            texts = mixed_lengths(sources, arguments.count)
            for family in arguments.models:
                folder = real_checkpoint(Path(root), family, arguments.tokenizer)
                records += bench(folder, texts, f"{family}, mixed lengths", "cuda", arguments.runs)
                write_records("corpus", records)
                torch.cuda.empty_cache()
    print(write_records("corpus" if device == "cuda" else "corpus-cpu", records))


if __name__ == "__main__":
    main()
