"""FastEncoder against Transformers and peft in fp32, and what people rely on besides the numbers."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantize_embeddings

from jv5kernels import FastEncoder
from jv5kernels.backbone import PackedBackbone
from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.comparison.reference import load_reference, reference_embeddings
from jv5kernels.synthetic.checkpoint import write_checkpoint

TASKS = ("retrieval", "text-matching", "clustering", "classification")
TEXTS = [
    "a",
    "",
    "   ",
    "What is a kernel?",
    "Il n'y a pas de fumée sans feu. " * 9,
    "長い文章は多くのトークンになります。" * 12,
    "Эмбеддинги остаются хорошими после усечения.",
    "x = {k: v for k, v in pairs}\n\treturn x",
] + [f"document number {i} " * (i % 7 + 1) for i in range(20)]
# fp32 against fp32: what is left is the order of additions.
MIN_COSINE = 0.999999


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """All ten layouts and Qwen3-Embedding's, at small width."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for family in ("small", "nano"):
        made[family] = write_checkpoint(root / family, family=family, layout="base")
        for task in TASKS:
            made[f"{family}-{task}"] = write_checkpoint(
                root / f"{family}-{task}", family=family, layout="merged", task=task
            )
    made["qwen3-embedding"] = write_checkpoint(
        root / "qwen3-embedding", family="qwen3-embedding", layout="merged"
    )
    return made


@pytest.fixture(scope="module")
def encoders(folders) -> dict[str, FastEncoder]:
    return {name: FastEncoder(folder, device="cpu") for name, folder in folders.items()}


def reference(folder: Path, texts: list[str], task: str | None = None, **options) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    prompt = checkpoint.prompts.get(checkpoint.default_prompt_name or "", "")
    model = load_reference(checkpoint, task)
    return reference_embeddings(model, checkpoint, [prompt + text for text in texts], **options)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["small", "nano"])
def test_base_repositories_match_the_reference(family, task, folders, encoders):
    ours = encoders[family].encode(TEXTS, task=task)
    assert ours.dtype == np.float32 and ours.shape == (
        len(TEXTS),
        encoders[family].spec.hidden_size,
    )
    assert cosine(ours, reference(folders[family], TEXTS, task)) >= MIN_COSINE


@pytest.mark.parametrize(
    "name", [f"{f}-{t}" for f in ("small", "nano") for t in TASKS] + ["qwen3-embedding"]
)
def test_plain_repositories_match_the_reference(name, folders, encoders):
    assert cosine(encoders[name].encode(TEXTS), reference(folders[name], TEXTS)) >= MIN_COSINE


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "cls"])
@pytest.mark.parametrize("name", ["small-retrieval", "nano-retrieval"])
def test_poolings_match_the_reference(name, pooling, folders):
    encoder = FastEncoder(folders[name], device="cpu", pooling=pooling)
    expected = reference(folders[name], TEXTS, pooling=pooling)
    assert cosine(encoder.encode(TEXTS), expected) >= MIN_COSINE


@pytest.mark.parametrize("name", ["small-retrieval", "nano-retrieval"])
def test_lengths_match_the_reference(name, folders, tmp_path):
    encoder = FastEncoder(folders[name], device="cpu")
    longest = encoder.max_seq_length
    words = " ".join(TEXTS) * 200
    texts = [words[:n] for n in (1, 2, 63, 64, 65, 300, 1000, 5000)]
    texts.append(words[: longest * 3])
    lengths = [len(ids) for ids in encoder.tokenize(texts)]
    assert max(lengths) >= min(4096, longest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = encoder.encode(texts)
    assert cosine(ours, reference(folders[name], texts)) >= MIN_COSINE


def test_a_text_of_32768_tokens(tmp_path):
    geometry = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 32768,
    }
    folder = write_checkpoint(tmp_path / "long", family="small", layout="merged", geometry=geometry)
    encoder = FastEncoder(folder, device="cpu")
    text = " ".join(TEXTS) * 300
    with pytest.warns(UserWarning, match="1 of 1 texts were longer than 32768 tokens"):
        ours = encoder.encode([text])
    assert len(encoder.tokenize([text])[0]) == 32768
    assert cosine(ours, reference(folder, [text])) >= MIN_COSINE


