"""Takes over rows that were measured elsewhere, or in several runs, into bench/results.

    python bench/take.py FOLDER...

Rows of a work that the folder's files hold replace all rows of that work; those of other works stay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import write_records
from table import records

Row = dict[str, Any]


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """The old rows with those of the new rows' works replaced, in place where there were some."""
    measured = {row["work"] for row in new}
    result: list[Row] = []
    for row in old:
        if row["work"] not in measured:
            result.append(row)
        elif not any(r["work"] == row["work"] for r in result):
            result += [r for r in new if r["work"] == row["work"]]
    kept = {row["work"] for row in old}
    return result + [row for row in new if row["work"] not in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    for folder in parser.parse_args().folders:
        for path in sorted(folder.glob("*.json")):
            new = json.loads(path.read_text())
            print(write_records(path.stem, merged(records(path.stem), new)), len(new))


if __name__ == "__main__":
    main()
