"""The tables about jv5-tiny: its scores and the recipe of its training, for README.md and the model card."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

__all__ = ["recipe", "scores", "summary"]

Record = dict[str, Any]

ENGLISH = "synopsis to description"
FORMS = ("float32", "int8", "binary", "binary, rescored", "binary, rescored with int8")
# "model, 384 dimensions, binary, rescored", as `training.score_card` names what it scores.
FORM = re.compile(r"(?P<who>.+), (?P<dim>\d+) dimensions, (?P<form>.+)")
FOREIGN = re.compile(rf"(?P<language>\w+) {ENGLISH}")
REGULARISER = re.compile(r"regulariser (?P<kind>with|without)-(?P<seed>\d+), (?P<form>.+)")
NO_SCORES = "No scores yet: `python bench/bench_tiny.py` makes them."


def scores(found: list[Record], source: Callable[[list[Record]], str]) -> str:
    """Everything that was scored; what fits no table by its name goes into the last one."""
    if not found:
        return NO_SCORES
    rest = list(found)
    parts = [
        make(rest) for make in (_forms_table, _languages_table, _regulariser_table, _others_table)
    ]
    return "\n\n".join(part for part in parts if part) + source(found)


def summary(found: list[Record]) -> str:
    """nDCG@10 of jv5-tiny at full width in every form, of its teacher and of BM25; other languages in a sentence."""
    if not found:
        return NO_SCORES
    forms = _by_form(found)
    width = max((dim for who, dim, _ in forms if who == "model"), default=0)
    rows = [(f"jv5-tiny, {form}", forms.get(("model", width, form))) for form in FORMS]
    teacher = max((dim for who, dim, _ in forms if who == "teacher"), default=0)
    rows.append(("its teacher, float32", forms.get(("teacher", teacher, "float32"))))
    plain = {r["impl"]: r["value"] for r in found if r["work"] == ENGLISH}
    rows.append(("BM25", plain.get("BM25")))
    lines = ["| held-out packages, synopsis → description | nDCG@10 |", "|---|---|"]
    lines += [f"| {name} | {v:.3f} |" for name, v in rows if v is not None]
    foreign = _by_language(found)
    pairs = [
        f"{language} {value:.2f} ({foreign[language, 'teacher']:.2f})"
        for (language, who), value in foreign.items()
        if who == "model" and (language, "teacher") in foreign
    ]
    if pairs:
        lines += ["", f"Synopses in other languages (teacher in brackets): {', '.join(pairs)}."]
    return "\n".join(lines)


def recipe(found: list[Record]) -> str:
    """Command, sizes and stages of the run that the packaged weights are from."""
    if not found:
        return "Not trained yet: `python bench/install_tiny.py` writes this."
    (run,) = found
    plan = run["recipe"]
    sizes = ", ".join(f"{name} {value}" for name, value in plan["geometry"].items())
    lines = [
        "```sh",
        run["command"],
        "```",
        "",
        *([run["note"], ""] if run["note"] else []),
        f"Seed {plan['seed']}; {run['seconds']:.0f} seconds, data and tokenizer included; "
        f"{run['parameters'] / 1e6:.2f} million parameters in the backbone, {run['bytes'] / 2**20:.1f} MiB of files.",
        "",
        f"Backbone: {sizes}; vocabulary {plan['vocab_size']}; RoPE base {plan['inference_theta']:.0f} at inference; "
        f"Matryoshka dimensions {', '.join(map(str, plan['matryoshka_dims']))}; LoRA rank {plan['lora_rank']}.",
        "",
        "| stage | steps | packages a step | learning rate | tokens | RoPE base | losses and weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage in {"distillation": plan["distillation"], **plan["adapters"]}.items():
        losses = ", ".join(f"{loss} {weight:g}" for loss, weight in stage["weights"].items())
        tokens = f"{stage['max_tokens']}"
        if "long" in stage["weights"]:
            tokens += f" (long: {stage['long_tokens']})"
        lines.append(
            f"| {name} | {stage['steps']} | {stage['batch']} | {stage['learning_rate']:g} | "
            f"{tokens} | {stage['rope_theta']:.0f} | {losses} |"
        )
    return "\n".join(lines)


def _by_form(found: list[Record]) -> dict[tuple[str, int, str], float]:
    return {
        (match["who"], int(match["dim"]), match["form"]): r["value"]
        for r in found
        if r["work"] == ENGLISH and (match := FORM.fullmatch(r["impl"]))
    }


def _by_language(found: list[Record]) -> dict[tuple[str, str], float]:
    return {
        (match["language"], r["impl"]): r["value"]
        for r in found
        if (match := FOREIGN.fullmatch(r["work"])) and r["impl"] in ("model", "teacher")
    }


def _take(rest: list[Record], wanted: Callable[[Record], Any]) -> list[Record]:
    """The records that are wanted; they leave the list."""
    taken = [r for r in rest if wanted(r)]
    rest[:] = [r for r in rest if not wanted(r)]
    return taken


def _forms_table(rest: list[Record]) -> str:
    taken = _take(
        rest, lambda r: r["work"] == ENGLISH and (r["impl"] == "BM25" or FORM.fullmatch(r["impl"]))
    )
    forms = _by_form(taken)
    if not forms:
        return ""
    lines = [
        f"English {ENGLISH}, nDCG@10 over {taken[0]['queries']:,} queries:",
        "",
        f"| | dimensions | {' | '.join(FORMS)} |",
        f"|---|---|{'---|' * len(FORMS)}",
    ]
    for who, dim in dict.fromkeys((who, dim) for who, dim, _ in forms):
        cells = [forms.get((who, dim, form)) for form in FORMS]
        lines.append(f"| {_named(who)} | {dim} | {' | '.join(map(_score, cells))} |")
    for r in taken:
        if r["impl"] == "BM25":
            lines.append(f"| BM25 | | {r['value']:.3f} |{' |' * (len(FORMS) - 1)}")
    return "\n".join(lines)


def _languages_table(rest: list[Record]) -> str:
    taken = _take(
        rest, lambda r: FOREIGN.fullmatch(r["work"]) and r["impl"] in ("model", "teacher")
    )
    found = _by_language(taken)
    if not found:
        return ""
    counts = {FOREIGN.fullmatch(r["work"])["language"]: r["queries"] for r in taken}
    lines = [
        "Synopses in other languages against the English descriptions, nDCG@10:",
        "",
        "| language | queries | jv5-tiny | teacher |",
        "|---|---|---|---|",
    ]
    for language, count in counts.items():
        cells = [_score(found.get((language, who))) for who in ("model", "teacher")]
        lines.append(f"| {language} | {count:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _regulariser_table(rest: list[Record]) -> str:
    taken = _take(rest, lambda r: REGULARISER.fullmatch(r["impl"]))
    values: dict[tuple[str, int], dict[str, float]] = {}
    for r in taken:
        match = REGULARISER.fullmatch(r["impl"])
        values.setdefault((match["kind"], int(match["seed"])), {})[match["form"]] = r["value"]
    complete = {key: v for key, v in values.items() if {"float32", "binary"} <= v.keys()}
    if not complete:
        return ""
    lines = [
        "The global orthogonal regulariser, in shorter runs of the retrieval adapter, nDCG@10:",
        "",
        "| regulariser | seed | float32 | binary | lost by binary |",
        "|---|---|---|---|---|",
    ]
    for (kind, seed), v in sorted(complete.items()):
        lost = 100 * (1 - v["binary"] / v["float32"])
        lines.append(f"| {kind} | {seed} | {v['float32']:.4f} | {v['binary']:.4f} | {lost:.2f} % |")
    return "\n".join(lines)


def _others_table(rest: list[Record]) -> str:
    if not rest:
        return ""
    lines = ["Other measures:", "", "| on | of | measure | |", "|---|---|---|---|"]
    lines += [
        f"| {r['work']} | {_named(r['impl'])} | {r['metric']} | {r['value']:.3f} |" for r in rest
    ]
    return "\n".join(lines)


def _named(who: str) -> str:
    return re.sub(r"^model\b", "jv5-tiny", who)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
