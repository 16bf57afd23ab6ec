"""The reference itself: simple enough to trust, checked against direct computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from edits import edit
from peft import PeftModel
from transformers.utils import logging

from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.comparison.reference import (
    load_reference,
    reference_embeddings,
    reference_tokenizer,
)
from jv5kernels.synthetic.checkpoint import TASKS

pytest_plugins = ("checkpoint_folders",)

TEXTS = [
    "Query: What is a kernel?",
    "Document: " + "many words in a longer text " * 9,
    "Document: ",
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["small", "nano"])
def test_base_with_adapter_equals_the_merged_sibling(family, task, written):
    base = open_checkpoint(written(family=family, layout="base"))
    sibling = open_checkpoint(written(family=family, layout="merged", task=task))
    model = load_reference(base, task)
    assert isinstance(model, PeftModel) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ours = reference_embeddings(model, base, TEXTS)
    expected = reference_embeddings(load_reference(sibling, None), sibling, TEXTS)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    raw = reference_embeddings(load_reference(base, None), base, TEXTS)
    assert (raw * expected).sum(1).max() < 0.999


@pytest.mark.parametrize("family", ["small", "nano"])
def test_pooling_slicing_and_normalisation_by_hand(family, written):
    checkpoint = open_checkpoint(written(family=family, layout="merged"))
    model = load_reference(checkpoint, None)
    ids = reference_tokenizer(checkpoint)(TEXTS[1], return_tensors="pt")["input_ids"]
    hidden = model(input_ids=ids).last_hidden_state[0].numpy()
    rows = {"lasttoken": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0)}
    for pooling, row in rows.items():
        found = reference_embeddings(
            model, checkpoint, [TEXTS[1]], pooling=pooling, truncate_dim=24
        )
        assert found.shape == (1, 24) and found.dtype == np.float32
        np.testing.assert_allclose(found[0], row[:24] / np.linalg.norm(row[:24]), atol=1e-6)
    default = reference_embeddings(model, checkpoint, [TEXTS[1]])
    assert np.allclose(default[0], hidden[-1] / np.linalg.norm(hidden[-1]), atol=1e-6)


@pytest.mark.parametrize("family", ["small", "nano"])
def test_a_padded_batch_of_transformers_gives_the_same(family, written):
    checkpoint = open_checkpoint(written(family=family, layout="merged"))
    model = load_reference(checkpoint, None, attn_implementation="eager")
    ids = [reference_tokenizer(checkpoint)(text)["input_ids"] for text in TEXTS]
    longest = max(map(len, ids))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state
    last = hidden[torch.arange(len(ids)), mask.sum(1) - 1]
    expected = torch.nn.functional.normalize(last, dim=1).numpy()
    found = reference_embeddings(load_reference(checkpoint, None), checkpoint, TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "family, layout, keys, causal",
    [
        ("small", "base", {}, True),
        ("small", "merged", {"is_causal": False}, False),
        ("nano", "base", {}, False),
        ("nano", "merged", {}, False),
    ],
)
def test_who_sees_later_tokens(family, layout, keys, causal, copied):
    folder = copied(family=family, layout=layout)
    edit(folder / "config.json", **keys)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.causal == causal
    model = load_reference(checkpoint, None)
    ids = torch.arange(10)[None]
    changed = ids.clone()
    changed[0, -1] = 77
    first, other = (model(input_ids=i).last_hidden_state[0, 0] for i in (ids, changed))
    assert torch.equal(first, other) == causal


def test_long_texts_are_cut_as_transformers_cuts_them(written):
    checkpoint = open_checkpoint(written(family="nano", layout="merged"))
    model = load_reference(checkpoint, None)
    cut = reference_embeddings(model, checkpoint, [TEXTS[1]], max_length=12)
    ids = checkpoint.tokenizer().encode(TEXTS[1]).ids
    kept = torch.tensor([ids[:11] + ids[-1:]])
    last = model(input_ids=kept).last_hidden_state[0, -1]
    np.testing.assert_allclose(cut[0], (last / last.norm()).numpy(), atol=1e-6)


def test_dtype_and_attention_are_passed_on(written):
    checkpoint = open_checkpoint(written(family="small", layout="base"))
    model = load_reference(
        checkpoint, "retrieval", dtype=torch.bfloat16, attn_implementation="eager"
    )
    inner = model.get_base_model()
    assert inner.embed_tokens.weight.dtype == torch.bfloat16
    assert inner.config._attn_implementation == "eager" and inner.config.use_cache is False
    # As peft does by default, and the vendor with it.
    assert inner.layers[0].mlp.up_proj.lora_A["default"].weight.dtype == torch.float32


def test_the_progress_bar_setting_is_put_back(written):
    checkpoint = open_checkpoint(written(family="small", layout="base"))
    before = logging.is_progress_bar_enabled()
    load_reference(checkpoint, None)
    assert logging.is_progress_bar_enabled() == before


def test_what_is_refused(copied):
    folder = copied(family="small", layout="merged")
    (folder / "modules.json").unlink()
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ValueError, match="task='search' is unknown"):
        load_reference(checkpoint, "search")
    model = load_reference(checkpoint, None)
    with pytest.raises(ValueError, match="pooling='max' is unknown.*'lasttoken'"):
        reference_embeddings(model, checkpoint, TEXTS, pooling="max")
    with pytest.raises(ValueError, match="pooling=None is unknown"):
        reference_embeddings(model, checkpoint, TEXTS)
