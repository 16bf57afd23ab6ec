"""Spans of one text from one pass: against a slow pool of its token embeddings, and what truncation leaves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_folders import written  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.util import quantize_embeddings

from jv5kernels import FastEncoder
from jv5kernels.backbone import PackedBackbone
from jv5kernels.synthetic.checkpoint import write_checkpoint

TEXT = (
    "The quick brown fox.  Il n'y a pas de fumée sans feu! 漢字は難しい。 "
    "Decomposed e\u0301 and ﬁ ligature\n\n\tand code: x = {k: v}. The end"
)
SENTENCE = re.compile(r"[^.!。]+[.!。]?")


def sentences(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in SENTENCE.finditer(text)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(root / name, family=name) for name in ("small", "nano")}


@pytest.fixture(scope="module")
def encoders(folders) -> dict[str, FastEncoder]:
    return {
        name: FastEncoder(folder, device="cpu", task="retrieval")
        for name, folder in folders.items()
    }


def by_hand(encoder: FastEncoder, text: str, span: tuple[int, int], prompt: str, dim: int):
    """The mean of the token embeddings of a span, found by walking over the tokenizer's offsets."""
    encoding = encoder.checkpoint.tokenizer().encode(prompt + text)
    start, end = span[0] + len(prompt), span[1] + len(prompt)
    rows = [
        i
        for i, (a, b) in enumerate(encoding.offsets)
        if not encoding.special_tokens_mask[i] and a < end and b > start
    ]
    tokens = encoder.encode(text, prompt=prompt, output_value="token_embeddings")
    mean = tokens[rows].double().numpy().mean(0)[:dim]
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("prompt", ["Document: ", "", "Ends in a word"])
@pytest.mark.parametrize("name", ["small", "nano"])
def test_spans_are_the_mean_of_their_tokens(name, prompt, encoders) -> None:
    encoder = encoders[name]
    spans = [*sentences(TEXT), (0, len(TEXT)), (3, 9), (5, 6), (0, 1), (len(TEXT) - 1, len(TEXT))]
    found = encoder.encode_chunks(TEXT, spans, prompt=prompt, truncate_dim=32)
    assert found.embeddings.shape == (len(spans), 32) and len(found) == len(spans)
    assert found.spans.tolist() == [list(span) for span in spans] and found.cut == ()
    for span, embedding in zip(spans, found.embeddings, strict=True):
        wanted = by_hand(encoder, TEXT, span, prompt, 32)
        assert embedding @ wanted > 1 - 1e-6, span
    whole = encoder.encode(TEXT, prompt=prompt, truncate_dim=32)
    assert found.text @ whole > 1 - 1e-6


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "cls"])
def test_the_whole_text_is_pooled_as_in_encode(folders, pooling) -> None:
    encoder = FastEncoder(folders["nano"], device="cpu", task="retrieval", pooling=pooling)
    found = encoder.encode_chunks(TEXT, sentences)
    assert found.text @ encoder.encode(TEXT) > 1 - 1e-6
    alone = encoder.encode_chunks(TEXT, [])
    assert alone.embeddings.shape == (0, encoder.spec.hidden_size)
    assert alone.text @ found.text > 1 - 1e-6


def test_last_tokens_of_spans(encoders) -> None:
    encoder = encoders["small"]
    found = encoder.encode_chunks(TEXT, sentences, span_pooling="lasttoken", prompt="")
    tokens = encoder.encode(TEXT, prompt="", output_value="token_embeddings")
    wanted = torch.nn.functional.normalize(tokens[found.tokens[:, 1] - 1], dim=1).numpy()
    assert ((found.embeddings * wanted).sum(1) > 1 - 1e-6).all()


@pytest.mark.parametrize("name", ["small", "nano"])
def test_token_spans_count_from_the_first_token_of_the_text(name, encoders) -> None:
    encoder = encoders[name]
    by_characters = encoder.encode_chunks(TEXT, sentences)
    assert by_characters.tokens[0, 0] == 0
    by_tokens = encoder.encode_chunks(TEXT, by_characters.tokens, unit="tokens")
    np.testing.assert_allclose(by_tokens.embeddings, by_characters.embeddings, atol=1e-6)
    assert np.array_equal(by_tokens.tokens, by_characters.tokens)
    last = by_characters.tokens.max()
    encoder.encode_chunks(TEXT, [(last - 1, last)], unit="tokens")
    with pytest.raises(ValueError, match=rf"span 0 \(0, {last + 1}\).*has {last} tokens"):
        encoder.encode_chunks(TEXT, [(0, last + 1)], unit="tokens")


