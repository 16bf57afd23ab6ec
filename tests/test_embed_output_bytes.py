"""embed_output's bytes and its spans: quantisation, flags, long rows, for every implementation."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from native import CPU_RUNS, KERNEL_RUNS, RUNS
from output_reference import EPS, MODES, WIDTH, assert_near, draw, reference
from sentence_transformers.util import quantize_embeddings

from jv5kernels.ops import embed_output


def quantised_by_them(embeddings, precision, ranges):
    """The bytes of Sentence Transformers for given float32 embeddings."""
    theirs = quantize_embeddings(
        embeddings.cpu(), precision, ranges=None if ranges is None else ranges.cpu().numpy()
    )
    return torch.from_numpy(theirs)


def ranges_for(embeddings):
    """Ranges narrower than the data, so that codes saturate, with one constant dimension."""
    ranges = torch.stack([embeddings.quantile(0.2, dim=0), embeddings.quantile(0.8, dim=0)])
    ranges[1, -1] = ranges[0, -1]
    return ranges


DIMS = [33, 8]
QUANTISED = ["int8", "uint8", "binary", "ubinary"]


def assert_bytes_match(hidden, cu_seqlens, options, precisions=QUANTISED):
    """The bytes of embed_output are theirs for the float32 embeddings that it gives."""
    embeddings, _ = embed_output(hidden, cu_seqlens, **options)
    for precision in precisions:
        ranges = ranges_for(embeddings) if "int8" in precision else None
        out, flags = embed_output(hidden, cu_seqlens, precision=precision, ranges=ranges, **options)
        expected = quantised_by_them(embeddings, precision, ranges)
        assert out.dtype == expected.dtype and out.is_contiguous()
        assert torch.equal(out.cpu(), expected) and not flags.any()


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_those_of_sentence_transformers(mode, normalize, impl, place, poisoned_memory):
    lengths = [2, 1, 3, 70]
    hidden, weight = draw((76, WIDTH), device=place), draw((WIDTH,), device=place, seed=1)
    options = {"mode": mode, "norm_weight": weight, "normalize": normalize, "impl": impl}
    for dim in DIMS:
        options["truncate_dim"] = dim
        assert_bytes_match(hidden, ragged(lengths, place), options)


@settings(max_examples=15)
@given(
    width=st.integers(1, 40),
    rows=st.integers(0, 4),
    precision=st.sampled_from(QUANTISED),
    scale=st.sampled_from([1e-18, 1.0, 1e12]),
    seed=st.integers(0, 99),
    data=st.data(),
)
@pytest.mark.parametrize(("impl", "place"), CPU_RUNS)
def test_bytes_at_any_width(impl, place, width, rows, precision, scale, seed, data):
    dim = data.draw(st.integers(1, width))
    hidden = draw((rows + 1, width), seed=seed) * scale
    options = {"mode": "cls", "truncate_dim": dim, "normalize": seed % 2 == 0, "impl": impl}
    assert_bytes_match(hidden, ragged([1] * (rows + 1)), options, [precision])


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("precision", QUANTISED)
@pytest.mark.parametrize("mode", MODES)
def test_flags_of_quantised_rows(mode, precision, impl, place, poisoned_memory):
    hidden = draw((8, 20), device=place)
    hidden[1, 3], hidden[3, 19], hidden[4, 0], hidden[6, 0] = torch.nan, torch.inf, 1e30, -torch.inf
    ranges = torch.tensor([[-0.1] * 19, [0.1] * 19], device=place)
    options = {"mode": mode, "truncate_dim": 19, "precision": precision, "impl": impl}
    options["ranges"] = ranges if "int8" in precision else None
    cu_seqlens = ragged([1, 1, 0, 1, 1, 1, 1, 1, 1], place)
    # 1e30 has no square in float32; the infinite column 19 is cut off.
    expected = {True: [0, 1, 0, 0, 0, 1, 0, 1, 0], False: [0, 1, 0, 0, 0, 0, 0, 1, 0]}
    for normalize, flagged in expected.items():
        values, flags = embed_output(hidden, cu_seqlens, normalize=normalize, **options)
        assert flags.tolist() == flagged
        empty = torch.zeros(1, 19)
        assert torch.equal(
            values[2:3].cpu(),
            quantised_by_them(empty, precision, options["ranges"]),
        )


@pytest.mark.parametrize(("impl", "place"), KERNEL_RUNS)
def test_long_sequences_among_short_ones(impl, place, poisoned_memory):
    """Programs share a long row: neither how many do, nor the other rows, may change a bit."""
    lengths = [1100, 0, 3, 1030, 64]
    hidden = draw((sum(lengths), 40), device=place)
    options = {"mode": "mean", "norm_weight": draw((40,), device=place, seed=1), "impl": impl}
    out, _ = embed_output(hidden, ragged(lengths, place), **options)
    assert not out[1].any()
    expected = reference(hidden, [1100, 3, 1030, 64], "mean", options["norm_weight"])
    assert_near(out[[0, 2, 3, 4]], expected)
    alone, _ = embed_output(hidden[1103:2133], ragged([1030], place), **options)
    assert torch.equal(alone[0], out[3])
    spans = torch.tensor([[1103, 2133], [0, 1100]], dtype=torch.int32)
    both, _ = embed_output(hidden, ragged(lengths, place), spans=spans, **options)
    assert torch.equal(both, out[[3, 0]])


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("repeats_number", [False, True])
def test_counters_need_no_initial_value(repeats_number, place, monkeypatch):
    """Working memory of any content, that of an earlier call too; a graph repeats the number of its call."""
    from jv5kernels.kernels import tree as kernels

    # 66 chunks, the leaves of a tree of three levels.
    lengths = [4200, 300, 3]
    hidden = draw((sum(lengths), 40), device=place)
    options = {"mode": "mean", "impl": "triton"}
    expected, _ = embed_output(hidden, ragged(lengths, place), **options)
    memory = torch.full((200, kernels.row_stride.fn(40)), -1, dtype=torch.int32, device=place)
    numbers = itertools.repeat(1 << 45) if repeats_number else itertools.count(1 << 45)
    monkeypatch.setattr(kernels, "CALLS", numbers)
    monkeypatch.setattr(
        kernels, "partial_sums", lambda _, programs: memory.view(torch.float32)[:programs]
    )
    for order in (1, -1):
        rows = hidden.split(lengths)[::order]
        out, _ = embed_output(torch.cat(rows), ragged(lengths[::order], place), **options)
        assert torch.equal(out, expected if order == 1 else expected.flip(0))


@pytest.mark.gpu
def test_who_arrives_last_changes_no_bit():
    """A long row alone, among others, again and again, and on two streams at once."""
    hidden, weight = draw((32768, 1024), device="cuda"), draw((1024,), device="cuda", seed=1)
    options = {"mode": "mean", "norm_weight": weight, "impl": "triton"}
    alone, _ = embed_output(hidden[:20000], ragged([20000], "cuda"), **options)
    for others in (1, 63, 300, 1500):
        rest = 32768 - 20000
        cu_seqlens = ragged([20000, *[rest // others] * others], "cuda")
        outputs = [embed_output(hidden, cu_seqlens, **options) for _ in range(20)]
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        for i in range(20):
            with torch.cuda.stream(streams[i % 2]):
                outputs.append(embed_output(hidden, cu_seqlens, **options))
        torch.cuda.synchronize()
        for out, flags in outputs:
            assert torch.equal(out[:1], alone) and torch.equal(out, outputs[0][0])
            assert not flags.any()


@pytest.mark.gpu
def test_graphs_repeat_means():
    hidden, weight = draw((9000, 1024), device="cuda"), draw((1024,), device="cuda", seed=1)
    lengths = [5000, 1, 0, 900, 3099]
    options = {"mode": "mean", "norm_weight": weight, "impl": "triton"}
    cu_seqlens = ragged(lengths, "cuda")
    expected, _ = embed_output(hidden, cu_seqlens, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [embed_output(hidden, cu_seqlens, **options) for _ in range(2)]
    for _ in range(20):
        for out, flags in results:
            out.fill_(float("nan"))
            flags.fill_(1)
        graph.replay()
        embed_output(hidden, cu_seqlens, **options)
        for out, flags in results:
            assert torch.equal(out, expected) and not flags.any()


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
@pytest.mark.parametrize(("width", "dim"), [(1024, 1024), (1024, 250), (768, 768), (2304, 64)])
def test_bytes_at_real_shapes(width, dim, mode, normalize):
    lengths = [180] * 100 + [1, 2000, 5000, 63]
    hidden = draw((sum(lengths), width), device="cuda") * 30
    weight = draw((width,), torch.bfloat16, "cuda", seed=1)
    options = {"mode": mode, "norm_weight": weight, "normalize": normalize}
    options |= {"truncate_dim": dim, "impl": "triton"}
    assert_bytes_match(hidden, ragged(lengths, "cuda"), options)


@pytest.mark.gpu
def test_mean_of_32768_tokens_with_norm():
    for dtype in (torch.float32, torch.bfloat16):
        hidden = draw((32768, 1024), dtype, "cuda") + torch.linspace(0, 3, 1024, device="cuda").to(
            dtype
        )
        weight = draw((1024,), torch.bfloat16, "cuda", seed=1)
        out, _ = embed_output(
            hidden, ragged([32768], "cuda"), mode="mean", norm_weight=weight, impl="triton"
        )
        assert_near(out, reference(hidden, [32768], "mean", weight))


SPANS = [(40, 110), (0, 3), (0, 150), (7, 7), (149, 150), (0, 3), (150, 150), (3, 140)]


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("table_place", ["cpu", "device"])
@pytest.mark.parametrize("mode", MODES)
def test_spans_overlap_in_any_order(mode, table_place, impl, place, poisoned_memory):
    lengths = [30, 120]
    hidden, cu_seqlens = draw((150, WIDTH), device=place), ragged(lengths, place)
    weight = draw((WIDTH,), device=place, seed=1)
    parent = torch.full((len(SPANS), 4), -1, dtype=torch.int32)
    parent[:, 1:3] = torch.tensor(SPANS, dtype=torch.int32)
    parent = parent.to(place if table_place == "device" else "cpu")
    options = {"mode": mode, "norm_weight": weight, "truncate_dim": 33, "impl": impl}
    out, flags = embed_output(hidden, cu_seqlens, spans=parent[:, 1:3], **options)
    assert not flags.any()
    for row, (start, end) in zip(out, SPANS, strict=True):
        if start == end:
            assert not row.any()
            continue
        expected = reference(hidden[start:end], [end - start], mode, weight, EPS, 33)
        assert_near(row[None], expected)
    assert torch.equal(out[1], out[5])
    bits, _ = embed_output(hidden, cu_seqlens, spans=parent[:, 1:3], precision="ubinary", **options)
    assert torch.equal(bits.cpu(), quantised_by_them(out, "ubinary", None))


@pytest.mark.parametrize(("impl", "place"), KERNEL_RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_a_span_has_the_bits_of_a_sequence(mode, impl, place):
    hidden, cu_seqlens = draw((140, WIDTH), device=place), ragged([1, 70, 0, 69], place)
    options = {"mode": mode, "norm_weight": draw((WIDTH,), device=place, seed=1), "impl": impl}
    expected, _ = embed_output(hidden, cu_seqlens, **options)
    bounds = cu_seqlens.cpu()
    spans = torch.stack([bounds[:-1], bounds[1:]], 1).flip(0)
    out, _ = embed_output(hidden, cu_seqlens, spans=spans, **options)
    assert torch.equal(out.flip(0), expected)


@pytest.mark.parametrize("spans", [[[0, 5]], [[0, 2], [3, 1]], [[-1, 2]]])
@pytest.mark.parametrize(("impl", "place"), RUNS)
def test_spans_outside_the_tokens_are_refused(impl, place, spans):
    hidden, cu_seqlens = torch.ones(4, 8, device=place), ragged([4], place)
    table = torch.tensor(spans, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"spans\[{len(spans) - 1}\] is .*0 <= start <= end <= 4"):
        embed_output(hidden, cu_seqlens, mode="mean", spans=table, impl=impl)
