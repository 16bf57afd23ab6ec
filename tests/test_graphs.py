"""Short inputs: a replayed bucket gives what the plain path gives, whatever was in it before and whoever calls.

On a CPU a stand-in records: it runs the function again at each replay, into the same outputs. So everything but the
capture itself is tested everywhere; the capture needs a GPU.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jv5kernels import FastEncoder, graphs
from jv5kernels.graphs import BUCKETS, MAX_TOKENS, ShortInputs, bucket_for
from jv5kernels.output import OutputFormat, embed_batch
from jv5kernels.packing import pack
from jv5kernels.short_layers import forward_short
from jv5kernels.synthetic.checkpoint import write_checkpoint

TEXTS = [
    "a",
    "What is a kernel?",
    "長い文章は多くのトークンになります。",
    "x = {k: v for k, v in pairs}",
]
# fp32 on a CPU, where the library's products are not the same bits for another number of rows.
TOLERANCE = 2e-6


class Rerun:
    """Records by keeping the function: a replay runs it and copies the results into the first outputs."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, run):
        outputs = tuple(output.clone() for output in run())
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            for output, new in zip(outputs, run(), strict=True):
                output.copy_(new)

        return replay, outputs

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def capturable_on_the_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURABLE", ("torch", "cpp", *graphs.CAPTURABLE))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        family: write_checkpoint(root / family, family=family, layout="merged")
        for family in ("small", "nano")
    }


@pytest.fixture(scope="module")
def encoders(folders) -> dict[str, FastEncoder]:
    return {family: FastEncoder(folder, device="cpu") for family, folder in folders.items()}


def with_stand_in(encoder: FastEncoder) -> Rerun:
    recorder = Rerun()
    encoder._short = ShortInputs(torch.device("cpu"), recorder)
    return recorder


def test_buckets_hold_what_they_say():
    assert bucket_for(12, 1) == BUCKETS[0]
    assert bucket_for(MAX_TOKENS + 1, 1) is None and bucket_for(100, 33) is None
    for bucket in BUCKETS:
        assert bucket_for(bucket.tokens, bucket.sequences) == bucket


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=8),
    st.sampled_from(["lasttoken", "mean", "cls"]),
    st.sampled_from(["small", "nano"]),
    st.sampled_from(["float32", "binary", "int8"]),
)
def test_a_bucket_gives_what_the_plain_path_gives(encoders, lengths, pooling, family, precision):
    backbone = encoders[family]._backbones.get(None)
    dim = backbone.spec.hidden_size
    ranges = (
        torch.tensor([[-0.3], [0.3]]).expand(2, dim).contiguous() if precision == "int8" else None
    )
    output = OutputFormat(pooling, dim, precision=precision, ranges=ranges)
    random = np.random.default_rng(len(lengths))
    sequences = [random.integers(0, 500, n).astype(np.int32) for n in lengths]
    short = ShortInputs(torch.device("cpu"), Rerun())
    found = short.run(backbone, output, sequences)
    if sum(lengths) > MAX_TOKENS:
        assert found is None
        return
    values, flags = found
    expected, _ = embed_batch(output, backbone, pack(sequences, np.arange(len(lengths)), "cpu"))
    assert values.shape == expected.shape and values.dtype == expected.dtype
    assert flags.tolist() == [0] * len(lengths)
    if precision == "float32":
        torch.testing.assert_close(values, expected, atol=TOLERANCE, rtol=0)
    elif precision == "int8":
        assert (values.int() - expected.int()).abs().max() <= 1
    else:
        # A bit differs only where a value is 0 up to the tolerance.
        assert (values != expected).float().mean() < 0.05


@pytest.mark.parametrize("lengths", [[12], [1, 13, 2], [16]])
@pytest.mark.parametrize("family", ["small", "nano"])
def test_the_short_layers_are_the_usual_ones(encoders, family, lengths):
    backbone = encoders[family]._backbones.get(None)
    random = np.random.default_rng(0)
    ids = [random.integers(0, 500, n).astype(np.int32) for n in lengths]
    batch = pack(ids, np.arange(len(ids)), "cpu")
    hidden, cu_seqlens = forward_short(backbone, batch)
    expected, _ = backbone.forward_pooled(batch, "mean")
    assert torch.equal(cu_seqlens, batch.cu_seqlens)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)


