"""Calibration: the ranges of int8 and uint8 output, measured once over a corpus and kept with what they belong to.

A range per dimension is what turns a float into a byte, so a corpus and its queries must share it, and it means nothing for
another model, task, prompt or dimension. `Calibrator` measures in one streaming pass: memory is constant, and the result does
not depend on the order of the texts or on how they were batched. `Calibration` is the result, a small JSON file.

Percentiles come from a histogram per dimension whose bins are those of bfloat16: 128 to an octave, from 2^-16 to 2^8, of either
sign, with one bin around zero. A percentile is therefore off by at most one bin, 1/128 of its size (2^-15 next to zero),
whatever the scale of the dimension; fixed bins over [-1, 1] of the same number would be off by a tenth of the spread of
a 1024-dimensional unit vector's values. Minima and maxima are exact.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jv5kernels import __version__

if TYPE_CHECKING:
    from jv5kernels.checkpoint import Checkpoint
    from jv5kernels.encoder import FastEncoder
    from jv5kernels.live.model import LiveModel

__all__ = ["Calibration", "Calibrator", "Origin", "calibrate", "fingerprint", "open_calibration"]

FORMAT, VERSION = "jv5kernels calibration", 1
# Exponents of the histogram's least and greatest magnitude, and its bins an octave.
LEAST, GREATEST, OCTAVE = -16, 8, 128
MAGNITUDES = (GREATEST - LEAST) * OCTAVE
ZERO = MAGNITUDES + 1  # index of the bin around zero; one bin at either end holds what is larger
BINS = 2 * ZERO + 1
# Values counted at once.
COUNT_VALUES = 1 << 22
# Texts encoded at once: their float32 embeddings are all that is kept of them.
BLOCK_TEXTS = {"cuda": 8192, "cpu": 512}
SAMPLES = 64


@dataclass(frozen=True)
class Origin:
    """What embeddings are embeddings of; ranges hold for one of these.

    Args:
        model, revision: hub id or folder, and the commit of its files when known.
        weights: digest of the architecture and of samples of the weights, the task's adapter included. It decides
            whether two models are the same; their names may differ (a hub id and a local copy of it).
        task: adapter, None where there is none.
        prompt: text put before every input.
        pooling, dim, normalize: as in `encode`.
    """

    model: str
    revision: str | None
    weights: str
    task: str | None
    prompt: str
    pooling: str
    dim: int
    normalize: bool


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranges measured over a corpus, with their origin.

    Args:
        origin: the embeddings that they were measured on.
        ranges: (2, dim) float32, minima and maxima of the dimensions.
        percentile: 99.9 for "from the 0.1th to the 99.9th percentile"; None for the exact minima and maxima.
        symmetric: one range for all dimensions, so that an int8 code is round(value / step) and distances between
            codes are those between vectors; stores that compare codes need it.
        count: embeddings that were measured.
        clip_rate: share of their values that saturate (0 without a percentile).
        dtype: compute dtype they were measured in.
        package: version of jv5kernels that measured.

    Example:
        >>> calibration = encoder.calibrate(corpus, truncate_dim=256)
        >>> calibration.save("corpus-256.json")
        >>> encoder.encode(queries, prompt_name="query", truncate_dim=256, precision="int8", calibration="corpus-256.json")
    """

    origin: Origin
    ranges: np.ndarray = field(repr=False)
    percentile: float | None
    symmetric: bool
    count: int
    clip_rate: float
    dtype: str
    package: str = __version__

    def save(self, path: str | Path) -> None:
        """Writes the file under a temporary name and renames it: it is never there in part."""
        path = Path(path)
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "ranges"}
        named["origin"] = vars(self.origin)
        minima, maxima = ([float(value) for value in row] for row in self.ranges)
        content = {
            "format": FORMAT,
            "version": VERSION,
            **named,
            "minima": minima,
            "maxima": maxima,
        }
        fresh = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(fresh, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads a file that `save` wrote; float32 ranges come back bit for bit.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a calibration, is damaged, or is of a later version.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a calibration: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a calibration: its format is not {FORMAT!r}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path} is a calibration of version {content.get('version')}; this package reads version {VERSION}"
            )
        try:
            named = {f.name: content[f.name] for f in fields(cls) if f.name != "ranges"}
            named["origin"] = Origin(**content["origin"])
            ranges = np.array([content["minima"], content["maxima"]], dtype=np.float32)
            sound = ranges.shape == (2, named["origin"].dim) and bool(np.isfinite(ranges).all())
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged calibration: {error!r}") from error
        if not sound or (ranges[0] > ranges[1]).any():
            raise ValueError(f"{path} is a damaged calibration: its ranges do not fit its dimension")
        return cls(ranges=ranges, **named)

    def check(self, origin: Origin, query_prompt: str | None = None) -> None:
        """Raises unless embeddings of `origin` may be coded with these ranges.

        A corpus and its queries share ranges: ranges of documents also serve the checkpoint's query prompt. The reverse is
        refused, since queries are few and short and their ranges clip documents.

        Raises:
            ValueError: model, revision, task, prompt, pooling, dimension or normalisation differ; says both sides.
        """
        mine = self.origin
        wrong = [
            name
            for name in ("weights", "revision", "task", "prompt", "pooling", "dim", "normalize")
            if getattr(mine, name) != getattr(origin, name)
        ]
        if mine.revision is None or origin.revision is None:
            wrong = [name for name in wrong if name != "revision"]
        if "prompt" in wrong and query_prompt is not None and origin.prompt == query_prompt:
            wrong.remove("prompt")
        if not wrong:
            return

        def shown(side: Origin) -> str:
            facts = {name: getattr(side, name) for name in wrong}
            if facts.pop("weights", None):
                facts = {"model": side.model, "weights": side.weights[:8], **facts}
            return ", ".join(f"{name}={value!r}" for name, value in facts.items())

        raise ValueError(
            f"the calibration does not fit: it was measured with {shown(mine)}, this call has {shown(origin)}. "
            "Codes of different ranges cannot be compared: calibrate anew (ranges=calibration.ranges skips this check)"
        )

    def clipped(self, embeddings: np.ndarray) -> float:
        """Returns the share of values (N, dim) that saturate: how well the ranges fit other embeddings."""
        lower, upper = bounds(self.ranges)
        outside = (embeddings < lower) | (embeddings > upper)
        return float(outside.mean()) if outside.size else 0.0


