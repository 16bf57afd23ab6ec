"""The demo: real text, honest about its weights, made once, quick."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jv5kernels import FastEncoder
from jv5kernels.cli import main
from jv5kernels.commands import demo
from jv5kernels.comparison import stdlib_texts
from jv5kernels.comparison.stdlib_texts import standard_library_texts


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder with the demo's checkpoint in it."""
    folder = tmp_path_factory.mktemp("cache")
    demo.demo_checkpoint(folder / "jv5kernels")
    return folder


@pytest.fixture(autouse=True)
def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_texts_are_the_same_every_time_and_of_mixed_lengths() -> None:
    documents = standard_library_texts()
    stdlib_texts._docstrings.cache_clear()
    assert documents == standard_library_texts()
    lengths = sorted(len(document.text) for document in documents)
    assert 200 <= len(documents) <= 400
    assert lengths[0] < 100 and lengths[len(lengths) // 2] < 500 and lengths[-1] > 4000
    assert len({document.text for document in documents}) == len(documents)


def test_checkpoint_is_made_once_and_completely(cache: Path, tmp_path: Path) -> None:
    folder = demo.demo_checkpoint()
    assert folder.parent == cache / "jv5kernels"
    before = (folder / "config.json").stat().st_mtime_ns
    assert demo.demo_checkpoint() == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name], (
        "leftovers beside the checkpoint"
    )
    assert set(FastEncoder(folder).tasks) == {
        "retrieval",
        "text-matching",
        "clustering",
        "classification",
    }


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        demo.demo_checkpoint(tmp_path / "file" / "cache")


def test_demo_prints_model_parity_speed_and_neighbours(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"line {i} " + "word " * (i % 5) for i in range(12)))
    assert main(["demo", "--text-file", str(texts), "--query", "line 3", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert "neighbours carry no meaning" in output
    parity = re.search(r"≥ ([\d.]+)", output)
    assert parity and float(parity[1]) > 0.99999
    for name in ("jv5kernels", "Transformers"):
        assert re.search(rf"^{name} +[\d,]+ +[\d.]+", output, flags=re.M), output
    assert len(re.findall(r"^ *-?[\d.]+ +texts\.txt:\d+ ", output, flags=re.M)) == demo.NEIGHBOURS


def test_neighbours_are_the_nearest(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("apples and pears\nthe exact words of the query\nsomething else\n")
    folder = demo.demo_checkpoint()
    result = demo.run(
        str(folder),
        text_file=texts,
        query="apples and pears",
        repeats=1,
        encoder_options={"device": "cpu"},
    )
    assert not result.random_weights
    scores = [score for score, _ in result.neighbours]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3


def test_empty_text_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["demo", "--text-file", str(tmp_path / "empty.txt")]) == 2
    assert "has no text" in capsys.readouterr().err


def test_large_models_get_fewer_texts_on_a_cpu() -> None:
    documents = standard_library_texts()
    encoder = FastEncoder(demo.demo_checkpoint(), device="cpu")
    few = demo.documents_for(encoder, documents)
    assert 0 < len(few) <= len(documents)
    object.__setattr__(encoder.spec, "num_layers", encoder.spec.num_layers * 20)
    fewer = demo.documents_for(encoder, documents)
    assert 0 < len(fewer) < len(few)
    assert set(fewer) <= set(documents)
