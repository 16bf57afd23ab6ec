"""linear_swiglu against float64, and the bits of a row; its Gluon kernel runs on a Hopper GPU alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import linear_swiglu, swiglu

HALVES = [torch.float16, torch.bfloat16]
# Of the fused kernel: one rounding to the dtype, relative to the output, and the error of the fp32 sums that it carries
# on. "torch" rounds gate and up as well.
RTOL = {
    "gluon": {torch.float16: 5.1e-4, torch.bfloat16: 4.01e-3},
    "torch": {torch.float16: 3e-3, torch.bfloat16: 2.4e-2},
}
# Implementations with the devices that they run on.
PLACES = [
    ("torch", "cpu"),
    pytest.param("torch", "cuda", marks=pytest.mark.gpu),
    pytest.param("gluon", "cuda", marks=pytest.mark.gpu),
]
# (T, F, K): ragged rows around a tile's 128, ragged columns, more than one tile of each.
SHAPES = [(1, 8, 8), (5, 136, 72), (127, 24, 64), (129, 264, 40), (300, 16, 16)]
SMALL, NANO = (3072, 1024), (3072, 768)


def draw(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype).to(device)


def draw_weight(F: int, K: int, dtype: torch.dtype, device: torch.device | str):
    """Gates and ups of order one, so that neither half of the curve of silu is left out."""
    return (2 * draw(2 * F, K, torch.float32, "cpu", seed=1) / K**0.5).to(dtype).to(device)


def assert_close(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rtol: float):
    expected = swiglu(x.double() @ weight.double().T, impl="torch")
    assert out.shape == expected.shape and out.dtype == x.dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, impl, device, poisoned_memory):
    T, F, K = shape
    x, weight = draw(T, K, dtype, device), draw_weight(F, K, dtype, device)
    out = linear_swiglu(x, weight, impl=impl)
    assert_close(out, x, weight, RTOL[impl][dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("T", [32768, 4097, 127, 1])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("F", "K"), [SMALL, NANO])
def test_matches_float64_at_full_size(F, K, dtype, T, poisoned_memory):
    x, weight = draw(T, K, dtype, "cuda"), draw_weight(F, K, dtype, "cuda")
    out = linear_swiglu(x, weight, impl="gluon")
    assert_close(out, x, weight, RTOL["gluon"][dtype])
    composed = linear_swiglu(x, weight, impl="torch")
    expected = swiglu(x.double() @ weight.double().T, impl="torch")
    assert (out - expected).norm() < (composed - expected).norm(), "two more roundings are better"


@pytest.mark.parametrize("offset", [8, 3])
def test_strided_rows_and_margins(offset, device):
    """Rows off the 16-byte grid are refused by the kernel, and taken by "auto"."""
    parents = [torch.full((rows + 4, 56), float("nan"), device=device) for rows in (5, 48)]
    x, weight = (parent.half()[2:-2, offset : offset + 24] for parent in parents)
    x.copy_(draw(5, 24, torch.float16, device))
    weight.copy_(draw_weight(24, 24, torch.float16, device))
    for impl in ("torch", "auto", *["gluon"] * (device.type == "cuda" and offset == 8)):
        out = linear_swiglu(x, weight, impl=impl)
        assert_close(out, x, weight, RTOL["gluon" if impl == "gluon" else "torch"][torch.float16])
    if offset == 3 and device.type == "cuda":
        with pytest.raises(ValueError, match="gluon: rows do not start at multiples of 16 bytes"):
            linear_swiglu(x, weight, impl="gluon")


@pytest.mark.gpu
@pytest.mark.parametrize("F", [40, 136])
def test_nothing_is_written_outside(F, monkeypatch):
    x, weight = draw(131, 16, torch.float16, "cuda"), draw_weight(F, 16, torch.float16, "cuda")
    canaries = torch.full((137, F), 7.0, device="cuda", dtype=torch.float16)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: canaries[2:133])
    out = linear_swiglu(x, weight, impl="gluon")
    assert out.data_ptr() == canaries[2:133].data_ptr()
    assert (canaries[:2] == 7).all() and (canaries[133:] == 7).all()
    assert_close(out, x, weight, RTOL["gluon"][torch.float16])


@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8)])
def test_nothing_to_do(shape, impl, device):
    T, F, K = shape
    x = torch.ones(T, K, dtype=torch.float16, device=device)
    weight = torch.ones(2 * F, K, dtype=torch.float16, device=device)
    assert linear_swiglu(x, weight, impl=impl).shape == (T, F)


@pytest.mark.parametrize(("impl", "device"), PLACES)
def test_nan_stays_in_its_row(impl, device):
    x = draw(130, 16, torch.float16, device)
    x[0, 3] = x[129, 5] = float("nan")
    out = linear_swiglu(x, draw_weight(8, 16, torch.float16, device), impl=impl)
    assert out[[0, 129]].isnan().all() and not out[1:129].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("F", "K"), [SMALL, NANO, (200, 72)])
def test_bits_of_a_row_do_not_depend_on_the_batch(F, K, dtype):
    T = 32768
    rows, weight = draw(T, K, dtype, "cuda"), draw_weight(F, K, dtype, "cuda")

    def ours(x: torch.Tensor) -> torch.Tensor:
        return linear_swiglu(x, weight, batch_invariant=True)

    expected = ours(rows)
    assert torch.equal(linear_swiglu(rows, weight), expected)
    for start, stop in [(0, 1), (5, 17), (100, 101), (130, 642), (T - 2, T), (T - 2049, T)]:
        assert torch.equal(ours(rows[start:stop]), expected[start:stop])
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2)).to("cuda")
    assert torch.equal(ours(rows[order]), expected[order])
    for _ in range(10):
        assert torch.equal(ours(rows), expected)


@pytest.mark.gpu
@settings(max_examples=30)
@given(T=st.integers(1, 300), F=st.integers(1, 40), K=st.integers(1, 40))
def test_any_shape_on_the_grid(T, F, K):
    x = draw(T, 8 * K, torch.float16, "cuda", seed=T)
    weight = draw_weight(8 * F, 8 * K, torch.float16, "cuda")
    assert_close(linear_swiglu(x, weight, impl="gluon"), x, weight, RTOL["gluon"][torch.float16])


def test_the_library_is_not_batch_invariant():
    x, weight = torch.ones(2, 8).half(), torch.ones(16, 8).half()
    for impl in ("torch", "auto"):
        with pytest.raises(ValueError, match="torch: the library's GEMM is chosen by the number"):
            linear_swiglu(x, weight, batch_invariant=True, impl=impl)


@pytest.mark.gpu
def test_large_gates_are_the_ends_of_the_curve():
    """0 on the left, where the exponential is infinite, and the gate itself on the right."""
    x = torch.tensor([[1.0] + [0.0] * 7], dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(16, 8, dtype=torch.bfloat16, device="cuda")
    weight[:3, 0] = torch.tensor([-3e4, 3e4, -80.0])
    weight[8:, 0] = 1.0
    out = linear_swiglu(x, weight, impl="gluon")[0]
    assert out[0] == 0 and out[1] == weight[1, 0] and -1e-30 < out[2] <= 0


@pytest.mark.gpu
def test_auto_is_fused_for_many_rows_or_batch_invariant(monkeypatch):
    from jv5kernels.kernels import linear_swiglu as kernels
    from jv5kernels.ops.linear_swiglu import FUSED_ROWS, keeps_intermediate

    launched = []
    original = kernels.launch_linear_swiglu
    monkeypatch.setattr(
        kernels, "launch_linear_swiglu", lambda *a: launched.append(len(a[0])) or original(*a)
    )
    x = torch.ones(FUSED_ROWS, 8, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(16, 8, dtype=torch.bfloat16, device="cuda")
    calls = [(x, False, True), (x[1:], False, False), (x[1:], True, True)]
    for rows, batch_invariant, is_fused in calls:
        launched.clear()
        linear_swiglu(rows, weight, batch_invariant=batch_invariant)
        assert launched == [len(rows)] * is_fused
        assert keeps_intermediate(rows, weight, batch_invariant) == is_fused


@pytest.mark.parametrize(("impl", "device"), PLACES)
@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(dtype, impl, device):
    arguments = (draw(5, 32, dtype, device), draw_weight(8, 32, dtype, device), False, impl)
    torch.library.opcheck(torch.ops.jv5kernels.linear_swiglu.default, arguments)


@pytest.mark.parametrize(("impl", "device"), PLACES)
def test_compiles_without_graph_breaks(impl, device):
    compiled = torch.compile(linear_swiglu, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = draw_weight(8, 32, torch.float16, device)
    for rows in (5, 9):
        x = draw(rows, 32, torch.float16, device)
        assert torch.equal(compiled(x, weight, impl=impl), linear_swiglu(x, weight, impl=impl))


def test_errors_name_the_argument():
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(TypeError, match="x has dtype int64"):
        linear_swiglu(x.long(), weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(\*, 8\), not \(4, 7\)"):
        linear_swiglu(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"weight must have an even number of rows.*\(3, 8\)"):
        linear_swiglu(x, weight[:3])
    with pytest.raises(ValueError, match="impl='cuda' is no implementation of linear_swiglu"):
        linear_swiglu(x, weight, impl="cuda")
    with pytest.raises(ValueError, match="computes no gradients"):
        linear_swiglu(x, weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="gluon: needs a CUDA device"):
        linear_swiglu(x, weight, impl="gluon")


@pytest.mark.gpu
def test_the_kernel_says_what_it_does_not_take():
    x, weight = torch.ones(2, 8, device="cuda"), torch.ones(4, 8, device="cuda")
    with pytest.raises(ValueError, match="gluon: the kernel is for 16-bit values on sm_90"):
        linear_swiglu(x, weight, impl="gluon")
    with pytest.raises(ValueError, match="gluon: the kernel takes float16 and bfloat16"):
        linear_swiglu(x.double(), weight.double(), impl="gluon")


def test_example_of_the_docstring():
    out = linear_swiglu(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    torch.testing.assert_close(out, torch.tensor([[5.2848]]), rtol=0, atol=5e-5)


def test_compiles_for_sm90():
    from jv5kernels.kernels.linear_sm90 import BC, BK, BN, ROWS

    cases = [
        Case(
            "jv5kernels.kernels.linear_swiglu",
            "linear_swiglu_kernel",
            {"T": "i32"},
            {"TILES_F": -(-F // BC.value), "K": K},
            descriptors={
                "x_desc": [ROWS.value, BK.value],
                "w_desc": [2, BC.value, BK.value],
                "out_desc": [ROWS.value, BC.value],
            },
            inspected=True,
        )
        for F, K in (SMALL, NANO)
    ]
    for report in compile_for_sm90(cases):
        report.check()
        report.check_chained()
        assert not report.losses
        # One MMA of the whole tile, fed by TMA as it lies: no copy of the weight through registers.
        assert f"wgmma.mma_async.sync.aligned.m64n{BN.value}k16" in report.ptx
        assert report.sass.count("WARPGROUP.DEPBAR") <= report.sass.count("HGMMA") // 4
        assert "st.global" not in report.ptx, "the output does not go through TMA"
        # The gate takes two special functions a value and no care for denormals.
        assert report.sass.count("MUFU.EX2") == 2 * ROWS.value * BC.value // 128
        assert "FSETP" not in report.sass
