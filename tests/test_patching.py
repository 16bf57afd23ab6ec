"""patch and unpatch: the same numbers as the original forward, and nothing else changed.

fp32 on a CPU: hidden states are of size 1, 3 layers, so 1e-5 leaves room for the order of sums and for nothing else.
"""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import (
    TOLERANCE,
    VOCABULARY,
    check_tokens,
    eurobert,
    hidden,
    qwen3,
    ragged_batch,
    storage_bytes,
    with_adapters,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jv5kernels.patching import PatchReport, patch, unpatch

BACKBONES = pytest.mark.parametrize("make", [qwen3, eurobert])
LENGTHS = [9, 17, 1, 6, 17]


@BACKBONES
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [1, 1], [5, 5], [0, 4, 0]])
def test_padded_batches(make: Any, side: str, lengths: list[int]) -> None:
    model, batch = make(), ragged_batch(lengths, side)
    expected = hidden(model, **batch)
    with patch(model) as report:
        actual = hidden(model, **batch)
    check_tokens(actual, expected, batch["attention_mask"])
    assert report.packed == 1 and not report.fallbacks


@BACKBONES
@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32, None])
def test_mask_kinds_and_no_mask(make: Any, kind: torch.dtype | None) -> None:
    model, batch = make(), ragged_batch(LENGTHS, "right")
    mask = batch["attention_mask"] if kind is not None else None
    batch["attention_mask"] = mask.to(kind) if mask is not None else None
    expected = hidden(model, **batch)
    with patch(model) as report:
        check_tokens(hidden(model, **batch), expected, mask)
    assert report.packed == 1


@BACKBONES
def test_padding_is_never_read(make: Any) -> None:
    model, batch = make(), ragged_batch(LENGTHS, "right")
    with patch(model):
        first = hidden(model, **batch)
        batch["input_ids"][batch["attention_mask"] == 0] = 5
        assert torch.equal(first, hidden(model, **batch))


@BACKBONES
def test_output_class_and_tuple(make: Any) -> None:
    model, batch = make(), ragged_batch([3, 2], "right")
    with torch.inference_mode():
        expected, as_tuple = model(**batch, use_cache=False), model(**batch, return_dict=False)
        patch(model)
        actual = model(**batch, use_cache=False)
        found = model(**batch, return_dict=False)
        positional = model(batch["input_ids"], batch["attention_mask"])
    assert type(actual) is type(expected) and list(actual.keys()) == list(expected.keys())
    assert type(found) is type(as_tuple) is tuple
    assert torch.equal(found[0], actual[0]) and torch.equal(positional[0], actual[0])
    assert getattr(actual, "past_key_values", None) is None
    assert model.forward.report.packed == 3


@BACKBONES
def test_inputs_embeds(make: Any) -> None:
    model, batch = make(), ragged_batch(LENGTHS, "left")
    embedded = {"inputs_embeds": model.embed_tokens(batch.pop("input_ids")).detach(), **batch}
    expected = hidden(model, **embedded)
    with patch(model) as report:
        check_tokens(hidden(model, **embedded), expected, batch["attention_mask"])
    assert report.packed == 1


def test_bidirectional_qwen3() -> None:
    model, batch = qwen3(is_causal=False), ragged_batch(LENGTHS, "right")
    expected = hidden(model, **batch)
    assert (expected - hidden(qwen3(), **batch)).abs().max() > 0.1
    with patch(model) as report:
        check_tokens(hidden(model, **batch), expected, batch["attention_mask"])
        model.config.is_causal = True
        hidden(model, **batch)
    assert not report.spec.causal
    assert list(report.fallbacks) == ["config.is_causal has changed since patching"]


@BACKBONES
def test_weights_are_shared_and_restored(make: Any) -> None:
    model, batch = make(), ragged_batch(LENGTHS, "right")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size, expected = storage_bytes(model), hidden(model, **batch)
    report = patch(model)
    attention, mlp = model.layers[1].self_attn, model.layers[1].mlp
    for group in (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [mlp.gate_proj, mlp.up_proj],
    ):
        assert len({linear.weight.untyped_storage().data_ptr() for linear in group}) == 1
    assert storage_bytes(model) == size
    assert patch(model) is report
    check_state(model, before)
    unpatch(model)
    assert "forward" not in model.__dict__
    assert storage_bytes(model) == size
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    check_state(model, before)
    assert torch.equal(hidden(model, **batch), expected)
    unpatch(model)  # nothing to undo


def check_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_another_model_of_the_class_is_untouched() -> None:
    model, other, batch = qwen3(), qwen3(), ragged_batch(LENGTHS, "right")
    expected, functions = hidden(other, **batch), dict(vars(type(other)))
    with patch(model):
        assert torch.equal(hidden(other, **batch), expected)
        assert dict(vars(type(other))) == functions and "forward" not in other.__dict__


