"""A rotated model: the same cosines, turned embeddings, in the same layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3Model

from jv5kernels import FastEncoder
from jv5kernels.synthetic.checkpoint import write_checkpoint
from jv5kernels.training.rotation import rotate_base, rotate_model, rotation


@pytest.mark.parametrize("angle", [0.0, 0.7, 5.0])
def test_a_rotation_is_orthogonal_and_the_same_each_time(angle: float) -> None:
    turn = rotation(48, angle)
    torch.testing.assert_close(turn @ turn.T, torch.eye(48, dtype=torch.float64))
    assert torch.equal(turn, rotation(48, angle))
    assert torch.equal(turn, torch.eye(48, dtype=torch.float64)) == (angle == 0)


def test_the_output_is_turned_exactly() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=64,
        vocab_size=99,
        rms_norm_eps=1e-6,
    )
    model, turned = Qwen3Model(config).double().eval(), Qwen3Model(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        model.norm.weight.fill_(0.8)  # the one that a rotation cannot keep when it differs
    turn = rotation(48, 1.0)
    turned.load_state_dict(rotate_base(model.state_dict(), turn))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = model(ids).last_hidden_state @ turn
        # Qwen3's norms compute in float32.
        torch.testing.assert_close(turned(ids).last_hidden_state, expected, rtol=0, atol=5e-6)


def test_a_model_keeps_its_cosines_with_every_adapter(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, dtype=torch.float32)
    weights = load_file(source / "model.safetensors")
    out = rotate_model(source, tmp_path / "out", 1.0)
    turn = rotation(weights["norm.weight"].shape[0], 1.0).float().numpy()
    weight = weights["norm.weight"].float().numpy()
    before, after = FastEncoder(source, device="cpu"), FastEncoder(out, device="cpu")
    assert before.tasks == after.tasks and len(before.tasks) == 4
    texts = ["a text", "another one, of some more words", "die dritte ist deutsch"]
    for task in before.tasks:
        plain = before.encode_document(texts, task=task) / weight
        expected = plain @ turn
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(after.encode_document(texts, task=task), expected, atol=2e-5)
