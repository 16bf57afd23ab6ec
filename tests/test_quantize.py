"""quantize_int8 and quantize_binary against Sentence Transformers' own function, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native import CPU_RUNS, RUNS, dispatch_level, guarded_outputs, levels, torch_threads
from sentence_transformers.util import quantize_embeddings
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import quantize_binary, quantize_int8

DIMS = [32, 64, 128, 256, 512, 768, 1024, 1, 7, 9, 31, 33, 100, 1023]
INT8 = ["int8", "uint8"]
BINARY = ["ubinary", "binary"]


def draw(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Unit rows with both zeros, values at bucket edges, and far outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    x = x / x.norm(dim=-1, keepdim=True)
    picks = torch.rand(rows, dim, generator=generator)
    x[picks < 0.02] = 0.0
    x[(picks >= 0.02) & (picks < 0.04)] = -0.0
    x[(picks >= 0.04) & (picks < 0.05)] = 1e6
    x[(picks >= 0.05) & (picks < 0.06)] = -1e6
    return x


def ranges_of(x: torch.Tensor) -> torch.Tensor:
    """Ranges narrower than the data, with a constant dimension where there is room for one."""
    inner = x.clamp(-0.05, 0.05)
    ranges = torch.stack([inner.min(0).values, inner.max(0).values])
    if x.shape[1] > 2:
        ranges[:, 1] = 0.01
    return ranges


def theirs_int8(x: torch.Tensor, ranges: torch.Tensor, precision: str) -> np.ndarray:
    return quantize_embeddings(x.cpu(), precision, ranges=ranges.cpu().numpy())


def assert_same_bytes(out: torch.Tensor, expected: np.ndarray) -> None:
    assert out.is_contiguous() and out.cpu().numpy().dtype == expected.dtype
    different = np.argwhere(out.cpu().numpy() != expected)
    assert len(different) == 0, f"{len(different)} bytes differ, the first at {different[0]}"


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("precision", INT8)
@pytest.mark.parametrize("dim", DIMS)
def test_int8_gives_their_bytes(dim, precision, impl, place, poisoned_memory):
    x = draw(40, dim)
    ranges = ranges_of(x)
    out = quantize_int8(x.to(place), ranges.to(place), precision, impl=impl)
    assert_same_bytes(out, theirs_int8(x, ranges, precision))


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("precision", BINARY)
@pytest.mark.parametrize("dim", DIMS)
def test_binary_gives_their_bytes(dim, precision, impl, place, poisoned_memory):
    x = draw(40, dim)
    out = quantize_binary(x.to(place), precision, impl=impl)
    assert_same_bytes(out, quantize_embeddings(x, precision))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dim", DIMS)
def test_every_instruction_set_gives_the_same_bytes(dim, level):
    x = draw(9, dim)
    ranges = ranges_of(x)
    with dispatch_level(level):
        for precision in INT8:
            out = quantize_int8(x, ranges, precision, impl="cpp")
            assert_same_bytes(out, theirs_int8(x, ranges, precision))
        for precision in BINARY:
            out = quantize_binary(x, precision, impl="cpp")
            assert_same_bytes(out, quantize_embeddings(x, precision))


@given(dim=st.integers(1, 70), seed=st.integers(0, 999), width=st.sampled_from([1e-38, 1e-3, 1e30]))
@pytest.mark.parametrize(("impl", "place"), CPU_RUNS)
def test_int8_at_bucket_edges(impl, place, dim, seed, width):
    """Values that are whole numbers of steps, where rounding decides the code."""
    generator = torch.Generator().manual_seed(seed)
    ranges = torch.randn(2, dim, generator=generator).sort(0).values * width
    steps = (ranges[1] - ranges[0]) / 255
    x = ranges[0] + steps * torch.randint(-3, 260, (6, dim), generator=generator)
    out = quantize_int8(x, ranges, "uint8", impl=impl)
    assert_same_bytes(out, theirs_int8(x, ranges, "uint8"))


@given(bits=st.lists(st.booleans(), min_size=1, max_size=80))
@pytest.mark.parametrize(("impl", "place"), CPU_RUNS)
def test_bits_come_back(impl, place, bits):
    x = torch.where(torch.tensor([bits]), 1e-45, -1e-45)
    packed = quantize_binary(x, impl=impl)
    unpacked = np.unpackbits(packed.numpy(), axis=-1)[0]
    assert unpacked[: len(bits)].tolist() == bits
    assert not unpacked[len(bits) :].any()
    assert torch.equal(quantize_binary(x, "binary", impl=impl).view(torch.uint8), packed ^ 0x80)


@pytest.mark.parametrize(("impl", "place"), RUNS)
def test_values_that_are_not_numbers(impl, place):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[nan, inf, -inf, 1e6, -1e6, -0.0, 0.0, 0.5]], device=place)
    ranges = torch.tensor([[-1.0] * 8, [1.0] * 8], device=place)
    codes = [0, 255, 0, 255, 0, 127, 127, 191]
    assert quantize_int8(x, ranges, "uint8", impl=impl).tolist() == [codes]
    assert quantize_int8(x, ranges, "int8", impl=impl).tolist() == [[c - 128 for c in codes]]
    assert quantize_binary(x, impl=impl).tolist() == [[0b01010001]]


@pytest.mark.parametrize(("impl", "place"), RUNS)
def test_a_constant_dimension_has_step_one(impl, place):
    x = torch.tensor([[0.5], [0.4], [1.6], [300.0]], device=place)
    ranges = torch.full((2, 1), 0.5, device=place)
    out = quantize_int8(x, ranges, "uint8", impl=impl)
    assert out.flatten().tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize(("impl", "place"), [run for run in CPU_RUNS if run.id == "cpp"])
def test_strided_rows_and_margins(impl, place, monkeypatch):
    parent = torch.full((7, 61), float("nan"))
    parent[1:-1, 5:-5] = draw(5, 51)
    x = parent[1:-1, 5:-5]
    ranges = ranges_of(x)
    with guarded_outputs(monkeypatch):
        codes = quantize_int8(x, ranges, "uint8", impl=impl).clone()
        bits = quantize_binary(x, impl=impl).clone()
    assert_same_bytes(codes, theirs_int8(x, ranges, "uint8"))
    assert_same_bytes(bits, quantize_embeddings(x, "ubinary"))


@pytest.mark.parametrize(("impl", "place"), [run for run in CPU_RUNS if run.id == "cpp"])
def test_threads_do_not_change_a_byte(impl, place):
    x = draw(2000, 200)
    ranges = ranges_of(x)
    results = []
    for threads in (1, 3):
        with torch_threads(threads):
            codes = quantize_int8(x, ranges, impl=impl)
            results.append((codes, quantize_binary(x, impl=impl)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    x = draw(20, 50).clamp(-1, 1).to(dtype)
    ranges = ranges_of(x.float())
    assert_same_bytes(quantize_int8(x, ranges, "uint8"), theirs_int8(x, ranges, "uint8"))
    assert_same_bytes(quantize_binary(x), quantize_embeddings(x, "ubinary"))


@pytest.mark.parametrize(("impl", "place"), RUNS)
def test_no_rows(impl, place):
    x = torch.empty(0, 9, device=place)
    ranges = torch.zeros(2, 9, device=place)
    assert quantize_int8(x, ranges, impl=impl).shape == (0, 9)
    assert quantize_binary(x, impl=impl).shape == (0, 2)


@pytest.mark.parametrize(("impl", "place"), RUNS)
def test_opcheck(impl, place):
    x = draw(5, 19).to(place)
    ops = torch.ops.jv5kernels
    for precision in INT8:
        arguments = (x, ranges_of(x), precision, impl)
        torch.library.opcheck(ops.quantize_int8.default, arguments)
    for precision in BINARY:
        torch.library.opcheck(ops.quantize_binary.default, (x, precision, impl))


def test_compiles_without_graph_breaks():
    x = draw(5, 19)
    ranges = ranges_of(x)
    options = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}
    assert torch.equal(torch.compile(quantize_int8, **options)(x, ranges), quantize_int8(x, ranges))
    assert torch.equal(torch.compile(quantize_binary, **options)(x), quantize_binary(x))


def test_errors_name_the_argument():
    x, ranges = torch.ones(2, 8), torch.ones(2, 8)
    with pytest.raises(TypeError, match="x has dtype int8"):
        quantize_binary(x.to(torch.int8))
    with pytest.raises(ValueError, match=r"precision='int4' is unknown: choose one of \['int8'"):
        quantize_int8(x, ranges, "int4")
    with pytest.raises(ValueError, match=r"precision='int8' is unknown: choose one of \['ubinary'"):
        quantize_binary(x, "int8")
    with pytest.raises(ValueError, match=r"ranges must have shape \(2, 8\), not \(2, 7\)"):
        quantize_int8(x, torch.ones(2, 7))
    with pytest.raises(ValueError, match="impl='sdpa' is no implementation of quantize_binary"):
        quantize_binary(x, impl="sdpa")
    with pytest.raises(ValueError, match="triton: the kernel takes float32, float16 and bfloat16"):
        quantize_binary(x.double(), impl="triton")
    with pytest.raises(ValueError, match="takes float32, not torch.float64"):
        quantize_binary(x.double(), impl="cpp")
    with pytest.raises(ValueError, match="computes no gradients"):
        quantize_binary(x.requires_grad_())


def test_compiles_for_sm90():
    signature = {"x": "*fp32", "stride_xb": "i32", "stride_rr": "i32", "B": "i32"}
    common = {"DIM": 1024, "BC": 1024, "ROWS": 8}
    codes = {"WIDTH": 1024, "KIND": 1, "FLIP": 0x80}
    bits = {"WIDTH": 128, "KIND": 2, "FLIP": 0, "ranges": None}
    cases = [
        Case(
            "jv5kernels.kernels.quantize",
            "quantize_kernel",
            signature | types,
            common | constants,
            enable_fp_fusion=False,
            divisible=("stride_xb",),
        )
        for types, constants in [({"out": "*i8", "ranges": "*fp32"}, codes), ({"out": "*u8"}, bits)]
    ]
    for report in compile_for_sm90(cases):
        report.check(max_registers=128)
        assert "ld.global.v4" in report.ptx and "fma." not in report.ptx
