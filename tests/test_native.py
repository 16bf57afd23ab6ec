"""The extension jv5kernels._C itself: its instruction sets, its threads, its build switches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ragged
from native import dispatch_level, levels, needs_native

from jv5kernels.ops import embed_output

ROOT = Path(__file__).parent.parent


@needs_native
def test_the_best_instruction_set_is_in_use():
    from jv5kernels import _C

    assert _C.dispatch_levels()[0] == "baseline"
    assert _C.dispatch_level() == _C.dispatch_levels()[-1]


@needs_native
def test_the_instruction_set_can_be_chosen():
    from jv5kernels import _C

    for level in levels():
        with dispatch_level(level):
            assert _C.dispatch_level() == level
    for level in {"baseline", "avx2", "avx512", "sse9"} - set(levels()):
        with pytest.raises(ValueError, match=f"'{level}' is unknown or not supported by this CPU"):
            _C.set_dispatch_level(level)


@needs_native
def test_needs_no_library_of_torch():
    """Nothing but the C and C++ runtimes is linked, so a torch upgrade cannot break the module."""
    from jv5kernels import _C

    if shutil.which("ldd") is None:
        pytest.skip("needs ldd")
    linked = subprocess.run(["ldd", _C.__file__], check=True, capture_output=True, text=True).stdout
    # Names alone: an address that a library was loaded at may spell one of these.
    names = [line.split()[0] for line in linked.splitlines()]
    for library in ("torch", "c10", "cuda", "gomp"):
        assert not any(library in name for name in names), names


@needs_native
def test_calls_from_several_threads():
    hidden, cu_seqlens = torch.randn(3000, 128), ragged([2500, 500])
    expected, _ = embed_output(hidden, cu_seqlens, mode="mean", impl="cpp")

    def call(_: int) -> bool:
        out, _ = embed_output(hidden, cu_seqlens, mode="mean", impl="cpp")
        return torch.equal(out, expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    pytest.importorskip("pybind11", reason="building needs pybind11 and setuptools (extra dev)")
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a build reads."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "jv5kernels", tmp_path / "jv5kernels", ignore=ignored)
    return tmp_path


def test_without_native_code_the_wheel_is_pure(sources):
    result = run_setup(sources, "bdist_wheel", JV5_NATIVE="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_compiler_error_fails_the_build(sources):
    result = run_setup(sources, "build_ext", CXX="false", CC="false")
    assert result.returncode != 0
    # With its path in some versions of setuptools.
    assert re.search(r"'(/\S*/)?false'", result.stderr)


@pytest.mark.parametrize(
    ("switch", "value", "message"),
    [
        ("JV5_NATIVE", "yes", "JV5_NATIVE='yes': allowed are 0, 1"),
        ("JV5_CUDA", "2", "JV5_CUDA='2': allowed are auto, 0, 1"),
        ("JV5_CUDA", "1", "csrc/cuda holds no .cu files"),
    ],
)
def test_switches_that_cannot_be_followed(switch, value, message, sources):
    result = run_setup(sources, "--version", **{switch: value})
    assert result.returncode != 0
    assert message in result.stderr
