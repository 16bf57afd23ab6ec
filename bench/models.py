"""The real geometries with random weights, as our backbone and as Transformers' own model, in memory alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jv5kernels.backbone import PackedBackbone, fuse_layer
from jv5kernels.model_spec import ModelSpec
from jv5kernels.ops import rope_table
from jv5kernels.packing import PackedBatch, pack
from jv5kernels.synthetic.checkpoint import random_weights, real_spec

__all__ = [
    "ModelSpec",
    "batch_of",
    "last_token_embeddings",
    "memory_efficient_attention",
    "our_backbone",
    "random_weights",
    "real_spec",
    "token_ids",
    "transformers_model",
]


def our_backbone(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: torch.dtype, **options: object
) -> PackedBackbone:
    """Our backbone over these weights, on the device they are on."""
    embedding = weights["embed_tokens.weight"]
    device = embedding.device
    return PackedBackbone(
        spec,
        [fuse_layer(weights, i, device, dtype) for i in range(spec.num_layers)],
        embedding=embedding.to(dtype),
        norm_weight=weights["norm.weight"].to(dtype),
        rope=rope_table(spec.max_position_embeddings, spec.head_dim, spec.rope_theta, device),
        **options,
    )


def transformers_model(
    spec: ModelSpec, weights: Mapping[str, Tensor], dtype: torch.dtype, attention: str = "sdpa"
) -> torch.nn.Module:
    """Transformers' Qwen3Model or EuroBertModel with these weights, in evaluation mode."""
    from transformers import EuroBertConfig, EuroBertModel, Qwen3Config, Qwen3Model

    kind, config_class = (
        (Qwen3Model, Qwen3Config) if spec.qk_norm else (EuroBertModel, EuroBertConfig)
    )
    config = config_class(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(spec.rope_theta)},
        pad_token_id=None,
        attn_implementation=attention,
    )
    device = weights["embed_tokens.weight"].device
    with default_dtype(dtype), torch.device(device):
        model = kind(config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=True)
    return model.eval().requires_grad_(False)


def memory_efficient_attention() -> str:
    """Registers Transformers' sdpa with repeated kv heads, and returns its name.

    Given grouped heads in fp32, torch falls back to a kernel that writes the whole score matrix: 64 GB at 32768 tokens.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        assert attention_mask is None, "for full rows without padding only"
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=module.is_causal, scale=options["scaling"]
        )
        return out.transpose(1, 2).contiguous(), None

    name = "sdpa_repeated_heads"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters are made in `dtype`; buffers with a dtype of their own (rotary frequencies) keep it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def token_ids(spec: ModelSpec, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Random token ids, one int32 array a sequence."""
    random = np.random.default_rng(seed)
    return [random.integers(0, spec.vocab_size, n).astype(np.int32) for n in lengths]


def batch_of(sequences: list[np.ndarray], device: torch.device | str) -> PackedBatch:
    """All sequences as one packed batch, in the order given."""
    return pack(sequences, np.arange(len(sequences)), device)


def last_token_embeddings(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Normalised last-token embeddings (B, C) fp32 by Transformers, for full rows (B, S) without padding."""
    hidden = model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    return torch.nn.functional.normalize(hidden.float(), dim=-1)
