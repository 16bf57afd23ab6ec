"""verify: FastEncoder's embeddings beside those of an untouched fp32 Transformers model of the same weights.

Both get the same texts; the reference runs them one at a time, without padding, with peft's adapter unmerged. What is
compared is what people use: directions (cosine), signs (binary codes), and who is nearest to whom.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jv5kernels.checkpoint import Checkpoint
from jv5kernels.comparison.reference import load_reference, reference_embeddings
from jv5kernels.comparison.texts_of_length import Sample, sample_texts
from jv5kernels.encoder import FastEncoder
from jv5kernels.live.reference import live_embeddings, live_reference
from jv5kernels.tokenization import check_texts

__all__ = ["Row", "Thresholds", "VerifyReport", "verify"]

CPU_LENGTHS = (16, 128, 512)
CUDA_LENGTHS = (16, 512, 4096, 32768)
# dtype -> smallest cosine that passes.
COSINE = {torch.float32: 0.999999, torch.bfloat16: 0.9999, torch.float16: 0.9999}
NEIGHBOURS = 10


@dataclass(frozen=True)
class Thresholds:
    """What a row must reach.

    Args:
        cosine: smallest cosine to fp32; None for 0.999999 in float32 and 0.9999 in the half precisions.
        error_ratio: with compare_dtype, our root mean square error over Transformers' own in the same dtype.
    """

    cosine: float | None = None
    error_ratio: float = 1.0


@dataclass(frozen=True)
class Row:
    """One task and one range of lengths.

    Args:
        task: adapter, or None.
        length: upper end of the range of lengths.
        tokens: (shortest, longest) text in tokens.
        texts: how many.
        cosine_min, cosine_p1, cosine_mean: to the fp32 reference, over texts; p1 is the first percentile.
        error_max, error_rms: largest difference of two components; root mean square length of the difference vectors.
        sign_flips: share of components with another sign.
        neighbour_overlap: share of each text's nearest texts (10 at most, of all lengths) that both agree on.
        nan_count: texts with a component that is not finite, on either side.
        theirs_cosine_min, theirs_error_rms: the same of Transformers in our dtype, when asked for.
        failures: what was missed, () if nothing.
    """

    task: str | None
    length: int
    tokens: tuple[int, int]
    texts: int
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    error_max: float
    error_rms: float
    sign_flips: float
    neighbour_overlap: float
    nan_count: int
    theirs_cosine_min: float | None
    theirs_error_rms: float | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`: a table when printed, plain values by `to_dict`."""

    model: str
    device: str
    dtype: str
    cosine: float
    error_ratio: float | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not any(row.failures for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the versions that took part."""
        import transformers

        from jv5kernels import __version__

        versions = {
            "jv5kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return {**asdict(self), "passed": self.passed, "versions": versions}

    def __str__(self) -> str:
        table = [_HEADINGS, *(_cells(row) for row in self.rows)]
        if self.error_ratio is None:
            table = [cells[:10] + cells[11:] for cells in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{self.model} on {self.device} in {self.dtype}, beside Transformers in float32"]
        lines += [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in table
        ]
        lines += [f"note: {note}" for note in self.notes]
        for row in self.rows:
            lines += [f"missed: {row.task or '-'}, up to {row.length}: {f}" for f in row.failures]
        asked = f"cosine >= {self.cosine}"
        if self.error_ratio is not None:
            asked += f", rms error <= {self.error_ratio} x that of Transformers in {self.dtype}"
        return "\n".join([*lines, f"{'passed' if self.passed else 'FAILED'} ({asked})"])


_HEADINGS = (
    "task tokens texts cos-min cos-p1 cos-mean max-error sign-flips top-10 rms-error theirs-rms nan"
).split()


def _cells(row: Row) -> list[str]:
    theirs = "-" if row.theirs_error_rms is None else f"{row.theirs_error_rms:.2e}"
    low, high = row.tokens
    return [
        row.task or "-",
        f"{low}-{high}" if low < high else str(low),
        str(row.texts),
        *(f"{value:.7f}" for value in (row.cosine_min, row.cosine_p1, row.cosine_mean)),
        f"{row.error_max:.2e}",
        f"{row.sign_flips:.3%}",
        f"{row.neighbour_overlap:.1%}",
        f"{row.error_rms:.2e}",
        theirs,
        str(row.nan_count),
    ]


def verify(
    model: str | Path | nn.Module,
    *,
    tasks: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
    compare_dtype: bool = False,
    thresholds: Thresholds | None = None,
    **source: Any,
) -> VerifyReport:
    """Compares FastEncoder with fp32 Transformers on the same weights, by task and length.

    Args:
        model: a hub id, a folder, or a live model. Of a live model the reference is a copy of its backbone in fp32 that
            runs the class's own forward.
        tasks: adapters to check; default all.
        texts: what to encode, without prompts; default English prose from Python's documentation, cut to `lengths`.
        lengths: upper ends of the length ranges in tokens; default 16, 512, 4096 and 32768 on CUDA, 16, 128 and 512 on
            a CPU, as far as the model goes.
        device, dtype, batch_invariant: as for FastEncoder.
        compare_dtype: also run Transformers in our dtype, whose error ours may not exceed.
        thresholds: what must be reached.
        source: further arguments of FastEncoder: revision, token, cache_dir, local_files_only, pooling, tokenizer.

    Raises:
        ValueError: an unknown task; a length beyond the model's; no texts.

    Example:
        >>> report = verify("jinaai/jina-embeddings-v5-text-small", tasks=["retrieval"], lengths=[512])
        >>> report.passed, report.rows[0].cosine_min
    """
    encoder = FastEncoder(
        model, device=device, dtype=dtype, batch_invariant=batch_invariant, **source
    )
    chosen = _check_tasks(tasks, encoder)
    ends, notes = _check_lengths(lengths, encoder)
    thresholds = thresholds or Thresholds()
    if texts is not None and not texts:
        raise ValueError("texts is empty: nothing to compare")
    if compare_dtype and encoder.dtype == torch.float32:
        notes.append("compare_dtype has no effect in float32: the reference is of the same dtype")
        compare_dtype = False
    samples = sample_texts(
        encoder, ends, check_texts(texts) if texts is not None else None, encoder.device.type
    )
    cosine = COSINE[encoder.dtype] if thresholds.cosine is None else thresholds.cosine
    ratio = thresholds.error_ratio if compare_dtype else None
    rows: list[Row] = []
    with _exact_float32():
        for task in chosen:
            rows += _compare(encoder, task, samples, cosine, ratio)
    return VerifyReport(
        model=type(model).__name__ if isinstance(model, nn.Module) else str(model),
        device=str(encoder.device),
        dtype=str(encoder.dtype).removeprefix("torch."),
        cosine=cosine,
        error_ratio=ratio,
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _check_tasks(tasks: Sequence[str] | None, encoder: FastEncoder) -> Sequence[str | None]:
    if tasks is None:
        return encoder.tasks or (None,)
    if isinstance(tasks, str):
        tasks = [tasks]
    unknown = [task for task in tasks if task not in encoder.tasks]
    if unknown or not tasks:
        raise ValueError(f"tasks={list(tasks)}: choose among {list(encoder.tasks)}")
    return list(tasks)


def _check_lengths(
    lengths: Sequence[int] | None, encoder: FastEncoder
) -> tuple[list[int], list[str]]:
    """Upper ends of the ranges, ascending, and what to say about them."""
    limit = encoder.max_seq_length
    if lengths is not None:
        wrong = [length for length in lengths if not 1 <= length <= limit]
        if wrong or not lengths:
            raise ValueError(f"lengths={list(lengths)}: lengths must be from 1 to {limit} tokens")
        return sorted(set(lengths)), []
    if encoder.device.type == "cuda":
        return sorted({min(length, limit) for length in CUDA_LENGTHS}), []
    ends = sorted({min(length, limit) for length in CPU_LENGTHS})
    note = f"on a CPU only texts up to {ends[-1]} tokens are checked; lengths= asks for others, up to {limit}"
    return ends, [note] if limit > ends[-1] else []


def _compare(
    encoder: FastEncoder,
    task: str | None,
    samples: Sequence[Sample],
    cosine: float,
    ratio: float | None,
) -> list[Row]:
    """The rows of one task."""
    exact = _reference(encoder, task, samples, torch.float32)
    theirs = None if ratio is None else _reference(encoder, task, samples, encoder.dtype)
    ours = []
    with warnings.catch_warnings():
        # A length below that of the prompt cuts it, here on purpose.
        warnings.filterwarnings("ignore", message=".*were cut")
        for sample in samples:
            ours.append(
                np.asarray(
                    encoder.encode(
                        list(sample.texts), task=task, prompt="", max_length=sample.length
                    ),
                    dtype=np.float32,
                )
            )
    overlap = _neighbour_overlap(np.concatenate(ours), np.concatenate(exact))
    rows, start = [], 0
    for i, sample in enumerate(samples):
        found = _row(task, sample, ours[i], exact[i], None if theirs is None else theirs[i])
        shared = float(overlap[start : start + len(sample.texts)].mean())
        failures = tuple(_failures(found, cosine, ratio))
        rows.append(Row(**{**found, "neighbour_overlap": shared, "failures": failures}))
        start += len(sample.texts)
    return rows


def _reference(
    encoder: FastEncoder, task: str | None, samples: Sequence[Sample], dtype: torch.dtype
) -> list[np.ndarray]:
    """Transformers' embeddings of every sample, (N, C) float32."""
    checkpoint = encoder.checkpoint
    if not isinstance(checkpoint, Checkpoint):
        model = live_reference(checkpoint, task, dtype, encoder.device)
        return [
            live_embeddings(model, checkpoint, sample.texts, encoder.pooling, sample.length)
            for sample in samples
        ]
    model = load_reference(checkpoint, task, dtype=dtype, device=encoder.device)
    return [
        reference_embeddings(
            model, checkpoint, sample.texts, pooling=encoder.pooling, max_length=sample.length
        )
        for sample in samples
    ]


def _row(
    task: str | None,
    sample: Sample,
    ours: np.ndarray,
    exact: np.ndarray,
    theirs: np.ndarray | None,
) -> dict[str, Any]:
    cosines, error = _cosines(ours, exact), _distances(ours, exact)
    finite = np.isfinite(ours).all(1) & np.isfinite(exact).all(1)
    return {
        "task": task,
        "length": sample.length,
        "tokens": (min(sample.tokens), max(sample.tokens)),
        "texts": len(sample.texts),
        "cosine_min": float(cosines.min()),
        "cosine_p1": float(np.percentile(cosines, 1)),
        "cosine_mean": float(cosines.mean()),
        "error_max": float(np.abs(ours - exact).max()),
        "error_rms": float(np.sqrt((error**2).mean())),
        "sign_flips": float(((ours > 0) != (exact > 0)).mean()),
        "nan_count": int((~finite).sum()),
        "theirs_cosine_min": None if theirs is None else float(_cosines(theirs, exact).min()),
        "theirs_error_rms": None
        if theirs is None
        else float(np.sqrt((_distances(theirs, exact) ** 2).mean())),
    }


def _failures(row: dict[str, Any], cosine: float, ratio: float | None) -> Iterator[str]:
    if row["nan_count"]:
        yield f"{row['nan_count']} embeddings are not finite"
    if not row["cosine_min"] >= cosine:
        yield f"cosine {row['cosine_min']:.8f} is below {cosine}"
    if ratio is not None and not row["error_rms"] <= ratio * row["theirs_error_rms"]:
        yield (
            f"rms error {row['error_rms']:.3e} is above {ratio} x "
            f"{row['theirs_error_rms']:.3e} of Transformers in the same dtype"
        )


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y = a.astype(np.float64), b.astype(np.float64)
    return (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a.astype(np.float64) - b, axis=1)


def _neighbour_overlap(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(N,) share of each row's nearest rows that both sides have; 1 where there is no other row."""
    count = min(NEIGHBOURS, len(ours) - 1)
    if count < 1:
        return np.ones(len(ours))
    nearest = []
    for embeddings in (ours, exact):
        similarity = embeddings @ embeddings.T
        np.fill_diagonal(similarity, -np.inf)
        nearest.append(np.argpartition(-similarity, count - 1, axis=1)[:, :count])
    return np.array([len(np.intersect1d(a, b)) / count for a, b in zip(*nearest, strict=True)])


@contextmanager
def _exact_float32() -> Iterator[None]:
    """fp32 products in fp32 on CUDA: TF32, if the process allows it, would make the yardstick inexact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
