"""What small vectors keep, as a picture and a table: the work of ``jv5kernels report``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jv5kernels.comparison.stdlib_texts import standard_library_texts

if TYPE_CHECKING:
    from jv5kernels.retention import Point

__all__ = ["Report", "draw", "render", "run"]

TASK = "retrieval"
# Queries beyond this number add nothing to a mean but time.
MOST_QUERIES = 1000
COLOURS = {
    "float32": "#4d4d4d",
    "float16": "#9a9a9a",
    "int8": "#0072b2",
    "binary + int8": "#009e73",
    "binary": "#d55e00",
}


@dataclass(frozen=True)
class Report:
    """Everything the report shows."""

    model: str
    task: str | None
    device: str
    documents: int
    queries: int
    oversample: int
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def run(
    model: str | None = None,
    *,
    inputs: Sequence[str] = (),
    queries: str | None = None,
    reading: dict[str, Any] | None = None,
    task: str | None = None,
    dims: Sequence[int] | None = None,
    oversample: int = 4,
    picture: Path | None = None,
    encoder_options: dict[str, Any] | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Report:
    """Encodes a corpus once in float32 and measures every precision at every dimension on it.

    Args:
        model: "jv5-tiny", hub id or folder; default jv5-tiny.
        inputs: files of texts; default docstrings and help topics of Python's standard library.
        queries: file of queries; default the corpus itself, each text looking for its neighbours.
        reading: keyword arguments of Corpus.
        task: adapter; default "retrieval" where there is one.
        dims: dimensions; default the model's and its halves.
        oversample: candidates a hit before rescoring.
        picture: where to draw it; None for no picture.
        encoder_options: keyword arguments of FastEncoder.
        tell: is told what happens next.

    Raises:
        ImportError: a picture is asked for and matplotlib is not installed; before anything is encoded.
        FileNotFoundError: an input, or the picture's folder, is not there.
        ValueError: too few texts, or a dimension out of range.
    """
    if picture is not None:
        _check_picture(picture)
    tell("loading torch")
    from jv5kernels.commands.demo import documents_for
    from jv5kernels.encoder import FastEncoder
    from jv5kernels.packaged import packaged_folder
    from jv5kernels.retention import default_dims, measure

    tell("opening the model")
    encoder = FastEncoder(
        model if model is not None else packaged_folder(), **dict(encoder_options or {})
    )
    if task is None and encoder.tasks:
        task = TASK if TASK in encoder.tasks else encoder.tasks[0]
    if inputs:
        texts = _read(inputs, reading or {})
    else:
        texts = [document.text for document in documents_for(encoder, standard_library_texts())]
    searched = _read([queries], reading or {}) if queries is not None else texts
    searched = searched[:MOST_QUERIES]
    tell(f"encoding {len(texts)} texts and {len(searched)} queries")
    documents = encoder.encode_document(texts, task=task, precision="float32")
    vectors = encoder.encode_query(searched, task=task, precision="float32")
    tell("searching")
    points = measure(
        documents,
        vectors,
        dims if dims is not None else default_dims(documents.shape[1]),
        oversample=oversample,
        same=queries is None,
    )
    report = Report(
        model=str(encoder.checkpoint.source),
        task=task,
        device=str(encoder.device),
        documents=len(texts),
        queries=len(searched),
        oversample=oversample,
        points=tuple(points),
    )
    if picture is not None:
        draw(report, picture)
    return report


def _named(report: Report) -> str:
    """What the model is called in a title."""
    return Path(report.model).name if Path(report.model).is_dir() else report.model


def _check_picture(path: Path) -> None:
    if find_spec("matplotlib") is None:
        raise ImportError("the picture needs matplotlib: pip install 'jv5kernels[report]'")
    if path.suffix != ".png":
        raise ValueError(f"{path}: the picture's name must end in .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")


def _read(inputs: Sequence[str], reading: dict[str, Any]) -> list[str]:
    from jv5kernels.commands.files import Corpus

    texts = [record.text for record in Corpus(inputs, **reading) if record.text.strip()]
    if not texts:
        raise ValueError(f"{', '.join(inputs)}: there is no text")
    return texts


def render(report: Report) -> Any:
    """A table for rich: a row for every precision and dimension."""
    from rich.table import Table

    table = Table(
        title=f"Kept of the float32 ranking by {_named(report)}: {report.documents:,} texts, "
        f"{report.queries:,} queries",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("precision", "dim", "bytes"):
        table.add_column(name, justify="left" if name == "precision" else "right")
    for name in ("top-10 overlap", "rescored", "nDCG@10", "rescored"):
        table.add_column(name, justify="right")
    kept = {(p.precision, p.dim, p.rescored): (p.overlap, p.ndcg) for p in report.points}
    sizes = {(p.precision, p.dim): p.bytes for p in report.points}
    before = None
    for precision, dim in dict.fromkeys((p.precision, p.dim) for p in _by_precision(report)):
        plain, better = (
            kept.get((precision, dim, rescored), (None, None)) for rescored in (False, True)
        )
        table.add_row(
            precision if precision != before else "",
            str(dim),
            f"{sizes[precision, dim]:,}",
            *(_percent(pair[measure]) for measure in (0, 1) for pair in (plain, better)),
        )
        before = precision
    return table


def _by_precision(report: Report) -> list[Point]:
    order = list(COLOURS)
    return sorted(report.points, key=lambda p: (order.index(p.precision), -p.dim))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def draw(report: Report, path: Path) -> None:
    """Draws retention over bytes per vector: two panels, a line for every precision, solid where it is rescored."""
    # The figure is made without pyplot, which would choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (measure, title) in zip(
        panels, (("overlap", "Top-10 overlap"), ("ndcg", "nDCG@10")), strict=True
    ):
        _draw_panel(panel, report, measure)
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
    _draw_legend(figure, panels[0], report)
    figure.suptitle(
        f"What small vectors keep of the float32 ranking\n{_named(report)}: "
        f"{report.documents:,} texts, {report.queries:,} queries",
        fontsize=10.5,
        x=0.01,
        ha="left",
    )
    figure.savefig(path)


def _draw_panel(panel: Any, report: Report, measure: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

    for precision, colour in COLOURS.items():
        for rescored in (False, True):
            points = [
                p for p in report.points if (p.precision, p.rescored) == (precision, rescored)
            ]
            points.sort(key=lambda p: p.bytes)
            if not points:
                continue
            solid = rescored or precision.startswith("float")
            x, y = [p.bytes for p in points], [getattr(p, measure) for p in points]
            panel.plot(
                x,
                y,
                color=colour,
                linestyle="-" if solid else (0, (4, 2)),
                linewidth=1.8,
                marker="o",
                markersize=5.5,
                markerfacecolor=colour if solid else "white",
                zorder=3,
            )
            if solid:
                _label_dims(panel, points, y, colour)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(LogLocator(base=2))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.set_xlabel("bytes per vector")
    panel.grid(color="#e6e6e6", linewidth=0.8, zorder=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.08, y=0.08)


def _label_dims(panel: Any, points: Sequence[Point], y: Sequence[float], colour: str) -> None:
    """The dimension of every point, where a rising curve does not go: above and left, or below and right."""
    below = points[0].precision in ("float32", "binary + int8")
    for point, height in zip(points, y, strict=True):
        panel.annotate(
            str(point.dim),
            (point.bytes, height),
            xytext=(4, -10) if below else (-4, 4),
            textcoords="offset points",
            ha="left" if below else "right",
            fontsize=7.5,
            color=colour,
            zorder=4,
        )


def _draw_legend(figure: Any, panel: Any, report: Report) -> None:
    from matplotlib.lines import Line2D

    measured = {p.precision for p in report.points}
    entries = [
        Line2D([], [], color=colour, marker="o", linewidth=1.8, label=precision)
        for precision, colour in COLOURS.items()
        if precision in measured
    ]
    plain: dict[str, Any] = {"color": "#4d4d4d", "marker": "o", "linewidth": 1.5}
    dashed: dict[str, Any] = {**plain, "linestyle": (0, (4, 2)), "markerfacecolor": "white"}
    entries += [
        Line2D([], [], **plain, label="order by the float32 query"),
        Line2D([], [], **dashed, label="order by comparing codes"),
    ]
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=len(entries),
        frameon=False,
        fontsize=8.5,
        title=f"numbers at the points: dimensions; bits give {report.oversample}x as many candidates",
        title_fontsize=8.5,
        handlelength=2.8,
    )
