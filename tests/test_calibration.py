"""Calibration: streaming percentiles against numpy, a file that fits one model alone, int8 codes that agree."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers.util import quantize_embeddings

from jv5kernels.calibration import Calibration, Origin
from jv5kernels.calibrator import BINS, ZERO, Calibrator, _bins, _edges

LEAST_MAGNITUDE = 2.0**-16


def measured(embeddings: np.ndarray, batches: int = 3) -> Calibrator:
    calibrator = Calibrator(embeddings.shape[1], histogram=True)
    for batch in np.array_split(embeddings, batches):
        calibrator.add(batch)
    return calibrator


def unit_vectors(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    """Vectors whose dimensions have different means and spreads, a few of them extreme, one constant."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, dim)) * rng.gamma(1.0, size=dim) + rng.normal(size=dim)
    x[rng.integers(rows, size=3), rng.integers(dim, size=3)] *= 50
    x[:, 1] = 0.0
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.floats(50.01, 99.99),
)
def test_percentiles_are_those_of_numpy_to_one_bin(values: list[float], percentile: float) -> None:
    column = np.array(values, np.float32)[:, None]
    found = measured(column, batches=1).ranges(percentile)
    shares = (100 - percentile) / 100, percentile / 100
    exact = np.quantile(column.astype(np.float64), shares, axis=0)
    ordered = np.sort(column[:, 0].astype(np.float64))
    for side in (0, 1):
        # Both neighbours in rank are known to one bin, and so is every point between them.
        position = (len(ordered) - 1) * shares[side]
        neighbours = ordered[[int(position), min(int(position) + 1, len(ordered) - 1)]]
        bins = _bins(neighbours.astype(np.float32))
        edges = _edges(column.min(0), column.max(0))[0]
        width = max(edges[bins + 1] - edges[bins])
        slack = 1e-6 * np.abs(neighbours).max()
        assert abs(found[side, 0] - exact[side, 0]) <= width + slack


@pytest.mark.parametrize("percentile", [90, 99, 99.9])
def test_percentiles_of_a_corpus_are_those_of_numpy_to_a_hundredth(percentile: float) -> None:
    embeddings = unit_vectors(5000, 32)
    found = measured(embeddings).ranges(percentile)
    exact = np.quantile(embeddings, [1 - percentile / 100, percentile / 100], axis=0)
    np.testing.assert_allclose(found, exact, rtol=1 / 128, atol=2 * LEAST_MAGNITUDE)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_value_lies_in_its_bin(value: float) -> None:
    x = np.array([value], np.float32)
    edges = _edges(np.array([-np.inf]), np.array([np.inf]))[0]
    index = int(_bins(x)[0])
    assert 0 <= index < BINS and edges[index] <= x[0] <= edges[index + 1]
    if LEAST_MAGNITUDE <= abs(value) < 256:
        assert edges[index + 1] - edges[index] <= abs(value) / 128
    if abs(value) < LEAST_MAGNITUDE:
        assert index == ZERO


def test_minima_and_maxima_are_exact() -> None:
    embeddings = unit_vectors(400, 17)
    calibrator = measured(embeddings)
    assert np.array_equal(calibrator.ranges(), np.stack([embeddings.min(0), embeddings.max(0)]))
    assert calibrator.clip_rate(calibrator.ranges()) == 0.0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("percentile", [None, 99.5])
def test_order_and_batches_do_not_change_a_bit(percentile: float | None, symmetric: bool) -> None:
    embeddings = unit_vectors(997, 24)
    expected = measured(embeddings, 1).ranges(percentile, symmetric=symmetric)
    shuffled = np.random.default_rng(1).permutation(embeddings)
    for batches in (2, 31, 997):
        found = measured(shuffled, batches).ranges(percentile, symmetric=symmetric)
        assert np.array_equal(found, expected)


def test_memory_does_not_grow_with_the_corpus() -> None:
    calibrator = measured(unit_vectors(10, 8))
    size = sum(v.nbytes for v in vars(calibrator).values() if isinstance(v, np.ndarray))
    calibrator.add(unit_vectors(20_000, 8))
    arrays = [v for v in vars(calibrator).values() if isinstance(v, np.ndarray)]
    assert sum(v.nbytes for v in arrays) == size == 8 * BINS * 8 + 2 * 8 * 4
    assert calibrator.count == 20_010


def test_values_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = unit_vectors(300, 8)
    expected = measured(embeddings).counts
    monkeypatch.setattr("jv5kernels.calibrator.COUNT_VALUES", 50)
    assert np.array_equal(measured(embeddings, 1).counts, expected)


def test_clip_rate_is_the_share_of_codes_that_saturate() -> None:
    embeddings = unit_vectors(20_000, 16)
    calibrator = measured(embeddings)
    ranges = calibrator.ranges(99.0)
    step = (ranges[1] - ranges[0]) / 255
    exact = ((embeddings < ranges[0]) | (embeddings > ranges[1] + step)).mean()
    assert 0.005 < exact < 0.02
    assert calibrator.clip_rate(ranges) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("percentile", [None, 99.9])
