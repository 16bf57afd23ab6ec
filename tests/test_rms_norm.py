"""rms_norm and add_rms_norm against float64, on the CPU (interpreter) and on the GPU."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import add_rms_norm, rms_norm
from jv5kernels.ops.float24 import FLOAT24, from_float24, to_float24

EPS = 1e-6
# One rounding to the dtype, and under the interpreter a truncation instead of it: one unit in the last place.
RTOL = {torch.float32: 2e-6, torch.float16: 1.0e-3, torch.bfloat16: 8e-3}
DTYPES = list(RTOL)
IMPLS = ["triton", "torch"]
SHAPES = [(1, 1), (1, 1024), (3, 768), (7, 100), (65, 64), (2, 2050), (3, 4100)]


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_matches_float64(shape, dtype, impl, device, poisoned_memory):
    x, weight = draw(shape, dtype, device), draw(shape[1:], dtype, device, seed=1)
    out = rms_norm(x, weight, EPS, impl=impl)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), reference(x, weight), rtol=RTOL[dtype], atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("given", "wanted"), [("float32", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_may_have_another_dtype(shape, given, wanted, impl, device, poisoned_memory):
    given, wanted = getattr(torch, given), getattr(torch, wanted)
    x, weight = draw(shape, given, device), draw(shape[1:], torch.bfloat16, device, seed=1)
    out = rms_norm(x, weight, EPS, dtype=wanted, impl=impl)
    assert out.dtype == wanted and out.is_contiguous()
    torch.testing.assert_close(out.double(), reference(x, weight), rtol=RTOL[wanted], atol=1e-6)


def test_dtype_of_the_result_is_checked():
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match="dtype is int8: allowed are float32"):
        rms_norm(x, weight, EPS, dtype=torch.int8)
    with pytest.raises(ValueError, match="triton: the kernel gives float32"):
        rms_norm(x, weight, EPS, dtype=torch.float64, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_matches_float64(shape, dtype, impl, device, poisoned_memory):
    x, residual = draw(shape, dtype, device), draw(shape, dtype, device, seed=2)
    weight = draw(shape[1:], dtype, device, seed=1)
    out, total = add_rms_norm(x, residual, weight, EPS, impl=impl)
    expected = x.double() + residual.double()
    torch.testing.assert_close(total.double(), expected, rtol=RTOL[dtype], atol=1e-6)
    torch.testing.assert_close(
        out.double(), reference(expected, weight), rtol=RTOL[dtype], atol=1e-6
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 768), (7, 100), (2, 2050)])
def test_sums_that_are_not_written_and_sums_of_three(shape, dtype, impl, device, poisoned_memory):
    """What a layer does: norm of stream + y, later of (stream + y) + z, with the bits of one addition at a time."""
    y, z = draw(shape, dtype, device), draw(shape, dtype, device, seed=3)
    stream = draw(shape, torch.float32, device, seed=2)
    weight = draw(shape[1:], dtype, device, seed=1)
    first, total = add_rms_norm(y, stream, weight, EPS, impl=impl)
    assert torch.equal(rms_norm(stream, weight, EPS, added=y, dtype=dtype, impl=impl), first)
    expected = add_rms_norm(z, total, weight, EPS, impl=impl)
    for out, one in zip(
        add_rms_norm(y, stream, weight, EPS, also=z, impl=impl), expected, strict=True
    ):
        assert torch.equal(out, one)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1024])
def test_full_size_matches_float64(width, dtype, poisoned_memory):
    x, residual = (draw((32768, width), dtype, "cuda", seed) for seed in (0, 2))
    weight = draw((width,), dtype, "cuda", seed=1)
    expected = reference(x, weight)
    out = rms_norm(x, weight, EPS, impl="triton")
    torch.testing.assert_close(out.double(), expected, rtol=RTOL[dtype] / 2, atol=1e-6)
    out, total = add_rms_norm(x, residual, weight, EPS, impl="triton")
    expected = x.double() + residual.double()
    torch.testing.assert_close(total.double(), expected, rtol=RTOL[dtype] / 2, atol=1e-6)
    expected = reference(expected, weight)
    torch.testing.assert_close(out.double(), expected, rtol=RTOL[dtype] / 2, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_residual_is_not_rounded(dtype, impl, device, poisoned_memory):
    x, residual = draw((5, 300), dtype, device), draw((5, 300), torch.float32, device, seed=2)
    weight = draw((300,), dtype, device, seed=1)
    out, total = add_rms_norm(x, residual, weight, EPS, impl=impl)
    assert out.dtype == dtype and total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)
    expected = reference(x.double() + residual.double(), weight)
    torch.testing.assert_close(out.double(), expected, rtol=RTOL[dtype], atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (5, 48), (3, 768), (6, 1024), (2, 2064)])
def test_a_float24_stream(shape, dtype, impl, device, poisoned_memory):
    """A layer's norms: of embeddings, of the stream with y, of the stream with y and z, which is written again."""
    embedded, y, z = (draw(shape, dtype, device, seed) for seed in (0, 2, 3))
    weight = draw(shape[1:], dtype, device, seed=1)
    out, stream = add_rms_norm(
        y, embedded, weight, EPS, also=z, total_dtype=torch.float32, impl=impl
    )
    same, short = add_rms_norm(y, embedded, weight, EPS, also=z, total_dtype=FLOAT24, impl=impl)
    assert torch.equal(same, out) and short.is_contiguous()
    assert torch.equal(short, to_float24(stream))

    stream = from_float24(short)
    first = rms_norm(short, weight, EPS, added=y, dtype=dtype, impl=impl)
    assert torch.equal(first, rms_norm(stream, weight, EPS, added=y, dtype=dtype, impl=impl))
    out, total = add_rms_norm(y, short, weight, EPS, also=z, impl=impl)
    same, whole = add_rms_norm(y, stream, weight, EPS, also=z, impl=impl)
    assert torch.equal(out, same) and torch.equal(total, to_float24(whole))
    expected = stream.double() + y.double() + z.double()
    torch.testing.assert_close(from_float24(total).double(), expected, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(
        out.double(), reference(expected, weight), rtol=RTOL[dtype], atol=1e-6
    )
    alone = rms_norm(total[:1], weight, EPS, impl=impl)
    assert alone.dtype == torch.float32
    torch.testing.assert_close(
        alone.double(), reference(from_float24(total[:1]), weight), rtol=2e-6, atol=1e-6
    )


@given(st.lists(st.floats(width=32), min_size=16, max_size=16))
def test_float24_rounds_to_the_nearest(values):
    x = torch.tensor([values])
    near = from_float24(to_float24(x))
    finite = x.isfinite() & near.isfinite()
    assert ((near - x).abs() <= x.abs() * 2.0**-16 + 2.0**-134)[finite].all()
    assert torch.equal(near.isnan(), x.isnan())
    # Only what lies within half a step of 2^128 becomes infinite.
    assert torch.equal(near.isinf(), x.isinf() | (x.abs().double() >= 2.0**128 - 2.0**111))
    assert torch.equal(to_float24(near[:, finite[0]]), to_float24(x[:, finite[0]]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000])
def test_float24_keeps_what_is_not_finite(bits, impl, device):
    x = torch.full((2, 16), bits, dtype=torch.int32, device=device).view(torch.float32)
    zero, weight = torch.zeros(2, 16, device=device), torch.ones(16, device=device)
    _, total = add_rms_norm(x, zero, weight, EPS, total_dtype=FLOAT24, impl=impl)
    assert not from_float24(total).isfinite().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_and_margins(impl, device):
    parent = torch.full((6, 40), float("nan"), device=device)
    parent[1:5, 8:24] = draw((4, 16), torch.float32, device)
    x = parent[1:5, 8:24]
    weight = torch.ones(16, device=device)
    torch.testing.assert_close(
        rms_norm(x, weight, EPS, impl=impl), rms_norm(x.contiguous(), weight, EPS, impl="torch")
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl, device):
    x = torch.empty(0, 32, device=device)
    assert rms_norm(x, torch.ones(32, device=device), EPS, impl=impl).shape == (0, 32)


@given(rows=st.integers(1, 9), columns=st.integers(1, 80), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_the_others(rows, columns, seed):
    x = draw((rows, columns), torch.float32, torch.device("cpu"), seed)
    weight = torch.ones(columns)
    together = rms_norm(x, weight, EPS, impl="triton")
    alone = torch.cat([rms_norm(row[None], weight, EPS, impl="triton") for row in x])
    assert torch.equal(together, alone)


@given(scale=st.floats(0.25, 1e3), seed=st.integers(0, 99))
def test_scale_invariance(scale, seed):
    x = draw((2, 33), torch.float32, torch.device("cpu"), seed)
    weight = torch.ones(33)
    expected = rms_norm(x, weight, 0.0, impl="torch")
    torch.testing.assert_close(rms_norm(x * scale, weight, 0.0, impl="triton"), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    x, weight = draw((5, 32), torch.float32, device), draw((32,), torch.float32, device)
    torch.library.opcheck(torch.ops.jv5kernels.rms_norm.default, (x, None, weight, EPS, None, impl))
    torch.library.opcheck(
        torch.ops.jv5kernels.rms_norm.default, (x, x, weight, EPS, torch.bfloat16, impl)
    )
    for also in (None, x):
        for dtype in (None, FLOAT24):
            arguments = (x, x, also, weight, EPS, dtype, impl)
            torch.library.opcheck(torch.ops.jv5kernels.add_rms_norm.default, arguments)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(rms_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    x, weight = draw((5, 32), torch.float32, torch.device("cpu")), torch.ones(32)
    torch.testing.assert_close(compiled(x, weight, EPS), rms_norm(x, weight, EPS))


def test_errors_name_the_argument():
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match="x has dtype int64"):
        rms_norm(x.long(), weight, EPS)
    with pytest.raises(ValueError, match=r"weight must have shape \(8\), not \(7,\)"):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 8\)"):
        add_rms_norm(x, torch.ones(3, 8), weight, EPS)
    with pytest.raises(ValueError, match=r"also must have shape \(2, 8\)"):
        add_rms_norm(x, x, weight, EPS, also=torch.ones(3, 8))
    with pytest.raises(TypeError, match="added has dtype int64"):
        rms_norm(x, weight, EPS, added=x.long())
    with pytest.raises(ValueError, match="x is float24, whose rows have a multiple of 16 values"):
        rms_norm(torch.zeros(2, 24, dtype=FLOAT24), weight, EPS)
    with pytest.raises(ValueError, match="total_dtype is float24, whose rows have a multiple"):
        add_rms_norm(x, x, weight, EPS, total_dtype=FLOAT24)
    wide = torch.ones(2, 16)
    with pytest.raises(ValueError, match="rows have 3 bytes a value, not 16 bytes"):
        add_rms_norm(wide, torch.zeros(2, 16, dtype=FLOAT24), wide[0], EPS)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 48\), not \(2, 96\)"):
        add_rms_norm(wide, torch.zeros(2, 96, dtype=FLOAT24), wide[0], EPS)
    with pytest.raises(TypeError, match="total_dtype is float16: allowed are float32"):
        add_rms_norm(x, x, weight, EPS, total_dtype=torch.float16)
    with pytest.raises(ValueError, match="impl='cuda' is no implementation of rms_norm"):
        rms_norm(x, weight, EPS, impl="cuda")
    with pytest.raises(ValueError, match="computes no gradients"):
        rms_norm(x.requires_grad_(), weight, EPS)
    with pytest.raises(ValueError, match="triton: the kernel takes float32"):
        rms_norm(x.detach().double(), weight, EPS, impl="triton")


def sm90_case(width: int, dtype: str, given: tuple[str, ...], stream: str = "") -> Case:
    """A launch with the pointers of `given`, of which the residual stream and its sum may have a dtype of their own."""
    from jv5kernels.kernels.rms_norm import tile

    types = {name: f"*{dtype}" for name in ("x", "weight", "out", *given)}
    types |= {name: f"*{stream or dtype}" for name in given if name in ("residual", "total")}
    scalars = {name: "i32" for name in ("stride_xt", "stride_rt", "stride_at", "T")}
    CHUNKS, BT, BC = tile(width, 4 if "fp32" in (dtype, stream) else 2)
    constants = {"C": width, "CHUNKS": CHUNKS, "BT": BT, "BC": BC, "IS_CHAINED": True}
    constants |= {name: None for name in ("residual", "also", "total") if name not in given}
    return Case(
        "jv5kernels.kernels.rms_norm",
        "rms_norm_kernel",
        types | scalars | {"eps": "fp32"},
        constants,
        divisible=("stride_xt", "stride_rt", "stride_at"),
    )


def test_compiles_for_sm90():
    added = ("residual", "total")
    cases = [sm90_case(width, "bf16", given) for width in (768, 1024) for given in ((), added)]
    cases += [sm90_case(1024, "fp32", added), sm90_case(4096, "bf16", added)]
    *shipped, wide = compile_for_sm90(cases)
    for report in (*shipped, wide):
        report.check(max_registers=96)
        accesses = re.findall(r"(?:ld|st)\.global.*", report.ptx)
        assert accesses and all(".v4" in line for line in accesses)
    layer = [added, ("residual",), ("residual", "also", "total")]
    mixed = [
        sm90_case(width, "bf16", given, stream)
        for width in (768, 1024)
        for given in layer
        for stream in ("fp32", "u8")
    ]
    for report in shipped + compile_for_sm90(mixed):
        report.check(max_registers=128)
        report.check_chained()
        assert report.shared == 0, "a row passes through shared memory"
