"""Measures of a trained model on arrays whose answers are known, and the pictures of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_corpus import chapter_rows, packages, unit

from jv5kernels.training import evaluation
from jv5kernels.training.long_texts import Chapter
from jv5kernels.training.pictures import draw_losses, draw_scores
from jv5kernels.training.score_card import Score
from jv5kernels.training.scores import ndcg_at, ranks


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Queries near their documents among 300, in 64 dimensions."""
    rng = np.random.default_rng(0)
    documents = unit(rng.standard_normal((300, 64))).astype(np.float32)
    noise = 0.22 * rng.standard_normal((300, 64)).astype(np.float32)
    return unit(documents + noise), documents


def test_ndcg_by_hand() -> None:
    scores = np.array([[3.0, 2, 1], [1, 2, 3], [2, 2, 2]])
    assert ranks(scores, np.array([0, 0, 0])).tolist() == [0, 2, 2], "ties count against it"
    expected = [1, 1 / np.log2(4), 1 / np.log2(4)]
    np.testing.assert_allclose(ndcg_at(scores, np.array([0, 0, 0])), expected)
    assert ndcg_at(scores, np.array([2, 0, 0]), cutoff=2).tolist() == [0, 0, 0]


def test_a_document_that_was_no_candidate_is_not_found() -> None:
    scores = np.full((2, 3), -np.inf)
    scores[1, 1] = 0.5
    assert evaluation.retrieval_ndcg(scores) == 0.5


def test_forms_against_their_definitions(pair: tuple[np.ndarray, np.ndarray]) -> None:
    queries, documents = pair
    dim = 48
    cut_q, cut_d = unit(queries[:, :dim]), unit(documents[:, :dim])
    plain = evaluation.form_scores("float32", queries, documents, dim)
    np.testing.assert_allclose(plain, cut_q @ cut_d.T, atol=1e-6)
    int8 = evaluation.form_scores("int8", queries, documents, dim)
    assert np.abs(int8 - plain).mean() < 0.01 and not np.array_equal(int8, plain)
    bits_q, bits_d = np.packbits(cut_q > 0, axis=1), np.packbits(cut_d > 0, axis=1)
    hamming = np.unpackbits(bits_q[:, None] ^ bits_d[None], axis=2).sum(2)
    binary = evaluation.form_scores("binary", queries, documents, dim)
    assert (binary == dim - 2.0 * hamming).all()
    rescored = evaluation.form_scores("binary, rescored", queries, documents, dim)
    kept = np.isfinite(rescored)
    assert (kept.sum(1) == evaluation.CANDIDATES).all()
    for row in range(len(queries)):
        assert hamming[row][kept[row]].max() <= hamming[row][~kept[row]].min()
    signs = np.where(cut_d > 0, 1, -1)
    np.testing.assert_allclose(rescored[kept], (cut_q @ signs.T)[kept], atol=1e-5)


def test_forms_lose_in_the_known_order(pair: tuple[np.ndarray, np.ndarray]) -> None:
    scores = {
        form: evaluation.retrieval_ndcg(evaluation.form_scores(form, *pair, 64))
        for form in evaluation.FORMS
    }
    assert scores["float32"] > scores["binary, rescored"] > scores["binary"] > 0.2
    assert scores["float32"] >= scores["binary, rescored with int8"] > scores["binary, rescored"]
    assert scores["int8"] > 0.98 * scores["float32"]


def test_bm25_finds_the_document_with_the_words() -> None:
    documents = ["a red apple on the table", "green pears", "apples of another kind: red, ripe"]
    scores = evaluation.bm25_scores(["pears", "ripe red", "the"], documents)
    assert scores.shape == (3, 3)
    assert scores[0].argmax() == 1 and scores[1].argmax() == 2
    assert not scores[2].any(), "a query of stop words finds nothing"


def test_held_out_keeps_whose_a_foreign_synopsis_is(tmp_path: Path) -> None:
    chosen = packages(tmp_path)
    texts = evaluation.held_out(chosen)
    test = [package for package in chosen if package.split == "test"]
    assert texts.synopses == [package.synopsis["en"] for package in test]
    of, german = texts.foreign["de"]
    assert [test[i].synopsis["de"] for i in of] == german and len(german) == len(test) / 2
    with pytest.raises(ValueError, match="'none' has no packages"):
        evaluation.held_out(chosen, "none")


