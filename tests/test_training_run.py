"""A whole run on a made-up corpus: the student, stages that go on where they stopped, and the exported checkpoint."""

from __future__ import annotations

import json
import time
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import set_peft_model_state_dict
from training_corpus import packages, write_corpus, write_documentation, write_teacher

from jv5kernels import FastEncoder
from jv5kernels.cli import main
from jv5kernels.training import command
from jv5kernels.training.batches import Batches, grouped
from jv5kernels.training.objective import Objective
from jv5kernels.training.recipe import RECIPE, Stage
from jv5kernels.training.run import Run
from jv5kernels.training.stages import run_stage
from jv5kernels.training.student import (
    FusedNorm,
    embed,
    new_backbone,
    set_rope_theta,
    set_token_embeddings,
    with_adapter,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = RECIPE.scaled(0.02, batch=8)
TINY = replace(
    SMALL,
    distillation=replace(SMALL.distillation, long_tokens=96),
    geometry={
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
    },
    vocab_size=400,
    matryoshka_dims=(16, 64),
    lora_rank=4,
)
TASKS = ("retrieval", "text-matching", "clustering", "classification")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def run_of(folder: Path, teacher: Path, device: str = "cpu") -> Run:
    return Run(folder, packages(teacher), teacher, TINY, device, False, lambda _: None)


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_of(tmp_path_factory.mktemp("run"), teacher)
    run.prepare()
    run.distil()
    for task in TASKS:
        run.write(task, run.adapt(task))
    run.save_log()
    run.finish()
    return run


def test_the_norm_is_qwen3s_own() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    ours, theirs = FusedNorm(48, eps=1e-6), Qwen3RMSNorm(48, eps=1e-6)
    weight = torch.randn(48, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(1))
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    assert ours(x.bfloat16()).dtype == torch.bfloat16
    backbone = new_backbone(TINY, 400)
    names = {type(m).__name__ for m in backbone.modules() if "Norm" in type(m).__name__}
    assert names == {"FusedNorm"}


def test_an_embedding_does_not_depend_on_what_follows_or_on_groups(finished: Run) -> None:
    torch.manual_seed(0)
    backbone, texts = new_backbone(TINY, 400).eval(), finished.source.texts
    rows = np.arange(0, 60, 3)
    ids = torch.from_numpy(texts.ids.astype(np.int32))
    together = embed(backbone, ids, grouped(texts, rows, 40))
    for at, row in enumerate(rows[:6]):
        start, end = texts.offsets[row], min(texts.offsets[row + 1], texts.offsets[row] + 40)
        alone = backbone(input_ids=ids[None, start:end].long()).last_hidden_state[0, -1]
        torch.testing.assert_close(together[at], alone, rtol=1e-4, atol=1e-5)


def test_the_rope_base_changes_and_comes_back() -> None:
    torch.manual_seed(0)
    backbone = new_backbone(TINY, 400).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = backbone(ids).last_hidden_state
        set_rope_theta(backbone, 50_000.0)
        assert (backbone(ids).last_hidden_state - before).abs().max() > 1e-4
        set_rope_theta(backbone, TINY.inference_theta)
        torch.testing.assert_close(backbone(ids).last_hidden_state, before)


def test_token_embeddings_start_from_given_vectors() -> None:
    torch.manual_seed(0)
    backbone = new_backbone(TINY, 400)
    table = backbone.get_input_embeddings().weight
    rest, spread = table[300:].clone(), table.std()
    vectors = torch.randn(300, 32) + 5
    set_token_embeddings(backbone, vectors)
    centred = vectors - vectors.mean(0)
    cosines = torch.nn.functional.cosine_similarity(table[:300, :32], centred)
    assert cosines.min() > 0.9999
    assert table[:300, :32].std().item() == pytest.approx(spread.item(), rel=0.01)
    assert torch.equal(table[300:], rest)


def test_a_stopped_stage_goes_on_as_if_it_had_not(finished: Run, tmp_path: Path) -> None:
    stage = Stage(6, 8, 1e-2, weights={"nce": 1.0, "distill": 1.0}, max_tokens=24, dropout=0.1)
    batches = Batches(finished.source, stage, "pairs", 3)

    def trained(folder: Path, *stops: int | None) -> tuple[dict, list]:
        for stop in stops:
            torch.manual_seed(0)
            projection = torch.nn.Linear(64, 32)
            objective = Objective(
                new_backbone(TINY, 400), stage, (16, 64), projection, finished.ids, finished.targets
            )
            history = run_stage(
                objective, batches, folder, seed=3, device="cpu", progress=False, stop_at=stop
            )
        return objective.state_dict(), history

    whole, history = trained(tmp_path / "whole", None)
    first, _ = trained(tmp_path / "first", 3)
    resumed, joined = trained(tmp_path / "parts", 3, None)
    assert any(not torch.equal(first[name], whole[name]) for name in whole)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)
    assert [entry["step"] for entry in joined] == [1, 2, 3, 4, 5, 6]
    assert joined[-1]["nce"] == pytest.approx(history[-1]["nce"], rel=1e-4)


