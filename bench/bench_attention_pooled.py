"""attention_pooled against torch's SDPA and flash attention with one query a sequence.

python bench/bench_attention_pooled.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_attention import NANO, SMALL, Problem, Shape, batches, draw
from harness import Work, cpu_benchmarks, main

from jv5kernels.ops import attention_pooled

NAME = "attention_pooled"


def sdpa(query: torch.Tensor, problem: Problem) -> Callable[[], torch.Tensor]:
    _, k, v = problem.batched()
    grouped = query.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(
        query[:, :, None], k, v, enable_gqa=grouped
    ).squeeze(2)


def flash_varlen(query: torch.Tensor, problem: Problem) -> Callable[[], torch.Tensor]:
    """torch's own FlashAttention-2 for packed sequences, with queries of length one."""
    queries = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    lengths = queries, problem.cu_seqlens, 1, max(problem.lengths)
    forward = torch.ops.aten._flash_attention_forward
    return lambda: forward(query, problem.k, problem.v, *lengths, 0.0, False, False)[0]


def by_sequence(query: torch.Tensor, problem: Problem) -> Callable[[], torch.Tensor]:
    grouped = query.shape[1] != problem.k.shape[1]

    def call() -> torch.Tensor:
        keys, values = (x.transpose(0, 1).split(problem.lengths, 1) for x in (problem.k, problem.v))
        rows = [
            F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=grouped)
            for q, k, v in zip(query, keys, values, strict=True)
        ]
        return torch.cat(rows).squeeze(2)

    return call


def work(shape: Shape, batch: str, lengths: list[int], device: str) -> Work:
    problem = draw(shape, lengths, device)
    last = problem.cu_seqlens[1:].long() - 1
    query, cu_seqlens, longest = problem.q[last], problem.cu_seqlens, max(lengths)
    impl = "triton" if device == "cuda" else "torch"
    is_ragged = len(set(lengths)) > 1
    peer, call = "SDPA", sdpa
    if is_ragged:
        peer, call = ("flash varlen", flash_varlen) if device == "cuda" else ("loop", by_sequence)
    return Work(
        name=f"attention_pooled {shape.name} {batch} {str(query.dtype)[6:]}",
        variants={
            f"ours ({impl})": lambda: attention_pooled(
                query, problem.k, problem.v, cu_seqlens, longest, impl=impl
            ),
            peer: call(query, problem),
        },
        reference=lambda: attention_pooled(
            query.double(),
            problem.k.double(),
            problem.v.double(),
            cu_seqlens,
            longest,
            impl="torch",
        ),
        tolerance=5e-3 if device == "cuda" else 1e-6,
        bytes=problem.k.nbytes + problem.v.nbytes + 2 * query.nbytes,
        flops=4 * shape.heads * shape.head_dim * sum(lengths),
        peer=peer,
    )


def works(device: str) -> list[Work]:
    """The last layer of small and nano over equal lengths and over lengths as real text has them."""
    return [
        work(shape, batch, lengths, device)
        for shape in (SMALL, NANO)
        for batch, lengths in batches(device)
    ]


test_attention_pooled = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    main(NAME, works, __file__)
