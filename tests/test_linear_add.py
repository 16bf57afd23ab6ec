"""linear_add against float64, and the bits of a row, on the CPU (interpreter) and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import linear_add

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[1:]
# Relative to |residual| + Σ|x·w|: the fp32 sums of the kernel; the rounding of the product of "torch".
FUSED_RTOL = 2e-6
ROUNDED_RTOL = {torch.float32: 2e-6, torch.float16: 1.0e-3, torch.bfloat16: 8e-3}
# (T, N, K): ragged rows around a tile's 128, ragged columns, more than one tile of each.
SHAPES = [(1, 8, 8), (5, 272, 72), (127, 24, 64), (129, 520, 40), (300, 16, 16)]
# (N, K) of o and down.
SMALL, NANO = [(1024, 2048), (1024, 3072)], [(768, 768), (768, 3072)]


def draw(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype).to(device)


def inputs(T: int, N: int, K: int, dtype: torch.dtype, device: torch.device | str):
    residual = 10 * draw(T, N, torch.float32, device, seed=2)
    return draw(T, K, dtype, device), draw(N, K, dtype, device, seed=1), residual


def assert_sum(out, x, weight, before, rtol: float):
    """|out - (before + x·Wᵀ)| <= rtol · (|before| + |x|·|W|ᵀ) in every element, NaN nowhere."""
    x, weight, before = x.double(), weight.double(), before.double()
    bound = rtol * (before.abs() + x.abs() @ weight.abs().T)
    excess = (out.double() - (before + x @ weight.T)).abs() - bound
    assert not (excess > 1e-9).any() and not excess.isnan().any(), f"off by {excess.max().item()}"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_matches_float64(shape, dtype, device):
    x, weight, residual = inputs(*shape, dtype, device)
    before = residual.clone()
    assert linear_add(x, weight, residual, impl="triton") is residual
    assert_sum(residual, x, weight, before, FUSED_RTOL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_composition_matches_float64(shape, dtype, device, poisoned_memory):
    x, weight, residual = inputs(*shape, dtype, device)
    before = residual.clone()
    assert linear_add(x, weight, residual, impl="torch") is residual
    assert_sum(residual, x, weight, before, ROUNDED_RTOL[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("T", [32768, 4097, 127, 1])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("N", "K"), SMALL + NANO)
def test_matches_float64_at_full_size(N, K, dtype, T):
    x, weight, residual = inputs(T, N, K, dtype, "cuda")
    before = residual.clone()
    linear_add(x, weight, residual, impl="triton")
    assert_sum(residual, x, weight, before, FUSED_RTOL)


def test_float64_is_the_reference():
    x, weight, residual = (t.double() for t in inputs(5, 7, 3, torch.float32, "cpu"))
    expected = residual + x @ weight.T
    torch.testing.assert_close(linear_add(x, weight, residual), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("N", [16, 264])
def test_strided_rows_and_margins(N, device):
    """Every tensor lies inside a larger one, and the residual's surroundings stay as they were."""
    values = inputs(130, N, 24, torch.float16, device)
    views = []
    for value in values:
        parent = torch.full((len(value) + 4, value.shape[1] + 16), 7.0, device=device)
        parent = parent.to(value.dtype)
        view = parent[2:-2, 8:-8]
        views.append(view.copy_(value))
    linear_add(*views, impl="triton")
    assert_sum(views[2], *values, FUSED_RTOL)
    views[2].fill_(7.0)
    assert (parent == 7).all()


def test_rows_off_the_grid(device):
    """The kernel refuses them, "auto" takes them."""
    x, weight, residual = inputs(5, 8, 27, torch.float16, device)
    before = residual.clone()
    with pytest.raises(ValueError, match="triton: rows do not start at multiples of 16 bytes"):
        linear_add(x, weight, residual, impl="triton")
    assert torch.equal(residual, before)
    assert_sum(linear_add(x, weight, residual), x, weight, before, ROUNDED_RTOL[torch.float16])


@pytest.mark.parametrize(
    ("shape", "impl"), [((0, 8, 8), "triton"), ((0, 8, 8), "torch"), ((3, 0, 8), "torch")]
)
def test_nothing_to_do(shape, impl, device):
    x, weight, residual = inputs(*shape, torch.float16, device)
    assert linear_add(x, weight, residual, impl=impl).shape == shape[:2]


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_nan_stays_in_its_row(impl, device):
    x, weight, residual = inputs(130, 8, 16, torch.float16, device)
    x[0, 3] = x[129, 5] = float("nan")
    linear_add(x, weight, residual, impl=impl)
    assert residual[[0, 129]].isnan().all() and not residual[1:129].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("N", "K"), [*SMALL, *NANO, (200, 72)])
def test_bits_of_a_row_do_not_depend_on_the_batch(N, K, dtype):
    T = 32768
    rows, weight, residual = inputs(T, N, K, dtype, "cuda")

    def ours(x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return linear_add(x, weight, before.clone(), batch_invariant=True)

    expected = ours(rows, residual)
    for start, stop in [(0, 1), (5, 17), (100, 101), (130, 642), (T - 2, T), (T - 2049, T)]:
        assert torch.equal(ours(rows[start:stop], residual[start:stop]), expected[start:stop])
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2)).to("cuda")
    assert torch.equal(ours(rows[order], residual[order]), expected[order])
    for _ in range(10):
        assert torch.equal(ours(rows, residual), expected)


