"""A whole corpus from files to one file of embeddings: the work of ``jv5kernels encode``."""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jv5kernels.commands.files import Corpus, EmbeddingFile, blocks

if TYPE_CHECKING:
    from jv5kernels.encoder import FastEncoder

__all__ = ["BLOCK_TEXTS", "Job", "Meter", "encode_corpus", "quiet_about_truncation"]

# A block is what an interruption can cost: seconds on a GPU, about a minute on a CPU.
BLOCK_TEXTS = {"cuda": 8192, "cpu": 512}
# A block closes early at this many characters, so that long texts do not fill the memory.
BLOCK_CHARACTERS = 16_000_000
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class Job:
    """What to encode with which options.

    Args:
        corpus: the texts.
        out: where the embeddings go.
        encoder: keyword arguments of FastEncoder, ``model`` among them.
        call: keyword arguments of FastEncoder.encode; ``ranges`` may be a path to a .npy file, ``calibration`` a path.
        block: texts a block; None: by device.
        progress: show how far it is, on standard error.
    """

    corpus: Corpus
    out: EmbeddingFile
    encoder: dict[str, Any]
    call: dict[str, Any]
    block: int | None = None
    progress: bool = True


def encode_corpus(job: Job) -> str:
    """Encodes a corpus into its file and returns one line that says what was done.

    Raises:
        Whatever reading, writing and FastEncoder raise, and KeyboardInterrupt; complete blocks stay
        and can be continued.
    """
    try:
        with quiet_about_truncation():
            return _run(job)
    finally:
        job.out.close()


def _run(job: Job) -> str:
    from jv5kernels.encoder import FastEncoder

    out = job.out
    call = dict(job.call)
    ranges, calibration = call.pop("ranges", None), call.get("calibration")
    files = {"ranges": ranges, "calibration": calibration}
    digests = {name: _file_digest(file) if file else None for name, file in files.items()}
    out.require(**{**call, **digests})
    records = iter(job.corpus)
    out.skip_complete(records)
    encoder = FastEncoder(**job.encoder)
    out.require(**_identity(encoder))
    if ranges:
        call["ranges"] = np.load(ranges)
    empty = encoder.encode([], **call)
    out.begin(empty.shape[1], empty.dtype)
    before, start = out.rows, time.perf_counter()
    size = job.block or BLOCK_TEXTS[encoder.device.type]
    with Meter(job.corpus, job.progress) as meter:
        for block in blocks(records, size, BLOCK_CHARACTERS):
            out.append(block, encoder.encode([record.text for record in block], **call))
            meter.show(out.rows, out.rows - before, encoder.statistics.tokens)
    out.finish()
    seconds = time.perf_counter() - start
    return _summary(out, encoder, out.rows - before, seconds)


def _summary(out: EmbeddingFile, encoder: FastEncoder, rows: int, seconds: float) -> str:
    line = (
        f"{out.path}: {out.rows:,} embeddings of {out.width} {out.dtype.name}; "
        f"{rows:,} texts in {seconds:.1f} s, {encoder.statistics.tokens / seconds:,.0f} tokens/s"
    )
    if encoder.statistics.truncated:
        line += (
            f"; {encoder.statistics.truncated:,} texts were cut at {encoder.max_seq_length} tokens"
        )
    return line


def _identity(encoder: FastEncoder) -> dict[str, Any]:
    """What the embeddings depend on beside the options of the call."""
    from jv5kernels.checkpoint import Checkpoint

    checkpoint = encoder.checkpoint
    assert isinstance(checkpoint, Checkpoint)  # the command line opens no live models
    local = checkpoint.revision is None
    return {
        "model": str(checkpoint.folder.resolve()) if local else checkpoint.source,
        "revision": _files_digest(checkpoint.folder) if local else checkpoint.revision,
        "pooling": encoder.pooling,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "max_seq_length": encoder.max_seq_length,
    }


def _files_digest(folder: Path) -> str:
    """Stands for a local checkpoint: names, sizes and times of its files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            status = path.stat()
            digest.update(
                f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode()
            )
    return f"files {digest.hexdigest()}"


def _file_digest(path: Path) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


@contextmanager
def quiet_about_truncation() -> Iterator[None]:
    """The encoder warns in every call; a corpus is many calls, so the summary counts instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".* texts were longer than")
        yield


class Meter:
    """Progress on standard error: a live line on a terminal, a line now and then elsewhere."""

    def __init__(self, corpus: Corpus, enabled: bool) -> None:
        self._corpus, self._enabled = corpus, enabled
        self._start = self._last_line = time.perf_counter()
        self._live: Any = None

    def __enter__(self) -> Meter:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
            from rich.progress import TimeRemainingColumn as Remaining

            columns = (
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                Remaining(),
            )
            self._live = Progress(*columns, console=Console(stderr=True), transient=True)
            self._live.start()
            total = None if self._corpus.share_read is None else 1.0
            self._task = self._live.add_task("first block", total=total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, rows: int, new_rows: int, tokens: int) -> None:
        """Reports `rows` complete in all, of which this run did `new_rows` with `tokens`."""
        seconds = time.perf_counter() - self._start
        text = (
            f"{rows:,} texts, {new_rows / seconds:,.1f} texts/s, {tokens / seconds:,.0f} tokens/s"
        )
        share = self._corpus.share_read
        if self._live is not None:
            self._live.update(self._task, completed=share or 0.0, description=text)
        elif self._enabled and time.perf_counter() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            done = "" if share is None else f"{share:.0%}, "
            print(f"{done}{text}", file=sys.stderr, flush=True)
