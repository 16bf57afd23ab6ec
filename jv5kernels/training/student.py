"""The student: a Qwen3 backbone, its embeddings in training, and its checkpoint in the base repositories' layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from jv5kernels.adapters import adapter_files
from jv5kernels.synthetic.layout import (
    adapter_config,
    model_config,
    write_json,
    write_settings,
    write_tokenizer_files,
)
from jv5kernels.training.recipe import Recipe

__all__ = [
    "adapter_tensors",
    "embed",
    "new_backbone",
    "read_backbone",
    "set_token_embeddings",
    "set_rope_theta",
    "thinned",
    "with_adapter",
    "write_base",
    "write_adapter",
]


def new_backbone(recipe: Recipe, rows: int) -> nn.Module:
    """Returns a Qwen3Model with random weights and an embedding table of so many rows."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        **recipe.geometry,
        vocab_size=rows,
        tie_word_embeddings=True,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.inference_theta},
    )
    config._attn_implementation = "sdpa"
    backbone = Qwen3Model(config)
    for name, module in list(backbone.named_modules()):
        if type(module).__name__ == "Qwen3RMSNorm":
            fused = FusedNorm(module.weight.shape[0], eps=config.rms_norm_eps)
            backbone.get_submodule(name.rpartition(".")[0]).register_module(
                name.rpartition(".")[2], fused
            )
    return backbone


class FusedNorm(nn.RMSNorm):
    """Qwen3's RMSNorm by torch's one kernel in place of seven: they are half of the traffic of a small model."""

    def forward(self, x: Tensor) -> Tensor:
        # That kernel computes in float32 inside; autocast would only write float32 copies around it.
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.to(x.dtype)
            return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


def read_backbone(recipe: Recipe, folder: Path) -> nn.Module:
    """Returns the backbone of a folder that `write_base` wrote, in float32.

    Raises:
        FileNotFoundError: there are no weights.
        RuntimeError: weights of other sizes than the recipe's.
    """
    weights = load_file(folder / "model.safetensors")
    backbone = new_backbone(recipe, weights["embed_tokens.weight"].shape[0])
    backbone.load_state_dict({name: t.float() for name, t in weights.items()})
    return backbone


def set_token_embeddings(backbone: nn.Module, vectors: Tensor) -> None:
    """Starts the token embeddings from given vectors, centred and scaled to the spread of fresh weights.

    Args:
        vectors: (tokens, dim); of a wider table the first columns are taken, further rows stay as they are.
    """
    module: Any = backbone
    table = module.get_input_embeddings().weight
    width = min(table.shape[1], vectors.shape[1])
    centred = (vectors - vectors.mean(0))[:, :width].to(table)
    with torch.no_grad():
        table[: len(vectors), :width] = centred * (table.std() / centred.std())


def set_rope_theta(backbone: nn.Module, theta: float) -> None:
    """Changes the base of the rotary frequencies in place."""
    base: Any = backbone
    config = base.config
    config.rope_parameters = {**config.rope_parameters, "rope_theta": theta}
    rotary = base.rotary_emb
    device = rotary.inv_freq.device
    base.rotary_emb = type(rotary)(config=config).to(device)


def thinned(last: Tensor, width: int, share: float) -> tuple[Tensor, Tensor]:
    """Draws which tokens of each text stay when a share of them is left out; the last one always stays.

    Args:
        last: (texts,) int64, position of each text's last token, below width.

    Returns:
        positions (texts, ⌈width * (1 - share)⌉) that stay, ascending, then `width` where a text has no more of them;
        and the position of each text's last token among them.
    """
    count = math.ceil(width * (1 - share))
    kept = torch.ceil((last + 1) * (1 - share)).long().clamp_max(count)
    position = torch.arange(width, device=last.device)
    draw = torch.rand(len(last), width, device=last.device)
    draw = draw.masked_fill(position > last[:, None], 2.0).scatter(1, last[:, None], -1.0)
    chosen = draw.topk(count, dim=1, largest=False, sorted=True).indices
    chosen = chosen.masked_fill(position[:count] >= kept[:, None], width)
    return chosen.sort(dim=1).values, kept - 1


