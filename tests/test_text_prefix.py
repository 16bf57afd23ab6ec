"""Prefixes of long texts: their tokens begin those of the whole, whatever the text, and truncation does not notice."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from jv5kernels import text_prefix
from jv5kernels.synthetic.tokenizer import train_tokenizer
from jv5kernels.text_prefix import CUT, TextPrefix
from jv5kernels.tokenization import Tokenization

FAMILIES = ["small", "nano", "qwen3-embedding"]
# What the pattern treats apart, and what composes under NFC.
PIECES = [
    *" \n\t\r.,'\"!-_1²x\u0301\u0308\u3099\u00a0\u2028\u180e\x1c\u200d",
    *[
        "'s",
        "'LL",
        "word",
        "12345",
        "e\u0301",
        "ᄒ",
        "ᅡ",
        "ᆫ",
        "한",
        "漢字",
        "か",
        "。",
        "，",
        "🙂",
        "ก็",
    ],
    *["  ", "\r\n", " \n ", "<|endoftext|>", "<|end_of_text|>", "<|mask|>"],
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@cache
def tokenizer(family: str) -> Tokenizer:
    return train_tokenizer(family)


def bare(family: str, text: str) -> list[int]:
    return tokenizer(family).encode(text, add_special_tokens=False).ids


@settings(max_examples=300)
@given(TEXT, st.sampled_from(FAMILIES))
@example("漢字。 a  b\n c", "small")
def test_every_cut_gives_a_prefix_of_the_tokens_and_the_rest_gives_the_rest(text, family):
    whole = bare(family, text)
    for found in CUT.finditer(text):
        cut = found.start()
        assert bare(family, text[:cut]) + bare(family, text[cut:]) == whole


@pytest.fixture
def eager_cuts(monkeypatch):
    """Cuts texts of a few words."""
    monkeypatch.setattr(text_prefix, "CHARACTERS_A_TOKEN", 2)
    monkeypatch.setattr(text_prefix, "SEARCH_CHARACTERS", 30)
    monkeypatch.setattr(text_prefix, "WORTHWHILE", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_of_cut_texts_is_that_of_the_tokenizer(family, eager_cuts):
    random = np.random.default_rng(0)
    native = Tokenizer.from_str(tokenizer(family).to_str())
    ours = Tokenization(tokenizer(family), 512)
    cuts = 0
    for _ in range(300):
        text = "x" + "".join(random.choice(PIECES, int(random.integers(1, 200))))
        limit = int(random.integers(2, 40))
        native.enable_truncation(limit)
        found = ours.encode([text], max_length=limit)
        assert found.ids[0].tolist() == native.encode(text).ids, (text, limit)
        length = len(tokenizer(family).encode(text))
        assert found.truncated[0] == (length > limit) and found.lengths[0] <= length
        assert found.lengths[0] == length or found.lengths[0] > limit
        cuts += found.lengths[0] < length
    assert cuts > 50


def test_a_long_text_is_not_tokenised_whole(monkeypatch):
    ours = Tokenization(tokenizer("nano"), 512)
    seen = []
    original = ours._encode_all
    monkeypatch.setattr(
        ours, "_encode_all", lambda texts, names: seen.extend(texts) or original(texts, names)
    )
    text = "some words of a text that does not end " * 100_000
    found = ours.encode([text], max_length=128)
    assert max(map(len, seen)) < 10_000
    assert found.truncated.tolist() == [True] and len(found.ids[0]) == 128
    assert (
        found.ids[0].tolist()
        == Tokenization(tokenizer("nano"), 512)
        .encode([text[:20_000]], max_length=128)
        .ids[0]
        .tolist()
    )


def test_a_text_of_few_tokens_is_tokenised_whole():
    text = "a" + " " * 50_000 + "b " + " " * 50_000 + "c"
    found = Tokenization(tokenizer("small"), 512).encode([text], max_length=64)
    assert found.lengths[0] == len(tokenizer("small").encode(text))


def changed(edit) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer("small").to_str())
    edit(copy)
    return copy


def test_other_tokenizers_are_not_cut():
    def lowercase(t: Tokenizer) -> None:
        t.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])

    def split_otherwise(t: Tokenizer) -> None:
        t.pre_tokenizer = pre_tokenizers.Metaspace()

    def add_phrase(t: Tokenizer) -> None:
        t.add_tokens([AddedToken("two words")])

    assert TextPrefix(tokenizer("small")).can_cut
    for edit in (lowercase, split_otherwise, add_phrase):
        prefix = TextPrefix(changed(edit))
        text = "word " * 10_000
        assert not prefix.can_cut and prefix.of(text, 8) is text
