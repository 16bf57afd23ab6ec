"""patch on a GPU, real geometry with few layers: bf16 against the fp32 truth, memory, and devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_models import (
    RemoteLike,
    check_tokens,
    eurobert,
    hidden,
    lora_config,
    qwen3,
    ragged_batch,
    storage_bytes,
    with_adapters,
)
from torch import Tensor

from jv5kernels.patching import patch, unpatch

pytestmark = pytest.mark.gpu

SMALL = {
    "vocab_size": 97,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
}
NANO = {
    "vocab_size": 97,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 8192,
}
REAL = pytest.mark.parametrize(("make", "geometry"), [(qwen3, SMALL), (eurobert, NANO)])
LENGTHS = [700, 1, 33, 1500, 512, 64]


def on_cuda(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in batch.items()}


def errors(model: Any, exact: Any, batch: dict[str, Tensor]) -> float:
    """Relative distance of the hidden states of real tokens from those of the exact model."""
    tokens = batch["attention_mask"].bool()
    truth = hidden(exact, **batch)[tokens]
    return ((hidden(model, **batch)[tokens].float() - truth).norm() / truth.norm()).item()


@REAL
@pytest.mark.parametrize("side", ["right", "left"])
def test_bfloat16_is_no_further_from_fp32_than_the_original(
    make: Any, geometry: dict[str, Any], side: str
) -> None:
    batch = on_cuda(ragged_batch(LENGTHS, side))
    weights = make(**geometry).to(torch.bfloat16).float().state_dict()
    exact = make(**geometry)
    exact.load_state_dict(weights)
    model = make(**geometry)
    for parameter in model.parameters():  # not .to(), which rounds the rotary buffer too
        parameter.data = parameter.data.to(torch.bfloat16)
    exact, model = exact.cuda(), model.cuda()
    theirs = errors(model, exact, batch)
    with patch(model) as report:
        ours = errors(model, exact, batch)
        padded = hidden(model, **batch)[batch["attention_mask"] == 0]
    assert report.packed == 2 and not report.fallbacks
    assert not padded.any()
    assert ours <= theirs < 0.05


@REAL
def test_float32_agrees(make: Any, geometry: dict[str, Any]) -> None:
    model, batch = make(**geometry).cuda(), on_cuda(ragged_batch(LENGTHS, "left"))
    expected = hidden(model, **batch)
    with patch(model) as report:
        actual = hidden(model, **batch)
    check_tokens(actual, expected, batch["attention_mask"], tol=1e-4)
    assert report.packed == 1


@pytest.mark.parametrize("mixed", [True, False])
def test_adapters_in_bfloat16(mixed: bool) -> None:
    """Adapters stay in fp32 around a bf16 base, as PEFT loads them."""

    def build(dtype: torch.dtype) -> Any:
        backbone = qwen3(**SMALL)
        for parameter in backbone.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
        model = with_adapters(backbone, mixed=mixed, r=32)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # Of the size that a trained adapter has; PEFT's random one outweighs the base.
                parameter.data = parameter.data.float() * 0.1
        return model.cuda()

    batch = on_cuda(ragged_batch(LENGTHS, "right"))
    model, exact = build(torch.bfloat16), build(torch.float32)
    for task in ("clustering", "retrieval"):
        model.set_adapter(task)
        exact.set_adapter(task)
        theirs = errors(model, exact, batch)
        with patch(model) as report:
            ours = errors(model, exact, batch)
        assert report.packed == 1 and not report.fallbacks
        assert ours <= 1.05 * theirs < 0.05


def test_no_second_copy_of_the_weights() -> None:
    model = qwen3(**SMALL).to(torch.bfloat16).cuda()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, size = torch.cuda.memory_allocated(), storage_bytes(model)
    layer = sum(p.nbytes for p in model.layers[0].parameters())
    patch(model)
    slack = 1 << 21  # the allocator's rounding
    assert torch.cuda.memory_allocated() <= before + slack
    assert torch.cuda.max_memory_allocated() <= before + layer + slack
    assert storage_bytes(model) == size
    unpatch(model)
    assert torch.cuda.memory_allocated() <= before + slack


def test_moving_between_devices() -> None:
    model, batch = qwen3(), ragged_batch([9, 4], "right")
    report = patch(model)
    expected = hidden(model, **batch)
    model.cuda()
    check_tokens(hidden(model, **on_cuda(batch)).cpu(), expected, batch["attention_mask"], tol=1e-4)
    model.cpu()
    assert torch.equal(hidden(model, **batch), expected)
    assert report.packed == 3 and not report.fallbacks


def test_input_on_another_device_raises_as_before() -> None:
    model = qwen3().cuda()
    with patch(model) as report, pytest.raises(RuntimeError):
        hidden(model, **ragged_batch([3], "right"))
    assert "input on cpu" in next(iter(report.fallbacks))


def test_remote_structure_on_cuda() -> None:
    model = RemoteLike(qwen3(**SMALL).cuda(), lora_config(), adapter_name="retrieval").cuda().eval()
    batch = on_cuda(ragged_batch(LENGTHS, "right"))
    expected = hidden(model, **batch)
    with patch(model) as report:
        actual = hidden(model, **batch)
    tokens = batch["attention_mask"].bool()
    assert (actual - expected)[tokens].norm() < 1e-5 * expected[tokens].norm()
    assert report.packed == 1
