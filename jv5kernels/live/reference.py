"""The yardstick for a live model: a copy of its backbone in another dtype, run by the class's own forward."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from jv5kernels.live.model import LiveModel
from jv5kernels.live.structure import Module
from jv5kernels.patching import unpatch

__all__ = ["live_embeddings", "live_reference"]


def live_reference(
    live: LiveModel, task: str | None, dtype: torch.dtype, device: torch.device
) -> Module:
    """Returns a copy of the live backbone, unpatched, in evaluation mode, adapters in float32.

    Args:
        task: adapter to apply; None for the weights alone.
    """
    inner = copy.deepcopy(live.inner)
    unpatch(inner)
    inner = inner.to(device=device, dtype=dtype).eval().requires_grad_(False)
    for module in inner.modules():
        if "lora_A" in module._modules and "base_layer" in module._modules:
            module.lora_A.float()
            module.lora_B.float()
            module.enable_adapters(task is not None)
            if task is not None:
                module.set_adapter([task])
    inner.requires_grad_(False)
    _restore_angles(inner, live)
    return inner


def _restore_angles(inner: Module, live: LiveModel) -> None:
    """Casting the model rounds this buffer too; the exact one comes from the config's base."""
    exponents = torch.arange(0, live.spec.head_dim, 2, dtype=torch.float32) / live.spec.head_dim
    inner.rotary_emb.inv_freq = (1.0 / live.spec.rope_theta**exponents).to(
        inner.embed_tokens.weight.device
    )


def live_embeddings(
    model: Module, live: LiveModel, texts: Sequence[str], pooling: str, max_length: int
) -> np.ndarray:
    """Returns embeddings (N, C), float32, unit length, one text at a time without padding.

    Args:
        model: what `live_reference` returned.
        texts: with their prompts in front.
        pooling: "lasttoken", "mean" or "cls".
    """
    tokenizer = live.tokenizer()
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    rows = np.empty((len(texts), live.spec.hidden_size), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        ids = torch.tensor([tokenizer.encode(text).ids], device=model.embed_tokens.weight.device)
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0].float()
        pooled = {"lasttoken": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0)}[pooling]
        row[:] = torch.nn.functional.normalize(pooled, dim=0).cpu().numpy()
    return rows
