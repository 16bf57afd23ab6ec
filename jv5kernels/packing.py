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
    ends = np.cumsum(lengths[order])
    batches, start, before = [], 0, 0
    while start < len(order):
        end = max(start + 1, int(np.searchsorted(ends, before + token_budget, side="right")))
        if max_rows is not None:
            end = min(end, start + max_rows)
        batches.append(order[start:end])
        start, before = end, ends[end - 1]
    return batches


def pack(
    sequences: Sequence[np.ndarray], rows: np.ndarray, device: torch.device | str
) -> PackedBatch:
    """Packs ``sequences[row]`` for every row, in that order, and copies them to the device in one transfer.

    The copy is asynchronous on CUDA, from page-locked memory. That comes from torch's cache of it, so a run allocates
    a handful of buffers and then uses them again.

    Args:
        sequences: token ids, one int32 array a text.
        rows: (B,) indices into `sequences`.
    """
    target = torch.device(device)
    chosen = [sequences[row] for row in rows]
    lengths = np.fromiter(map(len, chosen), dtype=np.int32, count=len(chosen))
    if len(chosen) and lengths.min() < 1:
        raise ValueError(f"sequence {rows[lengths.argmin()]} has no tokens")
    total = int(lengths.sum())
    second, third = _starts(total)
    size = third + len(lengths) + 1
    buffer = torch.empty(size, dtype=torch.int32, pin_memory=target.type == "cuda")
    # Through numpy: a copy with torch would record an event for pinned memory.
    array = buffer.numpy()
    cu_seqlens = array[third:]
    cu_seqlens[0] = 0
    np.cumsum(lengths, out=cu_seqlens[1:])
    if len(chosen):
        np.concatenate(chosen, out=array[:total])
    array[second : second + total] = np.arange(total, dtype=np.int32)
    array[second : second + total] -= np.repeat(cu_seqlens[:-1], lengths)
    moved = buffer.to(target, non_blocking=True)
    return PackedBatch(
        input_ids=moved[:total],
        positions=moved[second : second + total],
        cu_seqlens=moved[third:],
        max_seqlen=int(lengths.max(initial=0)),
        rows=np.asarray(rows),
    )


def _starts(tokens: int) -> tuple[int, int]:
    """Where positions and cu_seqlens begin in the buffer of a batch."""
    section = -(-tokens // _ALIGNMENT) * _ALIGNMENT
    return section, 2 * section


def split(batch_rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a batch that did not fit into memory in two of about equal token counts, neither empty."""
    if len(batch_rows) < 2:
        raise ValueError("a batch of one sequence cannot be split")
    tokens = np.cumsum(lengths[batch_rows])
    middle = int(np.searchsorted(tokens, tokens[-1] / 2)) + 1
    middle = min(max(middle, 1), len(batch_rows) - 1)
    return batch_rows[:middle], batch_rows[middle:]
