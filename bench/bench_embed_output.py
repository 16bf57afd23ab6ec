"""The output stage: hidden states to embeddings and to bytes.

python bench/bench_embed_output.py
python bench/bench_embed_output.py --sweep    milliseconds of a mean for candidate launch configurations

On CUDA, kernels are replayed from graphs, so that only the device is timed. Means are held against a copy
that moves as many bytes. Both are repeated in one graph over several inputs, more than the L2 cache holds:
alone behind a full cache, a mean would also write back what filled it, while a copy may leave as many of
its own bytes there. Last tokens are held against a kernel that does nothing, with a cold cache. From
hidden states on the device to bytes in host memory, they are held against Transformers' RMSNorm, Sentence
Transformers' pooling and its quantisation, calls and copies included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import (
    Work,
    captured,
    cpu_benchmarks,
    print_records,
    record,
    relative_error,
    time_interleaved,
    write_records,
)

from jv5kernels.ops import embed_output

EPS = 1e-6
NAME = "embed_output"
WIDTH = 1024
PEER = "Transformers + Sentence Transformers"
COPY = "copy of as many bytes"
EMPTY = "empty kernel"
# Inputs that are taken in turn, and calls in one graph.
INPUTS, REPEATS = 3, 24
PRECISIONS = ("float32", "ubinary")


class Problem:
    """Sequences of equal length with the weight of the final norm."""

    def __init__(
        self, sequences: int, length: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (sequences * length, WIDTH)
        self.hidden = torch.randn(shape, generator=generator, device=device).to(dtype)
        self.weight = torch.rand(WIDTH, generator=generator, device=device).to(dtype)
        self.offsets = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
        self.sequences, self.length = sequences, length
        self.name = f"{sequences}x{length} C={WIDTH} {str(dtype)[6:]}"

    def ours(self, mode: str, precision: str = "float32", **options: Any) -> torch.Tensor:
        options |= {"mode": mode, "norm_weight": self.weight, "eps": EPS, "precision": precision}
        return embed_output(self.hidden, self.offsets, **options)[0]

    def expected(self, mode: str) -> torch.Tensor:
        """The float64 embeddings."""
        tokens = self.hidden.double().view(self.sequences, self.length, WIDTH)
        if mode == "lasttoken":
            tokens = tokens[:, -1:]
        tokens = tokens / (tokens.square().mean(-1, keepdim=True) + EPS).sqrt()
        return F.normalize(tokens.mean(1) * self.weight.double(), dim=-1)

    def theirs(self, mode: str) -> Callable[[], torch.Tensor]:
        """Bits in host memory by the modules that Transformers and Sentence Transformers use."""
        from sentence_transformers.models import Pooling
        from sentence_transformers.util import quantize_embeddings
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

        norm = Qwen3RMSNorm(WIDTH, EPS).to(self.hidden.device, self.hidden.dtype)
        norm.weight.data.copy_(self.weight)
        pooling = Pooling(WIDTH, pooling_mode=mode)
        padded = self.hidden.view(self.sequences, self.length, WIDTH)
        mask = torch.ones(padded.shape[:2], dtype=torch.int64, device=self.hidden.device)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            features = {"token_embeddings": norm(padded), "attention_mask": mask}
            embeddings = F.normalize(pooling(features)["sentence_embedding"].float(), dim=-1)
            return torch.from_numpy(quantize_embeddings(embeddings.cpu(), "ubinary"))

        return run


def wrong_bits(bits: torch.Tensor, embeddings: torch.Tensor) -> float:
    """The share of bits that differ from the signs of float64 embeddings."""
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    found = (bits.cpu()[..., None] & weights).ne(0).flatten(1)
    return found.ne(embeddings.cpu() > 0).double().mean().item()


def check_bits(bits: torch.Tensor, embeddings: torch.Tensor, limit: float, name: str) -> None:
    share = wrong_bits(bits, embeddings)
    assert share <= limit, f"{name}: {share:.1e} of the bits are wrong"


def copies_of(total_bytes: int) -> list[Callable[[], Any]]:
    """Copies on the device, each of which reads and writes so many bytes in all."""
    shape = (INPUTS, total_bytes // 2)
    sources = torch.randint(255, shape, dtype=torch.uint8, device="cuda")
    targets = torch.empty_like(sources)
    return [lambda s=s, t=t: t.copy_(s) for s, t in zip(sources, targets, strict=True)]


def empty_kernel() -> Callable[[], Any]:
    """The launch of a kernel that does nothing."""
    import triton

    @triton.jit
    def nothing(p):
        pass

    p = torch.empty(1, device="cuda")
    return lambda: nothing[(1,)](p)


def span_kernel(problem: Problem, spans: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The kernel of span means, with the table that the host makes of the spans made once."""
    from jv5kernels.kernels.embed_output import Target, launch_means
    from jv5kernels.kernels.tree import partial_sums
    from jv5kernels.ops.pool import span_table

    rows, device = len(spans), problem.hidden.device
    table = span_table(spans, device)
    partials = partial_sums(problem.hidden, len(table))
    out = torch.empty((rows, WIDTH), device=device)
    flags = torch.empty(rows, dtype=torch.uint8, device=device)
    target = Target(out, flags, WIDTH, True, None)

    def run() -> torch.Tensor:
        launch_means(problem.hidden, None, table, partials, problem.weight, EPS, target)
        return out

    return run


