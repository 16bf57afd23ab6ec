"""The last step of encoding: what one batch of hidden states becomes, and in which precision.

Slice to `truncate_dim`, then normalise, then quantise: Sentence Transformers slices after normalising and leaves the
vectors shorter than 1, which changes dot products by a factor but no direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jv5kernels.backbone import PackedBackbone
from jv5kernels.ops.embed_output import embed_output
from jv5kernels.packing import PackedBatch

PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "binary": torch.int8,
    "ubinary": torch.uint8,
}
POOLINGS = ("lasttoken", "mean", "cls")


@dataclass(frozen=True)
class OutputFormat:
    """How pooled hidden states become embeddings.

    Args:
        pooling: "lasttoken", "mean" or "cls".
        dim: values an embedding (before bits are packed), at most the model's width.
        normalize: whether embeddings get unit length.
        precision: one of `PRECISIONS`.
        ranges: (2, dim) float32, minima and maxima a dimension, for int8 and uint8.
    """

    pooling: str
    dim: int
    normalize: bool = True
    precision: str = "float32"
    ranges: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """dtype of a stored embedding."""
        return PRECISIONS[self.precision]

    @property
    def width(self) -> int:
        """Stored values an embedding: bytes for the packed precisions, dimensions otherwise."""
        return -(-self.dim // 8) if self.precision in ("binary", "ubinary") else self.dim

    def apply(
        self, hidden: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Final norm, pooling, slice, L2 and quantisation.

        Args:
            hidden: (T, C) before the final norm.
            cu_seqlens: (B+1,) int32.

        Returns:
            (B, width) embeddings and (B,) uint8 flags, 1 where a row holds NaN or Inf.
        """
        return embed_output(
            hidden,
            cu_seqlens,
            mode=self.pooling,
            norm_weight=norm_weight,
            eps=eps,
            truncate_dim=self.dim,
            normalize=self.normalize,
            precision=self.precision,
            ranges=None if self.ranges is None else self.ranges.to(hidden.device),
        )


def check_pooling(pooling: str | None) -> str:
    """The pooling, or a ValueError that lists the valid ones."""
    if pooling in POOLINGS:
        return str(pooling)
    if pooling is None:
        raise ValueError(
            f"the checkpoint does not say how it pools: pass pooling= one of {list(POOLINGS)}"
        )
    raise ValueError(f"pooling={pooling!r} is unknown: choose one of {list(POOLINGS)}")


def check_precision(precision: str) -> str:
    """The precision, or a ValueError that lists the valid ones."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown: choose one of {list(PRECISIONS)}")
    return precision


def check_dim(truncate_dim: int | None, hidden_size: int) -> int:
    """The dimension of the embeddings, or a ValueError when the model has fewer."""
    if truncate_dim is None:
        return hidden_size
    if isinstance(truncate_dim, bool) or not isinstance(truncate_dim, int | np.integer):
        raise TypeError(f"truncate_dim must be an int, not {type(truncate_dim).__name__}")
    if not 1 <= truncate_dim <= hidden_size:
        raise ValueError(
            f"truncate_dim={truncate_dim} is out of range: this model has 1 to {hidden_size} dimensions"
        )
    return int(truncate_dim)


def check_ranges(
    ranges: np.ndarray | Tensor | Sequence | None, precision: str, dim: int
) -> Tensor | None:
    """The (2, dim) float32 ranges for int8 and uint8; None for the other precisions.

    Raises:
        ValueError: int8 or uint8 without ranges, or ranges of another shape.
    """
    if precision not in ("int8", "uint8"):
        return None
    if ranges is None:
        raise ValueError(
            f"precision={precision!r} needs ranges=, the minimum and maximum of every dimension over a "
            "corpus, shape (2, dim). They are not taken from the texts of one call: codes of two calls could "
            "then not be compared. Compute them once from float32 embeddings: "
            "ranges = numpy.stack([e.min(axis=0), e.max(axis=0)])"
        )
    tensor = torch.as_tensor(ranges, dtype=torch.float32)
    if tensor.shape != (2, dim):
        raise ValueError(f"ranges must have shape (2, {dim}), not {tuple(tensor.shape)}")
    return tensor


def embed_batch(
    output: OutputFormat, backbone: PackedBackbone, batch: PackedBatch
) -> tuple[Tensor, Tensor]:
    """One batch from token ids to embeddings."""
    hidden, cu_seqlens = backbone.forward_pooled(batch, output.pooling)
    return output.apply(hidden, cu_seqlens, backbone.norm_weight, backbone.spec.rms_norm_eps)


def embed_batch_tokens(
    backbone: PackedBackbone, batch: PackedBatch
) -> tuple[tuple[Tensor, ...], Tensor]:
    """One batch from token ids to every token's final hidden state, split by text, and flags as in `embed_batch`."""
    hidden = backbone.forward(batch)
    ends = torch.cat([batch.cu_seqlens.new_zeros(1), (~hidden.isfinite()).any(1).cumsum(0)])
    bad = ends[batch.cu_seqlens.long()].diff() > 0
    return hidden.split(batch.cu_seqlens.diff().tolist()), bad.to(torch.uint8)
