"""What every microbenchmark shares: the correctness gate, the timers, the table and the JSON records.

A bench file lists its `Work`s: one problem each, with the bytes and FLOPs it must move, a float64
reference and the variants that compute it (ours and peers). On CUDA the variants are timed
interleaved with `triton.testing.do_bench`; on a CPU each is a pytest-benchmark case. No number is
printed or written for a variant that misses the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import jv5kernels

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3
ROUND_MS = 60
SAME_SIZE_COPY = "copy of as many bytes"
COPY_GRID = 1 << 16  # bytes


@dataclass(frozen=True)
class Work:
    """One problem to time.

    Args:
        name: shape and dtype, as the table shows them.
        variants: label -> call that returns the output; the first is ours.
        reference: call that returns the expected output in float64.
        tolerance: largest allowed ‖out − reference‖ / ‖reference‖.
        bytes: least number of bytes that must move through memory.
        flops: floating-point operations that must be done.
        peer: label of the variant that ratios are taken against.
        sample: what of an output the reference gives, where all of it would be too much.
        memory_bound: whether a copy that moves `bytes` is timed beside it on CUDA: its ceiling.
    """

    name: str
    variants: dict[str, Callable[[], torch.Tensor]]
    reference: Callable[[], torch.Tensor]
    tolerance: float
    bytes: int
    flops: int = 0
    peer: str = "torch"
    sample: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    memory_bound: bool = False


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in float64; NaN where `out` holds NaN."""
    reference = reference.double()
    return ((out.double() - reference).norm() / reference.norm().clamp_min(1e-300)).item()


def gate(work: Work, label: str, reference: torch.Tensor) -> None:
    """Raises AssertionError when a variant does not compute what the work asks for."""
    error = relative_error(work.sample(work.variants[label]()), reference)
    assert error <= work.tolerance, (
        f"{work.name}, {label}: relative error {error:.2e} > {work.tolerance:.0e}"
    )


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median (`time_on_host`: the fastest) and the 20th and 80th percentiles."""

    p50: float
    p20: float
    p80: float


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, so that the time of a short kernel is not that of its launch from Python.

    It keeps the call alive, and so the memory that the graph reads.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(call: Callable[[], Any] = call) -> Any:
        graph.replay()
        return result

    return replay


def time_interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Times CUDA calls in turns, so that clocks and heat treat them alike; cold L2 before each call."""
    from triton.testing import do_bench

    samples: dict[str, list[Sequence[float]]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            samples[label].append(
                do_bench(call, warmup=20, rep=ROUND_MS, quantiles=[0.5, 0.2, 0.8])
            )
    return {
        label: Timing(*(statistics.median(column) for column in zip(*rows, strict=True)))
        for label, rows in samples.items()
    }


def time_on_host(calls: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, Timing]:
    """Times CPU calls in turns; `p50` is the fastest of the rounds, which a shared machine disturbs least."""
    samples: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            samples[label].append(1e3 * (time.perf_counter() - start))
    timings = {}
    for label, values in samples.items():
        ordered = sorted(values)
        p20, p80 = (ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.8))
        timings[label] = Timing(ordered[0], p20, p80)
    return timings


