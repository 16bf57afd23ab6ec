"""Readers and writers of the command line: what is read, what is refused, what survives an interruption."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jv5kernels.commands.files import Corpus, EmbeddingFile, Record, blocks
from jv5kernels.commands.formats import FORMATS

DTYPES = ("float32", "float16", "int8", "uint8")


def records(count: int) -> Iterator[Record]:
    return iter([Record(row, f"text {row}") for row in range(count)])


def vectors(count: int, width: int = 5, dtype: str = "float32", first: int = 0) -> np.ndarray:
    """Rows that depend on their number, with values that decimal notation does not hold exactly."""
    values = np.random.default_rng(7).standard_normal((100, width))[first : first + count]
    return (values if "float" in dtype else (values * 40).clip(0, 100)).astype(dtype)


def read(path: Path) -> np.ndarray:
    """The embeddings of a finished file, read as a user would."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        return np.load(path)["embeddings"]
    if path.suffix == ".jsonl":
        return np.array([json.loads(line)["embedding"] for line in path.read_text().splitlines()])
    import pyarrow.parquet as pq

    column = pq.read_table(path).column("embedding").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), -1)


def write(
    path: Path, rows: int, *, dtype: str = "float32", block: int = 3, stop: int | None = None
):
    """Writes `rows` rows block by block, continuing what is there; stops before row `stop` if given."""
    out = EmbeddingFile(path, resume=True)
    out.require(model="m")
    source = records(rows)
    out.skip_complete(source)
    out.begin(5, dtype)
    for group in blocks(source, block, 10**6):
        if stop is not None and out.rows >= stop:
            out.close()
            return out
        out.append(group, vectors(len(group), dtype=dtype, first=out.rows))
    out.finish()
    return out


# Reading


def test_text_files_keep_empty_lines_and_ids_count_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\x0bstill two\n")
    (tmp_path / "b.txt").write_bytes("drei ü".encode())
    corpus = Corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    expected = [(0, "one"), (1, ""), (2, "two\x0bstill two"), (3, "drei ü")]
    assert [(r.id, r.text) for r in corpus] == expected


def test_compressed_json_lines_with_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = [{"id": "x", "body": "one"}, {"body": "two"}, {"id": 7, "body": ""}]
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    corpus = Corpus([str(path)], key="body")
    assert list(corpus) == [Record("x", "one"), Record(1, "two"), Record(7, "")]
    assert corpus.share_read == 1.0


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n')))
    corpus = Corpus(["-"], input_format="jsonl")
    assert list(corpus) == [Record(0, "a")]
    assert corpus.share_read is None


def test_share_read_grows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word\n" * 50_000)
    corpus = Corpus([str(path)])
    shares = [corpus.share_read for _ in corpus]
    assert shares == sorted(shares) and 0 < shares[0] < 0.2 and shares[-1] > 0.9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff\n", r"a\.txt:2: not UTF-8 \(byte 4"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not a line of JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: a JSON object is expected, not list"),
        (
            "a.jsonl",
            b'{"body": "a", "n": 1}\n',
            r"key 'text', found nothing; the keys are \['body'",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"key 'text', found int"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz: the gzip file is damaged"),
        ("a.txt.gz", gzip.compress(b"x" * 1000)[:-9], r"a\.txt\.gz: the gzip file is damaged"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(Corpus([str(tmp_path / name)]))


def test_bad_inputs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        Corpus([str(tmp_path / "none.txt")])
    with pytest.raises(IsADirectoryError, match="is a folder"):
        Corpus([str(tmp_path)])
    with pytest.raises(ValueError, match="given twice"):
        Corpus(["-", "-"])
    with pytest.raises(ValueError, match="allowed are"):
        Corpus(["-"], input_format="csv")


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 9), st.integers(1, 60))
def test_blocks_are_bounded_and_lose_nothing(lengths: list[int], size: int, limit: int) -> None:
    source = [Record(i, "x" * n) for i, n in enumerate(lengths)]
    result = list(blocks(source, size, limit))
    assert [r for block in result for r in block] == source
    for block in result:
        assert 1 <= len(block) <= size
        assert sum(len(r.text) for r in block[:-1]) < limit


