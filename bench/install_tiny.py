"""Puts a trained model into the package as jv5-tiny, with what its card says about the run.

python bench/install_tiny.py RUN --command "jv5kernels train packages.jsonl.xz RUN --seconds 185"

RUN is the folder of `jv5kernels train`. The model is opened and checked before anything is replaced; the card keeps its
text, and its tables are written from bench/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import table
import torch
from harness import write_records

from jv5kernels.checkpoint import Checkpoint, open_checkpoint
from jv5kernels.packaged import packaged_folder
from jv5kernels.synthetic.layout import TASKS

CARD = "README.md"
FILES = (
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *(f"adapters/{task}/adapter_config.json" for task in TASKS),
    *(f"adapters/{task}/adapter_model.safetensors" for task in TASKS),
)
MOST_BYTES = 16 * 2**20


def checked(model: Path) -> Checkpoint:
    """Opens a model that may become jv5-tiny.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or the model is not of the kind that its card describes.
    """
    checkpoint = open_checkpoint(model)
    for name in FILES:
        if not (model / name).is_file():
            raise FileNotFoundError(f"{model / name} is missing")
    if set(checkpoint.tasks) != set(TASKS):
        raise ValueError(f"{model} has the tasks {list(checkpoint.tasks)}, not {list(TASKS)}")
    weights = checkpoint.weights()
    if wrong := {str(t.dtype) for t in weights.values()} - {str(torch.bfloat16)}:
        raise ValueError(f"{model} holds weights of {', '.join(sorted(wrong))}, not of bfloat16")
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{model}: {bad[0]} is not finite")
    size = sum((model / name).stat().st_size for name in FILES)
    if size > MOST_BYTES:
        raise ValueError(f"{model} has {size:,} bytes of files, at most {MOST_BYTES:,} are shipped")
    return checkpoint


def install(run: Path, command: str, target: Path) -> list[dict]:
    """Replaces the files in `target` but its card, and returns what the card says about the run."""
    model = run / "model"
    checkpoint = checked(model)
    log = json.loads((run / "log.json").read_text("utf-8"))
    for old in sorted(target.rglob("*"), reverse=True):
        if old.is_dir():
            old.rmdir()
        elif old != target / CARD:
            old.unlink()
    for name in FILES:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / name, target / name)  # without its mode: readable by all
    return [
        {
            "command": command,
            "parameters": sum(math.prod(s) for s in checkpoint.spec.tensor_shapes().values()),
            "bytes": sum((target / name).stat().st_size for name in FILES),
            "seconds": max(log["seconds"][task] for task in TASKS),
            "recipe": log["recipe"],
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished training run")
    parser.add_argument("--command", required=True, help="the command that trained it")
    options = parser.parse_args()
    print(write_records("tiny_recipe", install(options.run, options.command, packaged_folder())))
    table.write()


if __name__ == "__main__":
    main()