def test_order_and_batching_do_not_matter(encoders):
    encoder = encoders["nano-retrieval"]
    whole = encoder.encode(TEXTS)
    backwards = encoder.encode(TEXTS[::-1])[::-1]
    small_batches = encoder.encode(TEXTS, batch_size=3)
    assert cosine(whole, backwards) >= MIN_COSINE and cosine(whole, small_batches) >= MIN_COSINE


@pytest.mark.parametrize("name", ["small-retrieval", "nano-retrieval"])
def test_batch_invariant_gives_the_same_bits(name, folders):
    encoder = FastEncoder(folders[name], device="cpu", batch_invariant=True)
    together = encoder.encode(TEXTS)
    alone = np.stack([encoder.encode(text) for text in TEXTS])
    assert np.array_equal(together, alone)
    assert np.array_equal(encoder.encode(TEXTS[::-1])[::-1], alone)


def test_same_call_same_bits(encoders):
    first = encoders["small-retrieval"].encode(TEXTS)
    assert all(np.array_equal(first, encoders["small-retrieval"].encode(TEXTS)) for _ in range(5))


def test_one_task_per_text(encoders):
    encoder = encoders["small"]
    tasks = [TASKS[i % 4] for i in range(len(TEXTS))]
    mixed = encoder.encode(TEXTS, task=tasks)
    for task in TASKS:
        rows = [i for i, t in enumerate(tasks) if t == task]
        alone = encoder.encode([TEXTS[i] for i in rows], task=task)
        assert cosine(mixed[rows], alone) >= MIN_COSINE
    assert cosine(mixed[:1], encoder.encode(TEXTS[:1], task="clustering")) < 0.9999


def test_tasks_share_the_embedding_table(encoders):
    encoder = encoders["small"]
    encoder.encode("a", task="retrieval")
    encoder.encode("a", task="clustering")
    backbones = [encoder._backbones.get(task) for task in ("retrieval", "clustering")]
    assert backbones[0].embedding.data_ptr() == backbones[1].embedding.data_ptr()
    assert backbones[0].rope.data_ptr() == backbones[1].rope.data_ptr()


def test_threads_with_different_tasks_get_what_each_gets_alone(folders):
    encoder = FastEncoder(folders["small"], device="cpu")
    expected = {task: encoder.encode(TEXTS, task=task) for task in TASKS}
    fresh = FastEncoder(folders["small"], device="cpu")
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = fresh.encode(TEXTS, task=TASKS[index % 4])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for index, embeddings in found.items():
        assert np.array_equal(embeddings, expected[TASKS[index % 4]])


def test_prompts(encoders):
    encoder = encoders["small"]
    encoder_default = encoder.encode("text", task="retrieval")
    assert np.array_equal(encoder_default, encoder.encode_document("text", task="retrieval"))
    query = encoder.encode_query("text", task="retrieval")
    assert np.array_equal(query, encoder.encode("text", task="retrieval", prompt="Query: "))
    assert np.array_equal(query, encoder.encode("Query: text", task="retrieval", prompt=""))
    assert not np.allclose(query, encoder_default)
    with pytest.raises(ValueError, match="prompt_name.*'passage'.*query"):
        encoder.encode("text", task="retrieval", prompt_name="passage")