def test_grades_say_what_is_shared() -> None:
    sections = np.asarray(["a", "a", "a", "a", "b", "b", "b", "b"] * 4)
    sources = np.repeat(np.arange(16), 2)
    left, right, grades = evaluation.graded_pairs(sections, sources, count=15)
    same_section, same_source = sections[left] == sections[right], sources[left] == sources[right]
    expected = np.where(left == right, 3, np.where(same_source, 2, np.where(same_section, 1, 0)))
    assert (grades == expected).all()
    assert np.bincount(grades).tolist() == [15, 15, 15, 15]


def test_sections_that_are_clusters_are_found() -> None:
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((3, 16)))
    sections = np.asarray(["a", "b", "c"] * 40 + ["rare"] * 5)
    which = np.arange(120) % 3
    near = unit(centres[which] + 0.05 * rng.standard_normal((120, 16)))
    embeddings = np.concatenate([near, unit(rng.standard_normal((5, 16)))]).astype(np.float32)
    sources = np.arange(125) // 2
    assert evaluation.clustering_v_measure(embeddings, sections) == pytest.approx(1)
    assert evaluation.classification_accuracy(embeddings, sections, sources) == 1
    anything = unit(rng.standard_normal((125, 16))).astype(np.float32)
    assert evaluation.clustering_v_measure(anything, sections) < 0.3
    assert evaluation.classification_accuracy(anything, sections, sources) < 0.6


def test_pictures_are_drawn_or_refused(tmp_path: Path) -> None:
    history = {
        name: [{"step": i, "loss": 2.0 / i, "nce": 1.0 / i, "epoch": 1.0} for i in (1, 2, 3)]
        for name in ("distillation", "a", "b", "c")
    }
    draw_losses(history, tmp_path / "losses.png")
    english = "synopsis to description"
    scores = [
        Score(english, "BM25", "ndcg_at_10", 0.7, "", 3),
        *(
            Score(english, f"model, {d} dimensions, binary", "ndcg_at_10", 0.5, "", 3)
            for d in (8, 16)
        ),
        Score(english, "teacher, 8 dimensions, float32", "ndcg_at_10", 0.6, "", 3),
        Score(f"de {english}", "model", "ndcg_at_10", 0.6, "", 3),
        Score(f"de {english}", "teacher", "ndcg_at_10", 0.4, "", 3),
        Score("graded pairs", "model, text-matching", "spearman", 0.7, "", 3),
        Score("graded pairs", "teacher", "spearman", 0.8, "", 3),
        Score(english, "regulariser with-1, float32", "ndcg_at_10", 0.8, "", 3),
        Score(english, "regulariser with-1, binary", "ndcg_at_10", 0.7, "", 3),
    ]
    draw_scores(scores, tmp_path / "scores.png")
    draw_scores(scores[4:6], tmp_path / "languages.png")
    for name in ("losses.png", "scores.png", "languages.png"):
        assert (tmp_path / name).stat().st_size > 5_000
    with pytest.raises(ValueError, match="no stage logged a loss"):
        draw_losses({"distillation": []}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="no scores"):
        draw_scores([], tmp_path / "none.png")


def test_long_texts_and_who_is_in_them(pair: tuple[np.ndarray, np.ndarray]) -> None:
    members = evaluation.long_members(300, 8)
    assert members.shape == (24, 8) and len(np.unique(members)) == members.size
    assert evaluation.long_members(20, 8).shape == (2, 8)
    assert evaluation.long_members(5, 8).size == 0
    queries, documents = pair
    means = documents[members].mean(1)
    assert 0.3 < evaluation.member_accuracy(queries, means, members) < 1
    alone = np.arange(24)[:, None]
    assert evaluation.member_accuracy(documents, 3 * documents[:24], alone) == 1
    assert evaluation.member_accuracy(documents, np.roll(documents[:24], 1, 0), alone) == 0


def test_titles_of_one_chapter_alone_are_queries() -> None:
    rows = chapter_rows()
    for row in rows[2:4]:
        row["sections"] += [
            ["1.2. The editor of all chapters", "text"],
            ["Introduction", "more text"],
        ]
    chapters = [
        Chapter(row["source"], row["chapter"], row["language"], row["split"], row["sections"])
        for row in rows
    ]
    titles = evaluation.held_out_titles(chapters)
    assert len(titles.passages) == len(titles.texts) == 2
    expected = [(t, i) for i in (0, 1) for t, _ in chapters[2 + i].sections[:3]]
    assert list(zip(titles.titles, titles.chapter.tolist(), strict=True)) == expected
    assert not any(title in text for title in titles.titles for text in titles.texts)
    assert evaluation.NUMBERING.sub("", "B.1.2. What it does") == "What it does"
    with pytest.raises(ValueError, match="split='dev' has no titles"):
        evaluation.held_out_titles(chapters, "dev")
