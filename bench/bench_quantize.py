"""quantize_int8 and quantize_binary against Sentence Transformers' quantize_embeddings: the same bytes.

python bench/bench_quantize.py

Calls are timed in turns and the fastest of the rounds counts. Beside the ratio stands the share of the
time in which torch.sum reads the same embeddings on the same threads: what memory allows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from harness import print_records, record, time_interleaved, time_on_host, write_records

from jv5kernels.ops import quantize_binary, quantize_int8

NAME = "quantize"
ROWS, DIM = 100_000, 1024
PEER = "Sentence Transformers"
READ = "torch.sum"


@lru_cache
def inputs(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and the ranges of their dimensions."""
    x = torch.randn(ROWS, DIM, generator=torch.Generator(device).manual_seed(0), device=device)
    return x, torch.stack([x.min(0).values, x.max(0).values])


def theirs(device: str, precision: str) -> torch.Tensor:
    """Embeddings on `device` to quantised bytes in the CPU's memory, where their function leaves them."""
    from sentence_transformers.util import quantize_embeddings

    x, ranges = inputs(device)
    return torch.from_numpy(quantize_embeddings(x, precision, ranges=ranges.cpu().numpy()))


def ours(device: str, precision: str) -> torch.Tensor:
    x, ranges = inputs(device)
    if precision in ("binary", "ubinary"):
        return quantize_binary(x, precision)
    return quantize_int8(x, ranges, precision)


def measure(device: str, precision: str, times: Callable[..., Any]) -> dict[str, Any]:
    """One record; on CUDA both ways end in host memory."""
    assert torch.equal(ours(device, precision).cpu(), theirs(device, precision)), (
        f"{precision}: other bytes than theirs"
    )
    x, _ = inputs(device)
    impl = "triton" if device == "cuda" else "cpp"
    calls = {
        impl: lambda: ours(device, precision).cpu(),
        PEER: lambda: theirs(device, precision),
        READ: x.sum,
    }
    timings = times(calls)
    moved = x.nbytes + ours(device, precision).nbytes
    return record(
        f"{precision} {ROWS}x{DIM} float32",
        impl,
        "ms",
        timings[impl].p50,
        "ms",
        device=device,
        peer=PEER,
        peer_value=timings[PEER].p50,
        ratio=timings[PEER].p50 / timings[impl].p50,
        p20=timings[impl].p20,
        p80=timings[impl].p80,
        GB_per_s=moved / timings[impl].p50 / 1e6,
        read_ms=timings[READ].p50,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Benchmark of {NAME}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    device = parser.parse_args().device
    times = time_interleaved if device == "cuda" else time_on_host
    records = [measure(device, p, times) for p in ("binary", "ubinary", "int8", "uint8")]
    print_records(records)
    print(write_records(NAME if device == "cuda" else f"{NAME}-cpu", records))


if __name__ == "__main__":
    main()