def in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """REPEATS calls in one graph, each of the given ones in its turn."""
    return captured(lambda: [calls[i % len(calls)]() for i in range(REPEATS)])


def device_records(
    calls: dict[str, Sequence[Callable[[], Any]]],
    peer: str,
    peer_calls: Sequence[Callable[[], Any]],
    moved: int,
) -> list[dict[str, Any]]:
    """Milliseconds of kernels against those of a peer: repeated over inputs, or of one call where there is one."""
    capture, repeats = (in_turn, REPEATS) if len(peer_calls) > 1 else (lambda c: captured(c[0]), 1)
    timings = time_interleaved(
        {name: capture(c) for name, c in (calls | {peer: peer_calls}).items()}
    )
    theirs = timings.pop(peer)
    return [
        record(
            name,
            "triton",
            "ms",
            ours.p50 / repeats,
            "ms",
            device="cuda",
            peer=peer,
            peer_value=theirs.p50 / repeats,
            ratio=theirs.p50 / ours.p50,
            p20=ours.p20 / repeats,
            p80=ours.p80 / repeats,
            GB_per_s=moved * repeats / ours.p50 / 1e6,
        )
        for name, ours in timings.items()
    ]


def error_record(name: str, error: float) -> dict[str, Any]:
    return record(name, "triton", "relative_error", error, "", device="cuda")


