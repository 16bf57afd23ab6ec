"""Runs every benchmark that this machine can run, or those named, one process each.

python bench/run.py                 all of them
python bench/run.py rms_norm corpus
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
NEED_CUDA = {"backbone", "cold_start", "invariance", "query", "short_layer"}


def main() -> None:
    names = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    if not torch.cuda.is_available():
        names = [name for name in names if name not in NEED_CUDA]
    parser = argparse.ArgumentParser(description="Runs benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    chosen = parser.parse_args().names or names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"no such benchmark here: {', '.join(unknown)}; there are {', '.join(names)}")
    failed = []
    for name in chosen:
        print(f"== {name}", flush=True)
        script = FOLDER / f"bench_{name}.py"
        if subprocess.run([sys.executable, str(script)], cwd=FOLDER).returncode:
            failed.append(name)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
