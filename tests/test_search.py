"""The worked examples of binary search and rescoring run, and find what float32 finds."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from stores import store

from jv5kernels import FastEncoder
from jv5kernels.synthetic.checkpoint import write_checkpoint

BENCH = Path(__file__).parent.parent / "bench"
README = BENCH.parent / "README.md"
WORDS = "kernel vector store byte order sign index recall query corpus lake forest river".split()
DOCUMENTS = [
    f"{WORDS[i % 13]} and {WORDS[(i * 5 + 2) % 13]} of {WORDS[(i // 13) % 13]} {i}"
    for i in range(200)
]


@pytest.fixture(scope="module")
def examples() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_search", BENCH / "bench_search.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_search"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> FastEncoder:
    folder = tmp_path_factory.mktemp("model") / "model"
    geometry = {"hidden_size": 256, "intermediate_size": 256}
    write_checkpoint(folder, family="nano", task="retrieval", geometry=geometry)
    return FastEncoder(folder, device="cpu", task="retrieval", pooling="mean")


@pytest.mark.parametrize("name", ["faiss", "usearch"])
def test_an_example_finds_the_float32_neighbours(examples, encoder, name: str) -> None:
    store(name)
    queries = DOCUMENTS[::5]
    exact = examples.exact_neighbours(encoder, DOCUMENTS, queries)
    found = getattr(examples, f"search_{name}")(encoder, DOCUMENTS, queries)
    assert found.shape == (len(queries), 10)
    assert all(len(set(row)) == 10 for row in found.tolist())
    reached = examples.recall(exact, found)
    plain = examples.recall(exact, examples.by_bits_alone(encoder, DOCUMENTS, queries))
    assert reached >= 0.8 and reached > plain + 0.1


def test_the_example_of_the_readme_finds_them_too(examples, encoder) -> None:
    store("faiss")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), flags=re.M | re.S)
    (code,) = (block for block in blocks if "import faiss" in block)
    texts, questions = DOCUMENTS[:80], DOCUMENTS[3:80:25]
    exact = examples.exact_neighbours(encoder, texts, questions)
    found = []
    for question in questions:
        names = {"encoder": encoder, "texts": texts, "question": question}
        exec(code, names)
        found.append(names["hits"])
    assert examples.recall(exact, np.stack(found)) > 0.8


def test_the_example_of_spans_in_the_readme_runs(encoder) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), flags=re.M | re.S)
    (code,) = (block for block in blocks if "encode_chunks" in block)
    names = {"encoder": encoder, "text": "One sentence. Another one! And a third."}
    exec(code, names)
    assert names["found"].embeddings.shape == (2, 256) and names["found"].text.shape == (256,)
