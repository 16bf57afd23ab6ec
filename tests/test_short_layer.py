"""The kernels of a short layer against float64, and the short layer loop against the usual one."""

from __future__ import annotations

import pytest
import torch
from conftest import ragged
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import rope_table, short_attention, short_linear, short_norm
from jv5kernels.ops.short_layer import SHORT_TOKENS

# Relative to the norm of the reference: one rounding of the result; under the interpreter a truncation.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = list(TOLERANCE)
IMPLS = ["triton", "torch"]
EPS = 1e-6


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected).norm() / expected.norm()).item()


def skip_float32_on_cuda(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    if impl == "triton" and dtype == torch.float32 and device.type == "cuda":
        pytest.skip("no such kernel")


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 12, 16])
@pytest.mark.parametrize("is_swiglu", [False, True])
@pytest.mark.parametrize("inner", [512, 768])
def test_linear_matches_float64(inner, is_swiglu, rows, dtype, impl, device, poisoned_memory):
    skip_float32_on_cuda(impl, dtype, device)
    columns = 64
    like = {"dtype": dtype, "device": device}
    x = draw(rows, inner, seed=0, **like)
    weight = draw(columns * (1 + is_swiglu), inner, seed=3, **like) / inner**0.5
    out = short_linear(x, weight, is_swiglu=is_swiglu, impl=impl)
    expected = x.double() @ weight.double().T
    if is_swiglu:
        gate, up = expected.chunk(2, -1)
        expected = gate / (1 + torch.exp(-gate)) * up
    assert out.shape == (rows, columns) and out.dtype == dtype
    assert relative_error(out, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_y", [False, True])
@pytest.mark.parametrize("inner", [256, 768])
def test_norm_matches_float64(inner, has_y, dtype, impl, device, poisoned_memory):
    like = {"dtype": dtype, "device": device}
    # The first layer has no y, and the token embeddings as they are.
    x = draw(5, inner, dtype=torch.float32 if has_y else dtype, device=device, seed=0)
    y = draw(5, inner, seed=1, **like) if has_y else None
    norm_weight = draw(inner, seed=2, **like)
    out, total = short_norm(x, y, norm_weight, EPS, impl=impl)
    expected = x.double() if y is None else x.double() + y.double()
    assert total.dtype == torch.float32 and out.dtype == dtype
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    expected = expected * torch.rsqrt(expected.square().mean(-1, keepdim=True) + EPS)
    assert relative_error(out, expected * norm_weight.double()) <= TOLERANCE[dtype]


def attention_reference(qkv, heads, lengths, causal, q_weight, k_weight, theta) -> torch.Tensor:
    """One head of one sequence at a time."""
    num_heads, num_kv_heads, dim = heads
    x = qkv.double().unflatten(-1, (-1, dim))
    out = torch.zeros(qkv.shape[0], num_heads, dim, dtype=torch.float64, device=qkv.device)
    table = rope_table(max(lengths), dim, theta, qkv.device).double()

    def rotated(rows: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            mean = rows.square().mean(-1, keepdim=True)
            rows = rows * torch.rsqrt(mean + EPS) * weight.double()
        cos, sin = table[: len(rows)].chunk(2, -1)
        a, b = rows.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        for head in range(num_heads):
            kv = num_heads + head // (num_heads // num_kv_heads)
            q, k = rotated(x[rows, head], q_weight), rotated(x[rows, kv], k_weight)
            scores = q @ k.T * dim**-0.5
            if causal:
                scores += torch.full_like(scores, float("-inf")).triu(1)
            out[rows, head] = scores.softmax(-1) @ x[rows, kv + num_kv_heads]
        begin += length
    return out.flatten(1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [12, 4], [3, 0, 10, 1, 0], [0, 16, 0]])
@pytest.mark.parametrize("family", ["small", "nano"])
def test_attention_matches_float64(family, lengths, dtype, impl, device, poisoned_memory):
    heads = (4, 2, 128) if family == "small" else (3, 3, 64)
    num_heads, num_kv_heads, dim = heads
    width = (num_heads + 2 * num_kv_heads) * dim
    qkv = draw(sum(lengths), width, dtype=dtype, device=device, seed=0)
    weights: dict[str, torch.Tensor | None] = {"q_weight": None, "k_weight": None}
    if family == "small":
        weights = {
            name: draw(dim, dtype=dtype, device=device, seed=i) for i, name in enumerate(weights)
        }
    out = short_attention(
        qkv,
        rope_table(SHORT_TOKENS, dim, 10000.0, device),
        ragged(lengths, device),
        max(lengths),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        causal=family == "small",
        **weights,
        eps=EPS,
        impl=impl,
    )
    expected = attention_reference(qkv, heads, lengths, family == "small", **weights, theta=10000.0)
    assert out.shape == expected.shape and out.dtype == dtype
    assert relative_error(out, expected) <= TOLERANCE[dtype]


def test_a_sequence_does_not_see_its_neighbours():
    lengths = [5, 9, 7]
    qkv = draw(21, 3 * 64, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    table = rope_table(64, 64, 10000.0, "cpu")
    options = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 64, "causal": False, "impl": "triton"}
    together = short_attention(qkv, table, ragged(lengths), 9, **options)
    qkv[:5], qkv[14:] = float("nan"), float("inf")
    alone = short_attention(qkv, table, ragged(lengths), 9, **options)
    assert torch.equal(alone[5:14], together[5:14])


def test_errors_name_the_argument():
    x, weight = torch.ones(2, 512), torch.ones(64, 512)
    with pytest.raises(ValueError, match="x has 17 rows: at most 16"):
        short_linear(torch.ones(17, 512), weight)
    with pytest.raises(ValueError, match="x must be contiguous"):
        short_linear(torch.ones(512, 2).T, weight)
    with pytest.raises(TypeError, match="y has dtype float64"):
        short_norm(x, x.double(), weight[0], EPS)
    with pytest.raises(TypeError, match="x has dtype float32: allowed are bfloat16"):
        short_linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match="N in steps of 32 and K in steps of 256"):
        short_linear(torch.ones(2, 100), torch.ones(64, 100), impl="triton")
    with pytest.raises(ValueError, match="weight has 65 rows"):
        short_linear(x, torch.ones(65, 512), is_swiglu=True)
    table = rope_table(64, 32, 10000.0, "cpu")
    options = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 32, "causal": True}
    with pytest.raises(ValueError, match="max_seqlen=17"):
        short_attention(torch.ones(17, 96), table, ragged([17]), 17, **options)
    with pytest.raises(ValueError, match="q_weight and k_weight go together"):
        short_attention(
            torch.ones(2, 96), table, ragged([2]), 2, q_weight=torch.ones(32), **options
        )