def test_losses_fall_and_are_logged_by_name(finished: Run) -> None:
    history = json.loads(finished.save_log().read_text())["history"]
    assert set(history) == {"distillation", *TASKS}
    for name, entries in history.items():
        stage = TINY.distillation if name == "distillation" else TINY.adapters[name]
        assert entries[-1]["step"] == stage.steps
        assert set(stage.weights) <= set(entries[0]) and "temperature" in entries[0]
    distillation = [entry["distill"] for entry in history["distillation"]]
    assert np.mean(distillation[-4:]) < np.mean(distillation[:4]) - 0.05


def test_the_checkpoint_opens_and_says_what_was_trained(finished: Run) -> None:
    encoder = FastEncoder(finished.trained, device="cpu")
    assert encoder.tasks == TASKS
    assert encoder.prompts == {"query": "Query: ", "document": "Document: "}
    assert encoder.spec.rope_theta == TINY.inference_theta
    assert encoder.checkpoint.matryoshka_dims == (16, 64)
    texts = ["editor for music files", "a small parser"]
    by_task = [encoder.encode_document(texts, task=task) for task in TASKS]
    for other in by_task[1:]:
        assert np.abs(by_task[0] - other).max() > 1e-4
    # Its embeddings are those of the backbone and adapter that were trained, up to weights in bfloat16.
    tensors = finished.adapt("retrieval")  # nothing is left to train
    adapted = with_adapter(finished.backbone, "retrieval", TINY.lora_rank).eval()
    set_peft_model_state_dict(adapted, tensors)
    tokens = encoder.tokenize(texts, "Query: ")
    for row, ids in zip(encoder.encode_query(texts, task="retrieval"), tokens, strict=True):
        with torch.no_grad():
            last = adapted(input_ids=torch.from_numpy(ids)[None].long()).last_hidden_state[0, -1]
        cosine = float(torch.nn.functional.cosine_similarity(torch.from_numpy(row), last, dim=0))
        assert cosine > 0.999
    adapted.unload()


def test_the_finished_model_is_the_trained_one_turned(finished: Run) -> None:
    names = {p.relative_to(finished.trained) for p in finished.trained.rglob("*")}
    assert names == {p.relative_to(finished.model) for p in finished.model.rglob("*")}
    trained, model = (FastEncoder(f, device="cpu") for f in (finished.trained, finished.model))
    texts = [f"a text of {number} things" for number in range(6)]
    for task in TASKS:
        before, after = (e.encode_document(texts, task=task) for e in (trained, model))
        assert np.abs(before @ before.T - after @ after.T).max() < 0.05, (
            "bf16 weights, rounded again"
        )
        assert np.abs(before - after).max() > 0.05


def test_what_is_done_is_not_done_again(finished: Run, teacher: Path) -> None:
    before = (finished.trained / "model.safetensors").read_bytes()
    again = run_of(finished.folder, Path(teacher))
    again.prepare()
    again.distil()
    assert (finished.trained / "model.safetensors").read_bytes() == before
    assert again.log["history"]["distillation"] == finished.log["history"]["distillation"]


def test_pace_shortens_to_the_time_and_is_kept(finished: Run, tmp_path: Path) -> None:
    run = copy(finished)
    run.folder, run.log = tmp_path, {"seconds": {}}
    run.started = time.perf_counter() - 1000  # the time is over: the shortest run there is
    assert run.pace(1.0) == 0
    assert run.recipe.distillation.steps == 2
    again = run_of(tmp_path, tmp_path)
    assert again.pace(1e9) == 0


