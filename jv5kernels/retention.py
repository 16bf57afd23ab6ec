"""What truncation and quantisation keep of a ranking: top-10 overlap and nDCG against float32 at full dimension.

Every precision is searched the way a store searches it, exhaustively:

    float32, float16   inner products
    int8               inner products of codes of one symmetric step, a query coded like the documents
    int8, rescored     the float32 query against the values that codes of per-dimension ranges stand for
    binary             Hamming distance between bits
    binary, rescored   the best `oversample · 10` of these, by the float32 query against the bits as ±1
    binary + int8      the same candidates, by the float32 query against int8 codes kept beside the bits

The yardstick is the float32 ranking at full dimension, not relevance: 1 means "the same ten texts (in the same order)".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jv5kernels.calibrator import Calibrator
from jv5kernels.ops.quantize import quantize_int8
from jv5kernels.storage import dequantize

__all__ = ["PRECISIONS", "TOP", "Point", "default_dims", "measure", "ndcg", "overlap"]

TOP = 10
SMALLEST_DIM = 32
# Queries scored at once against all documents.
QUERY_BLOCK = 64
# Name -> bytes a vector of `dim` dimensions.
PRECISIONS: dict[str, Callable[[int], int]] = {
    "float32": lambda dim: 4 * dim,
    "float16": lambda dim: 2 * dim,
    "int8": lambda dim: dim,
    "binary + int8": lambda dim: dim + -(-dim // 8),
    "binary": lambda dim: -(-dim // 8),
}


@dataclass(frozen=True)
class Point:
    """One way to keep vectors and what it keeps of the ranking.

    Args:
        precision: one of `PRECISIONS`.
        dim: dimensions kept.
        bytes: per vector.
        rescored: whether the float32 query decides the order.
        overlap: share of the ten float32 neighbours that are found, 0 to 1.
        ndcg: nDCG@10 with gains 10 to 1 for the float32 neighbours.
    """

    precision: str
    dim: int
    bytes: int
    rescored: bool
    overlap: float
    ndcg: float


def default_dims(width: int) -> list[int]:
    """The model's dimension and its halves down to 32 (the model's own where that is less)."""
    dims = [width]
    while dims[-1] % 2 == 0 and dims[-1] // 2 >= SMALLEST_DIM:
        dims.append(dims[-1] // 2)
    return dims


def overlap(reference: np.ndarray, found: np.ndarray) -> float:
    """Mean share of each row of `reference` (M, k) that is in the same row of `found` (M, k)."""
    return float((reference[:, :, None] == found[:, None, :]).any(2).mean())


def ndcg(reference: np.ndarray, found: np.ndarray) -> float:
    """Mean nDCG of rankings (M, k) where the document that the reference ranks r-th of k has the gain k + 1 - r."""
    k = reference.shape[1]
    discounts = 1 / np.log2(np.arange(2, k + 2))
    gains = np.arange(k, 0, -1)
    same = reference[:, None, :] == found[:, :, None]  # (M, k found, k reference)
    reached = ((same * gains).sum(2) * discounts).sum(1)
    return float((reached / (gains * discounts).sum()).mean())


def measure(
    documents: np.ndarray,
    queries: np.ndarray,
    dims: Sequence[int],
    *,
    oversample: int = 4,
    same: bool = False,
) -> list[Point]:
    """Measures every precision at every dimension.

    Args:
        documents: (N, C) float32, at least eleven.
        queries: (M, C) float32.
        dims: dimensions to keep, of C.
        oversample: candidates a hit before rescoring.
        same: query i is document i, which is no hit of its own.

    Raises:
        ValueError: fewer documents than hits, or a dimension out of range.
    """
    if len(documents) < TOP + same:
        raise ValueError(f"{len(documents)} texts are too few: a ranking has {TOP} hits")
    width = documents.shape[1]
    for dim in dims:
        if not 1 <= dim <= width:
            raise ValueError(f"dimension {dim} is out of range: the model has 1 to {width}")
    depth = min(oversample * TOP, len(documents) - same)
    reference = _best(_unit(queries), _unit(documents), TOP, same)
    points = []
    for dim in dims:
        found = _rankings(_unit(queries[:, :dim]), _unit(documents[:, :dim]), depth, same)
        for (precision, rescored), ranking in found.items():
            size = PRECISIONS[precision](dim)
            scores = overlap(reference, ranking), ndcg(reference, ranking)
            points.append(Point(precision, dim, size, rescored, *scores))
    return points


def _rankings(
    queries: np.ndarray, documents: np.ndarray, depth: int, same: bool
) -> dict[tuple[str, bool], np.ndarray]:
    """(precision, rescored) -> the best TOP documents of every query, (M, TOP)."""
    calibrator = Calibrator(documents.shape[1])
    calibrator.add(documents)
    symmetric, ranges = calibrator.ranges(symmetric=True), calibrator.ranges()

    def codes(x: np.ndarray) -> np.ndarray:
        return _coded(x, symmetric).astype(np.float32)

    def signs(x: np.ndarray) -> np.ndarray:
        # Inner products of ±1 are dim - 2 · Hamming distance, exactly.
        return np.where(x > 0, np.float32(1), np.float32(-1))

    values = dequantize(_coded(documents, ranges), ranges, profile="sentence-transformers")
    bits = signs(documents)
    by_bits = _best(signs(queries), bits, depth, same)
    halves = documents.astype(np.float16).astype(np.float32)
    return {
        ("float32", False): _best(queries, documents, TOP, same),
        ("float16", False): _best(queries, halves, TOP, same),
        ("int8", False): _best(codes(queries), codes(documents), TOP, same),
        ("int8", True): _best(queries, values, TOP, same),
        ("binary + int8", True): _reordered(queries, values, by_bits),
        ("binary", False): by_bits[:, :TOP],
        ("binary", True): _reordered(queries, bits, by_bits),
    }


def _coded(x: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    return quantize_int8(torch.from_numpy(x), torch.from_numpy(ranges)).numpy()


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return np.ascontiguousarray(x / np.maximum(norm, 1e-12), dtype=np.float32)


def _best(queries: np.ndarray, documents: np.ndarray, depth: int, same: bool) -> np.ndarray:
    """(M, depth) documents of the largest inner products; the earlier one first where they are equal."""
    blocks = []
    for start in range(0, len(queries), QUERY_BLOCK):
        scores = queries[start : start + QUERY_BLOCK] @ documents.T
        if same:
            rows = np.arange(len(scores))
            scores[rows, rows + start] = -np.inf
        blocks.append(np.argsort(-scores, axis=1, kind="stable")[:, :depth])
    return np.concatenate(blocks)


def _reordered(queries: np.ndarray, stored: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The best TOP of the candidates (M, depth) by float32 query against what is stored."""
    blocks = []
    for start in range(0, len(queries), QUERY_BLOCK):
        chosen = candidates[start : start + QUERY_BLOCK]
        scores = np.einsum("mc,mkc->mk", queries[start : start + QUERY_BLOCK], stored[chosen])
        order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        blocks.append(np.take_along_axis(chosen, order, axis=1))
    return np.concatenate(blocks)
