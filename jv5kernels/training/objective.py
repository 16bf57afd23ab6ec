"""What a stage minimises: the losses of its weights, each over all Matryoshka dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jv5kernels.training import losses
from jv5kernels.training.batches import NEGATIVES_PER_ANCHOR
from jv5kernels.training.recipe import Stage
from jv5kernels.training.student import embed

__all__ = ["Objective"]

# τ is learnt as a logarithm; never lower than this, where the gradient of InfoNCE stops being useful.
LOWEST_TEMPERATURE = 0.005


class Objective(nn.Module):
    """A backbone with what only training needs: the projection ψ to the teacher's space and the temperature.

    Args:
        backbone: a Qwen3Model, or a PEFT model around one.
        stage: which losses, with which weights.
        dims: Matryoshka dimensions.
        projection: ψ, from student to teacher dimension.
        ids: (ids of all texts,) int32.
        targets: (english texts, teacher dim) float16, the teacher's embeddings.
    """

    def __init__(
        self,
        backbone: nn.Module,
        stage: Stage,
        dims: Sequence[int],
        projection: nn.Linear,
        ids: Tensor,
        targets: Tensor,
    ) -> None:
        super().__init__()
        self.backbone, self.stage, self.dims, self.projection = (
            backbone,
            stage,
            tuple(dims),
            projection,
        )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(stage.temperature)))
        self.latest: dict[str, Tensor] = {}
        self.ids: Tensor
        self.targets: Tensor
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("targets", targets, persistent=False)

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp().clamp_min(LOWEST_TEMPERATURE)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Returns {"loss": weighted sum}; each loss by itself is in `latest`."""
        parts = self._parts(batch)
        self.latest = {name: value.detach() for name, value in parts.items()}
        self.latest["temperature"] = self.temperature.detach()
        weights = self.stage.weights
        return {"loss": torch.stack([weights[name] * value for name, value in parts.items()]).sum()}

    def _parts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        if "queries" in batch:
            return self._pair_losses(batch)
        if "texts" in batch:
            embeddings = self._embed(batch["texts"])
            targets = self.targets[batch["targets"]].float() + batch["topics"]
            return {"topic": self.distillation(embeddings, targets)}
        return self._class_losses(batch)

    def _embed(self, parts: Sequence[Mapping[str, Any]], thinning: float | None = None) -> Tensor:
        device = self.ids.device.type
        thinning = self.stage.thinning if thinning is None else thinning
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return embed(self.backbone, self.ids, parts, self.stage.dropout, thinning)

    def _nested(self, loss: Callable[..., Tensor], *embeddings: Tensor) -> Tensor:
        return losses.matryoshka(loss, embeddings, self.dims)

    def distillation(self, embeddings: Tensor, targets: Tensor) -> Tensor:
        """A truncated embedding is projected by the first columns of ψ."""
        weight, bias = self.projection.weight, self.projection.bias

        def loss(z: Tensor) -> Tensor:
            projected = F.linear(F.normalize(z, dim=-1), weight[:, : z.shape[1]], bias)
            return losses.cosine_distillation(projected, targets.float())

        return self._nested(loss, embeddings)

    def _pair_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        queries = self._embed(batch["queries"])
        documents = self._embed(batch["documents"])
        positives = documents[: len(queries)]
        keys = batch["keys"]
        same = keys[: len(queries), None] == keys[None, :]
        weights, parts = self.stage.weights, {}
        if "distill" in weights:
            parts["distill"] = self.distillation(
                torch.cat([queries, positives]),
                self.targets[torch.cat([batch["query_targets"], batch["document_targets"]])],
            )
        if "nce" in weights:
            parts["nce"] = self._nested(
                lambda q, d: losses.info_nce(q, d, self.temperature, same), queries, documents
            )
        if "orthogonal" in weights:
            parts["orthogonal"] = self._nested(losses.orthogonal_regularizer, queries, positives)
        if "cosent" in weights:
            parts["cosent"] = self._ranking(queries, positives, batch)
        if "paragraph" in weights and "paragraphs" in batch:
            parts["paragraph"] = self.distillation(
                self._embed(batch["paragraphs"]), self.targets[batch["paragraph_targets"]]
            )
        if "long" in weights:
            # Whole, so that the last positions are seen.
            long = self._embed(batch["long"], thinning=0.0)
            parts["long"] = self.distillation(long, batch["long_targets"])
        return parts

    def _ranking(self, queries: Tensor, documents: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """CoSENT on pairs near and far: text i with texts i to i + 7 of the batch, scored by the teacher."""
        left, right = (
            F.normalize(self.targets[batch[f"{n}_targets"]].float(), dim=-1)
            for n in ("query", "document")
        )
        shifts = range(8)
        scores = torch.cat([(left * right.roll(-s, 0)).sum(-1) for s in shifts])
        # A sample: all pairs of pairs would be 64 batch².
        sample = torch.randperm(len(scores), device=scores.device)[: 2 * len(queries)]

        def loss(q: Tensor, d: Tensor) -> Tensor:
            cosines = torch.cat([F.cosine_similarity(q, d.roll(-s, 0)) for s in shifts])
            return losses.cosent(cosines[sample], scores[sample], self.stage.cosent_temperature)

        return self._nested(loss, queries, documents)

    def _class_losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        count = batch["anchors"]
        items = self._embed(batch["items"])
        sections = batch["sections"]
        same = sections[:, None] == sections[None, :]
        module: Any = self.backbone
        with torch.no_grad(), module.disable_adapter():
            teacher = self._embed(batch["items"])
        per_group = 2 + NEGATIVES_PER_ANCHOR
        group = len(items) // count
        assert group == per_group, "an anchor, a positive and its negatives"
        # All batch x 9 items against each other would be millions of distances: as many anchors as fit 1,024 items.
        kept = torch.arange(len(items), device=items.device)[:1024]
        return {
            "bidirectional": self._nested(
                lambda a, p: losses.bidirectional_info_nce(a, p, self.temperature, same),
                items[:count],
                items[count : 2 * count],
            ),
            "relational": self._nested(
                lambda s: losses.relational_distillation(s[kept], teacher[kept]), items
            ),
        }
