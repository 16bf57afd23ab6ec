"""Seconds from the start of a process to its first embedding, with an empty and with a warm cache of kernels.

    python bench/bench_cold_start.py [--tokenizer DIR]            (needs a CUDA GPU)

Each line is a process of its own over the same checkpoint (random weights, real geometry, bf16): importing, loading
the weights onto the GPU, the first query, the second. The cache is Triton's, in a folder of its own for this bench.
The last process calls `warmup()` first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checkpoints import add_arguments, real_checkpoint
from harness import record, write_records

PROGRAM = """
import json, sys, time
marks = [time.perf_counter()]
import torch
from jv5kernels import FastEncoder
marks.append(time.perf_counter())
encoder = FastEncoder(sys.argv[1], device="cuda")
torch.cuda.synchronize()
marks.append(time.perf_counter())
if sys.argv[2] == "warmup":
    encoder.warmup()
marks.append(time.perf_counter())
for text in ("How fast does light travel in a vacuum?", "And sound?"):
    encoder.encode_query(text)
    marks.append(time.perf_counter())
names = ("import", "load", "warmup", "first", "second")
print(json.dumps({n: b - a for n, a, b in zip(names, marks, marks[1:])}))
"""
MUST_SECONDS = 3.0


def start(folder: Path, cache: Path, mode: str) -> dict[str, float]:
    """Seconds of each step in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), mode],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for family in arguments.models:
            folder = real_checkpoint(Path(root), family, arguments.tokenizer)
            cache = Path(root) / f"{family}-cache"
            for label, mode in (("empty", "query"), ("warm", "query"), ("warm", "warmup")):
                steps = start(folder, cache, mode)
                beyond = steps["import"] + steps["warmup"] + steps["first"]
                shown = "  ".join(f"{name} {value:7.3f}" for name, value in steps.items())
                print(f"{family:6} {label:5} cache, {mode:6}: {shown} s", flush=True)
                records.append(
                    record(
                        f"{family} first embedding, {label} cache"
                        + (", after warmup()" if mode == "warmup" else ""),
                        "jv5kernels",
                        "s",
                        steps["first"],
                        "s",
                        device="cuda",
                        steps=steps,
                        beyond_loading=beyond,
                    )
                )
                write_records("cold_start", records)
                is_first_call = label == "warm" and mode == "query"
                assert not is_first_call or steps["first"] <= MUST_SECONDS, f"{family}: {steps}"
    print(write_records("cold_start", records))


if __name__ == "__main__":
    main()