def test_symmetric_codes_are_rounded_multiples_of_one_step(percentile: float | None) -> None:
    embeddings = unit_vectors(3000, 32)
    ranges = measured(embeddings).ranges(percentile, symmetric=True)
    step = (ranges[1, 0] - ranges[0, 0]) / 255
    assert (ranges == ranges[:, :1]).all()
    codes = quantize_embeddings(embeddings, "int8", ranges=ranges).astype(int)
    exact = np.clip(np.floor(embeddings / step + 0.5), -128, 127).astype(int)
    assert (codes != exact).mean() < 1e-4 and np.abs(codes - exact).max() <= 1
    if percentile is None:
        assert np.abs(codes).max() == 127


def test_codes_of_a_symmetric_calibration_rank_like_the_vectors() -> None:
    """Why stores that compare codes need it: per-dimension steps and offsets change the order."""
    embeddings = unit_vectors(600, 64)
    best = np.argsort(-(embeddings[:50] @ embeddings.T), axis=1)[:, :10]

    def overlap(symmetric: bool) -> float:
        ranges = measured(embeddings).ranges(99.9, symmetric=symmetric)
        codes = quantize_embeddings(embeddings, "int8", ranges=ranges).astype(np.float64)
        codes /= np.linalg.norm(codes, axis=1, keepdims=True)
        found = np.argsort(-(codes[:50] @ codes.T), axis=1)[:, :10]
        return float(np.mean([len({*a} & {*b}) / 10 for a, b in zip(best, found, strict=True)]))

    assert overlap(symmetric=True) > 0.9 > overlap(symmetric=False) + 0.1


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="no text was given"):
        Calibrator(3).ranges()
    with pytest.raises(ValueError, match=r"shape \(N, 3\), not \(2, 4\)"):
        Calibrator(3).add(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="NaN or Inf"):
        Calibrator(1).add(np.array([[np.nan]], np.float32))
    plain = Calibrator(1)
    plain.add(np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match="need Calibrator\\(histogram=True\\)"):
        plain.ranges(99.0)
    for percentile in (50, 100, -1):
        with pytest.raises(ValueError, match="above 50 and below 100"):
            plain.ranges(percentile)


# The artefact.

ORIGIN = Origin(
    model="org/model",
    revision="abc",
    weights="0123456789abcdef",
    task="retrieval",
    prompt="Document: ",
    pooling="lasttoken",
    dim=4,
    normalize=True,
)


def artefact(**changes: object) -> Calibration:
    values = {
        "origin": ORIGIN,
        "ranges": np.array([[-0.1, -1 / 3, 0, 1e-30], [0.1, 0.7, 0, 2e-30]], np.float32),
        "percentile": 99.9,
        "symmetric": False,
        "count": 1000,
        "clip_rate": 0.002,
        "dtype": "bfloat16",
    }
    return Calibration(**{**values, **changes})


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    artefact().save(path)
    loaded = Calibration.load(path)
    assert loaded.ranges.dtype == np.float32
    assert loaded.ranges.tobytes() == artefact().ranges.tobytes()
    for name in ("origin", "percentile", "symmetric", "count", "clip_rate", "dtype", "package"):
        assert getattr(loaded, name) == getattr(artefact(), name)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first, "the same calibration is the same file"
    assert [p.name for p in tmp_path.iterdir()] == ["ranges.json"]


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ranges.json"
    artefact().save(path)
    before = path.read_bytes()

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("jv5kernels.calibration.os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        artefact(count=7).save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_reader_never_meets_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    artefact().save(path)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            artefact().save(path)

    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(100):
        Calibration.load(path)
    stop.set()
    thread.join()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "something"}, "is not a calibration"),
        ({"version": 2}, "version 2; this package reads version 1"),
        ({"minima": [0.0]}, "damaged"),
        ({"minima": [1.0] * 4}, "damaged.*ranges do not fit"),
        ({"maxima": [float("inf")] * 4}, "damaged"),
        ({"origin": {}}, "damaged"),
        ({"count": None, "origin": None}, "damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "ranges.json"
    artefact().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Calibration.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "fedcba98"}, "model='org/model', weights='01234567'.*weights='fedcba98'"),
        ({"revision": "def"}, "revision='abc'.*revision='def'"),
        ({"task": "clustering"}, "task='retrieval'.*task='clustering'"),
        ({"prompt": "Passage: "}, "prompt='Document: '.*prompt='Passage: '"),
        ({"dim": 8}, "dim=4.*dim=8"),
        ({"pooling": "mean"}, "pooling='lasttoken'.*pooling='mean'"),
        ({"normalize": False}, "normalize=True.*normalize=False"),
    ],
)
def test_another_origin_is_an_error_that_says_both_sides(change: dict, message: str) -> None:
    other = Origin(**{**vars(ORIGIN), **change})
    with pytest.raises(ValueError, match=message):
        artefact().check(other, "Query: ")


def test_queries_share_the_ranges_of_documents_but_not_the_reverse() -> None:
    queries = Origin(**{**vars(ORIGIN), "prompt": "Query: "})
    artefact().check(ORIGIN, "Query: ")
    artefact().check(queries, "Query: ")
    with pytest.raises(ValueError, match="prompt='Query: '.*prompt='Document: '"):
        artefact(origin=queries).check(ORIGIN, "Query: ")


def test_a_copy_under_another_name_is_the_same_model() -> None:
    artefact().check(Origin(**{**vars(ORIGIN), "model": "/some/folder", "revision": None}))
