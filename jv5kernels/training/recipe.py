"""Everything that a training run depends on, beside the corpus and the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["RECIPE", "Recipe", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        steps: optimiser steps.
        batch: packages a step.
        learning_rate: peak; linear warm-up over a twentieth of the steps, then cosine decay to 0.
        max_tokens: documents are cut to so many.
        long_tokens: the loss "long" sees texts of up to so many.
        rope_theta: base of the rotary frequencies while training; never above the one at inference.
        weights: name of a loss -> its weight; a loss that is not named is not computed.
        temperature: τ of InfoNCE, learnable from here on.
        cosent_temperature: τ' of CoSENT.
        hard_negatives: mined documents a query.
        dropout: of the token embeddings.
        share: of an adapter's update that is kept when it is trained, 1/2 for the mean of its end and its start.
        thinning: share of each text's tokens that a step leaves out, so that no single word decides.
    """

    steps: int
    batch: int
    learning_rate: float
    rope_theta: float = 100_000.0
    max_tokens: int = 192
    long_tokens: int = 8192
    weights: dict[str, float] = field(default_factory=dict)
    temperature: float = 0.02
    cosent_temperature: float = 0.05
    hard_negatives: int = 0
    dropout: float = 0.0
    thinning: float = 0.0
    share: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A model's sizes, its stages and its seed; see `RECIPE` for the values of jv5-tiny.

    Args:
        rotation: angle that the finished model is turned by, so that all dimensions have their share; see `rotation`.
        teacher_tokens: start each token's embedding from the teacher's embedding of its text.
    """

    geometry: dict[str, Any]
    inference_theta: float
    vocab_size: int
    matryoshka_dims: tuple[int, ...]
    lora_rank: int
    distillation: Stage
    adapters: dict[str, Stage]
    seed: int = 0
    rotation: float = 1.0
    teacher_tokens: bool = True

    def scaled(self, factor: float, batch: int | None = None) -> Recipe:
        """Returns the recipe with its steps multiplied, at least two each, and at most `batch` packages a step."""

        def shorter(stage: Stage) -> Stage:
            steps = max(2, round(stage.steps * factor))
            return replace(stage, steps=steps, batch=min(stage.batch, batch or stage.batch))

        adapters = {task: shorter(stage) for task, stage in self.adapters.items()}
        return replace(self, distillation=shorter(self.distillation), adapters=adapters)


RECIPE = Recipe(
    geometry={
        "hidden_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 512,
        "max_position_embeddings": 8192,
    },
    inference_theta=200_000.0,
    vocab_size=10_240,
    matryoshka_dims=(32, 64, 128, 256, 384),
    lora_rank=16,
    # A backbone that starts from random weights needs a contrastive term here, and with it the regulariser; the paper's
    # starts from Qwen3.
    distillation=Stage(
        steps=1600,
        batch=2048,
        learning_rate=2e-3,
        weights={"distill": 1.0, "nce": 0.5, "paragraph": 0.5, "long": 0.25, "orthogonal": 1.0},
        temperature=0.05,
        thinning=0.3,
    ),
    adapters={
        "retrieval": Stage(
            steps=200,
            batch=1024,
            learning_rate=2e-3,
            weights={"nce": 1.0, "distill": 2.0, "orthogonal": 4.0},
            hard_negatives=1,
            thinning=0.15,
            share=0.5,
        ),
        "text-matching": Stage(
            steps=120,
            batch=1024,
            learning_rate=1e-3,
            weights={"cosent": 1.0, "nce": 1.0, "distill": 2.0},
            thinning=0.15,
        ),
        "clustering": Stage(
            steps=120,
            batch=1024,
            learning_rate=1e-3,
            rope_theta=50_000.0,
            weights={"topic": 1.0},
        ),
        "classification": Stage(
            steps=120,
            batch=192,
            learning_rate=1e-3,
            rope_theta=200_000.0,
            weights={"bidirectional": 1.0, "relational": 20.0},
        ),
    },
)
