"""The first five minutes: encode real text, compare with Transformers, find neighbours.

Without ``--model`` the demo writes a small checkpoint of the real layout (base, four adapters, a
tokenizer trained on the spot) with random weights, once, into the user's cache folder. It shows that
everything runs, exactly and fast; its neighbours carry no meaning, and the demo says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jv5kernels import __version__
from jv5kernels.comparison.stdlib_texts import Document, standard_library_texts

if TYPE_CHECKING:
    from jv5kernels.commands.quickbench import Comparison
    from jv5kernels.encoder import FastEncoder

__all__ = ["Demo", "demo_checkpoint", "documents_for", "run", "render"]

QUERY = "read the lines of a text file one by one"
TASK = "retrieval"
# Small's layout at a quarter of its width and a seventh of its depth.
GEOMETRY = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
}
# What a CPU does in a few seconds: multiply-adds of all linear layers, over all texts.
CPU_MULTIPLY_ADDS = 3e11
NEIGHBOURS = 5
NEXT = """\
With trained weights from the hub:  jv5kernels demo --model jinaai/jina-embeddings-v5-text-nano
Files of texts to embeddings:       jv5kernels encode --help"""


@dataclass(frozen=True)
class Demo:
    """Everything the demo shows."""

    model: str
    random_weights: bool
    description: str
    corpus: str
    comparison: Comparison
    query: str
    neighbours: tuple[tuple[float, Document], ...]


def cache_folder() -> Path:
    """Where the demo keeps its checkpoint: ``$XDG_CACHE_HOME/jv5kernels`` or ``~/.cache/jv5kernels``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "jv5kernels"


def demo_checkpoint(cache: Path | None = None) -> Path:
    """Returns the folder of the demo's checkpoint, written on first use.

    Args:
        cache: folder to keep it in; default `cache_folder()`.
    """
    from jv5kernels.synthetic.checkpoint import write_checkpoint

    texts = [document.text for document in standard_library_texts()]
    cache = cache or cache_folder()
    recipe = json.dumps([__version__, GEOMETRY, texts])
    folder = cache / f"demo-{hashlib.blake2b(recipe.encode(), digest_size=6).hexdigest()}"
    if not folder.is_dir():
        try:
            write_checkpoint(folder, geometry=GEOMETRY, corpus=texts)
        except OSError:
            if not folder.is_dir():  # else another demo was quicker
                raise
    return folder


