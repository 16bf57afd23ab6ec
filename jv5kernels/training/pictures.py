"""Pictures of a training run: its losses by step, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jv5kernels.training.score_card import Score

__all__ = ["draw_losses", "draw_scores"]

# What the log holds beside losses.
NO_LOSSES = ("step", "epoch", "grad_norm", "learning_rate", "temperature")
METRICS = {"ndcg_at_10": "nDCG@10", "spearman": "Spearman", "v_measure": "V-measure"}


def draw_losses(history: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draws a panel a stage, the sum and each loss by itself over the steps.

    Args:
        history: stage -> what was logged, dicts with "step" and losses.
        path: a name ending in .png.

    Raises:
        ValueError: nothing was logged.
    """
    stages = {name: entries for name, entries in history.items() if entries}
    if not stages:
        raise ValueError("there is nothing to draw: no stage logged a loss")
    columns = min(3, len(stages))
    rows = -(-len(stages) // columns)
    figure = _figure(4.5 * columns, 3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(stages) :]:
        axes.set_visible(False)
    for axes, (name, entries) in zip(grid.flat, stages.items(), strict=False):
        steps = [entry["step"] for entry in entries]
        losses = [key for key in entries[0] if key not in NO_LOSSES]
        for loss in losses:
            axes.plot(
                steps,
                [entry[loss] for entry in entries],
                label=loss,
                linewidth=2.2 if loss == "loss" else 1.2,
                color="#222222" if loss == "loss" else None,
            )
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_scores(scores: Sequence[Score], path: Path) -> None:
    """Draws every score as a bar, grouped by its work.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("there is nothing to draw: no scores")
    works = list(dict.fromkeys(score.work for score in scores))
    colours = {work: f"C{i % 10}" for i, work in enumerate(works)}
    ordered = [score for work in works for score in scores if score.work == work][::-1]
    figure = _figure(9, 1 + 0.24 * len(ordered))
    axes = figure.subplots()
    axes.barh(
        range(len(ordered)),
        [score.value for score in ordered],
        color=[colours[score.work] for score in ordered],
    )
    for i, score in enumerate(ordered):
        axes.text(max(score.value, 0) + 0.01, i, f"{score.value:.3f}", va="center", fontsize=7)
    labels = [f"{s.work}: {s.impl}, {METRICS.get(s.metric, s.metric)}" for s in ordered]
    axes.set_yticks(range(len(ordered)), labels, fontsize=7)
    axes.set_xlim(min(0.0, *(score.value for score in ordered)), 1.08)
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot, whose backend is the caller's own."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
