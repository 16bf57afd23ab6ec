"""CUDA graphs on a GPU: the bits of the plain path, threads and streams, and bounded memory."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from jv5kernels import FastEncoder
from jv5kernels.graphs import BUCKETS, MAX_TOKENS
from jv5kernels.short_layers import takes_short_layers
from jv5kernels.synthetic.checkpoint import write_checkpoint

pytestmark = pytest.mark.gpu
TEXTS = [
    "a",
    "What is a kernel?",
    "長い文章は多くのトークンになります。",
    "x = {k: v for k, v in pairs}",
]
GEOMETRY = {
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 512,
    },
    "nano": {
        "hidden_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 512,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        family: write_checkpoint(
            root / family, family=family, layout="merged", geometry=GEOMETRY[family]
        )
        for family in GEOMETRY
    }


def encoder_of(folder: Path, graphs: bool = True, **options) -> FastEncoder:
    encoder = FastEncoder(folder, device="cuda", **options)
    if not graphs:
        encoder._short = None
    return encoder


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "cls"])
@pytest.mark.parametrize("family", ["small", "nano"])
def test_batch_invariant_graphs_give_the_bits_of_the_plain_path(family, pooling, folders):
    options = {"pooling": pooling, "batch_invariant": True}
    plain = encoder_of(folders[family], graphs=False, **options)
    recorded = encoder_of(folders[family], **options)
    texts = [*TEXTS, *(" ".join(TEXTS) * n for n in (2, 5, 9))]
    assert max(len(ids) for ids in plain.tokenize(texts)) <= MAX_TOKENS
    for precision in ("float32", "ubinary"):
        expected = plain.encode(texts, precision=precision)
        assert np.array_equal(recorded.encode(texts, precision=precision), expected)
        for text, row in zip(texts, expected, strict=True):
            assert np.array_equal(recorded.encode(text, precision=precision), row)
    assert len(recorded._short) >= 4


@pytest.mark.parametrize("family", ["small", "nano"])
def test_default_graphs_keep_the_direction(family, folders):
    plain, recorded = (encoder_of(folders[family], graphs=g) for g in (False, True))
    assert takes_short_layers(recorded._backbones.get(None), 16)
    for text in [*TEXTS, " ".join(TEXTS)]:
        assert plain.encode(text) @ recorded.encode(text) >= 0.9999


def test_ranges_come_with_the_call(folders):
    plain, recorded = (
        encoder_of(folders["nano"], graphs=g, batch_invariant=True) for g in (False, True)
    )
    floats = plain.encode(TEXTS)
    for scale in (1.0, 0.5):
        ranges = np.stack([floats.min(0), floats.max(0)]) * scale
        options = {"precision": "int8", "ranges": ranges}
        assert np.array_equal(recorded.encode(TEXTS, **options), plain.encode(TEXTS, **options))
    assert len(recorded._short) == 1


def test_threads_and_streams(folders):
    encoder = encoder_of(folders["small"], batch_invariant=True)
    plain = encoder_of(folders["small"], graphs=False, batch_invariant=True)
    expected = [plain.encode(text) for text in TEXTS]
    failures: list[str] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(50):
                k = (index + i) % len(TEXTS)
                on_device = bool(i % 2)
                found = encoder.encode(TEXTS[k], convert_to_tensor=on_device)
                found = found.cpu().numpy() if on_device else found
                if not np.array_equal(found, expected[k]):
                    failures.append(f"thread {index}, call {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_recording_while_other_threads_run_long_batches(folders):
    encoder = encoder_of(folders["small"], batch_invariant=True)
    long_texts = [" ".join(TEXTS) * 60] * 40
    expected = encoder.encode(long_texts)
    failures: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            if not np.array_equal(encoder.encode(long_texts), expected):
                failures.append("a long batch changed")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for dim in (32, 64, 128):
            encoder.warmup(truncate_dim=dim)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_memory_is_bounded_by_the_largest_bucket(folders):
    encoder = encoder_of(folders["nano"])
    encoder.warmup()
    before = torch.cuda.memory_reserved()
    for dim in (16, 32, 48, 64, 80, 96):
        encoder.warmup(truncate_dim=dim)
    assert len(encoder._short) == 64 and 6 * len(BUCKETS) > 64
    # Their activations share one pool; outputs of at most 33 rows and index buffers are left.
    assert torch.cuda.memory_reserved() - before <= 64 << 20
