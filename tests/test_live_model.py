"""A live model read as a checkpoint is; and objects as people have them: Sentence Transformers and the remote class."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_models import RemoteLike, eurobert, qwen3, with_adapters
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import nn

from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.live.model import open_live
from jv5kernels.patching import patch, unpatch
from jv5kernels.synthetic.checkpoint import TASKS, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [
    "short",
    "",
    "Kernels are small programs that run many times, once for every tile of the data.",
    "The quick brown fox jumps over the lazy dog. " * 6,
]


@pytest.fixture(scope="module", params=["small", "nano", "qwen3-embedding"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / request.param
    return write_checkpoint(folder, family=request.param, layout="merged")


@pytest.fixture(scope="module", params=["small", "nano"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / request.param, family=request.param)


def cosines(a: Any, b: Any) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("prompt_name", ["query", "document"])
def test_sentence_transformers_encode(merged: Path, prompt_name: str) -> None:
    model = SentenceTransformer(str(merged), device="cpu")
    texts = [text for text in TEXTS if text or model.prompts[prompt_name]]
    expected = model.encode(texts, prompt_name=prompt_name, batch_size=2)
    with patch(model) as report:
        actual = model.encode(texts, prompt_name=prompt_name, batch_size=2)
    assert cosines(actual, expected).min() > 1 - 1e-6
    assert report.packed == 2 and not report.fallbacks


def test_sentence_transformers_left_padding(merged: Path) -> None:
    model = SentenceTransformer(str(merged), device="cpu")
    model.tokenizer.padding_side = "left"
    texts = [text for text in TEXTS if text]
    expected = model.encode(texts)
    with patch(model) as report:
        actual = model.encode(texts)
    assert cosines(actual, expected).min() > 1 - 1e-6
    assert report.packed == 1 and not report.fallbacks


def test_sentence_transformers_saves_what_it_loaded(merged: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(merged), device="cpu")
    expected = model.encode(TEXTS[2:])
    with patch(model):
        model.save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.array_equal(again.encode(TEXTS[2:]), expected)


def test_remote_class(base: Path) -> None:
    model = RemoteLike.load(base)
    expected = {task: model.encode(TEXTS, task) for task in TASKS}
    with patch(model) as report:
        actual = {task: model.encode(TEXTS, task) for task in TASKS}
    for task in TASKS:
        assert cosines(actual[task], expected[task]).min() > 1 - 1e-6
    assert cosines(expected[TASKS[0]], expected[TASKS[1]]).max() < 0.999
    assert report.packed == len(TASKS) and not report.fallbacks


def test_threads_encode(merged: Path) -> None:
    model = SentenceTransformer(str(merged), device="cpu")
    patch(model)
    expected = [model.encode(text) for text in TEXTS[2:]]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: model.encode(TEXTS[2 + i % 2]), range(12)))
    unpatch(model)
    for i, result in enumerate(results):
        assert np.array_equal(result, expected[i % 2])


def check_like_checkpoint(model: nn.Module, folder: Path) -> None:
    live, checkpoint = open_live(model), open_checkpoint(folder)
    same = ("spec", "pooling", "normalize", "tasks", "max_seq_length", "default_prompt_name")
    for name in same:
        assert getattr(live, name) == getattr(checkpoint, name), name
    stated = {name: text for name, text in live.prompts.items() if text}
    assert stated == {name: text for name, text in checkpoint.prompts.items() if text}
    weights, stored = live.weights(), checkpoint.weights()
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name].float()) for name in stored)
    for task in live.tasks:
        pairs, stored_pairs = live.adapter(task).pairs, checkpoint.adapter(task).pairs
        assert pairs.keys() == stored_pairs.keys() and len(pairs) == live.spec.num_matrices
        for name, pair in stored_pairs.items():
            assert torch.equal(pairs[name].a, pair.a) and torch.equal(pairs[name].b, pair.b)
            assert pairs[name].scaling == pair.scaling
    text = "Query: a kernel?"
    assert live.tokenizer().encode(text).ids == checkpoint.tokenizer().encode(text).ids


def test_sentence_transformer_is_read_like_its_folder(merged: Path) -> None:
    model = SentenceTransformer(str(merged), device="cpu")
    check_like_checkpoint(model, merged)
    with patch(model):
        check_like_checkpoint(model, merged)


def test_remote_class_is_read_like_its_folder(base: Path) -> None:
    model = RemoteLike.load(base)
    check_like_checkpoint(model, base)
    with patch(model):
        model.set_adapter("clustering")
        check_like_checkpoint(model, base)
    assert open_live(model).default_task is None


class CustomModule(nn.Module):
    """As the one module of a base repository loaded by Sentence Transformers."""

    def __init__(self, model: nn.Module, default_task: str | None) -> None:
        super().__init__()
        self.model = model
        self.default_task = default_task


def test_pipeline_of_one_module(base: Path) -> None:
    model = nn.Sequential(CustomModule(RemoteLike.load(base), "clustering"))
    live = open_live(model, tokenizer=base / "tokenizer.json")
    assert (live.pooling, live.normalize, live.default_task) == ("lasttoken", True, "clustering")
    assert live.prompts == {"query": "Query: ", "document": "Document: "}
    assert live.default_prompt_name == "document"


def test_bare_backbone_states_no_pooling(tmp_path: Path) -> None:
    live = open_live(eurobert())
    assert (live.pooling, live.prompts, live.tasks, live.default_task) == (None, {}, (), None)
    assert live.max_seq_length == 128
    with pytest.raises(ValueError, match="pass tokenizer="):
        live.tokenizer()


def test_tokenizer_argument(base: Path) -> None:
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    model = RemoteLike.load(base)
    for given in (backend, str(base / "tokenizer.json"), model.tokenizer):
        copied = open_live(model, tokenizer=given).tokenizer()
        assert copied is not backend and copied.encode("a b").ids == backend.encode("a b").ids
    model.tokenizer = object()
    with pytest.raises(ValueError, match="no fast tokenizer"):
        open_live(model).tokenizer()


def test_tokenizer_of_another_vocabulary(base: Path) -> None:
    with pytest.raises(ValueError, match="the embedding table has 97 rows"):
        open_live(qwen3(), tokenizer=base / "tokenizer.json").tokenizer()


def test_a_single_adapter_is_the_default() -> None:
    live = open_live(with_adapters(qwen3(), mixed=False, names=("default",)))
    assert (live.tasks, live.default_task) == (("default",), "default")
    with pytest.raises(ValueError, match=r"choose one of \['default'\]"):
        live.adapter("other")


def test_merged_adapters_are_refused() -> None:
    model = with_adapters(qwen3(), mixed=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights"):
        open_live(model)


def test_pipelines_that_are_refused(merged: Path) -> None:
    model = SentenceTransformer(str(merged), device="cpu")
    steps = list(model)
    with pytest.raises(ValueError, match="supported are a transformer, a pooling"):
        open_live(nn.Sequential(steps[0], steps[1], nn.Linear(2, 2)))
    steps[1].pooling_mode = "max"
    with pytest.raises(ValueError, match="pooling 'max'"):
        open_live(model)