def test_what_was_in_a_bucket_before_does_not_show(encoders):
    backbone = encoders["nano"]._backbones.get(None)
    output = OutputFormat("mean", backbone.spec.hidden_size)
    short = ShortInputs(torch.device("cpu"), Rerun())
    ids = np.arange(1, 10, dtype=np.int32)
    first = short.run(backbone, output, [ids])
    other = short.run(backbone, output, [np.full(16, 7, np.int32)])
    again = short.run(backbone, output, [ids])
    assert len(short) == 1
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])


def test_a_flag_is_that_of_its_row(encoders, monkeypatch):
    backbone = encoders["small"]._backbones.get(None)
    output = OutputFormat("lasttoken", backbone.spec.hidden_size)
    original = type(backbone).forward_pooled

    def overflowing(self, batch, pooling):
        hidden, cu_seqlens = original(self, batch, pooling)
        hidden[1] = float("inf")
        return hidden, cu_seqlens

    monkeypatch.setattr(type(backbone), "forward_pooled", overflowing)
    short = ShortInputs(torch.device("cpu"), Rerun())
    sequences = [np.arange(1, 4, dtype=np.int32)] * 3
    assert short.run(backbone, output, sequences)[1].tolist() == [0, 1, 0]
    # Here row 1 is the one that takes the spare tokens.
    assert short.run(backbone, output, sequences[:1])[1].tolist() == [0]


def test_old_recordings_make_room(encoders, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    backbone = encoders["nano"]._backbones.get(None)
    recorder = Rerun()
    short = ShortInputs(torch.device("cpu"), recorder)
    for dim in (8, 16, 24, 32, 32, 8):
        short.run(backbone, OutputFormat("lasttoken", dim), [np.arange(1, 5, dtype=np.int32)])
        assert len(short) <= 3
    assert recorder.recorded == 5 and recorder.replayed == 6


def test_implementations_that_read_lengths_on_the_host_are_not_recorded(encoders, monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURABLE", ("triton",))
    backbone = encoders["nano"]._backbones.get(None)
    short = ShortInputs(torch.device("cpu"), Rerun())
    output = OutputFormat("lasttoken", 8)
    assert short.run(backbone, output, [np.arange(1, 5, dtype=np.int32)]) is None
    assert short.record_all(backbone, output) == 0


@pytest.mark.parametrize("family", ["small", "nano"])
def test_the_encoder_takes_recordings_by_size_alone(family, folders):
    encoder = FastEncoder(folders[family], device="cpu")
    texts = [*TEXTS, " ".join(TEXTS) * 40]
    expected = encoder.encode(texts)
    recorder = with_stand_in(encoder)
    one = encoder.encode(TEXTS[1])
    assert recorder.replayed == 1
    np.testing.assert_allclose(one, expected[1], atol=TOLERANCE)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected[:-1], atol=TOLERANCE)
    assert recorder.replayed == 2
    tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    np.testing.assert_allclose(tensor.numpy(), expected[:-1], atol=TOLERANCE)
    before = recorder.replayed
    np.testing.assert_allclose(encoder.encode(texts[-1]), expected[-1], atol=TOLERANCE)
    assert recorder.replayed == before
    assert encoder.encode(TEXTS, output_value="token_embeddings")[0].shape[0] > 0
    assert recorder.replayed == before


def test_many_short_texts_go_through_several_buckets(folders):
    encoder = FastEncoder(folders["nano"], device="cpu")
    texts = [f"short text {i}" for i in range(100)]
    expected = encoder.encode(texts)
    recorder = with_stand_in(encoder)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=TOLERANCE)
    assert recorder.replayed >= 1


def test_threads_share_the_buckets(folders):
    encoder = FastEncoder(folders["small"], device="cpu")
    with_stand_in(encoder)
    expected = [encoder.encode(text) for text in TEXTS]
    failures: list[str] = []

    def work(index: int) -> None:
        for i in range(10):
            k = (index + i) % len(TEXTS)
            if not np.array_equal(encoder.encode(TEXTS[k]), expected[k]):
                failures.append(f"thread {index}, text {k}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
