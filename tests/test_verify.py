"""verify: it passes what is right, and notices what is wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_models import RemoteLike
from sentence_transformers import SentenceTransformer

from jv5kernels import FastEncoder, encoder, verify
from jv5kernels.checkpoint import Checkpoint, open_checkpoint
from jv5kernels.comparison.reference import load_reference, reference_embeddings
from jv5kernels.comparison.texts_of_length import sample_texts
from jv5kernels.live.model import open_live
from jv5kernels.live.reference import live_embeddings, live_reference
from jv5kernels.patching import patch
from jv5kernels.synthetic.checkpoint import TASKS, write_checkpoint
from jv5kernels.verify import Thresholds, VerifyReport

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a text", "another text, a little longer than the first", "", "x " * 40]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("verify") / "base", family="small")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "merged"
    return write_checkpoint(folder, family="nano", layout="merged")


def on_cpu(model: Any, **options: Any) -> VerifyReport:
    return verify(model, **{"device": "cpu", "lengths": [16, 40], **options})


def test_every_task_and_length_passes(base: Path) -> None:
    report = on_cpu(base)
    assert report.passed
    assert [(row.task, row.length) for row in report.rows] == [
        (task, length) for task in TASKS for length in (16, 40)
    ]
    for row in report.rows:
        assert row.length // 2 <= row.tokens[0] <= row.tokens[1] == row.length
        assert row.cosine_min > 1 - 1e-6 and row.cosine_min <= row.cosine_p1 <= row.cosine_mean
        assert row.error_rms < 1e-5 and row.error_max < 1e-5 and row.nan_count == 0
        assert row.neighbour_overlap > 0.95 and row.sign_flips < 0.001
        assert row.theirs_error_rms is None and not row.failures


def test_default_lengths_on_a_cpu_are_short_and_said_to_be(merged: Path) -> None:
    report = verify(merged, device="cpu")
    assert [row.length for row in report.rows] == [16, 128, 512]
    assert "on a CPU only texts up to 512 tokens" in report.notes[0]
    assert report.notes[0] in str(report)


def test_bfloat16_beside_transformers_bfloat16(merged: Path) -> None:
    report = on_cpu(merged, dtype=torch.bfloat16, compare_dtype=True)
    assert report.passed, str(report)
    for row in report.rows:
        assert 0 < row.error_rms <= row.theirs_error_rms < 0.05
    strict = on_cpu(
        merged,
        dtype=torch.bfloat16,
        compare_dtype=True,
        thresholds=Thresholds(cosine=0.9, error_ratio=0.01),
    )
    assert not strict.passed
    assert "is above 0.01 x" in strict.rows[0].failures[0]
    assert "theirs-rms" in str(strict) and "theirs-rms" not in str(on_cpu(merged))


def test_compare_dtype_in_float32_says_that_it_does_nothing(merged: Path) -> None:
    report = on_cpu(merged, compare_dtype=True)
    assert report.error_ratio is None and "no effect in float32" in report.notes[0]


def wrong_rope_base(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, spec=replace(checkpoint.spec, rope_theta=1e4))


def wrong_direction(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, spec=replace(checkpoint.spec, causal=not checkpoint.spec.causal))


@pytest.mark.parametrize("mistake", [wrong_rope_base, wrong_direction])
def test_a_wrong_architecture_is_noticed(
    base: Path, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        encoder, "open_checkpoint", lambda *a, **k: mistake(open_checkpoint(*a, **k))
    )
    report = on_cpu(base, tasks=["retrieval"], lengths=[40])
    assert not report.passed
    assert "is below 0.999999" in report.rows[0].failures[0]
    assert "FAILED" in str(report) and "missed: retrieval, up to 40" in str(report)
    assert on_cpu(base, tasks=["retrieval"], lengths=[40], thresholds=Thresholds(cosine=-1)).passed


def test_a_wrong_task_is_noticed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FastEncoder.encode

    def swapped(self: FastEncoder, inputs: list[str], **options: Any) -> Any:
        return right(self, inputs, **{**options, "task": "clustering"})

    monkeypatch.setattr(FastEncoder, "encode", swapped)
    report = on_cpu(base, tasks=["clustering", "retrieval"])
    assert [bool(row.failures) for row in report.rows] == [False, False, True, True]


def test_values_that_are_not_finite_are_counted(
    merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FastEncoder.encode

    def broken(self: FastEncoder, inputs: list[str], **options: Any) -> Any:
        rows = right(self, inputs, **options)
        rows[1, 3] = np.nan
        return rows

    monkeypatch.setattr(FastEncoder, "encode", broken)
    report = on_cpu(merged)
    assert not report.passed
    assert [row.nan_count for row in report.rows] == [1, 1]
    assert "1 embeddings are not finite" in report.rows[0].failures


def test_own_texts_are_sorted_by_length(merged: Path) -> None:
    report = on_cpu(merged, texts=TEXTS, lengths=[8, 32])
    assert report.passed and sum(row.texts for row in report.rows) == len(TEXTS)
    assert report.rows[-1].tokens[1] == 32  # the longest is cut
    assert len(on_cpu(merged, texts=["one"], lengths=[8, 32, 64]).rows) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["retrieval", "ranking"]}, "choose among .*retrieval"),
        ({"tasks": []}, "choose among"),
        ({"lengths": [0]}, "lengths must be from 1 to"),
        ({"lengths": [16, 1 << 20]}, "lengths must be from 1 to"),
        ({"texts": []}, "texts is empty"),
    ],
)
def test_arguments_are_checked(base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_cpu(base, **options)


def test_report_as_json_and_as_text(base: Path) -> None:
    report = on_cpu(base, tasks="retrieval")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["passed"] is True and values["rows"][0]["task"] == "retrieval"
    assert {"jv5kernels", "torch", "transformers"} == set(values["versions"])
    lines = str(report).splitlines()
    assert lines[1].split()[:4] == ["task", "tokens", "texts", "cos-min"]
    assert lines[2].split()[:3] == ["retrieval", "9-16", "16"]
    assert lines[-1] == "passed (cosine >= 0.999999)"


def test_the_float32_setting_of_the_process_is_restored(merged: Path) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        on_cpu(merged, lengths=[16])
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("end", [4, 16, 64, 300])
def test_sampled_texts_have_the_lengths_asked_for(base: Path, end: int) -> None:
    opened = FastEncoder(base, device="cpu")
    (sample,) = sample_texts(opened, [end], None, "cpu")
    lengths = [len(ids) for ids in opened.tokenize(sample.texts)]
    assert max(abs(a - b) for a, b in zip(lengths, sample.tokens, strict=True)) <= 1
    assert max(sample.tokens) == end and min(sample.tokens) > end // 2
    if end >= 16:
        assert len(set(sample.texts)) == len(sample.texts)
    assert {text.split(":")[0] for text in sample.texts} == {"Query", "Document"}


@pytest.mark.parametrize("task", [None, "clustering"])
def test_reference_of_a_live_model_is_that_of_its_files(base: Path, task: str | None) -> None:
    model, checkpoint = RemoteLike.load(base), open_checkpoint(base)
    exact = reference_embeddings(load_reference(checkpoint, task), checkpoint, TEXTS[:2])
    model.to(torch.bfloat16).to(torch.float32)  # rounds the rotary buffer
    model.load_state_dict(RemoteLike.load(base).state_dict())
    patch(model)
    state = copy.deepcopy(model.base_model.model.rotary_emb.inv_freq)
    live = open_live(model)
    copied = live_reference(live, task, torch.float32, torch.device("cpu"))
    found = live_embeddings(copied, live, TEXTS[:2], "lasttoken", 64)
    assert np.abs(found - exact).max() < 1e-6
    # The live model itself is as it was.
    assert model.active_adapter == ["retrieval"] or model.active_adapter == "retrieval"
    assert torch.equal(model.base_model.model.rotary_emb.inv_freq, state)
    assert "forward" in live.inner.__dict__ and "forward" not in copied.__dict__


@pytest.mark.parametrize("patched", [False, True])
def test_live_models(base: Path, merged: Path, patched: bool) -> None:
    remote, plain = RemoteLike.load(base), SentenceTransformer(str(merged), device="cpu")
    for model, tasks in ((remote, TASKS), (plain, (None,))):
        if patched:
            patch(model)
        report = on_cpu(model, lengths=[24])
        assert report.passed and [row.task for row in report.rows] == list(tasks)
        assert report.model == type(model).__name__


def test_a_live_model_that_is_changed_later_is_noticed(merged: Path) -> None:
    model = SentenceTransformer(str(merged), device="cpu")
    opened = FastEncoder(model, device="cpu")
    before = opened.encode(TEXTS[0])
    with torch.no_grad():
        model[0].model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert on_cpu(model, lengths=[16]).passed
    again = FastEncoder(model, device="cpu").encode(TEXTS[0])
    assert np.abs(again - before).max() > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["small", "nano"])
def test_bfloat16_on_cuda(tmp_path: Path, family: str) -> None:
    """Real geometry, four layers: within 0.9999 of fp32, and no further away than Transformers' own bf16."""
    from jv5kernels.synthetic.checkpoint import REAL_GEOMETRY

    geometry = {**REAL_GEOMETRY[family], "num_hidden_layers": 4}
    folder = write_checkpoint(
        tmp_path / family, family=family, layout="merged", geometry=geometry, dtype=torch.bfloat16
    )
    report = verify(folder, device="cuda", compare_dtype=True, lengths=[16, 512, 4096])
    assert report.passed, str(report)
    assert verify(folder, device="cuda", dtype=torch.float32, lengths=[16, 512]).passed
