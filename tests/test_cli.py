"""The command line as a user meets it: files in, files out, one line for a mistake, nothing lost on Ctrl-C."""

from __future__ import annotations

import gzip
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jv5kernels import FastEncoder
from jv5kernels.cli import main
from jv5kernels.synthetic.checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"text {i}: " + "some words " * (i % 7) for i in range(23)] + ["", "  ", "ünïcödé 漢字"]
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
    """A tiny base checkpoint with its four adapters."""
    folder = tmp_path_factory.mktemp("model")
    return str(write_checkpoint(folder / "base", family="small", geometry=GEOMETRY, corpus=TEXTS))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS) + "\n", "utf-8")
    return path


def expected(model: str, texts: list[str] = TEXTS, **options: object) -> np.ndarray:
    return FastEncoder(model, device="cpu").encode(texts, **{"task": "retrieval", **options})


def encode(model: str, *arguments: object, task: str = "retrieval") -> int:
    words = ["encode", *map(str, arguments), "--model", model, "--task", task, "--device", "cpu"]
    return main(words)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Blocks are batched differently from one call, which may move the last bits."""
    return (a.astype(np.float64) * b).sum(1)


def read_parquet(path: Path) -> np.ndarray:
    import pyarrow.parquet as pq

    column = pq.read_table(path).column("embedding").combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), -1)


READERS = {
    ".npy": np.load,
    ".npz": lambda path: np.load(path)["embeddings"],
    ".jsonl": lambda path: np.array(
        [json.loads(line)["embedding"] for line in path.read_text().splitlines()]
    ),
    ".parquet": read_parquet,
}


@pytest.mark.parametrize("suffix", sorted(READERS))
def test_encode_gives_what_the_encoder_gives(
    model: str, corpus: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"out{suffix}"
    assert encode(model, corpus, "-o", out, "--block", 5) == 0
    found = READERS[suffix](out)
    assert found.shape == (len(TEXTS), 32)
    assert cosines(found, expected(model)).min() > 1 - 1e-6
    assert "26 embeddings of 32 float32" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.txt", out.name]


def test_encode_passes_its_options_on(model: str, tmp_path: Path) -> None:
    lines = [json.dumps({"body": text, "id": f"doc{i}"}) for i, text in enumerate(TEXTS)]
    source = tmp_path / "corpus.jsonl.gz"
    source.write_bytes(gzip.compress("\n".join(lines).encode()))
    out = tmp_path / "out.jsonl"
    options = ["--key", "body", "--prompt-name", "query", "--truncate-dim", 16]
    assert encode(model, source, "-o", out, *options, task="clustering") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"doc{i}" for i in range(len(TEXTS))]
    wanted = expected(model, task="clustering", prompt_name="query", truncate_dim=16)
    assert cosines(np.array([row["embedding"] for row in rows]), wanted).min() > 1 - 1e-6


def test_encode_packs_bits(model: str, corpus: Path, tmp_path: Path) -> None:
    assert encode(model, corpus, "-o", tmp_path / "out.npy", "--precision", "ubinary") == 0
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.uint8 and found.shape == (len(TEXTS), 4)
    wrong = np.unpackbits(found ^ expected(model, precision="ubinary")).sum()
    assert wrong <= 2, "bits differ beyond those of values at zero"


def test_encode_int8_needs_and_uses_ranges(
    model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (corpus, "-o", tmp_path / "out.npy", "--precision", "int8")
    assert encode(model, *arguments) == 2
    assert "needs --calibration FILE" in capsys.readouterr().err
    sample = expected(model)
    ranges = np.stack([sample.min(0), sample.max(0)])
    np.save(tmp_path / "ranges.npy", ranges)
    assert encode(model, *arguments, "--ranges", tmp_path / "ranges.npy") == 0
    wanted = expected(model, precision="int8", ranges=ranges)
    assert np.abs(np.load(tmp_path / "out.npy").astype(int) - wanted).max() <= 1


def test_encode_reads_standard_input(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"eins\nzwei")))
    assert encode(model, "-", "-o", tmp_path / "out.npy") == 0
    assert (
        cosines(np.load(tmp_path / "out.npy"), expected(model, ["eins", "zwei"])).min() > 1 - 1e-6
    )


def test_encode_of_nothing_gives_an_empty_array(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert encode(model, tmp_path / "empty.txt", "-o", tmp_path / "out.npy") == 0
    found = np.load(tmp_path / "out.npy")
    assert found.shape == (0, 32) and found.dtype == np.float32


def test_encode_counts_texts_that_were_cut(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "long.txt").write_text("many words " * 50 + "\nshort\n" + "more words " * 50)
    assert (
        encode(model, tmp_path / "long.txt", "-o", tmp_path / "o.npy", "--max-seq-length", 16) == 0
    )
    assert "2 texts were cut at 16 tokens" in capsys.readouterr().err
    assert not [w for w in recwarn if "longer than" in str(w.message)]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, blocks: int, error: BaseException) -> None:
    """Lets the encoder raise in the block after `blocks`; the first call, of no texts, is not a block."""
    original, calls = FastEncoder.encode, []

    def stopping(self: FastEncoder, inputs: list[str], **options: object) -> object:
        calls.append(inputs)
        if len(calls) > blocks + 1:
            raise error
        return original(self, inputs, **options)

    monkeypatch.setattr(FastEncoder, "encode", stopping)


@pytest.mark.parametrize("suffix", sorted(READERS))
def test_interrupted_encode_continues(
    model: str,
    corpus: Path,
    tmp_path: Path,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / f"out{suffix}"
    arguments = (corpus, "-o", out, "--block", 5)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3, KeyboardInterrupt())
        assert encode(model, *arguments) == 130
    stderr = capsys.readouterr().err
    assert "interrupted: 15 rows are complete" in stderr and "--resume" in stderr
    assert not out.exists()
    assert encode(model, *arguments) == 2, "an unfinished run must not be discarded unasked"
    assert "--resume" in capsys.readouterr().err
    assert encode(model, *arguments, "--resume") == 0
    assert "26 embeddings of 32 float32; 11 texts in" in capsys.readouterr().err
    assert cosines(READERS[suffix](out), expected(model)).min() > 1 - 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--truncate-dim", 8], "truncate_dim was None and is now 8"),
        (["--prompt-name", "query"], "prompt_name was None and is now 'query'"),
        (["--max-seq-length", 9], "max_seq_length was"),
        (["--dtype", "bfloat16"], "dtype was 'float32' and is now 'bfloat16'"),
    ],
)
def test_resume_refuses_other_options(
    model: str,
    corpus: Path,
    tmp_path: Path,
    change: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (corpus, "-o", tmp_path / "out.npy", "--block", 5)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2, KeyboardInterrupt())
        encode(model, *arguments)
    capsys.readouterr()
    assert encode(model, *arguments, "--resume", *change) == 2
    assert message in capsys.readouterr().err
    assert encode(model, *arguments, "--resume") == 0, "a refusal must leave the run as it was"


def test_a_bad_line_keeps_what_is_complete(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b"}\n{"text": 3}\n')
    assert encode(model, source, "-o", tmp_path / "out.npy", "--block", 1) == 2
    stderr = capsys.readouterr().err
    assert "corpus.jsonl:3: a string is expected" in stderr and "2 rows are complete" in stderr
    source.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    assert encode(model, source, "-o", tmp_path / "out.npy", "--resume") == 0
    assert len(np.load(tmp_path / "out.npy")) == 3


def test_ctrl_c_in_mid_stream(model: str, tmp_path: Path) -> None:
    """A real process on an open pipe: blocks are written while input is still coming, SIGINT loses none."""
    out = tmp_path / "out.npy"
    command = [sys.executable, "-m", "jv5kernels", "encode", "-", "-o", str(out), "--block", "2"]
    command += ["--model", model, "--task", "retrieval", "--device", "cpu"]
    # A background job of a shell ignores SIGINT, and so would its children.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, handler)
    assert process.stdin and process.stderr
    process.stdin.write(b"one\ntwo\nthree\n")
    process.stdin.flush()
    journal = tmp_path / "out.npy.part.json"
    deadline = time.monotonic() + 60
    while not (journal.exists() and json.loads(journal.read_text())["rows"] == 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    stderr = process.stderr.read().decode()
    assert "2 rows are complete" in stderr and "Traceback" not in stderr
    (tmp_path / "all.txt").write_text("one\ntwo\nthree\n")
    assert encode(model, tmp_path / "all.txt", "-o", out, "--resume") == 0
    assert cosines(np.load(out), expected(model, ["one", "two", "three"])).min() > 1 - 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.txt", "-o", "o.npy"], "there is no file none.txt"),
        (["in.txt", "-o", "o.csv"], "must end in one of"),
        (["in.txt", "-o", "in.npy"], "exists: replace it with --overwrite"),
        (["in.txt", "-o", "o.npy", "--task", "haiku"], "retrieval"),
        (["in.txt", "-o", "o.npy", "--prompt-name", "nobody"], "query"),
        (["in.txt", "-o", "o.npy", "--truncate-dim", "999"], "32"),
        (["in.txt", "-o", "o.npy", "--model", "/no/such/folder"], "/no/such/folder"),
        (["in.txt", "-o", "o.npy", "--device", "tpu"], "tpu"),
        (["in.txt", "-o", "o.npy", "--max-seq-length", "99999999"], "max_seq_length"),
    ],
)
def test_mistakes_take_one_line(
    model: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("text\n")
    Path("in.npy").touch()
    before = sorted(tmp_path.iterdir())
    defaults = ["--model", model, "--task", "retrieval", "--device", "cpu"]
    given = [
        word
        for pair in zip(defaults[::2], defaults[1::2], strict=True)
        if pair[0] not in arguments
        for word in pair
    ]
    assert main(["encode", *arguments, *given]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.count("\n") == 1, stderr
    assert stderr.startswith("jv5kernels encode: error: ")
    assert sorted(tmp_path.iterdir()) == before, "a mistake must leave no files"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError):
        main(["encode", "none.txt", "-o", "o.npy", "--model", "m", "--debug"])


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch, model: str, corpus: Path) -> None:
    interrupt_after(monkeypatch, 0, AttributeError("a bug"))
    with pytest.raises(AttributeError, match="a bug"):
        encode(model, corpus, "-o", corpus.with_name("out.npy"))


def test_verify_passes_and_writes_json(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    words = ["verify", model, "--task", "retrieval", "--lengths", "16", "40", "--device", "cpu"]
    assert main([*words, "--json", str(path)]) == 0
    assert "retrieval" in capsys.readouterr().out
    assert json.loads(path.read_text())["passed"] is True


def test_verify_exits_with_1_on_a_missed_threshold(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"some text {i}" for i in range(12)))
    words = ["verify", model, "--task", "retrieval", "--text-file", str(tmp_path / "texts.txt")]
    words += ["--device", "cpu", "--json"]
    assert main([*words, "--dtype", "bfloat16", "--min-cosine", "0.99999999"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    assert main([*words, "--dtype", "float32"]) == 0


def test_bench_compares_and_agrees(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--model", model, "--repeats", "1", "--batch-sizes", "16", "--device", "cpu"]
    assert main([*words, "--max-seq-length", "64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in result["results"]] == [
        "jv5kernels",
        "Transformers",
        "Sentence Transformers",
    ]
    assert result["agrees"] and min(r["cosine_min"] for r in result["results"]) > 0.99999
    assert all(r["tokens_per_second"] > 0 for r in result["results"])


def test_bench_gives_no_speed_when_results_differ(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = FastEncoder.encode
    monkeypatch.setattr(FastEncoder, "encode", lambda self, texts, **o: -original(self, texts, **o))
    words = ["bench", "--model", model, "--repeats", "1", "--batch-sizes", "16", "--device", "cpu"]
    assert main([*words, "--max-seq-length", "64"]) == 1
    output = capsys.readouterr()
    assert "disagree" in output.err and "tokens/s" not in output.out
