"""attention_pooled against float64, on the CPU (interpreter) and on the GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import attention_pooled, attention_varlen

# As in test_attention.py: one rounding of the output and one of the probabilities.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
}
DTYPES = list(TOLERANCE)
IMPLS = ["triton", "torch"]
CPU = torch.device("cpu")
SPLIT = 512  # of the kernel
LENGTHS = [1, 2, 0, 63, 64, 65, 300]
LONG = [SPLIT, SPLIT + 1, 17 * SPLIT + 3]  # one split, two, and more than are combined at a time


def reference(q, k, v, lengths, positions=None, scale=None):
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    begin = 0
    for i, length in enumerate(lengths):
        seen = length if positions is None else min(length, int(positions[i]) + 1)
        keys = slice(begin, begin + seen)
        for head in range(q.shape[1]):
            if seen > 0:
                weights = torch.softmax(k[keys, head // group] @ q[i, head] * scale, 0)
                out[i, head] = weights @ v[keys, head // group]
        begin += length
    return out


def draw(lengths, heads, kv_heads, head_dim, dtype=torch.float32, device=CPU, seed=0):
    """q of its own; k and v as views of one fused projection."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(lengths), heads, head_dim, generator=generator)
    fused = torch.randn(sum(lengths), 2 * kv_heads, head_dim, generator=generator)
    k, v = fused.to(dtype).to(device).split(kv_heads, 1)
    return q.to(dtype).to(device), k, v


def run(tensors, lengths, positions=None, **options):
    q, k, v = tensors
    if positions is not None:
        positions = torch.tensor(positions, dtype=torch.int32, device=q.device)
    cu_seqlens = ragged(lengths, q.device)
    longest = options.pop("max_seqlen", max(lengths, default=0))
    return attention_pooled(q, k, v, cu_seqlens, longest, query_positions=positions, **options)


def check(out, expected):
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[out.dtype])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["short", "long"])
def test_matches_float64(lengths, dtype, impl, device, poisoned_memory):
    tensors = draw(lengths, 2, 1, 32, dtype, device)
    out = run(tensors, lengths, impl=impl)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == tensors[0].shape
    check(out, reference(*tensors, lengths))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["short", "long"])
def test_query_positions(lengths, impl, device, poisoned_memory):
    """Positions in the middle, at a split's edge, before the first key and after the last."""
    positions = [0, 5, 3, 40, -1, 64, 128] if lengths == LENGTHS else [SPLIT - 1, 7, SPLIT]
    tensors = draw(lengths, 2, 1, 32, device=device)
    expected = reference(*tensors, lengths, positions)
    check(run(tensors, lengths, positions, impl=impl), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims(head_dim, dtype, device, poisoned_memory):
    lengths = [70, 1]
    tensors = draw(lengths, 2, 2, head_dim, dtype, device)
    check(run(tensors, lengths, impl="triton"), reference(*tensors, lengths))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (3, 3), (20, 1)])
