"""embed_output against float64 for every implementation, on the CPU and on the GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from native import (
    CPU_RUNS,
    KERNEL_RUNS,
    RUNS,
    dispatch_level,
    guarded_outputs,
    levels,
    torch_threads,
)
from sentence_transformers.util import quantize_embeddings
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import embed_output

MODES = ["lasttoken", "mean", "cls"]
LENGTHS = [1, 2, 63, 64, 65, 300]
WIDTH = 72
EPS = 1e-6
# ‖error‖ / ‖reference‖: fp32 arithmetic, then one rounding to the output's dtype (a truncation under
# Triton's interpreter).
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def draw(shape: tuple[int, ...], dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def reference(hidden, lengths, mode, weight=None, eps=EPS, dim=None, normalize=True):
    """The definition, one sequence at a time, in float64."""
    rows = []
    for tokens in hidden.double().split(lengths):
        if weight is not None:
            tokens = tokens / (tokens.square().mean(-1, keepdim=True) + eps).sqrt()
            tokens = tokens * weight.double()
        rows.append({"lasttoken": tokens[-1], "cls": tokens[0], "mean": tokens.mean(0)}[mode])
    out = torch.stack(rows)[:, :dim]
    return F.normalize(out, dim=-1) if normalize else out


def assert_near(out, expected, dtype=torch.float32):
    errors = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() <= TOLERANCE[dtype], f"relative errors {errors.tolist()}"


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_matches_float64(mode, has_norm, dtype, impl, place, poisoned_memory):
    if impl == "cpp":
        dtype = torch.float32
    hidden = draw((sum(LENGTHS), WIDTH), dtype, place)
    weight = draw((WIDTH,), dtype, place, seed=1) if has_norm else None
    for dim, normalize in [(None, True), (40, True), (31, False), (1, True)]:
        out, flags = embed_output(
            hidden,
            ragged(LENGTHS, place),
            mode=mode,
            norm_weight=weight,
            eps=EPS,
            truncate_dim=dim,
            normalize=normalize,
            impl=impl,
        )
        assert out.dtype == torch.float32 and out.is_contiguous()
        assert flags.dtype == torch.uint8 and not flags.any()
        assert_near(out, reference(hidden, LENGTHS, mode, weight, EPS, dim, normalize))


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_output_dtypes(dtype, impl, place, poisoned_memory):
    hidden = draw((9, WIDTH), device=place)
    out, flags = embed_output(
        hidden, ragged([4, 5], place), mode="lasttoken", precision=str(dtype)[6:], impl=impl
    )
    assert out.dtype == dtype and not flags.any()
    assert_near(out, reference(hidden, [4, 5], "lasttoken"), dtype)


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


@pytest.mark.gpu
def test_shared_rows_whatever_the_number_of_programs():
    """From 32 programs a long row down to two; repeated, so that the last to arrive varies."""
    hidden, weight = draw((32768, 1024), device="cuda"), draw((1024,), device="cuda", seed=1)
    options = {"mode": "mean", "norm_weight": weight, "impl": "triton"}
    alone, _ = embed_output(hidden[:20000], ragged([20000], "cuda"), **options)
    for others in (1, 63, 300, 1500):
        rest = 32768 - 20000
        lengths = [20000, *[rest // others] * others]
        cu_seqlens = ragged(lengths, "cuda")
        for _ in range(20):
            out, flags = embed_output(hidden, cu_seqlens, **options)
            assert torch.equal(out[:1], alone) and not flags.any()


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [768, 1024, 2304])
def test_bytes_at_real_shapes(width, mode, normalize):
    lengths = [180] * 100 + [1, 2000, 5000, 63]
    hidden = draw((sum(lengths), width), device="cuda") * 30
    weight = draw((width,), torch.bfloat16, "cuda", seed=1)
    for dim in (width, 256, 250, 1):
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


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [[32768], [512] * 64, [1, 8191, 63, 20000, 4513]])
@pytest.mark.parametrize("width", [768, 1024, 4096])
def test_real_shapes(width, lengths, mode):
    hidden = draw((sum(lengths), width), torch.bfloat16, "cuda") * 30
    weight = draw((width,), torch.bfloat16, "cuda", seed=1)
    cu_seqlens = ragged(lengths, "cuda")
    for dim in (None, 256):
        out, flags = embed_output(
            hidden, cu_seqlens, mode=mode, norm_weight=weight, truncate_dim=dim, impl="triton"
        )
        assert_near(out, reference(hidden, lengths, mode, weight, EPS, dim))
        assert (out.double().norm(dim=-1) - 1).abs().max() <= 1e-6
        assert not flags.any()


@pytest.mark.parametrize(("impl", "place"), KERNEL_RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_strided_rows_and_margins(mode, impl, place, monkeypatch):
    lengths = [3, 70, 1]
    parent = torch.full((sum(lengths) + 2, WIDTH + 16), float("nan"), device=place)
    parent[1:-1, 8:-8] = draw((sum(lengths), WIDTH), device=place)
    hidden, weight = parent[1:-1, 8:-8], draw((WIDTH,), device=place, seed=1)
    options = {"mode": mode, "norm_weight": weight, "truncate_dim": 33, "impl": impl}
    cu_seqlens = ragged(lengths, place)
    expected, _ = embed_output(hidden.contiguous(), cu_seqlens, **options)
    strided, _ = embed_output(hidden, cu_seqlens, **options)
    torch.testing.assert_close(strided, expected, rtol=0, atol=1e-6)
    with guarded_outputs(monkeypatch):
        embed_output(hidden, cu_seqlens, **options)


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_flags_mark_the_rows_that_are_not_finite(mode, impl, place, poisoned_memory):
    lengths = [2, 3, 1, 4]
    hidden = draw((10, WIDTH), device=place)
    clean, _ = embed_output(hidden, ragged(lengths, place), mode=mode, impl=impl)
    hidden[0:2, 5] = float("nan")
    hidden[5, 1] = float("inf")
    for weight in (None, torch.ones(WIDTH, device=place)):
        options = {"mode": mode, "norm_weight": weight, "impl": impl}
        out, flags = embed_output(hidden, ragged(lengths, place), **options)
        assert flags.tolist() == [1, 0, 1, 0]
        assert out[[1, 3]].isfinite().all()
    assert torch.equal(
        embed_output(hidden, ragged(lengths, place), mode=mode, impl=impl)[0][[1, 3]], clean[[1, 3]]
    )


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_flags_see_overflow(mode, impl, place):
    hidden = torch.tensor([[1e5, 1.0], [1.0, 1.0], [1e30, 1e30]], device=place)
    cu_seqlens = ragged([1, 1, 1], place)
    options = {"mode": mode, "impl": impl}
    half = embed_output(hidden, cu_seqlens, normalize=False, precision="float16", **options)
    assert half[1].tolist() == [1, 0, 1]
    assert embed_output(hidden, cu_seqlens, normalize=False, **options)[1].tolist() == [0, 0, 0]
    # The square of 1e30 is no float32, so neither is the length.
    assert embed_output(hidden, cu_seqlens, **options)[1].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_values_that_are_cut_off_do_not_matter(mode, impl, place):
    hidden = draw((6, WIDTH), device=place)
    cu_seqlens = ragged([2, 4], place)
    options = {"mode": mode, "truncate_dim": 20, "impl": impl}
    clean, _ = embed_output(hidden, cu_seqlens, **options)
    hidden[:, 20:] = float("nan")
    out, flags = embed_output(hidden, cu_seqlens, **options)
    assert torch.equal(out, clean) and not flags.any()


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_empty_sequences_zero_rows_and_no_rows(mode, impl, place, poisoned_memory):
    hidden = torch.cat([draw((5, WIDTH), device=place), torch.zeros(1, WIDTH, device=place)])
    weight = torch.ones(WIDTH, device=place)
    for eps in (0.0, EPS):
        cu_seqlens = ragged([0, 5, 0], place)
        out, flags = embed_output(
            hidden, cu_seqlens, mode=mode, norm_weight=weight, eps=eps, impl=impl
        )
        assert not out[[0, 2]].any() and not flags.any()
        assert_near(out[1:2], reference(hidden[:5], [5], mode, weight, eps))
    out, flags = embed_output(hidden[5:], ragged([1], place), mode=mode, impl=impl)
    assert not out.any() and not flags.any()
    out, flags = embed_output(hidden[:0], ragged([], place), mode=mode, impl=impl)
    assert out.shape == (0, WIDTH) and flags.shape == (0,)


@pytest.mark.parametrize(("impl", "place"), KERNEL_RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_does_not_depend_on_its_batch(mode, impl, place):
    sequence, weight = draw((150, WIDTH), device=place), draw((WIDTH,), device=place, seed=1)
    options = {"mode": mode, "norm_weight": weight, "impl": impl}
    alone, _ = embed_output(sequence, ragged([150], place), **options)
    for lengths, position in [([150, 200], 0), ([33, 150], 1), ([7, 64, 150, 1, 90], 2)]:
        others = draw((sum(lengths) - 150, WIDTH), device=place, seed=len(lengths))
        start = sum(lengths[:position])
        batch = torch.cat([others[:start], sequence, others[start:]])
        out, _ = embed_output(batch, ragged(lengths, place), **options)
        assert torch.equal(out[position : position + 1], alone)


@settings(max_examples=12)
@given(
    dim=st.integers(1, 33), scale=st.sampled_from([1e-6, 0.3, 7.0, 1e9]), seed=st.integers(0, 99)
)
@pytest.mark.parametrize(("impl", "place"), CPU_RUNS)
def test_unit_length_whatever_the_slice_and_the_scale(impl, place, dim, scale, seed):
    hidden, cu_seqlens = draw((7, 33), seed=seed), ragged([3, 4])
    options = {"mode": "mean", "truncate_dim": dim, "impl": impl}
    out, _ = embed_output(hidden, cu_seqlens, **options)
    assert (out.double().norm(dim=-1) - 1).abs().max() <= 1e-6
    scaled, _ = embed_output(hidden * scale, cu_seqlens, **options)
    torch.testing.assert_close(scaled, out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [1, 7, 72, 1031])
def test_every_instruction_set(width, mode, level):
    hidden, weight = draw((sum(LENGTHS), width)), draw((width,), seed=1)
    with dispatch_level(level):
        out, flags = embed_output(
            hidden, ragged(LENGTHS), mode=mode, norm_weight=weight, impl="cpp"
        )
    assert_near(out, reference(hidden, LENGTHS, mode, weight))
    assert not flags.any()


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_a_bit(mode, level):
    hidden, weight = draw((4000, 256)), draw((256,), seed=1)
    cu_seqlens = ragged([3000] + [1] * 1000)
    results = []
    for threads in (1, 3):
        with dispatch_level(level), torch_threads(threads):
            out, _ = embed_output(hidden, cu_seqlens, mode=mode, norm_weight=weight, impl="cpp")
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode, impl, place):
    hidden, weight = draw((9, 16), device=place), draw((16,), device=place, seed=1)
    ranges = torch.tensor([[-1.0] * 16, [1.0] * 16], device=place)
    spans = torch.tensor([[0, 3], [2, 9], [4, 4]], dtype=torch.int32)
    op = torch.ops.jv5kernels.embed_output.default
    for arguments in (
        (None, weight, EPS, 16, True, "float32", None),
        (None, None, 0.0, 5, False, "bfloat16", None),
        (spans, weight, EPS, 16, True, "int8", ranges),
        (spans, weight, EPS, 9, True, "ubinary", None),
    ):
        torch.library.opcheck(op, (hidden, ragged([4, 5], place), mode, *arguments, impl))


def test_compiles_without_graph_breaks():
    compiled = torch.compile(embed_output, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, cu_seqlens = draw((9, 16)), ragged([4, 5])
    expected, _ = embed_output(hidden, cu_seqlens, mode="mean")
    assert torch.equal(compiled(hidden, cu_seqlens, mode="mean")[0], expected)


def test_errors_name_the_argument():
    hidden, cu_seqlens = torch.ones(4, 8), ragged([1, 3])
    with pytest.raises(TypeError, match="hidden has dtype int64"):
        embed_output(hidden.long(), cu_seqlens, mode="mean")
    with pytest.raises(ValueError, match="mode='max' is unknown"):
        embed_output(hidden, cu_seqlens, mode="max")
    for dim in (0, 9, -1):
        with pytest.raises(ValueError, match=f"truncate_dim must lie in 1 to 8, not be {dim}"):
            embed_output(hidden, cu_seqlens, mode="mean", truncate_dim=dim)
    with pytest.raises(ValueError, match=r"precision='int4' is unknown: choose one of \['float32'"):
        embed_output(hidden, cu_seqlens, mode="mean", precision="int4")
    with pytest.raises(ValueError, match=r"precision='int8' needs ranges, shape \(2, 5\)"):
        embed_output(hidden, cu_seqlens, mode="mean", truncate_dim=5, precision="int8")
    ranges = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"ranges must have shape \(2, 5\), not \(2, 8\)"):
        embed_output(
            hidden, cu_seqlens, mode="mean", truncate_dim=5, precision="int8", ranges=ranges
        )
    with pytest.raises(ValueError, match="precision='binary' takes no ranges"):
        embed_output(hidden, cu_seqlens, mode="mean", precision="binary", ranges=ranges)
    with pytest.raises(TypeError, match="spans has dtype int64"):
        embed_output(hidden, cu_seqlens, mode="mean", spans=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(8\), not \(7,\)"):
        embed_output(hidden, cu_seqlens, mode="mean", norm_weight=torch.ones(7))
    with pytest.raises(ValueError, match="triton: the kernel takes float32"):
        embed_output(hidden.double(), cu_seqlens, mode="mean", impl="triton")
    with pytest.raises(ValueError, match="computes no gradients"):
        embed_output(hidden.requires_grad_(), cu_seqlens, mode="mean")


@pytest.mark.parametrize(("impl", "place"), [run for run in CPU_RUNS if run.id == "cpp"])
def test_the_cpp_kernel_refuses_ranges_outside(impl, place):
    with pytest.raises(ValueError, match="0 <= start <= end <= T"):
        embed_output(torch.ones(4, 8), ragged([5]), mode="mean", impl=impl)


# Constants of a kernel's output: floats, a byte a column, a bit a column.
OUTPUTS = {
    "*fp32": {"DIM": 1024, "WIDTH": 1024, "KIND": 0, "FLIP": 0, "ranges": None},
    "*bf16": {"DIM": 256, "WIDTH": 256, "KIND": 0, "FLIP": 0, "ranges": None},
    "*i8": {"DIM": 1000, "WIDTH": 1000, "KIND": 1, "FLIP": 0x80},
    "*u8": {"DIM": 1023, "WIDTH": 128, "KIND": 2, "FLIP": 0, "ranges": None},
}


def case(kernel, signature, out, constants, **options):
    constants = {"C": 1024, "BC": 1024, "NORMALIZE": True} | OUTPUTS[out] | constants
    signature = {"flags": "*u8", "stride_rr": "i32", "out": out, **signature}
    if "ranges" not in constants:
        signature["ranges"] = "*fp32"
    module = "jv5kernels.kernels.embed_output"
    return Case(module, kernel, signature, constants, enable_fp_fusion=False, **options)


def test_compiles_for_sm90():
    token = {"bounds": "*i32", "stride_ht": "i32", "eps": "fp32"}
    mean = {"partials": "*fp32", "arrivals": "*i32"}
    tile = {"CHUNK": 64, "FEW_CHUNKS": 16, "BN": 256, "BS": 32}
    cases = [
        case(
            "token_kernel",
            token | {"hidden": hidden} | weight,
            out,
            {"STEP": step, "IS_LAST": step == 1} | ({} if weight else {"weight": None}),
            divisible=("stride_ht",),
        )
        for hidden, weight, step, out in [
            ("*fp32", {"weight": "*bf16"}, 1, "*u8"),
            ("*bf16", {"weight": "*bf16"}, 2, "*i8"),
            ("*fp32", {}, 1, "*fp32"),
            ("*fp32", {"weight": "*fp32"}, 1, "*bf16"),
        ]
    ]
    cases += [
        case(
            "mean_kernel",
            mean | {"weight": "*bf16"} | source,
            out,
            tile | absent,
            num_warps=8,
        )
        for source, absent, out in [
            ({"cu_seqlens": "*i32"}, {"table": None}, "*fp32"),
            ({"cu_seqlens": "*i32"}, {"table": None}, "*u8"),
            ({"table": "*i32"}, {"cu_seqlens": None}, "*i8"),
        ]
    ]
    for report in compile_for_sm90(cases):
        report.check(max_registers=96)
        assert "ld.global" in report.ptx and ".v4" in report.ptx
        # Contracted products would change quantised bytes.
        assert "fma." not in report.ptx
