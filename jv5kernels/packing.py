"""Packing: which texts share a batch, and the ragged tensors of a batch.

Sequences are laid end to end without padding. Batches are filled longest first up to a token budget, so that the
longest text, which needs the most memory, comes first and neighbours are of similar length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Sections of the one integer buffer that is copied to the device start at multiples of 16 bytes:
# Triton compiles a kernel anew for pointers of another alignment.
_ALIGNMENT = 4


@dataclass(frozen=True)
class PackedBatch:
    """Token ids of several sequences, end to end.

    Args:
        input_ids: (T,) int32.
        positions: (T,) int32, restarting at 0 in every sequence.
        cu_seqlens: (B+1,) int32; sequence i is rows cu_seqlens[i]:cu_seqlens[i+1].
        max_seqlen: length of the longest sequence.
        rows: (B,) index of each sequence among the texts it came from.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    rows: np.ndarray

    @property
    def total_tokens(self) -> int:
        return self.input_ids.shape[0]

    def __len__(self) -> int:
        return len(self.rows)


def plan_batches(
    lengths: Sequence[int] | np.ndarray, token_budget: int, max_rows: int | None = None
) -> list[np.ndarray]:
    """Returns the batches as arrays of row indices, longest sequences first; ties keep their order.

    Args:
        lengths: tokens of each sequence, at least 1.
        token_budget: tokens a batch may hold; a sequence longer than that gets a batch of its own.
        max_rows: sequences a batch may hold (None: no limit).

    Raises:
        ValueError: a budget or row limit below 1.

    Example:
        >>> plan_batches([3, 9, 2, 5], token_budget=10)
        [array([1]), array([3, 0, 2])]
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, not {token_budget}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"batch_size must be at least 1, not {max_rows}")
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches, start, tokens = [], 0, 0
    for end, row in enumerate(order):
        full = tokens + lengths[row] > token_budget or end - start == max_rows
        if end > start and full:
            batches.append(order[start:end])
            start, tokens = end, 0
        tokens += lengths[row]
    if start < len(order):
        batches.append(order[start:])
    return batches


def pack(
    sequences: Sequence[np.ndarray], rows: np.ndarray, device: torch.device | str
) -> PackedBatch:
    """Packs ``sequences[row]`` for every row, in that order, and copies them to the device in one transfer.

    Args:
        sequences: token ids, one int32 array a text.
        rows: (B,) indices into `sequences`.
    """
    chosen = [sequences[row] for row in rows]
    lengths = np.fromiter(map(len, chosen), dtype=np.int32, count=len(chosen))
    if len(chosen) and lengths.min() < 1:
        raise ValueError(f"sequence {rows[lengths.argmin()]} has no tokens")
    cu_seqlens = np.zeros(len(chosen) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    total = int(cu_seqlens[-1])
    input_ids = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int32)
    positions = np.arange(total, dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
    on_device = _to_device([input_ids, positions, cu_seqlens], torch.device(device))
    return PackedBatch(
        input_ids=on_device[0],
        positions=on_device[1],
        cu_seqlens=on_device[2],
        max_seqlen=int(lengths.max(initial=0)),
        rows=np.asarray(rows),
    )


def _to_device(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies int32 arrays to the device through one (pinned) buffer; the copy is asynchronous on CUDA."""
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-len(array) // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, array in zip(starts, arrays, strict=True):
        buffer[start : start + len(array)] = torch.from_numpy(np.ascontiguousarray(array, np.int32))
    moved = buffer.to(device, non_blocking=True)
    return [moved[s : s + len(a)] for s, a in zip(starts, arrays, strict=True)]


def split(batch_rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a batch that did not fit into memory in two of about equal token counts, neither empty."""
    if len(batch_rows) < 2:
        raise ValueError("a batch of one sequence cannot be split")
    tokens = np.cumsum(lengths[batch_rows])
    middle = int(np.searchsorted(tokens, tokens[-1] / 2)) + 1
    middle = min(max(middle, 1), len(batch_rows) - 1)
    return batch_rows[:middle], batch_rows[middle:]
