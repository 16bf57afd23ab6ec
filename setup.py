"""Builds the native extension jv5kernels._C; all metadata is in pyproject.toml.

Switches, read from the environment:
    JV5_NATIVE=0       no extension: a pure-Python package that runs on torch and Triton
    JV5_CUDA=auto|0|1  1 refuses to build without CUDA sources; there are none so far
    CXX                the C++ compiler
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        raise SystemExit(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    return value


def check_cuda() -> None:
    """Refuses JV5_CUDA=1: on CUDA every operator is a Triton kernel."""
    if choice("JV5_CUDA", "auto", ("auto", "0", "1")) == "1":
        raise SystemExit(
            "JV5_CUDA=1, but there is nothing for nvcc to build: csrc/cuda holds no .cu files"
        )


def extensions() -> list:
    if choice("JV5_NATIVE", "1", ("0", "1")) == "0":
        return []
    from pybind11.setup_helpers import Pybind11Extension

    sources = [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
    headers = sorted((ROOT / "csrc").rglob("*.h"))
    return [
        Pybind11Extension(
            "jv5kernels._C",
            [str(path.relative_to(ROOT)) for path in sources],
            depends=[str(path.relative_to(ROOT)) for path in headers],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]


check_cuda()
setup(ext_modules=extensions())
