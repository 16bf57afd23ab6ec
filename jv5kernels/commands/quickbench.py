"""A quick comparison on this machine: FastEncoder beside Transformers and Sentence Transformers.

Same checkpoint, same texts, same dtype, from text to vectors. The embeddings are compared first; a
speed is only reported when they agree. Runs alternate, so that a busy machine slows down all alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from jv5kernels.comparison.peers import (
    TransformersPeer,
    merged_reference,
    sentence_transformers_peer,
)

if TYPE_CHECKING:
    from jv5kernels.encoder import FastEncoder

__all__ = ["Comparison", "Result", "compare", "render", "shown"]

# Two runs of one model in the same dtype; batches of other shapes round differently.
AGREEMENT = {torch.float32: 0.99999, torch.bfloat16: 0.999, torch.float16: 0.9999}


@dataclass(frozen=True)
class Result:
    """One contender: median seconds for all texts, and its worst cosine to FastEncoder's embeddings."""

    name: str
    note: str
    seconds: float
    tokens_per_second: float
    cosine_min: float


@dataclass(frozen=True)
class Comparison:
    """All contenders on the same texts, FastEncoder first, and its embeddings."""

    texts: int
    tokens: int
    device: str
    dtype: str
    threshold: float
    results: tuple[Result, ...]
    embeddings: np.ndarray = field(repr=False)

    @property
    def agrees(self) -> bool:
        """Whether every peer gives the same embeddings."""
        return all(result.cosine_min >= self.threshold for result in self.results)

    def speedup(self, result: Result) -> float:
        """How many times faster FastEncoder is than a contender."""
        return result.seconds / self.results[0].seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [{**asdict(result), "speedup": self.speedup(result)} for result in self.results]
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "embeddings"}
        return {**values, "agrees": self.agrees, "results": rows}


@dataclass
class _Contender:
    name: str
    note: str
    encode: Callable[[Sequence[str]], np.ndarray]


def compare(
    encoder: FastEncoder,
    texts: Sequence[str],
    *,
    task: str | None = None,
    batch_sizes: Sequence[int] = (8, 32),
    repeats: int = 3,
    sentence_transformers: bool = True,
) -> Comparison:
    """Runs all contenders on the same texts.

    Args:
        encoder: ours; gives the checkpoint, dtype and device for all.
        texts: with the prompt already in front.
        task: adapter; default the encoder's.
        batch_sizes: the peers run with the one that suits them best.
        repeats: timed runs of each, of which the median counts.
        sentence_transformers: include Sentence Transformers when it is installed.
    """
    task = task if task is not None else encoder.task
    model = merged_reference(encoder, task)
    plain = TransformersPeer(encoder, model)
    contenders = [
        _Contender(
            "jv5kernels", "packed, no padding", lambda t: encoder.encode(t, task=task, prompt="")
        ),
        *_at_best_batch_size("Transformers", plain.encode, texts, batch_sizes),
    ]
    if not sentence_transformers:
        return _run(encoder, contenders, texts, repeats)
    with sentence_transformers_peer(encoder, model) as peer:
        if peer is not None:

            def encode(chosen: Sequence[str], batch_size: int) -> np.ndarray:
                return peer.encode(
                    list(chosen), batch_size=batch_size, prompt="", show_progress_bar=False
                )

            contenders += _at_best_batch_size("Sentence Transformers", encode, texts, batch_sizes)
        return _run(encoder, contenders, texts, repeats)


def _at_best_batch_size(
    name: str,
    encode: Callable[[Sequence[str], int], np.ndarray],
    texts: Sequence[str],
    batch_sizes: Sequence[int],
) -> list[_Contender]:
    """The contender with the batch size that was fastest on a sample (every eighth text)."""
    sample = list(texts)[::8]
    encode(sample[:2], 2)
    best = batch_sizes[0]
    if len(batch_sizes) > 1:
        best = min(batch_sizes, key=lambda size: _seconds(lambda t: encode(t, size), sample)[0])
    note = f"batches of {best}, longest first"
    return [_Contender(name, note, lambda chosen: encode(chosen, best))]


def _seconds(
    encode: Callable[[Sequence[str]], np.ndarray], texts: Sequence[str]
) -> tuple[float, np.ndarray]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    embeddings = encode(texts)
    return time.perf_counter() - start, embeddings


def _run(
    encoder: FastEncoder, contenders: Sequence[_Contender], texts: Sequence[str], repeats: int
) -> Comparison:
    ours = contenders[0].encode(texts)
    times: list[list[float]] = [[] for _ in contenders]
    cosines = [1.0 for _ in contenders]
    for _ in range(repeats):
        for index, contender in enumerate(contenders):
            seconds, embeddings = _seconds(contender.encode, texts)
            times[index].append(seconds)
            cosines[index] = min(cosines[index], _cosine_min(ours, embeddings))
    tokens = sum(map(len, encoder.tokenize(texts)))
    results = []
    for contender, runs, cosine in zip(contenders, times, cosines, strict=True):
        seconds = statistics.median(runs)
        results.append(Result(contender.name, contender.note, seconds, tokens / seconds, cosine))
    return Comparison(
        texts=len(texts),
        tokens=tokens,
        device=str(encoder.device),
        dtype=str(encoder.dtype).removeprefix("torch."),
        threshold=AGREEMENT[encoder.dtype],
        results=tuple(results),
        embeddings=ours,
    )


def _cosine_min(a: np.ndarray, b: np.ndarray) -> float:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    cosine = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return float(cosine.min())


def shown(cosine: float) -> str:
    """A cosine with eight digits, rounded down: 1 only where it is 1."""
    return f"{math.floor(min(cosine, 1.0) * 1e8) / 1e8:.8f}"


def render(comparison: Comparison) -> Any:
    """A table for rich."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("tokens/s", "seconds", "we are", "cosine min"):
        table.add_column(name, justify="right")
    table.add_column("", style="dim")
    for result in comparison.results:
        ours = result is comparison.results[0]
        table.add_row(
            result.name,
            f"{result.tokens_per_second:,.0f}",
            f"{result.seconds:.2f}",
            "" if ours else f"{comparison.speedup(result):.2f}x as fast",
            "" if ours else shown(result.cosine_min),
            result.note,
        )
    return table
