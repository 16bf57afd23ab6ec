"""The last step of encoding: what one batch of hidden states becomes, and in which precision.

Slice to `truncate_dim`, then normalise, then quantise: Sentence Transformers slices after normalising and leaves the
vectors shorter than 1, which changes dot products by a factor but no direction.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jv5kernels.backbone import PackedBackbone
from jv5kernels.ops.embed_output import embed_output
from jv5kernels.ops.quantize import quantize_int8
from jv5kernels.packing import PackedBatch
from jv5kernels.storage import REVERSED, Layout, layout_of

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
# Rows whose bits are reversed at once.
REVERSE_ROWS = 1 << 16


@dataclass(frozen=True)
class OutputFormat:
    """How pooled hidden states become embeddings.

    Args:
        pooling: "lasttoken", "mean" or "cls".
        dim: values an embedding (before bits are packed), at most the model's width.
        normalize: whether embeddings get unit length.
        precision: one of `PRECISIONS`.
        ranges: (2, dim) float32 on the encoder's device, minima and maxima a dimension, for int8 and uint8.
        over_call: int8 and uint8 with the ranges of the call's own embeddings, known when all of them are there.
        layout: of a storage profile; None for Sentence Transformers' bytes.
    """

    pooling: str
    dim: int
    normalize: bool = True
    precision: str = "float32"
    ranges: Tensor | None = None
    over_call: bool = False
    layout: Layout | None = None

    @property
    def native(self) -> str:
        """Precision that the operator gives; floats where the ranges of the call are still to be taken."""
        if self.over_call:
            return "float32"
        return self.precision if self.layout is None else self.layout.native

    @property
    def dtype(self) -> torch.dtype:
        """dtype that the operator gives."""
        return PRECISIONS[self.native]

    @property
    def width(self) -> int:
        """Stored values an embedding: bytes for the packed precisions, dimensions otherwise."""
        return -(-self.dim // 8) if self.precision in ("binary", "ubinary") else self.dim

    def apply(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        norm_weight: Tensor,
        eps: float,
        spans: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final norm, pooling, slice, L2 and quantisation, in one operator.

        Args:
            hidden: (T, C) before the final norm.
            cu_seqlens: (B+1,) int32.
            spans: (N, 2) int32 on the CPU, rows of hidden to average in place of the sequences.

        Returns:
            (B, width) embeddings, or (N, width) with spans, as the operator packs them (`finish` makes them those of a
            profile), and uint8 flags, 1 where a row holds NaN or Inf.
        """
        return embed_output(
            hidden,
            cu_seqlens,
            mode=self.pooling if spans is None else "mean",
            norm_weight=norm_weight,
            eps=eps,
            truncate_dim=self.dim,
            normalize=self.normalize,
            precision=self.native,
            ranges=self.ranges,
            spans=spans,
        )

    def finish(self, values: Tensor) -> Tensor:
        """The rows of a whole call, (N, width), in the profile's layout; ranges="batch" is taken here."""
        if self.over_call:
            native = self.precision if self.layout is None else self.layout.native
            values = quantize_int8(values, ranges_of_call(values), native)
        if self.layout is None:
            return values
        if self.layout.little:
            values = reversed_bits(values)
        return values.view(getattr(torch, self.layout.dtype))


def reversed_bits(values: Tensor) -> Tensor:
    """The bytes (N, width) uint8 with the bits of each in reverse order, a new tensor."""
    table = torch.from_numpy(REVERSED).to(values.device)
    out = torch.empty_like(values)
    # In parts: an index of the whole would take eight times its bytes.
    for target, source in zip(out.split(REVERSE_ROWS), values.split(REVERSE_ROWS), strict=True):
        target.copy_(table[source.long()])
    return out


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


def warn_about_dim(dim: int, hidden_size: int, trained: Sequence[int]) -> None:
    """Warns when a model that states the dimensions it was trained to be cut to is cut to another."""
    if trained and dim != hidden_size and dim not in trained:
        warnings.warn(
            f"truncate_dim={dim} is not among the dimensions this model was trained for: {list(trained)}",
            stacklevel=5,
        )


