"""Small changes to the files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes a key."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the dict of tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
