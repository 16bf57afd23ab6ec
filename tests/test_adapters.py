"""LoRA adapters: merged exactly, as peft would, and refused when they do not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from edits import edit, edit_tensors
from peft import PeftModel

from jv5kernels.adapters import LoraAdapter, LoraPair, merge_adapter, read_adapter
from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.comparison.reference import load_reference
from jv5kernels.synthetic.checkpoint import (
    TASKS,
    random_adapter,
    random_weights,
    real_spec,
    write_checkpoint,
)

pytestmark = pytest.mark.usefixtures("one_thread")

pytest_plugins = ("checkpoint_folders",)

SMALL, NANO = {"family": "small", "layout": "base"}, {"family": "nano", "layout": "base"}


def adapter_folder(folder, task="retrieval"):
    return folder / "adapters" / task


def edit_adapter(folder, change):
    """Changes the tensors of the retrieval adapter."""
    edit_tensors(adapter_folder(folder) / "adapter_model.safetensors", change)


def peft_merged(checkpoint, task):
    """Canonical name -> matrix as peft merges it, in fp32."""
    model = load_reference(checkpoint, task)
    assert isinstance(model, PeftModel)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("options", [SMALL, NANO], ids=["small", "nano"])
def test_merged_matrices_are_those_of_peft(options, task, written):
    checkpoint = open_checkpoint(written(**options))
    weights, adapter = checkpoint.weights(), checkpoint.adapter(task)
    merged = merge_adapter(weights, adapter, torch.float32)
    assert set(merged) == set(checkpoint.spec.matrix_shapes()) and len(merged) == 21
    expected = peft_merged(checkpoint, task)
    for name, matrix in merged.items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-6, atol=1e-6)
        assert (matrix - weights[name]).norm() > 0.05 * weights[name].norm()


@pytest.mark.parametrize("family, count", [("small", 196), ("nano", 84)])
def test_an_adapter_of_the_real_model_changes_every_matrix(family, count, tmp_path):
    """The published counts, with the real number of layers at a narrow width."""
    layers = real_spec(family).num_layers
    narrow = {"num_hidden_layers": layers, "hidden_size": 32, "intermediate_size": 32}
    folder = write_checkpoint(tmp_path / "model", family=family, geometry=narrow)
    checkpoint = open_checkpoint(folder)
    merged = merge_adapter(checkpoint.weights(), checkpoint.adapter("retrieval"), torch.bfloat16)
    assert len(merged) == checkpoint.spec.num_matrices == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_merged_matrix_is_rounded_once(dtype):
    """Within half a unit in the last place (and the fp32 sum's own error) of the float64 result."""
    spec = replace(real_spec("nano", num_layers=1), vocab_size=1000)
    weights = random_weights(spec, seed=3, dtype=dtype)
    adapter = random_adapter(spec, "retrieval", seed=3, dtype=dtype)
    merged = merge_adapter(weights, adapter, dtype)
    for name, pair in adapter.pairs.items():
        exact = weights[name].double() + pair.scaling * (pair.b.double() @ pair.a.double())
        assert merged[name].dtype == dtype
        # The spacing of dtype's numbers at this magnitude, and the smallest one below its normal range.
        step = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact.abs())))
        step = step.clamp(min=torch.finfo(dtype).eps * torch.finfo(dtype).tiny)
        error = (merged[name].double() - exact).abs()
        assert bool((error <= 0.5 * step + 1e-6).all()), name
        agree = (merged[name] == exact.to(dtype)).double().mean()
        assert agree > 0.999, (name, float(agree))
        twice = weights[name] + (pair.b @ pair.a)
        assert (twice.double() - exact).abs().mean() > error.mean()


def test_merging_leaves_its_inputs_alone(written):
    checkpoint = open_checkpoint(written(**SMALL))
    weights, adapter = checkpoint.weights(), checkpoint.adapter("retrieval")
    before = {name: tensor.clone() for name, tensor in weights.items()}
    sides = {name: (pair.a.clone(), pair.b.clone()) for name, pair in adapter.pairs.items()}
    first = merge_adapter(weights, adapter, torch.float32)
    other = merge_adapter(weights, checkpoint.adapter("clustering"), torch.float32)
    again = merge_adapter(weights, adapter, torch.float32)
    for name, tensor in weights.items():
        assert torch.equal(tensor, before[name])
    for name, (a, b) in sides.items():
        assert torch.equal(adapter.pairs[name].a, a) and torch.equal(adapter.pairs[name].b, b)
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 24},
        {"lora_alpha": 24, "use_rslora": True},
        {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 64, "mlp.up_proj": 5}},
        {"alpha_pattern": {r"layers\.[02]\.self_attn\..*": 40}},
        {"alpha_pattern": {"v_proj": 2}, "use_rslora": True},
        {"alpha_pattern": {"up": 1000, "_proj": 9, "v_proj": 2}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
def test_scaling_is_that_of_peft(settings, copied):
    folder = copied(**SMALL)
    edit(adapter_folder(folder) / "adapter_config.json", **settings)
    checkpoint = open_checkpoint(folder)
    merged = merge_adapter(checkpoint.weights(), checkpoint.adapter("retrieval"), torch.float32)
    expected = peft_merged(checkpoint, "retrieval")
    for name, matrix in merged.items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-5, atol=1e-6)