@settings(max_examples=20)
@given(st.text(min_size=1, max_size=30), st.data())
def test_every_character_belongs_to_a_token(encoders, text: str, data: st.DataObject) -> None:
    encoder = encoders[data.draw(st.sampled_from(["small", "nano"]))]
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    found = encoder.encode_chunks(text, [(start, end), (0, len(text)), (start, start + 1)])
    (part, whole, one) = found.tokens
    assert whole[0] == 0 and (found.tokens[:, 0] < found.tokens[:, 1]).all()
    assert whole[0] <= part[0] <= one[0] and one[1] <= part[1] <= whole[1]
    assert np.isfinite(found.embeddings).all()


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary", "float16"])
def test_precisions_are_those_of_encode(precision, encoders) -> None:
    encoder = encoders["small"]
    calibration = encoder.calibrate([TEXT[a:b] for a, b in sentences(TEXT)], truncate_dim=24)
    options = {"truncate_dim": 24, "calibration": calibration}
    floats = encoder.encode_chunks(TEXT, sentences, **options)
    found = encoder.encode_chunks(TEXT, sentences, precision=precision, **options)
    everything = np.vstack([floats.embeddings, floats.text])
    if precision == "float16":
        expected = everything.astype(np.float16)
    else:
        expected = quantize_embeddings(everything, precision, ranges=calibration.ranges)
    assert found.embeddings.dtype == found.text.dtype == expected.dtype
    assert np.array_equal(np.vstack([found.embeddings, found.text]), expected)
    if precision == "binary":
        for_faiss = encoder.encode_chunks(
            TEXT, sentences, precision="binary", profile="faiss", **options
        )
        lsb_first = np.packbits(everything > 0, axis=1, bitorder="little")
        assert np.array_equal(np.vstack([for_faiss.embeddings, for_faiss.text]), lsb_first)


def test_tensors_stay_on_the_device(encoders) -> None:
    found = encoders["small"].encode_chunks(TEXT, sentences, convert_to_tensor=True)
    assert isinstance(found.embeddings, torch.Tensor) and isinstance(found.text, torch.Tensor)
    assert encoders["small"].encode_chunks(
        TEXT, sentences, precision="bfloat16"
    ).embeddings.dtype == (torch.bfloat16)


def test_one_pass_serves_all_spans(encoders, monkeypatch) -> None:
    calls = []
    original = PackedBackbone.forward_pooled

    def counted(self, batch, pooling):
        calls.append(batch.total_tokens)
        return original(self, batch, pooling)

    monkeypatch.setattr(PackedBackbone, "forward_pooled", counted)
    spans = [(i, i + 5) for i in range(len(TEXT) - 5)]
    encoder = encoders["nano"]
    before = encoder.statistics.to_dict()
    encoder.encode_chunks(TEXT, spans)
    assert calls == [len(encoder.tokenize([TEXT], prompt="Document: ")[0])]
    assert encoder.statistics.tokens - before["tokens"] == calls[0]


def test_spans_beyond_the_limit_are_reported_or_refused(folders) -> None:
    encoder = FastEncoder(folders["nano"], device="cpu", task="retrieval", max_seq_length=20)
    text = "word " * 60
    with pytest.warns(UserWarning, match="longer than 20 tokens and was cut; 2 of 3 spans"):
        found = encoder.encode_chunks(text, [(0, 10), (20, 200), (0, len(text))])
    assert found.cut == (1, 2)
    assert found.tokens[1, 1] == found.tokens[2, 1] < 60
    # The end-of-text token survives truncation, and no span holds it.
    assert found.text @ encoder.encode(text[: 5 * 16]) > 0.5
    tokens = encoder.encode(text, output_value="token_embeddings")
    whole = torch.nn.functional.normalize(tokens[-1], dim=0).numpy()
    assert found.text @ whole > 1 - 1e-6
    read = found.tokens[2, 1]
    prompted = len(encoder.tokenize([""], prompt="Document: ")[0])
    assert read == 20 - (prompted - 1), "all but the prompt and the end-of-text token"
    with pytest.raises(ValueError, match=r"span 1 \(250, 260\) lies beyond the 20 tokens"):
        encoder.encode_chunks(text, [(0, 10), (250, 260)])
    with pytest.raises(ValueError, match="end at character"):
        encoder.encode_chunks(text, [(40, 41)], unit="tokens")
    strict = FastEncoder(
        folders["nano"], device="cpu", task="retrieval", max_seq_length=20, on_overlong="error"
    )
    with pytest.raises(ValueError, match="longer than max_seq_length=20"):
        strict.encode_chunks(text, [(0, 10)])


