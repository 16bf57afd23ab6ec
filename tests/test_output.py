"""Quantised output of the encoder: calibrations, ranges of a call, storage profiles, and what is refused."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_folders import copied, written  # noqa: F401
from edits import edit_tensors
from sentence_transformers.util import quantize_embeddings

from jv5kernels import FastEncoder
from jv5kernels.calibration import Calibration
from jv5kernels.ops.pool import POOLING_MODES
from jv5kernels.storage import PROFILES, convert, layout_of, unpack_bits

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [f"{word} number {i} " * (i % 5 + 1) for i, word in enumerate(["text", "note"] * 60)]
DIM = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from jv5kernels.synthetic.checkpoint import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("model") / "base", family="small")


@pytest.fixture(scope="module")
def encoder(folder) -> FastEncoder:
    return FastEncoder(folder, device="cpu", task="retrieval", truncate_dim=DIM)


@pytest.fixture(scope="module")
def floats(encoder) -> np.ndarray:
    return encoder.encode(TEXTS)


@pytest.fixture(scope="module")
def calibration(encoder) -> Calibration:
    return encoder.calibrate(TEXTS)


@pytest.fixture(scope="module")
def symmetric(encoder) -> Calibration:
    return encoder.calibrate(TEXTS, symmetric=True)


# Calibration.


def test_a_calibration_codes_corpus_and_queries(encoder, floats, tmp_path) -> None:
    calibration = encoder.calibrate(iter(TEXTS))
    assert np.array_equal(calibration.ranges, np.stack([floats.min(0), floats.max(0)]))
    assert (calibration.count, calibration.clip_rate) == (len(TEXTS), 0.0)
    calibration.save(tmp_path / "ranges.json")
    codes = encoder.encode(TEXTS, precision="int8", calibration=tmp_path / "ranges.json")
    expected = quantize_embeddings(floats, "int8", ranges=calibration.ranges)
    assert np.array_equal(codes, expected)
    queries = encoder.encode_query(TEXTS[:3], precision="int8", calibration=calibration)
    wanted = quantize_embeddings(encoder.encode_query(TEXTS[:3]), "int8", ranges=calibration.ranges)
    assert np.array_equal(queries, wanted)


def test_blocks_do_not_change_a_calibration(encoder, monkeypatch) -> None:
    seen: list[int] = []
    whole = encoder.calibrate(TEXTS, percentile=99, progress=seen.append)
    monkeypatch.setattr("jv5kernels.calibration.BLOCK_TEXTS", {"cpu": 50})
    parts = encoder.calibrate(TEXTS, percentile=99, progress=seen.append)
    assert seen == [120, 50, 50, 20]
    # Other batches move the last bits of a float32 sum.
    np.testing.assert_allclose(parts.ranges, whole.ranges, rtol=1e-5, atol=1e-7)
    assert 0.003 < whole.clip_rate < 0.03
    clipped = whole.clipped(encoder.encode(TEXTS))
    assert clipped == pytest.approx(whole.clip_rate, abs=0.01)


def test_the_encoder_keeps_a_calibration(folder, encoder, tmp_path, floats) -> None:
    encoder.calibrate(TEXTS).save(tmp_path / "ranges.json")
    ready = FastEncoder(
        folder,
        device="cpu",
        task="retrieval",
        truncate_dim=DIM,
        precision="uint8",
        calibration=tmp_path / "ranges.json",
    )
    ranges = Calibration.load(tmp_path / "ranges.json").ranges
    assert np.array_equal(ready.encode(TEXTS), quantize_embeddings(floats, "uint8", ranges=ranges))
    assert ready.encode(TEXTS[0], precision="float32").dtype == np.float32


def test_another_task_prompt_or_dimension_is_an_error_that_says_both_sides(
    encoder, calibration
) -> None:
    def attempt(**options: object) -> None:
        encoder.encode(TEXTS[:2], precision="int8", calibration=calibration, **options)

    with pytest.raises(ValueError, match="task='retrieval'.*task='clustering'"):
        attempt(task="clustering")
    with pytest.raises(ValueError, match="task='retrieval'.*task='clustering'"):
        attempt(task=["retrieval", "clustering"])
    with pytest.raises(ValueError, match="dim=48.*dim=32"):
        attempt(truncate_dim=32)
    with pytest.raises(ValueError, match="prompt='Document: '.*prompt='Passage: '"):
        attempt(prompt="Passage: ")
    with pytest.raises(ValueError, match="normalize=True.*normalize=False"):
        attempt(normalize_embeddings=False)
    queries = encoder.calibrate(TEXTS, prompt_name="query")
    with pytest.raises(ValueError, match="prompt='Query: '.*prompt='Document: '"):
        encoder.encode(TEXTS[:2], precision="int8", calibration=queries)
    # Raw ranges are the way around the check.
    encoder.encode(TEXTS[:2], precision="int8", ranges=calibration.ranges, task="clustering")


def test_a_copy_of_the_model_is_the_same_model_and_changed_weights_are_not(
    encoder, folder, calibration, tmp_path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))

    def attempt(model: Path) -> np.ndarray:
        other = FastEncoder(model, device="cpu", task="retrieval", truncate_dim=DIM)
        return other.encode(TEXTS, precision="int8", calibration=calibration)

    assert np.array_equal(
        attempt(copy), encoder.encode(TEXTS, precision="int8", calibration=calibration)
    )
    edit_tensors(copy / "model.safetensors", lambda t: t["norm.weight"].mul_(1.5))
    with pytest.raises(ValueError, match="model=.*weights=.*this call has model=.*copy"):
        attempt(copy)


def test_a_changed_adapter_is_another_model(folder, calibration, tmp_path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    adapter = copy / "adapters" / "retrieval" / "adapter_model.safetensors"
    edit_tensors(adapter, lambda t: [v.add_(0.5) for v in t.values()])
    other = FastEncoder(copy, device="cpu", task="retrieval", truncate_dim=DIM)
    with pytest.raises(ValueError, match="the calibration does not fit"):
        other.encode(TEXTS, precision="int8", calibration=calibration)


def test_a_live_model_of_the_same_weights_takes_the_calibration(written) -> None:  # noqa: F811
    from transformers import AutoModel

    merged = written(family="small", layout="merged", task="retrieval")
    stored = FastEncoder(merged, device="cpu")
    calibration = stored.calibrate(TEXTS, prompt="")
    live = FastEncoder(
        AutoModel.from_pretrained(merged, dtype=torch.float32),
        tokenizer=merged / "tokenizer.json",
        pooling=stored.pooling,
        prompts={},
    )
    codes = live.encode(TEXTS, prompt="", precision="int8", calibration=calibration)
    assert np.array_equal(
        codes, stored.encode(TEXTS, prompt="", precision="int8", calibration=calibration)
    )


# Ranges of the call itself.


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_ranges_of_the_batch_are_those_of_sentence_transformers(encoder, floats, precision) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = encoder.encode(TEXTS, precision=precision, ranges="batch")
    expected = quantize_embeddings(floats, precision)
    assert codes.dtype == expected.dtype and np.array_equal(codes, expected)


def test_few_texts_warn_and_one_is_refused_as_there(encoder, floats, caplog) -> None:
    few = encoder.encode(TEXTS[:99])
    with caplog.at_level(logging.WARNING):
        expected = quantize_embeddings(few, "int8")
    assert "99 embeddings" in caplog.text
    with pytest.warns(UserWarning, match="ranges of 99 embeddings"):
        assert np.array_equal(
            encoder.encode(TEXTS[:99], precision="int8", ranges="batch"), expected
        )
    for one in (["a"], "a"):
        with pytest.raises(ValueError, match="more than one text"):
            encoder.encode(one, precision="int8", ranges="batch")
        with pytest.raises(ValueError, match="single embedding"):
            quantize_embeddings(encoder.encode(["a"]), "int8")
    assert encoder.encode([], precision="int8", ranges="batch").shape == (0, DIM)
    with pytest.raises(ValueError, match="ranges='corpus': the only name is 'batch'"):
        encoder.encode(TEXTS, precision="int8", ranges="corpus")


# Storage profiles.


@pytest.mark.parametrize("convert_to_tensor", [False, True])
@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_a_profile_gives_what_its_layout_says(
    encoder, floats, symmetric, profile, convert_to_tensor
) -> None:
    for precision in PROFILES[profile].layouts:
        found = encoder.encode(
            TEXTS,
            precision=precision,
            profile=profile,
            calibration=symmetric,
            convert_to_tensor=convert_to_tensor,
        )
        layout = layout_of(profile, precision)
        dtype = str(found.dtype).removeprefix("torch.")
        assert dtype == layout.dtype
        if dtype in ("float32", "float16", "bfloat16"):
            assert torch.equal(
                torch.as_tensor(found), torch.from_numpy(floats).to(getattr(torch, dtype))
            )
            continue
        expected = quantize_embeddings(floats, precision, ranges=symmetric.ranges)
        if profile != "sentence-transformers":
            expected = convert(expected, precision, source="sentence-transformers", target=profile)
        assert np.array_equal(np.asarray(found), expected), precision


def test_bits_are_reversed_in_parts(encoder, floats, monkeypatch) -> None:
    monkeypatch.setattr("jv5kernels.output.REVERSE_ROWS", 7)
    codes = encoder.encode(TEXTS, precision="binary", profile="milvus")
    assert np.array_equal(codes, np.packbits(floats > 0, axis=1, bitorder="little"))


def test_bits_of_an_lsb_first_store(encoder, floats) -> None:
    codes = encoder.encode(TEXTS, precision="binary", profile="faiss")
    assert np.array_equal(codes, np.packbits(floats > 0, axis=1, bitorder="little"))
    assert np.array_equal(unpack_bits(codes, DIM, profile="faiss"), floats > 0)
    one = encoder.encode(TEXTS[0], precision="binary", profile="faiss")
    assert np.array_equal(one, codes[0])
    assert encoder.encode([], precision="binary", profile="faiss").shape == (0, DIM // 8)


def test_stores_that_compare_codes_refuse_ranges_that_would_distort_them(
    encoder, calibration
) -> None:
    for ranges in ({"calibration": calibration}, {"ranges": "batch"}):
        with pytest.raises(ValueError, match="profile='usearch' takes distances between the codes"):
            encoder.encode(TEXTS, precision="int8", profile="usearch", **ranges)
        encoder.encode(TEXTS, precision="int8", profile="faiss", **ranges)
    # One range of all dimensions around zero, however it was made, keeps their order.
    for bound in (0.3, 1.0):
        plain = np.stack([np.full(DIM, -bound), np.full(DIM, bound)])
        encoder.encode(TEXTS, precision="int8", profile="usearch", ranges=plain)
    shifted = np.stack([np.full(DIM, 0.0), np.full(DIM, 1.0)])
    with pytest.raises(ValueError, match="symmetric=True"):
        encoder.encode(TEXTS, precision="int8", profile="milvus", ranges=shifted)


def test_profiles_are_checked_before_anything_runs(encoder, folder, monkeypatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("jv5kernels.backbone.PackedBackbone.forward_pooled", never)
    with pytest.raises(ValueError, match="profile='redis' is unknown"):
        encoder.encode(TEXTS, profile="redis")
    with pytest.raises(ValueError, match="'qdrant' has no precision 'binary'"):
        encoder.encode(TEXTS, precision="binary", profile="qdrant")
    with pytest.raises(ValueError, match="multiple of 8 dimensions, not 12"):
        encoder.encode(TEXTS, precision="binary", profile="milvus", truncate_dim=12)
    with pytest.raises(ValueError, match="'pgvector' has no precision 'int8'"):
        FastEncoder(folder, device="cpu", precision="int8", profile="pgvector")


def test_the_encoders_profile_is_the_default(folder, floats) -> None:
    encoder = FastEncoder(
        folder,
        device="cpu",
        task="retrieval",
        truncate_dim=DIM,
        precision="binary",
        profile="elasticsearch",
    )
    codes = encoder.encode(TEXTS)
    assert codes.dtype == np.int8
    assert np.array_equal(codes.view(np.uint8), np.packbits(floats > 0, axis=1))
    canonical = encoder.encode(TEXTS, precision="ubinary", profile="sentence-transformers")
    assert np.array_equal(canonical, codes.view(np.uint8))


@pytest.mark.parametrize("pooling", POOLING_MODES)
@pytest.mark.parametrize("precision", ["binary", "ubinary", "int8", "uint8", "float16"])
def test_one_operator_makes_the_bytes(folder, pooling, precision, monkeypatch) -> None:
    """What the operator gives is what is stored: no second step sees floats."""
    import jv5kernels.output as output

    encoder = FastEncoder(folder, device="cpu", task="retrieval", truncate_dim=DIM, pooling=pooling)
    original, given = output.embed_output, []

    def watched(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        values, flags = original(*arguments, **options)
        given.append((options["precision"], values.dtype, values.shape[1]))
        return values, flags

    monkeypatch.setattr(output, "embed_output", watched)
    ranges = np.stack([np.full(DIM, -0.5), np.full(DIM, 0.5)])
    codes = encoder.encode(TEXTS, precision=precision, ranges=ranges)
    dtype = getattr(torch, str(codes.dtype))
    assert set(given) == {(precision, dtype, codes.shape[1])}


@pytest.mark.gpu
@pytest.mark.parametrize("profile", [None, "faiss", "elasticsearch"])
@pytest.mark.parametrize("precision", ["binary", "int8"])
def test_codes_on_the_gpu_are_those_of_its_floats(folder, precision, profile) -> None:
    encoder = FastEncoder(folder, device="cuda", task="retrieval", truncate_dim=DIM)
    calibration = encoder.calibrate(TEXTS, symmetric=True)
    options = {"precision": precision, "calibration": calibration, "profile": profile}
    floats = encoder.encode(TEXTS)
    expected = quantize_embeddings(floats, precision, ranges=calibration.ranges)
    if profile is not None:
        expected = convert(expected, precision, source="sentence-transformers", target=profile)
    codes = encoder.encode(TEXTS, **options)
    assert codes.dtype == expected.dtype and np.array_equal(codes, expected)
    on_device = encoder.encode(TEXTS, convert_to_tensor=True, **options)
    assert on_device.is_cuda and np.array_equal(on_device.cpu().numpy(), expected)


@pytest.mark.gpu
def test_nothing_but_the_bytes_leaves_the_gpu(folder, tmp_path) -> None:
    """Of the profiler's copies to the host: dim/8 bytes a vector, and a byte or so a batch."""
    import json

    encoder = FastEncoder(folder, device="cuda", task="retrieval", truncate_dim=DIM)
    texts = TEXTS * 20
    encoder.encode(texts, precision="binary")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        encoder.encode(texts, precision="binary")
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    copies = [e["args"]["bytes"] for e in events if "DtoH" in e.get("name", "") and "args" in e]
    least = len(texts) * DIM // 8
    assert copies and least <= sum(copies) <= least + 64 * len(copies)
