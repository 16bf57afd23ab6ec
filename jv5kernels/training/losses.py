"""The losses of the training regimen, on unit or raw embeddings of shape (batch, dim).

Sources: jina-embeddings-v5-text (arXiv 2602.15547) for their use and weights; InfoNCE from van den Oord et al. 2018
(arXiv 1807.03748); the orthogonal regulariser from Zhang et al. 2017 (arXiv 1708.06320); CoSENT from Su 2022
(kexue.fm/archives/8847); relational distillation from Park et al. 2019 (arXiv 1904.05068); Matryoshka from Kusupati
et al. 2022 (arXiv 2205.13147). All compute in the dtype of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "bidirectional_info_nce",
    "cosent",
    "cosine_distillation",
    "info_nce",
    "matryoshka",
    "orthogonal_regularizer",
    "relational_distillation",
]


def cosine_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean of 1 - cos(ψ(z_S), z_T) over a batch, with ψ already applied (arXiv 2602.15547, stage 1).

    Args:
        student: (batch, teacher dim), projected student embeddings, of any length.
        teacher: (batch, teacher dim), of any length.

    Returns:
        (), 0 for parallel embeddings, 2 for opposite ones.

    Example:
        >>> cosine_distillation(torch.eye(2), 3 * torch.eye(2))
        tensor(0.)
    """
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def info_nce(
    queries: Tensor,
    documents: Tensor,
    temperature: Tensor | float,
    false_negatives: Tensor | None = None,
) -> Tensor:
    """Returns mean_i -ln(S(q_i, d_i) / Σ_j S(q_i, d_j)) with S = exp(cos / τ) (arXiv 1807.03748, eq. 4).

    Args:
        queries: (batch, dim).
        documents: (batch + negatives, dim); row i < batch is the positive of query i, rows after them are hard
            negatives that every query sees.
        temperature: τ > 0.
        false_negatives: (batch, batch + negatives) bool, pairs left out of the sum; the positive always stays.

    Raises:
        ValueError: fewer documents than queries.
    """
    batch = len(queries)
    if len(documents) < batch:
        raise ValueError(
            f"documents has {len(documents)} rows, fewer than the {batch} queries: each query has its positive"
        )
    scores = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T / temperature
    positives = torch.arange(batch, device=queries.device)
    if false_negatives is not None:
        masked = false_negatives.clone()
        masked[positives, positives] = False
        scores = scores.masked_fill(masked, float("-inf"))
    return F.cross_entropy(scores, positives)


def bidirectional_info_nce(
    anchors: Tensor,
    positives: Tensor,
    temperature: Tensor | float,
    false_negatives: Tensor | None = None,
) -> Tensor:
    """Returns the mean of InfoNCE from anchors to positives and from positives to anchors.

    Args:
        anchors, positives: (batch, dim).
        temperature: τ > 0.
        false_negatives: (batch, batch) bool, symmetric or not, as in `info_nce`.
    """
    transposed = None if false_negatives is None else false_negatives.T
    forth = info_nce(anchors, positives, temperature, false_negatives)
    back = info_nce(positives, anchors, temperature, transposed)
    return (forth + back) / 2


def orthogonal_regularizer(queries: Tensor, documents: Tensor) -> Tensor:
    """Returns 1/(B(B-1)) Σ_{i≠j} (q_i·q_j)² plus the same over documents (arXiv 2602.15547, L_S; 1708.06320).

    Independent directions on the sphere have 1/dim on average, so the term spreads embeddings over all dimensions.

    Args:
        queries, documents: (batch, dim) with batch ≥ 2; normalised here.
    """
    return _off_diagonal_energy(queries) + _off_diagonal_energy(documents)


def _off_diagonal_energy(embeddings: Tensor) -> Tensor:
    count = len(embeddings)
    if count < 2:
        raise ValueError(f"the regulariser compares embeddings of a batch: {count} is too few")
    gram = F.normalize(embeddings, dim=-1) @ F.normalize(embeddings, dim=-1).T
    energy = gram.square().sum() - gram.diagonal().square().sum()
    return energy / (count * (count - 1))


def cosent(cosines: Tensor, scores: Tensor, temperature: Tensor | float) -> Tensor:
    """Returns ln(1 + Σ_{s_i > s_j} exp((φ_j - φ_i) / τ)): pairs ranked as their scores are (kexue.fm/archives/8847).

    Args:
        cosines: (pairs,), φ, the model's cosine of each pair.
        scores: (pairs,), s, the given similarity; only its order matters.
        temperature: τ > 0.
    """
    differences = (cosines[None, :] - cosines[:, None]) / temperature
    ranked = scores[:, None] > scores[None, :]
    terms = differences.masked_fill(~ranked, float("-inf")).flatten()
    return torch.logsumexp(torch.cat([terms.new_zeros(1), terms]), dim=0)


def relational_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the mean squared difference of mean-normalised pairwise distances (arXiv 1904.05068, eq. 5).

    Distances of M items, each divided by the mean distance of its own space, so that neither scale nor dimension has
    to agree; the paper's Huber loss is replaced by the square.

    Args:
        student: (M, dim).
        teacher: (M, other dim); no gradient flows into it.
    """
    return F.mse_loss(_relative_distances(student), _relative_distances(teacher.detach()))


def _relative_distances(items: Tensor) -> Tensor:
    distances = F.pdist(F.normalize(items, dim=-1))
    return distances / distances.mean()


def matryoshka(
    loss: Callable[..., Tensor], embeddings: Sequence[Tensor], dims: Sequence[int]
) -> Tensor:
    """Returns the mean over dims of loss(*(e[:, :dim] for e in embeddings)) (arXiv 2205.13147, eq. 1, equal weights).

    Raises:
        ValueError: a dimension beyond the embeddings'.
    """
    width = min(e.shape[-1] for e in embeddings)
    if not dims or max(dims) > width:
        raise ValueError(f"dims={list(dims)} must lie within the {width} dimensions")
    return torch.stack([loss(*(e[..., :dim] for e in embeddings)) for dim in dims]).mean()