@pytest.mark.parametrize("dim", [1, 7, 32, 60])
def test_truncated_embeddings_are_sliced_then_normalised(dim, encoders):
    encoder = encoders["small-retrieval"]
    full = encoder.encode(TEXTS, normalize_embeddings=False)
    cut = encoder.encode(TEXTS, truncate_dim=dim)
    expected = full[:, :dim] / np.linalg.norm(full[:, :dim], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.parametrize("dim", [32, 61])
def test_quantised_output_is_that_of_sentence_transformers(precision, dim, encoders):
    encoder = encoders["nano-retrieval"]
    floats = encoder.encode(TEXTS, truncate_dim=dim)
    ranges = np.stack([floats.min(0), floats.max(0)])
    codes = encoder.encode(TEXTS, truncate_dim=dim, precision=precision, ranges=ranges)
    expected = quantize_embeddings(floats, precision, ranges=ranges)
    assert codes.dtype == expected.dtype and np.array_equal(codes, expected)


def test_half_precisions(encoders):
    encoder = encoders["nano-retrieval"]
    floats = encoder.encode(TEXTS)
    assert encoder.encode(TEXTS, precision="float16").dtype == np.float16
    bf16 = encoder.encode(TEXTS, precision="bfloat16")
    assert bf16.dtype == torch.bfloat16
    np.testing.assert_allclose(bf16.float().numpy(), floats, atol=4e-3)


def test_int8_without_ranges_is_refused_with_an_explanation(encoders):
    with pytest.raises(
        ValueError, match=r"precision='int8' needs a range for every dimension.*calibrate.*'batch'"
    ):
        encoders["nano-retrieval"].encode(TEXTS, precision="int8")
    with pytest.raises(ValueError, match=r"ranges must have shape \(2, 32\), not \(2, 31\)"):
        encoders["nano-retrieval"].encode(
            TEXTS, precision="int8", truncate_dim=32, ranges=np.zeros((2, 31))
        )


def test_forms_of_input_and_output(encoders):
    encoder = encoders["small-retrieval"]
    width = encoder.get_sentence_embedding_dimension()
    assert encoder.encode([]).shape == (0, width)
    assert encoder.encode([], precision="binary").shape == (0, width // 8)
    one = encoder.encode("one text")
    assert one.shape == (width,) and np.array_equal(one, encoder.encode(("one text",))[0])
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
    tensors = encoder.encode(TEXTS[:3], convert_to_numpy=False)
    assert [t.shape for t in tensors] == [(width,)] * 3
    assert encoder.similarity(tensor[:2], tensor).shape == (2, len(TEXTS))


def test_token_embeddings(encoders, folders):
    encoder = encoders["small-retrieval"]
    tokens = encoder.encode(TEXTS[:5], output_value="token_embeddings")
    prompted = encoder.tokenize(TEXTS[:5], prompt="Document: ")
    assert [t.shape for t in tokens] == [(len(ids), encoder.spec.hidden_size) for ids in prompted]
    last = torch.stack([t[-1] for t in tokens]).numpy()
    assert cosine(last, encoder.encode(TEXTS[:5])) >= MIN_COSINE
    with pytest.raises(ValueError, match="output_value='logits'"):
        encoder.encode("a", output_value="logits")


def test_what_is_not_a_text_is_refused_before_anything_runs(encoders):
    encoder = encoders["small-retrieval"]
    before = encoder.statistics.to_dict()
    with pytest.raises(TypeError, match=r"inputs\[2\] must be a str, not NoneType"):
        encoder.encode(["a", "b", None])
    with pytest.raises(TypeError, match="must be a str or a sequence of str, not int"):
        encoder.encode(7)
    assert encoder.statistics.to_dict() == before


def test_unknown_names_list_the_valid_ones(encoders, folders):
    encoder = encoders["small"]
    with pytest.raises(ValueError, match="task is needed.*retrieval"):
        encoder.encode("a")
    with pytest.raises(ValueError, match="task='search' is unknown.*text-matching"):
        encoder.encode("a", task="search")
    with pytest.raises(ValueError, match="task has 1 entries for 2 texts"):
        encoder.encode(["a", "b"], task=["retrieval"])
    with pytest.raises(ValueError, match="this checkpoint has no adapters"):
        encoders["small-retrieval"].encode("a", task="retrieval")
    with pytest.raises(ValueError, match="precision='int4' is unknown.*ubinary"):
        encoder.encode("a", task="retrieval", precision="int4")
    with pytest.raises(ValueError, match="truncate_dim=100000 is out of range"):
        encoder.encode("a", task="retrieval", truncate_dim=100000)
    with pytest.raises(ValueError, match="device='meta'"):
        FastEncoder(folders["small"], device="meta")
    with pytest.raises(ValueError, match="max_seq_length=0 is out of range"):
        FastEncoder(folders["small"], device="cpu", max_seq_length=0)
    with pytest.raises(ValueError, match="batch_invariant=True"):
        FastEncoder(folders["nano-retrieval"], device="cpu", attention="sdpa", batch_invariant=True)


def test_overlong_texts_are_cut_counted_or_refused(folders):
    encoder = FastEncoder(folders["nano-retrieval"], device="cpu", max_seq_length=16)
    texts = ["short", "word " * 100]
    with pytest.warns(UserWarning, match="1 of 2 texts were longer than 16 tokens and were cut"):
        encoder.encode(texts)
    assert encoder.statistics.truncated == 1 and encoder.statistics.texts == 2
    ids = encoder.tokenize(texts)
    assert len(ids[1]) == 16 and ids[0][-1] == ids[1][-1]  # the end-of-text token survives
    strict = FastEncoder(
        folders["nano-retrieval"], device="cpu", max_seq_length=16, on_overlong="error"
    )
    with pytest.raises(ValueError, match="text 1 is longer than max_seq_length=16"):
        strict.encode(texts)


def test_batches_that_do_not_fit_are_split(encoders, monkeypatch):
    encoder = encoders["small-retrieval"]
    expected = encoder.encode(TEXTS)
    splits = encoder.statistics.batch_splits
    original = PackedBackbone.forward_pooled

    def limited(self, batch, pooling):
        if batch.total_tokens > 200 and len(batch) > 1:
            raise torch.OutOfMemoryError("planted")
        return original(self, batch, pooling)

    monkeypatch.setattr(PackedBackbone, "forward_pooled", limited)
    assert cosine(encoder.encode(TEXTS), expected) >= MIN_COSINE
    assert encoder.statistics.batch_splits > splits


def test_a_single_text_that_does_not_fit_says_so(encoders, monkeypatch):
    def full(self, batch, pooling):
        raise torch.OutOfMemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(PackedBackbone, "forward_pooled", full)
        with pytest.raises(torch.OutOfMemoryError, match="text 0 with .* tokens does not fit"):
            encoders["small-retrieval"].encode(["some text"])
    assert np.isfinite(encoders["small-retrieval"].encode(["some text"])).all()


@pytest.mark.parametrize("error", [RuntimeError("planted"), KeyboardInterrupt()])
def test_other_errors_pass_through_once_and_leave_the_encoder_usable(error, encoders, monkeypatch):
    encoder, calls = encoders["small-retrieval"], []

    def broken(self, batch, pooling):
        calls.append(1)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PackedBackbone, "forward_pooled", broken)
        with pytest.raises(type(error)):
            encoder.encode(TEXTS)
    assert len(calls) == 1
    assert encoder.encode(TEXTS).shape[0] == len(TEXTS)


def test_rows_that_are_not_finite_are_computed_again(encoders, monkeypatch):
    encoder = encoders["small-retrieval"]
    expected = encoder.encode(TEXTS)
    original = PackedBackbone.forward_pooled

    def overflowing(self, batch, pooling):
        hidden, cu_seqlens = original(self, batch, pooling)
        if len(batch) > 1:
            hidden[1] = float("inf")
        return hidden, cu_seqlens

    monkeypatch.setattr(PackedBackbone, "forward_pooled", overflowing)
    before = encoder.statistics.recomputed_rows
    assert cosine(encoder.encode(TEXTS), expected) >= MIN_COSINE
    assert encoder.statistics.recomputed_rows == before + 1


def test_what_stays_not_finite_is_never_returned(encoders, monkeypatch):
    original = PackedBackbone.forward_pooled

    def poisoned(self, batch, pooling):
        hidden, cu_seqlens = original(self, batch, pooling)
        return hidden.fill_(float("nan")), cu_seqlens

    monkeypatch.setattr(PackedBackbone, "forward_pooled", poisoned)
    with pytest.raises(FloatingPointError, match="text 0 holds NaN or Inf"):
        encoders["small-retrieval"].encode(["a"])


def test_a_long_corpus_runs_through_several_windows(encoders, monkeypatch):
    monkeypatch.setattr("jv5kernels.pipeline.WINDOW_CHARACTERS", 100)
    monkeypatch.setattr("jv5kernels.pipeline.INLINE_CHARACTERS", 0)
    encoder = encoders["nano-retrieval"]
    texts = TEXTS * 4
    expected = np.tile(encoder.encode(TEXTS), (4, 1))
    assert cosine(encoder.encode(texts, batch_size=5), expected) >= MIN_COSINE


def test_progress_bar(encoders, capsys):
    encoders["small-retrieval"].encode(TEXTS, show_progress_bar=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
