"""Many embeddings of one text from one pass over it: spans of characters or tokens, and the whole text.

The text runs through the model once. A segment table, one pair of rows a span, tells the output kernel which hidden
states to pool; spans may overlap, and none is computed twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jv5kernels.backbone import PackedBackbone
from jv5kernels.call_arguments import check_length, output_of
from jv5kernels.output import OutputFormat, embed_batch_spans
from jv5kernels.packing import PackedBatch, pack
from jv5kernels.tasks import tasks_of
from jv5kernels.tokenization import LocatedTokens

if TYPE_CHECKING:
    from jv5kernels.calibration import Calibration
    from jv5kernels.encoder import FastEncoder

__all__ = ["ChunkEmbeddings", "encode_chunks", "token_rows"]

Span = tuple[int, int]
UNITS = ("characters", "tokens")
SPAN_POOLINGS = ("mean", "lasttoken")


@dataclass(frozen=True, eq=False)
class ChunkEmbeddings:
    """What `encode_chunks` returns.

    Args:
        embeddings: (N, width), one row a span, in the order of `spans`.
        text: (width,), the whole text as `encode` gives it.
        spans: (N, 2), as given or as the chunker gave them.
        tokens: (N, 2), first token and one past the last of every span, counted from the first token that holds a
            character of the text.
        cut: indices of the spans that go on beyond the last token the model read; they are pooled over what it read.
    """

    embeddings: Any
    text: Any
    spans: np.ndarray
    tokens: np.ndarray
    cut: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.spans)


def encode_chunks(
    self: FastEncoder,
    text: str,
    spans: Sequence[Span] | np.ndarray | Callable[[str], Sequence[Span]],
    *,
    unit: str = "characters",
    span_pooling: str = "mean",
    task: str | None = None,
    prompt_name: str | None = None,
    prompt: str | None = None,
    precision: str | None = None,
    ranges: np.ndarray | Tensor | None = None,
    calibration: Calibration | str | None = None,
    profile: str | None = None,
    convert_to_tensor: bool = False,
    normalize_embeddings: bool = True,
    truncate_dim: int | None = None,
    max_length: int | None = None,
) -> ChunkEmbeddings:
    """Returns an embedding for every span of a text, and one of the whole text, from a single pass (late chunking).

    Each span is seen in the context of the text: of all of it in a bidirectional model, of what comes before in a
    causal one. Late chunking was published for mean-pooled models. jina-embeddings-v5-text is trained for last-token
    pooling and its vendor does not offer late chunking for it: the mean over a span is a read-out that no training has
    shaped. Measure it on your own texts before relying on it, or encode the chunks one by one, which is what the
    models are trained for.

    Args:
        text: one text.
        spans: pairs [start, end), in any order, overlapping or not; or a chunker, a function from the text to such
            pairs of characters.
        unit: what the pairs count: "characters" of `text`, or "tokens" from the first that holds a character of `text`
            (the prompt is not counted, special tokens are not either). A token belongs to every span that holds one of
            its characters.
        span_pooling: "mean" over the tokens of a span, or its "lasttoken". The whole text is pooled as in `encode`.
        task, prompt_name, prompt, precision, ranges, profile, convert_to_tensor, normalize_embeddings, truncate_dim,
            max_length: as in `encode`.
        calibration: as in `encode`. One measured on whole texts serves spans too, so that both can lie in one index;
            `Calibration.clipped` says how well it fits.

    Raises:
        TypeError, ValueError: as in `encode`; a span that is empty, out of range, or wholly beyond the last token
            that the model reads, named with its index.
        torch.OutOfMemoryError: the text does not fit into memory.
        FloatingPointError: an embedding is not finite, also in fp32.

    Example:
        >>> found = encoder.encode_chunks(text, lambda text: [m.span() for m in re.finditer("[^.]+", text)])
        >>> found.embeddings.shape, found.text.shape
        ((12, 1024), (1024,))
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    for name, value, allowed in (
        ("unit", unit, UNITS),
        ("span_pooling", span_pooling, SPAN_POOLINGS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {list(allowed)}")
    if callable(spans):
        if unit != "characters":
            raise ValueError("a chunker gives characters: leave unit out")
        spans = spans(text)
    chosen = check_spans(spans)
    (adapter,) = tasks_of(task, self.task, self.tasks, 1)
    prefix = self._prefix(prompt_name, prompt)
    output = output_of(
        self,
        tasks=[adapter],
        prompt=prefix,
        precision=precision,
        ranges=ranges,
        calibration=calibration,
        profile=profile,
        normalize=normalize_embeddings,
        truncate_dim=truncate_dim,
    )
    limit = self.max_seq_length
    if max_length is not None:
        limit = check_length(self, "max_length", max_length)
    located = self._tokenization.locate(prefix + text, max_length=limit)
    tokens, cut = token_rows(located, chosen, len(prefix), unit)
    truncated = located.kept < len(located.starts)
    if truncated and self.on_overlong == "error":
        raise ValueError(
            f"the text is longer than max_seq_length={limit} tokens and on_overlong='error'"
        )
    if truncated:
        warnings.warn(
            f"the text was longer than {limit} tokens and was cut; {len(cut)} of {len(chosen)} spans go on beyond",
            stacklevel=2,
        )
    self.statistics.add(texts=1, tokens=len(located.ids), truncated=int(truncated))
    table = _segments(located, tokens, span_pooling, self.pooling)
    values: Any = output.finish(_run(self, adapter, output, located, table))
    if not convert_to_tensor:
        values = values.cpu() if values.dtype == torch.bfloat16 else values.cpu().numpy()
    first = int(np.searchsorted(located.ends, len(prefix), side="right"))
    return ChunkEmbeddings(values[:-1], values[-1], chosen, tokens - first, cut)


def check_spans(spans: Any) -> np.ndarray:
    """The spans as an (N, 2) int64 array; TypeError or ValueError naming the first that is not a pair of ints."""
    checked = []
    for index, span in enumerate(spans):
        pair = tuple(span)
        if len(pair) != 2:
            raise ValueError(f"span {index} must be a pair (start, end), not {pair!r}")
        if not all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in pair):
            raise TypeError(f"span {index} must be a pair of ints, not {pair!r}")
        checked.append(pair)
    return np.array(checked, dtype=np.int64).reshape(-1, 2)


def token_rows(
    located: LocatedTokens, spans: np.ndarray, prefix: int, unit: str
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Maps spans to tokens of the text with its prompt.

    Args:
        located: the prompt and the text as tokens.
        spans: (N, 2) pairs.
        prefix: characters of the prompt.
        unit: one of `UNITS`.

    Returns:
        (N, 2) first token and one past the last, of those that are kept; and the indices of spans that were cut.

    Raises:
        ValueError: a span that is empty, out of range or wholly cut off; the first one is named.
    """
    first = int(np.searchsorted(located.ends, prefix, side="right"))
    length = (int(located.ends[-1]) if len(located.ends) else prefix) - prefix
    count = length if unit == "characters" else len(located.starts) - first
    for index, (start, end) in enumerate(spans):
        if start >= end:
            raise ValueError(f"span {index} ({start}, {end}) is empty")
        if start < 0 or end > count:
            raise ValueError(
                f"span {index} ({start}, {end}) is out of range: the text has {count} {unit}"
            )
    if unit == "characters":
        begin = np.searchsorted(located.ends, spans[:, 0] + prefix, side="right")
        stop = np.searchsorted(located.starts, spans[:, 1] + prefix, side="left")
    else:
        begin, stop = spans[:, 0] + first, spans[:, 1] + first
    lost = np.flatnonzero(begin >= located.kept)
    if len(lost):
        index = int(lost[0])
        read = int(located.ends[located.kept - 1]) - prefix if located.kept else 0
        raise ValueError(
            f"span {index} ({spans[index, 0]}, {spans[index, 1]}) lies beyond the {len(located.ids)} tokens that "
            f"the model reads, which end at character {max(0, read)}: split the text"
        )
    cut = tuple(np.flatnonzero(stop > located.kept).tolist())
    return np.stack([begin, np.minimum(stop, located.kept)], axis=1), cut


def _segments(
    located: LocatedTokens, tokens: np.ndarray, span_pooling: str, pooling: str
) -> np.ndarray:
    """The segment table (N+1, 2) int32: rows to average for every span, and for the whole text in the last row."""
    rows = tokens + located.first
    if span_pooling == "lasttoken":
        rows = np.stack([rows[:, 1] - 1, rows[:, 1]], axis=1)
    total = len(located.ids)
    whole = {"mean": (0, total), "lasttoken": (total - 1, total), "cls": (0, 1)}[pooling]
    return np.concatenate([rows, [whole]]).astype(np.int32)


def _run(
    encoder: FastEncoder,
    task: str | None,
    output: OutputFormat,
    located: LocatedTokens,
    table: np.ndarray,
) -> Tensor:
    """(N+1, width) on the device; in fp32 when a row is not finite."""

    def embed(backbone: PackedBackbone, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return embed_batch_spans(output, backbone, batch, torch.from_numpy(table))

    with torch.inference_mode():
        batch = pack([located.ids], np.zeros(1, np.int64), encoder.device)
        try:
            values, flags = embed(encoder._backbones.get(task), batch)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"a text of {len(located.ids)} tokens does not fit into the memory of {encoder.device}; a smaller "
                f"max_seq_length would cut it. ({error})"
            ) from error
        if not bool(flags.any()):
            return values
        values, flags = embed(encoder._backbones.in_float32(task), batch)
        bad = torch.nonzero(flags).flatten().tolist()
        if bad:
            name = "the text" if bad[0] == len(table) - 1 else f"span {bad[0]}"
            raise FloatingPointError(
                f"the embedding of {name} holds NaN or Inf, also when computed in float32"
            )
        encoder.statistics.add(recomputed_rows=1)
        return values
