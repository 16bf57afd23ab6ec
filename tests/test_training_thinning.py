"""Texts with a share of their tokens left out in training."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jv5kernels.training.student import thinned


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 48), min_size=1, max_size=8),
    st.floats(0.01, 0.9),
    st.integers(0, 2**31),
)
def test_so_many_tokens_stay_and_the_last_one_always(
    lengths: list[int], share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    width = 48
    last = torch.tensor(lengths) - 1
    position, new_last = thinned(last, width, share)
    for row, length, end in zip(position.tolist(), lengths, new_last.tolist(), strict=True):
        kept = row[: end + 1]
        assert kept == sorted(set(kept)) and kept[-1] == length - 1
        assert abs(len(kept) - length * (1 - share)) < 1 + 1e-4
        assert set(row[end + 1 :]) <= {width}


def test_every_token_is_left_out_as_often_as_another() -> None:
    torch.manual_seed(0)
    last = torch.full((20_000,), 9)
    position, _ = thinned(last, 16, 0.5)
    share = torch.bincount(position.flatten(), minlength=17)[:9] / len(last)
    assert (share - 4 / 9).abs().max() < 0.02
