"""What does not fit in a checkpoint is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from edits import edit, edit_tensors

from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.synthetic.checkpoint import TASKS

pytest_plugins = ("checkpoint_folders",)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("norm.weight"), "missing tensors: norm.weight"),
        (lambda t: t.update({"head.bias": torch.ones(1)}), "unexpected tensors: head.bias"),
        (
            lambda t: t.update({"norm.weight": torch.ones(3)}),
            r"norm.weight has shape \(3,\), config.json asks for \(64,\)",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.int8)}),
            "norm.weight is stored as I8; supported are F32",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64)}),
            "both norm.weight and model.norm.weight are stored",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.")],
            "missing tensors: .* and [0-9]+ more",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, copied):
    folder = copied(family="nano", layout="base")
    edit_tensors(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "adapters/clustering",
        "adapters/retrieval/adapter_config.json",
        "adapters/text-matching/adapter_model.safetensors",
    ],
)
def test_a_missing_file_of_a_base_repository_is_named(name, copied):
    folder = copied(family="small", layout="base")
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(Path(name).name)):
        open_checkpoint(folder)


def test_a_missing_pooling_file_is_named(copied):
    folder = copied(family="small", layout="merged")
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="1_Pooling/config.json is missing"):
        open_checkpoint(folder)


def test_pickled_weights_are_not_read(copied):
    folder = copied(family="small", layout="merged")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match="neither model.safetensors nor.*pytorch_model.bin is not read"
    ):
        open_checkpoint(folder)


def test_a_git_lfs_pointer_is_recognised(copied):
    folder = copied(family="small", layout="merged")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="model.safetensors is not a readable.*Git LFS pointer"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(copied):
    folder = copied(family="small", layout="merged", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00003.safetensors"):
        open_checkpoint(folder)


def test_a_shard_without_its_tensor_is_named(copied):
    folder = copied(family="small", layout="merged", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not in the shard it names: .*embed_tokens.weight"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("small", {"model_type": "bert"}, "model_type='bert' is not supported"),
        ("small", {"is_decoder": False}, "describes a eurobert model .* tensors hold q_norm"),
        ("nano", {"is_decoder": None}, "describes a qwen3 model .* do not hold q_norm"),
        ("small", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("nano", {"mlp_bias": True}, "mlp_bias=True"),
        ("small", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("small", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*yarn"),
        (
            "small",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters=.*linear",
        ),
        ("small", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            "small",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "sliding_window=64",
        ),
        ("small", {"layer_types": ["sliding_attention"] * 3}, "layer_types="),
        ("small", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("small", {"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        (
            "small",
            {"num_hidden_layers": "3"},
            "num_hidden_layers must be a positive integer, not '3'",
        ),
        ("small", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
        ("small", {"rope_theta": "big"}, "rope_theta must be a positive number, not 'big'"),
        ("small", {"torch_dtype": "int99"}, "dtype='int99' is not a dtype"),
    ],
)
def test_settings_that_are_not_supported(family, change, message, copied):
    folder = copied(family=family, layout="base")
    edit(folder / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_a_sliding_window_that_no_layer_uses_is_fine(copied):
    folder = copied(family="small", layout="merged")
    edit(folder / "config.json", use_sliding_window=True, sliding_window=64, max_window_layers=28)
    assert open_checkpoint(folder).spec.num_layers == 3


@pytest.mark.parametrize(
    "modules, message",
    [
        (["T", "P", "sentence_transformers.models.Dense"], "lists .*models.Dense; supported are"),
        (["T", "N", "P"], "supported are Transformer, then Pooling, then Normalize"),
        (["custom_st.Transformer"], "lists custom_st.Transformer"),
        (["P"], "supported are"),
    ],
)
def test_modules_that_are_not_supported(modules, message, copied):
    folder = copied(family="small", layout="merged")
    kinds = {"T": "Transformer", "P": "Pooling", "N": "Normalize"}
    listed = [
        {
            "idx": i,
            "path": "",
            "type": f"sentence_transformers.models.{kinds[m]}" if m in kinds else m,
        }
        for i, m in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_other_modules_of_a_base_repository_are_not_supported(copied):
    folder = copied(family="small", layout="base")
    (folder / "modules.json").write_text(json.dumps([{"type": "custom_st.Router", "path": ""}]))
    with pytest.raises(ValueError, match="module custom_st.Router"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"pooling_mode_mean_tokens": True}, r"pooling mean \+ lasttoken is not supported"),
        ({"pooling_mode_lasttoken": False}, "pooling None is not supported"),
        ({"pooling_mode": "weightedmean"}, "pooling weightedmean is not supported"),
        ({"pooling_mode": "mean", "include_prompt": False}, "include_prompt=false .* mean pooling"),
    ],
)
def test_poolings_that_are_not_supported(stated, message, copied):
    folder = copied(family="small", layout="merged")
    edit(folder / "1_Pooling" / "config.json", **stated)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)


def test_other_settings_that_are_not_supported(copied):
    folder = copied(family="small", layout="merged")
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(ValueError, match="do_lower_case=true"):
        open_checkpoint(folder)
    (folder / "sentence_bert_config.json").unlink()
    edit(folder / "config_sentence_transformers.json", default_prompt_name="passage")
    with pytest.raises(ValueError, match="default_prompt_name='passage' is not among"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON dict, not list"):
        open_checkpoint(folder)


def test_a_tokenizer_with_more_tokens_than_embeddings(copied):
    folder = copied(family="small", layout="base")
    rows = 512

    def shrink(tensors):
        tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"][:rows].clone()

    edit_tensors(folder / "model.safetensors", shrink)
    edit(folder / "config.json", vocab_size=rows)
    with pytest.raises(
        ValueError, match="gives ids up to [0-9]+, but the embedding table has 512 rows"
    ):
        open_checkpoint(folder).tokenizer()


def test_a_base_repository_is_not_served_without_adapters(copied):
    folder = copied(family="small", layout="base")
    edit(folder / "config.json", task_names=None)
    assert open_checkpoint(folder).tasks == tuple(sorted(TASKS))
    shutil.rmtree(folder / "adapters")
    with pytest.raises(FileNotFoundError, match="names no tasks and there is no folder adapters"):
        open_checkpoint(folder)


def test_an_unknown_task_lists_the_tasks(written):
    with pytest.raises(ValueError, match="task='search' is unknown.*'text-matching'"):
        open_checkpoint(written(family="small", layout="base")).adapter("search")
