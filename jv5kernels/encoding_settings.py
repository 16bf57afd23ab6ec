"""How a checkpoint wants to be used: pooling, normalisation, prompts and maximum length, from its own files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["POOLINGS", "EncodingSettings", "read_json", "read_settings"]

POOLINGS = ("lasttoken", "mean", "cls")
# Sentence Transformers before 6 stored one flag a mode, later versions "pooling_mode" with the name.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# What the remote code of the base repositories does whatever else is stored.
BASE_PROMPTS = {"query": "Query: ", "document": "Document: "}
BASE_DEFAULT_PROMPT = "document"
BASE_MODULE = "custom_st.Transformer"


@dataclass(frozen=True)
class EncodingSettings:
    """What the files say besides the architecture.

    Args:
        pooling: "lasttoken", "mean" or "cls"; None when no file states it.
        normalize: whether embeddings have unit length by default.
        prompts: name -> text put before an input.
        default_prompt_name: prompt of a call that names none; None for no prompt.
        max_seq_length: tokens a text, special tokens included.
    """

    pooling: str | None
    normalize: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    max_seq_length: int


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return _parse(path, dict)


def read_settings(folder: Path, config: Mapping[str, Any], max_positions: int) -> EncodingSettings:
    """Reads modules.json, the pooling, the prompts and the length limits of a checkpoint folder.

    Args:
        config: config.json.
        max_positions: positions of the backbone; the limit where no file gives a smaller one.

    Raises:
        FileNotFoundError: modules.json names a pooling whose config.json is missing.
        ValueError: a module, pooling or setting that is not supported, named in the message.
    """
    is_base = config.get("model_type") == "jina_embeddings_v5"
    pooling, normalize = _read_base_modules(folder) if is_base else _read_modules(folder)
    prompts, default = _read_prompts(folder, is_base)
    return EncodingSettings(
        pooling, normalize, prompts, default, _max_length(folder, is_base, max_positions)
    )


def _parse(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, not {type(value).__name__}")
    return value


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / "modules.json"
    return _parse(path, list) if path.is_file() else []


def _read_base_modules(folder: Path) -> tuple[str | None, bool]:
    """Pooling and normalisation of the remote code: one module does both."""
    unknown = [module["type"] for module in _modules(folder) if module["type"] != BASE_MODULE]
    if unknown:
        raise ValueError(f"{folder / 'modules.json'}: module {unknown[0]} is not supported here")
    return "lasttoken", True


def _read_modules(folder: Path) -> tuple[str | None, bool]:
    """Pooling and normalisation; (None, True) when no modules are listed."""
    modules = _modules(folder)
    if not modules:
        return None, True
    kinds = [_kind(module["type"]) for module in modules]
    allowed = (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    if kinds not in allowed:
        listed = ", ".join(module["type"] for module in modules)
        raise ValueError(
            f"{folder / 'modules.json'} lists {listed}; "
            "supported are Transformer, then Pooling, then Normalize of sentence_transformers"
        )
    if modules[0].get("path"):
        raise ValueError(
            f"{folder / 'modules.json'}: the Transformer lies in {modules[0]['path']!r}; "
            "supported is the top folder"
        )
    if len(kinds) == 1:
        return None, True
    return _read_pooling(folder / modules[1]["path"] / "config.json"), len(kinds) == 3


def _kind(dotted: str) -> str:
    package, _, name = dotted.partition(".")
    return name.rpartition(".")[2] if package == "sentence_transformers" else dotted


def _read_pooling(path: Path) -> str:
    stated = read_json(path)
    modes = stated.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in POOLING_FLAGS.items() if stated.get(flag)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{path}: pooling {' + '.join(modes) or None} is not supported; supported are {POOLINGS}"
        )
    if stated.get("include_prompt") is False and modes[0] != "lasttoken":
        raise ValueError(
            f"{path}: include_prompt=false leaves the prompt out of {modes[0]} pooling, which is not supported"
        )
    return modes[0]


def _read_prompts(folder: Path, is_base: bool) -> tuple[dict[str, str], str | None]:
    path = folder / "config_sentence_transformers.json"
    stated = _optional(path)
    prompts = {
        name: text for name, text in (stated.get("prompts") or {}).items() if text is not None
    }
    default = stated.get("default_prompt_name")
    if is_base:
        prompts = prompts or dict(BASE_PROMPTS)
        default = default or BASE_DEFAULT_PROMPT
    if default is not None and default not in prompts:
        raise ValueError(
            f"{path}: default_prompt_name={default!r} is not among the prompts {sorted(prompts)}"
        )
    return prompts, default


def _max_length(folder: Path, is_base: bool, max_positions: int) -> int:
    if is_base:
        return max_positions
    path = folder / "sentence_bert_config.json"
    stated = _optional(path)
    if stated.get("do_lower_case"):
        raise ValueError(f"{path}: do_lower_case=true is not supported")
    limit = stated.get("max_seq_length")
    if limit is None:
        # As Sentence Transformers: the tokenizer's own limit counts where no other is stated.
        limit = _optional(folder / "tokenizer_config.json").get("model_max_length", max_positions)
    return min(int(limit), max_positions)
