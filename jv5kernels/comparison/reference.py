"""The yardstick: Transformers' own model of a checkpoint in fp32, with peft's adapter, one text at a time.

Nothing of this package computes here: Transformers reads config.json and the tensors, peft the adapter, and the
tokenizer runs with Transformers' truncation. No code that comes with a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jv5kernels.checkpoint import Checkpoint
from jv5kernels.encoding_settings import POOLINGS, read_json

__all__ = ["load_reference", "reference_embeddings", "reference_tokenizer"]

# Keys of config.json that name the vendor's own classes.
FOREIGN_KEYS = ("model_type", "architectures", "auto_map", "task_names", "torch_dtype", "dtype")


def load_reference(
    checkpoint: Checkpoint,
    task: str | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
) -> torch.nn.Module:
    """Returns a Qwen3Model or EuroBertModel in evaluation mode, in a PeftModel when a task is given.

    Args:
        checkpoint: an opened checkpoint.
        task: adapter to apply, unmerged; None for the weights as they are.
        dtype: of the weights; peft keeps adapters in float32.

    Raises:
        ValueError: an unknown task, or tensors that Transformers does not find.
    """
    if task is not None and task not in checkpoint.tasks:
        raise ValueError(f"task={task!r} is unknown: choose one of {list(checkpoint.tasks)}")
    from transformers import EuroBertConfig, EuroBertModel, Qwen3Config, Qwen3Model

    classes: dict[str, tuple[Any, Any]] = {
        "qwen3": (Qwen3Config, Qwen3Model),
        "eurobert": (EuroBertConfig, EuroBertModel),
    }
    config_class, model_class = classes[checkpoint.spec.model_type]
    stated = read_json(checkpoint.folder / "config.json")
    config = config_class(
        **{key: value for key, value in stated.items() if key not in FOREIGN_KEYS}
    )
    config.use_cache = False
    with _no_progress_bar():
        model, report = model_class.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{checkpoint.folder}: Transformers does not find {missing[:5]}")
    if task is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint.folder / "adapters" / task)
    return model.to(device).eval().requires_grad_(False)


def reference_tokenizer(checkpoint: Checkpoint) -> Any:
    """Returns Transformers' wrapper of the checkpoint's tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(checkpoint.folder / "tokenizer.json"))


def reference_embeddings(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    texts: Sequence[str],
    *,
    pooling: str | None = None,
    truncate_dim: int | None = None,
    max_length: int | None = None,
) -> np.ndarray:
    """Returns embeddings (N, dim), float32, unit length.

    Args:
        model: from `load_reference`.
        texts: with their prompts already in front.
        pooling: "lasttoken", "mean" or "cls"; default the checkpoint's.
        truncate_dim: dimensions kept, before normalisation.
        max_length: tokens a text; default the checkpoint's max_seq_length.
    """
    pooling = pooling or checkpoint.pooling
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is unknown: choose one of {POOLINGS}")
    tokenizer = reference_tokenizer(checkpoint)
    device = next(model.parameters()).device
    limit = max_length or checkpoint.max_seq_length
    rows = np.empty((len(texts), truncate_dim or checkpoint.spec.hidden_size), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            # No mask: a row without padding needs none, and sdpa then takes its exact causal path.
            hidden = model(input_ids=ids.to(device), use_cache=False).last_hidden_state[0].float()
        pooled = _pool(hidden, pooling)[:truncate_dim]
        row[:] = torch.nn.functional.normalize(pooled, dim=0).cpu().numpy()
    return rows


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers draws one while it loads weights; its setting is put back."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _pool(hidden: Tensor, pooling: str) -> Tensor:
    """One text's hidden states (S, C) to (C,)."""
    if pooling == "mean":
        return hidden.mean(dim=0)
    return hidden[-1] if pooling == "lasttoken" else hidden[0]