@pytest.mark.gpu
def test_a_run_on_the_gpu(teacher: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, teacher, "cuda")
    run.prepare()
    run.distil()
    run.write("retrieval", run.adapt("retrieval"))
    losses = [entry["distill"] for entry in run.log["history"]["distillation"]]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.05
    assert len(run.log["history"]["retrieval"]) > 1
    assert 0 <= run.log["dev"]["retrieval"]["ndcg@10"] <= 1


def test_the_command_trains_scores_and_draws(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "RECIPE", TINY)
    corpus = write_corpus(tmp_path / "corpus.jsonl.xz", 400)
    out = tmp_path / "run"
    arguments = ["train", str(corpus), str(out), "--teacher", str(teacher), "--device", "cpu"]
    arguments += ["--documentation", str(write_documentation(tmp_path / "documentation.jsonl"))]
    small = ["--scale", "0.1", "--batch", "6", "--ablation", "1", "--no-progress"]
    assert main([*arguments, *small, "--task", "retrieval"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "model")
    scores = json.loads((out / "scores.json").read_text())
    works = {(score["work"], score["impl"]) for score in scores}
    english = "synopsis to description"
    for impl in (
        "BM25",
        "teacher, 32 dimensions, float32",
        "model, 64 dimensions, binary, rescored",
        "model, 16 dimensions, int8",
        "regulariser with-1, binary",
        "regulariser without-1, float32",
    ):
        assert (english, impl) in works
    assert ("de synopsis to description", "model") in works
    chapters = "section title to chapter, of 2"
    for impl in ("BM25", "teacher, mean of parts", "model", "model, mean of parts"):
        assert (chapters, impl) in works
    assert all(-1 <= score["value"] <= 1 for score in scores)
    for picture in ("losses.png", "scores.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_the_ablation_alone_on_a_finished_model(
    finished: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "RECIPE", TINY)
    corpus, out = write_corpus(tmp_path / "corpus.jsonl.xz"), tmp_path / "run"
    model = finished.trained
    before = (model / "model.safetensors").read_bytes()
    arguments = ["train", str(corpus), str(out), "--teacher", str(teacher), "--device", "cpu"]
    arguments += ["--ablation-only", str(model), "--ablation", "2", "--ablation-seconds", "40"]
    assert main([*arguments, "--batch", "6", "--no-progress", "--no-scores"]) == 0
    assert (model / "model.safetensors").read_bytes() == before and not (out / "model").exists()
    log = json.loads((out / "log.json").read_text())
    names = {f"ablation-{kind}-{seed}" for kind in ("with", "without") for seed in (1, 2)}
    assert set(log["dev"]) == set(log["history"]) == names
    losses = log["history"]["ablation-without-1"][0]
    assert "orthogonal" in log["history"]["ablation-with-1"][0] and "orthogonal" not in losses
    assert losses["distill"] < 0.9, "the projection was fitted before the first step"
    written = {path.parent.parent.parent.name for path in out.rglob("adapter_model.safetensors")}
    assert written == {name.removeprefix("ablation-") for name in names}


def test_errors_name_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(tmp_path / "none.jsonl"), str(tmp_path / "run")]) == 2
    assert "there is no file" in capsys.readouterr().err
    corpus = write_corpus(tmp_path / "corpus.jsonl.xz")
    arguments = ["train", str(corpus), str(tmp_path / "run"), "--teacher", "t", "--task", "poetry"]
    assert main(arguments) == 2
    assert "--task poetry is unknown" in capsys.readouterr().err
    corpus.write_bytes(write_corpus(tmp_path / "short.jsonl.xz", 4).read_bytes())
    assert main(["train", str(corpus), str(tmp_path / "run"), "--teacher", "t"]) == 2
    assert "split='test' has no packages" in capsys.readouterr().err
    with pytest.raises(
        ImportError, match=r"training needs Nothing: pip install 'jv5kernels\[train\]'"
    ):
        command.check_packages({"no_such_module_at_all": "Nothing"})
