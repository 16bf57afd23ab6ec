"""LoRA adapters in PEFT's format: read, checked against the model, merged in fp32 and rounded once.

A merged matrix is round(W + scaling · B A), scaling = alpha / r, or alpha / √r for rank-stabilised adapters
(Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jv5kernels.encoding_settings import read_json
from jv5kernels.model_spec import ModelSpec
from jv5kernels.tensor_files import StoredTensor, load_tensors, read_header

__all__ = ["LoraAdapter", "LoraPair", "adapter_files", "merge_adapter", "read_adapter"]

KEY = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.)?(?P<name>.+))\.lora_(?P<side>[AB])\.weight"
)
# Settings that change what an adapter computes, beyond W + scaling·BA of its target modules, with their neutral values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # Other initialisations subtract from the base weight when they are set up.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class LoraPair:
    """The change of one matrix: scaling · b a, with a (r, in) and b (out, r) in their stored dtype."""

    a: Tensor
    b: Tensor
    scaling: float

    def merged_into(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns weight (out, in) with the change added in fp32, rounded to dtype once."""
        change = self.b.float() @ self.a.float()
        return change.mul_(self.scaling).add_(weight.float()).to(dtype)


@dataclass(frozen=True)
class LoraAdapter:
    """All changes of one task, by canonical weight name ("layers.0.self_attn.q_proj.weight")."""

    task: str
    pairs: dict[str, LoraPair]


def adapter_files(folder: Path, task: str) -> tuple[Path, Path]:
    """Where a checkpoint keeps the settings and the tensors of a task's adapter."""
    adapter = Path(folder) / "adapters" / task
    return adapter / "adapter_config.json", adapter / "adapter_model.safetensors"


def read_adapter(folder: Path, task: str, spec: ModelSpec) -> LoraAdapter:
    """Reads adapters/<task>/ of a checkpoint folder.

    Args:
        spec: the model it must fit.

    Raises:
        FileNotFoundError: the settings or the tensors are missing.
        ValueError: a setting that is not supported; a matrix that is not in the model, or has another shape; an A
            without its B; a target module without a change.
    """
    settings, file = adapter_files(folder, task)
    config = read_json(settings)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    for key, allowed in NEUTRAL.items():
        value = config.get(key, allowed[0])
        if not any(value is a or value == a for a in allowed):
            raise ValueError(f"{settings}: {key}={value!r} is not supported")
    sides = _sides(read_header(file))
    modules = _check(sides, config, spec, file)
    loaded = load_tensors(
        {f"{name}.{side}": t for name, pair in sides.items() for side, t in pair.items()}
    )
    pairs = {
        f"{name}.weight": LoraPair(
            loaded[f"{name}.A"], loaded[f"{name}.B"], _scaling(config, modules[name])
        )
        for name in sides
    }
    return LoraAdapter(task, pairs)


def merge_adapter(
    weights: Mapping[str, Tensor], adapter: LoraAdapter, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the matrices that an adapter changes, merged in fp32 and rounded to dtype once.

    Args:
        weights: canonical name -> (out, in), any floating dtype.
        adapter: from `read_adapter`.

    Raises:
        ValueError: the adapter changes a matrix that is not among the weights, or of another shape.

    Example:
        >>> len(merge_adapter(checkpoint.weights(), checkpoint.adapter("retrieval"), torch.bfloat16))
        196
    """
    merged = {}
    for name, pair in adapter.pairs.items():
        if name not in weights:
            raise ValueError(
                f"adapter {adapter.task!r} changes {name}, which the model does not have"
            )
        shape = (pair.b.shape[0], pair.a.shape[1])
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"adapter {adapter.task!r}: {name} has shape {tuple(weights[name].shape)}, its change {shape}"
            )
        merged[name] = pair.merged_into(weights[name], dtype)
    return merged


def _sides(stored: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Canonical module name ("layers.0.mlp.up_proj") -> its "A" and "B"."""
    sides: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{tensor.file}: unexpected tensor {key}")
        if sides.setdefault(match["name"], {}).setdefault(match["side"], tensor) is not tensor:
            raise ValueError(f"{tensor.file}: {match['name']} has two {match['side']} matrices")
    return sides


def _check(
    sides: Mapping[str, Mapping[str, StoredTensor]],
    config: Mapping[str, Any],
    spec: ModelSpec,
    file: Path,
) -> dict[str, str]:
    """Checks names, pairs, shapes and completeness; canonical module name -> its name when the adapter was trained."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in spec.matrix_shapes().items()}
    modules: dict[str, str] = {}
    for name, pair in sides.items():
        if name not in shapes:
            raise ValueError(f"{file}: {name} is not a matrix of this model")
        if set(pair) != {"A", "B"}:
            raise ValueError(
                f"{file}: {name} has lora_{next(iter(pair))} alone, its other half is missing"
            )
        match = KEY.fullmatch(pair["A"].name)
        assert match is not None
        modules[name] = match["module"]
        rank = _pattern(config, "rank_pattern", modules[name], config.get("r", 8))
        out_features, in_features = shapes[name]
        for side, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            if pair[side].shape != shape:
                raise ValueError(
                    f"{file}: lora_{side} of {name} has shape {pair[side].shape}, not {shape}"
                )
    wanted = {name for name in shapes if _is_target(config, modules.get(name, name))}
    if missing := sorted(wanted - set(sides)):
        raise ValueError(
            f"{file}: {len(sides)} of {len(wanted)} target matrices have a change; missing: {missing[:5]}"
        )
    if surplus := sorted(set(sides) - wanted):
        raise ValueError(f"{file}: not a target module of adapter_config.json: {surplus[:5]}")
    return modules


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """PEFT's rule: a string is a regular expression of the whole name, a list holds names or their endings."""

    def matches(targets: str | list[str] | None) -> bool:
        if not targets:
            return False
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in targets)

    return matches(config.get("target_modules")) and not matches(config.get("exclude_modules"))


def _pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that is the name or an ending of it."""
    for pattern, value in (config.get(key) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _scaling(config: Mapping[str, Any], module: str) -> float:
    rank = _pattern(config, "rank_pattern", module, config.get("r", 8))
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
