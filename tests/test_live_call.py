"""Which calls of a patched model go to the original forward, and that these come out exactly as without the patch."""

from __future__ import annotations

import warnings

import pytest
import torch
from live_models import hidden, qwen3, ragged_batch
from torch import Tensor

from jv5kernels.patching import patch

LENGTHS = [9, 17, 1, 6, 17]


def holes(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch["attention_mask"].clone()
    mask[0, 4] = 0
    return {**batch, "attention_mask": mask}


def four_dimensional(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = batch["attention_mask"].bool()
    return {**batch, "attention_mask": (mask[:, None, None, :] & mask[:, None, :, None])}


REFUSED = {
    "output_attentions": lambda b: {**b, "output_attentions": True},
    "output_hidden_states": lambda b: {**b, "output_hidden_states": True},
    "argument position_ids": lambda b: {
        **b,
        "position_ids": torch.arange(b["input_ids"].shape[1]).expand_as(b["input_ids"]) + 3,
    },
    "attention_mask with holes": holes,
    "attention_mask of shape": four_dimensional,
    "argument is_causal": lambda b: {**b, "is_causal": True},
    "attention_mask without any token": lambda b: {
        **b,
        "attention_mask": torch.zeros_like(b["attention_mask"]),
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_calls_that_go_to_the_original(reason: str) -> None:
    model = qwen3(attn_implementation="eager")
    inputs = REFUSED[reason](ragged_batch([7, 5], "right"))
    expected = hidden(model, **inputs)
    with patch(model) as report:
        actual = hidden(model, **inputs)
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert report.packed == 0 and report.fallbacks.total() == 1
    assert next(iter(report.fallbacks)).startswith(reason)


def test_caches_go_to_the_original() -> None:
    model, batch = qwen3(), ragged_batch([7, 7], "right")
    with torch.inference_mode(), patch(model) as report:
        first = model(batch["input_ids"], use_cache=True)
        assert first.past_key_values.get_seq_length() == 7
        again = model(batch["input_ids"][:, :1], past_key_values=first.past_key_values)
        assert again.last_hidden_state.shape[1] == 1
    assert dict(report.fallbacks) == {"use_cache=True": 1, "argument past_key_values": 1}


def test_wrong_calls_raise_what_the_original_raises() -> None:
    model = qwen3()
    with patch(model), torch.inference_mode():
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model()
        with pytest.raises(RuntimeError, match="0 elements"):
            model(torch.zeros(0, 3, dtype=torch.long))
        with pytest.raises(TypeError):
            model(
                torch.zeros(1, 2, dtype=torch.long), input_ids=torch.zeros(1, 2, dtype=torch.long)
            )


def test_config_that_asks_for_hidden_states() -> None:
    model = qwen3(output_hidden_states=True)
    with patch(model) as report, torch.inference_mode():
        assert len(model(**ragged_batch([3], "right")).hidden_states) == 4
    assert dict(report.fallbacks) == {"config.output_hidden_states": 1}


def test_captured_once_is_packed_again() -> None:
    """Transformers leaves its hooks on the layers after the first output_hidden_states."""
    model, batch = qwen3(), ragged_batch(LENGTHS, "right")
    with patch(model) as report, torch.inference_mode():
        assert len(model(**batch, output_hidden_states=True).hidden_states) == 4
        model(**batch)
    assert (report.packed, report.fallbacks.total()) == (1, 1)


def test_training_and_gradients_go_to_the_original() -> None:
    model, batch = qwen3(), ragged_batch([4, 2], "right")
    report = patch(model)
    with pytest.warns(UserWarning, match="torch.inference_mode"):
        model(**batch).last_hidden_state.sum().backward()
    assert model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)  # warned once
    model.train()
    hidden(model, **batch)
    model.eval().requires_grad_(False)
    model(**batch)  # gradients are recorded, but nothing asks for them
    assert report.packed == 1
    assert dict(report.fallbacks) == {
        "a parameter requires grad": 2,
        "the model is in training mode": 1,
    }


def test_gradients_towards_inputs_go_to_the_original() -> None:
    model = qwen3().requires_grad_(False)
    embeddings = torch.randn(1, 4, 48, requires_grad=True)
    with patch(model) as report, pytest.warns(UserWarning, match="inputs_embeds requires grad"):
        model(inputs_embeds=embeddings).last_hidden_state.sum().backward()
    assert embeddings.grad is not None and report.packed == 0


@pytest.mark.parametrize("where", ["layers.1", "layers.0.mlp.down_proj", "norm", "embed_tokens"])
def test_forward_hooks_are_honoured(where: str) -> None:
    model, batch, seen = qwen3(), ragged_batch(LENGTHS, "right"), []
    report = patch(model)
    handle = model.get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    hidden(model, **batch)
    handle.remove()
    hidden(model, **batch)
    assert seen == [1]
    assert (report.packed, report.fallbacks.total()) == (1, 1)


def test_hooks_on_the_backbone_itself_still_run() -> None:
    model, seen = qwen3(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    with patch(model) as report:
        hidden(model, **ragged_batch([2], "right"))
    assert seen == [1] and report.packed == 1


def test_a_replaced_forward_inside_is_honoured() -> None:
    model, batch = qwen3(), ragged_batch(LENGTHS, "right")
    norm = model.layers[2].input_layernorm
    norm.forward = lambda x: torch.zeros_like(x)
    expected = hidden(model, **batch)
    with patch(model) as report:
        assert torch.equal(hidden(model, **batch), expected)
    assert report.packed == 0


def test_autocast_goes_to_the_original() -> None:
    model, batch = qwen3(), ragged_batch(LENGTHS, "right")
    with torch.autocast("cpu", torch.bfloat16):
        expected = hidden(model, **batch)
        with patch(model) as report:
            assert torch.equal(hidden(model, **batch), expected)
    assert dict(report.fallbacks) == {"autocast": 1}


def test_float64_goes_to_the_original() -> None:
    model, batch = qwen3().double(), ragged_batch(LENGTHS, "right")
    expected = hidden(model, **batch)
    with patch(model) as report:
        assert torch.equal(hidden(model, **batch), expected)
    assert dict(report.fallbacks) == {"weights of torch.float64 on cpu": 1}
