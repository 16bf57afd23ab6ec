"""All scores of a trained model beside those of its teacher and of BM25, on held-out packages."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jv5kernels.training import evaluation
from jv5kernels.training.corpus import Package
from jv5kernels.training.evaluation import (
    FORMS,
    HeldOut,
    Titles,
    form_scores,
    held_out,
    retrieval_ndcg,
)
from jv5kernels.training.long_texts import Chapter, mean_of_parts
from jv5kernels.training.teacher import embed_with_teacher

if TYPE_CHECKING:
    from jv5kernels.encoder import FastEncoder

__all__ = ["Score", "score_ablation", "score_card", "score_documentation"]

ENGLISH = "synopsis to description"
# About 700 and 6,000 tokens.
LONG_PARTS = (8, 64)


@dataclass(frozen=True)
class Score:
    """One result, by the names that the records of the benchmarks have."""

    work: str
    impl: str
    metric: str
    value: float
    unit: str
    queries: int


def score_card(
    model: str | Path,
    packages: Sequence[Package],
    teacher: str,
    *,
    device: str,
    cache: Path | None = None,
    documentation: Sequence[Chapter] = (),
    tell: Callable[[str], object] = print,
) -> list[Score]:
    """Returns the scores of a model of this layout, its teacher and BM25 on the split "test".

    Args:
        model: folder with the adapters; a score whose adapter is not there is left out.
        teacher: folder or hub id of a Sentence Transformers model.
        device: "cuda" or "cpu".
        cache: folder to keep the teacher's embeddings in.
        documentation: chapters; those of the split "test" are looked for by the titles of their sections.
    """
    from jv5kernels.encoder import FastEncoder

    texts = held_out(packages)
    encoder = FastEncoder(model, device=device)
    scores = []
    tell("scoring BM25")
    lexical = evaluation.bm25_scores(texts.synopses, texts.descriptions)
    scores.append(_score(ENGLISH, "BM25", retrieval_ndcg(lexical), len(lexical)))
    tell("scoring the teacher")
    scores += _teacher_scores(teacher, texts, device, cache)
    tell("scoring the model")
    if "retrieval" in encoder.tasks:
        queries, documents = _embedded(encoder, texts)
        dims = encoder.checkpoint.matryoshka_dims or (queries.shape[1],)
        for dim in sorted(dims, reverse=True):
            scores += _forms("model", queries, documents, dim)
        scores += _foreign(texts, documents, lambda t: encoder.encode_query(t, task="retrieval"))
        tell("scoring the model on long texts")
        scores += _long(texts, queries, documents, encoder)
        if documentation:
            tell("scoring on documentation")
            titles = evaluation.held_out_titles(documentation)
            scores += score_documentation(encoder, titles, teacher, device=device, cache=cache)
    if "text-matching" in encoder.tasks:
        pair = [
            encoder.encode_document(t, task="text-matching")
            for t in (texts.synopses, texts.descriptions)
        ]
        scores.append(_similarity("model, text-matching", texts, pair[0], pair[1]))
    for task in ("clustering", "classification"):
        if task in encoder.tasks:
            embeddings = encoder.encode_document(texts.descriptions, task=task)
            scores += _sections(f"model, {task}", texts, embeddings)
    return scores


def score_ablation(
    model: Path,
    folder: Path,
    packages: Sequence[Package],
    *,
    device: str,
    tell: Callable[[str], object] = print,
) -> list[Score]:
    """Returns float and binary scores of every adapter that `command.ablate` wrote; none where there is none."""
    from jv5kernels.encoder import FastEncoder

    scores = []
    texts = held_out(packages)
    for adapter in sorted(folder.glob("*/adapters/retrieval")):
        tell(f"scoring {adapter.parent.parent.name} of the ablation")
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary) / "model"
            shutil.copytree(model, copy)
            shutil.copytree(adapter, copy / "adapters" / "retrieval", dirs_exist_ok=True)
            queries, documents = _embedded(FastEncoder(copy, device=device), texts)
        for form in ("float32", "binary"):
            value = retrieval_ndcg(form_scores(form, queries, documents, queries.shape[1]))
            name = f"regulariser {adapter.parent.parent.name}, {form}"
            scores.append(_score(ENGLISH, name, value, len(queries)))
    return scores


def _embedded(encoder: FastEncoder, texts: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    queries = encoder.encode_query(texts.synopses, task="retrieval")
    return queries, encoder.encode_document(texts.descriptions, task="retrieval")


def _teacher_scores(teacher: str, texts: HeldOut, device: str, cache: Path | None) -> list[Score]:
    def embed(chosen: Sequence[str]) -> np.ndarray:
        found = embed_with_teacher(teacher, chosen, device=device, cache=cache)
        return found.astype(np.float32)

    queries, documents = embed(texts.synopses), embed(texts.descriptions)
    return [
        *_forms("teacher", queries, documents, queries.shape[1]),
        *_foreign(texts, documents, embed, "teacher"),
        _similarity("teacher", texts, queries, documents),
        *_sections("teacher", texts, documents),
    ]


def _forms(impl: str, queries: np.ndarray, documents: np.ndarray, dim: int) -> list[Score]:
    return [
        _score(
            ENGLISH,
            f"{impl}, {dim} dimensions, {form}",
            retrieval_ndcg(form_scores(form, queries, documents, dim)),
            len(queries),
        )
        for form in FORMS
    ]


def _foreign(
    texts: HeldOut,
    documents: np.ndarray,
    embed: Callable[[Sequence[str]], np.ndarray],
    impl: str = "model",
) -> list[Score]:
    """Synopses in other languages against the English descriptions."""
    return [
        _score(
            f"{language} {ENGLISH}", impl, retrieval_ndcg(embed(queries) @ documents.T, of), len(of)
        )
        for language, (of, queries) in texts.foreign.items()
    ]


def _long(
    texts: HeldOut, queries: np.ndarray, documents: np.ndarray, encoder: FastEncoder
) -> list[Score]:
    """Texts of many descriptions each, as one and as the mean of what its parts give."""
    scores = []
    for parts in LONG_PARTS:
        members = evaluation.long_members(len(queries), parts)
        if not len(members):
            continue
        work = f"which of {len(members)} texts of {parts} descriptions"
        whole = encoder.encode_document(
            ["\n".join(texts.descriptions[i] for i in of) for of in members], task="retrieval"
        )
        for impl, embeddings in (("model", whole), ("mean of parts", documents[members].mean(1))):
            value = evaluation.member_accuracy(queries, embeddings, members)
            scores.append(Score(work, impl, "accuracy", value, "", members.size))
    return scores


def score_documentation(
    encoder: FastEncoder, titles: Titles, teacher: str, *, device: str, cache: Path | None = None
) -> list[Score]:
    """Chapters as one text and as the mean of their passages, by the model, its teacher, and BM25."""

    def taught(chosen: Sequence[str]) -> np.ndarray:
        found = embed_with_teacher(teacher, chosen, device=device, cache=cache)
        return found.astype(np.float32)

    def model(chosen: Sequence[str]) -> np.ndarray:
        return encoder.encode_document(chosen, task="retrieval")

    flat = [passage for passages in titles.passages for passage in passages]
    bounds = np.cumsum([len(passages) for passages in titles.passages])[:-1]

    def means(embed: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
        parts = np.split(embed(flat), bounds)
        return np.stack([mean_of_parts(part) for part in parts])

    queries = encoder.encode_query(titles.titles, task="retrieval")
    found = {
        "BM25": evaluation.bm25_scores(titles.titles, titles.texts),
        "teacher, mean of parts": _cosines(taught(titles.titles), means(taught)),
        "model": _cosines(queries, model(titles.texts)),
        "model, mean of parts": _cosines(queries, means(model)),
    }
    work = f"section title to chapter, of {len(titles.passages)}"
    return [
        _score(work, impl, retrieval_ndcg(scores, titles.chapter), len(titles.titles))
        for impl, scores in found.items()
    ]


def _cosines(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """The queries are unit vectors; the documents become such."""
    return queries @ (documents / np.linalg.norm(documents, axis=1, keepdims=True)).T


def _similarity(impl: str, texts: HeldOut, synopses: np.ndarray, descriptions: np.ndarray) -> Score:
    value = evaluation.similarity_spearman(synopses, descriptions, texts.sections, texts.sources)
    return Score("graded pairs", impl, "spearman", value, "", len(synopses))


def _sections(impl: str, texts: HeldOut, embeddings: np.ndarray) -> list[Score]:
    cluster = evaluation.clustering_v_measure(embeddings, texts.sections)
    accuracy = evaluation.classification_accuracy(embeddings, texts.sections, texts.sources)
    count = len(embeddings)
    return [
        Score("sections (seen in training)", impl, "v_measure", cluster, "", count),
        Score("sections (seen in training)", impl, "accuracy", accuracy, "", count),
    ]


def _score(work: str, impl: str, value: float, queries: int) -> Score:
    return Score(work, impl, "ndcg_at_10", value, "", queries)
