"""The backbone: one layer loop over packed tokens for Qwen3 and EuroBERT.

What differs between the families (causal or not, q/k norm, grouped heads) is read from a `ModelSpec`. Per layer

    x, residual = add_rms_norm(y, residual, also=z)        (the additions of the previous layer and this block's norm)
    q, k, v     = linear_qk_norm_rope(x, Wqkv)
    y           = attention · Woᵀ
    x           = rms_norm(residual, added=y)
    z           = linear_swiglu(x, Wgate_up) · Wdownᵀ

Norm and rotation of the heads, and SwiGLU, are done in the GEMM's epilogue where that is faster. The stream between
attention and MLP is not written, and so y is added twice: in a norm that reads both, then with z.

The residual stream is fp32 in every compute dtype: rounded to bf16 at each of its additions, it would carry most of the
error of a deep model. Beside 16-bit weights on CUDA it is written as float24 (ops/float24.py), a quarter less to move,
and until the first addition it is the embeddings themselves. (Adding to it in the GEMM's epilogue was tried:
bench/log_epilogues.md.)

In the last layer only K and V are needed for all tokens; the rest is computed for the pooled tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jv5kernels.model_spec import ModelSpec
from jv5kernels.ops.attention import attention_varlen
from jv5kernels.ops.attention_pooled import attention_pooled
from jv5kernels.ops.float24 import FLOAT24, GRANULE
from jv5kernels.ops.linear import linear
from jv5kernels.ops.linear_qk_norm_rope import linear_qk_norm_rope
from jv5kernels.ops.linear_swiglu import keeps_intermediate, linear_swiglu
from jv5kernels.ops.qk_norm_rope import qk_norm_rope
from jv5kernels.ops.registry import triton_unavailable
from jv5kernels.ops.rms_norm import add_rms_norm, rms_norm
from jv5kernels.ops.swiglu import swiglu
from jv5kernels.packing import PackedBatch

# Tokens of one pass through the MLP where the intermediate is written: 3·F values a token bound the memory otherwise.
MLP_CHUNK_TOKENS = 16384


# What is still to be added to the residual stream, in this order: outputs of attention and of the MLP, or nothing.
Pending = tuple[Tensor, Tensor] | tuple[()]


@dataclass(frozen=True)
class LowRank:
    """A LoRA term of a projection that stays apart from the weight: adds scaling·(x Aᵀ) Bᵀ to some columns.

    Args:
        start, stop: output columns that it adds to.
        a: (r, in); b: (stop - start, r), of one dtype, in which the term is computed.
    """

    start: int
    stop: int
    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Projection:
    """A weight (out, in), several matrices of the checkpoint stacked, with its LoRA terms if there are any."""

    weight: Tensor
    low_rank: tuple[LowRank, ...] = ()

    def columns(self, start: int, stop: int) -> Projection:
        """The part that computes output columns start:stop; LoRA terms lie inside or outside as a whole."""
        terms = tuple(
            LowRank(t.start - start, t.stop - start, t.a, t.b, t.scaling)
            for t in self.low_rank
            if start <= t.start and t.stop <= stop
        )
        return Projection(self.weight[start:stop], terms)

    def __call__(self, x: Tensor, batch_invariant: bool) -> Tensor:
        """x (T, in) -> (T, out)."""
        out = linear(x, self.weight, batch_invariant=batch_invariant)
        for term in self.low_rank:
            inner = linear(x.to(term.a.dtype), term.a, batch_invariant=batch_invariant)
            change = linear(inner, term.b, batch_invariant=batch_invariant)
            out[:, term.start : term.stop].add_(change, alpha=term.scaling)
        return out


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer; q/k/v stacked in one matrix, gate/up in another.

    Shapes: input_norm, post_norm (C,); qkv ((Hq+2·Hkv)·D, C); q_norm, k_norm (D,) or None; o (C, Hq·D);
    gate_up (2·F, C); down (C, F).
    """

    input_norm: Tensor
    qkv: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection


def fuse_layer(
    weights: Mapping[str, Tensor], index: int, device: torch.device, dtype: torch.dtype
) -> LayerWeights:
    """Stacks and moves the weights of layer `index`; names as in the checkpoint (``layers.0.mlp.up_proj.weight``)."""

    def get(name: str) -> Tensor:
        return weights[f"layers.{index}.{name}.weight"].to(device=device, dtype=dtype)

    def stack(*names: str) -> Projection:
        return Projection(torch.cat([get(name) for name in names]))

    has_norm = f"layers.{index}.self_attn.q_norm.weight" in weights
    return LayerWeights(
        input_norm=get("input_layernorm"),
        qkv=stack("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=get("self_attn.q_norm") if has_norm else None,
        k_norm=get("self_attn.k_norm") if has_norm else None,
        o=Projection(get("self_attn.o_proj")),
        post_norm=get("post_attention_layernorm"),
        gate_up=stack("mlp.gate_proj", "mlp.up_proj"),
        down=Projection(get("mlp.down_proj")),
    )


class PackedBackbone:
    """Runs the layers over packed tokens. Stateless after construction, so threads may share it.

    Args:
        spec: the architecture.
        layers: one `LayerWeights` a layer, on one device, of one dtype.
        embedding: (vocab, C) token embeddings.
        norm_weight: (C,) of the final norm.
        rope: (P, D) fp32 table of `ops.rope_table`.
        attention: `impl` of attention_varlen.
        batch_invariant: fixed-configuration GEMMs on CUDA. On a CPU the caller passes one sequence at a time.

    Raises:
        ValueError: an attention implementation that cannot be batch invariant was asked to be.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: Sequence[LayerWeights],
        *,
        embedding: Tensor,
        norm_weight: Tensor,
        rope: Tensor,
        attention: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        if batch_invariant and attention in ("sdpa", "flash_attn"):
            raise ValueError(
                f"attention={attention!r} chooses its kernel by the batch, so batch_invariant=True "
                "cannot be kept: use attention='auto', 'gluon' or 'triton'"
            )
        self.spec = spec
        self.layers = tuple(layers)
        self.embedding = embedding
        self.norm_weight = norm_weight
        self.rope = rope
        self.attention = attention
        # On a CPU there is no fixed-configuration GEMM: one sequence a batch gives the same guarantee.
        self.batch_invariant = batch_invariant and embedding.device.type == "cuda"
        has_kernel = (
            embedding.device.type == "cuda" and triton_unavailable(embedding.device) is None
        )
        shortens = has_kernel and self.dtype.itemsize == 2 and spec.hidden_size % GRANULE == 0
        self.stream_dtype = FLOAT24 if shortens else torch.float32

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].qkv.weight.dtype

    def forward(self, batch: PackedBatch) -> Tensor:
        """Returns the hidden states of all tokens after the final norm, (T, C)."""
        residual, pending = self._run_layers(batch, self.layers)
        return self._norm(residual, pending, self.norm_weight, torch.float32)[0]

    def forward_pooled(self, batch: PackedBatch, pooling: str) -> tuple[Tensor, Tensor]:
        """Returns what pooling needs: hidden states before the final norm, and their cu_seqlens.

        Args:
            pooling: "lasttoken" or "cls" (one row a sequence), or "mean" (all rows).

        Returns:
            (B, C) or (T, C) fp32, and cu_seqlens (B+1,) int32 that fit it.
        """
        if pooling == "mean":
            hidden = self._norm(
                *self._run_layers(batch, self.layers), self.norm_weight, torch.float32
            )[1]
            return hidden, batch.cu_seqlens
        residual, pending = self._run_layers(batch, self.layers[:-1])
        if pooling == "lasttoken":
            rows = batch.cu_seqlens[1:] - 1
        else:
            # An empty sequence at the end starts past the last token.
            rows = batch.cu_seqlens[:-1].clamp(max=batch.total_tokens - 1)
        hidden = self._last_layer(residual, pending, batch, rows)
        return hidden, torch.arange(len(batch) + 1, dtype=torch.int32, device=hidden.device)

    def _run_layers(
        self, batch: PackedBatch, layers: Sequence[LayerWeights]
    ) -> tuple[Tensor, Pending]:
        """The residual stream after `layers`, and what is still to be added to it."""
        pending: Pending = ()
        residual = torch.nn.functional.embedding(batch.input_ids, self.embedding)
        for layer in layers:
            x, residual = self._norm(residual, pending, layer.input_norm, self.stream_dtype)
            del pending
            y = layer.o(self._attention(x, layer, batch), self.batch_invariant)
            # The stream with y is not written: the next layer's norm adds y once more, before z.
            x = rms_norm(
                residual, layer.post_norm, self.spec.rms_norm_eps, added=y, dtype=self.dtype
            )
            pending = (y, self._mlp(x, layer))
            del y
        return residual, pending

    def _norm(
        self, residual: Tensor, pending: Pending, weight: Tensor, total_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with what is pending: its RMSNorm in the compute dtype, and itself.

        In `total_dtype`, where something was pending; otherwise it is returned as it came.
        """
        eps = self.spec.rms_norm_eps
        if not pending:
            return rms_norm(residual, weight, eps, dtype=self.dtype), residual
        y, z = pending
        return add_rms_norm(y, residual, weight, eps, also=z, total_dtype=total_dtype)

    def _project(
        self,
        x: Tensor,
        qkv: Projection,
        layer: LayerWeights,
        positions: Tensor,
        heads: int,
        kv_heads: int,
    ) -> Tensor:
        """Some heads of queries, keys and values of x, normed and rotated: `qkv` has their part of the weight."""
        rotation: dict[str, Any] = {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": self.spec.head_dim,
            "q_weight": layer.q_norm,
            "k_weight": layer.k_norm,
            "eps": self.spec.rms_norm_eps,
        }
        if qkv.low_rank:
            projected = qkv(x, self.batch_invariant)
            return qk_norm_rope(projected, positions, self.rope, **rotation)
        return linear_qk_norm_rope(
            x, qkv.weight, positions, self.rope, batch_invariant=self.batch_invariant, **rotation
        )

    def _split_kv(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        heads = kv.unflatten(-1, (2 * self.spec.num_kv_heads, self.spec.head_dim))
        return heads[:, : self.spec.num_kv_heads], heads[:, self.spec.num_kv_heads :]

    def _attention(self, x: Tensor, layer: LayerWeights, batch: PackedBatch) -> Tensor:
        spec = self.spec
        qkv = self._project(x, layer.qkv, layer, batch.positions, spec.num_heads, spec.num_kv_heads)
        q = qkv[:, : spec.q_width].unflatten(-1, (spec.num_heads, spec.head_dim))
        k, v = self._split_kv(qkv[:, spec.q_width :])
        out = attention_varlen(
            q,
            k,
            v,
            batch.cu_seqlens,
            batch.max_seqlen,
            causal=spec.causal,
            impl=self.attention,
        )
        return out.flatten(1)

    def _mlp(self, x: Tensor, layer: LayerWeights) -> Tensor:
        if not layer.gate_up.low_rank and keeps_intermediate(
            x, layer.gate_up.weight, self.batch_invariant
        ):
            inner = linear_swiglu(x, layer.gate_up.weight, batch_invariant=self.batch_invariant)
            return layer.down(inner, self.batch_invariant)
        if x.shape[0] <= MLP_CHUNK_TOKENS:
            inner = swiglu(layer.gate_up(x, self.batch_invariant))
            return layer.down(inner, self.batch_invariant)
        out = torch.empty_like(x)
        chunks = zip(x.split(MLP_CHUNK_TOKENS), out.split(MLP_CHUNK_TOKENS), strict=True)
        for x_chunk, out_chunk in chunks:
            out_chunk.copy_(self._mlp(x_chunk, layer))
        return out

    def _last_layer(
        self, residual: Tensor, pending: Pending, batch: PackedBatch, rows: Tensor
    ) -> Tensor:
        """The last layer for the tokens in `rows` (B,) alone; hidden states before the final norm, (B, C) fp32."""
        spec, layer = self.spec, self.layers[-1]
        x, residual = self._norm(residual, pending, layer.input_norm, self.stream_dtype)
        columns = layer.qkv.columns(spec.q_width, spec.qkv_width)
        k, v = self._split_kv(
            self._project(x, columns, layer, batch.positions, 0, spec.num_kv_heads)
        )

        rows = rows.long()
        positions = batch.positions[rows]
        q = self._project(
            x[rows], layer.qkv.columns(0, spec.q_width), layer, positions, spec.num_heads, 0
        )
        out = attention_pooled(
            q.unflatten(-1, (spec.num_heads, spec.head_dim)),
            k,
            v,
            batch.cu_seqlens,
            batch.max_seqlen,
            query_positions=positions if spec.causal else None,
        )
        residual = residual[rows]
        y = layer.o(out.flatten(1), self.batch_invariant)
        x = rms_norm(residual, layer.post_norm, spec.rms_norm_eps, added=y, dtype=self.dtype)
        return self._norm(residual, (y, self._mlp(x, layer)), self.norm_weight, torch.float32)[1]