def test_opcheck(device):
    dtype = torch.bfloat16
    x = draw(3, 256, dtype=torch.float32, device=device, seed=0)
    weight = draw(64, 256, dtype=dtype, device=device, seed=1)
    y = weight[:3].contiguous()
    norm, linear, attention = (
        getattr(torch.ops.jv5kernels, f"short_{name}") for name in ("norm", "linear", "attention")
    )
    torch.library.opcheck(norm, (x, y, weight[0].contiguous(), EPS, "auto"))
    torch.library.opcheck(linear, (y, weight, True, "auto"))
    qkv = draw(3, 96, dtype=dtype, device=device, seed=2)
    table = rope_table(3, 32, 10000.0, device)
    bounds = ragged([1, 2], device)
    torch.library.opcheck(
        attention, (qkv, table, bounds, 2, [1, 1, 32], True, None, None, EPS, "auto")
    )


def test_weights_beyond_the_registers_take_the_usual_kernels():
    from jv5kernels.kernels.short_layer import fits

    assert all(fits(*shape) for shape in PROJECTIONS)
    # Projections of a Qwen3 model of width 2560.
    for shape in ((6144, 2560, False), (2560, 9728, False), (9728, 2560, True)):
        assert not fits(*shape), shape


MODULE = "jv5kernels.kernels.short_layer"
# (N, K, SwiGLU) of small's and nano's projections.
PROJECTIONS = [
    (4096, 1024, False),
    (1024, 2048, False),
    (3072, 1024, True),
    (1024, 3072, False),
    (2304, 768, False),
    (768, 768, False),
    (3072, 768, True),
    (768, 3072, False),
]


def linear_case(columns: int, inner: int, is_swiglu: bool) -> Case:
    from jv5kernels.kernels.short_layer import ROWS, config_of

    config, step = config_of(columns, inner, is_swiglu)
    constants: dict[str, object] = {"N": columns, "K": inner, "BM": ROWS, "BN": config.BN}
    constants |= {"BK": step, "PIECES": config.num_warps}
    constants |= {"IS_SWIGLU": is_swiglu, "IS_CHAINED": True}
    signature = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "T": "i32"}
    return Case(MODULE, "short_linear_kernel", signature, constants, config.num_warps, 1)


def test_linear_compiles_for_sm90_with_its_weight_on_the_way_before_the_wait():
    cases = [linear_case(*shape) for shape in PROJECTIONS]
    for case, report in zip(cases, compile_for_sm90(cases), strict=True):
        report.check()
        assert "mma.sync" in report.ptx, case
        before, after = report.ptx.split("griddepcontrol.wait")
        bits = 32 * before.count("ld.global.v4.b32") * 4 * case.num_warps * 32
        tiles = 1 + bool(case.constants["IS_SWIGLU"])
        assert bits == 16 * tiles * case.constants["BN"] * case.constants["K"], case
        for instruction in ("st.global", "launch_dependents"):
            assert instruction not in before, instruction
        assert "st.global" in after


def test_norm_compiles_for_sm90():
    signature = {"x": "*fp32", "y": "*bf16", "weight": "*bf16", "out": "*bf16", "total": "*fp32"}
    constants: dict[str, object] = {"K": 768, "BK": 1024, "IS_CHAINED": True}
    case = Case(MODULE, "short_norm_kernel", signature | {"eps": "fp32"}, constants)
    (report,) = compile_for_sm90([case])
    report.check()
    assert "st.global" not in report.ptx.split("griddepcontrol.wait")[0]


def check_nothing_moves_before_the_wait(before: str) -> None:
    """Memory that the kernel before may write is neither read nor written until it is done."""
    for instruction in ("ld.global", "st.global", "cp.async", "launch_dependents"):
        assert instruction not in before, instruction


def test_attention_compiles_for_sm90():
    cases = []
    for heads, kv_heads, dim, causal in ((16, 8, 128, True), (12, 12, 64, False)):
        signature = {"qkv": "*bf16", "cos_sin": "*fp32", "cu_seqlens": "*i32", "out": "*bf16"}
        signature |= {"eps": "fp32", "scale": "fp32"}
        constants: dict[str, object] = {"HQ": heads, "HK": kv_heads, "D": dim, "BT": 16}
        constants |= {"IS_CAUSAL": causal, "HAS_NORM": causal, "IS_CHAINED": True}
        optional = {"q_weight": "*bf16", "k_weight": "*bf16"}
        if causal:
            signature |= optional
        else:
            constants |= dict.fromkeys(optional)
        cases.append(Case(MODULE, "short_attention_kernel", signature, constants))
    for report in compile_for_sm90(cases):
        report.check()
        before, _ = report.ptx.split("griddepcontrol.wait")
        check_nothing_moves_before_the_wait(before)
