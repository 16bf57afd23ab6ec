"""What the pipeline costs on the host: tokenising, packing and the Python between, with a stub in place of the model.

    python bench/bench_pipeline.py [--tokenizer DIR] [--corpus FILE]         (needs no GPU)

Three cases for each kind of text: a model that takes no time; a device exactly as fast as the tokenizer alone, where
whatever does not overlap shows; and a tokenizer whose answers are known before, which leaves what is Python's and does
not become faster with more cores. Times are the fastest of several runs, which a shared machine disturbs least.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bench_corpus import mixed_lengths, read_texts
from checkpoints import add_corpus_argument, add_tokenizer_argument
from harness import record, write_records
from tokenizers import Encoding, Tokenizer

from jv5kernels.comparison.stdlib_texts import standard_library_texts
from jv5kernels.packing import PackedBatch
from jv5kernels.pipeline import Limits, Pipeline, Statistics
from jv5kernels.synthetic.tokenizer import train_tokenizer
from jv5kernels.tokenization import Tokenization

WIDTH = 16
LIMITS = Limits(max_length=8192, token_budget=32768)
SHORT_CHARACTERS = 40


class Known:
    """Gives encodings of texts that were tokenised before."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        encodings = tokenizer.encode_batch_fast(texts)
        self.known: dict[str, Encoding] = dict(zip(texts, encodings, strict=True))

    def encode_batch_fast(self, texts: list[str]) -> list[Encoding]:
        return [self.known[text] for text in texts]


def seconds(call: Callable[[], Any], runs: int) -> float:
    """Fastest of several calls."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def run_pipeline(
    tokenization: Tokenization, texts: list[str], tokens_per_s: float = float("inf")
) -> int:
    """All texts through a pipeline; returns how many tokens they have.

    Args:
        tokens_per_s: of the stub, which sleeps through its batches.
    """
    result = torch.zeros(len(texts), WIDTH)
    counts = Statistics()

    def compute(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(batch.total_tokens / tokens_per_s)
        return torch.ones(len(batch), WIDTH), torch.zeros(len(batch), dtype=torch.uint8)

    def store(rows: np.ndarray, values: torch.Tensor) -> None:
        result[torch.from_numpy(rows)] = values

    device = torch.device("cpu")
    pipeline = Pipeline(
        tokenization, device, compute, compute, store, limits=LIMITS, statistics=counts
    )
    pipeline.run(texts, np.arange(len(texts)))
    assert bool(result.all()), "a text was left out"
    return counts.tokens


def bench(label: str, tokenizer: Tokenizer, texts: list[str], runs: int) -> list[dict[str, Any]]:
    tokenization = Tokenization(tokenizer, LIMITS.max_length)
    known = Tokenization(tokenizer, LIMITS.max_length)
    known._tokenizer = Known(known._tokenizer, texts)
    tokens = run_pipeline(known, texts)
    alone = seconds(lambda: tokenizer.encode_batch_fast(texts), runs)
    cases: dict[str, Callable[[], int]] = {
        "a model that takes no time": lambda: run_pipeline(tokenization, texts),
        "a device as fast as the tokenizer": lambda: run_pipeline(
            tokenization, texts, tokens / alone
        ),
        "the tokenizer's answers known": lambda: run_pipeline(known, texts),
    }
    lines = []
    for case, call in cases.items():
        found = seconds(call, runs)
        print(
            f"{label}, {tokens} tokens, {case:34} {len(texts) / found:9.0f} texts/s {tokens / found:9.0f} tokens/s  "
            f"{alone / found:5.2f}x the tokenizer alone",
            flush=True,
        )
        lines.append(
            record(
                f"pipeline, {label}, {tokens} tokens, {case}",
                "jv5kernels",
                "tokens_per_s",
                tokens / found,
                "1/s",
                device="cpu",
                peer="encode_batch_fast alone",
                peer_value=tokens / alone,
                ratio=alone / found,
                texts_per_s=len(texts) / found,
                cpu_cores=len(os.sched_getaffinity(0)),
            )
        )
    return lines


def short_texts(sources: list[str], count: int) -> list[str]:
    """Stretches of SHORT_CHARACTERS of the sources laid end to end."""
    everything = "\n".join(sources)
    starts = np.arange(count) * SHORT_CHARACTERS % (len(everything) - SHORT_CHARACTERS)
    return [everything[start : start + SHORT_CHARACTERS] for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_corpus_argument(parser)
    add_tokenizer_argument(parser)
    parser.add_argument("--count", type=int, default=2000, help="texts of mixed lengths")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    documents = [d.text for d in standard_library_texts(20_000, 1_000)]
    sources = read_texts(arguments.corpus) if arguments.corpus else documents
    kinds = {
        "mixed lengths": mixed_lengths(sources, arguments.count),
        "short texts": short_texts(sources, 10 * arguments.count),
    }
    records: list[dict[str, Any]] = []
    for family in ("nano", "small"):
        if arguments.tokenizer is None:
            tokenizer = train_tokenizer(family, documents[:500])
        else:
            tokenizer = Tokenizer.from_file(str(arguments.tokenizer / f"{family}.json"))
        for kind, texts in kinds.items():
            label = f"{family}'s tokenizer, {len(texts)} texts of {kind}"
            records += bench(label, tokenizer, texts, arguments.runs)
            write_records("pipeline-cpu", records)
    print(write_records("pipeline-cpu", records))


if __name__ == "__main__":
    main()
