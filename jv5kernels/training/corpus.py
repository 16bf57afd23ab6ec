"""The corpus as arrays: every text as token ids, and which English text the teacher embeds in its place.

A text is a synopsis (as query and as document), a long description or, in English, a paragraph of one. The teacher
reads English alone, so the target of a text in another language is the embedding of its English counterpart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jv5kernels.training.json_lines import read_json_lines

__all__ = ["KINDS", "Package", "Rows", "Texts", "build_texts", "read_packages"]

KINDS = ("query", "synopsis", "description", "paragraph")
PROMPTS = {"query": "Query: ", "document": "Document: "}
# Paragraphs shorter than this say too little for a target of their own.
PARAGRAPH_CHARACTERS = 40
# One source package in so many is set aside to watch the training.
DEV_SHARE = 20


@dataclass(frozen=True)
class Package:
    """One line of the corpus; synopsis and description map a language to a text, English always among them."""

    name: str
    source: str
    section: str
    split: str
    synopsis: dict[str, str]
    description: dict[str, str]


def read_packages(path: str | Path) -> list[Package]:
    """Reads a corpus of JSON lines, plain or compressed (.gz, .xz).

    Of the split "train", a twentieth of the source packages becomes "dev".

    Raises:
        ValueError: a line that is not JSON or lacks a key, with its number.
    """
    return read_json_lines(path, _package, "package")


def _package(row: dict[str, Any]) -> Package:
    split = row["split"]
    if split == "train" and zlib.crc32(row["source"].encode()) % DEV_SHARE == 0:
        split = "dev"
    for key in ("synopsis", "description"):
        if "en" not in row[key]:
            raise ValueError(f"{key} has no English text")
    return Package(
        row["package"],
        row["source"],
        row["section"].rpartition("/")[2],
        split,
        row["synopsis"],
        row["description"],
    )


@dataclass(frozen=True)
class Rows:
    """Which texts belong to which package: package i has order[starts[i] : starts[i] + counts[i]]."""

    order: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    def pick(self, packages: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Returns a text of each package, chosen by a number of [0, 1); for a package without texts, any."""
        at = self.starts[packages] + (which * self.counts[packages]).astype(np.int64)
        return self.order[np.minimum(at, len(self.order) - 1)] if len(self.order) else at

    def first(self) -> np.ndarray:
        """Returns the first text of every package.

        Raises:
            ValueError: a package has none.
        """
        if not self.counts.all():
            raise ValueError(f"package {int(np.argmin(self.counts))} has no such text")
        return self.order[self.starts]


@dataclass(frozen=True)
class Texts:
    """Tokenised texts of some packages.

    Attributes:
        ids, offsets: text i has the ids[offsets[i]:offsets[i + 1]]; uint16 and int64.
        package, kind, english: (texts,) which package, which of KINDS, and whether in English.
        target: (texts,) row of `english_texts`.
        english_texts: distinct texts for the teacher.
        source, section: (packages,) numbers of names.
    """

    ids: np.ndarray
    offsets: np.ndarray
    package: np.ndarray
    kind: np.ndarray
    english: np.ndarray
    target: np.ndarray
    english_texts: list[str]
    source: np.ndarray
    section: np.ndarray

    def by_package(self, kind: str, *, english: bool) -> Rows:
        """Returns for each package the rows of its texts of a kind, in English or in other languages."""
        wanted = (self.kind == KINDS.index(kind)) & (self.english == english)
        rows = np.flatnonzero(wanted)
        order = rows[np.argsort(self.package[rows], kind="stable")]
        bounds = np.searchsorted(self.package[order], np.arange(len(self.source) + 1))
        return Rows(order, bounds[:-1], np.diff(bounds))


def build_texts(
    packages: Sequence[Package], tokenizer: Tokenizer, *, max_tokens: int = 256
) -> Texts:
    """Tokenises all texts of some packages, with their prompts."""
    prompted: list[str] = []
    fields: list[tuple[int, int, bool, int]] = []
    numbers: dict[str, int] = {}

    def add(package: int, kind: str, language: str, text: str, english: str) -> None:
        prompted.append(PROMPTS["query" if kind == "query" else "document"] + text)
        target = numbers.setdefault(english, len(numbers))
        fields.append((package, KINDS.index(kind), language == "en", target))

    seen: set[str] = set()
    for number, package in enumerate(packages):
        for language, text in package.synopsis.items():
            for kind in ("query", "synopsis"):
                add(number, kind, language, text, package.synopsis["en"])
        for language, text in package.description.items():
            add(number, "description", language, text, package.description["en"])
        for paragraph in _paragraphs(package.description["en"]):
            if paragraph not in seen:
                seen.add(paragraph)
                add(number, "paragraph", "en", paragraph, paragraph)
    ids, offsets = _tokenized(tokenizer, prompted, max_tokens)
    columns = [np.asarray(column) for column in zip(*fields, strict=True)]
    return Texts(
        ids,
        offsets,
        columns[0].astype(np.int32),
        columns[1].astype(np.int8),
        columns[2].astype(bool),
        columns[3].astype(np.int32),
        list(numbers),
        _numbered(package.source for package in packages),
        _numbered(package.section for package in packages),
    )


def _paragraphs(description: str) -> list[str]:
    parts = [part.strip() for part in description.split("\n")]
    return [p for p in parts if len(p) >= PARAGRAPH_CHARACTERS] if len(parts) > 1 else []


def _tokenized(
    tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError("token ids are kept in 16 bits: the vocabulary is larger")
    pieces, lengths = [], []
    for start in range(0, len(texts), 20_000):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 20_000]):
            kept = encoding.ids[:max_tokens]
            pieces.append(np.asarray(kept, dtype=np.uint16))
            lengths.append(len(kept))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.concatenate(pieces), offsets


def _numbered(names: Iterable[str]) -> np.ndarray:
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int32)