@pytest.mark.gpu
def test_the_next_kernel_sees_every_addition():
    """The additions are asynchronous (cp.reduce); a launch must be done with them when the next one reads."""
    x, weight, residual = inputs(4096, 1024, 64, torch.bfloat16, "cuda")
    x.fill_(1.0), weight.fill_(1.0), residual.zero_()
    for i in range(1, 51):
        assert (linear_add(x, weight, residual, impl="triton") == 64.0 * i).all()


@settings(max_examples=15)
@given(T=st.integers(1, 140), N=st.integers(1, 40), K=st.integers(1, 9))
def test_any_shape_on_the_grid(T, N, K):
    x, weight, residual = inputs(T, 4 * N, 8 * K, torch.float16, "cpu")
    before = residual.clone()
    linear_add(x, weight, residual, impl="triton")
    assert_sum(residual, x, weight, before, FUSED_RTOL)


def test_only_triton_is_batch_invariant():
    x, weight, residual = inputs(2, 8, 8, torch.float16, "cpu")
    for impl in ("torch", "auto"):
        with pytest.raises(ValueError, match="torch: the library's GEMM is chosen by the number"):
            linear_add(x, weight, residual, batch_invariant=True, impl=impl)
    before = residual.clone()
    linear_add(x, weight, residual, batch_invariant=True, impl="triton")
    assert_sum(residual, x, weight, before, FUSED_RTOL)


@pytest.mark.gpu
def test_auto_is_fused_for_many_rows_or_batch_invariant(monkeypatch):
    from jv5kernels.kernels import linear_add as kernels
    from jv5kernels.ops.linear_add import FUSED_ROWS, adds_in_gemm

    launched = []
    original = kernels.launch_linear_add
    monkeypatch.setattr(
        kernels, "launch_linear_add", lambda *a: launched.append(len(a[0])) or original(*a)
    )
    x, weight, residual = inputs(FUSED_ROWS, 8, 8, torch.bfloat16, "cuda")
    for start, batch_invariant, is_fused in [(0, False, True), (1, False, False), (1, True, True)]:
        launched.clear()
        linear_add(x[start:], weight, residual[start:], batch_invariant=batch_invariant)
        assert launched == [FUSED_ROWS - start] * is_fused
        assert adds_in_gemm(x[start:], weight, residual[start:], batch_invariant) == is_fused


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", HALVES)
def test_opcheck(dtype, impl, device):
    arguments = (*inputs(5, 8, 32, dtype, device), False, impl)
    torch.library.opcheck(torch.ops.jv5kernels.linear_add.default, arguments)


def test_errors_name_the_argument():
    x, weight, residual = inputs(2, 4, 8, torch.float32, "cpu")
    with pytest.raises(TypeError, match="x has dtype int64"):
        linear_add(x.long(), weight, residual)
    with pytest.raises(ValueError, match=r"weight must have shape \(\*, 8\), not \(4, 7\)"):
        linear_add(x, weight[:, :7], residual)
    with pytest.raises(ValueError, match=r"residual must have shape \(2, 4\), not \(1, 4\)"):
        linear_add(x, weight, residual[:1])
    with pytest.raises(TypeError, match="residual has dtype float16: allowed are float32"):
        linear_add(x, weight, residual.half())
    with pytest.raises(ValueError, match="residual is written in place: its rows overlap"):
        linear_add(x, weight, residual[:1].expand(2, 4))
    with pytest.raises(ValueError, match="impl='cuda' is no implementation of linear_add"):
        linear_add(x, weight, residual, impl="cuda")
    with pytest.raises(ValueError, match="computes no gradients"):
        linear_add(x, weight.clone().requires_grad_(), residual)
    with pytest.raises(ValueError, match="triton: no configuration for 32-bit values on sm_90"):
        linear_add(x, weight, residual, impl="triton")


def test_example_of_the_docstring():
    out = linear_add(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]]))
    assert torch.equal(out, torch.tensor([[11.5]]))


def test_compiles_for_sm90():
    from jv5kernels.kernels.linear import GROUP
    from jv5kernels.kernels.linear_add import CONFIGS, PIECE

    config = CONFIGS["sm_90", 2]
    BM, BN, BK = config.BM, config.BN, config.BK
    cases = [
        Case(
            "jv5kernels.kernels.linear_add",
            "linear_add_kernel",
            {
                "x": f"tensordesc<{dtype}[{BM}, {BK}]>",
                "weight": f"tensordesc<{dtype}[{BN}, {BK}]>",
                "residual": f"tensordesc<fp32[{BM}, {PIECE}]>",
                "p_residual": "*fp32",
                "stride_rt": "i32",
                "T": "i32",
            },
            {"N": N, "K": K, "BM": BM, "BN": BN, "BK": BK, "BP": PIECE}
            | {"GROUP": GROUP, "FLATTEN": config.flatten},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            divisible=("stride_rt",),
        )
        for (N, K), dtype in ((SMALL[0], "bf16"), (NANO[1], "fp16"), ((200, 72), "bf16"))
    ]
    reports = compile_for_sm90(cases)
    for report in reports:
        report.check(max_registers=200)
        assert f"wgmma.mma_async.sync.aligned.m64n{config.BN}k16" in report.ptx
        # Serialised, there would be a wait behind each (newer ptxas does not warn of it).
        waits = report.sass.count("WARPGROUP.DEPBAR")
        assert not report.losses and waits < report.sass.count("HGMMA")
        assert "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add" in report.ptx
        assert "st.global" not in report.ptx and "ld.global" not in report.ptx
    # A tile that runs past the last column would ask for what is behind the matrix.
    fetches = ["cp.async.bulk.prefetch.L2" in report.ptx for report in reports]
    assert fetches == [True, True, False]
