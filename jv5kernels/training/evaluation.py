"""Scores on held-out packages: retrieval in English and across languages, graded similarity, sections.

Retrieval: a synopsis looks for the English description of its package among those of all packages of the split; one
description is relevant to each query. Similarity: pairs of texts, graded by what their packages share. Clustering and
classification: the archive sections, whose names the training saw on other packages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jv5kernels.calibrator import Calibrator
from jv5kernels.ops.quantize import quantize_int8
from jv5kernels.storage import dequantize
from jv5kernels.training.corpus import Package
from jv5kernels.training.long_texts import Chapter, passages_of
from jv5kernels.training.scores import ndcg_at

__all__ = [
    "FORMS",
    "HeldOut",
    "Titles",
    "bm25_scores",
    "classification_accuracy",
    "clustering_v_measure",
    "form_scores",
    "held_out",
    "held_out_titles",
    "long_members",
    "member_accuracy",
    "retrieval_ndcg",
    "similarity_spearman",
]

CANDIDATES = 100
LONG_TEXTS = 24
PERCENTILE = 99.9
# Sections with fewer packages than this are no clusters.
SMALLEST_SECTION = 20
# Titles of fewer words, such as "Introduction", say nothing of their chapter.
TITLE_WORDS = 3
NUMBERING = re.compile(r"^(Chapter |Appendix )?([A-Z]|\d+)(\.\d+)*\.? ")
GRADES = ("nothing", "section", "source package", "package")


@dataclass(frozen=True)
class Titles:
    """Titles of sections as queries, and the chapters of documentation, without titles, that they are to find.

    Attributes:
        titles: one query each; no title belongs to two chapters.
        chapter: (titles,) whose section it is.
        passages: of every chapter, each short enough for the teacher to read.
    """

    titles: list[str]
    chapter: np.ndarray
    passages: list[list[str]]

    @property
    def texts(self) -> list[str]:
        """Every chapter as one text."""
        return ["\n".join(passages) for passages in self.passages]


def held_out_titles(chapters: Sequence[Chapter], split: str = "test") -> Titles:
    """Returns the English chapters of a split, and what their sections are called without their numbers.

    Raises:
        ValueError: the split has no titles.
    """
    chosen = [c for c in chapters if c.split == split and c.language == "en"]
    found: dict[str, set[int]] = {}
    for number, chapter in enumerate(chosen):
        for title, _ in chapter.sections:
            plain = NUMBERING.sub("", title).strip()
            if len(plain.split()) >= TITLE_WORDS:
                found.setdefault(plain, set()).add(number)
    titles = {title: of.pop() for title, of in found.items() if len(of) == 1}
    if not titles:
        raise ValueError(f"split={split!r} has no titles of English documentation")
    passages = [
        [passage for _, text in chapter.sections for passage in passages_of(("", text))]
        for chapter in chosen
    ]
    return Titles(list(titles), np.asarray(list(titles.values())), passages)


@dataclass(frozen=True)
class HeldOut:
    """The texts of a split's packages; entry i of every list belongs to package i."""

    synopses: list[str]
    descriptions: list[str]
    sections: np.ndarray
    sources: np.ndarray
    foreign: dict[str, tuple[np.ndarray, list[str]]]


def held_out(packages: Sequence[Package], split: str = "test") -> HeldOut:
    """Returns the packages of a split, with the synopses in other languages and whose they are.

    Raises:
        ValueError: the split has no packages.
    """
    chosen = [package for package in packages if package.split == split]
    if not chosen:
        raise ValueError(f"split={split!r} has no packages")
    languages = sorted({language for package in chosen for language in package.synopsis} - {"en"})
    foreign = {}
    for language in languages:
        having = [i for i, package in enumerate(chosen) if language in package.synopsis]
        foreign[language] = (
            np.asarray(having),
            [chosen[i].synopsis[language] for i in having],
        )
    return HeldOut(
        [package.synopsis["en"] for package in chosen],
        [package.description["en"] for package in chosen],
        np.asarray([package.section for package in chosen]),
        np.asarray([package.source for package in chosen]),
        foreign,
    )


def signs(x: np.ndarray) -> np.ndarray:
    """±1, as binary output keeps them: their inner products are dim - 2 · Hamming distance, exactly."""
    return np.where(x > 0, np.float32(1), np.float32(-1))


