"""Files of JSON lines, plain or compressed as their names say (.gz, .xz)."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["packed", "read_json_lines", "write_whole"]

T = TypeVar("T")


def read_json_lines(path: str | Path, parse: Callable[[Any], T], what: str) -> list[T]:
    """Returns what `parse` makes of every line's object.

    Raises:
        ValueError: a line that is not JSON, or that `parse` refuses by ValueError, KeyError or TypeError; with its
            number, and with `what` it is not.
    """
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    found = []
    with openers.get(Path(path).suffix, open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                found.append(parse(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no {what}: {error!r}") from error
    return found


def packed(rows: Iterable[Mapping[str, Any]], path: Path) -> bytes:
    """The content of a file of that name: the same bytes for the same rows."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        return gzip.compress(data, mtime=0)
    return lzma.compress(data) if path.suffix == ".xz" else data


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, which then takes its own."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    temporary.replace(path)
