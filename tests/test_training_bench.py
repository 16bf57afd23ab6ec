"""What bench_tiny.py writes of scores: what each is held against, and the summary of the ablation."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from jv5kernels.training.score_card import Score


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    try:
        return importlib.import_module("bench_tiny")
    finally:
        sys.path.pop(0)


def score(work: str, impl: str, value: float, metric: str = "ndcg_at_10") -> Score:
    return Score(work, impl, metric, value, "", 10)


def test_every_score_is_held_against_what_it_replaces(bench: Any) -> None:
    scores = [
        score("en", "BM25", 0.8),
        score("en", "teacher, 384 dimensions, float32", 0.75),
        score("en", "teacher, 384 dimensions, binary", 0.6),
        score("en", "model, 384 dimensions, float32", 0.5),
        score("en", "model, 384 dimensions, binary", 0.4),
        score("en", "model, 32 dimensions, binary, rescored", 0.2),
        score("en", "model, 32 dimensions, float32", 0.25),
        score("de", "model", 0.6),
        score("de", "teacher", 0.3),
        score("long", "model", 0.6, "accuracy"),
    ]
    records = bench.score_records(scores, "cpu")
    assert [r["peer"] for r in records] == [
        None,
        "BM25",
        "teacher, 384 dimensions, float32",
        "teacher, 384 dimensions, float32",
        "model, 384 dimensions, float32",
        "model, 32 dimensions, float32",
        "teacher, 384 dimensions, float32",
        "teacher",
        None,
        None,
    ]
    assert records[4]["ratio"] == pytest.approx(0.8) and records[7]["ratio"] == pytest.approx(2)
    assert records[9]["ratio"] is None


def test_the_ablation_is_summed_up_over_its_seeds(bench: Any) -> None:
    lost = {"with-1": 0.02, "with-2": 0.04, "without-1": 0.05, "without-2": 0.07}
    scores = []
    for name, loss in lost.items():
        scores += [score("en", f"regulariser {name}, float32", 0.7)]
        scores += [score("en", f"regulariser {name}, binary", 0.7 - loss)]
    records = bench.ablation_records(scores, "cpu")
    assert [r["impl"] for r in records] == ["with regulariser", "without regulariser"]
    assert records[0]["value"] == pytest.approx(0.03) and records[0]["ratio"] == pytest.approx(2)
    assert records[1]["deviation"] == pytest.approx(0.02 / 2**0.5)
    assert bench.ablation_records(scores[:4], "cpu") == [], "one kind alone is no comparison"