def output_format(
    *,
    pooling: str,
    dim: int,
    normalize: bool,
    precision: str,
    ranges: np.ndarray | Tensor | Sequence | str | None,
    profile: str | None,
    device: torch.device,
) -> OutputFormat:
    """The output of a call, its arguments checked against each other.

    Raises:
        ValueError: an unknown precision or profile, one that does not fit the other, or ranges that do not fit either.
    """
    layout = None if profile is None else layout_of(profile, precision, dim)
    checked = check_ranges(ranges, precision, dim)
    if layout is not None and layout.compares_codes:
        check_comparable(checked, profile)
    over_call = precision in ("int8", "uint8") and checked is None
    checked = None if checked is None else checked.to(device)
    return OutputFormat(pooling, dim, normalize, precision, checked, over_call, layout)


def check_ranges(
    ranges: np.ndarray | Tensor | Sequence | str | None, precision: str, dim: int
) -> Tensor | None:
    """The (2, dim) float32 ranges for int8 and uint8; None for the other precisions and for "batch".

    Raises:
        ValueError: int8 or uint8 without ranges, or ranges of another shape.
    """
    if precision not in ("int8", "uint8"):
        return None
    if ranges is None:
        raise ValueError(
            f"precision={precision!r} needs a range for every dimension, measured over a corpus: "
            "calibration=encoder.calibrate(texts), made once and kept for corpus and queries; or ranges= of shape "
            "(2, dim). They are not taken from the texts of one call: codes of two calls could then not be compared. "
            "ranges='batch' asks for just that, as Sentence Transformers does"
        )
    if isinstance(ranges, str):
        if ranges != "batch":
            raise ValueError(f"ranges={ranges!r}: the only name is 'batch'")
        return None
    tensor = torch.as_tensor(ranges, dtype=torch.float32)
    if tensor.shape != (2, dim):
        raise ValueError(f"ranges must have shape (2, {dim}), not {tuple(tensor.shape)}")
    return tensor


def check_comparable(ranges: Tensor | None, profile: str | None) -> None:
    """Raises ValueError unless distances between codes of these ranges are distances between embeddings."""
    if ranges is not None and bool((ranges == ranges[:, :1]).all()):
        minimum, maximum = ranges[:, 0].tolist()
        # Code 128, which is 0 as int8, has to stand for the value 0.
        if maximum > minimum and abs(-minimum / (maximum - minimum) * 255 - 128) <= 1:
            return
    raise ValueError(
        f"profile={profile!r} takes distances between the codes themselves, which ranges that differ from dimension "
        "to dimension distort: calibrate with symmetric=True (one range around zero), or leave profile= out and "
        "dequantise before comparing"
    )


def ranges_of_call(values: Tensor) -> Tensor:
    """Minima and maxima of the embeddings (N, dim) of one call, under the conditions of Sentence Transformers.

    Raises:
        ValueError: a single embedding, which has no range.
    """
    if not len(values):
        return values.new_zeros((2, values.shape[1]))
    if len(values) == 1:
        raise ValueError(
            "ranges='batch' needs more than one text: the minimum and maximum of one embedding are the same"
        )
    if len(values) < 100:
        warnings.warn(
            f"ranges='batch' takes the ranges of {len(values)} embeddings, which is few: calibrate on a corpus",
            stacklevel=4,
        )
    return torch.stack([values.amin(0), values.amax(0)])


def embed_batch(
    output: OutputFormat, backbone: PackedBackbone, batch: PackedBatch
) -> tuple[Tensor, Tensor]:
    """One batch from token ids to embeddings."""
    hidden, cu_seqlens = backbone.forward_pooled(batch, output.pooling)
    return output.apply(hidden, cu_seqlens, backbone.norm_weight, backbone.spec.rms_norm_eps)


def embed_batch_spans(
    output: OutputFormat, backbone: PackedBackbone, batch: PackedBatch, spans: Tensor
) -> tuple[Tensor, Tensor]:
    """One batch from token ids to an embedding for every span of its tokens (N, 2) int32."""
    hidden, cu_seqlens = backbone.forward_pooled(batch, "mean")
    return output.apply(hidden, cu_seqlens, backbone.norm_weight, backbone.spec.rms_norm_eps, spans)


def embed_batch_tokens(
    backbone: PackedBackbone, batch: PackedBatch
) -> tuple[tuple[Tensor, ...], Tensor]:
    """One batch from token ids to every token's final hidden state, split by text, and flags as in `embed_batch`."""
    hidden = backbone.forward(batch)
    ends = torch.cat([batch.cu_seqlens.new_zeros(1), (~hidden.isfinite()).any(1).cumsum(0)])
    bad = ends[batch.cu_seqlens.long()].diff() > 0
    return hidden.split(batch.cu_seqlens.diff().tolist()), bad.to(torch.uint8)
