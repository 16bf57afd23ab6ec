"""qk_norm_rope against float64 and Transformers, on the CPU (interpreter) and on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import qk_norm_rope, rope_table

EPS = 1e-6
# One rounding to the dtype, and under the interpreter a truncation instead of it: one unit in the last
# place of the larger half of a rotated pair, so the bound is on the pair's length.
RTOL = {torch.float32: 1e-6, torch.float16: 1.0e-3, torch.bfloat16: 8e-3}
DTYPES = list(RTOL)
IMPLS = ["triton", "torch"]


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads and head_dim; whether the model norms them."""

    q: int
    k: int
    dim: int
    norm: bool

    @property
    def width(self) -> int:
        return (self.q + 2 * self.k) * self.dim

    @property
    def rotated(self) -> int:
        return (self.q + self.k) * self.dim


GEOMETRIES = [
    Heads(16, 8, 128, True),
    Heads(12, 12, 64, False),
    Heads(0, 8, 128, True),
    Heads(16, 0, 128, True),
    Heads(0, 3, 64, False),
    Heads(3, 2, 32, True),
    Heads(1, 1, 256, True),
]
IDS = [f"q{g.q}-k{g.k}-d{g.dim}-{'norm' if g.norm else 'plain'}" for g in GEOMETRIES]
geometries = pytest.mark.parametrize("heads", GEOMETRIES, ids=IDS)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def weights(heads: Heads, dtype: torch.dtype, device: torch.device | str):
    if not heads.norm:
        return {}
    drawn = 1 + 0.2 * draw((2, heads.dim), torch.float32, "cpu", seed=9)
    q_weight, k_weight = drawn.to(dtype).to(device)
    return {"q_weight": q_weight, "k_weight": k_weight}


def sizes(heads: Heads) -> dict[str, int]:
    return {"num_heads": heads.q, "num_kv_heads": heads.k, "head_dim": heads.dim}


def positions_of(tokens: int, device: torch.device | str) -> torch.Tensor:
    """Positions of two packed sequences."""
    first = tokens // 3
    return torch.tensor([*range(first), *range(tokens - first)], dtype=torch.int32, device=device)


def reference(qkv, positions, table, heads: Heads, q_weight=None, k_weight=None, eps=EPS):
    """The formulas in float64, on complex numbers: n[:h] + i·n[h:] is multiplied by exp(i·angle)."""
    qkv = qkv.double().clone()
    x = qkv[:, : heads.rotated].unflatten(1, (heads.q + heads.k, heads.dim))
    for part, weight in ((x[:, : heads.q], q_weight), (x[:, heads.q :], k_weight)):
        if weight is not None:
            part /= torch.sqrt(part.square().mean(-1, keepdim=True) + eps)
            part *= weight.double()
    half = heads.dim // 2
    rows = table[positions.long()].double()
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.complex(
        rows[:, None, :half], rows[:, None, half:]
    )
    qkv[:, : heads.rotated] = torch.cat([rotated.real, rotated.imag], dim=-1).flatten(1)
    return qkv


