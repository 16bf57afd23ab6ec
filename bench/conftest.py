"""Writes the records of CPU microbenchmarks when a pytest run over bench/ ends."""

from __future__ import annotations

import pytest
from harness import write_cpu_records


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_disable = not config.option.benchmark_only


def pytest_sessionfinish() -> None:
    for path in write_cpu_records():
        print(f"\nwrote {path}")