@pytest.mark.parametrize(
    ("spans", "error", "message"),
    [
        ([(0, 4), (4, 4)], ValueError, r"span 1 \(4, 4\) is empty"),
        ([(5, 2)], ValueError, r"span 0 \(5, 2\) is empty"),
        ([(-1, 2)], ValueError, r"span 0 \(-1, 2\) is out of range: the text has 8 characters"),
        ([(0, 9)], ValueError, r"span 0 \(0, 9\) is out of range: the text has 8 characters"),
        ([(0, 1, 2)], ValueError, r"span 0 must be a pair \(start, end\)"),
        ([(0, 1.5)], TypeError, r"span 0 must be a pair of ints"),
        ([(0, True)], TypeError, r"span 0 must be a pair of ints"),
        (lambda text: [(0, len(text)), (3, 1)], ValueError, r"span 1 \(3, 1\) is empty"),
    ],
)
def test_wrong_spans_are_named(spans, error, message, encoders) -> None:
    for encoder in encoders.values():
        with pytest.raises(error, match=message):
            encoder.encode_chunks("a kernel", spans)


def test_wrong_arguments_are_named(encoders) -> None:
    encoder = encoders["small"]
    with pytest.raises(TypeError, match="text must be a str, not list"):
        encoder.encode_chunks(["a"], [(0, 1)])
    with pytest.raises(ValueError, match="not valid Unicode"):
        encoder.encode_chunks("\ud800", [(0, 1)])
    with pytest.raises(ValueError, match="gives no tokens"):
        encoder.encode_chunks("", [], prompt="")
    with pytest.raises(ValueError, match="unit='words' is unknown"):
        encoder.encode_chunks("a", [(0, 1)], unit="words")
    with pytest.raises(ValueError, match="span_pooling='cls' is unknown"):
        encoder.encode_chunks("a", [(0, 1)], span_pooling="cls")
    with pytest.raises(ValueError, match="a chunker gives characters"):
        encoder.encode_chunks("a", sentences, unit="tokens")
    with pytest.raises(ValueError, match=r"span 0 \(0, 1\) is out of range: the text has 0 char"):
        encoder.encode_chunks("", [(0, 1)])
    assert encoder.encode_chunks("", []).text @ encoder.encode("") > 1 - 1e-6
    with pytest.raises(ValueError, match="needs a range for every dimension"):
        encoder.encode_chunks("a", [(0, 1)], precision="int8")


def test_what_is_not_finite_is_computed_again_or_refused(encoders, monkeypatch) -> None:
    encoder = encoders["small"]
    expected = encoder.encode_chunks(TEXT, sentences).embeddings
    original, planted = PackedBackbone.forward_pooled, [float("inf")]

    def overflowing(self, batch, pooling):
        hidden, cu_seqlens = original(self, batch, pooling)
        if planted:
            hidden[7] = planted.pop()
        return hidden, cu_seqlens

    monkeypatch.setattr(PackedBackbone, "forward_pooled", overflowing)
    before = encoder.statistics.recomputed_rows
    found = encoder.encode_chunks(TEXT, sentences).embeddings
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert encoder.statistics.recomputed_rows == before + 1
    planted += [float("nan"), float("nan")]
    with pytest.raises(FloatingPointError, match="the embedding of span 0 holds NaN or Inf"):
        encoder.encode_chunks(TEXT, sentences)


def test_a_text_that_does_not_fit_says_so(encoders, monkeypatch) -> None:
    def full(self, batch, pooling):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(PackedBackbone, "forward_pooled", full)
    with pytest.raises(torch.OutOfMemoryError, match="a text of .* tokens does not fit"):
        encoders["small"].encode_chunks(TEXT, sentences)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["small", "nano"])
def test_spans_on_the_gpu_are_those_of_the_cpu(folders, encoders, name) -> None:
    encoder = FastEncoder(folders[name], device="cuda", task="retrieval", dtype=torch.float32)
    text = TEXT * 40
    spans = [*sentences(text), (0, len(text)), (5, 6)]
    expected = encoders[name].encode_chunks(text, spans)
    found = encoder.encode_chunks(text, spans)
    assert ((found.embeddings * expected.embeddings).sum(1) > 1 - 1e-5).all()
    assert found.text @ expected.text > 1 - 1e-5
    floats = np.vstack([found.embeddings, found.text])
    bits = encoder.encode_chunks(text, spans, precision="ubinary")
    assert np.array_equal(np.vstack([bits.embeddings, bits.text]), np.packbits(floats > 0, axis=1))