def open_calibration(given: Calibration | str | Path) -> Calibration:
    """The calibration itself, or the one in a file."""
    return given if isinstance(given, Calibration) else Calibration.load(given)


def bounds(ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which values no code saturates: the last code's step begins at the maximum and is as wide as the others."""
    minima, maxima = ranges
    return minima, maxima + (maxima - minima) / np.float32(255)


class Calibrator:
    """Measures ranges over embeddings that arrive in any order and in any batches.

    Args:
        dim: dimensions.
        histogram: count values too, which percentiles need: 8 · dim · 6147 bytes.

    Example:
        >>> calibrator = Calibrator(2)
        >>> calibrator.add(np.array([[0.5, -1.0], [-0.25, 1.0]], np.float32))
        >>> calibrator.ranges()
        array([[-0.25, -1.  ],
               [ 0.5 ,  1.  ]], dtype=float32)
    """

    def __init__(self, dim: int, *, histogram: bool = False) -> None:
        self.dim = dim
        self.count = 0
        self.minima = np.full(dim, np.inf, np.float32)
        self.maxima = np.full(dim, -np.inf, np.float32)
        self.counts = np.zeros((dim, BINS), np.int64) if histogram else None

    def add(self, embeddings: np.ndarray) -> None:
        """Adds embeddings (N, dim) float32.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings must have shape (N, {self.dim}), not {embeddings.shape}")
        if not np.isfinite(embeddings).all():
            raise ValueError("embeddings hold NaN or Inf")
        if not len(embeddings):
            return
        embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
        self.count += len(embeddings)
        np.minimum(self.minima, embeddings.min(axis=0), out=self.minima)
        np.maximum(self.maxima, embeddings.max(axis=0), out=self.maxima)
        if self.counts is not None:
            first = np.arange(self.dim) * BINS
            for rows in np.array_split(embeddings, -(-embeddings.size // COUNT_VALUES)):
                counted = np.bincount((_bins(rows) + first).ravel(), minlength=self.counts.size)
                self.counts += counted.reshape(self.counts.shape)

    def ranges(self, percentile: float | None = None, *, symmetric: bool = False) -> np.ndarray:
        """Returns (2, dim) float32 minima and maxima.

        Args:
            percentile: 99.9 for the 0.1th and the 99.9th percentile of each dimension; None for the exact extremes.
            symmetric: the same range for all dimensions, of 255 steps s = m / 127 around zero, where m is the largest
                magnitude (or percentile of all values): an int8 code is then round(value / s).

        Raises:
            ValueError: nothing was added; a percentile out of range, or without `histogram`.
        """
        if not self.count:
            raise ValueError("there is nothing to calibrate on: no text was given")
        if percentile is None:
            low, high = self.minima, self.maxima
        else:
            check_percentile(percentile)
            if self.counts is None:
                raise ValueError("percentiles need Calibrator(histogram=True)")
            parts = [(self.counts, self.minima, self.maxima)]
            if symmetric:
                parts = [(self.counts.sum(0, keepdims=True), self.minima.min(), self.maxima.max())]
            low, high = (
                _quantile(*parts[0], share / 100) for share in (100 - percentile, percentile)
            )
        if symmetric:
            step = max(np.abs(low).max(), np.abs(high).max()) / 127
            low, high = np.full(self.dim, -128.5 * step), np.full(self.dim, 126.5 * step)
        return np.stack([low, high]).astype(np.float32)

    def clip_rate(self, ranges: np.ndarray) -> float:
        """Returns the share of the values added that saturate, interpolated inside the bins of the bounds."""
        lower, upper = bounds(ranges)
        if (lower <= self.minima).all() and (upper >= self.maxima).all():
            return 0.0
        assert self.counts is not None, "ranges inside the extremes come from the histogram"
        edges = _edges(self.minima, self.maxima)
        clipped = 0.0
        for dim, counts in enumerate(self.counts):
            below = np.concatenate([[0], np.cumsum(counts)])
            inside = np.interp([lower[dim], upper[dim]], edges[dim], below)
            clipped += inside[0] + self.count - inside[1]
        return clipped / (self.count * self.dim)


def check_percentile(percentile: float) -> None:
    """Raises ValueError unless `percentile` lies above 50 and below 100."""
    if not 50 < percentile < 100:
        raise ValueError(f"percentile={percentile} is out of range: above 50 and below 100")


def _bins(values: np.ndarray) -> np.ndarray:
    """The bin of every float32 value: its sign and the bits of its magnitude that bfloat16 keeps."""
    pattern = (values.view(np.uint32) >> 16).astype(np.int64)
    magnitude = (pattern & 0x7FFF) - ((127 + LEAST) * OCTAVE - 1)
    np.clip(magnitude, 0, MAGNITUDES + 1, out=magnitude)
    return np.where(pattern & 0x8000, ZERO - magnitude, ZERO + magnitude)


def _edges(minima: np.ndarray, maxima: np.ndarray) -> np.ndarray:
    """(dim, BINS + 1) edges of the bins, ascending, cut at the extremes of each dimension."""
    patterns = (127 + LEAST) * OCTAVE + np.arange(MAGNITUDES + 1)
    positive = (patterns.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    edges = np.concatenate([[-np.inf], -positive[::-1], positive, [np.inf]])
    return np.clip(edges, np.atleast_1d(minima)[:, None], np.atleast_1d(maxima)[:, None])


def _quantile(
    counts: np.ndarray, minima: np.ndarray, maxima: np.ndarray, share: float
) -> np.ndarray:
    """numpy.quantile(values, share, axis=0) as far as a histogram (dim, BINS) knows it; (dim,) float64."""
    edges = _edges(minima, maxima)
    total = int(counts[0].sum())
    position = (total - 1) * share
    below = int(position)
    values = []
    for rank in (below, min(below + 1, total - 1)):
        # The bin of the value with this rank, and the value if those of a bin lie evenly in it.
        ends = counts.cumsum(axis=1)
        found = (ends <= rank).sum(axis=1)
        row = np.arange(len(counts))
        inside = (rank - (ends[row, found] - counts[row, found]) + 0.5) / counts[row, found]
        low, high = edges[row, found], edges[row, found + 1]
        values.append(low + inside * (high - low))
    # The first and the last value are known exactly.
    values[0] = np.where(below == 0, edges[:, 0], values[0])
    values[1] = np.where(below + 1 >= total - 1, edges[:, -1], values[1])
    return values[0] + (position - below) * (values[1] - values[0])


def fingerprint(checkpoint: Checkpoint | LiveModel, task: str | None) -> str:
    """Returns a digest of the architecture and of evenly spaced values of every weight, the task's adapter included.

    Values are rounded to bfloat16 first, so that a checkpoint and the same checkpoint loaded in float32 agree.
    """
    digest = hashlib.blake2b(repr(checkpoint.spec).encode(), digest_size=16)
    tensors = dict(checkpoint.weights())
    if task is not None:
        for name, pair in checkpoint.adapter(task).pairs.items():
            tensors[f"{name} a"], tensors[f"{name} b"] = pair.a, pair.b
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().bfloat16().float()
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def calibrate(
    encoder: FastEncoder,
    texts: Iterable[str],
    *,
    percentile: float | None = None,
    symmetric: bool = False,
    task: str | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    truncate_dim: int | None = None,
    normalize_embeddings: bool = True,
    progress: Callable[[int], object] = lambda _: None,
) -> Calibration:
    """Encodes a corpus once and returns the ranges of its embeddings, for int8 and uint8 output.

    One pass in constant memory: `texts` may be a generator over any number of texts. Use documents, and use the result for
    documents and queries alike.

    Args:
        texts: the corpus, or a sample of it (some thousand texts).
        percentile: 99.9 clips what lies outside the 0.1th to the 99.9th percentile of each dimension, so that a few
            extreme values do not widen every step; None takes the exact minima and maxima.
        symmetric: one range around zero for all dimensions; for stores that compare codes (see `storage.PROFILES`).
        task, prompt_name, prompt, truncate_dim, normalize_embeddings: as in `encode`; the result is bound to them.
        progress: called with the number of texts of every finished block.

    Raises:
        ValueError: no texts, or a percentile out of range; and whatever `encode` raises.

    Example:
        >>> encoder.calibrate(open("corpus.txt"), percentile=99.9, truncate_dim=256).clip_rate
        0.0019
    """
    if percentile is not None:
        check_percentile(percentile)
    call: dict[str, Any] = {
        "task": task,
        "prompt_name": prompt_name,
        "prompt": prompt,
        "truncate_dim": truncate_dim,
        "normalize_embeddings": normalize_embeddings,
        "precision": "float32",
    }
    origin = encoder.origin(
        task=task,
        prompt=prompt,
        prompt_name=prompt_name,
        truncate_dim=truncate_dim,
        normalize=normalize_embeddings,
    )
    calibrator = Calibrator(origin.dim, histogram=percentile is not None)
    remaining = iter(texts)
    while block := list(islice(remaining, BLOCK_TEXTS[encoder.device.type])):
        calibrator.add(encoder.encode(block, **call))
        progress(len(block))
    ranges = calibrator.ranges(percentile, symmetric=symmetric)
    return Calibration(
        origin=origin,
        ranges=ranges,
        percentile=percentile,
        symmetric=symmetric,
        count=calibrator.count,
        clip_rate=calibrator.clip_rate(ranges),
        dtype=str(encoder.dtype).removeprefix("torch."),
    )
