"""Checkpoints: a hub id, a folder or the packaged model, opened without running any code that comes with it.

Three layouts are read: the base repositories of jina-embeddings-v5-text (model_type jina_embeddings_v5, LoRA adapters
in adapters/<task>/), their merged siblings (plain Qwen3 or EuroBERT with the files of Sentence Transformers), and other
Qwen3 or EuroBERT embedding checkpoints. Everything is taken from the files, nothing from a name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from jv5kernels.adapters import LoraAdapter, adapter_files, read_adapter
from jv5kernels.encoding_settings import read_json, read_settings
from jv5kernels.model_spec import ModelSpec
from jv5kernels.packaged import PACKAGED, find_packaged, packaged_folder
from jv5kernels.tensor_files import (
    StoredTensor,
    backbone_tensors,
    check_shapes,
    list_tensors,
    load_tensors,
)

__all__ = ["HUB_PATTERNS", "Checkpoint", "open_checkpoint"]

# What is fetched from a hub: weights, settings, tokenizer, adapters; never code, nor other formats of the weights.
HUB_PATTERNS = (
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "?_*/config.json",
    "adapters/*/adapter_config.json",
    "adapters/*/adapter_model.safetensors",
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its files are complete and fit each other; values are read when asked for.

    Args:
        folder: where the files are.
        source: hub id or folder as it was given; "jv5-tiny" for the packaged model.
        revision: commit of the files, when known.
        spec: the architecture.
        pooling: "lasttoken", "mean" or "cls"; None when no file states it, then the caller has to choose.
        normalize: whether the checkpoint's own pipeline ends with unit length.
        prompts: name -> text put before an input.
        default_prompt_name: prompt of a call that names none.
        tasks: names of the LoRA adapters, () when the weights serve one task as they are.
        max_seq_length: tokens a text, special tokens included.
        matryoshka_dims: dimensions the model was trained to be cut to; () when no file states them.
        torch_dtype: dtype that config.json states (weights may be stored in another); None when it states none.
    """

    folder: Path
    source: str
    revision: str | None
    spec: ModelSpec
    pooling: str | None
    normalize: bool
    prompts: dict[str, str]
    default_prompt_name: str | None
    tasks: tuple[str, ...]
    max_seq_length: int
    matryoshka_dims: tuple[int, ...]
    torch_dtype: torch.dtype | None
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    def weights(self) -> dict[str, Tensor]:
        """Returns canonical name -> tensor on the CPU, as stored: "layers.0.mlp.up_proj.weight", "norm.weight".

        Pages are read from the files when they are touched; writing to a tensor does not reach the files.
        """
        return load_tensors(self.tensors)

    def adapter(self, task: str) -> LoraAdapter:
        """Returns the LoRA adapter of a task.

        Raises:
            ValueError: an unknown task, or an adapter that does not fit the model.
            FileNotFoundError: a file of the adapter is missing.
        """
        if task not in self.tasks:
            raise ValueError(f"task={task!r} is unknown: choose one of {list(self.tasks)}")
        return read_adapter(self.folder, task, self.spec)

    def tokenizer(self) -> Tokenizer:
        """Returns a tokenizer of the checkpoint's tokenizer.json, new on every call.

        Raises:
            ValueError: it gives ids beyond the embedding table.
        """
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= self.spec.vocab_size:
            raise ValueError(
                f"{self.folder / 'tokenizer.json'} gives ids up to {largest}, "
                f"but the embedding table has {self.spec.vocab_size} rows"
            )
        return tokenizer


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Opens a checkpoint and checks that it is complete.

    Args:
        model: "jv5-tiny" for the model that comes with the package, a folder, or a hub id such as
            "jinaai/jina-embeddings-v5-text-small".
        revision: branch, tag or commit of a hub id; resolved once, every file comes from the same commit.
        token, cache_dir, local_files_only: as in huggingface_hub.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing; named in the message.
        ValueError: missing, unexpected or misshapen tensors, or a setting that is not supported; an option of a hub
            with a model that is not on one; "jv5-tiny" where a folder of that name could be meant.

    Example:
        >>> open_checkpoint("jv5-tiny").tasks
        ('retrieval', 'text-matching', 'clustering', 'classification')
    """
    folder, commit = _locate(
        model,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config = read_json(folder / "config.json")
    stored = list_tensors(folder)
    spec = ModelSpec.from_config(config, stored)
    tensors = backbone_tensors(stored)
    check_shapes(tensors, spec.tensor_shapes(), str(folder))
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing")
    settings = read_settings(folder, config, spec.max_position_embeddings)
    return Checkpoint(
        folder=folder,
        source=PACKAGED if folder.resolve() == packaged_folder().resolve() else str(model),
        revision=commit,
        spec=spec,
        pooling=settings.pooling,
        normalize=settings.normalize,
        prompts=settings.prompts,
        default_prompt_name=settings.default_prompt_name,
        tasks=_tasks(folder, config),
        max_seq_length=settings.max_seq_length,
        matryoshka_dims=tuple(config.get("matryoshka_dimensions") or ()),
        torch_dtype=_stated_dtype(config),
        tensors=tensors,
    )


def _locate(model: str | Path, *, revision: str | None, **hub: Any) -> tuple[Path, str | None]:
    """The folder with the files, and their commit when it is known."""
    packaged = find_packaged(
        model, revision=revision, token=hub["token"], cache_dir=hub["cache_dir"]
    )
    if packaged is not None:
        return packaged, None
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for hub ids, but {model} is a folder")
        return path, _commit_of(path)
    text = str(model)
    is_path = isinstance(model, Path) or path.is_absolute() or text.startswith((".", "~"))
    if is_path or text.count("/") > 1 or os.sep != "/" and os.sep in text:
        raise FileNotFoundError(f"there is no folder {model}")
    from huggingface_hub import snapshot_download

    # One call, so that a branch is resolved to a commit once for all files.
    folder = Path(
        snapshot_download(text, revision=revision, allow_patterns=list(HUB_PATTERNS), **hub)
    )
    return folder, _commit_of(folder)


def _commit_of(folder: Path) -> str | None:
    """The commit in the path of a hub cache: <repository>/snapshots/<commit>."""
    absolute = Path(os.path.abspath(folder))
    return absolute.name if absolute.parent.name == "snapshots" else None


def _tasks(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Adapter names, in the order of config.json; every one has its files."""
    tasks = tuple(config.get("task_names") or ())
    if config.get("model_type") == "jina_embeddings_v5" and not tasks:
        tasks = tuple(sorted(path.name for path in folder.glob("adapters/*") if path.is_dir()))
        if not tasks:
            raise FileNotFoundError(
                f"{folder}: config.json names no tasks and there is no folder adapters/<task>; "
                "the base weights alone are no embedding model"
            )
    for task in tasks:
        for file in adapter_files(folder, task):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, the adapter of task {task!r}")
    return tasks


def _stated_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    name = config.get("dtype", config.get("torch_dtype"))
    if name is None:
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"config.json: dtype={name!r} is not a dtype of torch")
    return dtype
