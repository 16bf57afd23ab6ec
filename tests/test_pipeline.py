"""The pipeline: the device starts before the corpus is tokenised, threads end, flags are read only when one is set."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jv5kernels import pipeline
from jv5kernels.pipeline import Limits, Pipeline, Statistics
from jv5kernels.tokenization import TokenizedTexts

CPU = torch.device("cpu")
WINDOW = pipeline.WINDOW_CHARACTERS


class Characters:
    """Stands in for a tokenization: a token a character. Counts what it was given."""

    def __init__(self) -> None:
        self.texts = 0
        self.threads: set[str] = set()
        self.fail_at = 1 << 30
        self.slow_at = 1 << 30
        self.lock = threading.Lock()

    def encode(self, texts, *, max_length, positions):
        with self.lock:
            self.threads.add(threading.current_thread().name)
            self.texts += len(texts)
            failed, slow = (
                self.texts >= self.fail_at,
                max(map(len, texts), default=0) >= self.slow_at,
            )
        if failed:
            raise ValueError("a text that cannot be tokenised")
        if slow:
            time.sleep(0.05)
        ids = [np.frombuffer(t.encode("utf-32-le"), dtype=np.int32)[:max_length] for t in texts]
        lengths = np.array([len(text) for text in texts])
        return TokenizedTexts(ids, lengths, lengths > max_length)


def run(texts: list[str], tokenization: Characters, budget: int = 64, **options):
    """Each text's result is the sum of its tokens; returns them with the batches that were computed."""
    found = np.full(len(texts), -1, dtype=np.int64)
    batches: list[list[int]] = []

    def compute(batch):
        lengths = batch.cu_seqlens.diff()
        batches.append([tokenization.texts, *lengths.tolist()])
        sums = [part.sum() for part in batch.input_ids.long().split(lengths.tolist())]
        return torch.stack(sums)[:, None], torch.zeros(len(lengths), dtype=torch.uint8)

    def store(rows, values):
        found[rows] = values[:, 0].numpy()

    limits = Limits(1000, budget)
    whole = Pipeline(
        tokenization, CPU, options.pop("compute", compute), compute, store, limits=limits,
        statistics=Statistics(), **options,
    )  # fmt: skip
    whole.run(texts, np.arange(len(texts)))
    return found, batches


def sums(texts: list[str]) -> list[int]:
    return [sum(map(ord, text)) for text in texts]


@given(st.lists(st.integers(1, 60), max_size=60), st.booleans())
def test_every_text_once_in_its_place(lengths, inline):
    texts = [chr(97 + i % 26) * n for i, n in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pipeline, "WINDOW_CHARACTERS", 50)
        monkeypatch.setattr(pipeline, "INLINE_CHARACTERS", 1 << 20 if inline else -1)
        found, batches = run(texts, Characters())
    assert found.tolist() == sums(texts)
    assert sum(len(batch) - 1 for batch in batches) == len(texts)
    assert all(sum(batch[1:]) <= 64 for batch in batches)


