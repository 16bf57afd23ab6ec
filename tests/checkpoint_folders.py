"""Fixtures: synthetic checkpoint folders, written once, and copies that a test may spoil."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from jv5kernels.synthetic.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Writes a checkpoint once for all tests that ask for the same options."""
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def write(**options) -> Path:
        key = re.sub(r"\W+", "-", repr(sorted(options.items())))
        if key not in made:
            made[key] = write_checkpoint(root / str(len(made)), **options)
        return made[key]

    return write


@pytest.fixture
def copied(written, tmp_path):
    """A copy that a test may spoil."""

    def copy(**options) -> Path:
        return Path(shutil.copytree(written(**options), tmp_path / "copy"))

    return copy
