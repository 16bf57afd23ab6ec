"""linear_qk_norm_rope against float64, and the bits of a row; its Gluon kernel runs on a Hopper GPU alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import linear, linear_qk_norm_rope, qk_norm_rope, rope_table

HALVES = [torch.float16, torch.bfloat16]
# Of the fused kernel: one rounding. "torch" rounds the projection as well, whose error the norm may enlarge.
RTOL = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
POSITIONS = 512
# (query heads, key heads, head_dim, norm): small and its last layer's parts, nano and its parts, and another.
SMALL, NANO = (16, 8, 128, True), (12, 12, 64, False)
GEOMETRIES = [
    SMALL,
    (0, 8, 128, True),
    (16, 0, 128, True),
    NANO,
    (0, 12, 64, False),
    (2, 4, 128, True),
]
ON_CPU = [(2, 1, 64, True), (0, 2, 32, False), (1, 1, 256, True), (3, 2, 128, False)]
WIDTHS = {128: 1024, 64: 768}


class Problem:
    """Inputs of one call; the weight gives heads of order one."""

    def __init__(self, T, geometry, dtype, device, K=None, seed=0):
        self.heads, self.kv_heads, self.head_dim, self.is_normed = geometry
        K = K or WIDTHS[self.head_dim]
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.x = draw(T, K).to(dtype).to(device)
        self.weight = (draw(rows, K) / K**0.5).to(dtype).to(device)
        norms = (1 + 0.2 * draw(2, self.head_dim)).to(dtype).to(device)
        self.norms = tuple(norms) if self.is_normed else (None, None)
        self.positions = torch.randint(0, POSITIONS, (T,), generator=generator).int().to(device)
        self.table = rope_table(POSITIONS, self.head_dim, 1e4, device)

    def options(self) -> dict:
        names = ("num_heads", "num_kv_heads", "head_dim", "q_weight", "k_weight")
        values = (self.heads, self.kv_heads, self.head_dim, *self.norms)
        return dict(zip(names, values, strict=True))

    def run(self, rows=slice(None), **options) -> torch.Tensor:
        inputs = (self.x[rows], self.weight, self.positions[rows], self.table)
        return linear_qk_norm_rope(*inputs, **self.options(), **options)

    def expected(self) -> torch.Tensor:
        qkv = linear(self.x.double(), self.weight.double(), impl="torch")
        return qk_norm_rope(qkv, self.positions, self.table, **self.options(), impl="torch")

    def assert_close(self, out, rtol):
        """Every pair of values that are rotated together is off by no more than rtol of its head's size."""
        assert out.dtype == self.x.dtype and out.is_contiguous()
        expected = self.expected()
        assert out.shape == expected.shape
        heads = expected.unflatten(1, (-1, self.head_dim))
        error = (out.double() - expected).unflatten(1, (-1, self.head_dim)).abs().amax(-1)
        excess = error / heads.abs().amax(-1).clamp_min(1e-30)
        assert excess.max() <= rtol, f"off by {excess.max():.1e} of the head's largest value"


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("geometry", ON_CPU)
def test_matches_float64(geometry, dtype, device, poisoned_memory):
    problem = Problem(37, geometry, dtype, device, K=24)
    for impl in ("torch", "auto"):
        problem.assert_close(problem.run(impl=impl), 4 * RTOL[dtype])