def assert_rotated(out, expected, heads: Heads, rtol: float):
    """Every pair (x[i], x[i+h]) differs from the expected one by no more than rtol times its length."""
    assert out.shape == expected.shape
    difference = (out.double() - expected).unflatten(1, (-1, 2, heads.dim // 2))
    length = expected.unflatten(1, (-1, 2, heads.dim // 2)).norm(dim=2)
    excess = difference.norm(dim=2) - rtol * length
    assert not (excess > 1e-7).any() and not excess.isnan().any(), (
        f"pair {excess.argmax().item()} differs by {excess.max().item()}"
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 37])
@geometries
def test_matches_float64(heads, tokens, dtype, impl, device):
    qkv = draw((tokens, heads.width), dtype, device)
    before = qkv.clone()
    positions = positions_of(tokens, device)
    table = rope_table(64, heads.dim, 10000.0, device)
    norm = weights(heads, dtype, device)
    out = qk_norm_rope(qkv, positions, table, **sizes(heads), **norm, eps=EPS, impl=impl)
    assert out is qkv
    assert torch.equal(qkv[:, heads.rotated :], before[:, heads.rotated :])
    assert_rotated(qkv, reference(before, positions, table, heads, **norm), heads, RTOL[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@geometries
def test_matches_float64_at_full_size(heads, dtype):
    tokens = 32768 if dtype == torch.bfloat16 else 4100
    qkv = draw((tokens, heads.width), dtype, "cuda")
    before = qkv.clone()
    positions = positions_of(tokens, "cuda")
    table = rope_table(32768, heads.dim, 3.5e6, "cuda")
    norm = weights(heads, dtype, "cuda")
    qk_norm_rope(qkv, positions, table, **sizes(heads), **norm, eps=EPS, impl="triton")
    assert torch.equal(qkv[:, heads.rotated :], before[:, heads.rotated :])
    expected = reference(before, positions, table, heads, **norm)
    assert_rotated(qkv, expected, heads, RTOL[dtype] / 2 if dtype != torch.float32 else 1e-6)


@pytest.mark.gpu
def test_addresses_beyond_2_to_the_31():
    heads = Heads(16, 8, 128, True)
    tokens = 600_000
    qkv = torch.ones(tokens, heads.width, dtype=torch.bfloat16, device="cuda")
    positions = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    positions[-1] = 5
    table = rope_table(8, heads.dim, 10000.0, "cuda")
    norm = weights(heads, torch.bfloat16, "cuda")
    expected = [
        qk_norm_rope(qkv[:1].clone(), row, table, **sizes(heads), **norm, eps=EPS, impl="triton")
        for row in (positions[:1], positions[-1:])
    ]
    qk_norm_rope(qkv, positions, table, **sizes(heads), **norm, eps=EPS, impl="triton")
    assert torch.equal(qkv[-1:], expected[1])
    assert (qkv[:-1] == expected[0]).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("margin", [float("nan"), 7.0], ids=["not-read", "not-written"])
@pytest.mark.parametrize("heads", [Heads(4, 2, 32, True), Heads(3, 3, 64, False)])
def test_margins_and_values_are_not_touched(heads, margin, impl, device):
    parent = torch.full((9, heads.width + 24), margin, device=device)
    parent[2:7, 16:-8] = draw((5, heads.width), torch.float32, device)
    before = parent.clone()
    qkv = parent[2:7, 16:-8]
    positions = positions_of(5, device)
    table = rope_table(8, heads.dim, 10000.0, device)
    norm = weights(heads, torch.float32, device)
    qk_norm_rope(qkv, positions, table, **sizes(heads), **norm, eps=EPS, impl=impl)
    expected = reference(before[2:7, 16:-8], positions, table, heads, **norm)
    assert_rotated(qkv, expected, heads, 1e-6)
    margins = torch.ones_like(parent, dtype=torch.bool)
    margins[2:7, 16 : 16 + heads.rotated] = False
    assert torch.equal(parent[margins].nan_to_num(7.0), before[margins].nan_to_num(7.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl, device):
    heads = Heads(2, 1, 32, False)
    qkv = torch.empty(0, heads.width, device=device)
    positions = torch.empty(0, dtype=torch.int32, device=device)
    table = rope_table(4, 32, 10000.0, device)
    assert qk_norm_rope(qkv, positions, table, **sizes(heads), impl=impl).shape == qkv.shape


@pytest.mark.parametrize("impl", IMPLS)
def test_position_zero_changes_nothing(impl, device):
    heads = Heads(2, 1, 64, False)
    qkv = draw((5, heads.width), torch.float32, device)
    before = qkv.clone()
    positions = torch.zeros(5, dtype=torch.int32, device=device)
    table = rope_table(4, 64, 10000.0, device)
    assert torch.equal(qk_norm_rope(qkv, positions, table, **sizes(heads), impl=impl), before)


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_outside_read_the_nearest_row(impl, device):
    heads = Heads(1, 1, 32, False)
    # The rows around the table hold NaN.
    padded = torch.full((6, 32), float("nan"), device=device)
    padded[1:5] = rope_table(4, 32, 10000.0, device)
    qkv = draw((4, heads.width), torch.float32, device)
    positions = torch.tensor([-1, 4, 2**31 - 1, -(2**31)], dtype=torch.int32, device=device)
    nearest = torch.tensor([0, 3, 3, 0], dtype=torch.int32, device=device)
    expected = reference(qkv, nearest, padded[1:5], heads)
    qk_norm_rope(qkv, positions, padded[1:5], **sizes(heads), impl=impl)
    assert_rotated(qkv, expected, heads, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros(impl, device):
    heads = Heads(1, 1, 32, True)
    qkv = torch.zeros(2, heads.width, device=device)
    table = rope_table(4, 32, 10000.0, device)
    norm = weights(heads, torch.float32, device)
    qk_norm_rope(qkv, positions_of(2, device), table, **sizes(heads), **norm, impl=impl)
    assert torch.equal(qkv, torch.zeros_like(qkv))


@given(position=st.integers(0, 63), seed=st.integers(0, 99))
def test_rotation_keeps_lengths(position, seed):
    heads = Heads(1, 1, 32, False)
    qkv = draw((1, heads.width), torch.float32, "cpu", seed)
    before = qkv.unflatten(1, (3, 32)).norm(dim=-1)
    table = rope_table(64, 32, 10000.0, "cpu")
    positions = torch.tensor([position], dtype=torch.int32)
    qk_norm_rope(qkv, positions, table, **sizes(heads), impl="triton")
    torch.testing.assert_close(qkv.unflatten(1, (3, 32)).norm(dim=-1), before)


@given(first=st.integers(0, 40), second=st.integers(0, 40), shift=st.integers(0, 23))
def test_scores_depend_on_the_distance_alone(first, second, shift):
    heads = Heads(1, 1, 32, False)
    table = rope_table(64, 32, 10000.0, "cpu")
    row = draw((1, heads.width), torch.float32, "cpu")

    def score(query_position: int, key_position: int) -> torch.Tensor:
        positions = torch.tensor([query_position, key_position], dtype=torch.int32)
        qkv = qk_norm_rope(row.repeat(2, 1), positions, table, **sizes(heads), impl="triton")
        return qkv[0, :32] @ qkv[1, 32:64]

    torch.testing.assert_close(
        score(first, second), score(first + shift, second + shift), rtol=1e-5, atol=1e-5
    )


@given(tokens=st.integers(2, 40), seed=st.integers(0, 99))
def test_a_token_does_not_depend_on_the_others(tokens, seed):
    heads = Heads(2, 1, 64, True)
    qkv = draw((tokens, heads.width), torch.float32, "cpu", seed)
    positions = positions_of(tokens, "cpu")
    table = rope_table(64, 64, 10000.0, "cpu")
    options = sizes(heads) | weights(heads, torch.float32, "cpu") | {"impl": "triton"}
    alone = [
        qk_norm_rope(qkv[i : i + 1].clone(), positions[i : i + 1], table, **options)
        for i in (0, tokens // 2, tokens - 1)
    ]
    qk_norm_rope(qkv, positions, table, **options)
    assert torch.equal(qkv[[0, tokens // 2, tokens - 1]], torch.cat(alone))


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_transformers_in_float32(impl, device):
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import (
        Qwen3RMSNorm,
        Qwen3RotaryEmbedding,
        apply_rotary_pos_emb,
    )

    heads = Heads(4, 2, 32, True)
    config = Qwen3Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 3.5e6},
    )
    norm = weights(heads, torch.float32, device)
    q_norm, k_norm = (Qwen3RMSNorm(32, eps=EPS).to(device) for _ in range(2))
    q_norm.weight.data, k_norm.weight.data = norm["q_weight"], norm["k_weight"]
    qkv = draw((11, heads.width), torch.float32, device)
    positions = torch.tensor([*range(9), 4095, 32767], dtype=torch.int32, device=device)
    split = qkv.clone().unflatten(1, (-1, 32))
    with torch.no_grad():
        cos, sin = Qwen3RotaryEmbedding(config).to(device)(qkv, positions[None])
        q = q_norm(split[:, :4]).transpose(0, 1)[None]
        k = k_norm(split[:, 4:6]).transpose(0, 1)[None]
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    expected = torch.cat([q[0], k[0], split[:, 6:].transpose(0, 1)]).transpose(0, 1).flatten(1)
    table = rope_table(32768, 32, 3.5e6, device)
    qk_norm_rope(qkv, positions, table, **sizes(heads), **norm, eps=EPS, impl=impl)
    assert_rotated(qkv, expected.double(), heads, 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [True, False])
def test_opcheck(norm, dtype, impl, device):
    heads = Heads(2, 1, 32, norm)
    table = rope_table(8, 32, 10000.0, device)
    q_weight, k_weight = weights(heads, dtype, device).values() if norm else (None, None)
    qkv, positions = draw((5, heads.width), dtype, device), positions_of(5, device)
    arguments = (qkv, positions, table, 2, 1, 32, q_weight, k_weight, EPS, impl)
    torch.library.opcheck(torch.ops.jv5kernels.qk_norm_rope.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiles_without_graph_breaks(backend):
    heads = Heads(2, 1, 32, False)
    table = rope_table(16, 32, 10000.0, "cpu")

    def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        qkv = x * 2
        qk_norm_rope(qkv, positions, table, **sizes(heads))
        return qkv + 1

    compiled = torch.compile(rotate, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 9):
        x, positions = (
            draw((tokens, heads.width), torch.float32, "cpu"),
            positions_of(tokens, "cpu"),
        )
        torch.testing.assert_close(compiled(x, positions), rotate(x, positions))


def test_errors_name_the_argument():
    qkv, table = torch.ones(2, 128), rope_table(4, 32, 10000.0, "cpu")
    positions = torch.zeros(2, dtype=torch.int32)
    weight = torch.ones(32)
    two_one = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32}

    def refused(error, match, *arguments, **changes):
        with pytest.raises(error, match=match):
            qk_norm_rope(*arguments, **(two_one | changes))

    refused(TypeError, "qkv has dtype int64", qkv.long(), positions, table)
    refused(TypeError, "positions has dtype int64", qkv, positions.long(), table)
    refused(TypeError, "cos_sin has dtype bfloat16", qkv, positions, table.bfloat16())
    refused(ValueError, r"positions must have shape \(2\)", qkv, positions[:1], table)
    refused(ValueError, r"cos_sin must have shape \(\*, 32\)", qkv, positions, table[:, :16])
    refused(ValueError, "cos_sin must be contiguous", qkv, positions, table[::2])
    refused(ValueError, "cos_sin must be contiguous with at least one", qkv, positions, table[:0])
    refused(ValueError, "= 96 columns, not 128", qkv, positions, table, num_heads=1)
    refused(ValueError, "head_dim must be 32, 64, 128 or 256", qkv, positions, table, head_dim=48)
    refused(ValueError, "num_heads must not be negative", qkv, positions, table, num_heads=-2)
    refused(ValueError, "not both be 0", qkv, positions, table, num_heads=0, num_kv_heads=0)
    refused(ValueError, "k_weight is None", qkv, positions, table, q_weight=weight)
    refused(ValueError, r"q_weight must have shape", qkv, positions, table, q_weight=weight[:8])
    refused(ValueError, "rows overlap", qkv[:1].expand(2, 128), positions, table)
    refused(ValueError, "no implementation of qk_norm_rope", qkv, positions, table, impl="cuda")
    refused(ValueError, "computes no gradients", qkv.clone().requires_grad_(), positions, table)
    refused(ValueError, "float64", qkv.double(), positions, table, impl="triton")
    refused(ValueError, "cos_sin in float32", qkv, positions, table.double(), impl="triton")


def test_example_of_the_docstring():
    qkv, table = torch.ones(1, 32), rope_table(2, 32, 10000.0, "cpu")
    position = torch.tensor([1], dtype=torch.int32)
    out = qk_norm_rope(qkv, position, table, num_heads=1, num_kv_heads=0, head_dim=32)
    assert out[0, 0].item() == pytest.approx(-0.3012, abs=5e-5)


def sm90_case(heads: Heads, dtype: str) -> Case:
    from jv5kernels.kernels.qk_norm_rope import TILE_ELEMENTS, heads_per_program

    pointers = {"qkv": f"*{dtype}", "positions": "*i32", "cos_sin": "*fp32"}
    scalars = {"stride_qt": "i32", "T": "i32", "P": "i32", "eps": "fp32"}
    constants = {
        "HQ": heads.q,
        "HK": heads.k,
        "D": heads.dim,
        "BT": TILE_ELEMENTS // (heads.dim // 2),
        "BH": heads_per_program(heads.q, heads.k),
        "HAS_NORM": heads.norm,
    }
    for name, count in (("q_weight", heads.q), ("k_weight", heads.k)):
        if heads.norm and count:
            pointers[name] = f"*{dtype}"
        else:
            constants[name] = None
    return Case(
        "jv5kernels.kernels.qk_norm_rope",
        "qk_norm_rope_kernel",
        pointers | scalars,
        constants,
        divisible=("stride_qt",),
    )


def test_compiles_for_sm90():
    small = [Heads(q, k, 128, True) for q, k in ((16, 8), (0, 8), (16, 0))]
    nano = [Heads(q, k, 64, False) for q, k in ((12, 12), (0, 12), (12, 0))]
    shipped = small + nano
    cases = [sm90_case(heads, "bf16") for heads in shipped]
    cases += [sm90_case(heads, "fp32") for heads in (shipped[0], shipped[3])]
    for report in compile_for_sm90(cases):
        report.check(max_registers=128)
        assert report.shared == 0, "rows pass through shared memory"
        wide = [line for line in report.ptx.splitlines() if "st.global" in line]
        # At least 8 bytes a thread.
        assert wide and all(".v2.b32" in line or ".v4" in line for line in wide)
