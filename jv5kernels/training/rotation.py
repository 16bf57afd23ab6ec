"""A finished model with its residual stream rotated: the same model, whose dimensions carry what it knows more evenly.

Nested losses put most of what a model knows into its first dimensions, but its bit is worth no more than any other's.
An RMSNorm without weights commutes with an orthogonal R, so that R can go into every matrix that reads or writes the
residual stream (arXiv 2401.15024, §3.1; arXiv 2404.00456), and embeddings come out as eR: all cosines are kept, signs
say more, and prefixes say less. R = exp(angle · K) with a random skew-symmetric K: 0 changes nothing, 2 is about as
good as a random rotation.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["rotate_adapter", "rotate_base", "rotate_model", "rotation"]

# Linear layers that read the residual stream, through which norm, and those that write to it.
READERS = {
    "q_proj": "input_layernorm",
    "k_proj": "input_layernorm",
    "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm",
    "up_proj": "post_attention_layernorm",
}
WRITERS = ("o_proj", "down_proj")


def rotation(width: int, angle: float, seed: int = 0) -> Tensor:
    """Returns an orthogonal (width, width) float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.matrix_exp(angle * (draw - draw.T) / (2 * width) ** 0.5)


def rotate_base(weights: Mapping[str, Tensor], turn: Tensor) -> dict[str, Tensor]:
    """Returns the weights of a Qwen3 backbone whose output is turned, in float64.

    The weights of its norms go into the matrices behind them; the last norm has none behind it, so that its weight is
    replaced by its root mean square, which weighs the dimensions alike.

    Args:
        weights: as in model.safetensors.
        turn: (hidden, hidden) orthogonal.
    """
    rotated = {}
    for name, tensor in weights.items():
        wide = tensor.double()
        if name == "embed_tokens.weight":
            rotated[name] = wide @ turn
        elif name == "norm.weight":
            rotated[name] = torch.full_like(wide, wide.square().mean().sqrt().item())
        elif name.endswith("layernorm.weight"):
            rotated[name] = torch.ones_like(wide)
        else:
            rotated[name] = _turned(name, wide, weights, turn)
    return rotated


def rotate_adapter(
    adapter: Mapping[str, Tensor], weights: Mapping[str, Tensor], turn: Tensor
) -> dict[str, Tensor]:
    """Returns a LoRA adapter for the turned backbone, in float64.

    Args:
        adapter: as in adapter_model.safetensors.
        weights: of the backbone that it was trained on, before the turn.
    """
    prefix = "base_model.model."
    return {
        name: _turned(name.removeprefix(prefix), tensor.double(), weights, turn)
        if name.startswith(prefix)
        else tensor.double()
        for name, tensor in adapter.items()
    }


def _turned(name: str, tensor: Tensor, weights: Mapping[str, Tensor], turn: Tensor) -> Tensor:
    """A matrix that reads is turned on the side of its input, one that writes on that of its output."""
    parts = name.split(".")
    layer = next((part for part in parts if part in READERS or part in WRITERS), None)
    if layer in READERS and not name.endswith("lora_B.weight"):
        norm = weights[f"{parts[0]}.{parts[1]}.{READERS[layer]}.weight"].double()
        return (tensor * norm) @ turn
    if layer in WRITERS and not name.endswith("lora_A.weight"):
        return turn.T @ tensor
    return tensor


def rotate_model(source: Path, out: Path, angle: float) -> Path:
    """Writes a model with all its adapters, turned, to another folder, in the dtypes that they had."""
    weights = load_file(source / "model.safetensors")
    turn = rotation(weights["norm.weight"].shape[0], angle)
    shutil.copytree(source, out, dirs_exist_ok=True)
    _write(rotate_base(weights, turn), weights, out / "model.safetensors")
    for file in sorted(source.glob("adapters/*/adapter_model.safetensors")):
        adapter = load_file(file)
        turned = rotate_adapter(adapter, weights, turn)
        _write(turned, adapter, out / file.relative_to(source))
    return out


def _write(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], file: Path) -> None:
    kept = {name: t.to(like[name].dtype).contiguous() for name, t in tensors.items()}
    save_file(kept, file, metadata={"format": "pt"})
