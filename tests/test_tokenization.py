"""Token ids: what prompts and truncation do to them, and that threads may share a tokenization."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from jv5kernels.synthetic.tokenizer import train_tokenizer
from jv5kernels.tokenization import Tokenization, resolve_prompt

FAMILIES = ["small", "nano", "qwen3-embedding"]
ENDS = {"small": [], "nano": ["<|end_of_text|>"], "qwen3-embedding": ["<|endoftext|>"]}
PROMPTS = {"query": "Query: ", "document": "Document: "}
# Any text that UTF-8 can hold.
TEXT = st.text(st.characters(codec="utf-8"), max_size=200)


@cache
def tokenization(family: str) -> Tokenization:
    return Tokenization(train_tokenizer(family), 512)


def native(family: str, text: str, max_length: int | None = None) -> list[int]:
    """Ids by the tokenizer's own truncation."""
    tokenizer = train_tokenizer(family)
    if max_length is not None:
        tokenizer.enable_truncation(max_length)
    return tokenizer.encode(text).ids


def tokens(family: str, text: str, **options) -> list[str]:
    ids = tokenization(family).encode([text], **options).ids[0]
    tokenizer = train_tokenizer(family)
    return [tokenizer.id_to_token(int(i)) for i in ids]


# Special tokens.


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_end_as_the_family_wants_and_begin_with_themselves(family):
    found = tokens(family, "Query: How fast does light travel?")
    end = ENDS[family]
    assert found[0] == "Query" and found[len(found) - len(end) :] == end
    assert not any(token.startswith("<|") for token in found[: len(found) - len(end)])


@pytest.mark.parametrize("family", FAMILIES)
def test_truncation_keeps_the_end(family):
    text = "Query: How fast does light travel in a vacuum?"
    cut = tokenization(family).encode([text], max_length=6)
    found = tokens(family, text, max_length=6)
    end = ENDS[family]
    assert len(found) == 6 and found[6 - len(end) :] == end
    assert found[: 6 - len(end)] == tokens(family, text)[: 6 - len(end)]
    assert cut.truncated.tolist() == [True]
    assert cut.lengths.tolist() == [len(tokens(family, text))]


@given(TEXT, st.integers(2, 40), st.sampled_from(FAMILIES))
def test_truncation_is_that_of_the_tokenizer(text, max_length, family):
    text = "x" + text
    encoded = tokenization(family).encode([text], max_length=max_length)
    whole = native(family, text)
    assert encoded.ids[0].tolist() == native(family, text, max_length)
    assert encoded.ids[0].dtype == np.int32
    assert encoded.lengths[0] == len(whole) and encoded.truncated[0] == (len(whole) > max_length)


@given(TEXT, st.sampled_from(sorted(PROMPTS)), st.sampled_from(FAMILIES))
def test_prompt_and_text_are_joined_before_they_are_tokenised(text, name, family):
    prompted = resolve_prompt(PROMPTS, "document", name) + text
    assert (
        tokenization(family).encode([prompted]).ids[0].tolist()
        == native(family, PROMPTS[name] + text)[:512]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompts_space_merges_into_the_text(family):
    apart = tokens(family, "Query: ")[: 3 if family == "small" else -1] + tokens(family, "How fast")
    joined = tokens(family, "Query: How fast")
    assert joined[:3] == ["Query", ":", "ĠHow"] and apart[:4] == ["Query", ":", "Ġ", "H"]
    assert len(joined) < len(apart)


def test_digits_are_split_as_in_the_real_tokenizers():
    assert tokens("small", "1234")[:4] == ["1", "2", "3", "4"]
    corpus = ["in 299 792 458 and 299"] * 9
    nano = train_tokenizer("nano", corpus)
    assert nano.encode("2994").tokens == ["299", "4", "<|end_of_text|>"]
    assert train_tokenizer("small", corpus).encode("299").tokens == ["2", "9", "9"]


def test_empty_and_blank_texts():
    assert tokens("nano", "") == ["<|end_of_text|>"]
    assert tokens("small", "Document: ")[0] == "Document"
    with pytest.raises(
        ValueError, match=r"texts\[1\] gives no tokens: it is empty, without a prompt"
    ):
        tokenization("small").encode(["a", "", "b"])
    with pytest.raises(ValueError, match=r"texts\[17\] gives no tokens"):
        tokenization("small").encode(["a", ""], positions=np.array([4, 17]))
    assert list(tokenization("small").encode([]).ids) == []


def test_ids_are_made_when_they_are_asked_for():
    ids = tokenization("nano").encode(["a text", "another one"]).ids
    assert ids[0] is not ids[0] and np.array_equal(ids[0], ids[0])
    assert [part.tolist() for part in ids[1:]] == [ids[1].tolist()]


def test_a_tokenizer_that_puts_tokens_on_both_sides():
    tokenizer = Tokenizer(
        WordLevel({"[B]": 0, "[E]": 1, "?": 2, **{c: ord(c) for c in "abcd789"}}, "?")
    )
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["[B]", "[E]"])
    ends = {"special_tokens": [("[B]", 0), ("[E]", 1)]}
    tokenizer.post_processor = TemplateProcessing(single="[B] $A [E] [E]", **ends)
    both = Tokenization(tokenizer, 5)
    assert both.encode(["a b c d"]).ids[0].tolist() == [0, ord("a"), ord("b"), 1, 1]
    with pytest.raises(
        ValueError, match="max_seq_length=2 is too small: this tokenizer needs at least 3"
    ):
        Tokenization(tokenizer, 2)