def embed(
    backbone: nn.Module,
    ids: Tensor,
    parts: Sequence[Mapping[str, Any]],
    dropout: float = 0.0,
    thinning: float = 0.0,
) -> Tensor:
    """Returns the last token's hidden state of every text, float32 (texts, hidden), in the order they were given.

    A causal backbone never looks at what follows a token, so a row goes on behind its text with whatever ids follow
    there, and no mask is needed. Under autocast the hidden states have its dtype from the embeddings on.

    Args:
        ids: (ids of all texts,) int32, on the backbone's device.
        parts: what `batches.grouped` returns, on the same device; one that has `ids` (texts, width) brings its own.
        dropout: share of values of the token embeddings set to 0, in training mode.
        thinning: share of each text's tokens left out, in training mode.
    """
    module: Any = backbone
    total = sum(len(part["rows"]) for part in parts)
    pooled = []
    for part in parts:
        position, last = torch.arange(part["width"], device=ids.device), part["last"]
        if thinning and module.training:
            position, last = thinned(last, part["width"], thinning)
        if "ids" in part:
            at = position.expand(len(last), -1).clamp_max(part["width"] - 1)
            chosen = part["ids"].gather(1, at)
        else:
            chosen = ids[(part["start"][:, None] + position).clamp_max(len(ids) - 1)]
        values = module.get_input_embeddings()(chosen)
        if torch.is_autocast_enabled(ids.device.type):
            values = values.to(torch.get_autocast_dtype(ids.device.type))
        values = nn.functional.dropout(values, dropout, module.training)
        # A mapping of masks keeps the model from building one, and from waiting for the device while it does.
        hidden = module(
            inputs_embeds=values, attention_mask={"full_attention": None}, use_cache=False
        ).last_hidden_state
        pooled.append(hidden[torch.arange(len(hidden), device=hidden.device), last].float())
    rows = torch.cat([part["rows"] for part in parts])
    gathered = torch.cat(pooled)
    return gathered.new_zeros(total, gathered.shape[1]).index_copy(0, rows, gathered)


def with_adapter(backbone: nn.Module, task: str, rank: int) -> Any:
    """Returns the backbone, frozen, with a fresh LoRA adapter on all its linear layers."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    settings = adapter_config(task, rank)
    wanted = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "init_lora_weights")
    config = LoraConfig(**{key: settings[key] for key in wanted})
    model = get_peft_model(backbone, config)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # Autocast chooses the dtype of products; a float32 copy of each input would only be cast back.
            setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010 - not declared there
    return model


def adapter_tensors(model: Any, share: float = 1.0) -> dict[str, Tensor]:
    """Returns the adapter's tensors under the names of PEFT's files, on the CPU, with a share of its update."""
    from peft import get_peft_model_state_dict

    return {
        name: t.detach().cpu() * (share if name.endswith("lora_B.weight") else 1)
        for name, t in get_peft_model_state_dict(model).items()
    }


def write_base(
    folder: Path, recipe: Recipe, backbone: nn.Module, tokenizer: Tokenizer, tasks: Sequence[str]
) -> None:
    """Writes everything of a base repository but its adapters, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: t.detach().cpu().to(torch.bfloat16) for name, t in backbone.state_dict().items()
    }
    geometry = {
        **recipe.geometry,
        "vocab_size": weights["embed_tokens.weight"].shape[0],
        "rope_theta": recipe.inference_theta,
        "matryoshka_dimensions": list(recipe.matryoshka_dims),
        "task_names": list(tasks),
    }
    config = model_config(
        "small", "base", geometry, dtype=torch.bfloat16, rope_key="rope_theta", tokenizer=tokenizer
    )
    write_settings(folder, "small", "base", config)
    write_tokenizer_files(folder, "small", tokenizer)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, task: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes adapters/<task>/ in bfloat16."""
    settings, file = adapter_files(folder, task)
    rank = next(t for name, t in tensors.items() if name.endswith("lora_A.weight")).shape[0]
    write_json(settings, adapter_config(task, rank))
    save_file(
        {name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
