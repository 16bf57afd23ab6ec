"""Checkpoints of every layout: what is read from their files."""

from __future__ import annotations

import json

import pytest
import torch
from edits import edit, edit_tensors

from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.comparison.reference import load_reference
from jv5kernels.synthetic.checkpoint import REAL_GEOMETRY, TASKS, real_spec

pytest_plugins = ("checkpoint_folders",)

PROMPTS = {"query": "Query: ", "document": "Document: "}


@pytest.mark.parametrize("family", ["small", "nano"])
def test_base_repositories(family, written):
    checkpoint = open_checkpoint(written(family=family, layout="base"))
    assert checkpoint.tasks == TASKS
    assert (checkpoint.pooling, checkpoint.normalize) == ("lasttoken", True)
    assert (checkpoint.prompts, checkpoint.default_prompt_name) == (PROMPTS, "document")
    assert checkpoint.max_seq_length == checkpoint.spec.max_position_embeddings == 4096
    assert checkpoint.torch_dtype == torch.float32 and checkpoint.matryoshka_dims == ()
    assert checkpoint.revision is None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["small", "nano"])
def test_merged_siblings(family, task, written):
    base = open_checkpoint(written(family=family, layout="base"))
    sibling = open_checkpoint(written(family=family, layout="merged", task=task))
    assert sibling.spec == base.spec and sibling.tasks == ()
    assert (sibling.pooling, sibling.normalize) == ("lasttoken", True)
    assert (sibling.prompts, sibling.default_prompt_name) == (PROMPTS, "document")


def test_other_qwen3_embedding_checkpoints(written):
    checkpoint = open_checkpoint(written(family="qwen3-embedding", layout="merged"))
    assert checkpoint.tasks == () and checkpoint.pooling == "lasttoken"
    assert checkpoint.prompts["query"].startswith("Instruct: ")
    assert checkpoint.prompts["document"] == "" and checkpoint.default_prompt_name is None
    assert checkpoint.spec.causal and checkpoint.spec.qk_norm


def test_families_are_told_apart_by_keys_and_tensors(written):
    small = open_checkpoint(written(family="small", layout="base")).spec
    nano = open_checkpoint(written(family="nano", layout="base")).spec
    assert (small.model_type, small.causal, small.qk_norm) == ("qwen3", True, True)
    assert (nano.model_type, nano.causal, nano.qk_norm) == ("eurobert", False, False)
    assert (small.head_dim, nano.head_dim) == (32, nano.hidden_size // nano.num_heads)
    assert (small.q_width, small.kv_width, small.qkv_width) == (128, 64, 256)
    assert (small.rope_theta, nano.rope_theta) == (3.5e6, 1e6)
    assert (small.rms_norm_eps, nano.rms_norm_eps) == (1e-6, 1e-5)
    assert (small.num_matrices, nano.num_matrices) == (21, 21)


@pytest.mark.parametrize(
    "options",
    [
        {"family": "small", "layout": "base"},
        {"family": "nano", "layout": "base"},
        {"family": "small", "layout": "merged", "task": "clustering"},
        {"family": "nano", "layout": "merged", "task": "text-matching"},
        {"family": "qwen3-embedding", "layout": "merged", "tensor_prefix": "model."},
        {"family": "small", "layout": "merged", "shards": 3, "rope_key": "rope_parameters"},
        {"family": "nano", "layout": "base", "shards": 2, "dtype": torch.bfloat16},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_weights_are_those_of_transformers(options, written):
    checkpoint = open_checkpoint(written(**options))
    model = load_reference(checkpoint, None, dtype=options.get("dtype", torch.float32))
    expected = model.state_dict()
    weights = checkpoint.weights()
    assert list(weights) and set(weights) == set(expected)
    for name, tensor in weights.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    theta = model.config.rope_parameters["rope_theta"]
    assert checkpoint.spec.rope_theta == float(theta)


def test_a_rope_base_that_is_nowhere_is_that_of_transformers(copied):
    folder = copied(family="small", layout="merged")
    edit(folder / "config.json", rope_theta=None)
    checkpoint = open_checkpoint(folder)
    model = load_reference(checkpoint, None)
    assert checkpoint.spec.rope_theta == model.config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "default"}, "rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
    ],
)
def test_both_rope_keys_are_read_as_transformers_reads_them(keys, copied):
    folder = copied(family="nano", layout="merged")
    edit(folder / "config.json", **keys)
    checkpoint = open_checkpoint(folder)
    model = load_reference(checkpoint, None)
    assert checkpoint.spec.rope_theta == model.config.rope_parameters["rope_theta"] == 5e5


