"""The tensors of a checkpoint folder: which there are, from the safetensors headers alone, and their values."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "StoredTensor",
    "backbone_tensors",
    "check_shapes",
    "list_tensors",
    "load_tensors",
    "read_header",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
# Names in an error message before it is cut short.
SHOWN = 5


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its header says."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of one safetensors file without reading values.

    Raises:
        ValueError: the file is not in safetensors format.
    """
    try:
        with safe_open(str(file), framework="pt") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}
            return {
                name: StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a readable safetensors file (a Git LFS pointer, or cut short?): {error}"
        ) from error


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns stored name -> tensor of model.safetensors, or of all shards that its index names.

    Raises:
        FileNotFoundError: no safetensors weights, or a shard is missing.
        ValueError: a shard lacks a tensor that the index places there.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = f"; {pickled[0]} is not read, because unpickling can run code" if pickled else ""
        raise FileNotFoundError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards = sorted(set(placed.values()))
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {_some(absent)}, named by {INDEX_FILE}")
    found: dict[str, StoredTensor] = {}
    for shard in shards:
        found.update(read_header(folder / shard))
    misplaced = [
        name
        for name, shard in placed.items()
        if name not in found or found[name].file.name != shard
    ]
    if misplaced:
        raise ValueError(f"{index}: not in the shard it names: {_some(misplaced)}")
    return found


def backbone_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns canonical name -> tensor: without a "model." prefix, a language head or old rotary buffers.

    Raises:
        ValueError: two tensors have the same canonical name.
    """
    has_prefix = any(name.startswith("model.") for name in stored)
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        is_head = has_prefix and name == "lm_head.weight"
        if is_head or name.endswith("rotary_emb.inv_freq"):
            continue
        canonical = name.removeprefix("model.")
        if canonical in found:
            raise ValueError(f"{tensor.file}: both {canonical} and model.{canonical} are stored")
        found[canonical] = tensor
    return found


def check_shapes(
    tensors: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Raises ValueError naming the tensors that are missing, unexpected, of another shape or not floating point."""
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"{source}: missing tensors: {_some(missing)}")
    if unexpected := [tensor.name for name, tensor in tensors.items() if name not in expected]:
        raise ValueError(f"{source}: unexpected tensors: {_some(unexpected)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{source}: {name} has shape {tensors[name].shape}, config.json asks for {shape}"
            )
        if tensors[name].dtype not in FLOATS:
            raise ValueError(
                f"{source}: {name} is stored as {tensors[name].dtype}; supported are {', '.join(FLOATS)}"
            )


def load_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Returns the values on the CPU, in their stored dtype; pages are read from the files when they are touched."""
    loaded: dict[str, Tensor] = {}
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        with safe_open(str(file), framework="pt") as stored:
            for name, tensor in tensors.items():
                if tensor.file == file:
                    loaded[name] = stored.get_tensor(tensor.name)
    return {name: loaded[name] for name in tensors}


def _some(names: Iterable[str] | Collection[str]) -> str:
    names = list(names)
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