def test_rank_pattern_is_that_of_peft(copied):
    folder = copied(**NANO)

    def narrow(tensors):
        for name in list(tensors):
            if "layers.1" in name and "k_proj" in name:
                kept = tensors[name][:3] if "lora_A" in name else tensors[name][:, :3]
                tensors[name] = kept.contiguous()

    edit_adapter(folder, narrow)
    pattern = {r"layers\.1\.self_attn\.k_proj": 3}
    edit(adapter_folder(folder) / "adapter_config.json", rank_pattern=pattern)
    checkpoint = open_checkpoint(folder)
    adapter = checkpoint.adapter("retrieval")
    narrowed = adapter.pairs["layers.1.self_attn.k_proj.weight"]
    assert narrowed.a.shape[0] == 3 and narrowed.scaling == pytest.approx(8 / 3)
    merged = merge_adapter(checkpoint.weights(), adapter, torch.float32)
    expected = peft_merged(checkpoint, "retrieval")
    for name, matrix in merged.items():
        torch.testing.assert_close(matrix, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "targets, count",
    [
        (["q_proj", "v_proj"], 6),
        (["layers.1.mlp.down_proj"], 1),
        (r".*\.self_attn\.[qk]_proj", 6),
        ("all-linear", 21),
    ],
)
def test_target_modules(targets, count, copied):
    folder = copied(**SMALL)
    checkpoint = open_checkpoint(folder)
    settings = adapter_folder(folder) / "adapter_config.json"
    edit(settings, target_modules=targets)
    if count < 21:
        with pytest.raises(ValueError, match="not a target module of adapter_config.json"):
            checkpoint.adapter("retrieval")

    def keep(tensors):
        for key in list(tensors):
            module = re.sub(r"base_model\.model\.|\.lora_[AB]\.weight", "", key)
            is_target = (
                targets == "all-linear" or re.fullmatch(targets, module)
                if isinstance(targets, str)
                else module.endswith(tuple(targets))
            )
            if not is_target:
                del tensors[key]

    edit_adapter(folder, keep)
    assert len(checkpoint.adapter("retrieval").pairs) == count


def test_excluded_modules(copied):
    folder = copied(**SMALL)
    settings = adapter_folder(folder) / "adapter_config.json"
    edit(settings, exclude_modules=["down_proj"])
    edit_adapter(folder, lambda t: [t.pop(k) for k in list(t) if "down_proj" in k])
    assert len(open_checkpoint(folder).adapter("retrieval").pairs) == 18


def test_an_adapter_of_a_language_model_has_one_more_prefix(copied):
    folder = copied(**SMALL)
    before = open_checkpoint(folder).adapter("retrieval")

    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("base_model.model.", "base_model.model.model.")] = tensors.pop(key)

    edit_adapter(folder, rename)
    after = open_checkpoint(folder).adapter("retrieval")
    assert set(after.pairs) == set(before.pairs)
    for name, pair in after.pairs.items():
        assert torch.equal(pair.a, before.pairs[name].a) and pair.scaling == 1.0


Q = "base_model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "layers.0.self_attn.q_proj has lora_A alone"),
        (
            lambda t: [t.pop(f"{Q}.lora_{s}.weight") for s in "AB"],
            "20 of 21 target matrices have a change; missing: .*layers.0.self_attn.q_proj",
        ),
        (lambda t: t.clear(), "0 of 21 target matrices"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(8, 63)}),
            r"lora_A of layers.0.self_attn.q_proj has shape \(8, 63\), not \(8, 64\)",
        ),
        (
            lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(128, 4)}),
            r"lora_B of layers.0.self_attn.q_proj has shape \(128, 4\), not \(128, 8\)",
        ),
        (
            lambda t: [t.update({k.replace(".0.", ".9."): t.pop(k)}) for k in list(t) if Q in k],
            "layers.9.self_attn.q_proj is not a matrix of this model",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(128)}),
            "unexpected tensor .*lora_magnitude_vector",
        ),
        (
            lambda t: t.update(
                {f"{Q}.lora_A.weight".replace("model.l", "model.model.l"): torch.ones(8, 64)}
            ),
            "layers.0.self_attn.q_proj has two A matrices",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, message, copied):
    folder = copied(**SMALL)
    edit_adapter(folder, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder).adapter("retrieval")


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["embed_tokens"]},
        {"layers_to_transform": [0, 1]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["experts.weight"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_are_not_supported(settings, copied):
    folder = copied(**SMALL)
    edit(adapter_folder(folder) / "adapter_config.json", **settings)
    ((key, value),) = settings.items()
    with pytest.raises(ValueError, match=re.escape(f"{key}={value!r} is not supported")):
        open_checkpoint(folder).adapter("retrieval")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_goes_missing_is_named(name, copied):
    folder = copied(**SMALL)
    checkpoint = open_checkpoint(folder)
    (adapter_folder(folder, "clustering") / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"clustering/{name} is missing"):
        read_adapter(folder, "clustering", checkpoint.spec)


def test_merging_into_another_model_is_refused():
    pair = LoraPair(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    adapter = LoraAdapter("retrieval", {"layers.0.mlp.up_proj.weight": pair})
    with pytest.raises(ValueError, match="'retrieval' changes layers.0.mlp.up_proj.weight, which"):
        merge_adapter({}, adapter, torch.float32)
    weights = {"layers.0.mlp.up_proj.weight": torch.ones(4, 5)}
    with pytest.raises(ValueError, match=r"has shape \(4, 5\), its change \(4, 4\)"):
        merge_adapter(weights, adapter, torch.float32)
