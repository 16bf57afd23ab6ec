"""Checkpoints with random weights, of the real geometries and a small one, for benches from text to vectors."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from jv5kernels.synthetic.checkpoint import write_checkpoint
from jv5kernels.synthetic.layout import REAL_GEOMETRY

FAMILIES = ("small", "nano")
# Small's layout at a quarter of its width and a seventh of its depth, for a CPU.
CPU_GEOMETRY = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
}
CPU_NAME = "4 layers of width 256, random weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--tokenizer and --models."""
    add_tokenizer_argument(parser)
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        default=path_from("BENCH_TOKENIZER"),
        help="folder with small.json and nano.json, the real vocabularies; default BENCH_TOKENIZER, or ones trained "
        "on the spot",
    )


def add_corpus_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="FILE",
        default=path_from("BENCH_CORPUS"),
        help="JSONL, plain or gzipped; default BENCH_CORPUS, or the standard library's docstrings",
    )


def path_from(variable: str) -> Path | None:
    """An absolute path from the environment, since benches may run in a folder of their own."""
    return Path(os.environ[variable]).absolute() if variable in os.environ else None


def real_checkpoint(root: Path, family: str, tokenizers: Path | None) -> Path:
    """A merged checkpoint in bf16, drawn on the GPU."""
    return write_checkpoint(
        root / family,
        family=family,
        layout="merged",
        geometry=REAL_GEOMETRY[family],
        dtype=torch.bfloat16,
        tokenizer=None if tokenizers is None else tokenizers / f"{family}.json",
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
