"""Writes the tables of README.md and of jv5-tiny's model card from bench/results/*.json, between marker comments.

python bench/table.py            rewrite both
python bench/table.py --check    exit code 1 when one of them does not say what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_tables
from harness import RESULTS

ROOT = RESULTS.parent.parent
README = ROOT / "README.md"
CARD = ROOT / "jv5kernels/models/jv5-tiny/README.md"


def records(name: str) -> list[dict[str, Any]]:
    """The records of one bench command, none when it has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def number(value: float) -> str:
    """Three significant digits or whole thousands."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def source(found: list[dict[str, Any]]) -> str:
    """Where and with what the records were measured, as a line under a table."""
    keys = ("device", "torch", "triton", "commit", "date")
    seen = sorted({tuple(r[key] for key in keys) for r in found})
    lines = [f"{d}, torch {t}, Triton {tr}, commit {c}, {day}" for d, t, tr, c, day in seen]
    return "\n\n" + "; ".join(lines) + "."


def speed_table() -> str:
    """Whole models against their peers."""
    everything = [r for name in ("corpus", "corpus-cpu", "backbone") for r in records(name)]
    found = [r for r in everything if r["metric"] in ("ms", "tokens_per_s")]
    rows = ["| work | jv5kernels | peer | | ratio |", "|---|---|---|---|---|"]
    for r in found:
        unit = "tokens/s" if r["metric"] == "tokens_per_s" else r["unit"]
        mine, theirs = (f"{number(r[key])} {unit}" for key in ("value", "peer_value"))
        rows.append(f"| {r['work']} | {mine} | {r['peer']} | {theirs} | **{r['ratio']:.2f}x** |")
    return "\n".join(rows) + source(found)


def attention_table() -> str:
    """The attention kernel against torch's, TFLOP/s by length."""
    found = [r for r in records("attention") if r["impl"] == "ours (gluon)"]
    rows = ["| work | jv5kernels | peer | | ratio |", "|---|---|---|---|---|"]
    for r in found:
        mine, theirs = f"{r['value']:.3f} ms", f"{r['peer_value']:.3f} ms"
        rate = f"{r['TFLOP_per_s']:.0f} TFLOP/s"
        rows.append(
            f"| {r['work']} | {mine}, {rate} | {r['peer']} | {theirs} | **{r['ratio']:.2f}x** |"
        )
    return "\n".join(rows) + source(found)


def parity_table() -> str:
    """Cosine to fp32 Transformers, and the error beside that of Transformers' own run in the same dtype."""
    found = [r for name in ("parity", "parity-cpu") for r in records(name)]
    rows = [
        "| texts | lowest cosine to fp32 | error | Transformers' own error in that dtype |",
        "|---|---|---|---|",
    ]
    for r in found:
        theirs = "" if r["peer_error_rms"] is None else f"{r['peer_error_rms']:.2e}"
        rows.append(f"| {r['work']} | {r['value']:.7f} | {r['error_rms']:.2e} | {theirs} |")
    return "\n".join(rows) + source(found)


def memory_table() -> str:
    """Peak memory beyond the weights."""
    found = [r for r in records("backbone") if r["metric"] == "peak_bytes_over_weights"]
    rows = ["| work | jv5kernels | Transformers |", "|---|---|---|"]
    rows += [
        f"| {r['work']} | {r['value'] / 1e9:.2f} GB | {r['peer_value'] / 1e9:.2f} GB |"
        for r in found
    ]
    return "\n".join(rows) + source(found)


def invariance_table() -> str:
    """What batch invariance costs, and what is guaranteed with and without it."""
    found = records("invariance")
    rows = ["| work | `batch_invariant=True` | default | cost |", "|---|---|---|---|"]
    for r in found:
        if r["metric"] == "ms":
            rows.append(
                f"| {r['work']} | {number(r['value'])} ms | {number(r['peer_value'])} ms | {r['cost_percent']:.0f} % |"
            )
    rows.append("")
    for r in found:
        if r["metric"] == "cosine_min":
            changed = f"{r['changed']} of {r['texts']} changed a bit"
            rows.append(f"* {r['work']}, {r['impl']}: {changed}, lowest cosine {r['value']:.7f}")
    return "\n".join(rows) + source(found)


def latency_table() -> str:
    """One short query, and the first one of a process."""
    queries, starts = records("query"), records("cold_start")
    rows = ["| work | jv5kernels | against | | ratio |", "|---|---|---|---|---|"]
    for r in queries:
        mine, theirs = f"{number(r['value'])} ms", f"{number(r['peer_value'])} ms"
        rows.append(f"| {r['work']} | {mine} | {r['peer']} | {theirs} | **{r['ratio']:.2f}x** |")
    for r in starts:
        loading = f"{number(r['steps']['load'])} s"
        rows.append(f"| {r['work']} | {number(r['value'])} s | loading the weights | {loading} | |")
    found = queries + starts
    return (
        "\n".join(rows) + source(found)
        if found
        else "Figures: `python bench/bench_query.py` on a GPU."
    )