# Writing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_round_trip_is_exact(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"out{suffix}"
    write(path, 8, dtype=dtype)
    np.testing.assert_array_equal(read(path).astype(dtype), vectors(8, dtype=dtype))
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "temporary files were left behind"


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_continuing_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    whole, stopped = tmp_path / f"whole{suffix}", tmp_path / f"stopped{suffix}"
    write(whole, 11)
    first = write(stopped, 11, stop=6)
    assert not stopped.exists() and first.part.exists()
    # What a killed process may have written after the last complete block.
    with open(first.part, "ab") as part:
        part.write(b"half a row")
    write(stopped, 11)
    if suffix == ".npz":  # the zip holds the time of writing
        assert np.array_equal(read(whole), read(stopped))
    else:
        assert whole.read_bytes() == stopped.read_bytes()


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_no_rows_give_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write(path, 0)
    if suffix == ".jsonl":
        assert path.read_bytes() == b""
    elif suffix == ".parquet":
        import pyarrow.parquet as pq

        assert pq.read_table(path).num_rows == 0
        assert pq.read_schema(path).field("embedding").type.list_size == 5
    else:
        assert read(path).shape == (0, 5) and read(path).dtype == np.float32


def test_npy_part_is_readable_while_it_grows(tmp_path: Path) -> None:
    out = write(tmp_path / "out.npy", 9, stop=6)
    np.testing.assert_array_equal(np.load(out.part, mmap_mode="r"), vectors(6))


def test_parquet_and_npz_carry_ids_and_run(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write(tmp_path / "out.parquet", 4)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column("id").to_pylist() == ["0", "1", "2", "3"]
    assert json.loads(table.schema.metadata[b"jv5kernels"]) == {"model": "m"}
    write(tmp_path / "out.npz", 4)
    assert json.loads(str(np.load(tmp_path / "out.npz")["run"])) == {"model": "m"}


def test_json_lines_keep_ids(tmp_path: Path) -> None:
    out = EmbeddingFile(tmp_path / "out.jsonl")
    out.begin(2, "float32")
    out.append([Record('a"ü', "x"), Record(5, "y")], np.ones((2, 2), np.float32))
    out.finish()
    lines = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ['a"ü', 5]


def test_a_run_that_differs_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    write(path, 9, stop=6)
    out = EmbeddingFile(path, resume=True)
    with pytest.raises(ValueError, match="model was 'm' and is now 'other'"):
        out.require(model="other")
    changed = iter([Record(0, "text 0"), *[Record(i, "changed") for i in range(1, 9)]])
    with pytest.raises(ValueError, match="first 6 texts of the input have changed"):
        EmbeddingFile(path, resume=True).skip_complete(changed)
    with pytest.raises(ValueError, match="has 2 texts, fewer"):
        EmbeddingFile(path, resume=True).skip_complete(records(2))
    out = EmbeddingFile(path, resume=True)
    out.skip_complete(records(9))
    with pytest.raises(ValueError, match="were 5 x float32 and are now 5 x float16"):
        out.begin(5, "float16")


def test_existing_files_are_not_replaced_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    write(path, 9, stop=6)
    with pytest.raises(FileExistsError, match="--resume"):
        EmbeddingFile(path)
    write(path, 9)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="--overwrite"):
            EmbeddingFile(path, resume=resume)
    out = EmbeddingFile(path, overwrite=True)
    out.begin(5, "float32")
    assert len(np.load(path)) == 9, "the old file stays until the new one is complete"
    out.finish()
    assert len(np.load(path)) == 0


def test_damaged_journals_are_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out.npy", 9, stop=6)
    journal = out.journal_path.read_text()
    out.journal_path.write_text(journal[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        EmbeddingFile(out.path, resume=True)
    out.journal_path.write_text("{}")
    with pytest.raises(ValueError, match="it lacks"):
        EmbeddingFile(out.path, resume=True)
    out.journal_path.write_text(journal)
    out.part.write_bytes(b"short")
    with pytest.raises(ValueError, match="shorter than its journal"):
        EmbeddingFile(out.path, resume=True)


def test_bad_targets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must end in one of \.jsonl"):
        EmbeddingFile(tmp_path / "out.csv")
    with pytest.raises(FileNotFoundError, match="no folder"):
        EmbeddingFile(tmp_path / "none" / "out.npy")
    monkeypatch.setattr("jv5kernels.commands.files.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jv5kernels\[parquet\]'"):
        EmbeddingFile(tmp_path / "out.parquet")


def test_wrong_blocks_are_refused(tmp_path: Path) -> None:
    out = EmbeddingFile(tmp_path / "out.npy")
    out.begin(5, "float32")
    for bad in (vectors(2, width=4), vectors(3), vectors(2, dtype="float16")):
        with pytest.raises(ValueError, match="expected"):
            out.append(list(records(2)), bad)
    assert out.rows == 0