def test_the_first_batch_does_not_wait_for_the_corpus(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_CHARACTERS", 100)
    texts = [f"text number {i}" for i in range(2000)]
    found, batches = run(texts, Characters())
    assert found.tolist() == sums(texts)
    # The first window and those that the threads went on with.
    assert batches[0][0] <= 100 * (1 + pipeline.AHEAD + pipeline.THREADS) / len(texts[0])


def test_batches_keep_their_order_when_windows_end_out_of_order(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_CHARACTERS", 100)
    monkeypatch.setattr(pipeline, "INLINE_CHARACTERS", 0)
    tokenization = Characters()
    tokenization.slow_at = 28
    texts = ["x" * n for n in range(1, 31)]
    found, batches = run(texts, tokenization)
    lengths = [n for batch in batches for n in batch[1:]]
    assert found.tolist() == sums(texts)
    # A quarter of a window of the shortest, the rest of that window, then all others.
    first, second, *_ = (len(window) for window in pipeline._windows(texts))
    parts = lengths[:first], lengths[first : first + second], lengths[first + second :]
    assert sum(parts[0]) <= 25 and sum(parts[0] + parts[1]) <= 100 and parts[2][0] == 30
    assert max(parts[0]) < min(parts[1]) and max(parts[1]) < min(parts[2])
    for part in parts:
        assert part == sorted(part, reverse=True)
    # While the device waits no batch does, for texts of the next window.
    ends = np.cumsum([len(batch) - 1 for batch in batches])
    assert first in ends and first + second in ends


class Converted(Sequence):
    """Token ids that note which thread asks for them."""

    def __init__(self, ids, threads: set[str]) -> None:
        self.ids = ids
        self.threads = threads

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        self.threads.add(threading.current_thread().name)
        return self.ids[index]


def test_ids_are_made_by_the_thread_that_packs_them(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_CHARACTERS", 100)
    monkeypatch.setattr(pipeline, "INLINE_CHARACTERS", 0)
    converting: set[str] = set()

    class Lazy(Characters):
        def encode(self, texts, **options):
            tokenized = super().encode(texts, **options)
            return replace(tokenized, ids=Converted(tokenized.ids, converting))

    tokenization = Lazy()
    texts = [f"text number {i}" for i in range(100)]
    found, _ = run(texts, tokenization)
    assert found.tolist() == sums(texts)
    assert converting == {threading.current_thread().name}
    # It tokenises the first window as well, while nothing else does, and leaves the others to threads.
    assert converting < tokenization.threads


def test_the_first_window_has_all_cores_to_itself(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_CHARACTERS", 100)
    monkeypatch.setattr(pipeline, "INLINE_CHARACTERS", 0)
    order: list[tuple[str, str]] = []

    class Noted(Characters):
        def encode(self, texts, **options):
            order.append(("begins", threading.current_thread().name))
            tokenized = super().encode(texts, **options)
            order.append(("ends", threading.current_thread().name))
            return tokenized

    run([f"text number {i}" for i in range(100)], Noted())
    here = threading.current_thread().name
    assert order[:2] == [("begins", here), ("ends", here)]
    assert here not in [name for _, name in order[2:]]


def test_a_few_texts_need_no_thread():
    tokenization = Characters()
    run(["a few", "short texts"], tokenization)
    assert tokenization.threads == {threading.current_thread().name}


def test_an_error_of_a_tokenising_thread_ends_the_run(monkeypatch):
    monkeypatch.setattr(pipeline, "WINDOW_CHARACTERS", 100)
    tokenization = Characters()
    tokenization.fail_at = 500
    before = threading.active_count()
    with pytest.raises(ValueError, match="a text that cannot be tokenised"):
        run([f"text number {i}" for i in range(2000)], tokenization)
    assert threading.active_count() == before


def test_short_batches_take_the_short_way():
    taken: list[int] = []

    def short(sequences):
        if sum(map(len, sequences)) > 20:
            return None
        taken.append(len(sequences))
        values = torch.tensor([[int(ids.sum())] for ids in sequences])
        return values, torch.zeros(len(sequences), dtype=torch.uint8)

    texts = ["b" * 50, "a" * 30, "c" * 5, "d" * 6]
    found, batches = run(texts, Characters(), budget=50, short=short)
    assert found.tolist() == sums(texts)
    assert taken == [] and len(batches) == 2
    found, batches = run(texts, Characters(), budget=30, short=short)
    assert found.tolist() == sums(texts)
    assert taken == [2] and [batch[1:] for batch in batches] == [[50], [30]]


class Unread(torch.Tensor):
    """Flags that may be summed up, but not copied to the host one by one."""

    def cpu(self):
        raise AssertionError("per-row flags were copied although none is set")


def test_flags_are_copied_only_when_one_is_set():
    def compute(batch):
        values = torch.ones(len(batch), 1, dtype=torch.int64)
        return values, torch.zeros(len(batch), dtype=torch.uint8).as_subclass(Unread)

    found, _ = run(["a", "bb", "ccc"], Characters(), compute=compute)
    assert found.tolist() == [1, 1, 1]


@given(st.lists(st.integers(0, 400_000), max_size=40))
def test_windows_hold_every_text_once(lengths):
    texts = [range(n) for n in lengths]
    windows = pipeline._windows(texts)
    everything = np.concatenate([*windows, np.zeros(0, np.int64)])
    assert sorted(everything.tolist()) == list(range(len(texts)))
    # The shortest come first: a quarter of a window and the rest of it, as far as there are texts so short.
    rest = np.cumsum([sum(lengths[i] + 1 for i in window) for window in windows])
    beginning = min(len(windows), max(1, int((rest[:2] <= WINDOW).sum())))
    ascending = [lengths[i] for window in windows[:beginning] for i in window[::-1]]
    descending = [lengths[i] for window in windows[beginning:] for i in window]
    assert ascending == sorted(ascending) and descending == sorted(descending, reverse=True)
    assert not descending or ascending[-1] <= descending[-1]
    if beginning == 2:
        assert rest[0] <= WINDOW / 4 < rest[0] + lengths[windows[1][-1]] + 1
    for window in windows:
        assert len(window)
        assert sum(lengths[i] + 1 for i in window[:-1]) <= WINDOW
    assert len(windows) <= sum(n + 1 for n in lengths) // WINDOW + 2
