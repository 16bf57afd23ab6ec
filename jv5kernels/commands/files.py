"""Corpora in, embeddings out: streaming readers and resumable writers for the command line.

Reading and writing keep one block of texts in memory, whatever the size of the corpus. Embeddings
go to ``OUT.part``, which takes the name ``OUT`` in one step when the last one is written. Beside it,
``OUT.part.json`` records after every block what was asked for, how many rows are complete and a
digest of their texts, so that a stopped run goes on where it was, or refuses when the model, an
option or a text has changed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from jv5kernels.commands.formats import FORMATS

__all__ = ["Corpus", "EmbeddingFile", "Record", "blocks"]

INPUT_FORMATS = ("auto", "text", "jsonl")


@dataclass(frozen=True)
class Record:
    """One text and its id: the row number, or what a JSON line says under the id key."""

    id: str | int
    text: str


class Corpus:
    """The texts of several files, one after the other, read line by line.

    A text file holds one text a line (an empty line is an empty text); a JSON Lines file one object
    a line. Either may be compressed with gzip (``.gz``). ``-`` is standard input.

    Args:
        inputs: paths, or "-".
        input_format: "text", "jsonl", or "auto": by the file's name, text on standard input.
        key: the key of the text in a JSON line.
        id_key: the key of the id in a JSON line; a line without it has its row number as id.

    Raises:
        FileNotFoundError, IsADirectoryError: an input that cannot be read.
        ValueError: an unknown `input_format`, "-" given twice; while reading: a line that is not
            UTF-8, not JSON, or has no text under `key`, with its file and line number.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        *,
        input_format: str = "auto",
        key: str = "text",
        id_key: str = "id",
    ) -> None:
        if input_format not in INPUT_FORMATS:
            raise ValueError(f"input_format is {input_format!r}, allowed are {INPUT_FORMATS}")
        if list(inputs).count("-") > 1:
            raise ValueError("standard input (-) is given twice")
        self.inputs = list(inputs)
        self.input_format, self.key, self.id_key = input_format, key, id_key
        self.total_bytes: int | None = 0
        self._finished_bytes = 0
        self._open_file: BinaryIO | None = None
        for name in self.inputs:
            if name == "-" or not _checked(Path(name)).is_file():
                self.total_bytes = None  # a pipe: its length is not known
            elif self.total_bytes is not None:
                self.total_bytes += Path(name).stat().st_size

    @property
    def share_read(self) -> float | None:
        """The part of the input that has been read, 0 to 1, or None when its size is not known."""
        if self.total_bytes is None:
            return None
        position = self._open_file.tell() if self._open_file else 0
        return min(1.0, (self._finished_bytes + position) / max(1, self.total_bytes))

    def __iter__(self) -> Iterator[Record]:
        row = 0
        for name in self.inputs:
            is_json = self._is_json(name)
            for number, line in enumerate(self._lines(name), start=1):
                where = f"{'standard input' if name == '-' else name}:{number}"
                text = _decoded(line, where)
                if not is_json:
                    yield Record(row, text)
                elif text.strip():
                    yield self._json_record(text, row, where)
                else:
                    continue
                row += 1

    def _is_json(self, name: str) -> bool:
        if self.input_format != "auto":
            return self.input_format == "jsonl"
        return name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))

    def _lines(self, name: str) -> Iterator[bytes]:
        """Lines without their end (LF or CRLF); a byte order mark at the start is dropped."""
        raw: BinaryIO = sys.stdin.buffer if name == "-" else open(name, "rb")
        try:
            # A pipe has no position to report, and standard input is not ours to close.
            self._open_file = raw if self.total_bytes is not None else None
            stream: Any = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
            for number, line in enumerate(stream):
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{name}: the gzip file is damaged or cut short: {error}") from error
        finally:
            self._open_file = None
            if name != "-":
                self._finished_bytes += Path(name).stat().st_size
                raw.close()

    def _json_record(self, line: str, row: int, where: str) -> Record:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a line of JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: a JSON object is expected, not {type(value).__name__}")
        text = value.get(self.key)
        if not isinstance(text, str):
            found = type(text).__name__ if self.key in value else "nothing"
            raise ValueError(
                f"{where}: a string is expected under the key {self.key!r}, found {found}; "
                f"the keys are {sorted(value)}"
            )
        identity = value.get(self.id_key, row)
        return Record(identity if isinstance(identity, (str, int)) else str(identity), text)


def _checked(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the files in it")
    return path


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}: {error.reason})") from error


def blocks(records: Iterable[Record], size: int, max_characters: int) -> Iterator[list[Record]]:
    """Yields lists of at most `size` records, closed early when they hold `max_characters`."""
    block: list[Record] = []
    characters = 0
    for record in records:
        block.append(record)
        characters += len(record.text)
        if len(block) == size or characters >= max_characters:
            yield block
            block, characters = [], 0
    if block:
        yield block


