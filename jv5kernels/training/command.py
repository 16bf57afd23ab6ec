"""The work of `jv5kernels train`: a training run, its ablation, its scores and its pictures."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jv5kernels.training.recipe import RECIPE, Recipe

if TYPE_CHECKING:
    from jv5kernels.training.corpus import Package
    from jv5kernels.training.run import Run

__all__ = ["ABLATION", "ablate", "train"]

# A run of the ablation is shorter than the recipe's: only its two kinds are compared.
ABLATION_STEPS, ABLATION_BATCH = 200, 768
# At the recipe's weight so few steps do not move the term at all.
ABLATION_WEIGHT = 30.0
# Of the time that there is, what the steps are planned to fill, so that the last pair begins in time.
ABLATION_SHARE = 0.75
ABLATION = ("with", "without")
# Module -> package of the extra; the second kind for the scores alone.
NEEDED = {
    "accelerate": "accelerate",
    "matplotlib": "matplotlib",
    "sentence_transformers": "sentence-transformers",
}
NEEDED_TO_SCORE = {"bm25s": "bm25s", "scipy": "scipy", "sklearn": "scikit-learn"}


def train(options: argparse.Namespace, tell: Callable[[str], object] = print) -> Path:
    """Trains, evaluates and draws as the command line says; returns the folder of the finished model.

    Raises:
        FileNotFoundError: the corpus or the documentation is not there.
        ImportError: a package of the extra ``train`` is missing.
        ValueError: an unknown task, or a corpus without packages to train on, to watch or to score.
    """
    check_packages(NEEDED if options.no_scores else NEEDED | NEEDED_TO_SCORE)
    needed = [options.corpus, *([options.documentation] if options.documentation else [])]
    if options.ablation_only is not None:
        needed += [options.ablation_only / name for name in ("model.safetensors", "tokenizer.json")]
    for path in needed:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
    from jv5kernels.device import resolve_device
    from jv5kernels.training.corpus import read_packages
    from jv5kernels.training.evaluation import held_out, held_out_titles
    from jv5kernels.training.long_texts import read_chapters
    from jv5kernels.training.run import Run
    from jv5kernels.training.teacher import default_teacher

    recipe = recipe_of(options)
    teacher = options.teacher or str(default_teacher())
    packages = read_packages(options.corpus)[: options.packages]
    documentation = read_chapters(options.documentation) if options.documentation else []
    if not options.no_scores:
        # They refuse a corpus without any before hours of training, not after.
        held_out(packages)
        if documentation:
            held_out_titles(documentation)
    device = resolve_device(options.device).type
    run = Run(
        options.out,
        packages,
        teacher,
        recipe,
        device,
        progress=not options.no_progress,
        tell=tell,
        documentation=documentation,
    )
    model = trained = options.ablation_only
    if model is None:
        model, trained = train_model(run, options.seconds), run.trained
    else:
        run.take_tokenizer(model)
        run.prepare()
        run.use(model)
    draw(run)
    ablate(run, options.ablation, options.ablation_seconds)
    draw(run)
    if not options.no_scores:
        write_scores(run, model, trained, packages, teacher, device)
    return Path(model)


def train_model(run: Run, seconds: float | None) -> Path:
    """Trains backbone and adapters; returns the folder of the finished model."""
    run.prepare()
    if seconds is not None:
        run.pace(seconds)
    run.distil()
    run.save_log()
    for task in run.recipe.adapters:
        run.write(task, run.adapt(task))
        run.save_log()
    return run.finish()


def draw(run: Run) -> None:
    """Draws what the log has so far, so that an interruption later loses nothing."""
    from jv5kernels.training.pictures import draw_losses

    if run.log["history"]:
        draw_losses(run.log["history"], run.folder / "losses.png")


def check_packages(needed: Mapping[str, str]) -> None:
    """Raises ImportError when a package of the extra is not there."""
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"training needs {', '.join(missing)}: pip install 'jv5kernels[train]'")


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes.

    Raises:
        ValueError: an unknown task.
    """
    recipe = replace(RECIPE, seed=options.seed).scaled(options.scale, options.batch)
    unknown = set(options.tasks or ()) - set(recipe.adapters)
    if unknown:
        raise ValueError(f"--task {min(unknown)} is unknown: choose of {list(recipe.adapters)}")
    kept = {t: s for t, s in recipe.adapters.items() if not options.tasks or t in options.tasks}
    return replace(recipe, adapters=kept)


def ablate(run: Run, seeds: int, seconds: float) -> None:
    """Trains the retrieval adapter with and without the orthogonal regulariser, pair by pair while there is time.

    Each adapter is written as soon as it is trained, to ablation/<with or without>-<seed>/ of the run's folder.
    """
    from jv5kernels.training.student import write_adapter

    retrieval = run.recipe.adapters.get("retrieval", RECIPE.adapters["retrieval"])
    # Long texts cost time and are not what is compared.
    left_out = ("orthogonal", "long")
    without = {name: w for name, w in retrieval.weights.items() if name not in left_out}
    with_it = without | {"orthogonal": ABLATION_WEIGHT}
    weights = dict(zip(ABLATION, (with_it, without), strict=True))
    stage = replace(
        retrieval,
        steps=min(retrieval.steps, ABLATION_STEPS),
        batch=min(retrieval.batch, ABLATION_BATCH),
        share=1.0,
    )
    started, longest = time.perf_counter(), 0.0
    if seeds and seconds < float("inf"):
        each = ABLATION_SHARE * seconds / (seeds * len(ABLATION))
        stage = replace(stage, steps=run.steps_within(stage, each))
        started = time.perf_counter()
    for seed in range(1, seeds + 1):
        began = time.perf_counter()
        if began + longest - started > seconds:
            run.tell(f"no time for seed {seed} of the ablation")
            return
        for kind in ABLATION:
            name = f"{kind}-{seed}"
            of_kind = replace(stage, weights=weights[kind])
            tensors = run.adapt("retrieval", stage=of_kind, seed=seed, name=f"ablation-{name}")
            write_adapter(run.folder / "ablation" / name, "retrieval", tensors)
            run.save_log()
        longest = max(longest, time.perf_counter() - began)


def write_scores(
    run: Run, model: Path, trained: Path, packages: Iterable[Package], teacher: str, device: str
) -> Path:
    """Scores everything on the split "test" and writes scores.json and scores.png to the run's folder.

    Args:
        trained: the model that the ablation's adapters belong to.
    """
    from jv5kernels.training.pictures import draw_scores
    from jv5kernels.training.score_card import score_ablation, score_card

    scores = score_card(
        model,
        list(packages),
        teacher,
        device=device,
        cache=run.folder,
        documentation=run.documentation,
        tell=run.tell,
    )
    scores += score_ablation(
        trained, run.folder / "ablation", list(packages), device=device, tell=run.tell
    )
    path = run.folder / "scores.json"
    path.write_text(json.dumps([vars(score) for score in scores], indent=1) + "\n", "utf-8")
    draw_scores(scores, run.folder / "scores.png")
    for score in scores:
        run.tell(f"{score.work}, {score.impl}: {score.metric} {score.value:.4f}")
    return path