def busy_table() -> str:
    """In how much of a corpus run the GPU works, by the kernels' own time stamps."""
    found = [r for r in records("corpus") if "gpu_busy_share" in r]
    rows = ["| work | the GPU works | before its first kernel |", "|---|---|---|"]
    for r in found:
        lead = f"{1e3 * r['gpu_idle_first_s']:.0f} ms"
        rows.append(f"| {r['work']} | {100 * r['gpu_busy_share']:.1f} % of the time | {lead} |")
    return "\n".join(rows) + source(found)


def profiles_table() -> str:
    """What every storage profile gives: dtype and order of bits, by precision."""
    from jv5kernels.storage import PROFILES

    rows = ["| `profile=` | floats | `int8` | `binary` |", "|---|---|---|---|"]
    for name, profile in PROFILES.items():
        floats = [p for p in ("float32", "float16", "bfloat16") if p in profile.layouts]
        rows.append(
            f"| `{name}` | {', '.join(floats)} | {described(profile, 'int8')} | {described(profile, 'binary')} |"
        )
    return "\n".join(rows)


def described(profile: Any, precision: str) -> str:
    """One cell: dtype, what is particular about it, and the store's field and metric."""
    layout = profile.layouts.get(precision)
    if layout is None:
        return "–"
    notes = []
    if precision == "int8":
        notes.append("code" if layout.native == "uint8" else "code − 128")
        notes += ["one range"] if layout.compares_codes else []
    else:
        notes.append("LSB first" if layout.little else "MSB first")
        notes += ["minus 128"] if layout.native == "binary" else []
    return f"{layout.dtype}, {', '.join(notes)}; `{layout.field}`, `{layout.metric}`"


def search_table() -> str:
    """Recall of the worked examples."""
    found = [r for name in ("search", "search-cpu") for r in records(name)]
    rows = [
        "| work | kept | bytes a vector | recall@10 | Hamming distance alone |",
        "|---|---|---|---|---|",
    ]
    for r in found:
        sizes = f"{r['bytes_per_vector']} of {r['float32_bytes']}"
        rows.append(
            f"| {r['work']} | {r['impl']} | {sizes} | **{r['value']:.2f}** | {r['peer_value']:.2f} |"
        )
    return "\n".join(rows) + source(found)


def output_table() -> str:
    """The output stage and quantisation against their ceilings and peers."""
    names = ("embed_output", "embed_output-cpu", "quantize", "quantize-cpu")
    everything = [r for name in names for r in records(name)]
    found = [r for r in everything if r["metric"] == "ms" and r["impl"] != r["peer"]]
    rows = ["| work | jv5kernels | against | | ratio |", "|---|---|---|---|---|"]
    for r in found:
        mine, theirs = (milliseconds(r[key]) for key in ("value", "peer_value"))
        rows.append(f"| {r['work']} | {mine} | {r['peer']} | {theirs} | **{r['ratio']:.2f}x** |")
    return "\n".join(rows) + source(found)


def milliseconds(value: float) -> str:
    return f"{number(value)} ms" if value >= 0.1 else f"{number(1e3 * value)} µs"


TABLES = {
    "output": output_table,
    "speed": speed_table,
    "attention": attention_table,
    "latency": latency_table,
    "busy": busy_table,
    "parity": parity_table,
    "memory": memory_table,
    "invariance": invariance_table,
    "profiles": profiles_table,
    "search": search_table,
    "tiny": lambda: tiny_tables.summary(records("tiny")),
}
CARD_TABLES = {
    "recipe": lambda: tiny_tables.recipe(records("tiny_recipe")),
    "scores": lambda: tiny_tables.scores(records("tiny"), source),
}
PAGES: dict[Path, dict[str, Callable[[], str]]] = {README: TABLES, CARD: CARD_TABLES}


def filled(text: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """A page's text with every marked table made anew."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        content = table().replace("\\", r"\\") + "\n"
        text, count = re.subn(pattern, rf"\g<1>{content}\g<2>", text, flags=re.S)
        assert count == 1, f"the page must hold the markers of the table {name!r} once"
    return text


def write(check: bool = False) -> list[str]:
    """Fills every page, or with `check` only looks; returns the pages that differed."""
    differing = []
    for page, tables in PAGES.items():
        text = page.read_text("utf-8")
        new = filled(text, tables)
        if new != text:
            differing.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, "utf-8")
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    differing = write(check)
    if check and differing:
        sys.exit(f"{', '.join(differing)} differ from bench/results: run python bench/table.py")


if __name__ == "__main__":
    main()