def coded(x: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """What the int8 codes of x stand for."""
    codes = quantize_int8(torch.from_numpy(x), torch.from_numpy(ranges)).numpy()
    return dequantize(codes, ranges, profile="sentence-transformers")


def int8_ranges(documents: np.ndarray) -> np.ndarray:
    calibrator = Calibrator(documents.shape[1], histogram=True)
    calibrator.add(documents)
    return calibrator.ranges(percentile=PERCENTILE)


def int8_scores(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Queries and documents as codes of one calibration over the documents."""
    ranges = int8_ranges(documents)
    return coded(queries, ranges) @ coded(documents, ranges).T


def binary_scores(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    return signs(queries) @ signs(documents).T


def rescored(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The hundred nearest by Hamming distance, in the order of the float query against the bits as ±1."""
    return _of_candidates(queries, documents, queries @ signs(documents).T)


def rescored_with_int8(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The same hundred, in the order of the float query against int8 codes, which are kept beside the bits."""
    return _of_candidates(queries, documents, queries @ coded(documents, int8_ranges(documents)).T)


def _of_candidates(queries: np.ndarray, documents: np.ndarray, exact: np.ndarray) -> np.ndarray:
    near = binary_scores(queries, documents)
    count = min(CANDIDATES, near.shape[1])
    candidates = np.argpartition(-near, count - 1, axis=1)[:, :count]
    scores = np.full_like(exact, -np.inf)
    np.put_along_axis(scores, candidates, np.take_along_axis(exact, candidates, 1), 1)
    return scores


FORMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "float32": lambda queries, documents: queries @ documents.T,
    "int8": int8_scores,
    "binary": binary_scores,
    "binary, rescored": rescored,
    "binary, rescored with int8": rescored_with_int8,
}


def form_scores(form: str, queries: np.ndarray, documents: np.ndarray, dim: int) -> np.ndarray:
    """Returns (queries, documents) scores of embeddings cut to `dim`, normalised, and kept in a form.

    Args:
        form: one of `FORMS`.
        queries, documents: (n, width) float32.
    """
    cut = []
    for x in (queries, documents):
        x = np.ascontiguousarray(x[:, :dim], dtype=np.float32)
        cut.append(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12))
    return FORMS[form](*cut)


def retrieval_ndcg(scores: np.ndarray, relevant: np.ndarray | None = None) -> float:
    """Mean nDCG@10; by default document i is the relevant one of query i. A document that scores -inf is not found."""
    relevant = np.arange(len(scores)) if relevant is None else relevant
    found = np.isfinite(scores[np.arange(len(scores)), relevant])
    return float((ndcg_at(scores, relevant) * found).mean())


def bm25_scores(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """(queries, documents) by bm25s' default BM25, with its English stop words and no stemmer.

    Raises:
        ImportError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("BM25 needs bm25s: pip install 'jv5kernels[train]'") from error
    index = bm25s.BM25()
    index.index(
        bm25s.tokenize(list(documents), stopwords="en", show_progress=False), show_progress=False
    )
    tokens = bm25s.tokenize(list(queries), stopwords="en", return_ids=False, show_progress=False)
    rows = [index.get_scores(query) if query else np.zeros(len(documents)) for query in tokens]
    return np.stack(rows).astype(np.float32)


def graded_pairs(
    sections: np.ndarray, sources: np.ndarray, count: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (left, right, grade) of pairs of packages, up to `count` of each grade.

    Grades are the positions in `GRADES`: 3 for the package itself, 2 for another of its source package, 1 for another
    of its section, 0 for none of these.
    """
    rng = np.random.default_rng(seed)
    total = len(sections)
    order = rng.permutation(total)
    left, right = np.repeat(order, 64)[: 64 * total], rng.integers(total, size=64 * total)
    siblings = [
        (i, j)
        for source in np.unique(sources)
        for members in [np.flatnonzero(sources == source)]
        for i in members
        for j in members
        if i != j
    ]
    same_section = sections[left] == sections[right]
    same_source = sources[left] == sources[right]
    own = np.arange(total)
    groups = [
        np.stack([left, right], 1)[~same_section & ~same_source],
        np.stack([left, right], 1)[same_section & ~same_source],
        np.asarray(siblings, dtype=np.int64).reshape(-1, 2),
        np.stack([own, own], 1),
    ]
    pairs, grades = [], []
    for grade, group in enumerate(groups):
        kept = group[rng.permutation(len(group))[:count]]
        pairs.append(kept)
        grades.append(np.full(len(kept), grade))
    both = np.concatenate(pairs)
    return both[:, 0], both[:, 1], np.concatenate(grades)


def similarity_spearman(
    synopses: np.ndarray, descriptions: np.ndarray, sections: np.ndarray, sources: np.ndarray
) -> float:
    """Rank correlation of the cosine of a synopsis and a description with what their packages share."""
    from scipy.stats import spearmanr

    left, right, grades = graded_pairs(sections, sources, count=1000)
    cosines = (synopses[left] * descriptions[right]).sum(1)
    return float(spearmanr(cosines, grades).statistic)


def long_members(total: int, parts: int, seed: int = 0) -> np.ndarray:
    """(texts, parts) which packages' descriptions make up each long text: up to LONG_TEXTS, no package in two."""
    texts = min(LONG_TEXTS, total // parts)
    return np.random.default_rng(seed).permutation(total)[: texts * parts].reshape(texts, parts)


def member_accuracy(queries: np.ndarray, long: np.ndarray, members: np.ndarray) -> float:
    """Share of the queries of all members whose nearest long text, by cosine, is the one that they are part of."""
    unit = long / np.maximum(np.linalg.norm(long, axis=1, keepdims=True), 1e-12)
    nearest = (queries[members.flatten()] @ unit.T).argmax(1)
    return float((nearest == np.repeat(np.arange(len(members)), members.shape[1])).mean())


def in_large_sections(sections: np.ndarray) -> np.ndarray:
    names, counts = np.unique(sections, return_counts=True)
    return np.isin(sections, names[counts >= SMALLEST_SECTION])


def clustering_v_measure(embeddings: np.ndarray, sections: np.ndarray, seeds: int = 3) -> float:
    """V-measure of k-means against the sections, the mean over seeds."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    kept = in_large_sections(sections)
    count = len(np.unique(sections[kept]))
    scores = [
        v_measure_score(
            sections[kept], KMeans(count, n_init=1, random_state=seed).fit_predict(embeddings[kept])
        )
        for seed in range(seeds)
    ]
    return float(np.mean(scores))


def classification_accuracy(
    embeddings: np.ndarray, sections: np.ndarray, sources: np.ndarray
) -> float:
    """Accuracy of the ten nearest neighbours' vote for the section, siblings of a source package kept together."""
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    kept = in_large_sections(sections)
    scores = cross_val_score(
        KNeighborsClassifier(10, metric="cosine"),
        embeddings[kept],
        sections[kept],
        groups=sources[kept],
        cv=GroupKFold(5),
    )
    return float(scores.mean())
