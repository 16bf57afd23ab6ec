"""Batches of each stage, a function of seed and step alone: a resumed run sees what an unbroken one would.

A batch says which texts it is made of, by their rows and where their ids begin; ids and the teacher's embeddings
stay on the device, in the `Objective`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from jv5kernels.training.corpus import Rows, Texts
from jv5kernels.training.long_texts import Passages, joined, mean_of_parts
from jv5kernels.training.recipe import Stage

__all__ = ["Batches", "Source", "grouped", "tokens"]

# Texts of one forward pass are cut into so many groups of similar length, short ones into fewer.
GROUPS, GROUPS_OF_SHORT, SHORT = 4, 2, 64
# Widths are multiples of this, so that few shapes occur.
WIDTH = 16
NEGATIVES_PER_ANCHOR = 7
# Long texts of a step, at most, and how much shorter than the longest the shortest of them are.
LONG_TEXTS, SHORTEST_LONG = 16, 1 / 32
# What they are made of: passages of documentation that follow each other, packages of one section, any packages.
LONG_KINDS, LONG_SHARES = ("documentation", "section", "any"), (0.35, 0.25, 0.4)
# How often a text is taken in English where other languages are there.
ENGLISH_QUERIES, ENGLISH_DOCUMENTS = 0.4, 0.6


@dataclass(frozen=True)
class Source:
    """What batches are made of.

    Attributes:
        texts: tokenised texts of the training packages.
        targets: (english texts, teacher dim), the teacher's embeddings.
        neighbours: (packages, count), mined documents of each English synopsis; None where no stage needs them.
        passages: of documentation, for long texts; None for those of descriptions alone.
        passage_targets: (english passages, teacher dim).
        prompt: tokens of the prompt that every document begins with.
        newline: ids of what stands between the parts of a long text.
    """

    texts: Texts
    targets: np.ndarray
    neighbours: np.ndarray | None = None
    passages: Passages | None = None
    passage_targets: np.ndarray | None = None
    prompt: int = 0
    newline: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint16))

    def warm_up(self) -> Source:
        """Computes what is kept, so that worker processes inherit it; returns itself."""
        _ = self.rows, self.by_source, self.by_section, self.document_targets, self.topics
        return self

    @cached_property
    def rows(self) -> dict[tuple[str, bool], Rows]:
        """(kind, English or not) -> rows of every package."""
        return {
            (kind, english): self.texts.by_package(kind, english=english)
            for kind in ("query", "synopsis", "description", "paragraph")
            for english in (True, False)
        }

    @cached_property
    def by_source(self) -> list[np.ndarray]:
        order = np.argsort(self.texts.source, kind="stable")
        bounds = np.flatnonzero(np.diff(self.texts.source[order])) + 1
        return np.split(order, bounds)

    @cached_property
    def by_section(self) -> dict[int, np.ndarray]:
        section = self.texts.section
        groups = {int(s): np.flatnonzero(section == s) for s in np.unique(section)}
        return {s: members for s, members in groups.items() if len(members) > 1}

    @cached_property
    def document_targets(self) -> np.ndarray:
        """(packages,) the target of each English description: equal for equal texts."""
        return self.texts.target[self.rows["description", True].first()]

    @cached_property
    def topics(self) -> np.ndarray:
        """(packages, teacher dim): the unit centroid of each package's section."""
        unit = self.targets[self.document_targets].astype(np.float32)
        centroids = np.zeros_like(unit)
        for section in np.unique(self.texts.section):
            members = self.texts.section == section
            centroid = unit[members].mean(0)
            centroids[members] = centroid / max(float(np.linalg.norm(centroid)), 1e-12)
        return centroids


def grouped(texts: Texts, rows: np.ndarray, max_tokens: int) -> list[dict[str, Any]]:
    """Returns some texts, cut to max_tokens, in groups of similar length.

    Returns:
        for each group: start (n,) int64, where each text's ids begin; last (n,) the position of its last token;
        rows (n,) where it stood; width, an int no smaller than any length.
    """
    lengths = np.minimum(texts.offsets[rows + 1] - texts.offsets[rows], max_tokens)
    return _in_groups(texts.offsets[rows], lengths)


