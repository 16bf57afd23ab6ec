"""swiglu against float64, on the CPU (interpreter) and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import swiglu

# One rounding to the dtype, and under the interpreter a truncation instead of it: one unit in the last
# place. In float32 a few roundings, and those of the GPU's approximate exp and division.
RTOL = {torch.float32: 4e-6, torch.float16: 1.0e-3, torch.bfloat16: 8e-3}
DTYPES = list(RTOL)
IMPLS = ["triton", "torch"]
SHAPES = [(1, 1), (1, 3072), (3, 768), (7, 100), (65, 64), (2, 1030)]


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def draw(rows: int, columns: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, columns, generator=generator)).to(dtype).to(device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, impl, device, poisoned_memory):
    rows, width = shape
    gate_up = draw(rows, 2 * width, dtype, device)
    out = swiglu(gate_up, impl=impl)
    assert out.shape == shape and out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), reference(gate_up), rtol=RTOL[dtype], atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [3072, 100])
def test_matches_float64_at_full_size(width, poisoned_memory):
    gate_up = draw(32768, 2 * width, torch.bfloat16, "cuda")
    out = swiglu(gate_up, impl="triton")
    torch.testing.assert_close(out.double(), reference(gate_up), rtol=4e-3, atol=1e-6)


@pytest.mark.gpu
def test_addresses_beyond_2_to_the_31():
    gate_up = torch.ones(400_000, 6144, dtype=torch.bfloat16, device="cuda")
    gate_up[-1] = 2.0
    out = swiglu(gate_up, impl="triton")
    torch.testing.assert_close(out[-1], swiglu(gate_up[-1:], impl="torch")[0])
    assert (out[:-1] == out[0, 0]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_and_margins(impl, device):
    parent = torch.full((6, 80), float("nan"), device=device)
    parent[1:5, 8:56] = draw(4, 48, torch.float32, device)
    gate_up = parent[1:5, 8:56]
    out = swiglu(gate_up, impl=impl)
    torch.testing.assert_close(out.double(), reference(gate_up), rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_written_outside(impl, device, monkeypatch):
    canaries = torch.full((7, 24), 7.0, device=device)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: canaries[2:5])
    out = swiglu(draw(3, 48, torch.float32, device), impl=impl)
    assert (canaries[:2] == 7).all() and (canaries[5:] == 7).all()
    assert impl == "torch" or out.data_ptr() == canaries[2:5].data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_to_do(shape, impl, device):
    rows, width = shape
    assert swiglu(torch.empty(rows, 2 * width, device=device), impl=impl).shape == shape


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_gates(impl, device):
    gates = torch.tensor([-1e4, -100.0, -88.0, -0.0, 0.0, 88.0, 1e4], device=device)
    out = swiglu(torch.cat([gates, torch.ones_like(gates)])[None], impl=impl)[0]
    expected = torch.tensor([0, 0, 0, 0, 0, 88.0, 1e4], device=device)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_place(impl, device):
    gate_up = draw(3, 16, torch.float32, device)
    gate_up[1, 2] = gate_up[2, 8 + 5] = float("nan")
    found = swiglu(gate_up, impl=impl).isnan().nonzero().tolist()
    assert found == [[1, 2], [2, 5]]


@given(rows=st.integers(1, 9), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_silu_of_both_signs_is_the_gate(rows, width, seed):
    """silu(g) - silu(-g) = g."""
    gate = draw(rows, width, torch.float32, "cpu", seed)
    ones = torch.ones_like(gate)
    plus = swiglu(torch.cat([gate, ones], dim=1), impl="triton")
    minus = swiglu(torch.cat([-gate, ones], dim=1), impl="triton")
    torch.testing.assert_close(plus - minus, gate, rtol=1e-6, atol=1e-6)


@given(rows=st.integers(2, 9), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_the_others(rows, width, seed):
    gate_up = draw(rows, 2 * width, torch.float32, "cpu", seed)
    alone = torch.cat([swiglu(row[None], impl="triton") for row in gate_up])
    assert torch.equal(swiglu(gate_up, impl="triton"), alone)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, impl, device):
    gate_up = draw(5, 32, dtype, device)
    torch.library.opcheck(torch.ops.jv5kernels.swiglu.default, (gate_up, impl))


def test_compiles_without_graph_breaks():
    compiled = torch.compile(swiglu, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        gate_up = draw(rows, 32, torch.float32, "cpu")
        torch.testing.assert_close(compiled(gate_up), swiglu(gate_up))


def test_errors_name_the_argument():
    gate_up = torch.ones(2, 8)
    with pytest.raises(TypeError, match="gate_up has dtype int64"):
        swiglu(gate_up.long())
    with pytest.raises(ValueError, match="gate_up must have 2 dimensions"):
        swiglu(gate_up[0])
    with pytest.raises(ValueError, match=r"gate_up must have an even number of columns.*\(2, 7\)"):
        swiglu(gate_up[:, :7])
    with pytest.raises(ValueError, match="gate_up must be contiguous in its last dimension"):
        swiglu(gate_up.T)
    with pytest.raises(ValueError, match="impl='cuda' is no implementation of swiglu"):
        swiglu(gate_up, impl="cuda")
    with pytest.raises(ValueError, match="computes no gradients"):
        swiglu(gate_up.clone().requires_grad_())
    with pytest.raises(ValueError, match="triton: the kernel takes float32"):
        swiglu(gate_up.double(), impl="triton")


def test_example_of_the_docstring():
    out = swiglu(torch.tensor([[0.0, 2.0, 5.0, 3.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.0, 5.2848]]), rtol=0, atol=5e-5)


def test_compiles_for_sm90():
    from jv5kernels.kernels.swiglu import NUM_WARPS, tile

    BT, BF = tile(3072)
    signature = {"stride_gt": "i32", "T": "i32"}
    cases = [
        Case(
            "jv5kernels.kernels.swiglu",
            "swiglu_kernel",
            {"gate_up": f"*{dtype}", "out": f"*{dtype}"} | signature,
            {"F": 3072, "BT": BT, "BF": BF},
            num_warps=NUM_WARPS,
            divisible=("stride_gt",),
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]
    for report in compile_for_sm90(cases):
        report.check(max_registers=64)
        loads = [line for line in report.ptx.splitlines() if "ld.global" in line]
        assert loads and all(".v4" in line for line in loads)
