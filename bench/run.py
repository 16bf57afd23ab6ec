"""Runs every benchmark that this machine can run, or those named, one process each, one after the other.

python bench/run.py                            all of them
python bench/run.py rms_norm corpus            some of them
python bench/run.py --list                     their names and about how long each takes on an H200
python bench/run.py --tokenizer DIR --corpus FILE

The last two arguments reach the benches that go from text to vectors: real vocabularies (small.json and nano.json) and
other texts. Nothing is fetched from the network, with or without them. Every bench writes its rows as it goes, so
what was measured before a run is cut stays; BENCH_RESULTS names another folder than bench/results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from checkpoints import add_corpus_argument, add_tokenizer_argument

FOLDER = Path(__file__).parent
NEED_CUDA = {"backbone", "cold_start", "invariance", "query", "short_layer"}
# About how long each takes on an H200, kernels not yet compiled, in seconds; the rest a few.
SECONDS = {
    "attention": 70,
    "attention_pooled": 30,
    "backbone": 110,
    "cold_start": 120,
    "corpus": 150,
    "embed_output": 40,
    "invariance": 90,
    "linear": 60,
    "linear_qk_norm_rope": 20,
    "linear_swiglu": 60,
    "parity": 90,
    "pipeline": 40,
    "pool": 20,
    "qk_norm_rope": 20,
    "query": 90,
    "rms_norm": 20,
    "search": 30,
    "short_layer": 30,
    "swiglu": 40,
}
A_FEW = 10


def main() -> None:
    names = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    if not torch.cuda.is_available():
        names = [name for name in names if name not in NEED_CUDA]
    parser = argparse.ArgumentParser(description="Runs benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="names and durations; runs nothing")
    add_tokenizer_argument(parser)
    add_corpus_argument(parser)
    arguments = parser.parse_args()
    chosen = arguments.names or names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"no such benchmark here: {', '.join(unknown)}; there are {', '.join(names)}")
    if arguments.list:
        for name in chosen:
            print(f"{name:18} {SECONDS.get(name, A_FEW):4} s")
        print(f"{'in all':18} {sum(SECONDS.get(name, A_FEW) for name in chosen):4} s")
        return
    environment = dict(os.environ)
    for variable, path in (
        ("BENCH_TOKENIZER", arguments.tokenizer),
        ("BENCH_CORPUS", arguments.corpus),
        ("BENCH_RESULTS", path_of_results()),
    ):
        if path is not None:
            environment[variable] = str(path.absolute())
    failed = []
    for name in chosen:
        print(f"== {name}, about {SECONDS.get(name, A_FEW)} s on an H200", flush=True)
        start = time.perf_counter()
        command = [sys.executable, str(FOLDER / f"bench_{name}.py")]
        if subprocess.run(command, cwd=FOLDER, env=environment).returncode:
            failed.append(name)
        print(f"   took {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def path_of_results() -> Path | None:
    """The folder that the caller named, from where the caller is."""
    found = os.environ.get("BENCH_RESULTS")
    return None if found is None else Path(found)


if __name__ == "__main__":
    main()
