"""Checkpoints with random weights in the real layouts: for tests and benches.

Activations neither die nor explode: linear layers have standard deviation 1/√fan_in, those that end a branch are
smaller by √(2·layers), embeddings have 1, norms lie near 1, and an adapter changes every matrix by about 15 %. A base
repository and a merged sibling of the same seed agree: the sibling holds the same weights with that task's adapter
merged in fp32.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from jv5kernels.adapters import LoraAdapter, LoraPair, adapter_files, merge_adapter
from jv5kernels.model_spec import ModelSpec
from jv5kernels.synthetic.layout import (
    REAL_GEOMETRY,
    TASKS,
    TINY_GEOMETRY,
    adapter_config,
    model_config,
    write_json,
    write_settings,
    write_tokenizer_files,
)
from jv5kernels.synthetic.tokenizer import train_tokenizer

__all__ = [
    "FAMILIES",
    "REAL_GEOMETRY",
    "TASKS",
    "random_adapter",
    "random_weights",
    "real_spec",
    "write_checkpoint",
]

FAMILIES = ("small", "nano", "qwen3-embedding")
LAYOUTS = ("base", "merged")
ROPE_KEYS = ("rope_theta", "rope_parameters")
# Relative size of an adapter's change.
ADAPTER_STRENGTH = 0.15
# Rows of the embedding table are a multiple of this, so there are more than the tokenizer needs.
VOCAB_MULTIPLE = 64


def write_checkpoint(
    folder: str | Path,
    *,
    family: str = "small",
    layout: str = "base",
    task: str = "retrieval",
    geometry: Mapping[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tensor_prefix: str = "",
    rope_key: str = "rope_theta",
    tokenizer: str | Path | None = None,
    corpus: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Writes a checkpoint with random weights and returns its folder; all of it is there, or nothing.

    Args:
        folder: must not exist, or be empty.
        family: "small" or "nano" of jina-embeddings-v5-text, or "qwen3-embedding".
        layout: "base" (four adapters), or "merged" (one task merged, the files of Sentence Transformers);
            "qwen3-embedding" is "merged" without an adapter.
        task: the task of a merged layout.
        geometry: keys of config.json in place of the tiny default's; see `REAL_GEOMETRY`.
        dtype: of the stored weights and adapters.
        shards: safetensors files; an index is written when there are several.
        tensor_prefix: "" or "model." before every tensor name.
        rope_key: "rope_theta", or "rope_parameters" as Transformers 5 writes it.
        tokenizer: a tokenizer.json to take; default one trained on `corpus`.
        corpus: texts to train on; default a few sentences in many languages.
        device: where values are drawn; a GPU is much faster for real sizes, and draws other values.

    Raises:
        ValueError: an unknown family, layout, task or option; a vocabulary larger than the geometry's.
        FileExistsError: the folder holds files.

    Example:
        >>> open_checkpoint(write_checkpoint("model", family="nano")).tasks
        ('retrieval', 'text-matching', 'clustering', 'classification')
    """
    _check_choices(family=(family, FAMILIES), layout=(layout, LAYOUTS), task=(task, TASKS))
    _check_choices(rope_key=(rope_key, ROPE_KEYS), tensor_prefix=(tensor_prefix, ("", "model.")))
    if family == "qwen3-embedding" and layout == "base":
        raise ValueError(
            "layout='base' has adapters, family='qwen3-embedding' has none: use 'merged'"
        )
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    fitted = (
        train_tokenizer(family, corpus)
        if tokenizer is None
        else Tokenizer.from_file(str(tokenizer))
    )
    sizes = {**TINY_GEOMETRY[family], **(geometry or {})}
    _fit_vocabulary(sizes, fitted)
    config = model_config(family, layout, sizes, dtype=dtype, rope_key=rope_key, tokenizer=fitted)
    spec = _spec(config)
    drawn: dict[str, Any] = {"seed": seed, "dtype": dtype, "device": device}
    weights = random_weights(spec, **drawn)
    if layout == "merged" and family != "qwen3-embedding":
        weights |= merge_adapter(weights, random_adapter(spec, task, **drawn), dtype)

    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    try:
        write_settings(fresh, family, layout, config)
        write_tokenizer_files(fresh, family, fitted)
        named = {tensor_prefix + name: tensor.cpu() for name, tensor in weights.items()}
        _save_weights(fresh, named, shards)
        if layout == "base":
            for name in TASKS:
                _save_adapter(fresh, random_adapter(spec, name, **drawn))
        fresh.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        os.replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def real_spec(family: str, *, num_layers: int | None = None) -> ModelSpec:
    """Returns the architecture of the real "small", "nano" or "qwen3-embedding", with fewer layers if asked."""
    _check_choices(family=(family, FAMILIES))
    geometry = dict(REAL_GEOMETRY[family])
    if num_layers is not None:
        geometry["num_hidden_layers"] = num_layers
    config = model_config(family, "merged", geometry, dtype=torch.float32, rope_key="rope_theta")
    return _spec(config)


