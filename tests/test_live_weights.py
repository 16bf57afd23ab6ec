"""Weights of a live model: shared, fused again when they come apart, and LoRA layers read as PEFT applies them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_models import (
    TASKS,
    check_tokens,
    eurobert,
    hidden,
    lora_config,
    qwen3,
    ragged_batch,
    with_adapters,
)
from torch import Tensor

from jv5kernels.patching import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")

BACKBONES = pytest.mark.parametrize("make", [qwen3, eurobert])
LENGTHS = [9, 17, 1, 6, 17]


@BACKBONES
@pytest.mark.parametrize("mixed", [True, False])
def test_adapters_follow_set_adapter(make: Any, mixed: bool) -> None:
    model, batch = with_adapters(make(), mixed=mixed), ragged_batch(LENGTHS, "right")

    def outputs() -> list[Tensor]:
        found = []
        for task in TASKS:
            model.set_adapter(task)
            found.append(hidden(model, **batch))
        with model.disable_adapter():
            found.append(hidden(model, **batch))
        return found

    expected = outputs()
    assert min((a - b).abs().max() for a, b in zip(expected, expected[1:], strict=False)) > 0.1
    with patch(model) as report:
        for actual, one in zip(outputs(), expected, strict=True):
            check_tokens(actual, one, batch["attention_mask"], tol=3e-5)
    assert report.packed == 5 and not report.fallbacks


def test_several_adapters_at_once_and_their_scaling() -> None:
    model, batch = with_adapters(qwen3(), mixed=True), ragged_batch(LENGTHS, "right")
    model.set_adapter(list(TASKS[:3]))
    model.base_model.model.layers[1].mlp.up_proj.scaling["clustering"] = -3.0
    expected = hidden(model, **batch)
    with patch(model) as report:
        check_tokens(hidden(model, **batch), expected, batch["attention_mask"], tol=5e-5)
    assert report.packed == 1


def test_merged_and_unloaded_adapters() -> None:
    model, batch = with_adapters(qwen3(), mixed=False), ragged_batch(LENGTHS, "right")
    active = hidden(model, **batch)
    with model.disable_adapter():
        base = hidden(model, **batch)
    report = patch(model)
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        check_tokens(hidden(model, **batch), active, batch["attention_mask"], tol=5e-5)
        model.unmerge_adapter()
    model.merge_adapter()
    with model.disable_adapter():
        assert (hidden(model, **batch) - base).abs()[batch["attention_mask"] == 1].max() < 5e-5
    assert "merged and disabled" in next(iter(report.fallbacks))
    model.merge_adapter()
    plain = model.merge_and_unload()
    check_tokens(hidden(plain, **batch), active, batch["attention_mask"], tol=5e-5)
    assert report.packed == 3 and report.fallbacks.total() == 1


def test_adapters_added_after_patching() -> None:
    backbone, batch = qwen3(), ragged_batch(LENGTHS, "right")
    report = patch(backbone)
    model = with_adapters(backbone, mixed=False)
    actual = hidden(model, **batch)
    unpatch(model)
    check_tokens(actual, hidden(model, **batch), batch["attention_mask"], tol=3e-5)
    assert report.packed == 1


def test_adapter_names_go_to_the_original() -> None:
    model, batch = with_adapters(qwen3(), mixed=False), ragged_batch([4, 6, 2], "right")
    names = ["retrieval", "__base__", "clustering"]
    expected = hidden(model, **batch, adapter_names=names)
    with patch(model) as report:
        assert torch.equal(hidden(model, **batch, adapter_names=names), expected)
    assert report.packed == 0 and "forward hook" in next(iter(report.fallbacks))


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}])
def test_lora_variants_go_to_the_original(variant: dict[str, bool]) -> None:
    model, batch = with_adapters(qwen3(), mixed=False), ragged_batch(LENGTHS, "right")
    report = patch(model)
    model.add_adapter("other", lora_config(**variant))
    hidden(model, **batch)
    model.set_adapter("other")
    model.eval()
    actual = hidden(model, **batch)
    assert (report.packed, report.fallbacks.total()) == (1, 1)
    unpatch(model)
    assert torch.equal(actual, hidden(model, **batch))
    with patch(model) as report:
        assert any("at present all calls" in line for line in report.kept)


def test_bfloat16_keeps_the_adapters_dtype() -> None:
    """As PEFT: terms are computed in the adapter's dtype, fp32 by default, and added."""
    model = with_adapters(qwen3(), mixed=True)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    batch = ragged_batch(LENGTHS, "right")
    exact = with_adapters(qwen3(), mixed=True)
    expected, reference = hidden(exact, **batch), hidden(model, **batch)
    with patch(model) as report:
        actual = hidden(model, **batch)
    tokens = batch["attention_mask"].bool()
    error, theirs = ((x - expected)[tokens].norm() for x in (actual.float(), reference.float()))
    assert report.packed == 1 and actual.dtype == torch.bfloat16
    assert error < 1.2 * theirs < 0.05 * expected[tokens].norm()
