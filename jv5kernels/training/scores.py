"""Measures of retrieval."""

from __future__ import annotations

import numpy as np

__all__ = ["ndcg_at", "ranks"]


def ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Returns the rank, from 0, of each query's relevant document; ties count against it.

    Args:
        scores: (queries, documents).
        relevant: (queries,) the one relevant document of each query.
    """
    own = np.take_along_axis(scores, relevant[:, None], 1)
    return (scores >= own).sum(1) - 1


def ndcg_at(scores: np.ndarray, relevant: np.ndarray, cutoff: int = 10) -> np.ndarray:
    """Returns nDCG@cutoff of each query with one relevant document: 1 / log2(2 + rank), 0 beyond the cutoff.

    Args:
        scores: (queries, documents), higher is nearer.
        relevant: (queries,) the one relevant document of each query.

    Example:
        >>> ndcg_at(np.array([[0.1, 0.9], [0.2, 0.8]]), np.array([1, 0]))
        array([1.        , 0.63092975])
    """
    rank = ranks(scores, relevant)
    return np.where(rank < cutoff, 1 / np.log2(2 + rank), 0.0)