@settings(max_examples=15)
@given(
    T=st.integers(0, 9), heads=st.integers(0, 3), kv_heads=st.integers(0, 2), K=st.integers(1, 20)
)
def test_any_shape(T, heads, kv_heads, K):
    if heads + kv_heads == 0:
        return
    problem = Problem(T, (heads, kv_heads, 32, True), torch.float32, "cpu", K=K, seed=T)
    if T:
        # A norm divides by what may have cancelled.
        problem.assert_close(problem.run(), 1e-4)
    else:
        assert problem.run().shape == (0, (heads + 2 * kv_heads) * 32)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 127, 300, 4097, 32768])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_kernel_matches_float64(geometry, dtype, T, poisoned_memory):
    problem = Problem(T, geometry, dtype, "cuda")
    problem.assert_close(problem.run(impl="gluon"), RTOL[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("geometry", [SMALL, NANO])
def test_one_rounding_is_better_than_two(geometry, dtype):
    problem = Problem(2049, geometry, dtype, "cuda")
    expected = problem.expected()
    fused, composed = (problem.run(impl=impl) for impl in ("gluon", "torch"))
    rotated = slice(0, (problem.heads + problem.kv_heads) * problem.head_dim)
    errors = [(out - expected)[:, rotated].norm() for out in (fused, composed)]
    assert errors[0] < errors[1]


@pytest.mark.gpu
@pytest.mark.parametrize("K", [8, 72, 200])
def test_depths_off_the_tile(K):
    problem = Problem(130, SMALL, torch.bfloat16, "cuda", K=K)
    problem.assert_close(problem.run(impl="gluon"), RTOL[torch.bfloat16])


@pytest.mark.gpu
def test_strided_rows_and_margins():
    problem = Problem(200, NANO, torch.bfloat16, "cuda")
    parents = [
        torch.full((len(t) + 4, t.shape[1] + 16), float("nan"), dtype=t.dtype, device="cuda")
        for t in (problem.x, problem.weight)
    ]
    for parent, name in zip(parents, ("x", "weight"), strict=True):
        parent[2:-2, 8:-8] = getattr(problem, name)
        setattr(problem, name, parent[2:-2, 8:-8])
    problem.assert_close(problem.run(impl="gluon"), RTOL[torch.bfloat16])
    problem.x = parents[0][2:-2, 7:-9]
    with pytest.raises(ValueError, match="gluon: rows do not start at multiples of 16 bytes"):
        problem.run(impl="gluon")


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", [SMALL, NANO, (2, 4, 128, True)])
def test_nothing_is_written_outside(geometry, monkeypatch):
    problem = Problem(131, geometry, torch.bfloat16, "cuda")
    canaries = torch.full((141, len(problem.weight)), 7.0, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: canaries[5:136])
    out = problem.run(impl="gluon")
    assert out.data_ptr() == canaries[5:136].data_ptr()
    assert (canaries[:5] == 7).all() and (canaries[136:] == 7).all()


@pytest.mark.gpu
def test_nan_stays_in_its_row_and_positions_are_clamped():
    problem = Problem(300, SMALL, torch.bfloat16, "cuda")
    problem.x[3, 5] = problem.x[299, 9] = float("nan")
    problem.positions[7], problem.positions[8] = -5, POSITIONS + 9
    out = problem.run(impl="gluon")
    is_bad = out.isnan().any(1)
    assert is_bad.nonzero().flatten().tolist() == [3, 299]
    problem.positions[7], problem.positions[8] = 0, POSITIONS - 1
    again = problem.run(impl="gluon")
    assert torch.equal(out[~is_bad], again[~is_bad])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("geometry", [SMALL, NANO])
def test_bits_of_a_row_do_not_depend_on_the_batch(geometry, dtype):
    T = 32768
    problem = Problem(T, geometry, dtype, "cuda")
    expected = problem.run(batch_invariant=True)
    assert torch.equal(problem.run(), expected)
    for start, stop in [(0, 1), (5, 17), (100, 101), (130, 642), (T - 2, T), (T - 2049, T)]:
        rows = slice(start, stop)
        assert torch.equal(problem.run(rows, batch_invariant=True), expected[rows])
    for _ in range(10):
        assert torch.equal(problem.run(), expected)


@pytest.mark.gpu
def test_auto_is_fused_for_many_rows_or_batch_invariant(monkeypatch):
    from jv5kernels.kernels import linear_qk_norm_rope as kernels
    from jv5kernels.ops.linear_swiglu import FUSED_ROWS

    launched = []
    original = kernels.launch_linear_qk_norm_rope
    monkeypatch.setattr(
        kernels,
        "launch_linear_qk_norm_rope",
        lambda *a: launched.append(len(a[0])) or original(*a),
    )
    problem = Problem(FUSED_ROWS, SMALL, torch.bfloat16, "cuda")
    few = slice(1, None)
    for rows, batch_invariant, is_fused in [
        (slice(None), False, 1),
        (few, False, 0),
        (few, True, 1),
    ]:
        launched.clear()
        problem.run(rows, batch_invariant=batch_invariant)
        assert len(launched) == is_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    p = Problem(5, (2, 1, 64, True), dtype, device, K=16)
    inputs = (p.x, p.weight, p.positions, p.table, p.heads, p.kv_heads, p.head_dim, *p.norms)
    operator = torch.ops.jv5kernels.linear_qk_norm_rope.default
    torch.library.opcheck(operator, (*inputs, 1e-6, False, "torch"))


def test_compiles_without_graph_breaks():
    compiled = torch.compile(linear_qk_norm_rope, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9):
        p = Problem(T, (2, 1, 64, True), torch.float32, "cpu", K=16)
        out = compiled(p.x, p.weight, p.positions, p.table, **p.options())
        assert torch.equal(out, p.run())


def test_errors_name_the_argument():
    p = Problem(3, (2, 1, 64, True), torch.float32, "cpu", K=16)
    inputs = {"x": p.x, "weight": p.weight, "positions": p.positions, "cos_sin": p.table}

    def refused(kind, match, **changes):
        with pytest.raises(kind, match=match):
            linear_qk_norm_rope(**(inputs | p.options() | changes))

    refused(TypeError, "x has dtype int64", x=p.x.long())
    refused(ValueError, r"weight must have shape \(\*, 16\)", weight=p.weight[:, :9])
    refused(ValueError, r"weight must have .* = 320 rows, not 256", num_heads=3)
    refused(ValueError, "positions must have shape", positions=p.positions[:2])
    refused(ValueError, "q_weight and k_weight go together", k_weight=None)
    refused(ValueError, "head_dim must be 32, 64, 128 or 256", head_dim=48)
    refused(ValueError, "computes no gradients", weight=p.weight.clone().requires_grad_())
    refused(ValueError, "impl='triton' is no implementation", impl="triton")
    refused(ValueError, "library's GEMM is chosen by the number", batch_invariant=True)


def test_only_hopper_runs_gluon():
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        device, match = "cuda", "gluon: the kernel takes head_dim 64 and 128, not 32"
    else:
        device, match = "cpu", "gluon: needs a CUDA device"
    with pytest.raises(ValueError, match=match):
        Problem(3, (2, 1, 32, True), torch.bfloat16, device, K=16).run(impl="gluon")


def test_example_of_the_docstring():
    x, weight, position = torch.ones(1, 1), torch.ones(32, 1), torch.tensor([1], dtype=torch.int32)
    heads = {"num_heads": 1, "num_kv_heads": 0, "head_dim": 32}
    out = linear_qk_norm_rope(x, weight, position, rope_table(2, 32, 10000.0, "cpu"), **heads)
    assert out[0, 0].item() == pytest.approx(-0.3012, abs=5e-5)


def test_compiles_for_sm90():
    from jv5kernels.kernels.linear_sm90 import BC, BK, BN, ROWS

    cases = []
    for heads, kv_heads, head_dim, is_normed in (SMALL, (0, 8, 128, True), NANO):
        types = {"positions": "*i32", "cos_sin": "*fp32"}
        constants = {"HQ": heads, "HK": kv_heads, "D": head_dim, "K": WIDTHS[head_dim]}
        for name, count in (("q_weight", heads), ("k_weight", kv_heads)):
            if is_normed and count:
                types[name] = "*bf16"
            else:
                constants[name] = None
        cases.append(
            Case(
                "jv5kernels.kernels.linear_qk_norm_rope",
                "linear_qk_norm_rope_kernel",
                types | {"T": "i32", "P": "i32", "eps": "fp32"},
                constants,
                descriptors={
                    "x_desc": [ROWS.value, BK.value],
                    "w_desc": [1, BN.value, BK.value],
                    "out_desc": [ROWS.value, BC.value],
                },
                inspected=True,
            )
        )
    for report in compile_for_sm90(cases):
        report.check()
        report.check_chained()
        assert not report.losses
        assert "wgmma.mma_async.sync.aligned.m64n256k16" in report.ptx
        # One wait for the products of a step in either consumer, not one behind each.
        assert report.sass.count("WARPGROUP.DEPBAR") <= report.sass.count("HGMMA") // 4
        assert "st.global" not in report.ptx, "the output does not go through TMA"
        assert "STL" not in report.sass
