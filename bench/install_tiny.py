"""Puts a trained model into the package as jv5-tiny, with what its card says about the run.

python bench/install_tiny.py RUN/model RUN/log.json --command "jv5kernels train packages.jsonl.xz RUN --seconds 185"

RUN is the folder of `jv5kernels train`. The model is opened and checked before anything is replaced; the card keeps its
text, and its tables are written from bench/results/. --note says in the card what the command does not.
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


def install(model: Path, log: Path, command: str, target: Path, note: str = "") -> list[dict]:
    """Replaces the files in `target` but its card, and returns what the card says about the run."""
    checkpoint = checked(model)
    logged = json.loads(log.read_text("utf-8"))
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
            "note": note,
            "parameters": sum(math.prod(s) for s in checkpoint.spec.tensor_shapes().values()),
            "bytes": sum((target / name).stat().st_size for name in FILES),
            "seconds": max(logged["seconds"][task] for task in TASKS),
            "recipe": logged["recipe"],
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the trained model")
    parser.add_argument("log", type=Path, metavar="LOG", help="log.json of its run")
    parser.add_argument("--command", required=True, help="the command that trained it")
    parser.add_argument("--note", default="", help="a sentence or two on how the run differed")
    options = parser.parse_args()
    about = install(options.model, options.log, options.command, packaged_folder(), options.note)
    print(write_records("tiny_recipe", about))
    table.write()


if __name__ == "__main__":
    main()
