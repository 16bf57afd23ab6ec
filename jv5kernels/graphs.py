"""CUDA graphs for short inputs: a few short texts cost their kernels and nothing else.

A handful of short texts is bound by launches: some 300 of them, each dearer to issue than to run. So the whole way from
token ids to embeddings is captured once for each of a few sizes ("buckets") and then replayed with one call. A batch is
copied into the smallest bucket that holds it. Tokens and sequences that are left over form further sequences, the first
of which takes all spare tokens while the others are empty; their rows are computed and never read. Every kernel takes
lengths from device memory, and a row of ours depends on its own sequence alone, so a replay gives what the same kernels
give without a graph.

Memory is bounded: at most MAX_GRAPHS graphs, least recently used first out, share one memory pool, which holds the
activations of the largest bucket once. One lock covers a replay from filling the bucket to copying the results out, so
threads may call at the same time; the device would run their kernels one after the other anyway.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from jv5kernels.backbone import PackedBackbone
from jv5kernels.ops.registry import OPERATORS
from jv5kernels.output import OutputFormat
from jv5kernels.packing import PackedBatch
from jv5kernels.short_layers import forward_short, takes_short_layers

__all__ = ["BUCKETS", "MAX_GRAPHS", "MAX_TOKENS", "Bucket", "CudaRecorder", "ShortInputs"]

# Implementations that neither read device memory on the host nor allocate outside torch.
CAPTURABLE = ("triton", "gluon", "cuda")
MAX_GRAPHS = 64


@dataclass(frozen=True)
class Bucket:
    """A size of batch that gets a graph: at most `tokens` tokens in at most `sequences` sequences."""

    tokens: int
    sequences: int


# By tokens, then by sequences: the first that fits is the smallest.
BUCKETS = tuple(
    Bucket(tokens, sequences)
    for tokens in (16, 32, 64, 128, 256, 512)
    for sequences in (1, 8, 32)
    if sequences <= tokens
)
MAX_TOKENS = BUCKETS[-1].tokens
_POSITIONS = np.arange(MAX_TOKENS, dtype=np.int32)

Outputs = tuple[Tensor, ...]


class Recorder(Protocol):
    """Records a function's device work once, and gives back how to repeat it."""

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        """Returns (replay, outputs); every replay overwrites the outputs."""

    def synchronize(self) -> None:
        """Waits until the caller's work on the device is done."""


class CudaRecorder:
    """Records CUDA graphs that share a memory pool.

    Args:
        device: CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, run: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            # Compiles and loads what is not yet loaded, which a capture must not do.
            run()
            self._stream.synchronize()
            # Other threads may allocate and synchronise while this one captures.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                outputs = run()
            finally:
                graph.capture_end()
        return graph.replay, outputs

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()


class _Slot:
    """One bucket's tensors with a fixed address, on the host (pinned) and on the device, and its recording."""

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        tokens, sequences = bucket.tokens, bucket.sequences + 1
        size = 2 * tokens + sequences + 1
        self.host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self._ids, self._positions, self._cu_seqlens = np.split(
            self.host.numpy(), [tokens, 2 * tokens]
        )
        self.batch = PackedBatch(
            input_ids=self.on_device[:tokens],
            positions=self.on_device[tokens : 2 * tokens],
            cu_seqlens=self.on_device[2 * tokens :],
            max_seqlen=tokens,
            rows=np.arange(sequences),
        )
        self.replay: Callable[[], object] = lambda: None
        self.outputs: Outputs = ()
        self._staging: dict[int, Tensor] = {}

    def fill(self, sequences: Sequence[np.ndarray]) -> None:
        """Copies token ids to the device; what was sent before must have arrived."""
        ids, positions, bounds = self._ids, self._positions, self._cu_seqlens
        end = 0
        for i, sequence in enumerate(sequences):
            begin, end = end, end + len(sequence)
            ids[begin:end] = sequence
            positions[begin:end] = _POSITIONS[: end - begin]
            bounds[i + 1] = end
        ids[end:] = 0
        positions[end:] = _POSITIONS[: len(positions) - end]
        bounds[len(sequences) + 1 :] = len(ids)
        self.on_device.copy_(self.host, non_blocking=True)

    def to_host(self, index: int, output: Tensor, rows: int) -> Tensor:
        """The first rows of a tensor, on their way to pinned memory of this bucket."""
        staging = self._staging.get(index)
        if staging is None or staging.shape != output.shape or staging.dtype != output.dtype:
            staging = torch.empty(
                output.shape, dtype=output.dtype, pin_memory=output.device.type == "cuda"
            )
            self._staging[index] = staging
        return staging[:rows].copy_(output[:rows], non_blocking=True)


