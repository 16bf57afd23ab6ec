"""What this machine has and which path every operator takes on it: the facts of ``jv5kernels info``."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from jv5kernels import __version__

__all__ = ["collect", "render"]

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "sentence-transformers",
    "pyarrow",
    "flash-attn",
)


def collect(
    model: str | None = None, encoder_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns everything that `render` shows, as plain values that JSON can hold.

    Args:
        model: hub id or folder, to give its memory formula; loads the checkpoint.
        encoder_options: keyword arguments of FastEncoder for `model`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "versions": _versions(),
        "device": _device(device),
        "operators": _operators(device),
        "triton": _triton(),
        "extension": _extension(),
    }
    if model is not None:
        facts["model"] = _model(model, dict(encoder_options or {}))
    return facts


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "jv5kernels": __version__,
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _device(device: torch.device) -> dict[str, Any]:
    cpu = {"cpu": _cpu_name(), "cores": os.cpu_count(), "torch threads": torch.get_num_threads()}
    if device.type == "cpu":
        built = torch.version.cuda is not None
        reason = "torch finds no CUDA device" if built else "this torch is built without CUDA"
        return {"type": "cpu", "why not cuda": reason, **cpu}
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "free_bytes": free,
                "total_bytes": total,
            }
        )
    return {"type": "cuda", "gpus": gpus, "cuda": torch.version.cuda, **cpu}


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _operators(device: torch.device) -> dict[str, Any]:
    """For every operator the implementation that impl="auto" takes, and what speaks against each other one."""
    import jv5kernels.ops  # noqa: F401 - fills OPERATORS
    from jv5kernels.ops.registry import OPERATORS

    table = {}
    for name, operator in sorted(OPERATORS.items()):
        try:
            chosen, why_none = operator.choose_name("auto", device), None
        except ValueError as error:
            chosen, why_none = None, str(error)
        others = {
            other: operator.reason_against(other, device)
            for other in operator.implementations
            if other != chosen
        }
        table[name] = {"uses": chosen, "why_none": why_none, "others": others}
    return table


def _triton() -> dict[str, Any]:
    """Triton compiles a small launcher in C when a kernel runs first, so it needs a compiler and Python.h."""
    wanted = os.environ.get("CC")
    compiler = shutil.which(wanted) if wanted else None
    compiler = compiler or shutil.which("gcc") or shutil.which("clang")
    include = Path(sysconfig.get_paths()["include"])
    header = include / "Python.h"
    missing = []
    if find_spec("triton") is None:
        missing.append("the package triton")
    if compiler is None:
        missing.append("a C compiler (gcc, clang, or the environment variable CC)")
    if not header.is_file():
        missing.append(f"Python.h in {include} (Debian: python3-dev)")
    return {
        "c_compiler": compiler,
        "python_h": str(header) if header.is_file() else None,
        "missing": missing,
        "cache": str(_triton_cache()),
        "interpreter": os.environ.get("TRITON_INTERPRET", "0") == "1",
    }


def _triton_cache() -> Path:
    """Where Triton keeps compiled kernels, so that only the first process on a machine compiles them."""
    named = os.environ.get("TRITON_CACHE_DIR")
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    return Path(named) if named else home / ".triton" / "cache"


def _extension() -> dict[str, Any]:
    if find_spec("jv5kernels._C") is None:
        return {
            "built": False,
            "level": None,
            "note": "not built; torch does its work (install with a C++ compiler)",
        }
    from jv5kernels import _C

    return {"built": True, "level": str(_C.dispatch_level()), "note": None}


def _model(model: str, options: dict[str, Any]) -> dict[str, Any]:
    from jv5kernels.encoder import FastEncoder

    encoder = FastEncoder(model, **options)
    memory, spec = encoder.memory_model(), encoder.spec
    return {
        "source": encoder.checkpoint.source,
        "revision": encoder.checkpoint.revision,
        "type": spec.model_type,
        "layers": spec.num_layers,
        "width": spec.hidden_size,
        "tasks": list(encoder.tasks),
        "pooling": encoder.pooling,
        "prompts": dict(encoder.prompts),
        "max_seq_length": encoder.max_seq_length,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "device": str(encoder.device),
        "memory": {
            "weights": memory.weights,
            "fixed": memory.fixed,
            "per_token": memory.per_token,
        },
    }


def render(facts: Mapping[str, Any]) -> Any:
    """The facts as something rich can print."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def section(title: str, rows: Mapping[str, Any]) -> Table:
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None
        )
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(f"  {name}"), Text(str(value)))
        return table

    versions = {name: version or "not installed" for name, version in facts["versions"].items()}
    parts = [
        section("Versions", versions),
        section("Device", _device_rows(facts["device"])),
        section("Triton and extension", _native_rows(facts)),
        section(f"Operators on {facts['device']['type']}", _operator_rows(facts["operators"])),
    ]
    if "model" in facts:
        parts.append(section("Model", _model_rows(facts["model"])))
    spaced = [item for part in parts for item in (part, Text(""))]
    return Group(*spaced[:-1])


def _device_rows(device: Mapping[str, Any]) -> dict[str, Any]:
    rows = {key: value for key, value in device.items() if key != "gpus"}
    for index, gpu in enumerate(device.get("gpus", ())):
        rows[f"gpu {index}"] = (
            f"{gpu['name']}, capability {gpu['capability']}, "
            f"{gpu['free_bytes'] / 2**30:.1f} of {gpu['total_bytes'] / 2**30:.1f} GiB free"
        )
    return rows


def _native_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    triton, extension = facts["triton"], facts["extension"]
    if triton["missing"]:
        state = "kernels cannot be compiled here; missing: " + ", ".join(triton["missing"])
    else:
        state = f"kernels can be compiled ({triton['c_compiler']}, {triton['python_h']})"
    if triton["interpreter"]:
        state += "; TRITON_INTERPRET=1: the interpreter runs them"
    return {
        "triton": state,
        "compiled kernels": f"kept in {triton['cache']} (TRITON_CACHE_DIR)",
        "jv5kernels._C": f"dispatches to {extension['level']}"
        if extension["built"]
        else extension["note"],
    }


def _operator_rows(operators: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    for name, entry in operators.items():
        others = [
            f"{other}: {reason}" if reason else f"{other}: usable with impl={other!r}"
            for other, reason in entry["others"].items()
        ]
        line = entry["uses"] or f"none ({entry['why_none']})"
        rows[name] = line + (f"  ({'; '.join(others)})" if others else "")
    return rows


def _model_rows(model: Mapping[str, Any]) -> dict[str, Any]:
    memory = model["memory"]
    base, slope = memory["weights"] + memory["fixed"], memory["per_token"]
    rows = {key: value for key, value in model.items() if key != "memory"}
    rows["memory"] = (
        f"bytes = {base:,} + {slope:,} * tokens in a batch (weights {memory['weights']:,})"
    )
    rows["at 4096 / 32768"] = " / ".join(
        f"{(base + slope * tokens) / 2**30:.2f} GiB" for tokens in (4096, 32768)
    )
    return rows
