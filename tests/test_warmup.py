"""Warm-up meets every compiled variant that traffic can bring, and traffic's lengths compile nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graphs import Rerun

from jv5kernels import FastEncoder, graphs
from jv5kernels.graphs import BUCKETS, ShortInputs
from jv5kernels.ops import short_attention, short_linear, short_norm
from jv5kernels.output import OutputFormat, embed_batch
from jv5kernels.packing import pack
from jv5kernels.synthetic.checkpoint import write_checkpoint
from jv5kernels.warmup import warm_lengths

MAX_LENGTH, BUDGET = 2048, 4096
POOLINGS = ("lasttoken", "mean", "cls")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        family: write_checkpoint(root / family, family=family, layout="merged")
        for family in ("small", "nano")
    }


def specialisation(kernel, arguments: dict[str, object]) -> tuple:
    """What Triton 3.6 and later look up a compiled kernel by: types, alignment and special values, constants."""
    free = set(kernel.kwargs.get("do_not_specialize") or ())
    key: list[object] = [kernel.fn.__name__]
    for name, value in sorted(arguments.items()):
        if (
            "constexpr" in str(kernel.fn.__annotations__.get(name, ""))
            or name not in kernel.arg_names
        ):
            key.append((name, value))
        elif isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and not isinstance(value, bool) and name not in free:
            key.append((name, value == 1, value % 16 == 0))
        else:
            key.append((name, type(value).__name__))
    return tuple(key)


@pytest.fixture
def launches(monkeypatch) -> list[tuple[object, dict[str, object]]]:
    """Kernel launches, which are noted and not carried out: their arguments are all that matters here."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    noted: list[tuple[object, dict[str, object]]] = []

    def note(self, *args, grid, warmup, **kwargs) -> None:
        noted.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", note)
    monkeypatch.setenv("JV5_IMPL", "triton")
    return noted


def embed(encoder: FastEncoder, lengths: list[int], pooling: str, batch_invariant: bool) -> None:
    backbone = encoder._backbones.get(None)
    backbone.batch_invariant = batch_invariant
    output = OutputFormat(pooling, backbone.spec.hidden_size)
    ids = [np.zeros(length, np.int32) for length in lengths]
    with torch.inference_mode():
        embed_batch(output, backbone, pack(ids, np.arange(len(ids)), "cpu"))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", ["small", "nano"])
def test_traffic_meets_no_variant_that_the_warm_up_did_not(family, pooling, folders, launches):
    encoder = FastEncoder(folders[family], device="cpu")
    for batch_invariant in (False, True):
        for lengths in warm_lengths(MAX_LENGTH, BUDGET):
            embed(encoder, lengths, pooling, batch_invariant)
    warm = {specialisation(*launch) for launch in launches}
    assert len(warm) >= 6
    launches.clear()
    traffic = [
        *([n] for n in (1, 2, 15, 16, 17, 64, 100, 511, 512, 513, 1000, 2048)),
        [1] * 16,
        [16] * 16,
        [3, 1, 700],
        [1] * 33,
    ]
    for lengths in traffic:
        embed(encoder, lengths, pooling, True)
        embed(encoder, lengths, pooling, False)
    assert launches
    assert {specialisation(*launch) for launch in launches} <= warm


@settings(max_examples=10)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=16))
def test_integer_arguments_are_constants_of_the_model_or_not_specialised(folders, lengths):
    """A length or a count as an ordinary argument would be compiled for being 1 or a multiple of 16."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = launches.__wrapped__(monkeypatch)  # type: ignore[attr-defined]
        encoder = FastEncoder(folders["small"], device="cpu")
        for pooling in POOLINGS:
            embed(encoder, lengths, pooling, True)
        rows = torch.zeros(len(lengths), 256)
        short_norm(rows, rows, rows[0], 1e-6, impl="triton")
        short_linear(rows, torch.zeros(32, 256), impl="triton")
        short_attention(
            torch.zeros(1, 96),
            torch.zeros(1, 32),
            torch.zeros(len(lengths) + 1, dtype=torch.int32),
            1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=32,
            causal=True,
            impl="triton",
        )
    assert seen
    for kernel, arguments in seen:
        free = set(kernel.kwargs.get("do_not_specialize") or ())
        for name in kernel.arg_names:
            is_constant = "constexpr" in str(kernel.fn.__annotations__.get(name, ""))
            if isinstance(arguments[name], int) and not is_constant and name[:6] != "stride":
                assert name in free, f"{kernel.fn.__name__}: {name}"


def test_the_warm_up_records_every_bucket_and_changes_no_result(folders, monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURABLE", ("torch", "cpp", *graphs.CAPTURABLE))
    encoder = FastEncoder(folders["nano"], device="cpu", token_budget=1024, max_seq_length=600)
    before = encoder.encode("a text")
    recorder = Rerun()
    encoder._short = ShortInputs(torch.device("cpu"), recorder)
    report = encoder.warmup()
    assert report.recordings == recorder.recorded == len(BUCKETS) and report.seconds > 0
    np.testing.assert_allclose(encoder.encode("a text"), before, atol=2e-6)
    assert recorder.recorded == len(BUCKETS)
    with pytest.raises(ValueError, match="no adapters"):
        encoder.warmup(["retrieval"])


def test_warm_lengths_fit_the_budget():
    for longest, budget in ((8192, 1024), (1, 1), (2, 7), (32768, 32768)):
        for lengths in warm_lengths(min(longest, budget), budget):
            assert min(lengths) >= 1 and max(lengths) <= longest
            assert sum(lengths) <= max(budget, 20)


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", POOLINGS)
def test_nothing_is_compiled_or_recorded_after_the_warm_up(pooling, folders):
    from triton import knobs

    encoder = FastEncoder(folders["small"], device="cuda", dtype=torch.bfloat16, pooling=pooling)
    encoder.warmup()
    recordings = len(encoder._short)
    compiled: list[str] = []

    def note(**details) -> None:
        compiled.append(str(details.get("repr")))

    knobs.runtime.jit_cache_hook = note
    try:
        for count in (1, 2, 7, 16, 33):
            for words in (1, 2, 14, 15, 16, 60, 500, 2000):
                encoder.encode(["word " * words] * count)
        encoder.encode([f"{'text ' * (i % 300)}" for i in range(2000)])
    finally:
        knobs.runtime.jit_cache_hook = None
    assert compiled == []
    assert len(encoder._short) == recordings
