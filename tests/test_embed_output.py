"""embed_output against float64 for every implementation, on the CPU and on the GPU."""

from __future__ import annotations

import pytest
import torch
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
from output_reference import EPS, LENGTHS, MODES, TOLERANCE, WIDTH, assert_near, draw, reference
from sm90 import Case, compile_for_sm90

from jv5kernels.kernels.embed_output import TOKEN_OPTIONS, mean_options, output
from jv5kernels.kernels.pool import NUM_WARPS, can_ask_early, reading
from jv5kernels.ops import embed_output


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
    ranges = torch.full((2, 40), float("nan"), device=place)[:, 3:36]
    ranges[0], ranges[1] = -0.2, 0.3
    with guarded_outputs(monkeypatch):
        embed_output(hidden, cu_seqlens, **options)
        embed_output(hidden, cu_seqlens, precision="binary", **options)
        codes, _ = embed_output(hidden, cu_seqlens, precision="uint8", ranges=ranges, **options)
    options |= {"precision": "uint8", "ranges": ranges.contiguous()}
    assert torch.equal(codes, embed_output(hidden, cu_seqlens, **options)[0])
    assert codes.unique().numel() > 10


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


# What a kernel writes -> columns that are kept, values stored a row.
OUTPUTS = {"*fp32": (1024, 1024), "*bf16": (256, 256), "*i8": (1000, 1000), "*u8": (1023, 128)}
DTYPES = {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*i8": torch.int8, "*u8": torch.uint8}


def case(kernel, hidden, weight, out, width=1024, normalize=True, whole=False, **arguments):
    """A kernel with arguments as types or, where they are none, as constants; ranges for int8."""
    dim, stored = (width, width) if whole else (min(width, size) for size in OUTPUTS[out])
    constants = {"OUT": output(width, dim, stored, DTYPES[out], out == "*i8", normalize)}
    signature = {"hidden": hidden, "out": out, "flags": "*u8", "stride_ht": "i32", "eps": "fp32"}
    signature["stride_rr"] = "i32"
    arguments |= {"weight": weight, "ranges": "*fp32" if out == "*i8" else None}
    for name, value in arguments.items():
        (signature if isinstance(value, str) else constants)[name] = value
    module = "jv5kernels.kernels.embed_output"
    has_table = arguments.get("table") is not None
    options = TOKEN_OPTIONS if kernel == "token_kernel" else mean_options(width, has_table)
    return Case(module, kernel, signature, constants, divisible=("stride_ht",), **dict(options))


def test_compiles_for_sm90():
    of_tokens = {"bounds": "*i32", "C": 1024, "IS_LAST": True}
    cases = [
        case("token_kernel", hidden, weight, out, STEP=step, **of_tokens)
        for hidden, weight, out, step in [
            ("*fp32", "*bf16", "*u8", 1),
            ("*bf16", "*bf16", "*i8", 2),
            ("*fp32", None, "*fp32", 1),
            ("*fp32", "*fp32", "*bf16", 1),
        ]
    ]
    of_means = {"partials": "*fp32", "B": "i32", "call": "i64"}
    cases += [
        case(
            "mean_kernel",
            hidden,
            weight,
            out,
            width,
            normalize=not whole,
            whole=whole,
            READ=reading(width, asks_early=by == "sequences"),
            cu_seqlens="*i32" if by == "sequences" else None,
            table="*i32" if by == "spans" else None,
            **of_means,
        )
        for hidden, weight, out, width, by, whole in [
            ("*fp32", "*bf16", "*fp32", 1024, "sequences", False),
            ("*bf16", "*bf16", "*u8", 1024, "sequences", False),
            ("*bf16", "*bf16", "*i8", 1024, "spans", False),
            # Nothing stands between the product with the weight and the subtraction of the minimum.
            ("*fp32", "*bf16", "*i8", 1024, "sequences", True),
            ("*fp32", None, "*fp32", 768, "spans", False),
            ("*bf16", "*bf16", "*u8", 768, "sequences", False),
            ("*fp32", "*bf16", "*fp32", 256, "sequences", False),
            ("*bf16", "*bf16", "*i8", 512, "sequences", False),
            ("*bf16", "*bf16", "*bf16", 4096, "sequences", False),
        ]
    ]
    for compiled, report in zip(cases, compile_for_sm90(cases), strict=True):
        # Five programs of four warps must fit an SM. Rows of 4096 take more for their end, means of narrow rows
        # for more tokens at a time.
        is_mean, columns = compiled.kernel == "mean_kernel", compiled.constants["OUT"].BC
        report.check(max_registers=255 if columns > 1024 or is_mean and columns < 1024 else 96)
        assert "ld.global" in report.ptx and ".v4" in report.ptx
        # Contracted products would change quantised bytes. A mean has none behind its first division but the squares of
        # its length, of which a thread adds one product for each of its columns.
        ends, squares = report.ptx, 0
        if is_mean:
            reads, ends = report.ptx.split("div.rn", 1)
            assert ("prefetch" in reads) == (compiled.constants["READ"].ASKED > 0)
            if compiled.constants["OUT"].NORMALIZE:
                squares = max(1, columns // (32 * NUM_WARPS))
        assert ends.count("fma.") <= squares


def test_what_is_asked_for_early(monkeypatch):
    """Only what one instruction can ask for: tokens without gaps, on the 16-byte grid, on a device that has it."""
    hidden = torch.zeros(130, 64, dtype=torch.bfloat16)
    assert not can_ask_early(hidden)
    monkeypatch.setattr("jv5kernels.kernels.pool.has_sm_90", lambda device: True)
    assert can_ask_early(hidden) and can_ask_early(hidden.float())
    assert not can_ask_early(hidden[:, :32])
    assert not can_ask_early(hidden[::2])
    assert not can_ask_early(torch.zeros(130, 68, dtype=torch.bfloat16))
    assert not can_ask_early(hidden.flatten()[4:-60].view(-1, 64))
    assert reading(1024, asks_early=True).ASKED == 4
    assert reading(1024, asks_early=False).ASKED == 0