def documents_for(encoder: FastEncoder, documents: Sequence[Document]) -> list[Document]:
    """All documents on a GPU; on a CPU an even selection that it encodes in a few seconds."""
    spec = encoder.spec
    if encoder.device.type != "cpu":
        return list(documents)
    attention = spec.hidden_size * (spec.qkv_width + spec.q_width)
    weights = spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)
    budget = CPU_MULTIPLY_ADDS / weights
    lengths = [len(ids) for ids in encoder.tokenize([document.text for document in documents])]
    step = max(1, -(-sum(lengths) // max(1, int(budget))))
    return list(documents)[::step]


def run(
    model: str | None = None,
    *,
    query: str = QUERY,
    text_file: Path | None = None,
    repeats: int = 2,
    encoder_options: dict[str, Any] | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Demo:
    """Runs the demo.

    Args:
        model: hub id or folder; default the demo's own checkpoint.
        query: text whose neighbours are shown.
        text_file: one text a line; default docstrings and help topics of Python's standard library.
        repeats: timed runs of each contender.
        encoder_options: keyword arguments of FastEncoder.
        tell: is told what happens next.
    """
    tell("loading torch")
    from jv5kernels.commands.quickbench import compare
    from jv5kernels.encoder import FastEncoder

    options = dict(encoder_options or {})
    random_weights = model is None
    tell(
        "opening the model" if model else "opening the demo's checkpoint, or making it on first use"
    )
    encoder = FastEncoder(model if model is not None else demo_checkpoint(), **options)
    if encoder.task is None and encoder.tasks:
        encoder.task = TASK if TASK in encoder.tasks else encoder.tasks[0]
    available = _read_texts(text_file) if text_file else standard_library_texts()
    documents = documents_for(encoder, available)
    prompt = encoder.prompts.get("document", "")
    texts = [prompt + document.text for document in documents]
    tell(f"encoding {len(texts)} texts with jv5kernels and with Transformers, {repeats} times each")
    comparison = compare(
        encoder, texts, batch_sizes=(8, 32), repeats=repeats, sentence_transformers=False
    )
    scores = comparison.embeddings @ encoder.encode_query(query)
    best = np.argsort(-scores, kind="stable")[:NEIGHBOURS]
    return Demo(
        model=str(encoder.checkpoint.source),
        random_weights=random_weights,
        description=_description(encoder),
        corpus=_corpus(text_file, documents, available, comparison),
        comparison=comparison,
        query=query,
        neighbours=tuple((float(scores[i]), documents[i]) for i in best),
    )


def _read_texts(path: Path) -> list[Document]:
    from jv5kernels.commands.files import Corpus

    documents = [
        Document(f"{path.name}:{record.id}", record.text)
        for record in Corpus([str(path)])
        if record.text.strip()
    ]
    if not documents:
        raise ValueError(f"{path} has no text")
    return documents


def _description(encoder: FastEncoder) -> str:
    spec = encoder.spec
    parts = [
        f"{spec.model_type}, {spec.num_layers} layers of width {spec.hidden_size}",
        f"adapters {', '.join(encoder.tasks)}" if encoder.tasks else "no adapters",
        f"task {encoder.task}" if encoder.task else "",
        f"{str(encoder.dtype).removeprefix('torch.')} on {encoder.device}",
    ]
    return "; ".join(part for part in parts if part)


def _corpus(
    text_file: Path | None,
    documents: Sequence[Document],
    available: Sequence[Document],
    comparison: Comparison,
) -> str:
    what = (
        f"lines of {text_file}" if text_file else "docstrings and help topics of Python's library"
    )
    selected = "" if len(documents) == len(available) else f" of {len(available)}"
    return f"{len(documents)}{selected} {what}, {comparison.tokens:,} tokens"


def render(demo: Demo) -> Any:
    """The demo's results as something rich can print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from jv5kernels.commands import quickbench

    head = Table(box=None, show_header=False, pad_edge=False)
    head.add_column(style="bold", no_wrap=True)
    head.add_column(overflow="fold")
    head.add_row("Model", Text(demo.model))
    head.add_row("", Text(demo.description, style="dim"))
    if demo.random_weights:
        head.add_row(
            "", Text("Random weights, made here: neighbours carry no meaning.", style="yellow")
        )
    head.add_row("Texts", Text(demo.corpus))
    head.add_row("Parity", _parity(demo.comparison))
    found = Table(box=None, show_header=False, pad_edge=False)
    found.add_column(justify="right", style="cyan", no_wrap=True)
    found.add_column(style="bold", no_wrap=True)
    found.add_column()
    for score, document in demo.neighbours:
        start = textwrap.shorten(document.text, 72, placeholder=" …")
        found.add_row(f"{score:.3f}", Text(document.name), Text(start))
    title = Text.assemble(("Nearest to ", "bold"), (repr(demo.query), "bold cyan"))
    if demo.random_weights:
        title.append("  (random weights: no meaning)", style="yellow")
    speed = quickbench.render(demo.comparison) if demo.comparison.agrees else Text("")
    parts = [Text(""), head, Text(""), speed, Text(""), title, found]
    if demo.random_weights:
        parts += [Text(""), Text(NEXT, style="dim")]
    return Group(*parts)


def _parity(comparison: Comparison) -> Any:
    from rich.text import Text

    from jv5kernels.commands import quickbench

    worst = min(result.cosine_min for result in comparison.results)
    verdict = ("agrees", "green") if comparison.agrees else ("DISAGREES", "bold red")
    return Text.assemble(
        f"cosine to Transformers on the same weights ≥ {quickbench.shown(worst)} for every text: ",
        verdict,
    )
