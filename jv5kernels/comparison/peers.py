"""What `jv5kernels bench` and the demo compare with: Transformers and Sentence Transformers, used well.

Each peer takes texts with their prompt and gives float32 embeddings, like `FastEncoder`. They get
what their documentation advises: adapters merged, texts sorted by length, sdpa attention, the
encoder's dtype and device, no KV cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jv5kernels.checkpoint import Checkpoint
from jv5kernels.comparison.reference import load_reference

if TYPE_CHECKING:
    from jv5kernels.encoder import FastEncoder

__all__ = ["TransformersPeer", "merged_reference", "sentence_transformers_peer"]


def merged_reference(encoder: FastEncoder, task: str | None) -> Any:
    """The Transformers model of an encoder's checkpoint, adapter merged, in its dtype on its device."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    checkpoint = encoder.checkpoint
    assert isinstance(checkpoint, Checkpoint)  # the command line opens no live models
    model: Any = load_reference(checkpoint, task, dtype=encoder.dtype, device=encoder.device)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


class TransformersPeer:
    """A plain Transformers model in padded batches, longest texts first.

    Args:
        encoder: gives checkpoint, tokenizer, pooling, dtype and device.
        model: from `merged_reference`.
        truncate_dim: dimensions kept before normalisation.
    """

    def __init__(self, encoder: FastEncoder, model: Any, truncate_dim: int | None = None) -> None:
        self._encoder, self._model, self._truncate_dim = encoder, model, truncate_dim

    def encode(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """Returns embeddings (N, dim), float32, unit length, in the order of the texts."""
        ids = self._encoder.tokenize(texts)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        result = np.empty(
            (len(ids), self._truncate_dim or self._encoder.spec.hidden_size), np.float32
        )
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                result[rows] = self._embed([ids[row] for row in rows]).cpu().numpy()
        return result

    def _embed(self, ids: list[np.ndarray]) -> Tensor:
        longest = max(map(len, ids))
        tokens = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, sequence in enumerate(ids):
            tokens[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
        device = self._encoder.device
        tokens, mask = tokens.to(device), mask.to(device)
        hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
        pooled = _pool(hidden.float(), mask, self._encoder.pooling)[:, : self._truncate_dim]
        return torch.nn.functional.normalize(pooled, dim=-1)


def _pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


@contextmanager
def sentence_transformers_peer(encoder: FastEncoder, model: Any) -> Iterator[Any]:
    """A SentenceTransformer of the same weights, or None when the package is not installed.

    Base repositories need remote code there, so the merged weights are saved in the layout of the
    merged siblings (into a temporary folder) and loaded from it.
    """
    if find_spec("sentence_transformers") is None:
        yield None
        return
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        _save_tokenizer(encoder, folder)
        body = Transformer(str(folder), max_seq_length=encoder.max_seq_length)
        pool = Pooling(encoder.spec.hidden_size, encoder.pooling)
        peer = SentenceTransformer(modules=[body, pool, Normalize()], device=str(encoder.device))
        yield peer.to(encoder.dtype)


def _save_tokenizer(encoder: FastEncoder, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = encoder.checkpoint.tokenizer()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Padding is masked, so any token will do where the checkpoint names none.
    padding = tokenizer.id_to_token(0)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=padding).save_pretrained(folder)
