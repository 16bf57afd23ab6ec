"""`jv5kernels info`: complete, true, and working where things are missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jv5kernels import FastEncoder
from jv5kernels.cli import main
from jv5kernels.commands import info
from jv5kernels.ops.registry import OPERATORS
from jv5kernels.synthetic.checkpoint import write_checkpoint


def test_every_operator_names_its_implementation_and_speaks_to_every_other() -> None:
    facts = info.collect()
    device = torch.device(facts["device"]["type"])
    assert set(facts["operators"]) == set(OPERATORS)
    for name, entry in facts["operators"].items():
        operator = OPERATORS[name]
        assert entry["uses"] == operator.choose_name("auto", device)
        assert {entry["uses"], *entry["others"]} == set(operator.implementations)


def test_json_on_standard_output_and_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["versions"]["torch"] == torch.__version__
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 0
    assert json.loads((tmp_path / "info.json").read_text())["operators"] == printed["operators"]
    assert "Operators on" in capsys.readouterr().out


def test_missing_things_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "find_spec", lambda name: None)
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    monkeypatch.setattr(info.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    facts = info.collect()
    assert len(facts["triton"]["missing"]) == 3
    assert facts["extension"]["built"] is False
    assert main(["info"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "missing: the package triton, a C compiler" in output
    assert "not built; torch does its work" in output


def test_an_operator_that_cannot_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS["rms_norm"]
    monkeypatch.setitem(OPERATORS, "rms_norm", operator)
    monkeypatch.setattr(type(operator), "choose_name", _refuse)
    entry = info.collect()["operators"]["rms_norm"]
    assert entry["uses"] is None and entry["why_none"] == "no way"
    assert set(entry["others"]) == set(operator.implementations)


def _refuse(*_: object) -> str:
    raise ValueError("no way")


def test_memory_formula_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    geometry = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    geometry |= {"num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 48}
    folder = write_checkpoint(tmp_path / "model", geometry=geometry, corpus=["some words"] * 9)
    assert main(["info", "--model", str(folder), "--device", "cpu"]) == 0
    memory = FastEncoder(folder, device="cpu").memory_model()
    base = memory.weights + memory.fixed
    assert f"bytes = {base:,} + {memory.per_token:,} * tokens" in capsys.readouterr().out
