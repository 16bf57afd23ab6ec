"""The JSON files of the checkpoints that `synthetic.checkpoint` writes, as the real repositories have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from jv5kernels.model_spec import LINEARS

__all__ = [
    "REAL_GEOMETRY",
    "TASKS",
    "TINY_GEOMETRY",
    "adapter_config",
    "model_config",
    "write_settings",
    "write_tokenizer_files",
]

TASKS = ("retrieval", "text-matching", "clustering", "classification")

_QWEN3_TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
}
# Small enough for tests; q is wider than hidden and heads are grouped where the real model has it so.
TINY_GEOMETRY: dict[str, dict[str, int]] = {
    "small": _QWEN3_TINY,
    "qwen3-embedding": _QWEN3_TINY,
    "nano": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 4096,
    },
}
_QWEN3_REAL = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
}
REAL_GEOMETRY: dict[str, dict[str, int]] = {
    "small": _QWEN3_REAL,
    "qwen3-embedding": {**_QWEN3_REAL, "vocab_size": 151669},
    "nano": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 8192,
        "vocab_size": 128256,
    },
}
ROPE_THETA = {"small": 3_500_000, "qwen3-embedding": 1_000_000, "nano": 1_000_000}
PROMPTS = {"query": "Query: ", "document": "Document: "}
QWEN3_EMBEDDING_PROMPTS = {
    "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
    "document": "",
}
# Token names in tokenizer_config.json; nano's config.json gives the EOS id as padding all the same.
NAMED_TOKENS = {
    "small": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "qwen3-embedding": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "nano": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|pad|>",
    },
}


def model_config(
    family: str,
    layout: str,
    geometry: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    rope_key: str,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Returns config.json.

    Args:
        geometry: sizes, and any other key that should differ from the family's.
        rope_key: "rope_theta", or "rope_parameters" as Transformers 5 writes it.
        tokenizer: gives the ids of special tokens.
    """
    theta = geometry.get("rope_theta", ROPE_THETA[family])
    config: dict[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": family != "nano",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.57.0",
    }
    if family == "nano":
        config |= {"rms_norm_eps": 1e-5, "hidden_dropout": 0.0, "pretraining_tp": 1}
        config |= _nano_token_ids(tokenizer)
    else:
        config |= {"rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": None}
    if layout == "base":
        config |= _base_keys(family)
    elif family == "nano":
        config |= {"architectures": ["EuroBertModel"], "model_type": "eurobert"}
    else:
        architecture = "Qwen3Model" if family == "small" else "Qwen3ForCausalLM"
        config |= {"architectures": [architecture], "model_type": "qwen3"}
    if rope_key == "rope_parameters":
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    else:
        config |= {"rope_theta": theta, "rope_scaling": None}
    return config | {key: value for key, value in geometry.items() if key != "rope_theta"}


def _nano_token_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    names = {
        "bos": "<|begin_of_text|>",
        "eos": "<|end_of_text|>",
        "pad": "<|end_of_text|>",
        "mask": "<|mask|>",
    }
    return {f"{key}_token_id": tokenizer.token_to_id(token) for key, token in names.items()}


def _base_keys(family: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "architectures": ["JinaEmbeddingsV5Model"],
        "model_type": "jina_embeddings_v5",
        "task_names": list(TASKS),
        "auto_map": {
            "AutoConfig": "configuration_jina_embeddings_v5.JinaEmbeddingsV5Config",
            "AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model",
        },
    }
    return keys | {"is_decoder": False} if family == "nano" else keys


def adapter_config(task: str, rank: int) -> dict[str, Any]:
    """Returns adapter_config.json of an adapter on all linear layers, alpha = rank."""
    return {
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_bias": False,
        "lora_dropout": 0.05 if task == "classification" else 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": [linear.rpartition(".")[2] for linear in LINEARS],
        "task_type": "FEATURE_EXTRACTION",
        "use_dora": False,
        "use_rslora": False,
    }


def write_settings(folder: Path, family: str, layout: str, config: Mapping[str, Any]) -> None:
    """Writes config.json, prompts, modules.json and what the modules need."""
    write_json(folder / "config.json", config)
    embedding = family == "qwen3-embedding"
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": QWEN3_EMBEDDING_PROMPTS if embedding else PROMPTS,
            "default_prompt_name": None if embedding else "document",
            "similarity_fn_name": "cosine",
        },
    )
    if layout == "base":
        module = {"idx": 0, "name": "transformer", "path": "", "type": "custom_st.Transformer"}
        write_json(folder / "modules.json", [{**module, "kwargs": ["task", "truncate_dim"]}])
        return
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", modules)
    flags = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
    )
    pooling: dict[str, Any] = {f"pooling_mode_{flag}": False for flag in flags}
    pooling |= {"word_embedding_dimension": config["hidden_size"], "pooling_mode_lasttoken": True}
    write_json(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    (folder / "2_Normalize").mkdir()


def write_tokenizer_files(folder: Path, family: str, tokenizer: Tokenizer) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    named = NAMED_TOKENS[family]
    kind = "PreTrainedTokenizer" if family == "nano" else "Qwen2Tokenizer"
    settings = {
        **named,
        "clean_up_tokenization_spaces": family == "nano",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30 if family == "nano" else 131072,
        "tokenizer_class": kind,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", named)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, and the folder it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
