"""Seconds that `import jv5kernels` takes beyond `import torch`, each in a fresh interpreter.

python bench/bench_import.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from harness import record, write_records

RUNS = 7
PROGRAM = (
    "import time, torch; t = time.perf_counter(); import jv5kernels; print(time.perf_counter() - t)"
)
MUST_SECONDS = 0.3


def main() -> None:
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(RUNS)
    ]
    value = statistics.median(times)
    assert value <= MUST_SECONDS, f"import takes {value:.3f} s"
    print(f"import jv5kernels after torch: {1e3 * value:.1f} ms")
    line = record(
        "import jv5kernels after import torch", "jv5kernels", "s", value, "s", device="cpu"
    )
    print(write_records("import", [line]))


if __name__ == "__main__":
    main()
