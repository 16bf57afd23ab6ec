"""Recognising a live backbone by its structure, and refusing, with reasons, what would be computed wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import RemoteLike, eurobert, lora_config, qwen3, with_adapters
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    EuroBertForMaskedLM,
    GraniteConfig,
    GraniteModel,
    LlamaConfig,
    LlamaModel,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.comparison.reference import load_reference
from jv5kernels.live.structure import find_backbone, spec_of
from jv5kernels.synthetic.checkpoint import write_checkpoint

TINY = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda m: m, ""),
        (lambda m: with_adapters(m, mixed=False), "base_model.model"),
        (lambda m: with_adapters(m, mixed=True), "base_model.model"),
        (lambda m: RemoteLike(m, lora_config(), adapter_name="retrieval"), "base_model.model"),
        (lambda m: nn.Sequential(nn.ModuleDict({"model": m})), "0.model"),
        (torch.compile, "_orig_mod"),
    ],
)
@pytest.mark.parametrize("make", [qwen3, eurobert])
def test_found_in_what_holds_it(make: Any, wrap: Any, path: str) -> None:
    backbone = make()
    spec = spec_of(backbone)
    found_path, found = find_backbone(wrap(backbone))
    assert (found_path, found) == (path, backbone)
    assert spec_of(found) == spec


@pytest.mark.parametrize("head", [Qwen3ForCausalLM, EuroBertForMaskedLM])
def test_found_under_a_head(head: Any) -> None:
    config = (qwen3 if head is Qwen3ForCausalLM else eurobert)().config
    assert find_backbone(head(config))[0] == "model"


@pytest.mark.parametrize("family", ["small", "nano", "qwen3-embedding"])
@pytest.mark.parametrize("rope_key", ["rope_theta", "rope_parameters"])
def test_spec_is_that_of_the_files(tmp_path: Path, family: str, rope_key: str) -> None:
    folder = write_checkpoint(tmp_path / "model", family=family, layout="merged", rope_key=rope_key)
    checkpoint = open_checkpoint(folder)
    assert spec_of(load_reference(checkpoint, None)) == checkpoint.spec


def test_spec_of_a_base_repository(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", family="nano")
    checkpoint = open_checkpoint(folder)
    model = load_reference(checkpoint, "clustering")
    path, inner = find_backbone(model)
    inner.config.model_type = "jina_embeddings_v5"
    # What the remote code of EuroBERT makes of a config without scaling.
    inner.config.rope_parameters["rope_type"] = "linear"
    inner.config.rope_parameters["factor"] = 1.0
    assert path == "base_model.model"
    assert spec_of(inner) == checkpoint.spec


@pytest.mark.parametrize("model", [nn.Linear(2, 2), BertModel(BertConfig(**TINY))])
def test_no_backbone(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="looked for a module with embed_tokens, layers, norm"):
        find_backbone(model)


def test_missing_parts_are_named() -> None:
    model = qwen3()
    del model.layers[1].mlp.up_proj
    with pytest.raises(TypeError, match="lacks layers.1.mlp.up_proj"):
        find_backbone(model)


def test_several_backbones() -> None:
    with pytest.raises(TypeError, match=r"2 backbones .*query, document"):
        find_backbone(nn.ModuleDict({"query": qwen3(), "document": qwen3()}))


@pytest.mark.parametrize(
    "model", [LlamaModel(LlamaConfig(**TINY)), GraniteModel(GraniteConfig(**TINY))]
)
def test_the_same_structure_is_not_enough(model: nn.Module) -> None:
    """Granite's layers have the same parts, but its embeddings and residuals are multiplied."""
    path, inner = find_backbone(model)
    assert path == ""
    with pytest.raises(ValueError, match="config.model_type is '(llama|granite)'"):
        spec_of(inner)


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"hidden_act": "gelu"}, ["layers.0.mlp.act_fn is not SiLU"]),
        ({"attention_bias": True}, ["self_attn.q_proj has a bias", "self_attn.o_proj has a bias"]),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            ["layers.1.self_attn uses a sliding window of 4"],
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            ["rope_type 'yarn'"],
        ),
        ({"head_dim": 16}, ["head_dim is 16"]),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        spec_of(qwen3(**changes))
    for reason in reasons:
        assert reason in str(error.value)


def change_eps(model: Qwen3Model) -> None:
    model.layers[2].input_layernorm.variance_epsilon = 1e-3


def share_a_weight(model: Qwen3Model) -> None:
    model.layers[2].self_attn.k_proj.weight = model.layers[0].self_attn.k_proj.weight


def change_the_base_after_construction(model: Qwen3Model) -> None:
    model.config.rope_parameters["rope_theta"] = 1e4


def scale_otherwise(model: Qwen3Model) -> None:
    model.layers[1].self_attn.scaling = 1.0


def put_another_layer_kind(model: Qwen3Model) -> None:
    model.layers[1].self_attn.v_proj = nn.Sequential(model.layers[1].self_attn.v_proj)


def add_a_part(model: Qwen3Model) -> None:
    model.layers[1].mlp.gate_norm = nn.LayerNorm(4)


def leave_out_a_norm(model: Qwen3Model) -> None:
    del model.layers[1].self_attn.q_norm


def drop_a_layer_in_config(model: Qwen3Model) -> None:
    model.config.num_hidden_layers = 2


def mix_causality(model: Qwen3Model) -> None:
    model.layers[1].self_attn.is_causal = False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_eps, "layers.2.input_layernorm has eps 0.001"),
        (share_a_weight, "share one weight"),
        (change_the_base_after_construction, "inv_freq is not that of rope_theta=10000"),
        (scale_otherwise, "layers.1.self_attn scales by 1.0"),
        (put_another_layer_kind, "layers.1.self_attn.v_proj is a Sequential"),
        (add_a_part, "layers.1.mlp: gate_norm not known"),
        (leave_out_a_norm, "layers.1.self_attn"),
        (drop_a_layer_in_config, "num_hidden_layers=2"),
        (mix_causality, "layers.1.self_attn.is_causal is False"),
    ],
)
def test_modules_that_are_refused(change: Any, reason: str) -> None:
    model = qwen3()
    change(model)
    with pytest.raises(ValueError, match="not supported") as error:
        spec_of(model)
    assert reason in str(error.value)


def test_a_rounded_rotary_buffer_is_accepted() -> None:
    """`model.to(torch.bfloat16)` rounds inv_freq too; the base is still the config's."""
    assert spec_of(qwen3().to(torch.bfloat16)).rope_theta == 3.5e6
