"""Ranges of a stream of embeddings: exact extremes and percentiles to one bin, in one pass and constant memory.

Percentiles come from a histogram per dimension whose bins are those of bfloat16: 128 to an octave, from 2^-16 to 2^8,
of either sign, with one bin around zero. A percentile is therefore off by at most one bin, 1/128 of its size (2^-15
next to zero), whatever the scale of the dimension; fixed bins over [-1, 1] of the same number would be off by a
hundredth of the spread of a 1024-dimensional unit vector's values everywhere, and useless for vectors that are not
normalised. Counts are integers, so neither the order of the embeddings nor the way they were batched changes a bit of
the result.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Calibrator", "bounds", "check_percentile"]

# Exponents of the histogram's least and greatest magnitude, and its bins an octave.
LEAST, GREATEST, OCTAVE = -16, 8, 128
MAGNITUDES = (GREATEST - LEAST) * OCTAVE
ZERO = MAGNITUDES + 1  # index of the bin around zero; one bin at either end holds what is larger
BINS = 2 * ZERO + 1
# Values counted at once.
COUNT_VALUES = 1 << 22


def bounds(ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between which values no code saturates: the step of the last code begins at the maximum."""
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
        inside = (lower <= self.minima) & (upper >= self.maxima)
        if inside.all():
            return 0.0
        assert self.counts is not None, "ranges inside the extremes come from the histogram"
        edges = _edges(self.minima, self.maxima)
        clipped = 0.0
        for dim in np.flatnonzero(~inside):
            below = np.concatenate([[0], np.cumsum(self.counts[dim])])
            first, last = np.interp([lower[dim], upper[dim]], edges[dim], below)
            clipped += first if lower[dim] > self.minima[dim] else 0.0
            clipped += self.count - last if upper[dim] < self.maxima[dim] else 0.0
        return float(clipped / (self.count * self.dim))


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
