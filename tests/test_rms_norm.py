"""rms_norm and add_rms_norm against float64, on the CPU (interpreter) and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import add_rms_norm, rms_norm

EPS = 1e-6
# One rounding to the dtype, and under the interpreter a truncation instead of it: one unit in the last place.
RTOL = {torch.float32: 2e-6, torch.float16: 1.0e-3, torch.bfloat16: 8e-3}
DTYPES = list(RTOL)
IMPLS = ["triton", "torch"]
SHAPES = [(1, 1), (1, 1024), (3, 768), (7, 100), (65, 64), (2, 2050)]


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
    torch.library.opcheck(torch.ops.jv5kernels.rms_norm.default, (x, weight, EPS, impl))
    torch.library.opcheck(torch.ops.jv5kernels.add_rms_norm.default, (x, x, weight, EPS, impl))


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
    with pytest.raises(ValueError, match="impl='cuda' is no implementation of rms_norm"):
        rms_norm(x, weight, EPS, impl="cuda")
    with pytest.raises(ValueError, match="computes no gradients"):
        rms_norm(x.requires_grad_(), weight, EPS)
    with pytest.raises(ValueError, match="triton: the kernel takes float32"):
        rms_norm(x.detach().double(), weight, EPS, impl="triton")


def test_compiles_for_sm90():
    pointers = ("x", "residual", "weight", "out", "total")
    scalars = {"stride_xt": "i32", "stride_rt": "i32", "T": "i32", "eps": "fp32"}
    constants = {"C": 1024, "BT": 2, "BC": 1024, "HAS_RESIDUAL": True}
    case = Case(
        "jv5kernels.kernels.rms_norm",
        "rms_norm_kernel",
        {name: "*bf16" for name in pointers} | scalars,
        constants,
        divisible=("stride_xt", "stride_rt"),
    )
    (report,) = compile_for_sm90([case])
    report.check(max_registers=96)
    assert "ld.global.v4" in report.ptx or ".v4.b32" in report.ptx
