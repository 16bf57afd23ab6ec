"""Long texts: the chapters of documentation, cut into passages that the teacher can read, and how they are drawn.

A long text is made of passages of a chapter that follow each other, or of descriptions of packages. The teacher reads
256 tokens, so that the target of a long text is the mean of the unit embeddings of its parts, each of equal weight.
Parts of one package alone would not do: whoever knows the first of them knows the mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jv5kernels.training.json_lines import read_json_lines

__all__ = [
    "DOCUMENT",
    "Chapter",
    "Passages",
    "build_passages",
    "joined",
    "mean_of_parts",
    "passages_of",
    "read_chapters",
    "text_of",
]

# A passage is no longer than this, so that the teacher reads all of it, and a shorter rest joins the one before it.
PASSAGE, SHORTEST_PASSAGE = 900, 120
DOCUMENT = "Document:"


@dataclass(frozen=True)
class Chapter:
    """One line of the documentation; chapters of equal source and name are translations of each other."""

    source: str
    name: str
    language: str
    split: str
    sections: tuple[tuple[str, str], ...]


def read_chapters(path: str | Path) -> list[Chapter]:
    """Reads what `jv5kernels.training.documentation` wrote.

    Raises:
        ValueError: a line that is not JSON or lacks a key, with its number.
    """
    return read_json_lines(path, _chapter, "chapter")


def _chapter(row: dict[str, Any]) -> Chapter:
    sections = tuple((str(title), str(text)) for title, text in row["sections"])
    return Chapter(row["source"], row["chapter"], row["language"], row["split"], sections)


def text_of(chapter: Chapter) -> str:
    """The whole chapter, a paragraph a line."""
    return "\n".join(part for section in chapter.sections for part in section if part)


def passages_of(section: tuple[str, str]) -> list[str]:
    """Cuts a section, its title first, at the ends of lines, sentences or words into passages.

    Example:
        >>> passages_of(("Streams", "What sed reads."))
        ['Streams\\nWhat sed reads.']
    """
    passages = [""]
    for piece in _pieces("\n".join(part for part in section if part)):
        if passages[-1] and len(passages[-1]) + len(piece) > PASSAGE:
            passages.append("")
        passages[-1] += piece
    if len(passages) > 1 and len(passages[-1]) < SHORTEST_PASSAGE:
        passages[-2:] = ["".join(passages[-2:])]
    return [stripped for passage in passages if (stripped := passage.strip())]


def _pieces(text: str) -> Iterator[str]:
    """Lines; sentences of lines that are too long; words of sentences that are; the rest by force."""
    for line in text.splitlines(keepends=True):
        for sentence in (
            [line] if len(line) <= PASSAGE else re.split(r"(?<=[.!?。！？])(?=\s|\w)", line)
        ):
            for word in [sentence] if len(sentence) <= PASSAGE else re.findall(r"\s*\S+", sentence):
                for start in range(0, len(word), PASSAGE):
                    yield word[start : start + PASSAGE]


@dataclass(frozen=True)
class Passages:
    """Tokenised passages of chapters.

    Attributes:
        ids, offsets: passage i, with its prompt, is ids[offsets[i] : offsets[i + 1]].
        starts: (chapters + 1,) chapter c has the passages starts[c] to starts[c + 1].
        english_texts: the English passages, which the teacher embeds.
        targets: (passages, 2) first English text and the one after the last whose mean is a passage's target.
    """

    ids: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    english_texts: list[str]
    targets: np.ndarray


def build_passages(chapters: Sequence[Chapter], tokenizer: Tokenizer) -> Passages:
    """Cuts and tokenises English chapters, and those translations of them that have as many sections.

    A passage of a translation has the mean of its whole section in English as its target.
    """
    texts: list[str] = []
    english_texts: list[str] = []
    targets: list[tuple[int, int]] = []
    starts = [0]
    sections_of: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for chapter in sorted(chapters, key=lambda chapter: chapter.language != "en"):
        key = (chapter.source, chapter.name)
        cut = [passages_of(section) for section in chapter.sections]
        if chapter.language == "en":
            sections_of[key] = []
            for passages in cut:
                first = len(english_texts)
                english_texts += passages
                sections_of[key].append((first, len(english_texts)))
                targets += [(row, row + 1) for row in range(first, len(english_texts))]
        elif len(sections_of.get(key, ())) == len(cut):
            for passages, (first, last) in zip(cut, sections_of[key], strict=True):
                if first == last:
                    passages.clear()
                targets += [(first, last)] * len(passages)
        else:
            continue
        texts += [passage for passages in cut for passage in passages]
        starts.append(len(texts))
    encoded = tokenizer.encode_batch_fast([f"{DOCUMENT} {text}" for text in texts])
    lengths = [len(encoding.ids) for encoding in encoded]
    ids = np.asarray([i for encoding in encoded for i in encoding.ids], dtype=np.uint16)
    return Passages(
        ids,
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.asarray(starts),
        english_texts,
        np.asarray(targets, dtype=np.int64).reshape(-1, 2),
    )


def mean_of_parts(parts: np.ndarray) -> np.ndarray:
    """Returns the mean of embeddings (parts, dim), each normalised before, as float32 (dim,)."""
    wide = parts.astype(np.float32)
    return (wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)).mean(0)


def joined(
    ids: np.ndarray, spans: Sequence[tuple[int, int]], prompt: int, newline: np.ndarray, most: int
) -> tuple[np.ndarray, int]:
    """Joins texts by newlines to one with a single prompt.

    Args:
        ids: ids of all texts.
        spans: where each text begins and ends in it, prompt included.
        prompt: how many tokens the prompt has.
        newline: (n,) ids between two texts.
        most: tokens of the whole; a text that would go beyond is left out with all after it, the first one is cut.

    Returns:
        the ids, and how many texts are in them.
    """
    start, stop = spans[0]
    pieces = [ids[start : min(stop, start + most)]]
    total = len(pieces[0])
    for count, (start, stop) in enumerate(spans[1:], start=1):
        total += len(newline) + stop - start - prompt
        if total > most:
            return np.concatenate(pieces), count
        pieces += [newline, ids[start + prompt : stop]]
    return np.concatenate(pieces), len(spans)
