"""linear against float64, and the bits of the batch-invariant GEMM, on the CPU (interpreter) and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import linear

# One rounding to the dtype (under the interpreter a truncation), relative to Σ|x·w|, and the fp32 sum.
RTOL = {torch.float32: 2e-6, torch.float16: 1.0e-3, torch.bfloat16: 8e-3}
DTYPES = list(RTOL)
IMPLS = ["triton", "torch"]
# (T, N, K); widths that are no multiples of 8 take the kernel without descriptors.
SHAPES = [(1, 16, 16), (3, 7, 5), (5, 272, 72), (130, 24, 64), (257, 40, 33), (2, 1, 1)]
# (N, K) of the projections: QKV, K and V alone, Q alone, O, gate and up, down.
SMALL = [(4096, 1024), (2048, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
NANO = [(2304, 768), (1536, 768), (768, 768), (6144, 768), (768, 3072)]


def draw(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype).to(device)


def assert_product(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rtol: float):
    """|out - x·Wᵀ| <= rtol · |x|·|W|ᵀ in every element, NaN nowhere."""
    x, weight = x.double(), weight.double()
    excess = (out.double() - x @ weight.T).abs() - rtol * (x.abs() @ weight.abs().T)
    worst = excess.argmax().item()
    assert not (excess > 1e-9).any() and not excess.isnan().any(), (
        f"row {worst // out.shape[1]}, column {worst % out.shape[1]}: off by {excess.max().item()}"
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, impl, device, poisoned_memory):
    T, N, K = shape
    x, weight = draw(T, K, dtype, device), draw(N, K, dtype, device, seed=1)
    out = linear(x, weight, impl=impl)
    assert out.shape == (T, N) and out.dtype == dtype and out.is_contiguous()
    assert_product(out, x, weight, RTOL[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), SMALL + NANO)
def test_matches_float64_at_full_size(N, K, dtype, poisoned_memory):
    T = 32768 if dtype == torch.bfloat16 else 4100
    x, weight = draw(T, K, dtype, "cuda"), draw(N, K, dtype, "cuda", seed=1)
    out = linear(x, weight, impl="triton")
    assert_product(out, x, weight, RTOL[dtype] / 2)


@pytest.mark.gpu
def test_addresses_beyond_2_to_the_31():
    x = torch.ones(400_000, 16, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2.0
    weight = torch.ones(6144, 16, dtype=torch.bfloat16, device="cuda")
    out = linear(x, weight, impl="triton")
    assert (out[:-1] == 16).all() and (out[-1] == 32).all()
    # Rows that no descriptor can address.
    odd = torch.ones(400_000, 6145, dtype=torch.bfloat16, device="cuda")[:, :16]
    out = linear(odd, weight[:64], impl="triton")
    assert (out == 16).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [8, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_rows_and_margins(dtype, offset, impl, device):
    parents = [torch.full((rows + 4, 56), float("nan"), device=device) for rows in (5, 9)]
    parents = [parent.to(dtype) for parent in parents]
    x, weight = (parent[2:-2, offset : offset + 24] for parent in parents)
    x.copy_(draw(5, 24, dtype, device))
    weight.copy_(draw(9, 24, dtype, device, seed=1))
    assert_product(linear(x, weight, impl=impl), x, weight, RTOL[dtype])


@pytest.mark.parametrize("width", [40, 37])
def test_nothing_is_written_outside(width, device, monkeypatch):
    canaries = torch.full((9, width), 7.0, device=device, dtype=torch.float16)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: canaries[2:5])
    x, weight = draw(3, 16, torch.float16, device), draw(width, 16, torch.float16, device, seed=1)
    out = linear(x, weight, impl="triton")
    assert out.data_ptr() == canaries[2:5].data_ptr()
    assert (canaries[:2] == 7).all() and (canaries[5:] == 7).all()
    assert_product(out, x, weight, RTOL[torch.float16])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 8, 0)])
def test_empty_dimensions(shape, impl, device, poisoned_memory):
    T, N, K = shape
    out = linear(torch.ones(T, K, device=device), torch.ones(N, K, device=device), impl=impl)
    assert torch.equal(out, torch.zeros(T, N, device=device))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl, device):
    # Row 0 is also what fills up the last tile.
    x = draw(130, 16, torch.float32, device)
    x[0, 3] = x[129, 5] = float("nan")
    out = linear(x, draw(8, 16, torch.float32, device, seed=1), impl=impl)
    assert out[[0, 129]].isnan().all() and not out[1:129].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [64, 20])
def test_bits_of_a_row_do_not_depend_on_the_batch(K, dtype, device):
    """The promise of batch_invariant: alone, in any batch, at any place, beside any neighbours."""
    rows, weight = draw(131, K, dtype, device), draw(24, K, dtype, device, seed=1)
    if device.type == "cpu":  # the interpreter multiplies by BLAS: only exact sums keep their bits
        rows, weight = rows.mul(4).round(), weight.mul(4).round()
    expected = linear(rows, weight, impl="triton")
    for i in (0, 1, 64, 130):
        assert torch.equal(linear(rows[i : i + 1], weight, impl="triton"), expected[i : i + 1])
    order = torch.randperm(131, generator=torch.Generator().manual_seed(2)).to(device)
    assert torch.equal(linear(rows[order], weight, impl="triton"), expected[order])
    neighbours = 1e3 * draw(150, K, dtype, device, seed=3)
    mixed = linear(torch.cat([neighbours, rows]), weight, impl="triton")
    assert torch.equal(mixed[150:], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), SMALL + NANO)
def test_bits_of_a_row_do_not_depend_on_the_batch_at_full_size(N, K, dtype):
    T = 32768 if dtype == torch.bfloat16 else 2050
    rows, weight = draw(T, K, dtype, "cuda"), draw(N, K, dtype, "cuda", seed=1)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, batch_invariant=True)

    expected = ours(rows)
    for start, stop in [(0, 1), (5, 17), (100, 101), (130, 642), (T - 2, T), (T - 2049, T)]:
        assert torch.equal(ours(rows[start:stop]), expected[start:stop])
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2)).to("cuda")
    assert torch.equal(ours(rows[order]), expected[order])
    for _ in range(20):
        assert torch.equal(ours(rows), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(4096, 1024), (768, 3072)])
def test_both_kernels_give_the_same_bits(N, K):
    """So that the alignment of a view has no part in the result either."""
    weight = draw(N, K, torch.bfloat16, "cuda", seed=1)
    parent = torch.zeros(700, K + 1, dtype=torch.bfloat16, device="cuda")
    parent[:, 1:] = draw(700, K, torch.bfloat16, "cuda")
    assert torch.equal(
        linear(parent[:, 1:], weight, impl="triton"),
        linear(parent[:, 1:].contiguous(), weight, impl="triton"),
    )


@settings(max_examples=20)
@given(T=st.integers(1, 140), N=st.integers(1, 40), K=st.integers(1, 70), half=st.booleans())
def test_any_shape(T, N, K, half):
    dtype = torch.float16 if half else torch.float32
    x, weight = draw(T, K, dtype, "cpu", seed=T), draw(N, K, dtype, "cpu", seed=N)
    assert_product(linear(x, weight, impl="triton"), x, weight, RTOL[dtype])


def test_only_triton_is_batch_invariant():
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    for impl in ("torch", "auto"):
        with pytest.raises(ValueError, match="torch: the library's GEMM is chosen by the number"):
            linear(x, weight, batch_invariant=True, impl=impl)
    expected = torch.full((2, 4), 8.0)
    assert torch.equal(linear(x, weight, batch_invariant=True, impl="triton"), expected)


@pytest.mark.gpu
def test_auto_takes_the_library_unless_batch_invariant(monkeypatch):
    from jv5kernels.kernels import linear as kernels

    launched = []
    original = kernels.launch_linear
    monkeypatch.setattr(
        kernels, "launch_linear", lambda *a: launched.append(a[0].shape) or original(*a)
    )
    x, weight = torch.ones(2, 8, device="cuda"), torch.ones(4, 8, device="cuda")
    linear(x, weight)
    assert launched == []
    linear(x, weight, batch_invariant=True)
    assert launched == [(2, 8)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, impl, device):
    x, weight = draw(5, 32, dtype, device), draw(8, 32, dtype, device)
    torch.library.opcheck(torch.ops.jv5kernels.linear.default, (x, weight, False, impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_graph_breaks(impl):
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = draw(8, 32, torch.float32, "cpu", seed=1)
    for rows in (5, 9):
        x = draw(rows, 32, torch.float32, "cpu")
        torch.testing.assert_close(compiled(x, weight, impl=impl), linear(x, weight))


def test_errors_name_the_argument():
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(TypeError, match="x has dtype int64"):
        linear(x.long(), weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(\*, 8\), not \(4, 7\)"):
        linear(x, weight[:, :7])
    with pytest.raises(TypeError, match="weight has dtype float16: allowed are float32"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match="x must be contiguous in its last dimension"):
        linear(torch.ones(8, 2).T, weight)
    with pytest.raises(ValueError, match="impl='cuda' is no implementation of linear"):
        linear(x, weight, impl="cuda")
    for impl in IMPLS:
        with pytest.raises(ValueError, match="computes no gradients"):
            linear(x, weight.clone().requires_grad_(), impl=impl)
    with pytest.raises(ValueError, match="triton: the kernel takes float32"):
        linear(x.double(), weight.double(), impl="triton")


def test_example_of_the_docstring():
    out = linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    assert torch.equal(out, torch.tensor([[11.0, 17.0]]))


def sm90_case(N: int, K: int, dtype: str, aligned: bool) -> Case:
    from jv5kernels.kernels.linear import CONFIGS, GROUP

    config = CONFIGS["sm_90", 4 if dtype == "fp32" else 2, aligned]
    sizes = {"BM": config.BM, "BN": config.BN, "BK": config.BK}
    if config.use_descriptors:
        kernel, scalars = "linear_descriptor_kernel", {"T": "i32"}
        blocks = ((config.BM, config.BK), (config.BN, config.BK), (config.BM, config.BN // 2))
        types = [f"tensordesc<{dtype}[{rows}, {columns}]>" for rows, columns in blocks]
    else:
        kernel, scalars = "linear_kernel", {"stride_xt": "i32", "stride_wn": "i32", "T": "i32"}
        types = [f"*{dtype}"] * 3
    return Case(
        "jv5kernels.kernels.linear",
        kernel,
        dict(zip(("x", "weight", "out"), types, strict=True)) | scalars,
        {"N": N, "K": K, "GROUP": GROUP} | sizes,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=() if config.use_descriptors else ("stride_xt", "stride_wn"),
    )


def test_compiles_for_sm90():
    cases = [sm90_case(N, K, "bf16", aligned=True) for N, K in (SMALL[0], NANO[-1])]
    cases += [sm90_case(*NANO[0], "fp16", aligned=True), sm90_case(40, 33, "bf16", aligned=False)]
    cases += [sm90_case(*SMALL[0], "bf16", aligned=False)]
    for case, report in zip(cases, compile_for_sm90(cases), strict=True):
        report.check(max_registers=232)
        assert "wgmma.mma_async" in report.ptx
        is_descriptor = case.kernel == "linear_descriptor_kernel"
        assert ("cp.async.bulk.tensor" in report.ptx) == is_descriptor


def test_float32_compiles_for_sm90_without_tensor_cores():
    (report,) = compile_for_sm90([sm90_case(*SMALL[0], "fp32", aligned=False)])
    report.check(max_registers=160)
    assert "mma" not in report.ptx, "tf32 instead of fp32"
