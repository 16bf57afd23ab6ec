"""Calibration and profiles on the command line: one file for corpus and queries, refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from jv5kernels import FastEncoder
from jv5kernels.calibration import Calibration
from jv5kernels.cli import main
from jv5kernels.commands.arguments import PROFILES as NAMED
from jv5kernels.storage import PROFILES
from jv5kernels.synthetic.checkpoint import write_checkpoint

TEXTS = [f"text {i}: " + "some words " * (i % 7) for i in range(30)]
GEOMETRY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "base"
    return str(write_checkpoint(folder, family="small", geometry=GEOMETRY, corpus=TEXTS))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS) + "\n", "utf-8")
    return path


def command(name: str, model: str, *arguments: object, task: str = "retrieval") -> int:
    words = [name, *map(str, arguments), "--model", model, "--task", task, "--device", "cpu"]
    return main(words)


def test_one_calibration_codes_corpus_and_queries(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranges = tmp_path / "ranges.json"
    assert command("calibrate", model, corpus, "-o", ranges, "--truncate-dim", 16) == 0
    assert (
        "ranges of 16 dimensions over 30 texts; exact minima and maxima" in capsys.readouterr().err
    )
    options = ["--truncate-dim", 16, "--precision", "int8", "--calibration", ranges]
    assert command("encode", model, corpus, "-o", tmp_path / "c.npy", *options) == 0
    query = ["--prompt-name", "query"]
    assert command("encode", model, corpus, "-o", tmp_path / "q.npy", *options, *query) == 0
    encoder = FastEncoder(model, device="cpu", task="retrieval", truncate_dim=16)
    calibration = Calibration.load(ranges)
    for name, floats in (
        ("c.npy", encoder.encode_document(TEXTS)),
        ("q.npy", encoder.encode_query(TEXTS)),
    ):
        expected = quantize_embeddings(floats, "int8", ranges=calibration.ranges)
        assert np.array_equal(np.load(tmp_path / name), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "c.npy",
        "corpus.txt",
        "q.npy",
        "ranges.json",
    ]


def test_percentiles_and_symmetric_ranges(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ranges.json"
    options = ["--percentile", 95, "--symmetric", "--prompt-name", "document"]
    assert command("calibrate", model, corpus, "-o", out, *options) == 0
    said = capsys.readouterr().err
    assert (
        "one symmetric range over 30 texts; percentiles 5 to 95" in said and "% of the val" in said
    )
    calibration = Calibration.load(out)
    assert calibration.percentile == 95 and calibration.symmetric
    assert (calibration.ranges == calibration.ranges[:, :1]).all()
    assert 0.02 < calibration.clip_rate < 0.15
    assert calibration.origin.prompt == "Document: "


def test_mistakes_take_one_line(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranges = tmp_path / "ranges.json"
    assert command("calibrate", model, corpus, "-o", ranges) == 0
    before = ranges.read_bytes()
    capsys.readouterr()

    def said(*arguments: object, **options: str) -> str:
        assert command(*arguments, **options) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "exists: replace it with --overwrite" in said("calibrate", model, corpus, "-o", ranges)
    nowhere = tmp_path / "nowhere" / "ranges.json"
    assert "there is no folder" in said("calibrate", model, corpus, "-o", nowhere)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "no text was given" in said("calibrate", model, empty, "-o", ranges, "--overwrite")
    assert "above 50 and below 100" in said(
        "calibrate", model, corpus, "-o", ranges, "--overwrite", "--percentile", 0.1
    )
    assert ranges.read_bytes() == before, "a failed run leaves the file alone"
    int8 = ["-o", tmp_path / "out.npy", "--precision", "int8", "--calibration", ranges]
    other = said("encode", model, corpus, *int8, task="clustering")
    assert "task='retrieval'" in other and "task='clustering'" in other
    assert "dim=32" in said("encode", model, corpus, *int8, "--truncate-dim", 16)
    assert "symmetric=True" in said("encode", model, corpus, *int8, "--profile", "usearch")
    assert command("calibrate", model, corpus, "-o", ranges, "--overwrite", "--symmetric") == 0
    assert command("encode", model, corpus, *int8, "--profile", "usearch") == 0


def test_profiles_are_written_and_recorded(model: str, corpus: Path, tmp_path: Path) -> None:
    floats = FastEncoder(model, device="cpu", task="retrieval").encode(TEXTS)
    for profile, order, dtype in (
        ("faiss", "little", np.uint8),
        ("vespa", "big", np.int8),
        ("pgvector", "big", np.uint8),
    ):
        out = tmp_path / f"{profile}.npz"
        options = ["--precision", "binary", "--profile", profile]
        assert command("encode", model, corpus, "-o", out, *options) == 0
        content = np.load(out)
        expected = np.packbits(floats > 0, axis=1, bitorder=order).view(dtype)
        assert content["embeddings"].dtype == dtype
        assert np.array_equal(content["embeddings"], expected)
        run = json.loads(str(content["run"]))
        assert run["profile"] == profile and run["precision"] == "binary"


def test_a_run_is_not_resumed_with_another_calibration_or_profile(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jv5kernels.commands.files import EmbeddingFile

    out = tmp_path / "out.npy"
    started = EmbeddingFile(out)
    same = {"task": "retrieval", "prompt_name": None, "prompt": None, "truncate_dim": None}
    started.require(**same, precision="binary", calibration=None, profile="faiss")
    started.begin(4, np.uint8)
    started.close()
    options = ["-o", out, "--precision", "binary", "--resume"]
    assert command("encode", model, corpus, *options, "--profile", "vespa") == 2
    assert "profile was 'faiss' and is now 'vespa'" in capsys.readouterr().err


def test_the_command_line_knows_every_profile() -> None:
    assert sorted(NAMED) == sorted(PROFILES)