def mean_records(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Means: the error against float64, the share of the copy's speed, and the way to bits on the host."""
    problem = problems[0]
    expected = problem.expected("mean")
    error = relative_error(problem.ours("mean"), expected)
    assert error <= 1e-6, f"mean {problem.name}: relative error {error:.1e}"
    check_bits(problem.ours("mean", "ubinary"), expected, 1e-4, problem.name)
    calls = {
        f"mean {problem.name} to {to}": [lambda p=p, to=to: p.ours("mean", to) for p in problems]
        for to in PRECISIONS
    }
    moved = problem.hidden.nbytes
    return [
        error_record(f"mean {problem.name}", error),
        *device_records(calls, COPY, copies_of(moved), moved),
        host_record(problem, "mean"),
    ]


def on_host(values: torch.Tensor) -> torch.Tensor:
    """The values in page-locked memory, where and as an encoder takes the embeddings of a batch."""
    values = values.to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    done.synchronize()
    return values


def host_record(problem: Problem, mode: str) -> dict[str, Any]:
    """Hidden states on the device to bits in host memory, calls and copies included."""
    name = f"{mode} {problem.name} to ubinary on the host"
    theirs = problem.theirs(mode)
    # Their bits are those of embeddings rounded to the dtype of hidden.
    limit = 1e-4 if problem.hidden.dtype == torch.float32 else 1e-2
    check_bits(theirs(), problem.expected(mode), limit, f"{name}, {PEER}")

    def ours() -> torch.Tensor:
        return on_host(problem.ours(mode, "ubinary"))

    check_bits(ours(), problem.expected(mode), 1e-4, name)
    calls = {"triton": ours, PEER: theirs}
    timings = time_interleaved(calls)
    return record(
        name,
        "triton",
        "ms",
        timings["triton"].p50,
        "ms",
        device="cuda",
        peer=PEER,
        peer_value=timings[PEER].p50,
        ratio=timings[PEER].p50 / timings["triton"].p50,
        bytes_per_vector=problem.ours(mode, "ubinary")[0].nbytes,
    )


def token_records(problem: Problem) -> list[dict[str, Any]]:
    """Last-token pooling against a kernel that does nothing."""
    expected = problem.expected("lasttoken")
    error = relative_error(problem.ours("lasttoken"), expected)
    assert error <= 1e-6, f"lasttoken {problem.name}: relative error {error:.1e}"
    check_bits(problem.ours("lasttoken", "ubinary"), expected, 1e-4, problem.name)
    calls = {
        f"lasttoken {problem.name} to {to}": [lambda to=to: problem.ours("lasttoken", to)]
        for to in PRECISIONS
    }
    moved = problem.sequences * WIDTH * (problem.hidden.element_size() + 4)
    return device_records(calls, EMPTY, [empty_kernel()], moved)


def span_records(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Spans that cover one long text, alone and with the whole text beside them."""
    problem = problems[0]
    total = len(problem.hidden)
    starts = torch.arange(0, total, 180, dtype=torch.int32)
    chunks = torch.stack([starts, (starts + 180).clamp(max=total)], 1)
    whole = torch.tensor([[0, total]], dtype=torch.int32)
    records = []
    for spans, kind in [(chunks, "180 tokens each"), (torch.cat([chunks, whole]), "and the whole")]:
        calls = [span_kernel(p, spans) for p in problems]
        expected = embed_output(
            problem.hidden.double(),
            problem.offsets,
            mode="mean",
            spans=spans,
            norm_weight=problem.weight.double(),
            eps=EPS,
            impl="torch",
        )[0]
        error = relative_error(calls[0](), expected)
        name = f"spans of {problem.name}: {len(chunks)} of {kind}"
        assert error <= 1e-6, f"{name}: relative error {error:.1e}"
        row_bytes = WIDTH * problem.hidden.element_size()
        moved = int((spans[:, 1] - spans[:, 0]).sum()) * row_bytes
        records += device_records({name: calls}, COPY, copies_of(moved), moved)
    return records


def run_on_cuda() -> None:
    records: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for sequences in (64, 1):
            problems = [
                Problem(sequences, 32768 // sequences, dtype, "cuda", seed)
                for seed in range(INPUTS)
            ]
            records += mean_records(problems)
            if sequences > 1:
                records += token_records(problems[0])
        records += span_records(problems)
    print_records(r | {"ratio": r["ratio"] if r["peer"] else None} for r in records)
    print(write_records(NAME, records))


def sweep() -> None:
    """Prints what a mean takes for sizes of chunks, numbers of warps, and numbers of values that a lane holds."""
    from jv5kernels.kernels import embed_output as kernels
    from jv5kernels.kernels import pool as first

    shapes = [(64, 512), (182, 180), (1, 32768)]
    for dtype in (torch.float32, torch.bfloat16):
        problems = [
            [Problem(*shape, dtype, "cuda", seed) for seed in range(INPUTS)] for shape in shapes
        ]
        expected = [same[0].expected("mean") for same in problems]
        for chunk, warps, lane_values in product((32, 64, 128), (2, 4, 8), (32, 64, 128)):
            first.CHUNK, first.LANE_VALUES = chunk, lane_values
            kernels.NUM_WARPS = first.NUM_WARPS = warps
            kernels.mean_options.cache_clear()
            first.reading.cache_clear()
            calls = {}
            for same, embeddings in zip(problems, expected, strict=True):
                error = relative_error(same[0].ours("mean"), embeddings)
                assert error <= 1e-6, f"{same[0].name}: relative error {error:.1e}"
                calls[same[0].name] = in_turn([lambda p=p: p.ours("mean", "ubinary") for p in same])
            times = time_interleaved(calls, rounds=1)
            line = "  ".join(f"{name} {time.p50 / REPEATS:.4f}" for name, time in times.items())
            print(f"chunk {chunk:3} warps {warps} lane values {lane_values:3}  {line}", flush=True)


def works(device: str) -> list[Work]:
    """CPU: means to bits, against the peers' modules."""
    return [cpu_work(sequences, 8192 // sequences) for sequences in (16, 1)]


def cpu_work(sequences: int, length: int) -> Work:
    problem = Problem(sequences, length, torch.float32, "cpu")
    signs = lambda bits: torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1))  # noqa: E731
    return Work(
        name=f"mean {problem.name} to ubinary",
        variants={
            "ours (cpp)": lambda: problem.ours("mean", "ubinary"),
            PEER: problem.theirs("mean"),
        },
        reference=lambda: (problem.expected("mean") > 0).double(),
        tolerance=0.01,
        bytes=problem.hidden.nbytes,
        peer=PEER,
        sample=signs,
    )


test_embed_output = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=f"Benchmark of {NAME}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--sweep", action="store_true", help="candidate configurations; CUDA")
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep()
    elif arguments.device == "cuda":
        run_on_cuda()
    else:
        import pytest

        sys.exit(pytest.main([__file__, "--benchmark-only", "-q"]))
