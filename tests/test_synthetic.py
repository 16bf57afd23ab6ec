"""Synthetic checkpoints: the real layouts, the same on every call, and weights that keep activations alive."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from jv5kernels.adapters import merge_adapter
from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.comparison.reference import (
    load_reference,
    reference_embeddings,
    reference_tokenizer,
)
from jv5kernels.model_spec import ModelSpec
from jv5kernels.synthetic import checkpoint as synthetic
from jv5kernels.synthetic.checkpoint import (
    REAL_GEOMETRY,
    TASKS,
    random_adapter,
    random_weights,
    real_spec,
    write_checkpoint,
)
from jv5kernels.synthetic.tokenizer import train_tokenizer

pytest_plugins = ("checkpoint_folders",)

TEXTS = ["Query: hello world", "Document: ", "Document: 1234 it's a dog's life\n\n  été e\u0301t"]


def narrow(family: str, num_layers: int) -> ModelSpec:
    """A real geometry with few layers and a small vocabulary, which would take most of the time."""
    return replace(real_spec(family, num_layers=num_layers), vocab_size=1000)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["small", "nano"])
def test_a_sibling_holds_the_base_with_its_adapter_merged(family, task, written):
    base = open_checkpoint(written(family=family, layout="base", seed=5))
    sibling = open_checkpoint(written(family=family, layout="merged", task=task, seed=5))
    merged = merge_adapter(base.weights(), base.adapter(task), torch.float32)
    weights = {**base.weights(), **merged}
    expected = sibling.weights()
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_the_same_call_writes_the_same_files(tmp_path):
    options = {"family": "nano", "dtype": torch.bfloat16, "shards": 2}
    first = write_checkpoint(tmp_path / "a", **options)
    second = write_checkpoint(tmp_path / "b", **options)
    names = sorted(p.relative_to(first) for p in first.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(second) for p in second.rglob("*") if p.is_file())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    other = write_checkpoint(tmp_path / "c", **options, seed=1)
    file = "model-00001-of-00002.safetensors"
    assert (other / file).read_bytes() != (first / file).read_bytes()


def test_the_files_are_those_of_the_real_repositories(written):
    base = written(family="nano", layout="base")
    files = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()}
    adapters = {
        f"adapters/{task}/{file}"
        for task in TASKS
        for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert files == adapters | {
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((base / "config.json").read_text())
    settings = json.loads((base / "tokenizer_config.json").read_text())
    assert config["is_decoder"] is False and "head_dim" not in config
    # The trap of the real nano: the configured padding is the appended EOS, the tokenizer's is another token.
    assert config["pad_token_id"] == config["eos_token_id"]
    tokenizer = train_tokenizer("nano")
    assert tokenizer.token_to_id(settings["pad_token"]) != config["pad_token_id"]
    small = json.loads((written(family="small", layout="base") / "config.json").read_text())
    assert "is_decoder" not in small and "is_causal" not in small and small["head_dim"] == 32


@pytest.mark.parametrize("family", ["small", "nano", "qwen3-embedding"])
def test_sentence_transformers_and_auto_tokenizer_read_the_merged_layout(family, written):
    checkpoint = open_checkpoint(written(family=family, layout="merged"))
    model = SentenceTransformer(str(checkpoint.folder), device="cpu")
    assert model.prompts == checkpoint.prompts
    assert model.default_prompt_name == checkpoint.default_prompt_name
    assert model.max_seq_length == checkpoint.max_seq_length
    embeddings = model.encode(TEXTS, prompt="")
    expected = reference_embeddings(load_reference(checkpoint, None), checkpoint, TEXTS)
    torch.testing.assert_close(torch.tensor(embeddings), torch.tensor(expected), atol=1e-5, rtol=0)
    auto, plain = AutoTokenizer.from_pretrained(checkpoint.folder), reference_tokenizer(checkpoint)
    for text in TEXTS:
        assert auto(text)["input_ids"] == plain(text)["input_ids"]
    cut = {"truncation": True, "max_length": 5}
    assert auto(TEXTS[2], **cut)["input_ids"] == plain(TEXTS[2], **cut)["input_ids"]


@pytest.mark.parametrize("family", ["small", "nano"])
def test_activations_neither_die_nor_explode(family, tmp_path):
    folder = write_checkpoint(tmp_path / "deep", family=family, geometry={"num_hidden_layers": 12})
    checkpoint = open_checkpoint(folder)
    model = load_reference(checkpoint, None)
    ids = reference_tokenizer(checkpoint)(" ".join(TEXTS), return_tensors="pt")["input_ids"]
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    sizes = [float(state.square().mean().sqrt()) for state in states[:-1]]
    assert all(0.9 < size < 3 for size in sizes), sizes
    assert sizes[-1] > 1.05 * sizes[0]
    embeddings = torch.tensor(reference_embeddings(model, checkpoint, TEXTS))
    similarity = (embeddings @ embeddings.T).fill_diagonal_(0)
    # The last token of nano is the same for all texts, so its embedding is a large part of theirs.
    assert similarity.abs().max() < (0.3 if family == "small" else 0.97)


def test_adapters_change_every_matrix_by_a_good_tenth():
    spec = narrow("nano", 1)
    weights, adapter = random_weights(spec), random_adapter(spec, "retrieval")
    assert all(pair.a.shape[0] == 32 for pair in adapter.pairs.values())
    for name, merged in merge_adapter(weights, adapter, torch.float32).items():
        assert 0.1 < (merged - weights[name]).norm() / weights[name].norm() < 0.2


def test_random_weights_depend_on_seed_and_name():
    spec = narrow("nano", 1)
    weights = random_weights(spec, seed=7)
    name, sibling = "layers.0.mlp.up_proj.weight", "layers.0.mlp.gate_proj.weight"
    assert not torch.equal(weights[name], weights[sibling])
    assert not torch.equal(weights[name], random_weights(spec, seed=8)[name])
    assert torch.equal(weights[name], random_weights(narrow("nano", 2), seed=7)[name])
    rounded = random_weights(spec, seed=7, dtype=torch.bfloat16)
    assert torch.equal(rounded[name], weights[name].bfloat16())


@pytest.mark.gpu
def test_random_weights_on_the_gpu():
    spec = real_spec("small", num_layers=1)
    weights = random_weights(spec, dtype=torch.bfloat16, device="cuda")
    assert all(tensor.is_cuda and tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert {n: tuple(t.shape) for n, t in weights.items()} == spec.tensor_shapes()
    spread = weights["layers.0.mlp.up_proj.weight"].float().std() * 1024**0.5
    assert float(spread) == pytest.approx(1, abs=0.01)


@pytest.mark.gpu
def test_a_checkpoint_drawn_on_the_gpu(tmp_path):
    geometry = {**REAL_GEOMETRY["small"], "num_hidden_layers": 1}
    options = {"geometry": geometry, "dtype": torch.bfloat16, "device": "cuda"}
    base = open_checkpoint(write_checkpoint(tmp_path / "base", **options))
    merged = open_checkpoint(write_checkpoint(tmp_path / "merged", layout="merged", **options))
    changed = merge_adapter(base.weights(), base.adapter("retrieval"), torch.bfloat16)
    for name, tensor in {**base.weights(), **changed}.items():
        # The GPU's fp32 product adds in another order than the CPU's.
        torch.testing.assert_close(tensor, merged.weights()[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("family", ["small", "nano"])
def test_real_geometry_at_few_layers(family, tmp_path):
    geometry = {**REAL_GEOMETRY[family], "num_hidden_layers": 1, "vocab_size": 4096}
    folder = write_checkpoint(tmp_path / "real", family=family, geometry=geometry, layout="merged")
    spec = open_checkpoint(folder).spec
    real = real_spec(family, num_layers=1)
    assert {**vars(spec), "vocab_size": 0} == {**vars(real), "vocab_size": 0}


def test_a_tokenizer_of_ones_own(tmp_path):
    file = tmp_path / "mine.json"
    train_tokenizer("small", ["a corpus of its own"] * 3).save(str(file))
    folder = write_checkpoint(tmp_path / "model", tokenizer=file)
    expected = train_tokenizer("small", ["a corpus of its own"] * 3)
    tokenizer = open_checkpoint(folder).tokenizer()
    assert tokenizer.encode("a corpus").ids == expected.encode("a corpus").ids
    assert open_checkpoint(folder).spec.vocab_size < 512


def test_a_corpus_of_ones_own(tmp_path):
    folder = write_checkpoint(tmp_path / "model", corpus=iter(["kernels and more kernels"] * 5))
    assert open_checkpoint(folder).tokenizer().encode("kernels").tokens == ["kernels"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic, "_save_adapter", fail)
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_be_empty_but_not_full(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert open_checkpoint(write_checkpoint(empty)).tasks == TASKS
    with pytest.raises(FileExistsError, match="is not empty"):
        write_checkpoint(empty)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"family": "large"}, "family='large' is unknown: choose one of .*'nano'"),
        ({"layout": "onnx"}, "layout='onnx' is unknown"),
        ({"task": "search"}, "task='search' is unknown"),
        ({"rope_key": "theta"}, "rope_key='theta' is unknown"),
        ({"tensor_prefix": "base."}, "tensor_prefix='base.' is unknown"),
        ({"family": "qwen3-embedding"}, "layout='base' has adapters"),
        (
            {"geometry": {"vocab_size": 100}},
            "vocab_size=100 is too small: the tokenizer gives ids up to",
        ),
        ({"shards": 0}, "shards=0 must be at least 1"),
    ],
)
def test_options_that_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []
