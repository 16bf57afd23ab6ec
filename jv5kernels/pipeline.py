"""The run of a corpus: tokenising ahead, packing, computing and copying out, each in step with the others.

While the device computes batch n, threads tokenise the texts of later batches and the results of batch n-1 are copied
to the host. Texts are taken longest first (by characters, which is known without tokenising), so batches are filled
with neighbours in length; only the very shortest come before the rest, since they are soonest tokenised. A few short
texts pass without a thread, and where the device has recordings for batches of their size, through one of those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from jv5kernels.packing import PackedBatch, pack, plan_batches, split
from jv5kernels.tokenization import Tokenization

# Characters that are tokenised at once: about one batch, so that the device starts soon and never waits for more.
WINDOW_CHARACTERS = 1 << 17
# The part of a window with which a run begins: what is tokenised while the device waits.
BEGINNING = 1 / 4
# Windows that are tokenised at the same time. The tokenizer spreads each over all cores, but not the Python after it,
# nor one long text.
THREADS = 2
# Windows that are begun before the device needs them.
AHEAD = 4
# Up to here threads would cost more than they save.
INLINE_CHARACTERS = 1 << 12
# Batches whose results may still be on their way to the host.
IN_FLIGHT = 2

# A batch's values are a tensor (B, width), or one tensor a text that stays on the device.
Values = Tensor | tuple[Tensor, ...]
BatchFunction = Callable[[PackedBatch], tuple[Values, Tensor]]
# Rows, their token ids, and how many texts were cut.
Tokenized = tuple[np.ndarray, Sequence[np.ndarray], int]
# Token ids -> values, and flags on the host; None for batches that are not short.
ShortFunction = Callable[[Sequence[np.ndarray]], tuple[Tensor, Tensor] | None]


@dataclass
class Statistics:
    """Running counts of an encoder: what it has done since it was made.

    Args:
        texts, tokens: encoded so far.
        truncated: texts that were longer than the limit.
        recomputed_rows: embeddings that came out with NaN or Inf and were computed again in fp32.
        batch_splits: batches that did not fit into memory and were cut in two.
    """

    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    recomputed_rows: int = 0
    batch_splits: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, **counts: int) -> None:
        """Adds to several counts at once; safe between threads."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def to_dict(self) -> dict[str, int]:
        with self._lock:
            return {f.name: getattr(self, f.name) for f in fields(self) if f.name[0] != "_"}


@dataclass(frozen=True)
class Limits:
    """What a batch and a text may hold.

    Args:
        max_length: tokens a text, special tokens included.
        token_budget: tokens a batch.
        max_rows: texts a batch, or None.
        on_overlong: "truncate", or "error" to refuse texts beyond max_length.
    """

    max_length: int
    token_budget: int
    max_rows: int | None = None
    on_overlong: str = "truncate"


@dataclass(frozen=True)
class _InFlight:
    """Results of one batch on their way to the host.

    Args:
        flags: (B,) uint8, which stay where they were computed.
        any_flag: () uint8, their maximum; on the host once `done` is.
    """

    rows: np.ndarray
    values: Values
    flags: Tensor
    any_flag: Tensor
    done: torch.cuda.Event | None


@dataclass(frozen=True)
class _Planned:
    """A batch that is to be computed.

    Args:
        rows: of the result.
        sequences: token ids, one array a row.
    """

    rows: np.ndarray
    sequences: list[np.ndarray]


class Pipeline:
    """Runs texts through `compute` and hands every finished row to `store`.

    Args:
        compute: batch -> (values, (B,) uint8 flags of rows with NaN or Inf), on the device.
        recompute: the same in fp32, for rows that were flagged.
        store: (rows (B,), values) -> None; called in the order of completion.
        short: does the whole work of a short batch at once; None where nothing does.
        keep_on_device: whether values stay on the device.
        progress: called with the number of texts that a finished batch held.
    """

    def __init__(
        self,
        tokenization: Tokenization,
        device: torch.device,
        compute: BatchFunction,
        recompute: BatchFunction,
        store: Callable[[np.ndarray, Any], None],
        *,
        limits: Limits,
        statistics: Statistics,
        short: ShortFunction | None = None,
        keep_on_device: bool = False,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.tokenization = tokenization
        self.device = device
        self.compute = compute
        self.recompute = recompute
        self.store = store
        self.limits = limits
        self.statistics = statistics
        self.short = short
        self.keep_on_device = keep_on_device
        self.progress = progress
        self._ids: dict[int, np.ndarray] = {}
        self._in_flight: deque[_InFlight] = deque()

    def run(self, texts: Sequence[str], rows: np.ndarray) -> int:
        """Encodes ``texts[i]`` as row ``rows[i]``; returns how many of them were truncated."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            found, ids, truncated = self._tokenize(texts, rows, np.arange(len(texts)))
            self._ids.update(zip(found.tolist(), ids, strict=True))
            for planned in self._plan(np.asarray(rows)):
                self._run_batch(planned)
        else:
            truncated = 0
            for planned, cut in self._planned_ahead(texts, rows):
                truncated += cut
                self._run_batch(planned)
        while self._in_flight:
            self._finish()
        return truncated

    def _planned_ahead(
        self, texts: Sequence[str], rows: np.ndarray
    ) -> Iterator[tuple[_Planned, int]]:
        """Batches, each with the number of texts cut since the one before; threads tokenise for the next ones."""
        windows = _windows(texts)
        pending: np.ndarray = np.zeros(0, dtype=np.int64)
        threads = ThreadPoolExecutor(THREADS, thread_name_prefix="jv5-tokenize")
        try:
            tokenized = _ahead(threads, partial(self._tokenize, texts, rows), windows)
            for index, (found, ids, cut) in enumerate(tokenized):
                self._ids.update(zip(found.tolist(), ids, strict=True))
                batches = self._plan(np.concatenate([pending, found]))
                if 1 < index < len(windows) - 1:
                    # The last batch may be part filled: it waits for the texts of the next window. Not at the
                    # beginning, when the device waits.
                    pending = batches.pop().rows
                for batch in batches:
                    yield batch, cut
                    cut = 0
        finally:
            threads.shutdown(cancel_futures=True)

    def _plan(self, rows: np.ndarray) -> list[_Planned]:
        sequences = [self._ids[row] for row in rows.tolist()]
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(rows))
        plan = plan_batches(lengths, self.limits.token_budget, self.limits.max_rows)
        return [_Planned(rows[batch], [sequences[i] for i in batch]) for batch in plan]

    def _tokenize(self, texts: Sequence[str], rows: np.ndarray, window: np.ndarray) -> Tokenized:
        chosen = [texts[i] for i in window]
        tokenized = self.tokenization.encode(
            chosen, max_length=self.limits.max_length, positions=rows[window]
        )
        cut = np.flatnonzero(tokenized.truncated)
        if len(cut) and self.limits.on_overlong == "error":
            raise ValueError(
                f"text {int(rows[window[cut[0]]])} is longer than max_seq_length={self.limits.max_length} "
                "tokens and on_overlong='error'; 'truncate' would cut it"
            )
        tokens = int(np.minimum(tokenized.lengths, self.limits.max_length).sum())
        self.statistics.add(texts=len(window), tokens=tokens, truncated=len(cut))
        return rows[window], tokenized.ids, len(cut)

    def _run_batch(self, batch: _Planned) -> None:
        """Computes a batch; one that does not fit into memory is cut in two until it does."""
        try:
            if self._run_short(batch):
                return
            order = np.arange(len(batch.rows))
            values, flags = self.compute(pack(batch.sequences, order, self.device))
        except torch.OutOfMemoryError as error:
            reason = str(error)
        else:
            self._send(batch.rows, values, flags)
            return
        # Outside the except block, so that the failed run's tensors are no longer held by its traceback.
        torch.cuda.empty_cache()
        lengths = np.array([len(ids) for ids in batch.sequences])
        if len(lengths) == 1:
            raise torch.OutOfMemoryError(
                f"text {int(batch.rows[0])} with {lengths[0]} tokens does not fit into the memory of {self.device} "
                f"even alone; a smaller max_seq_length would cut it. ({reason})"
            )
        self.statistics.add(batch_splits=1)
        for half in split(np.arange(len(lengths)), lengths):
            self._run_batch(_Planned(batch.rows[half], [batch.sequences[i] for i in half]))

    def _run_short(self, batch: _Planned) -> bool:
        found = None if self.short is None else self.short(batch.sequences)
        if found is not None:
            values, flags = found
            self._in_flight.append(_InFlight(batch.rows, values, flags, flags.amax(), None))
        return found is not None

    def _send(self, rows: np.ndarray, values: Values, flags: Tensor) -> None:
        done = None
        any_flag = flags.amax()
        if self.device.type == "cuda":
            any_flag = any_flag.to("cpu", non_blocking=True)
            if not self.keep_on_device and isinstance(values, Tensor):
                # To page-locked memory from torch's cache of it.
                values = values.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
        self._in_flight.append(_InFlight(rows, values, flags, any_flag, done))
        while len(self._in_flight) > IN_FLIGHT:
            self._finish()

    def _finish(self) -> None:
        """Waits for the oldest batch in flight, mends rows that are not finite, and stores it."""
        batch = self._in_flight.popleft()
        if batch.done is not None:
            batch.done.synchronize()
        values: Any = batch.values
        if batch.any_flag.item():
            values = values.clone() if isinstance(values, Tensor) else list(values)
            for index in np.flatnonzero(batch.flags.cpu().numpy()):
                values[index] = self._mend(int(batch.rows[index])).to(values[index].device)
        self.store(batch.rows, values)
        for row in batch.rows.tolist():
            del self._ids[row]
        self.progress(len(batch.rows))

    def _mend(self, row: int) -> Tensor:
        """Computes one row again in fp32.

        Raises:
            FloatingPointError: it is not finite in fp32 either.
        """
        values, flags = self.recompute(pack([self._ids[row]], np.zeros(1, np.int64), self.device))
        if bool(flags[0]):
            raise FloatingPointError(
                f"the embedding of text {row} holds NaN or Inf, also when computed in float32: "
                "the weights or the text's activations overflow"
            )
        self.statistics.add(recomputed_rows=1)
        return values[0]


def _windows(texts: Sequence[str]) -> list[np.ndarray]:
    """Indices of the texts by falling length in characters, cut into windows of WINDOW_CHARACTERS.

    The window of the shortest comes first, in two parts: all cores tokenise its many texts at once, and while the
    device computes them the longest are tokenised, each by one core.
    """
    characters = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    if not len(characters):
        return []
    order = np.argsort(-characters, kind="stable")
    to_the_end = np.cumsum(characters[order][::-1] + 1)[::-1]
    window = (to_the_end - 1) // WINDOW_CHARACTERS
    window[to_the_end <= BEGINNING * WINDOW_CHARACTERS] = -1
    parts = np.split(order, np.flatnonzero(np.diff(window)) + 1)
    beginning = max(1, int((np.unique(window) <= 0).sum()))
    return [*parts[: -beginning - 1 : -1], *parts[:-beginning]]


def _ahead(
    threads: Executor, function: Callable[[np.ndarray], Tokenized], items: Sequence[np.ndarray]
) -> Iterator[Tokenized]:
    """The function's results in order, AHEAD of which are begun before they are asked for.

    The first one has all cores to itself: the device waits for it.
    """
    if not items:
        return
    first, *others = items
    found = function(first)
    begun = deque(threads.submit(function, item) for item in others[:AHEAD])
    yield found
    for item in others[AHEAD:]:
        begun.append(threads.submit(function, item))
        yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


@contextmanager
def progress_bar(texts: int, show: bool) -> Iterator[Callable[[int], object]]:
    """Counts finished texts on a bar; without one nothing is set up, which a short call would notice."""
    if not show:
        yield lambda count: None
        return
    with tqdm(total=texts, unit="text") as bar:
        yield bar.update
