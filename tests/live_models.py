"""Live models of Transformers and PEFT for the tests: tiny, random, or loaded from a synthetic checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftMixedModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    EuroBertConfig,
    EuroBertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 97
TASKS = ("retrieval", "text-matching", "clustering", "classification")

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def qwen3(**changes: Any) -> Qwen3Model:
    """A causal backbone with grouped heads, q/k norm and norms that are not 1."""
    own = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3.5e6},
    }
    return _randomised(Qwen3Model(Qwen3Config(**{**SMALL, **own, **changes})))


def eurobert(**changes: Any) -> EuroBertModel:
    """A bidirectional backbone, one key head a query head."""
    own = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "mask_token_id": 4,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return _randomised(EuroBertModel(EuroBertConfig(**{**SMALL, **own, **changes})))


def _randomised(model: nn.Module) -> Any:
    """Weights at which attention, norms and residuals all matter; a fresh model's are close to doing nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1] if parameter.dim() == 2 and "embed" not in name else 1
            parameter.copy_(1 + 0.2 * values if parameter.dim() == 1 else values / fan_in**0.5)
    return model.eval()


def lora_config(**changes: Any) -> LoraConfig:
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": TARGETS,
        "lora_dropout": 0.1,
        "init_lora_weights": False,
        "task_type": "FEATURE_EXTRACTION",
    }
    return LoraConfig(**{**settings, **changes})


def with_adapters(
    backbone: nn.Module, *, mixed: bool, names: tuple[str, ...] = TASKS, **changes: Any
) -> Any:
    """PEFT around a backbone with one random adapter a name; the first is active."""
    torch.manual_seed(11)
    model = get_peft_model(backbone, lora_config(**changes), adapter_name=names[0], mixed=mixed)
    for name in names[1:]:
        model.add_adapter(name, lora_config(**changes))
    return model.eval()


class RemoteLike(PeftMixedModel):
    """Of the same structure as the class that the base repositories ship as remote code."""

    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> RemoteLike:
        """From a checkpoint in the base layout; the backbone's family is what the config's is_decoder tells."""
        stated = json.loads((folder / "config.json").read_text())
        is_nano = stated.get("is_decoder") is False
        family = (EuroBertConfig, EuroBertModel) if is_nano else (Qwen3Config, Qwen3Model)
        dropped = ("architectures", "auto_map", "torch_dtype", "dtype", "model_type")
        config = family[0](**{k: v for k, v in stated.items() if k not in dropped})
        config.model_type = "jina_embeddings_v5"
        base = family[1].from_pretrained(folder, config=config, dtype=dtype)
        adapters = {name: str(folder / "adapters" / name) for name in config.task_names}
        first = PeftConfig.from_pretrained(adapters["retrieval"])
        model = cls(base, first, adapter_name="retrieval")
        for name in config.task_names:
            model.load_adapter(adapters[name], adapter_name=name)
        model.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return model.eval()

    def encode(self, texts: list[str], task: str, prompt_name: str = "document") -> Tensor:
        """Pads on the right, switches the adapter and pools the last token, as the remote class does."""
        prompt = {"query": "Query: ", "document": "Document: "}[prompt_name]
        batch = self.tokenizer(
            [prompt + text for text in texts],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self.config.max_position_embeddings,
        )
        device = next(self.parameters()).device
        batch = {name: values.to(device) for name, values in batch.items()}
        self.set_adapter([task])
        self.eval()
        with torch.no_grad():
            hidden = self(**batch).last_hidden_state
            last = batch["attention_mask"].sum(dim=1) - 1
            pooled = hidden[torch.arange(len(hidden), device=device), last]
            return F.normalize(pooled, p=2, dim=-1)


def ragged_batch(lengths: list[int], side: str) -> dict[str, Tensor]:
    """input_ids and attention_mask of random tokens, padded on the "left" or "right" with a real token's id."""
    generator = torch.Generator().manual_seed(len(lengths))
    longest = max(lengths)
    ids = torch.randint(0, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask.flip(1) if side == "left" else mask}


def storage_bytes(model: nn.Module) -> int:
    """Bytes of all storages behind the parameters, each counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


TOLERANCE = 1e-5  # fp32 hidden states of size 1 after 3 layers: the order of sums, and nothing else


@torch.inference_mode()
def hidden(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**inputs).last_hidden_state


def check_tokens(
    actual: Tensor, expected: Tensor, mask: Tensor | None, tol: float = TOLERANCE
) -> None:
    """Compares hidden states where there are tokens; elsewhere they must be zero."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    here = torch.ones_like(actual[..., 0], dtype=torch.bool) if mask is None else mask.bool()
    assert (actual[here] - expected[here]).abs().max() < tol
    assert not actual[~here].any()