def test_an_end_that_truncation_would_drop_is_refused():
    tokenizer = train_tokenizer("small")
    tokenizer.normalizer = normalizers.Replace(Regex("$"), "!")
    assert tokenizer.encode("a b").tokens[-1] == "!"
    with pytest.raises(ValueError, match=r"ends texts with \['!'\], but truncated ones with"):
        Tokenization(tokenizer, 16)


# Independence.


def test_the_tokenizer_given_is_neither_changed_nor_watched():
    tokenizer = train_tokenizer("nano")
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    mine = Tokenization(tokenizer, 512)
    assert tokenizer.padding["length"] == 64 and tokenizer.truncation["max_length"] == 3
    expected = native("nano", "a text of several tokens")
    assert mine.encode(["a text of several tokens"]).ids[0].tolist() == expected
    tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert mine.encode(["a text of several tokens"]).ids[0].tolist() == expected


def test_sixteen_threads_with_lengths_of_their_own():
    shared = tokenization("nano")
    texts = [f"Document: text number {i}, " + "longer and longer " * (i % 9) for i in range(40)]
    expected = {n: [native("nano", text, n) for text in texts] for n in range(3, 19)}

    def work(thread: int) -> int:
        length, calls = thread + 3, 0
        for call in range(1000):
            i = (call * 7 + thread) % len(texts)
            found = shared.encode([texts[i]], max_length=length).ids[0]
            assert found.tolist() == expected[length][i]
            calls += 1
        return calls

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(work, range(16))) == 16_000


# Arguments.


@pytest.mark.parametrize(
    "bad, kind", [(None, "NoneType"), (3, "int"), (b"x", "bytes"), (["a"], "list")]
)
def test_what_is_not_a_str_is_named(bad, kind):
    with pytest.raises(TypeError, match=rf"texts\[2\] must be a str, not {kind}"):
        tokenization("small").encode(["a", "b", bad, 5])
    with pytest.raises(TypeError, match=rf"texts\[9\] must be a str, not {kind}"):
        tokenization("small").encode([bad], positions=[9])


def test_a_lone_surrogate_is_named():
    with pytest.raises(ValueError, match=r"texts\[1\] is not valid Unicode: .*surrogates"):
        tokenization("small").encode(["a", "b\ud800"])


@pytest.mark.parametrize("family, length", [("small", 0), ("nano", 0), ("nano", -1)])
def test_a_length_without_room_is_refused(family, length):
    with pytest.raises(ValueError, match=f"max_length={length} is too small.* at least 1"):
        tokenization(family).encode(["a"], max_length=length)
    with pytest.raises(ValueError, match=f"max_seq_length={length} is too small"):
        Tokenization(train_tokenizer(family), length)


def test_resolve_prompt():
    assert resolve_prompt(PROMPTS, "document") == "Document: "
    assert resolve_prompt(PROMPTS, None) == ""
    assert resolve_prompt(PROMPTS, "document", "query") == "Query: "
    assert resolve_prompt(PROMPTS, "document", "query", "Other: ") == "Other: "
    assert resolve_prompt(PROMPTS, "document", "query", "") == ""
    with pytest.raises(
        ValueError, match=r"prompt_name='passage' is unknown: choose one of \['document', 'query'\]"
    ):
        resolve_prompt(PROMPTS, "document", "passage")
    with pytest.raises(ValueError, match="default_prompt_name='document' is unknown.*'' for none"):
        resolve_prompt({}, "document")
    with pytest.raises(TypeError, match="prompt must be a str, not int"):
        resolve_prompt(PROMPTS, "document", prompt=3)
