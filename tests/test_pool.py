"""pool against float64 for every implementation, on the CPU and on the GPU."""

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

from jv5kernels.ops import pool

MODES = ["lasttoken", "mean", "cls"]
LENGTHS = [1, 2, 63, 64, 65, 300]
WIDTH = 72
# Sums are fp32 in chunks; ‖error‖ / ‖reference‖, the bound that a 32768-token mean must also keep.
TOLERANCE = 1e-6


def draw(shape: tuple[int, ...], dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def reference(hidden: torch.Tensor, lengths: list[int], mode: str) -> torch.Tensor:
    pick = {"lasttoken": lambda s: s[-1], "cls": lambda s: s[0], "mean": lambda s: s.mean(0)}[mode]
    return torch.stack([pick(sequence) for sequence in hidden.double().split(lengths)])


def assert_near(out: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_matches_float64(mode, dtype, impl, place, poisoned_memory):
    if impl == "cpp" and dtype != torch.float32:
        with pytest.raises(ValueError, match="takes float32"):
            pool(draw((3, 8), dtype), ragged([3]), mode, impl=impl)
        return
    hidden = draw((sum(LENGTHS), WIDTH), dtype, place)
    out = pool(hidden, ragged(LENGTHS, place), mode, impl=impl)
    assert out.dtype == torch.float32 and out.is_contiguous()
    expected = reference(hidden, LENGTHS, mode)
    if mode == "mean":
        assert_near(out, expected)
    else:
        assert torch.equal(out.double(), expected)


@pytest.mark.parametrize(("impl", "place"), RUNS)
def test_mean_of_32768_tokens(impl, place):
    # An offset makes the sum grow: rounding that does not average out would show.
    hidden = draw((32768, 16), device=place) + torch.linspace(0, 3, 16, device=place)
    out = pool(hidden, ragged([32768], place), "mean", impl=impl)
    expected = hidden.double().mean(0, keepdim=True)
    assert_near(out, expected)
    assert ((out.double() - expected).abs() <= 1e-6 * hidden.double().abs().mean(0)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[32768], [512] * 64, [1, 8191, 63, 20000, 4513]])
@pytest.mark.parametrize("width", [768, 1024, 4096])
def test_mean_at_real_shapes(width, lengths, dtype):
    hidden = draw((sum(lengths), width), dtype, "cuda")
    out = pool(hidden, ragged(lengths, "cuda"), "mean", impl="triton")
    assert_near(out, reference(hidden, lengths, "mean"))
    spans = torch.tensor([[0, 32768], [5, 700], [32000, 32768]], dtype=torch.int32, device="cuda")
    expected = torch.stack([hidden[start:end].double().mean(0) for start, end in spans.tolist()])
    assert_near(pool(hidden, ragged(lengths, "cuda"), "mean", spans=spans), expected)


@pytest.mark.parametrize(("impl", "place"), KERNEL_RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_strided_rows_and_margins(mode, impl, place, monkeypatch):
    lengths = [3, 70, 1]
    parent = torch.full((sum(lengths) + 2, WIDTH + 16), float("nan"), device=place)
    parent[1:-1, 8:-8] = draw((sum(lengths), WIDTH), device=place)
    hidden = parent[1:-1, 8:-8]
    out = pool(hidden.contiguous(), ragged(lengths, place), mode, impl=impl)
    strided = pool(hidden, ragged(lengths, place), mode, impl=impl)
    torch.testing.assert_close(strided, out, rtol=0, atol=1e-6)
    with guarded_outputs(monkeypatch):
        pool(hidden, ragged(lengths, place), mode, impl=impl)


@pytest.mark.parametrize(("impl", "place"), RUNS)
def test_spans_overlap_in_any_order(impl, place, poisoned_memory):
    ranges = [(40, 110), (0, 3), (0, 200), (7, 7), (199, 200), (0, 3)]
    parent = torch.full((len(ranges), 4), -1, dtype=torch.int32, device=place)
    parent[:, 1:3] = torch.tensor(ranges, dtype=torch.int32)
    hidden = draw((200, WIDTH), device=place)
    out = pool(hidden, ragged([200], place), "mean", spans=parent[:, 1:3], impl=impl)
    for row, (start, end) in zip(out, ranges, strict=True):
        if start == end:
            assert torch.equal(row, torch.zeros_like(row))
        else:
            assert_near(row, hidden[start:end].double().mean(0))
    assert torch.equal(out[1], out[5])


@pytest.mark.parametrize(("impl", "place"), RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_empty_sequences_and_batches(mode, impl, place, poisoned_memory):
    hidden = draw((5, WIDTH), device=place)
    out = pool(hidden, ragged([0, 5, 0], place), mode, impl=impl)
    assert torch.equal(out[[0, 2]], torch.zeros_like(out[[0, 2]]))
    assert_near(out[1:2], reference(hidden, [5], mode))
    assert pool(hidden[:0], ragged([], place), mode, impl=impl).shape == (0, WIDTH)
    assert not pool(hidden[:0], ragged([0], place), mode, impl=impl).any()


@pytest.mark.parametrize(("impl", "place"), KERNEL_RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_does_not_depend_on_its_batch(mode, impl, place):
    sequence = draw((150, WIDTH), device=place)
    alone = pool(sequence, ragged([150], place), mode, impl=impl)
    for lengths, position in [([150, 200], 0), ([33, 150], 1), ([7, 64, 150, 1, 90], 2)]:
        others = draw((sum(lengths) - 150, WIDTH), device=place, seed=len(lengths))
        start = sum(lengths[:position])
        batch = torch.cat([others[:start], sequence, others[start:]])
        out = pool(batch, ragged(lengths, place), mode, impl=impl)
        assert torch.equal(out[position : position + 1], alone)


@settings(max_examples=12)
@given(lengths=st.lists(st.integers(0, 80), min_size=1, max_size=5), seed=st.integers(0, 99))
@pytest.mark.parametrize(("impl", "place"), CPU_RUNS)
def test_joined_batches_equal_their_parts(impl, place, lengths, seed):
    hidden = draw((sum(lengths), 9), seed=seed)
    together = pool(hidden, ragged(lengths), "mean", impl=impl)
    parts = [pool(part, ragged([len(part)]), "mean", impl=impl) for part in hidden.split(lengths)]
    assert torch.equal(together, torch.cat(parts))


@settings(max_examples=12)
@given(length=st.integers(1, 300), seed=st.integers(0, 99))
@pytest.mark.parametrize(("impl", "place"), CPU_RUNS)
def test_order_of_tokens_leaves_the_mean(impl, place, length, seed):
    hidden = draw((length, 9), seed=seed)
    shuffled = hidden[torch.randperm(length, generator=torch.Generator().manual_seed(seed))]
    cu_seqlens = ragged([length])
    torch.testing.assert_close(
        pool(shuffled, cu_seqlens, "mean", impl=impl),
        pool(hidden, cu_seqlens, "mean", impl=impl),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("width", [1, 7, 72, 1031])
def test_every_instruction_set(level, width):
    hidden = draw((sum(LENGTHS), width))
    with dispatch_level(level):
        out = pool(hidden, ragged(LENGTHS), "mean", impl="cpp")
    assert_near(out, reference(hidden, LENGTHS, "mean"))


@pytest.mark.parametrize("level", levels())
def test_threads_do_not_change_a_bit(level):
    hidden = draw((4000, 256))
    with dispatch_level(level):
        with torch_threads(1):
            one = pool(hidden, ragged([3500, 500]), "mean", impl="cpp")
        with torch_threads(3):
            three = pool(hidden, ragged([3500, 500]), "mean", impl="cpp")
    assert torch.equal(one, three)


@pytest.mark.parametrize(("impl", "place"), RUNS)
def test_opcheck(impl, place):
    hidden, cu_seqlens = draw((9, 16), device=place), ragged([4, 5], place)
    spans = torch.tensor([[0, 3], [2, 9]], dtype=torch.int32, device=place)
    op = torch.ops.jv5kernels.pool.default
    for mode in MODES:
        torch.library.opcheck(op, (hidden, cu_seqlens, mode, None, impl))
    torch.library.opcheck(op, (hidden, cu_seqlens, "mean", spans, impl))


def test_compiles_without_graph_breaks():
    compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, cu_seqlens = draw((9, 16)), ragged([4, 5])
    assert torch.equal(compiled(hidden, cu_seqlens, "mean"), pool(hidden, cu_seqlens, "mean"))


def test_float64_stays_float64():
    hidden = draw((9, 4)).double()
    out = pool(hidden, ragged([4, 5]), "mean", impl="torch")
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, reference(hidden, [4, 5], "mean"), rtol=1e-14, atol=0)


def test_errors_name_the_argument():
    hidden, cu_seqlens = torch.ones(4, 8), ragged([1, 3])
    with pytest.raises(TypeError, match="hidden has dtype int64"):
        pool(hidden.long(), cu_seqlens, "mean")
    with pytest.raises(TypeError, match="cu_seqlens has dtype int64"):
        pool(hidden, cu_seqlens.long(), "mean")
    with pytest.raises(ValueError, match=r"mode='max' is unknown: choose one of \['lasttoken'"):
        pool(hidden, cu_seqlens, "max")
    spans = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"spans must have shape \(\*, 2\)"):
        pool(hidden, cu_seqlens, "mean", spans=spans.T[:1])
    with pytest.raises(ValueError, match="triton: the kernel takes float32"):
        pool(hidden.double(), cu_seqlens, "mean", impl="triton")
    with pytest.raises(ValueError, match="computes no gradients"):
        pool(hidden.requires_grad_(), cu_seqlens, "mean")


@pytest.mark.parametrize("offsets", [[0, 5], [3, 1], [-1, 2]])
@pytest.mark.parametrize(("impl", "place"), [run for run in CPU_RUNS if run.id == "cpp"])
def test_the_cpp_kernel_refuses_ranges_outside(impl, place, offsets):
    with pytest.raises(ValueError, match="0 <= start <= end <= T"):
        pool(torch.ones(4, 8), torch.tensor(offsets, dtype=torch.int32), "mean", impl=impl)