def test_a_qwen3_that_is_not_causal(copied):
    folder = copied(family="small", layout="merged")
    edit(folder / "config.json", is_causal=False)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.spec.causal and checkpoint.spec.qk_norm


@pytest.mark.parametrize(
    "stated, expected",
    [
        ({"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"], "include_prompt": False}, "lasttoken"),
    ],
)
def test_pooling_in_its_old_and_new_form(stated, expected, copied):
    folder = copied(family="small", layout="merged")
    edit(folder / "1_Pooling" / "config.json", **stated)
    assert open_checkpoint(folder).pooling == expected


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_fewer_modules(modules, copied):
    folder = copied(family="small", layout="merged")
    listed = json.loads((folder / "modules.json").read_text())[:modules]
    for module in listed:
        # Where Sentence Transformers 6 has them.
        module["type"] = module["type"].replace("models", "base.modules.somewhere")
    (folder / "modules.json").write_text(json.dumps(listed))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.pooling == ("lasttoken" if modules == 2 else None)
    assert checkpoint.normalize == (modules != 2)


def test_without_the_files_of_sentence_transformers(copied):
    folder = copied(family="nano", layout="merged")
    (folder / "modules.json").unlink()
    (folder / "config_sentence_transformers.json").unlink()
    checkpoint = open_checkpoint(folder)
    assert checkpoint.pooling is None and checkpoint.prompts == {}
    assert checkpoint.default_prompt_name is None


def test_a_base_repository_without_prompts_has_the_vendors(copied):
    folder = copied(family="nano", layout="base")
    (folder / "config_sentence_transformers.json").unlink()
    (folder / "modules.json").unlink()
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.prompts, checkpoint.default_prompt_name) == (PROMPTS, "document")
    assert checkpoint.pooling == "lasttoken"


@pytest.mark.parametrize(
    "bert, tokenizer, expected", [(512, 99, 512), (None, 1024, 1024), (None, None, 4096)]
)
def test_max_seq_length(bert, tokenizer, expected, copied):
    folder = copied(family="small", layout="merged")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": bert}))
    edit(folder / "tokenizer_config.json", model_max_length=tokenizer)
    assert open_checkpoint(folder).max_seq_length == expected


def test_matryoshka_dimensions(copied):
    folder = copied(family="small", layout="merged")
    edit(folder / "config.json", matryoshka_dimensions=[32, 64])
    assert open_checkpoint(folder).matryoshka_dims == (32, 64)


@pytest.mark.parametrize(
    "family, matrices, parameters", [("small", 196, 596_049_920), ("nano", 84, 211_766_016)]
)
def test_the_real_geometries_have_the_published_sizes(family, matrices, parameters):
    spec = real_spec(family)
    assert spec.num_matrices == len(spec.matrix_shapes()) == matrices
    count = sum(torch.Size(shape).numel() for shape in spec.tensor_shapes().values())
    assert count == parameters
    assert spec.vocab_size == REAL_GEOMETRY[family]["vocab_size"]


def test_tokenizers_are_independent(written):
    checkpoint = open_checkpoint(written(family="nano", layout="base"))
    one, other = checkpoint.tokenizer(), checkpoint.tokenizer()
    one.enable_truncation(2)
    assert other.truncation is None and len(other.encode("a longer text").ids) > 2


def test_a_language_head_is_ignored_beside_prefixed_names_alone(copied, tmp_path):
    folder = copied(family="qwen3-embedding", layout="merged", tensor_prefix="model.")

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    edit_tensors(folder / "model.safetensors", add_head)
    weights = open_checkpoint(folder).weights()
    assert "lm_head.weight" not in weights and "embed_tokens.weight" in weights
    assert not any("rotary" in name for name in weights)


def test_a_language_head_in_a_bare_file_is_unexpected(copied):
    folder = copied(family="small", layout="merged")
    edit_tensors(
        folder / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(2, 2)})
    )
    with pytest.raises(ValueError, match="unexpected tensors: lm_head.weight"):
        open_checkpoint(folder)


def test_code_in_a_checkpoint_is_never_run(copied):
    folder = copied(family="small", layout="base")
    for name in ("modeling_jina_embeddings_v5", "configuration_jina_embeddings_v5", "custom_st"):
        (folder / f"{name}.py").write_text("raise SystemExit('this code must not run')\n")
    checkpoint = open_checkpoint(folder)
    assert load_reference(checkpoint, "retrieval") is not None
