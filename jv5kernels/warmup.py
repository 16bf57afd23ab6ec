"""Warming up: everything that a first call would otherwise wait for.

Triton compiles a kernel anew for another dtype, for other constants of the model, and for pointers and strides of
another alignment; lengths and counts take no part in it (`do_not_specialize`). So a few batches meet every variant that
traffic can bring. What was compiled lies in Triton's cache on disk (TRITON_CACHE_DIR, default ~/.triton/cache), where
the next process finds it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jv5kernels.backbone import PackedBackbone
from jv5kernels.graphs import ShortInputs
from jv5kernels.output import OutputFormat, embed_batch
from jv5kernels.packing import pack

__all__ = ["WarmupReport", "warm_lengths", "warm_up"]

# Tokens of a text in a full batch of texts of middling length.
MIDDLING_LENGTH = 512


@dataclass(frozen=True)
class WarmupReport:
    """What a warm-up did.

    Args:
        seconds: in all.
        recordings: CUDA graphs that are ready for short inputs.
        bytes: device memory that it took and keeps, graphs and reserve for large batches included.
    """

    seconds: float
    recordings: int
    bytes: int


def warm_lengths(max_length: int, token_budget: int) -> list[list[int]]:
    """Lengths of the sequences of each batch that warms a backbone up.

    One token; odd lengths together; the longest text alone, which takes every branch for long sequences; and a full
    batch, after which torch holds the memory for it.

    Example:
        >>> warm_lengths(8192, 1024)
        [[1], [3, 17], [8192], [512, 512]]
    """
    middling = min(MIDDLING_LENGTH, max_length, token_budget)
    return [[1], [min(3, max_length), min(17, max_length)], [max_length]] + [
        [middling] * (token_budget // middling)
    ]


@torch.inference_mode()
def warm_up(
    backbones: Sequence[PackedBackbone],
    output: OutputFormat,
    lengths: Sequence[Sequence[int]],
    short: ShortInputs | None,
) -> WarmupReport:
    """Runs batches of these lengths through every backbone, and makes the recordings for short inputs."""
    start = time.perf_counter()
    recordings = before = after = 0
    device = backbones[0].device
    if device.type == "cuda":
        before = torch.cuda.memory_reserved(device)
    for backbone in backbones:
        for batch in lengths:
            ids = [np.zeros(length, dtype=np.int32) for length in batch]
            values, flags = embed_batch(output, backbone, pack(ids, np.arange(len(ids)), device))
            values.to("cpu", non_blocking=True)
            flags.to("cpu")
        if short is not None:
            recordings += short.record_all(backbone, output)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_reserved(device)
    return WarmupReport(time.perf_counter() - start, recordings, max(0, after - before))