def test_grouped_heads(heads, kv_heads, impl, device):
    tensors = draw([40, 33], heads, kv_heads, 32, device=device)
    check(run(tensors, [40, 33], impl=impl), reference(*tensors, [40, 33]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("causal", [True, False])
def test_is_a_row_of_attention_varlen(causal, impl, device):
    lengths = [30, 1, 75]
    generator = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(106, 2, 32, generator=generator).to(device) for _ in range(3))
    everything = attention_varlen(q, k, v, ragged(lengths, device), 75, causal=causal, impl=impl)
    positions = [4, 0, 74]
    rows = (ragged(lengths)[:-1] + torch.tensor(positions)).to(device)
    out = run((q[rows], k, v), lengths, positions if causal else None, impl=impl)
    torch.testing.assert_close(out, everything[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_a_poisoned_parent(impl, device):
    q, k, v = draw([50, 20], 2, 1, 32, device=device)
    parent = torch.full((80, 5, 40), float("nan"), device=device)
    parent[5:75, 1:2, 3:35], parent[5:75, 3:4, 3:35] = k, v
    queries = torch.full((6, 4, 40), float("nan"), device=device)
    queries[1:5:2, ::2, 3:35] = q
    views = queries[1:5:2, ::2, 3:35], parent[5:75, 1:2, 3:35], parent[5:75, 3:4, 3:35]
    check(run(views, [50, 20], impl=impl), reference(q, k, v, [50, 20]))


def test_nan_stays_in_its_sequence(device):
    lengths = [70, 20, 600]
    q, k, v = draw(lengths, 2, 1, 32, device=device)
    for x in (q[1], k[70:90], v[70:90]):
        x[...] = float("nan")
    is_nan = torch.isnan(run((q, k, v), lengths, impl="triton"))
    assert is_nan[1].all() and not is_nan[0].any() and not is_nan[2].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_scores_large_logits_and_scale(impl, device):
    q, k, v = draw([600], 2, 1, 32, device=device)
    mean = run((q, k[:1].expand(600, -1, -1), v), [600], impl=impl)
    torch.testing.assert_close(mean, v.mean(0, keepdim=True).expand(1, 2, 32))
    best = (q[0] @ k[:, 0].T).argmax(1)
    torch.testing.assert_close(run((q, k, v), [600], softmax_scale=1e4, impl=impl)[0], v[best, 0])
    scaled = run((q, k, v), [600], softmax_scale=0.5, impl=impl)
    check(scaled, reference(q, k, v, [600], scale=0.5))


@settings(max_examples=8)
@given(length=st.integers(1, 700), seed=st.integers(0, 99))
def test_order_of_keys_does_not_matter(length, seed):
    q, k, v = draw([length], 1, 1, 32, seed=seed)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    shuffled = run((q, k[order], v[order]), [length], impl="triton")
    torch.testing.assert_close(shuffled, run((q, k, v), [length], impl="triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(dtype, device):
    """A short sequence alone runs the single pass; next to a long one the second kernel runs, too."""
    lengths = [90, SPLIT + 60, 1, SPLIT]
    q, k, v = draw(lengths, 2, 1, 32, dtype, device)
    together = run((q, k, v), lengths, impl="triton")
    begins = ragged(lengths).tolist()
    for i, length in enumerate(lengths):
        keys = slice(begins[i], begins[i] + length)
        alone = q[i : i + 1], k[keys], v[keys]
        for max_seqlen in (length, 4 * SPLIT):
            out = run(alone, [length], max_seqlen=max_seqlen, impl="triton")
            assert torch.equal(out[0], together[i])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 3, 0]], ids=str)
def test_no_keys_give_zeros(lengths, impl, device, poisoned_memory):
    tensors = draw(lengths, 2, 1, 32, device=device)
    check(run(tensors, lengths, impl=impl), reference(*tensors, lengths))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("positions", [None, [1, 4]])
def test_opcheck(positions, impl, device):
    q, k, v = draw([4, 5], 2, 1, 32, device=device)
    if positions is not None:
        positions = torch.tensor(positions, dtype=torch.int32, device=device)
    arguments = (q, k, v, ragged([4, 5], device), 5, 0.2, positions, impl)
    torch.library.opcheck(torch.ops.jv5kernels.attention_pooled.default, arguments)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(attention_pooled, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([4, 5], [7]):
        arguments = (*draw(lengths, 2, 1, 32), ragged(lengths), max(lengths))
        torch.testing.assert_close(compiled(*arguments), attention_pooled(*arguments))


def test_docstring_example():
    q, kv = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]], [[3.0, 5.0]]])
    out = attention_pooled(q, kv, kv, torch.tensor([0, 2], dtype=torch.int32), 2)
    torch.testing.assert_close(out, torch.tensor([[[2.0, 4.0]]]))


def test_errors_name_the_argument():
    q, k, v = draw([5], 4, 2, 32)
    cu_seqlens = ragged([5])
    with pytest.raises(ValueError, match=r"q must have shape \(1, \*, \*\), not \(2, 4, 32\)"):
        attention_pooled(torch.cat([q, q]), k, v, cu_seqlens, 5)
    with pytest.raises(TypeError, match="query_positions has dtype int64"):
        attention_pooled(q, k, v, cu_seqlens, 5, query_positions=torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"query_positions must have shape \(1\)"):
        attention_pooled(q, k, v, cu_seqlens, 5, query_positions=torch.zeros(2).int())
    with pytest.raises(ValueError, match="impl='sdpa' is no implementation of attention_pooled"):
        attention_pooled(q, k, v, cu_seqlens, 5, impl="sdpa")
    with pytest.raises(ValueError, match="triton: the kernel takes head_dim"):
        attention_pooled(*draw([5], 2, 1, 40), cu_seqlens, 5, impl="triton")


def sm90_cases(dtype, size, head_dim):
    from jv5kernels.kernels.attention_pooled import CONFIGS

    keys, num_warps, num_stages = CONFIGS[size, head_dim]
    module = "jv5kernels.kernels.attention_pooled"
    partial = {f"partial_{x}": "*fp32" for x in ("out", "max", "sum")}
    positions = {"cu_seqlens": "*i32", "query_positions": "*i32"}
    strides = [f"stride_{x}" for x in ("qb", "qh", "kt", "kh", "vt", "vh")]
    integers = dict.fromkeys([*strides, "B", "steps"], "i32")
    shared = {"D": head_dim, "SPLIT": SPLIT, "HAS_POSITIONS": True}
    split = Case(
        module,
        "attention_pooled_kernel",
        {x: f"*{dtype}" for x in ("q", "k", "v", "out")}
        | partial
        | positions
        | integers
        | {"scale": "fp32"},
        shared | {"HKV": 8, "GROUP": 2, "BG": 16, "BN": keys},
        num_warps=num_warps,
        num_stages=num_stages,
        divisible=tuple(strides),
    )
    combine = Case(
        module,
        "combine_splits_kernel",
        {"out": f"*{dtype}"} | partial | positions,
        shared | {"HQ": 16, "BS": 16},
    )
    return [split, combine]


def test_compiles_for_sm90():
    narrow, wide = sm90_cases("bf16", 2, 64), sm90_cases("bf16", 2, 128)
    cases = [*wide, narrow[0], sm90_cases("bf16", 2, 256)[0], sm90_cases("fp32", 4, 256)[0]]
    for report in compile_for_sm90(cases):
        report.check()
