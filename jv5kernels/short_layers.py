"""The layer loop for a few tokens: seven small kernels a layer, each of which starts while the one before ends.

    x, residual = norm(residual + y)
    y           = attention(x · Wqkvᵀ) · Woᵀ                    (norm and rotation of q and k inside)
    x, residual = norm(residual + y)
    y           = swiglu(x · Wgate_upᵀ) · Wdownᵀ

It computes the last layer for all tokens: reading its weights is what costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jv5kernels.backbone import LayerWeights, PackedBackbone, Projection
from jv5kernels.ops.registry import triton_unavailable
from jv5kernels.ops.short_layer import (
    HEAD_DIMS,
    SHORT_TOKENS,
    short_attention,
    short_linear,
    short_norm,
)
from jv5kernels.packing import PackedBatch

__all__ = ["forward_short", "takes_short_layers"]


def takes_short_layers(backbone: PackedBackbone, tokens: int) -> bool:
    """Whether a batch of so many tokens is better run with `forward_short`.

    Not with batch_invariant, which promises one order of addition for all batches; nor with LoRA terms beside the
    weights, nor for shapes that the kernels do not tile.
    """
    if backbone.batch_invariant or tokens > SHORT_TOKENS or backbone.attention != "auto":
        return False
    if backbone.device.type != "cuda" or triton_unavailable(backbone.device) is not None:
        return False
    is_half = backbone.dtype in (torch.float16, torch.bfloat16)
    return (
        is_half
        and backbone.spec.head_dim in HEAD_DIMS
        and all(map(_has_tiled_weights, backbone.layers))
    )


def _has_tiled_weights(layer: LayerWeights) -> bool:
    from jv5kernels.kernels.short_layer import fits

    def is_tiled(projection: Projection, is_swiglu: bool = False) -> bool:
        weight = projection.weight
        columns = weight.shape[0] // (1 + is_swiglu)
        return (
            fits(columns, weight.shape[1], is_swiglu)
            and not projection.low_rank
            and weight.is_contiguous()
        )

    plain = (layer.qkv, layer.o, layer.down)
    return all(map(is_tiled, plain)) and is_tiled(layer.gate_up, is_swiglu=True)


def forward_short(backbone: PackedBackbone, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Returns the hidden states of all tokens before the final norm, (T, C) fp32, and their cu_seqlens.

    Args:
        batch: at most SHORT_TOKENS tokens, every one of them in a sequence.
    """
    spec = backbone.spec
    residual = torch.nn.functional.embedding(batch.input_ids, backbone.embedding)
    y: Tensor | None = None
    for layer in backbone.layers:
        x, residual = short_norm(residual, y, layer.input_norm, spec.rms_norm_eps)
        qkv = short_linear(x, layer.qkv.weight)
        attended = short_attention(
            qkv,
            backbone.rope,
            batch.cu_seqlens,
            batch.total_tokens,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            causal=spec.causal,
            q_weight=layer.q_norm,
            k_weight=layer.k_norm,
            eps=spec.rms_norm_eps,
        )
        y = short_linear(attended, layer.o.weight)
        x, residual = short_norm(residual, y, layer.post_norm, spec.rms_norm_eps)
        inner = short_linear(x, layer.gate_up.weight, is_swiglu=True)
        y = short_linear(inner, layer.down.weight)
    assert y is not None  # there is at least one layer
    return residual.add_(y), batch.cu_seqlens