def _in_groups(starts: np.ndarray, lengths: np.ndarray) -> list[dict[str, Any]]:
    groups = GROUPS if lengths.max() > SHORT else GROUPS_OF_SHORT
    parts = []
    for of in np.array_split(np.argsort(lengths, kind="stable"), min(groups, len(starts))):
        parts.append(
            {
                "start": torch.from_numpy(starts[of]),
                "last": torch.from_numpy(lengths[of] - 1),
                "rows": torch.from_numpy(of),
                "width": -(-int(lengths[of].max()) // WIDTH) * WIDTH,
            }
        )
    return parts


def _written_out(texts: list[np.ndarray]) -> list[dict[str, Any]]:
    """Groups of texts that bring their ids with them, as (n, width) int32."""
    lengths = np.asarray([len(ids) for ids in texts])
    groups = _in_groups(np.zeros_like(lengths), lengths)
    for part in groups:
        ids = np.zeros((len(part["rows"]), part["width"]), dtype=np.int32)
        for row, of in zip(ids, part["rows"].tolist(), strict=True):
            row[: len(texts[of])] = texts[of]
        part["ids"] = torch.from_numpy(ids)
    return groups


def tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens a batch has, without what fills its rows up."""
    groups = [value for value in batch.values() if isinstance(value, list)]
    return sum(int((part["last"] + 1).sum()) for group in groups for part in group)


class Batches(Dataset):
    """The batches of one stage; item i is the whole batch of step i.

    Args:
        source: what to draw from.
        stage: sizes and which losses want what.
        kind: "pairs", "topics" or "classes".
        seed: of the draws.
    """

    def __init__(self, source: Source, stage: Stage, kind: str, seed: int) -> None:
        makers = {"pairs": self._pairs, "topics": self._topics, "classes": self._classes}
        self.source, self.stage, self.seed, self.make = source, stage, seed, makers[kind]

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.make(np.random.default_rng([self.seed, step]))

    def _packages(self, rng: np.random.Generator) -> np.ndarray:
        """Packages of whole source packages, for siblings are each other's hardest negatives."""
        wanted = min(self.stage.batch, len(self.source.texts.source))
        groups = self.source.by_source
        chosen: list[np.ndarray] = []
        count = 0
        for group in rng.permutation(len(groups)):
            # Of very large source packages, a part.
            chosen.append(rng.permutation(groups[group])[:32])
            count += len(chosen[-1])
            if count >= wanted:
                break
        return np.concatenate(chosen)[:wanted]

    def _draw(
        self, rng: np.random.Generator, packages: np.ndarray, kind: str, english_share: float
    ) -> np.ndarray:
        english, others = self.source.rows[kind, True], self.source.rows[kind, False]
        take_other = (rng.random(len(packages)) >= english_share) & (others.counts[packages] > 0)
        which = rng.random(len(packages))
        return np.where(take_other, others.pick(packages, which), english.pick(packages, which))

    def _texts(self, rows: np.ndarray) -> list[dict[str, Any]]:
        return grouped(self.source.texts, rows, self.stage.max_tokens)

    def _targets(self, rows: np.ndarray) -> Tensor:
        """Rows of the teacher's embeddings."""
        return torch.from_numpy(self.source.texts.target[rows].astype(np.int64))

    def _pairs(self, rng: np.random.Generator) -> dict[str, Any]:
        """Synopses and descriptions of the same packages, in languages drawn apart, and hard negatives."""
        packages = self._packages(rng)
        kind = "synopsis" if "cosent" in self.stage.weights else "query"
        queries = self._draw(rng, packages, kind, ENGLISH_QUERIES)
        documents = self._draw(rng, packages, "description", ENGLISH_DOCUMENTS)
        keys = self.source.document_targets[packages]
        batch: dict[str, Any] = {
            "queries": self._texts(queries),
            "query_targets": self._targets(queries),
            "document_targets": self._targets(documents),
        }
        if self.stage.hard_negatives:
            assert self.source.neighbours is not None, "hard negatives have been mined"
            pick = rng.integers(
                self.source.neighbours.shape[1], size=(len(packages), self.stage.hard_negatives)
            )
            negatives = np.take_along_axis(self.source.neighbours[packages], pick, 1).flatten()
            negatives = negatives[~np.isin(negatives, packages)]
            english = self.source.rows["description", True].first()[negatives]
            documents = np.concatenate([documents, english])
            keys = np.concatenate([keys, self.source.document_targets[negatives]])
        batch["documents"] = self._texts(documents)
        batch["keys"] = torch.from_numpy(keys.astype(np.int64))
        paragraphs = self._paragraphs(rng) if "paragraph" in self.stage.weights else None
        if paragraphs is not None:
            batch["paragraphs"] = self._texts(paragraphs)
            batch["paragraph_targets"] = self._targets(paragraphs)
        if "long" in self.stage.weights:
            batch["long"], batch["long_targets"] = self._long(rng)
        return batch

    def _long(self, rng: np.random.Generator) -> tuple[list[dict[str, Any]], Tensor]:
        """Texts of many parts, and the mean of what the teacher says of these."""
        count = min(LONG_TEXTS, self.stage.batch)
        # Lengths between the shortest and the longest, mostly in the middle of their logarithms.
        wanted = self.stage.long_tokens * SHORTEST_LONG ** rng.beta(2, 2, count)
        kinds = rng.choice(len(LONG_KINDS), count, p=LONG_SHARES)
        made = [
            self._long_text(rng, LONG_KINDS[kind], int(most))
            for kind, most in zip(kinds, wanted, strict=True)
        ]
        means = np.stack([mean for _, mean in made])
        return _written_out([ids for ids, _ in made]), torch.from_numpy(means)

    def _long_text(
        self, rng: np.random.Generator, kind: str, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text of at most so many tokens, and its target."""
        source, texts = self.source, self.source.texts
        if kind == "documentation" and source.passages is not None:
            return self._chapter(rng, source.passages, most)
        # Twice as many as fit when they are of usual length, for what does not fit is left out.
        count = min(2 + most // 40, len(texts.source))
        if kind == "section":
            groups = list(source.by_section.values())
            packages = rng.choice(groups[rng.integers(len(groups))], count)
        else:
            packages = rng.integers(len(texts.source), size=count)
        rows = self._draw(rng, packages, "description", ENGLISH_DOCUMENTS)
        spans = list(zip(texts.offsets[rows], texts.offsets[rows + 1], strict=True))
        ids, used = joined(texts.ids, spans, source.prompt, source.newline, most)
        return ids, mean_of_parts(source.targets[texts.target[rows[:used]]])

    def _chapter(
        self, rng: np.random.Generator, passages: Passages, most: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Passages of a chapter that follow each other, from any of its first half on."""
        assert self.source.passage_targets is not None, "the teacher has read the documentation"
        chapter = rng.integers(len(passages.starts) - 1)
        start, stop = passages.starts[chapter : chapter + 2]
        start += rng.integers((stop - start + 1) // 2 or 1)
        bounds = passages.offsets[start : stop + 1]
        spans = list(zip(bounds[:-1], bounds[1:], strict=True))
        ids, used = joined(passages.ids, spans, self.source.prompt, self.source.newline, most)
        vectors = [
            mean_of_parts(self.source.passage_targets[first:last])
            for first, last in passages.targets[start : start + used]
        ]
        return ids, mean_of_parts(np.stack(vectors))

    def _paragraphs(self, rng: np.random.Generator) -> np.ndarray | None:
        rows = self.source.rows["paragraph", True].order
        return (
            rng.choice(rows, min(self.stage.batch // 2, len(rows)), replace=False)
            if len(rows)
            else None
        )

    def _topics(self, rng: np.random.Generator) -> dict[str, Any]:
        """Single texts; the target is the teacher's embedding plus the centroid of the text's section."""
        packages = self._packages(rng)
        kind = "synopsis" if rng.random() < 0.5 else "description"
        rows = self._draw(rng, packages, kind, ENGLISH_DOCUMENTS)
        topics = torch.from_numpy(self.source.topics[packages])
        return {"texts": self._texts(rows), "targets": self._targets(rows), "topics": topics}

    def _classes(self, rng: np.random.Generator) -> dict[str, Any]:
        """Anchors, a positive each of the same section, and seven negatives each of other sections."""
        groups = self.source.by_section
        section = self.source.texts.section
        eligible = np.flatnonzero(np.isin(section, list(groups)))
        anchors = rng.choice(eligible, min(self.stage.batch, len(eligible)), replace=False)
        positives = np.asarray([_other(rng, groups[int(section[a])], a) for a in anchors])
        negatives = rng.choice(len(section), (len(anchors), NEGATIVES_PER_ANCHOR))
        same = section[negatives] == section[anchors][:, None]
        while same.any():
            negatives[same] = rng.choice(len(section), int(same.sum()))
            same = section[negatives] == section[anchors][:, None]
        packages = np.concatenate([anchors, positives, negatives.flatten()])
        rows = self._draw(rng, packages, "description", ENGLISH_DOCUMENTS)
        return {
            "items": self._texts(rows),
            "anchors": len(anchors),
            "sections": torch.from_numpy(section[anchors].astype(np.int64)),
        }


def _other(rng: np.random.Generator, members: np.ndarray, but: int) -> int:
    drawn = int(rng.choice(members))
    while drawn == but:
        drawn = int(rng.choice(members))
    return drawn
