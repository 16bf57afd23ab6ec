"""Packing: plans hold every text once within the budget, and packed tensors unpack to what went in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jv5kernels.packing import pack, plan_batches, split

lengths_strategy = st.lists(st.integers(1, 60), min_size=0, max_size=40)


@given(lengths=lengths_strategy, budget=st.integers(1, 100), rows=st.none() | st.integers(1, 7))
def test_plan_holds_every_row_once_within_the_budget(lengths, budget, rows):
    batches = plan_batches(lengths, budget, rows)
    assert sorted(np.concatenate([[], *batches])) == list(range(len(lengths)))
    for batch in batches:
        tokens = sum(lengths[row] for row in batch)
        assert len(batch) == 1 or tokens <= budget
        assert rows is None or len(batch) <= rows
    longest_first = [lengths[row] for batch in batches for row in batch]
    assert longest_first == sorted(lengths, reverse=True)


@given(lengths=lengths_strategy, budget=st.integers(1, 100))
def test_plan_leaves_no_room_for_the_next_text(lengths, budget):
    batches = plan_batches(lengths, budget)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert sum(lengths[row] for row in batch) + lengths[following[0]] > budget


def test_plan_refuses_empty_limits():
    with pytest.raises(ValueError, match="token_budget must be at least 1, not 0"):
        plan_batches([1], 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        plan_batches([1], 5, 0)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_pack_and_unpack(lengths, seed):
    random = np.random.default_rng(seed)
    sequences = [random.integers(0, 1000, n).astype(np.int32) for n in lengths]
    rows = random.permutation(len(lengths))
    batch = pack(sequences, rows, "cpu")
    assert batch.max_seqlen == max(lengths) and batch.total_tokens == sum(lengths)
    assert batch.cu_seqlens.dtype == batch.input_ids.dtype == batch.positions.dtype == torch.int32
    bounds = batch.cu_seqlens.tolist()
    for row, start, end in zip(rows, bounds, bounds[1:], strict=False):
        assert batch.input_ids[start:end].tolist() == sequences[row].tolist()
        assert batch.positions[start:end].tolist() == list(range(lengths[row]))


def test_sections_of_the_buffer_are_aligned():
    batch = pack(
        [np.arange(5, dtype=np.int32), np.arange(2, dtype=np.int32)], np.array([0, 1]), "cpu"
    )
    base = batch.input_ids.data_ptr()
    assert all((t.data_ptr() - base) % 16 == 0 for t in (batch.positions, batch.cu_seqlens))


def test_pack_refuses_a_sequence_without_tokens():
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        pack([np.ones(2, np.int32), np.ones(0, np.int32)], np.array([0, 1]), "cpu")


@given(lengths=st.lists(st.integers(1, 50), min_size=2, max_size=20))
def test_split_halves_the_tokens_and_loses_no_row(lengths):
    rows = np.arange(len(lengths))
    first, second = split(rows, np.asarray(lengths))
    assert len(first) and len(second)
    assert np.concatenate([first, second]).tolist() == rows.tolist()
    largest = max(lengths)
    assert abs(sum(lengths[i] for i in first) - sum(lengths) / 2) <= largest


def test_split_refuses_a_single_sequence():
    with pytest.raises(ValueError, match="cannot be split"):
        split(np.array([0]), np.array([5]))


def test_models_with_fewer_weights_take_larger_batches():
    from jv5kernels.memory import memory_model, most_tokens
    from jv5kernels.synthetic.checkpoint import real_spec

    small, nano = (memory_model(real_spec(name), torch.bfloat16) for name in ("small", "nano"))
    assert most_tokens(small, "cuda") == 32768 and most_tokens(nano, "cuda") == 65536
    assert most_tokens(small, "cpu") == most_tokens(nano, "cpu") == 4096
    # The projections are what the vocabulary, the norms and the rope table leave.
    assert small.projections == 28 * (1024 * (2048 + 2048) + 2048 * 1024 + 3 * 1024 * 3072)
