"""The corpus as arrays, and batches of it."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_corpus import chapter_rows, letters_tokenizer, packages, rows, unit, write_corpus

from jv5kernels.training.batches import (
    LONG_KINDS,
    NEGATIVES_PER_ANCHOR,
    WIDTH,
    Batches,
    Source,
    grouped,
)
from jv5kernels.training.corpus import DEV_SHARE, KINDS, Rows, Texts, build_texts, read_packages
from jv5kernels.training.long_texts import Chapter, build_passages
from jv5kernels.training.recipe import RECIPE, Stage
from jv5kernels.training.run import tokenizer_for
from jv5kernels.training.teacher import mine_neighbours

WEIGHTS = {"nce": 1.0, "distill": 1.0, "paragraph": 1.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    chosen = packages(tmp_path_factory.mktemp("corpus"))
    texts = build_texts(
        [p for p in chosen if p.split == "train"], tokenizer_for(chosen, vocab_size=400)
    )
    rng = np.random.default_rng(0)
    targets = unit(rng.standard_normal((len(texts.english_texts), 32))).astype(np.float16)
    source = Source(texts, targets)
    queries = targets[texts.target[source.rows["query", True].first()]]
    keys = source.document_targets
    neighbours = mine_neighbours(queries, targets[keys], keys, count=8, device="cpu")
    return replace(source, neighbours=neighbours)


def stage(**changes: object) -> Stage:
    values = {"steps": 5, "batch": 12, "learning_rate": 1e-3, "weights": WEIGHTS, "max_tokens": 24}
    return Stage(**{**values, **changes})


def test_dev_is_a_part_of_train_and_whole_source_packages(tmp_path: Path) -> None:
    found = read_packages(write_corpus(tmp_path / "c.jsonl.xz", 400))
    given = {row["package"]: row for row in rows(400)}
    for package in found:
        aside = zlib.crc32(package.source.encode()) % DEV_SHARE == 0
        split = given[package.name]["split"]
        assert package.split == ("dev" if split == "train" and aside else split)
    assert {"train", "dev", "test"} == {package.split for package in found}
    assert found[7].section == "section2"


@pytest.mark.parametrize(
    "line", ["{", '{"package": "a"}', json.dumps({**rows(1)[0], "synopsis": {"de": "x"}})]
)
def test_a_line_that_is_no_package_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + "\n" + line + "\n", "utf-8")
    with pytest.raises(ValueError, match="corpus.jsonl:2: no package"):
        read_packages(path)


def test_texts_carry_prompts_and_share_the_english_target(tmp_path: Path) -> None:
    chosen = packages(tmp_path, 4)
    tokenizer = tokenizer_for(chosen, vocab_size=400)
    texts = build_texts(chosen, tokenizer)
    decoded = [
        tokenizer.decode(texts.ids[a:b].tolist())
        for a, b in zip(texts.offsets[:-1], texts.offsets[1:], strict=True)
    ]
    for i, text in enumerate(decoded):
        prompt = "Query: " if KINDS[texts.kind[i]] == "query" else "Document: "
        assert text.startswith(prompt)
        if texts.english[i]:
            assert text.removeprefix(prompt) == texts.english_texts[texts.target[i]]
    german = next(i for i, text in enumerate(decoded) if "für" in text)
    assert texts.english_texts[texts.target[german]] == chosen[1].synopsis["en"]
    assert sum(KINDS[k] == "paragraph" for k in texts.kind) == 8


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.floats(0, 0.999999))
def test_a_pick_is_one_of_the_package(counts: list[int], which: float) -> None:
    starts = np.cumsum([0, *counts])[:-1]
    found = Rows(np.arange(100, 100 + sum(counts)), starts, np.asarray(counts))
    having = np.flatnonzero(counts)
    picked = found.pick(having, np.full(len(having), which))
    for package, row in zip(having, picked, strict=True):
        assert 0 <= row - 100 - starts[package] < counts[package]
    if not all(counts):
        with pytest.raises(ValueError, match=f"package {counts.index(0)} has no"):
            found.first()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=20), st.integers(1, 160))
def test_groups_hold_every_text_once(lengths: list[int], limit: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    nothing = np.zeros(0)
    texts = Texts(nothing, offsets, *([nothing] * 4), [], nothing, nothing)
    order = np.arange(len(lengths))[::-1].copy()
    parts = grouped(texts, order, limit)
    where = torch.cat([part["rows"] for part in parts]).numpy()
    assert sorted(where) == list(range(len(lengths)))
    for part in parts:
        of = order[part["rows"].numpy()]
        assert (part["start"].numpy() == offsets[of]).all()
        cut = np.minimum(np.asarray(lengths)[of], limit)
        assert (part["last"].numpy() + 1 == cut).all()
        assert part["width"] % WIDTH == 0 and cut.max() <= part["width"] < cut.max() + WIDTH


@pytest.mark.parametrize("kind", ["pairs", "topics", "classes"])
def test_a_batch_depends_on_seed_and_step_alone(source: Source, kind: str) -> None:
    def flat(batch: dict) -> list:
        return [
            torch.as_tensor(value).tolist()
            for key in sorted(batch)
            for part in (batch[key] if isinstance(batch[key], list) else [{key: batch[key]}])
            for value in part.values()
        ]

    one, same, other = (Batches(source, stage(), kind, seed) for seed in (1, 1, 2))
    assert len(one) == 5
    _ = same[0], same[4]
    assert flat(one[3]) == flat(same[3])
    assert flat(one[3]) != flat(one[2]) and flat(one[3]) != flat(other[3])


def test_pairs_are_of_one_package_and_negatives_of_others(source: Source) -> None:
    batch = Batches(source, stage(hard_negatives=2), "pairs", 0)[0]
    count = len(batch["query_targets"])
    assert count == 12
    keys = batch["keys"].numpy()
    assert (keys[:count] == batch["document_targets"].numpy()).all()
    texts = source.texts
    package = {int(start): texts.package[i] for i, start in enumerate(texts.offsets[:-1])}

    def packages_of(parts: list[dict]) -> np.ndarray:
        found = np.empty(sum(len(part["rows"]) for part in parts), dtype=int)
        for part in parts:
            found[part["rows"]] = [package[int(start)] for start in part["start"]]
        return found

    queries, documents = packages_of(batch["queries"]), packages_of(batch["documents"])
    assert (queries == documents[:count]).all()
    assert len(documents) == len(keys) > count
    assert not np.isin(documents[count:], queries).any()
    assert (source.document_targets[documents] == keys).all()


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_a_long_text_is_of_many_parts_and_its_target_their_mean(source: Source, kind: str) -> None:
    source, prompt, seam = with_documentation(source), 2, 2**16 - 1
    batches = Batches(source, stage(batch=16, weights={"long": 1.0}), "pairs", 0)
    ids, mean = batches._long_text(np.random.default_rng(3), kind, 900)
    assert 300 < len(ids) <= 900
    parts = np.split(ids, np.flatnonzero(ids == seam))
    parts = [parts[0][prompt:], *(part[1:] for part in parts[1:])]
    passages = source.passages
    if kind == "documentation":
        of, first = passages, passages.targets[:, 0]
        vectors = source.passage_targets
    else:
        of, first, vectors = source.texts, source.texts.target, source.targets
    target = {
        of.ids[start + prompt : stop].tobytes(): vectors[row].astype(np.float32)
        for start, stop, row in zip(of.offsets[:-1], of.offsets[1:], first, strict=True)
    }
    assert len(parts) > 2
    expected = np.mean([target[part.tobytes()] for part in parts], axis=0)
    np.testing.assert_allclose(mean, expected, atol=1e-3)


def test_long_texts_bring_their_ids(source: Source) -> None:
    weights = {"distill": 1.0, "long": 1.0}
    batches = Batches(
        with_documentation(source), stage(batch=16, weights=weights, long_tokens=640), "pairs", 0
    )
    batch = batches[2]
    assert batch["long_targets"].shape == (16, 32)
    assert sorted(torch.cat([part["rows"] for part in batch["long"]]).tolist()) == list(range(16))
    for part in batch["long"]:
        assert part["ids"].shape == (len(part["rows"]), part["width"])
        assert (part["last"] < part["width"]).all() and part["width"] <= 640
    again = batches[2]
    assert all(
        torch.equal(a["ids"], b["ids"]) for a, b in zip(batch["long"], again["long"], strict=True)
    )


def with_documentation(source: Source) -> Source:
    """The source with passages, and a token that is in no text where parts meet."""
    chapters = [
        Chapter(row["source"], row["chapter"], row["language"], row["split"], row["sections"])
        for row in chapter_rows()
        if row["language"] == "en"
    ]
    passages = build_passages(chapters, letters_tokenizer())
    draw = np.random.default_rng(1).standard_normal((len(passages.english_texts), 32))
    return replace(
        source,
        passages=passages,
        passage_targets=unit(draw).astype(np.float16),
        prompt=2,
        newline=np.asarray([2**16 - 1], dtype=np.uint16),
    )


def test_classes_have_their_section_and_others(source: Source) -> None:
    batch = Batches(source, stage(batch=6), "classes", 0)[0]
    count = batch["anchors"]
    texts = source.texts
    package = {int(start): texts.package[i] for i, start in enumerate(texts.offsets[:-1])}
    sections = np.empty(count * (2 + NEGATIVES_PER_ANCHOR), dtype=int)
    for part in batch["items"]:
        sections[part["rows"]] = [texts.section[package[int(s)]] for s in part["start"]]
    anchors = batch["sections"].numpy()
    assert (sections[:count] == anchors).all() and (sections[count : 2 * count] == anchors).all()
    assert (sections[2 * count :].reshape(count, -1) != anchors[:, None]).all()


def test_mined_neighbours_are_the_nearest_of_other_texts() -> None:
    rng = np.random.default_rng(1)
    queries, documents = (unit(rng.standard_normal((9, 5))).astype(np.float16) for _ in range(2))
    keys = np.asarray([0, 1, 2, 3, 4, 4, 4, 7, 8])
    found = mine_neighbours(queries, documents, keys, count=3, device="cpu")
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    scores[keys[:, None] == keys[None, :]] = -9
    assert (found == np.argsort(-scores, axis=1)[:, :3]).all()


def test_the_recipe_trains_at_no_higher_base_than_it_serves() -> None:
    for one in (RECIPE.distillation, *RECIPE.adapters.values()):
        assert one.rope_theta <= RECIPE.inference_theta
    half = RECIPE.scaled(0.5, batch=100)
    assert half.distillation.steps == RECIPE.distillation.steps / 2
    assert half.adapters["retrieval"].batch == 100
