"""Checkpoints of the real geometry with random weights, for benches that go from text to vectors."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from jv5kernels.synthetic.checkpoint import write_checkpoint
from jv5kernels.synthetic.layout import REAL_GEOMETRY

FAMILIES = ("small", "nano")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--tokenizer and --models."""
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder with small.json and nano.json, the real vocabularies; default ones trained on the spot",
    )
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))


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
