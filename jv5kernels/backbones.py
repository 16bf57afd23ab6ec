"""The backbones of a checkpoint: one for every task, made on first use, sharing what the tasks have in common."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from threading import Lock

import torch
from torch import Tensor

from jv5kernels.adapters import merge_adapter
from jv5kernels.backbone import PackedBackbone, fuse_layer
from jv5kernels.checkpoint import Checkpoint
from jv5kernels.live.model import LiveModel
from jv5kernels.ops.qk_norm_rope import rope_table


class CheckpointBackbones:
    """Loads a checkpoint's weights and merges adapters into them (in fp32, rounded once).

    Args:
        checkpoint: an opened checkpoint, or a live model (its weights are copied).
        device, dtype: where and in what to compute.
        attention, batch_invariant: as in `PackedBackbone`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | LiveModel,
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        self.attention = attention
        self.batch_invariant = batch_invariant
        spec = checkpoint.spec
        self._weights = checkpoint.weights()
        self._embedding = self._weights["embed_tokens.weight"].to(device=device, dtype=dtype)
        self._rope = rope_table(
            spec.max_position_embeddings, spec.head_dim, spec.rope_theta, device
        )
        self._made: dict[str | None, PackedBackbone] = {}
        self._lock = Lock()

    def get(self, task: str | None) -> PackedBackbone:
        """The backbone with this task's adapter merged (None: the weights as they are); threads may share it."""
        with self._lock:
            if task not in self._made:
                self._made[task] = self._make(task, self.dtype)
            return self._made[task]

    def in_float32(self, task: str | None) -> PackedBackbone:
        """The same in float32, made anew and not kept: rows that are not finite are computed again with it."""
        return self._make(task, torch.float32)

    def _make(self, task: str | None, dtype: torch.dtype) -> PackedBackbone:
        spec = self.checkpoint.spec
        weights: Mapping[str, Tensor] = self._weights
        if task is not None:
            merged = merge_adapter(self._weights, self.checkpoint.adapter(task), dtype)
            weights = ChainMap(merged, dict(self._weights))
        embedding = self._embedding
        if dtype != self.dtype:
            embedding = self._weights["embed_tokens.weight"].to(device=self.device, dtype=dtype)
        return PackedBackbone(
            spec,
            [fuse_layer(weights, i, self.device, dtype) for i in range(spec.num_layers)],
            embedding=embedding,
            norm_weight=weights["norm.weight"].to(device=self.device, dtype=dtype),
            rope=self._rope,
            attention=self.attention,
            batch_invariant=self.batch_invariant,
        )