def random_weights(
    spec: ModelSpec,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Returns canonical name -> random tensor, made on the device; the same for the same seed and spec."""

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        normal = _normal(f"{seed}/{name}", shape, device)
        if len(shape) == 1:
            return normal.mul_(0.1).add_(1).to(dtype)
        spread = 1.0 if name == "embed_tokens.weight" else _spread(spec, name, shape[1])
        return normal.mul_(spread).to(dtype)

    return {name: draw(name, shape) for name, shape in spec.tensor_shapes().items()}


def random_adapter(
    spec: ModelSpec,
    task: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rank: int | None = None,
) -> LoraAdapter:
    """Returns an adapter of all linear layers with scaling 1.

    Args:
        rank: default 32, or an eighth of the hidden size where that is smaller.
    """
    rank = rank or min(32, max(1, spec.hidden_size // 8))

    def pair(name: str, shape: tuple[int, int]) -> LoraPair:
        a = _normal(f"{seed}/{task}/{name}/A", (rank, shape[1]), device)
        b = _normal(f"{seed}/{task}/{name}/B", (shape[0], rank), device)
        a.mul_(1 / math.sqrt(shape[1]))
        b.mul_(ADAPTER_STRENGTH * _spread(spec, name, shape[1]) * math.sqrt(shape[1] / rank))
        return LoraPair(a.to(dtype), b.to(dtype), 1.0)

    return LoraAdapter(
        task, {name: pair(name, shape) for name, shape in spec.matrix_shapes().items()}
    )


def _check_choices(**choices: tuple[str, tuple[str, ...]]) -> None:
    for argument, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{argument}={value!r} is unknown: choose one of {list(allowed)}")


def _fit_vocabulary(sizes: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Sets vocab_size where the geometry leaves it open; refuses one that is too small."""
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    rows = sizes.setdefault("vocab_size", -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
    if rows < needed:
        raise ValueError(
            f"vocab_size={rows} is too small: the tokenizer gives ids up to {needed - 1}"
        )


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    is_nano = config["model_type"] == "eurobert" or config.get("is_decoder") is False
    return ModelSpec.from_config(config, () if is_nano else ("layers.0.self_attn.q_norm.weight",))


def _spread(spec: ModelSpec, name: str, fan_in: int) -> float:
    """Standard deviation of a linear layer's weights."""
    spread = 1 / math.sqrt(fan_in)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        # As GPT-2 is initialised: 2·layers branches together add about as much as the embedding.
        spread /= math.sqrt(2 * spec.num_layers)
    return spread


def _normal(key: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator, device=device)


def _save_weights(folder: Path, weights: Mapping[str, Tensor], shards: int) -> None:
    if shards < 1:
        raise ValueError(f"shards={shards} must be at least 1")
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
        return
    placed = {}
    for shard in range(shards):
        names = list(weights)[shard::shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(names, file))
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    write_json(folder / "model.safetensors.index.json", index)


def _save_adapter(folder: Path, adapter: LoraAdapter) -> None:
    settings, file = adapter_files(folder, adapter.task)
    rank = next(iter(adapter.pairs.values())).a.shape[0]
    write_json(settings, adapter_config(adapter.task, rank))
    tensors = {}
    for name, pair in adapter.pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = pair.a.cpu()
        tensors[f"{module}.lora_B.weight"] = pair.b.cpu()
    save_file(tensors, file, metadata={"format": "pt"})
