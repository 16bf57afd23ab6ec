"""The first five minutes: encode real text, search it, compare with Transformers, and see what small vectors cost.

Everything is measured while it is shown. Without ``--model`` it is jv5-tiny, which comes with the package; without
inputs the texts are docstrings and help topics of Python's standard library, which are on every machine.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jv5kernels.comparison.stdlib_texts import Document, standard_library_texts
from jv5kernels.packaged import packaged_folder

if TYPE_CHECKING:
    from jv5kernels.commands.quickbench import Comparison
    from jv5kernels.encoder import FastEncoder
    from jv5kernels.retention import Point

__all__ = ["QUERIES", "TASK", "Demo", "documents_for", "render", "run"]

QUERIES = (
    "compress files into an archive",
    "send an e-mail message",
    "how do I wait for several threads to finish?",
)
TASK = "retrieval"
# What a CPU does in a few seconds: multiply-adds of all linear layers over all texts; and, for the demo, over those
# that Transformers encodes too.
CPU_MULTIPLY_ADDS, CPU_COMPARED_MULTIPLY_ADDS = 3e11, 2.5e10
# Of these Transformers takes the better one; large ones are mostly padding on a CPU.
PEER_BATCH_SIZES = {"cpu": (4, 16), "cuda": (8, 32)}
# Texts that are compared on a GPU, where a few are no measurement and Transformers' fp32 run of all takes long.
PARITY_TEXTS = 64
NEIGHBOURS = 3
NEXT = """\
Your own texts, a text a line:  jv5kernels demo FILE... --query "..."   (- is standard input)
The models of the hub:          jv5kernels demo --model jinaai/jina-embeddings-v5-text-nano
Files to embeddings:            jv5kernels encode --help"""


@dataclass(frozen=True)
class Demo:
    """Everything the demo shows.

    Args:
        parity: lowest cosine to Transformers in fp32, over `parity_texts` texts.
        answers: for each query the nearest documents with their cosines.
        kept: what the smaller forms keep of the float32 neighbours; () with too few texts.
    """

    model: str
    description: str
    corpus: str
    comparison: Comparison
    parity: float
    parity_texts: int
    parity_threshold: float
    answers: tuple[tuple[str, tuple[tuple[float, Document], ...]], ...]
    kept: tuple[Point, ...]

    @property
    def agrees(self) -> bool:
        """Whether the embeddings are those of Transformers, in fp32 and in the dtype that was timed."""
        return self.comparison.agrees and self.parity >= self.parity_threshold


def documents_for(
    encoder: FastEncoder, documents: Sequence[Document], multiply_adds: float = CPU_MULTIPLY_ADDS
) -> list[Document]:
    """All documents on a GPU; on a CPU an even selection that takes so many multiply-adds at most."""
    if encoder.device.type != "cpu":
        return list(documents)
    spec = encoder.spec
    attention = spec.hidden_size * (spec.qkv_width + spec.q_width)
    weights = spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)
    lengths = [len(ids) for ids in encoder.tokenize([document.text for document in documents])]
    step = max(1, -(-sum(lengths) // max(1, int(multiply_adds / weights))))
    return list(documents)[::step]


def run(
    model: str | Path | None = None,
    *,
    inputs: Sequence[str] = (),
    reading: dict[str, Any] | None = None,
    queries: Sequence[str] = (),
    repeats: int = 2,
    encoder_options: dict[str, Any] | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Demo:
    """Runs the demo.

    Args:
        model: "jv5-tiny", hub id or folder; default jv5-tiny.
        inputs: files of texts, or "-"; default docstrings and help topics of Python's standard library.
        reading: keyword arguments of Corpus.
        queries: texts to search with; default three questions for the default texts, or the first input text.
        repeats: timed runs of each contender.
        encoder_options: keyword arguments of FastEncoder.
        tell: is told what happens next.

    Raises:
        FileNotFoundError: an input is not there.
        ValueError: the inputs hold no text.
    """
    available = _read(inputs, reading or {}) if inputs else standard_library_texts()
    tell("loading torch")
    from jv5kernels.commands.quickbench import compare
    from jv5kernels.encoder import FastEncoder

    tell("opening the model")
    encoder = FastEncoder(
        model if model is not None else packaged_folder(), **dict(encoder_options or {})
    )
    if encoder.task is None and encoder.tasks:
        encoder.task = TASK if TASK in encoder.tasks else encoder.tasks[0]
    documents = documents_for(encoder, available)
    tell(f"encoding {len(documents)} texts")
    vectors = encoder.encode_document([document.text for document in documents])
    prompt = encoder.prompts.get("document", "")
    chosen = documents_for(encoder, documents, CPU_COMPARED_MULTIPLY_ADDS)
    texts = [prompt + document.text for document in chosen]
    tell(f"encoding {len(texts)} texts with jv5kernels and with Transformers, {repeats} times each")
    comparison = compare(
        encoder,
        texts,
        batch_sizes=PEER_BATCH_SIZES[encoder.device.type],
        repeats=repeats,
        sentence_transformers=False,
    )
    tell("comparing with Transformers in fp32")
    parity, count, threshold = _parity(encoder, texts, comparison)
    tell("searching")
    wanted = tuple(queries) or (QUERIES if not inputs else (documents[0].text,))
    return Demo(
        model=str(encoder.checkpoint.source),
        description=_description(encoder),
        corpus=_corpus(inputs, documents, available),
        comparison=comparison,
        parity=parity,
        parity_texts=count,
        parity_threshold=threshold,
        answers=tuple((query, _nearest(encoder, query, documents, vectors)) for query in wanted),
        kept=_kept(encoder, vectors),
    )


def _read(inputs: Sequence[str], reading: dict[str, Any]) -> list[Document]:
    from jv5kernels.commands.files import Corpus

    documents = [
        Document(str(record.id), record.text)
        for record in Corpus(inputs, **reading)
        if record.text.strip()
    ]
    if not documents:
        raise ValueError(f"{', '.join(inputs)}: there is no text")
    return documents


def _parity(
    encoder: FastEncoder, texts: Sequence[str], comparison: Comparison
) -> tuple[float, int, float]:
    """Lowest cosine to Transformers in fp32, over how many texts, and what it should reach."""
    import torch

    from jv5kernels.verify import COSINE

    threshold = COSINE[encoder.dtype]
    if encoder.dtype == torch.float32:
        worst = min(result.cosine_min for result in comparison.results)
        return worst, len(texts), threshold
    from jv5kernels.checkpoint import Checkpoint
    from jv5kernels.comparison.reference import load_reference, reference_embeddings

    checkpoint = encoder.checkpoint
    assert isinstance(checkpoint, Checkpoint)  # the command line opens no live models
    rows = np.linspace(0, len(texts) - 1, min(PARITY_TEXTS, len(texts))).astype(int)
    reference = load_reference(checkpoint, encoder.task, device=encoder.device)
    exact = reference_embeddings(
        reference, checkpoint, [texts[row] for row in rows], pooling=encoder.pooling
    )
    ours = comparison.embeddings[rows].astype(np.float64)
    return float((ours * exact).sum(1).min()), len(rows), threshold


def _nearest(
    encoder: FastEncoder, query: str, documents: Sequence[Document], vectors: np.ndarray
) -> tuple[tuple[float, Document], ...]:
    scores = vectors @ encoder.encode_query(query)
    best = np.argsort(-scores, kind="stable")[:NEIGHBOURS]
    return tuple((float(scores[i]), documents[i]) for i in best)


def _kept(encoder: FastEncoder, vectors: np.ndarray) -> tuple[Point, ...]:
    """What the smaller forms keep of every text's neighbours, at the full and at one truncated dimension."""
    from jv5kernels.retention import TOP, measure

    if len(vectors) <= TOP:
        return ()
    width = vectors.shape[1]
    dims = encoder.checkpoint.matryoshka_dims
    cut = max((dim for dim in dims if dim <= width // 2), default=width // 2)
    forms = ("float32", False), ("int8", True), ("binary", True), ("binary", False)
    measured = measure(vectors, vectors, (width, cut), same=True)
    points = {(point.dim, (point.precision, point.rescored)): point for point in measured}
    return tuple(points[dim, form] for dim in (width, cut) for form in forms)


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
    inputs: Sequence[str], documents: Sequence[Document], available: Sequence[Document]
) -> str:
    what = (
        f"texts of {', '.join('standard input' if name == '-' else name for name in inputs)}"
        if inputs
        else "docstrings and help topics of Python's standard library"
    )
    selected = "" if len(documents) == len(available) else f" of {len(available)}"
    return f"{len(documents)}{selected} {what}"


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
    head.add_row("Texts", Text(demo.corpus))
    verdict = ("agrees", "green") if demo.agrees else ("DISAGREES", "bold red")
    head.add_row(
        "Parity",
        Text.assemble(
            f"cosine to Transformers in fp32 ≥ {quickbench.shown(demo.parity)} over "
            f"{demo.parity_texts} texts: ",
            verdict,
        ),
    )
    parts: list[Any] = [Text(""), head]
    for query, found in demo.answers:
        parts += [Text(""), *_rendered_answer(query, found)]
    if demo.agrees:
        compared = f"{demo.comparison.texts} texts, {demo.comparison.tokens:,} tokens"
        parts += [Text(""), Text(f"Speed on {compared}", "bold")]
        parts.append(quickbench.render(demo.comparison))
    if demo.kept:
        parts += [Text(""), Text("What smaller vectors keep of every text's ten nearest", "bold")]
        parts.append(_rendered_kept(demo.kept))
    return Group(*parts, Text(""), Text(NEXT, style="dim"))


def _rendered_answer(query: str, found: Sequence[tuple[float, Document]]) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", style="cyan", no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for score, document in found:
        start = textwrap.shorten(document.text, 80, placeholder=" …")
        table.add_row(f"{score:.3f}", Text(document.name), Text(start))
    shown = textwrap.shorten(query, 80, placeholder=" …")
    return [Text.assemble(("Nearest to ", "bold"), (repr(shown), "bold cyan")), table]


def _rendered_kept(points: Sequence[Point]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("dimensions", "bytes", "same ten", "nDCG@10"):
        table.add_column(name, justify="right")
    for point in points:
        rescored = "" if point.precision == "float32" or not point.rescored else ", rescored"
        table.add_row(
            f"{point.precision}{rescored}",
            str(point.dim),
            f"{point.bytes:,}",
            f"{100 * point.overlap:.1f} %",
            f"{100 * point.ndcg:.1f} %",
        )
    return table