class ShortInputs:
    """Embeds small batches by replaying recordings, which it makes on first use. Threads may share it.

    Args:
        device: where the backbones are.
        recorder: makes the recordings; default CUDA graphs.

    Example:
        >>> short = ShortInputs(torch.device("cuda", 0))
        >>> values, flags = short.run(backbone, OutputFormat("lasttoken", 1024), [ids])
    """

    def __init__(self, device: torch.device, recorder: Recorder | None = None) -> None:
        self.device = device
        self._recorder = CudaRecorder(device) if recorder is None else recorder
        self._lock = Lock()
        self._slots: OrderedDict[Any, _Slot] = OrderedDict()
        self._capturable: dict[PackedBackbone, bool] = {}
        self._no_flags = torch.zeros(max(b.sequences for b in BUCKETS), dtype=torch.uint8)

    def __len__(self) -> int:
        """Recordings that are kept."""
        return len(self._slots)

    def latest(self) -> _Slot:
        """The recording that was used last, for benches."""
        return next(reversed(self._slots.values()))

    @torch.inference_mode()
    def run(
        self,
        backbone: PackedBackbone,
        output: OutputFormat,
        sequences: Sequence[np.ndarray],
        keep_on_device: bool = False,
    ) -> tuple[Tensor, Tensor] | None:
        """Returns the embeddings of some token sequences, or None when no bucket holds them.

        Args:
            sequences: int32 token ids, none empty.
            keep_on_device: whether the embeddings stay on the device.

        Returns:
            (B, width) embeddings and (B,) uint8 flags of rows with NaN or Inf, these on the host. All work on them is
            done.
        """
        bucket = bucket_for(sum(map(len, sequences)), len(sequences))
        if bucket is None or not self.can_record(backbone):
            return None
        count = len(sequences)
        with self._lock:
            slot = self._slot(backbone, output, bucket)
            try:
                slot.fill(sequences)
                slot.replay()
                found = slot.outputs
                if output.ranges is not None:
                    found = _finish(backbone, output, found)
                values, flags, any_flag = found
                kept = values[:count].clone() if keep_on_device else slot.to_host(0, values, count)
                any_on_host = slot.to_host(1, any_flag, 1)
            finally:
                # Also after Ctrl-C: the next call may come on another stream.
                self._recorder.synchronize()
            kept = kept if keep_on_device else kept.clone()
            # Nothing but the embeddings is copied for each text, unless one of them is not finite.
            bad = flags[:count].cpu() if any_on_host.item() else self._no_flags[:count].clone()
            return kept, bad

    @torch.inference_mode()
    def record_all(self, backbone: PackedBackbone, output: OutputFormat) -> int:
        """Makes the recordings of every bucket; returns how many there are."""
        if not self.can_record(backbone):
            return 0
        with self._lock:
            for bucket in reversed(BUCKETS):
                self._slot(backbone, output, bucket)
        return len(BUCKETS)

    def can_record(self, backbone: PackedBackbone) -> bool:
        """Whether the implementations that the backbone takes leave the host out of their work."""
        if backbone not in self._capturable:
            self._capturable[backbone] = all(
                name in CAPTURABLE for name in _implementations(backbone)
            )
        return self._capturable[backbone]

    def _slot(self, backbone: PackedBackbone, output: OutputFormat, bucket: Bucket) -> _Slot:
        # Ranges come with the call and are applied after the replay, to one recording for all of them.
        key = (backbone, output.pooling if output.ranges is not None else output, bucket)
        slot = self._slots.get(key)
        if slot is None:
            slot = _Slot(bucket, self.device)
            slot.fill([np.zeros(bucket.tokens, dtype=np.int32)])
            batch = slot.batch
            slot.replay, slot.outputs = self._recorder.record(
                lambda: _compute(backbone, output, batch)
            )
            self._slots[key] = slot
            while len(self._slots) > MAX_GRAPHS:
                self._slots.popitem(last=False)
        self._slots.move_to_end(key)
        return slot


def bucket_for(tokens: int, sequences: int) -> Bucket | None:
    """The smallest bucket for a batch, or None when it is too large for all."""
    return next((b for b in BUCKETS if tokens <= b.tokens and sequences <= b.sequences), None)


def _compute(backbone: PackedBackbone, output: OutputFormat, batch: PackedBatch) -> Outputs:
    """What is recorded: all of it, or without the output step where that takes ranges."""
    if takes_short_layers(backbone, batch.total_tokens):
        pooled = forward_short(backbone, batch)
    else:
        pooled = backbone.forward_pooled(batch, output.pooling)
    return pooled if output.ranges is not None else _finish(backbone, output, pooled)


def _finish(backbone: PackedBackbone, output: OutputFormat, pooled: Outputs) -> Outputs:
    """Embeddings, the flag of each, and their maximum (1,)."""
    hidden, cu_seqlens = pooled
    eps = backbone.spec.rms_norm_eps
    values, flags = output.apply(hidden, cu_seqlens, backbone.norm_weight, eps)
    return values, flags, flags.amax().view(1)


def _implementations(backbone: PackedBackbone) -> list[str]:
    """Implementations of those operators that have some which read lengths on the host."""
    spec, device = backbone.spec, backbone.device
    q, kv = (
        torch.empty(0, heads, spec.head_dim, dtype=backbone.dtype, device=device)
        for heads in (spec.num_heads, spec.num_kv_heads)
    )
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    packed = [q, kv, kv, bounds, 0]
    return [
        *(OPERATORS[name].choose_name("auto", device) for name in ("pool", "embed_output")),
        OPERATORS["attention_varlen"].choose_name(
            backbone.attention, device, [*packed, spec.causal, 1.0]
        ),
        OPERATORS["attention_pooled"].choose_name("auto", device, [*packed, 1.0, None]),
    ]