def test_training_goes_on_after_unpatch() -> None:
    """Patched and called under inference mode, a parameter must not become an inference tensor."""
    model, batch = qwen3(), ragged_batch(LENGTHS, "right")
    with torch.inference_mode():
        report = patch(model)
    model.to(torch.bfloat16).to(torch.float32)
    hidden(model, **batch)
    with torch.inference_mode():
        unpatch(model)
    assert report.packed == 1
    model(**batch).last_hidden_state.sum().backward()
    assert not any(p.is_inference() or p.grad is None for p in model.parameters())


def test_moved_or_replaced_weights_are_fused_again() -> None:
    model, batch = qwen3(), ragged_batch(LENGTHS, "right")
    report, size = patch(model), storage_bytes(model)
    model.to(torch.bfloat16)
    assert hidden(model, **batch).dtype == torch.bfloat16
    assert storage_bytes(model) == size // 2
    model.to(torch.float32)
    fresh = qwen3()
    with torch.no_grad():
        fresh.layers[1].self_attn.k_proj.weight.mul_(-1.5)
    expected = hidden(fresh, **batch)
    for assign in (False, True):
        model.load_state_dict({n: t.clone() for n, t in fresh.state_dict().items()}, assign=assign)
        check_tokens(hidden(model, **batch), expected, batch["attention_mask"])
        assert storage_bytes(model) == size
    model.layers[0] = copy.deepcopy(fresh.layers[0])
    check_tokens(hidden(model, **batch), expected, batch["attention_mask"])
    assert report.packed == 4 and not report.fallbacks


def test_save_and_load(tmp_path: Path) -> None:
    model = qwen3()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with patch(model):
        model.save_pretrained(tmp_path / "pretrained")
        save_file(model.state_dict(), tmp_path / "state.safetensors")
        torch.save(model.state_dict(), tmp_path / "state.pt")
    check_state(type(model).from_pretrained(tmp_path / "pretrained"), before)
    for state in (load_file(tmp_path / "state.safetensors"), torch.load(tmp_path / "state.pt")):
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_on_their_own(clone: Any) -> None:
    model, batch = qwen3(), ragged_batch(LENGTHS, "right")
    patch(model)
    expected = hidden(model, **batch)
    twin = clone(model)
    assert twin.forward.inner is twin and patch(twin) is not patch(model)
    assert torch.equal(hidden(twin, **batch), expected)
    unpatch(twin)
    assert "forward" in model.__dict__ and "forward" not in twin.__dict__
    assert model.forward.report.packed == 1


def test_context_manager_undoes_on_an_exception_and_nests() -> None:
    model = qwen3()
    with pytest.raises(RuntimeError, match="inside"), patch(model):
        raise RuntimeError("inside")
    assert "forward" not in model.__dict__
    with patch(model) as outer:
        with patch(model) as inner:
            assert inner is outer
        assert "forward" in model.__dict__
    assert "forward" not in model.__dict__


def test_compiled_models_use_the_original() -> None:
    model, batch = qwen3(), ragged_batch(LENGTHS, "right")
    expected = hidden(model, **batch)
    patch(model)
    compiled = torch.compile(model, backend="eager")
    assert (hidden(compiled, **batch) - expected).abs().max() < TOLERANCE


def test_threads() -> None:
    model = qwen3()
    batches = [ragged_batch([n, 12, n + 2], side) for n in (1, 4, 7) for side in ("left", "right")]
    patch(model)
    expected = [hidden(model, **batch) for batch in batches]
    model.to(torch.bfloat16).to(torch.float32)  # so that the threads meet while weights are fused
    unpatch(model)
    report = patch(model)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: hidden(model, **batches[i % 6]), range(48)))
    for i, result in enumerate(results):
        assert (result - expected[i % 6]).abs().max() < 0.2  # bf16 rounded the weights once
        assert torch.equal(result, results[i % 6])
    assert report.packed == 48


def test_report_is_readable() -> None:
    model = with_adapters(qwen3(), mixed=True)
    with patch(model) as report:
        hidden(model, **ragged_batch([3], "right"))
        hidden(model, **ragged_batch([3], "right"), output_hidden_states=True)
        text = str(report)
    assert isinstance(report, PatchReport) and report.path == "base_model.model"
    for part in (
        "base_model.model (Qwen3Model)",
        "3 layers",
        "q/k norms",
        "1 packed",
        "1 x output_",
    ):
        assert part in text


def test_unknown_models_are_refused() -> None:
    with pytest.raises(TypeError, match="embed_tokens, layers, norm"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="not str"):
        patch("model")  # type: ignore[arg-type]
    model = qwen3()
    model.forward = lambda: None
    with pytest.raises(ValueError, match="replaced already"):
        patch(model)


def test_ids_beyond_the_vocabulary_raise_as_before() -> None:
    model = qwen3()
    with patch(model), pytest.raises(IndexError):
        hidden(model, input_ids=torch.full((1, 3), VOCABULARY))


def test_longer_than_the_stated_positions() -> None:
    model, batch = qwen3(max_position_embeddings=8), ragged_batch([20, 5], "left")
    expected = hidden(model, **batch)
    with patch(model) as report:
        check_tokens(hidden(model, **batch), expected, batch["attention_mask"])
    assert report.packed == 1
