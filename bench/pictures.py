"""Draws bench/results/*.json: throughput by length against the peers, and the share of the roofline.

python bench/pictures.py [--out FOLDER]       (default: beside the results)
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from harness import RESULTS
from table import records

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - the backend comes first

FAMILIES = ("small", "nano")
# Dense bf16 peak of an H200; matmuls reach about 700 of it.
PEAK_TFLOPS = {"NVIDIA H200": 989.0, "NVIDIA H100 80GB HBM3": 989.0}
OURS, PORTABLE, PEERS = "#0b6e4f", "#74c69d", ("#8d99ae", "#e09f3e", "#5f0f40", "#577590")
MEMORY_BOUND = ("rms_norm", "qk_norm_rope", "swiglu", "embed_output", "pool")

Series = dict[str, list[tuple[int, float]]]


def length_of(work: str) -> int | None:
    """S of "... 64x512 ..."."""
    found = re.search(r"\b\d+x(\d+)\b", work)
    return int(found[1]) if found else None


def backbone_series(family: str) -> Series:
    """Tokens a second by length."""
    series: Series = {}
    for r in records("backbone"):
        length = length_of(r["work"])
        if length is None or r["metric"] != "ms" or not r["work"].startswith(family):
            continue
        tokens = r["tokens_per_s"] * r["value"]
        points = {r["impl"]: r["value"], r["peer"]: r["peer_value"]}
        for name, value in points.items():
            point = (length, tokens / value)
            if point not in series.setdefault(name, []):
                series[name].append(point)
    return series


def attention_series(family: str) -> Series:
    """TFLOP/s of the attention kernel by length."""
    series: Series = {}
    for r in records("attention"):
        length = length_of(r["work"])
        if length is not None and r["work"].startswith(f"attention {family}"):
            series.setdefault(r["impl"], []).append((length, r["TFLOP_per_s"]))
    return series


def is_ours(name: str) -> bool:
    return name.startswith(("ours", "jv5kernels"))


def draw_series(axes: Any, series: Series, title: str, unit: str, scale: float) -> None:
    """One line a name over length; ours in front."""
    peers = [name for name in series if not is_ours(name)]
    for name, points in series.items():
        x, y = zip(*sorted(points), strict=True)
        ours = is_ours(name)
        color = PEERS[peers.index(name) % len(PEERS)] if not ours else OURS
        if name == "ours (triton)" and len(series) > len(peers) + 1:
            color = PORTABLE
        axes.plot(
            x,
            [value / scale for value in y],
            marker="o" if len(x) > 1 else "D",
            linestyle="-" if len(x) > 1 else "none",
            linewidth=2.4 if ours else 1.5,
            color=color,
            zorder=3 if ours else 2,
            label=name,
        )
    axes.set_xscale("log", base=2)
    lengths = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("tokens a text (32768 tokens a batch)")
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def source(names: Sequence[str]) -> str:
    """Where the drawn records come from."""
    commits: dict[str, set[str]] = {}
    for r in (r for name in names for r in records(name)):
        commits.setdefault(f"{r['device']}, torch {r['torch']}", set()).add(r["commit"])
    return "; ".join(f"{where}, commit {', '.join(sorted(c))}" for where, c in commits.items())


def throughput(path: Path) -> None:
    """Backbones above, attention below."""
    rows: list[tuple[Callable[[str], Series], str, str, float]] = [
        (backbone_series, "whole backbone", "thousand tokens/s", 1e3),
        (attention_series, "attention", "TFLOP/s", 1.0),
    ]
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axes_row, (series_of, title, unit, scale) in zip(grid, rows, strict=True):
        for axes, family in zip(axes_row, FAMILIES, strict=True):
            draw_series(axes, series_of(family), f"{family}, {title}, bf16", unit, scale)
    save(figure, path, ("backbone", "attention"))


def roofline_shares() -> list[tuple[str, float, str]]:
    """(kernel, share, of what): a copy's speed in the same run, of as many bytes where timed; the matrix peak."""
    shares = []
    for name in MEMORY_BOUND:
        found = records(name)
        copy = next((r["GB_per_s"] for r in found if r["work"] == "copy"), None)
        for r in found:
            if copy and is_ours(r["impl"]) and "32768" in r["work"]:
                share = r.get("share_of_copy", r["GB_per_s"] / copy)
                shares.append((r["work"], share, "of a copy's bandwidth"))
    seen = set()
    for r in records("attention"):
        peak = PEAK_TFLOPS.get(r["device"])
        if peak and is_ours(r["impl"]) and length_of(r["work"]) and r["work"] not in seen:
            # The first of ours is the one that runs on this device.
            seen.add(r["work"])
            shares.append((r["work"], r["TFLOP_per_s"] / peak, "of the bf16 matrix peak"))
    return shares


def roofline(path: Path) -> None:
    shares = roofline_shares()[::-1]
    if not shares:
        raise SystemExit("no records of CUDA kernels: run the benches on a GPU first")
    height = 1.2 + 0.3 * len(shares)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    colors = {"of a copy's bandwidth": OURS, "of the bf16 matrix peak": PEERS[3]}
    for kind, color in colors.items():
        rows = [(i, share) for i, (_, share, of) in enumerate(shares) if of == kind]
        axes.barh(
            [i for i, _ in rows], [100 * s for _, s in rows], color=color, height=0.7, label=kind
        )
    for i, (_, share, _) in enumerate(shares):
        axes.text(100 * share + 1, i, f"{100 * share:.0f} %", va="center", fontsize=8)
    labels = [work.replace(" bfloat16", "") for work, _, _ in shares]
    axes.set_yticks(range(len(shares)), labels, fontsize=8)
    axes.set_xlim(0, 110)
    axes.margins(y=0.01)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("%")
    axes.set_title("share of the roofline", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path, (*MEMORY_BOUND, "attention"))


def save(figure: Any, path: Path, names: Sequence[str]) -> None:
    figure.supxlabel(source(names), fontsize=7, color="#666666")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    throughput(folder / "throughput.png")
    roofline(folder / "roofline.png")


if __name__ == "__main__":
    main()
