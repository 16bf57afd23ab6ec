"""The demo: texts of the user or of every machine, their neighbours, parity, speed, and what small forms keep."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch

from jv5kernels import FastEncoder
from jv5kernels.cli import main
from jv5kernels.commands import demo
from jv5kernels.comparison import stdlib_texts
from jv5kernels.comparison.stdlib_texts import standard_library_texts
from jv5kernels.packaged import PACKAGED

TEXTS = [
    "a text editor with syntax highlighting",
    "a player for music files",
    "a web browser",
    "an e-mail client",
    "tools to compress files",
    "a chess program",
    "a compiler for the C language",
    "a database server",
    "fonts for Arabic",
    "a viewer for PDF documents",
    "a calculator with many functions",
    "backups over the network",
]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(["", *TEXTS, "   "]))
    return path


@pytest.fixture
def one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CPU_COMPARED_MULTIPLY_ADDS", 2e9)


def test_texts_are_the_same_every_time_and_of_mixed_lengths() -> None:
    documents = standard_library_texts()
    stdlib_texts._docstrings.cache_clear()
    assert documents == standard_library_texts()
    lengths = sorted(len(document.text) for document in documents)
    assert 200 <= len(documents) <= 400
    assert lengths[0] < 100 and lengths[len(lengths) // 2] < 500 and lengths[-1] > 4000
    assert len({document.text for document in documents}) == len(documents)


def test_a_cpu_takes_an_even_selection() -> None:
    encoder = FastEncoder(PACKAGED, device="cpu")
    documents = standard_library_texts()
    assert demo.documents_for(encoder, documents, 1e18) == documents
    few = demo.documents_for(encoder, documents, 1e10)
    assert few == documents[:: documents.index(few[1])] and 1 < len(few) < len(documents) / 4


def test_the_demo_shows_answers_parity_speed_and_what_is_kept(
    texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", str(texts), "--query", "play songs", "--query", "chess", "--device", "cpu"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert re.search(rf"^Model +{PACKAGED} *$", output, flags=re.M)
    assert re.search(rf"^Texts +12 texts of {re.escape(str(texts))} *$", output, flags=re.M)
    parity = re.search(r"fp32 ≥ ([\d.]+) over 12 texts: agrees", output)
    assert parity and float(parity[1]) >= 0.999999
    for query, best in (("play songs", TEXTS[1]), ("chess", TEXTS[5])):
        assert re.search(rf"^Nearest to '{query}' *\n[\d.]+ +\d+ +{best} *$", output, flags=re.M), (
            output
        )
    for name in ("jv5kernels", "Transformers"):
        assert re.search(rf"^{name} +[\d,]+ +[\d.]+", output, flags=re.M), output
    for form, size in (("float32", "1,536"), ("int8, rescored", "384"), ("binary", "48")):
        assert re.search(rf"^{form} +384 +{size} +[\d.]+ % +[\d.]+ %", output, flags=re.M), output
    assert re.search(r"^binary, rescored +128 +16 ", output, flags=re.M), output


def test_without_inputs_the_standard_library_is_searched(one_run: None) -> None:
    result = demo.run(repeats=1, encoder_options={"device": "cpu"})
    assert result.model == PACKAGED and result.agrees
    assert [query for query, _ in result.answers] == list(demo.QUERIES)
    about = ("gzip zipfile tarfile zipapp bz2 lzma zlib shutil", "email smtplib mailbox", "thread")
    for (query, found), names in zip(result.answers, about, strict=True):
        scores = [score for score, _ in found]
        assert scores == sorted(scores, reverse=True) and len(scores) == demo.NEIGHBOURS
        where = " ".join(f"{document.name} {document.text}" for _, document in found).lower()
        assert any(name in where for name in names.split()), (query, where)
    kept = {(point.dim, point.precision, point.rescored): point.overlap for point in result.kept}
    assert kept[384, "float32", False] == 1.0
    assert kept[384, "int8", True] > 0.9
    assert kept[384, "int8", True] > kept[384, "binary", True] > kept[384, "binary", False] > 0.4


def test_standard_input_and_json_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
    assert main(["demo", "-", "--query", "browse the web", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "12 texts of standard input" in output
    assert re.search(rf"Nearest to 'browse the web' *\n[\d.]+ +\d+ +{TEXTS[2]}", output)
    lines = tmp_path / "few.jsonl"
    lines.write_text('{"id": "x", "body": "a small tool"}\n{"id": "y", "body": "a large tool"}\n')
    assert main(["demo", str(lines), "--key", "body", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    # Without a query the first text looks for its neighbours; two texts have no ten nearest.
    assert re.search(r"Nearest to 'a small tool' *\n[\d.]+ +x +a small tool", output)
    assert "ten nearest" not in output


def test_another_model_and_half_precision(texts: Path, one_run: None) -> None:
    result = demo.run(
        PACKAGED,
        inputs=[str(texts)],
        repeats=1,
        encoder_options={"device": "cpu", "dtype": torch.bfloat16},
    )
    # Timed against Transformers in bfloat16; parity is to fp32 all the same, of one text at a time.
    assert result.comparison.dtype == "bfloat16"
    assert result.agrees and result.parity_threshold <= result.parity < 0.9999999


@pytest.mark.parametrize(
    ("content", "message"), [("\n\n", "there is no text"), (None, "there is no file")]
)
def test_inputs_without_text_are_refused(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.txt"
    if content is not None:
        path.write_text(content)
    assert main(["demo", str(path)]) == 2
    assert message in capsys.readouterr().err