@lru_cache
def environment(device: str) -> dict[str, str]:
    """Device, versions, commit and date, as they stand in every record."""
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "package": jv5kernels.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def cpu_name() -> str:
    """Processor name with the number of threads that torch uses."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Short hash of the checkout, with a + when files differ from it (BENCH_COMMIT where git is absent)."""
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(
    work: str,
    impl: str,
    metric: str,
    value: float,
    unit: str,
    *,
    device: str,
    peer: str | None = None,
    peer_value: float | None = None,
    ratio: float | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """One result; `ratio` above 1 means that `impl` is better than `peer`."""
    fields = {"work": work, "impl": impl, "metric": metric, "value": value, "unit": unit}
    against = {"peer": peer, "peer_value": peer_value, "ratio": ratio}
    return fields | against | extra | environment(device)


def write_records(name: str, records: list[dict[str, Any]]) -> Path:
    """Writes bench/results/<name>.json (to a temporary name, then renamed); BENCH_RESULTS moves the folder.

    Benches call it whenever a few rows are done, so that a run that is cut short leaves those.
    """
    folder = Path(os.environ.get("BENCH_RESULTS", RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(records, indent=1) + "\n")
    temporary.replace(path)
    return path


def operator_records(work: Work, timings: dict[str, Timing], device: str) -> list[dict[str, Any]]:
    """The records of one work: milliseconds of every variant, with its rates and its ratio to the peer.

    `share_of_copy`: the time of a copy of as many bytes, over the variant's own.
    """
    peer, copy = timings[work.peer], timings.get(SAME_SIZE_COPY)
    return [
        record(
            work.name,
            label,
            "ms",
            timing.p50,
            "ms",
            device=device,
            peer=work.peer,
            peer_value=peer.p50,
            ratio=peer.p50 / timing.p50,
            p20=timing.p20,
            p80=timing.p80,
            GB_per_s=work.bytes / timing.p50 / 1e6,
            TFLOP_per_s=work.flops / timing.p50 / 1e9,
            **({} if copy is None else {"share_of_copy": copy.p50 / timing.p50}),
        )
        for label, timing in timings.items()
    ]


def print_records(records: Iterable[dict[str, Any]]) -> None:
    """One line a record."""
    for r in records:
        rates = f"{r.get('GB_per_s', 0):9.1f} GB/s {r.get('TFLOP_per_s', 0):8.2f} TFLOP/s"
        ratio = "" if r["ratio"] is None else f"{r['ratio']:6.2f}x {r['peer']}"
        if "share_of_copy" in r:
            ratio += f", {100 * r['share_of_copy']:.0f} % of a copy's speed"
        print(
            f"{r['work']:44} {r['impl']:16} {r['value']:10.4f} {r['unit']} {rates} {ratio}",
            flush=True,
        )


def same_size_copy(nbytes: int) -> Callable[[], torch.Tensor]:
    """A copy on the device that moves `nbytes`, half of them in and half out, or a little less.

    The library's copy of sizes off a coarse grid is slower by half, so the size is rounded down to one.
    """
    source = torch.zeros(nbytes // 2 // COPY_GRID * COPY_GRID, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth_work(megabytes: int = 256) -> Work:
    """A large device-to-device copy: the ceiling that memory-bound kernels are held against."""
    source = torch.randn(megabytes << 18, device="cuda")
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    return Work("copy", copy, source.double, 0.0, 2 * source.nbytes, peer="copy")


def run(name: str, works: Iterable[Work]) -> Path:
    """Gates and times works on the GPU as replays of CUDA graphs; writes bench/results/<name>.json and prints it."""
    records: list[dict[str, Any]] = []
    for work in works:
        reference = work.reference()
        for label in work.variants:
            gate(work, label, reference)
        del reference
        calls = {label: captured(call) for label, call in work.variants.items()}
        if work.memory_bound:
            calls[SAME_SIZE_COPY] = captured(same_size_copy(work.bytes))
        lines = operator_records(work, time_interleaved(calls), "cuda")
        print_records(lines)
        records += lines
        write_records(name, records)
    return write_records(name, records)


def main(name: str, works: Callable[[str], list[Work]], file: str) -> None:
    """Command line of one bench file: on CUDA through triton.testing, otherwise through pytest-benchmark."""
    parser = argparse.ArgumentParser(description=f"Benchmark of {name}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        default=[""],
        help="on CUDA, works with one of these in the name",
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        chosen = [w for w in works("cuda") if any(text in w.name for text in arguments.only)]
        print(run(name, [copy_bandwidth_work(), *chosen]))
        return
    import pytest

    sys.exit(pytest.main([file, "--benchmark-only", "-q"]))


CPU_RECORDS: dict[str, list[dict[str, Any]]] = {}


def cpu_benchmarks(name: str, works: Callable[[str], list[Work]]) -> Callable[..., None]:
    """A pytest function that times every variant of every CPU work with pytest-benchmark."""
    import pytest

    cases = [(work, label) for work in works("cpu") for label in work.variants]

    @pytest.mark.bench
    @pytest.mark.parametrize(("work", "label"), cases, ids=[f"{w.name}-{v}" for w, v in cases])
    def bench(work: Work, label: str, benchmark: Any) -> None:
        gate(work, label, work.reference())
        benchmark.group = f"{name} {work.name}"
        benchmark.extra_info.update(bytes=work.bytes, flops=work.flops)
        benchmark(work.variants[label])
        if benchmark.stats is None:  # --benchmark-disable
            return
        data = benchmark.stats.stats
        ordered = sorted(data.data)
        p20, p80 = (1e3 * ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.8))
        entry = {"work": work, "label": label, "timing": Timing(1e3 * data.median, p20, p80)}
        CPU_RECORDS.setdefault(name, []).append(entry)

    return bench


def write_cpu_records() -> list[Path]:
    """Writes what the pytest-benchmark cases of this run measured, one <name>-cpu.json a bench file."""
    paths = []
    for name, entries in CPU_RECORDS.items():
        by_work: dict[str, list[dict[str, Any]]] = {}
        for entry in entries:
            by_work.setdefault(entry["work"].name, []).append(entry)
        records = []
        for group in by_work.values():
            timings = {entry["label"]: entry["timing"] for entry in group}
            if group[0]["work"].peer in timings:
                records += operator_records(group[0]["work"], timings, "cpu")
        paths.append(write_records(f"{name}-cpu", records))
    return paths
