"""rope_table: the bits of Transformers' rotary embedding, and its distance from float64."""

from __future__ import annotations

import pytest
import torch

from jv5kernels.ops import rope_table


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 3.5e6), (64, 250000.0), (32, 10000.0)])
def test_rope_table_has_the_bits_of_transformers(head_dim, theta):
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = Qwen3Config(
        head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    positions = torch.arange(33000)
    cos, sin = Qwen3RotaryEmbedding(config)(torch.ones(1), positions[None])
    half = head_dim // 2
    expected = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
    assert torch.equal(rope_table(33000, head_dim, theta, "cpu"), expected)


def test_rope_table_is_close_to_float64():
    table = rope_table(4096, 64, 10000.0, "cpu").double()
    angles = torch.outer(
        torch.arange(4096.0).double(), 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    )
    # Angles up to 4095 in fp32 are off by 4095 · 2^-24 and as much again for the frequency.
    torch.testing.assert_close(
        table, torch.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=8e-4
    )


def test_errors_of_the_table():
    with pytest.raises(ValueError, match="max_positions must be at least 1, not 0"):
        rope_table(0, 32, 10000.0, "cpu")
    with pytest.raises(ValueError, match="head_dim must be even and at least 2, not 7"):
        rope_table(8, 7, 10000.0, "cpu")
    with pytest.raises(ValueError, match="rope_theta must be positive"):
        rope_table(8, 32, 0.0, "cpu")


def test_example_of_the_docstring():
    expected = torch.tensor([[1.0, 0.0], [0.5403, 0.8415]])
    torch.testing.assert_close(rope_table(2, 2, 10000.0, "cpu"), expected, rtol=0, atol=5e-5)