class EmbeddingFile:
    """An output file that is written block by block and can be continued after any block.

    Order of calls: `require` for every fact that the embeddings depend on, `skip_complete` over the
    records, `begin`, `append` for each block, `finish`.

    Args:
        path: the final name; its suffix is one of `formats.FORMATS`.
        resume: continue an unfinished run, when there is one.
        overwrite: replace a finished file, and discard an unfinished run.

    Raises:
        ValueError: another suffix; resume and overwrite together; a damaged journal.
        FileExistsError: the file, or an unfinished run, is there and neither option says what to do.
        FileNotFoundError: the folder does not exist.
        ImportError: .parquet without pyarrow.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if path.suffix not in FORMATS:
            raise ValueError(f"{path}: the name must end in one of {', '.join(sorted(FORMATS))}")
        if path.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise ImportError("writing Parquet needs pyarrow: pip install 'jv5kernels[parquet]'")
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.journal_path = path.with_name(path.name + ".part.json")
        self.format = FORMATS[path.suffix]()
        self.run: dict[str, Any] = {}
        self.rows = 0
        self._file: BinaryIO | None = None
        self._begun = False
        self._digest = hashlib.blake2b(digest_size=16)
        unfinished = self.part.exists() and self.journal_path.exists()
        if not overwrite:
            self._refuse_leftovers(unfinished, resume)
        self._journal = self._read_journal() if unfinished and resume else None

    def _refuse_leftovers(self, unfinished: bool, resume: bool) -> None:
        if unfinished and not resume:
            raise FileExistsError(
                f"{self.part} is an unfinished run: continue it with --resume, or start over with --overwrite"
            )
        if self.path.exists() and not unfinished:
            raise FileExistsError(f"{self.path} exists: replace it with --overwrite")

    def _read_journal(self) -> dict[str, Any]:
        try:
            journal = json.loads(self.journal_path.read_text("utf-8"))
            missing = {"run", "rows", "bytes", "texts", "width", "dtype"} - set(journal)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.journal_path} is damaged: {error}") from error
        if missing:
            raise ValueError(f"{self.journal_path} is damaged: it lacks {sorted(missing)}")
        if self.part.stat().st_size < journal["bytes"]:
            raise ValueError(
                f"{self.part} is shorter than its journal says; start over with --overwrite"
            )
        return journal

    @property
    def started(self) -> bool:
        """Whether there is a part file with its journal, so that the run can be continued."""
        return self._begun or self._journal is not None

    def require(self, **facts: Any) -> None:
        """Records facts that the embeddings depend on; when resuming, they must be those of the run.

        Raises:
            ValueError: a fact differs, naming it and both values.
        """
        facts = json.loads(json.dumps(facts))
        if self._journal is not None:
            before = self._journal["run"]
            for name, value in facts.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"cannot resume {self.part}: {name} was {before.get(name)!r} and is now {value!r}; "
                        "repeat the first command, or start over with --overwrite"
                    )
        self.run.update(facts)

    def skip_complete(self, records: Iterator[Record]) -> None:
        """Reads over the records whose embeddings are complete, and checks that they are the same texts.

        Raises:
            ValueError: the input ends early or a text has changed.
        """
        if self._journal is None:
            return
        for _ in range(self._journal["rows"]):
            record = next(records, None)
            if record is None:
                raise ValueError(
                    f"cannot resume {self.part}: the input has {self.rows} texts, fewer than are complete"
                )
            self._count(record)
        if self._digest.hexdigest() != self._journal["texts"]:
            raise ValueError(
                f"cannot resume {self.part}: the first {self.rows} texts of the input have changed"
            )

    def _count(self, record: Record) -> None:
        data = record.text.encode("utf-8", "surrogatepass")
        self._digest.update(len(data).to_bytes(8, "little") + data)
        self.rows += 1

    def begin(self, width: int, dtype: npt.DTypeLike) -> None:
        """Opens the part file for embeddings of `width` columns.

        Raises:
            ValueError: the run to resume has another width or dtype.
        """
        self.width, self.dtype = width, np.dtype(dtype)
        if self._journal is None:
            self._file = open(self.part, "wb+")
            self._file.write(self.format.start(width, self.dtype))
        else:
            before = (self._journal["width"], self._journal["dtype"])
            if before != (width, self.dtype.name):
                raise ValueError(
                    f"cannot resume {self.part}: embeddings were {before[0]} x {before[1]}"
                    f" and are now {width} x {self.dtype.name}"
                )
            self._file = open(self.part, "rb+")
            self._file.truncate(self._journal["bytes"])
            self._file.seek(0, os.SEEK_END)
            self.format.start(width, self.dtype)
        self._commit()
        self._begun = True

    def append(self, records: Sequence[Record], embeddings: np.ndarray) -> None:
        """Adds one block: when it returns, the rows survive whatever happens to the process."""
        if embeddings.shape != (len(records), self.width) or embeddings.dtype != self.dtype:
            raise ValueError(
                f"embeddings are {embeddings.shape} {embeddings.dtype}, "
                f"expected ({len(records)}, {self.width}) {self.dtype}"
            )
        assert self._file is not None, "begin comes first"
        self._file.write(self.format.block([record.id for record in records], embeddings))
        for record in records:
            self._count(record)
        self._commit()

    def _commit(self) -> None:
        assert self._file is not None
        self.format.amend(self._file, self.rows)
        self._file.flush()
        os.fsync(self._file.fileno())
        journal = {
            "run": self.run,
            "rows": self.rows,
            "bytes": self._file.tell(),
            "texts": self._digest.hexdigest(),
            "width": self.width,
            "dtype": self.dtype.name,
        }
        fresh = self.journal_path.with_name(self.journal_path.name + ".new")
        fresh.write_text(json.dumps(journal, indent=1) + "\n", "utf-8")
        os.replace(fresh, self.journal_path)

    def finish(self) -> None:
        """Gives the complete file its final name and removes the journal."""
        self.close()
        complete = self.format.pack(self.part, self.run)
        os.replace(complete, self.path)
        self.part.unlink(missing_ok=True)
        self.journal_path.unlink()

    def close(self) -> None:
        """Closes the part file and leaves it as it is, to be resumed."""
        if self._file is not None:
            self._file.close()
            self._file = None
