"""The report: metrics against slow definitions, rankings that a store would give, a picture, a table and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from jv5kernels.cli import main
from jv5kernels.commands import report
from jv5kernels.retention import PRECISIONS, Point, default_dims, measure, ndcg, overlap
from jv5kernels.synthetic.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"{'abcdefgh'[i % 8] * (i % 5 + 1)} text number {i * i}" for i in range(40)]


def clustered(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Vectors whose first dimensions carry most, as after Matryoshka training."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, dim)) * np.linspace(2, 0.2, dim)).astype(np.float32)


def slow_ndcg(reference: np.ndarray, found: np.ndarray) -> float:
    scores = []
    for wanted, got in zip(reference.tolist(), found.tolist(), strict=True):
        gain = {document: 10 - rank for rank, document in enumerate(wanted)}
        reached = sum(gain.get(d, 0) / np.log2(rank + 2) for rank, d in enumerate(got))
        best = sum((10 - rank) / np.log2(rank + 2) for rank in range(10))
        scores.append(reached / best)
    return float(np.mean(scores))


def test_metrics_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    reference = np.stack([rng.permutation(30)[:10] for _ in range(20)])
    found = np.stack([rng.permutation(30)[:10] for _ in range(20)])
    pairs = zip(reference.tolist(), found.tolist(), strict=True)
    assert overlap(reference, found) == pytest.approx(
        np.mean([len({*a} & {*b}) / 10 for a, b in pairs])
    )
    assert ndcg(reference, found) == pytest.approx(slow_ndcg(reference, found))
    assert overlap(reference, reference) == ndcg(reference, reference) == 1.0
    swapped = reference[:, ::-1]
    assert overlap(reference, swapped) == 1.0 > ndcg(reference, swapped) > 0.5
    assert overlap(reference, reference + 100) == ndcg(reference, reference + 100) == 0.0


def test_points_are_what_a_plain_search_finds() -> None:
    documents, queries = clustered(300, 64), clustered(100, 64, seed=1)
    found = {(p.precision, p.dim, p.rescored): p for p in measure(documents, queries, [64, 24])}

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    reference = np.argsort(-(unit(queries) @ unit(documents).T), axis=1)[:, :10]
    cut_queries, cut = unit(queries[:, :24]), unit(documents[:, :24])
    by_floats = np.argsort(-(cut_queries @ cut.T), axis=1)[:, :10]
    assert found["float32", 24, False].overlap == pytest.approx(overlap(reference, by_floats))
    bits = [np.packbits(x > 0, axis=1) for x in (cut_queries, cut)]
    hamming = np.unpackbits(bits[0][:, None] ^ bits[1][None], axis=2).sum(2).astype(int)
    candidates = np.argsort(hamming, axis=1, kind="stable")[:, :40]
    assert found["binary", 24, False].overlap == pytest.approx(
        overlap(reference, candidates[:, :10])
    )
    rescored = []
    for query, rows in zip(cut_queries, candidates, strict=True):
        signs = 2.0 * np.unpackbits(bits[1][rows], axis=1, count=24) - 1
        rescored.append(rows[np.argsort(-(signs @ query), kind="stable")][:10])
    assert found["binary", 24, True].ndcg == pytest.approx(
        slow_ndcg(reference, np.stack(rescored)), abs=2e-3
    )
    step = np.abs(cut).max() / 127
    codes = [np.clip(np.floor(x / step + 0.5), -128, 127) for x in (cut_queries, cut)]
    by_codes = np.argsort(-(codes[0] @ codes[1].T), axis=1, kind="stable")[:, :10]
    assert found["int8", 24, False].overlap == pytest.approx(
        overlap(reference, by_codes), abs=0.005
    )


def test_what_is_kept_falls_with_the_bytes() -> None:
    documents = clustered(400, 64)
    found = {
        (p.precision, p.dim, p.rescored): p
        for p in measure(documents, documents[:80], [64, 32], same=True)
    }
    assert found["float32", 64, False].overlap == found["float32", 64, False].ndcg == 1.0
    for rescored in (False, True):
        assert found["int8", 64, rescored].overlap > 0.95
    for dim in (64, 32):
        plain, better = (found["binary", dim, r].overlap for r in (False, True))
        assert plain < better < found["binary + int8", dim, True].overlap
        assert found["binary", dim, True].bytes == dim // 8
    # Not so for bits: the weak last dimensions count as much there as the strong first ones.
    for precision in ("float32", "float16", "int8"):
        assert found[precision, 32, False].overlap < found[precision, 64, False].overlap


def test_a_text_is_not_its_own_neighbour() -> None:
    documents = clustered(30, 16)
    points = measure(documents, documents, [16], same=True)
    assert points[0].overlap == 1.0
    with pytest.raises(ValueError, match="10 texts are too few: a ranking has 10 hits"):
        measure(documents[:10], documents[:10], [16], same=True)
    with pytest.raises(ValueError, match="dimension 17 is out of range"):
        measure(documents, documents, [17])


def test_bytes_and_dimensions() -> None:
    assert default_dims(1024) == [1024, 512, 256, 128, 64, 32]
    assert default_dims(768) == [768, 384, 192, 96, 48] and default_dims(20) == [20]
    assert {name: size(100) for name, size in PRECISIONS.items()} == {
        "float32": 400,
        "float16": 200,
        "int8": 100,
        "binary + int8": 113,
        "binary": 13,
    }
    # The smallest forms are as small as Sentence Transformers'.
    one = np.ones((1, 100), np.float32)
    assert quantize_embeddings(one, "ubinary").nbytes == PRECISIONS["binary"](100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("model") / "base", family="small"))


def test_the_command_draws_prints_and_writes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pip install -e '.[report]'")
    corpus, queries = tmp_path / "corpus.jsonl", tmp_path / "queries.txt"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    queries.write_text("a text\nanother text\n")
    picture, values = tmp_path / "kept.png", tmp_path / "kept.json"
    words = ["report", corpus, "--model", model, "--device", "cpu", "-o", picture, "--json", values]
    assert main([*map(str, words), "--dims", "64", "32", "--queries", str(queries)]) == 0
    out = capsys.readouterr().out
    assert "float32" in out and "binary + int8" in out and "100.0 %" in out
    content = json.loads(values.read_text())
    assert content["documents"] == 40 and content["queries"] == 2
    assert len(content["points"]) == 2 * 7
    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    # Every series is drawn in its colour.
    for colour in report.COLOURS.values():
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(pixels[..., :3] - wanted).max(2) < 0.02).sum() > 100, colour


def test_points_say_what_the_encoder_gives(model: str) -> None:
    found = report.run(model, dims=[64], encoder_options={"device": "cpu"})
    assert isinstance(found.points[0], Point) and found.task == "retrieval"
    best = {(p.precision, p.rescored): p.overlap for p in found.points}
    assert best["float32", False] == 1.0 and best["float16", False] > 0.98
    assert 0.1 < best["binary", False] <= 1.0


def test_mistakes_are_told_before_anything_is_encoded(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(*words: object) -> str:
        assert main(["report", "--model", model, *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "must end in .png" in attempt("-o", tmp_path / "kept.pdf")
    assert "there is no folder" in attempt("-o", tmp_path / "nowhere" / "kept.png")
    assert "there is no file" in attempt(tmp_path / "none.txt", "-o", tmp_path / "kept.png")
    monkeypatch.setattr("jv5kernels.commands.report.find_spec", lambda name: None)
    assert "pip install 'jv5kernels[report]'" in attempt("-o", tmp_path / "kept.png")
