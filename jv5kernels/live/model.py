"""What FastEncoder needs of a live model, with the interface of a `Checkpoint`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from jv5kernels.adapters import LoraAdapter, LoraPair
from jv5kernels.encoding_settings import BASE_DEFAULT_PROMPT, BASE_PROMPTS, POOLINGS
from jv5kernels.live.structure import Module, find_backbone, spec_of
from jv5kernels.live.weights import NotSupported, low_rank_terms, plain_weight
from jv5kernels.model_spec import LINEARS, ModelSpec

__all__ = ["LiveModel", "open_live"]


@dataclass(frozen=True)
class LiveModel:
    """A live model, opened: the fields and methods of a `Checkpoint`, read from modules instead of files.

    Args:
        inner: the Qwen3 or EuroBERT backbone.
        source: name for messages.
        spec: its architecture.
        pooling: "lasttoken", "mean" or "cls"; None when nothing around the backbone states it.
        normalize: whether the model's own pipeline ends with unit length.
        prompts: name -> text put before an input.
        default_prompt_name: prompt of a call that names none.
        tasks: names of the LoRA adapters, () when there are none.
        default_task: the only adapter, or the one that a SentenceTransformer was loaded for; None: a call must choose.
        max_seq_length: tokens a text.
        carried: what to take the tokenizer from; None for what config._name_or_path leads to.
    """

    inner: Module = field(repr=False)
    source: str
    spec: ModelSpec
    pooling: str | None
    normalize: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    tasks: tuple[str, ...]
    default_task: str | None
    max_seq_length: int
    carried: Any = field(repr=False)
    revision: str | None = None
    matryoshka_dims: tuple[int, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.inner.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.embed_tokens.weight.device

    def weights(self) -> dict[str, Tensor]:
        """Returns canonical name -> tensor ("layers.0.mlp.up_proj.weight"), no adapters; not copies."""
        found = {
            "embed_tokens.weight": self.inner.embed_tokens.weight,
            "norm.weight": self.inner.norm.weight,
        }
        for index, layer in enumerate(self.inner.layers):
            names = ["input_layernorm", "post_attention_layernorm"]
            names += ["self_attn.q_norm", "self_attn.k_norm"] if self.spec.qk_norm else []
            for name in names:
                found[f"layers.{index}.{name}.weight"] = layer.get_submodule(name).weight
            for name in LINEARS:
                found[f"layers.{index}.{name}.weight"] = plain_weight(layer.get_submodule(name))
        return {name: weight.detach() for name, weight in found.items()}

    def adapter(self, task: str) -> LoraAdapter:
        """Returns the LoRA adapter of that name, read from PEFT's layers.

        Raises:
            ValueError: an unknown name, or a variant of LoRA that is not supported.
        """
        if task not in self.tasks:
            raise ValueError(f"task={task!r} is unknown: choose one of {list(self.tasks)}")
        pairs: dict[str, LoraPair] = {}
        for index, layer in enumerate(self.inner.layers):
            for name in LINEARS:
                try:
                    terms = list(low_rank_terms(layer.get_submodule(name), 0, 0, task))
                except NotSupported as reason:
                    raise ValueError(f"adapter {task!r}: layers.{index}.{name}: {reason}") from None
                for term in terms:
                    pairs[f"layers.{index}.{name}.weight"] = LoraPair(term.a, term.b, term.scaling)
        return LoraAdapter(task, pairs)

    def tokenizer(self) -> Tokenizer:
        """Returns the model's tokenizer, a copy.

        Raises:
            ValueError: none was found, it is not a fast one, or it gives ids beyond the embedding table.
        """
        carried = self.carried if self.carried is not None else _named(self.inner.config)
        backend = getattr(carried, "backend_tokenizer", carried)
        if not isinstance(backend, Tokenizer):
            raise ValueError(
                f"tokenizer: a {type(carried).__name__} has no fast tokenizer behind it"
            )
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= self.spec.vocab_size:
            raise ValueError(
                f"the tokenizer gives ids up to {largest}, but the embedding table has "
                f"{self.spec.vocab_size} rows"
            )
        return Tokenizer.from_str(backend.to_str())


def open_live(model: nn.Module, *, tokenizer: Any = None) -> LiveModel:
    """Reads a live model: a SentenceTransformer, the v5 remote class, a PeftModel, a Qwen3Model or EuroBertModel.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, a fast tokenizer of Transformers, or the path of a tokenizer.json; default
            the one that the model carries or that its `config._name_or_path` leads to.

    Raises:
        TypeError: no such backbone in `model`.
        ValueError: a backbone, a module around it, or a state (merged adapters) that is not supported.

    Example:
        >>> open_live(SentenceTransformer("Qwen/Qwen3-Embedding-0.6B")).pooling
        'lasttoken'
    """
    path, inner = find_backbone(model)
    spec = spec_of(inner)
    tasks = _adapter_names(inner)
    pipeline = _pipeline(model, path)
    is_base = hasattr(inner.config, "task_names")
    if is_base and len(pipeline) <= 1:
        pooling: str | None = "lasttoken"
        normalize = True
    else:
        pooling, normalize = _pooling(pipeline)
    prompts = getattr(model, "prompts", None) or (BASE_PROMPTS if is_base else {})
    default = getattr(model, "default_prompt_name", BASE_DEFAULT_PROMPT if is_base else None)
    chosen = getattr(pipeline[0], "default_task", None) if pipeline else None
    limit = (getattr(model, "max_seq_length", None) if pipeline else None) or 0
    return LiveModel(
        inner=inner,
        source=type(model).__name__,
        spec=spec,
        pooling=pooling,
        normalize=normalize,
        prompts=dict(prompts),
        default_prompt_name=default,
        tasks=tasks,
        default_task=chosen or (tasks[0] if len(tasks) == 1 else None),
        max_seq_length=min(
            int(limit) or spec.max_position_embeddings, spec.max_position_embeddings
        ),
        carried=_read(tokenizer) if tokenizer is not None else getattr(model, "tokenizer", None),
    )


def _read(tokenizer: Any) -> Any:
    return Tokenizer.from_file(str(tokenizer)) if isinstance(tokenizer, (str, Path)) else tokenizer


def _pipeline(model: Module, path: str) -> list[Module]:
    """The steps of a SentenceTransformer, the first of which holds the backbone; [] of any other model."""
    if not isinstance(model, nn.Sequential):
        return []
    steps = list(model._modules.items())
    if not path.startswith(f"{steps[0][0]}."):
        raise ValueError(f"the backbone is at {path!r}, not in the first module of the pipeline")
    return [step for _, step in steps]


def _pooling(pipeline: list[Module]) -> tuple[str | None, bool]:
    """Pooling and whether unit length follows; (None, True) where there is no pipeline."""
    if not pipeline:
        return None, True
    kinds = [type(step).__name__ for step in pipeline]
    if len(kinds) < 2 or kinds[2:] not in ([], ["Normalize"]):
        raise ValueError(
            f"this pipeline is {', '.join(kinds)}; supported are a transformer, a pooling, and Normalize or nothing"
        )
    pooling = pipeline[1]
    stated = getattr(pooling, "pooling_mode", None)
    if stated is None and hasattr(pooling, "get_pooling_mode_str"):
        stated = pooling.get_pooling_mode_str()
    if stated not in POOLINGS:
        raise ValueError(f"{kinds[1]} with pooling {stated!r} is not supported: only {POOLINGS}")
    if not getattr(pooling, "include_prompt", True) and stated != "lasttoken":
        raise ValueError(f"{kinds[1]} leaves the prompt out (include_prompt=False)")
    return stated, len(kinds) == 3


def _adapter_names(inner: Module) -> tuple[str, ...]:
    """Names of the adapters in PEFT's layers, in config.task_names' order where that is stated."""
    names: dict[str, None] = {}
    for wrapper in _wrappers(inner):
        names.update(dict.fromkeys(getattr(wrapper._modules.get("lora_A"), "_modules", {})))
        if getattr(wrapper, "merged", False):
            raise ValueError(
                "adapters are merged into the weights: unmerge them, or merge_and_unload()"
            )
    first = [name for name in getattr(inner.config, "task_names", None) or () if name in names]
    return tuple(dict.fromkeys([*first, *names]))


def _wrappers(inner: Module) -> Iterator[Module]:
    return (m for m in inner.layers.modules() if "base_layer" in m._modules)


def _named(config: Any) -> Any:
    """The tokenizer of the folder or hub id that the model was loaded from."""
    name = getattr(config, "_name_or_path", "")
    file = Path(name) / "tokenizer.json"
    if name and file.is_file():
        return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    try:
        if not name:
            raise OSError("config._name_or_path is empty")
        return AutoTokenizer.from_pretrained(name, revision=getattr(config, "_commit_hash", None))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer: the model carries none, and config._name_or_path={name!r} leads to none; pass tokenizer="
        ) from error
