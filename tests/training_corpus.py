"""A corpus of made-up packages and a teacher of random weights, for the tests of training."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jv5kernels.synthetic.tokenizer import train_tokenizer
from jv5kernels.training.corpus import Package, read_packages

THINGS = "editor compiler browser player driver parser daemon viewer calculator scheduler".split()
USES = "music video text image network archive database terminal keyboard printer".split()


def rows(count: int = 80) -> list[dict]:
    """Packages of two to a source, five sections; every other one has German texts."""
    made = []
    for i in range(count):
        thing, use = THINGS[i % 10], USES[(i // 10) % 10]
        synopsis = {"en": f"{thing} for {use} files number {i}"}
        description = {
            "en": f"A small {thing} that handles {use} in many ways and more than {i}.\n"
            f"It was written for {use} and is known as the {thing} of the house, part {i}."
        }
        if i % 2:
            synopsis["de"] = f"{thing} für {use}, Nummer {i}"
            description["de"] = f"Ein kleiner {thing}, der {use} auf viele Arten kennt, Teil {i}."
        made.append(
            {
                "package": f"p{i}",
                "source": f"s{i // 2}",
                "section": f"main/section{i % 5}",
                "split": "test" if i % 10 > 7 else "train",
                "synopsis": synopsis,
                "description": description,
            }
        )
    return made


def write_corpus(path: Path, count: int = 80) -> Path:
    """Writes the rows as JSON lines, compressed with xz."""
    with lzma.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(count))
    return path


def packages(tmp_path: Path, count: int = 80) -> list[Package]:
    return read_packages(write_corpus(tmp_path / "corpus.jsonl.xz", count))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def write_teacher(folder: Path) -> Path:
    """Writes a teacher: a BERT layer of width 32 over letters, which Sentence Transformers pools by the mean."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    return folder


def letters_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: what is one text is as long as its bytes."""
    return train_tokenizer("small", ["abc"], vocab_size=300)


def chapter_rows() -> list[dict]:
    """Documentation: chapters of three sections in English, one of them in German too, one of them held out."""
    made = []
    for number in range(4):
        sections = [
            [
                f"The {THINGS[number]} and its {use} part",
                f"A {THINGS[number]} that handles {use} does it line by line. " * 4,
            ]
            for use in USES[3 * number % 9 :][:3]
        ]
        row = {"source": f"guide{number}", "chapter": "a.html", "language": "en"}
        made.append({**row, "split": "test" if number > 1 else "train", "sections": sections})
    return [*made, {**made[0], "language": "de"}]


def write_documentation(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in chapter_rows()), "utf-8")
    return path
