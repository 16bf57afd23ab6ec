"""Pictures of a training run: its losses by step, and its scores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jv5kernels.training.score_card import Score

__all__ = ["draw_losses", "draw_scores"]

# What the log holds beside losses.
NO_LOSSES = ("step", "epoch", "grad_norm", "learning_rate", "temperature")
METRICS = {"spearman": "Spearman", "v_measure": "V-measure"}
FORM = re.compile(r"(?P<who>model|teacher), (?P<dim>\d+) dimensions, (?P<form>.+)")
LANGUAGE = re.compile(r"(\w+) synopsis to description")
COLOURS = ("#0b6e4f", "#8d99ae")
GREY = "#444444"


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
    """Draws a panel each of: the forms by dimension, the languages, the other measures and the ablation.

    A panel for which there are no scores is left out.

    Args:
        path: a name ending in .png.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("there is nothing to draw: no scores")
    panels = [draw for draw in (_forms, _languages, _measures, _ablation) if draw(scores, None)]
    figure = _figure(6.4 * min(2, len(panels)), 4 * -(-len(panels) // 2))
    grid = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, draw in zip(grid.flat, panels, strict=False):
        draw(scores, axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="y")
    figure.savefig(path, dpi=150)


def _forms(scores: Sequence[Score], axes: Any) -> bool:
    """nDCG@10 by dimensions, a line each form of the model, and what it is held against."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for score in scores:
        match = FORM.fullmatch(score.impl)
        if match and match["who"] == "model":
            lines.setdefault(match["form"], []).append((int(match["dim"]), score.value))
    if axes is None or not lines:
        return bool(lines)
    for form, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=form)
    for score in scores:
        match = FORM.fullmatch(score.impl)
        of_teacher = match and match["who"] == "teacher" and match["form"] == "float32"
        if of_teacher or score.impl == "BM25":
            name = "teacher" if of_teacher else "BM25"
            axes.axhline(score.value, color=GREY, linestyle="--" if of_teacher else ":", label=name)
    dims = sorted({dim for points in lines.values() for dim, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.minorticks_off()
    axes.set_xlabel("dimensions")
    axes.set_title("synopsis to description, nDCG@10", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return True


def _languages(scores: Sequence[Score], axes: Any) -> bool:
    """nDCG@10 of synopses in other languages against English descriptions."""
    by_language: dict[str, dict[str, float]] = {}
    for score in scores:
        match = LANGUAGE.fullmatch(score.work)
        if match:
            by_language.setdefault(match[1], {})[score.impl] = score.value
    if axes is None or not by_language:
        return bool(by_language)
    _pairs_of_bars(axes, by_language, ("model", "teacher"))
    axes.set_title("synopses in other languages, nDCG@10", loc="left", fontsize=10)
    return True


def _measures(scores: Sequence[Score], axes: Any) -> bool:
    """Everything that is no nDCG, whose name begins with who it is of."""
    others = [score for score in scores if score.metric != "ndcg_at_10"]
    teacher = {(s.work, s.metric): s.value for s in others if s.impl == "teacher"}
    found: dict[str, dict[str, float]] = {}
    for score in others:
        who, _, adapter = score.impl.partition(", ")
        if who != "model":
            continue
        metric = METRICS.get(score.metric, score.metric)
        name = f"{score.work},\n{metric}" + (f" ({adapter})" if adapter else "")
        found[name] = {"model": score.value}
        if (score.work, score.metric) in teacher:
            found[name]["teacher"] = teacher[score.work, score.metric]
    if axes is None or not found:
        return bool(found)
    _pairs_of_bars(axes, found, ("model", "teacher"), small=True)
    axes.set_title("other measures", loc="left", fontsize=10)
    return True


def _ablation(scores: Sequence[Score], axes: Any) -> bool:
    """What binary output costs with and without the regulariser, a point a seed."""
    found = {s.impl: s.value for s in scores if s.impl.startswith("regulariser ")}
    if axes is None or not found:
        return bool(found)
    for at, kind in enumerate(("with", "without")):
        seeds = sorted(
            {n.rpartition(",")[0] for n in found if n.startswith(f"regulariser {kind}-")}
        )
        losses = [found[f"{seed}, float32"] - found[f"{seed}, binary"] for seed in seeds]
        if losses:
            axes.bar(at, sum(losses) / len(losses), width=0.5, color=COLOURS[at], alpha=0.5)
            axes.plot([at] * len(losses), losses, "o", color=COLOURS[at])
    axes.set_xticks([0, 1], ["with", "without"])
    axes.set_title("orthogonal regulariser: nDCG@10 lost in binary", loc="left", fontsize=10)
    return True


def _pairs_of_bars(
    axes: Any, values: Mapping[str, Mapping[str, float]], who: Sequence[str], small: bool = False
) -> None:
    for shift, (name, colour) in enumerate(zip(who, COLOURS, strict=True)):
        at = [i + 0.4 * (shift - 0.5) for i, row in enumerate(values.values()) if name in row]
        heights = [row[name] for row in values.values() if name in row]
        axes.bar(at, heights, width=0.38, color=colour, label=name)
        for x, height in zip(at, heights, strict=True):
            axes.text(x, height, f"{height:.2f}", ha="center", va="bottom", fontsize=6)
    axes.set_xticks(range(len(values)), list(values), fontsize=6 if small else 8)
    if small:
        axes.tick_params(axis="x", rotation=20)
    axes.legend(frameon=False, fontsize=8)


def _figure(width: float, height: float) -> Any:
    """A figure without pyplot, whose backend is the caller's own."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
