"""How a training run becomes jv5-tiny, and how its card and the README come by their figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from edits import edit
from safetensors.torch import load_file, save_file

from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.packaged import packaged_folder
from jv5kernels.synthetic.checkpoint import TASKS, write_checkpoint

BENCH = Path(__file__).parent.parent / "bench"
STAGE = {
    "steps": 7,
    "batch": 8,
    "learning_rate": 1e-3,
    "max_tokens": 192,
    "rope_theta": 1e5,
    "long_tokens": 4096,
    "weights": {"distill": 1.0, "long": 0.25},
}
RECIPE = {
    "geometry": {"hidden_size": 64},
    "vocab_size": 400,
    "inference_theta": 2e5,
    "matryoshka_dims": [32, 64],
    "lora_rank": 8,
    "seed": 3,
    "distillation": STAGE,
    "adapters": {task: {**STAGE, "weights": {"nce": 1.0}} for task in TASKS},
}


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The modules of the folder bench, which import one another by their bare names."""
    sys.path.insert(0, str(BENCH))
    try:
        import install_tiny
        import table
        import tiny_tables

        yield {"install": install_tiny, "table": table, "tables": tiny_tables}
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a training run, with a model of random weights."""
    folder = tmp_path / "run"
    write_checkpoint(folder / "model", family="small", dtype=torch.bfloat16)
    seconds = {"tokenised": 2.0, **dict.fromkeys(TASKS, 100.5), "ablation-with-1": 300.0}
    (folder / "log.json").write_text(json.dumps({"recipe": RECIPE, "seconds": seconds}))
    (folder / "model/optimizer.pt").write_text("not for the package")
    (folder / "model/model.safetensors").chmod(0o600)
    return folder


def test_a_run_is_installed_beside_the_card(bench: dict, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "jv5-tiny"
    (target / "adapters/old").mkdir(parents=True)
    (target / "adapters/old/adapter_model.safetensors").touch()
    (target / "README.md").write_text("the card")
    (record,) = bench["install"].install(
        run / "model", run / "log.json", "jv5kernels train x", target, "by hand"
    )
    held = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert held == {*bench["install"].FILES, "README.md"}
    assert (target / "README.md").read_text() == "the card"
    assert (target / "model.safetensors").stat().st_mode & 0o044 == 0o044
    installed, trained = open_checkpoint(target), open_checkpoint(run / "model")
    assert record["parameters"] == sum(t.numel() for t in installed.weights().values())
    assert record["bytes"] == sum((target / name).stat().st_size for name in held - {"README.md"})
    assert record["seconds"] == 100.5 and record["recipe"] == RECIPE
    assert record["command"] == "jv5kernels train x" and record["note"] == "by hand"
    for name, tensor in trained.weights().items():
        assert torch.equal(installed.weights()[name], tensor)


def test_what_is_no_jv5_tiny_replaces_nothing(
    bench: dict, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "jv5-tiny"
    target.mkdir()
    (target / "config.json").write_text("as it was")

    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            bench["install"].install(run / "model", run / "log.json", "x", target)
        assert (target / "config.json").read_text() == "as it was"

    monkeypatch.setattr(bench["install"], "MOST_BYTES", 1000)
    refused(ValueError, "at most 1,000 are shipped")
    monkeypatch.undo()
    weights = run / "model/model.safetensors"
    kept = load_file(weights)
    save_file({**kept, "norm.weight": kept["norm.weight"] * float("nan")}, weights)
    refused(ValueError, "norm.weight is not finite")
    save_file({name: tensor.float() for name, tensor in kept.items()}, weights)
    refused(ValueError, "weights of torch.float32, not of bfloat16")
    save_file(kept, weights)
    edit(run / "model/config.json", task_names=["retrieval"])
    refused(ValueError, r"has the tasks \['retrieval'\]")
    (run / "model/special_tokens_map.json").unlink()
    refused(FileNotFoundError, "special_tokens_map.json is missing")


def score(work: str, impl: str, value: float, metric: str = "ndcg_at_10") -> dict[str, Any]:
    return {
        "work": work,
        "impl": impl,
        "metric": metric,
        "value": value,
        "queries": 3694,
        "device": "GPU",
    }


ENGLISH = "synopsis to description"
SCORES = [
    score(ENGLISH, "BM25", 0.787),
    score(ENGLISH, "teacher, 384 dimensions, float32", 0.778),
    score(ENGLISH, "teacher, 384 dimensions, binary", 0.701),
    score(ENGLISH, "model, 384 dimensions, float32", 0.8),
    score(ENGLISH, "model, 384 dimensions, binary, rescored", 0.79),
    score(ENGLISH, "model, 64 dimensions, float32", 0.7),
    score(f"de {ENGLISH}", "teacher", 0.47),
    score(f"de {ENGLISH}", "model", 0.61),
    score(ENGLISH, "regulariser with-1, float32", 0.6),
    score(ENGLISH, "regulariser with-1, binary", 0.57),
    score("graded pairs", "model, text-matching", 0.66, "spearman"),
    score("something new", "of another kind", 0.123, "measure"),
]


def test_scores_of_the_card(bench: dict) -> None:
    text = bench["tables"].scores(SCORES, lambda found: f"\n\n{len(found)} records")
    for line in (
        "| jv5-tiny | 384 | 0.800 |  |  | 0.790 |  |",
        "| jv5-tiny | 64 | 0.700 |  |  |  |  |",
        "| teacher | 384 | 0.778 |  | 0.701 |  |  |",
        "| BM25 | | 0.787 | | | | |",
        "| de | 3,694 | 0.610 | 0.470 |",
        "| with | 1 | 0.6000 | 0.5700 | 5.00 % |",
        "| graded pairs | jv5-tiny, text-matching | spearman | 0.660 |",
        "| something new | of another kind | measure | 0.123 |",
        "12 records",
    ):
        assert line in text.splitlines(), text
    assert "No scores yet" in bench["tables"].scores([], None)


def test_scores_of_the_readme(bench: dict) -> None:
    lines = bench["tables"].summary(SCORES).splitlines()
    assert lines[2:] == [
        "| jv5-tiny, float32 | 0.800 |",
        "| jv5-tiny, binary, rescored | 0.790 |",
        "| its teacher, float32 | 0.778 |",
        "| BM25 | 0.787 |",
        "",
        "Synopses in other languages (teacher in brackets): de 0.61 (0.47).",
    ]


def test_the_recipe_of_the_card(bench: dict) -> None:
    run = {
        "command": "jv5kernels train corpus run --seconds 9",
        "note": "Cut short.",
        "parameters": 7_056_384,
        "bytes": 2**24,
        "seconds": 100.5,
        "recipe": RECIPE,
    }
    text = bench["tables"].recipe([run])
    assert "```sh\njv5kernels train corpus run --seconds 9\n```\n\nCut short.\n\nSeed" in text
    assert "Seed 3; 100 seconds" in text and "7.06 million" in text and "16.0 MiB" in text
    assert (
        "| distillation | 7 | 8 | 0.001 | 192 (long: 4096) | 100000 | distill 1, long 0.25 |"
        in text
    )
    assert "| classification | 7 | 8 | 0.001 | 192 | 100000 | nce 1 |" in text


def test_the_card_says_what_the_results_say(bench: dict) -> None:
    card = packaged_folder() / "README.md"
    assert bench["table"].CARD == card
    assert bench["table"].filled(card.read_text(), bench["table"].CARD_TABLES) == card.read_text()


def test_a_table_is_filled_between_its_markers(bench: dict) -> None:
    page = "before\n<!-- one -->\nold\n<!-- /one -->\nafter\n"
    new = bench["table"].filled(page, {"one": lambda: r"| \d |"})
    assert new == "before\n<!-- one -->\n| \\d |\n<!-- /one -->\nafter\n"
    with pytest.raises(AssertionError, match="markers of the table 'two' once"):
        bench["table"].filled(page, {"two": str})
