"""What a stranger meets first: a light import, two commands in the README, a console command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jv5kernels

ROOT = Path(jv5kernels.__file__).parent.parent
IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import jv5kernels
seconds = time.perf_counter() - start
package = sorted(set(sys.modules) - before)
jv5kernels.FastEncoder
print(json.dumps([seconds, package, sorted(sys.modules)]))
"""


def python(*arguments: str) -> str:
    """Standard output of a fresh interpreter."""
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_import_is_quick_and_light() -> None:
    # The best of three, tried until one is quick: other work on the machine can only make it slower.
    for _ in range(3):
        seconds, package, encoder = json.loads(python("-c", IMPORT))
        # What torch itself brought along (tqdm, for one) does not count.
        heavy = {"triton", "transformers", "peft", "tokenizers", "rich", "tqdm"} & set(package)
        assert not heavy, f"import jv5kernels imports {heavy}"
        heavy = {"triton", "transformers", "peft"} & set(encoder)
        assert not heavy, f"importing the encoder imports {heavy}"
        if seconds <= 0.3:
            return
    pytest.fail(f"import jv5kernels takes {seconds:.2f} s")


def test_the_package_alone_does_not_import_torch() -> None:
    assert python("-c", "import sys, jv5kernels; print('torch' in sys.modules)").strip() == "False"


def test_every_public_name_loads() -> None:
    for name in jv5kernels.__all__:
        assert getattr(jv5kernels, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jv5kernels.nothing  # noqa: B018


def test_version_of_the_command_is_that_of_the_package() -> None:
    expected = f"jv5kernels {jv5kernels.__version__}"
    assert python("-m", "jv5kernels", "--version").strip() == expected


def test_readme_starts_with_the_two_commands() -> None:
    """Block 1 runs the demo, block 2 the tests; each installs the same torch and stands alone."""
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, flags=re.M | re.S)
    assert blocks[0].splitlines()[-1] == "jv5kernels demo"
    assert blocks[1].splitlines()[-1] == "python -m pytest"
    assert "[test]" in blocks[1]
    for block in blocks[:2]:
        assert "python3 -m venv" in block
        assert re.findall(r"torch==[\d.]+", block) == re.findall(r"torch==[\d.]+", blocks[0])[:1]


def test_python_and_readme_agree_on_the_oldest_python() -> None:
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest and f"Python ≥ {oldest[1]}" in (ROOT / "README.md").read_text("utf-8")
