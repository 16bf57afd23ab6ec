"""attention_varlen against float64, on the CPU (interpreter) and on the GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import Case, compile_for_sm90

from jv5kernels.ops import attention_varlen
from jv5kernels.ops.attention import KERNEL_HEAD_DIMS, Run, runs_of_equal_length

# One rounding of the output (the interpreter truncates: one unit in the last place), and of the probabilities
# before they meet the values: a share of the largest value, hence the absolute part.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3},
}
RMS_RATIO = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = list(TOLERANCE)
IMPLS = ["triton", "torch"]
RAGGED = [[1, 2, 63, 0, 64, 65], [127, 129], [300]]
CPU = torch.device("cpu")
# Triton 3.9 keeps eight registers of head_dim 64, bidirectional, on the stack; Triton 3.6 none.
STACK_BYTES = 32


def reference(q, k, v, lengths, *, causal, scale=None):
    """Sequence by sequence and head by head in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        for head in range(q.shape[1]):
            scores = q[rows, head] @ k[rows, head // group].T * scale
            if causal:
                future = torch.ones_like(scores, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            out[rows, head] = torch.softmax(scores, 1) @ v[rows, head // group]
        begin += length
    return out


def draw(tokens, heads, kv_heads, head_dim, dtype=torch.float32, device=CPU, seed=0):
    """q, k and v as views of one fused projection."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator)
    return split(fused.to(dtype).to(device), heads, kv_heads, head_dim)


def split(fused, heads, kv_heads, head_dim):
    return fused.unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 1)


def run(tensors, lengths, **arguments):
    q, k, v = tensors
    cu_seqlens = ragged(lengths, q.device)
    return attention_varlen(q, k, v, cu_seqlens, max(lengths, default=0), **arguments)


def check(out, expected):
    dtype = out.dtype
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    ratio = (out.double() - expected).norm() / expected.norm()
    assert ratio <= RMS_RATIO[dtype], f"RMS error {ratio:.2e}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
def test_matches_float64(lengths, causal, dtype, impl, device, poisoned_memory):
    tensors = draw(sum(lengths), 2, 1, 32, dtype, device)
    out = run(tensors, lengths, causal=causal, impl=impl)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == tensors[0].shape
    check(out, reference(*tensors, lengths, causal=causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims(head_dim, dtype, device, poisoned_memory):
    lengths = [1, 66]
    tensors = draw(sum(lengths), 1, 1, head_dim, dtype, device)
    for causal in (True, False):
        out = run(tensors, lengths, causal=causal, impl="triton")
        check(out, reference(*tensors, lengths, causal=causal))


@pytest.mark.parametrize("impl", [*IMPLS, "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads, impl, device):
    lengths = [40, 33]
    tensors = draw(sum(lengths), 4, kv_heads, 32, device=device)
    check(run(tensors, lengths, causal=True, impl=impl), reference(*tensors, lengths, causal=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_reference_is_exact(impl, device):
    if impl == "triton":
        with pytest.raises(ValueError, match="triton: the kernel takes float32, float16 and bf"):
            run(draw(3, 1, 1, 32, torch.float64, device), [3], causal=True, impl=impl)
        return
    tensors = draw(70, 2, 1, 24, torch.float64, device)
    out = run(tensors, [30, 40], causal=True, impl=impl)
    torch.testing.assert_close(out, reference(*tensors, [30, 40], causal=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_a_poisoned_parent(dtype, impl, device):
    """bfloat16 goes through TMA descriptors, float32 through pointers."""
    parent = torch.full((80, 8 * 32), float("nan"), dtype=dtype, device=device)
    inside = torch.cat([x.flatten(1) for x in draw(70, 2, 1, 32, dtype, device)], 1)
    parent[5:75, 64:192] = inside
    views = split(parent[5:75, 64:192], 2, 1, 32)
    expected = reference(*split(inside, 2, 1, 32), [69, 1], causal=False)
    check(run(views, [69, 1], causal=False, impl=impl), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_any_stride_and_alignment(causal, dtype, device):
    """Heads that are not neighbours and rows off the 16-byte grid: descriptors do not fit, pointers do."""
    base = draw(50, 4, 2, 32, dtype, device)
    spread = [torch.full((50, 2 * x.shape[1], 37), 7.0, dtype=dtype, device=device) for x in base]
    views = [x[:, ::2, 3:35] for x in spread]
    for view, x in zip(views, base, strict=True):
        view.copy_(x)
    out = run(views, [50], causal=causal, impl="triton")
    check(out, reference(*base, [50], causal=causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_stays_in_its_sequence(causal, dtype, device):
    tensors = draw(90, 2, 1, 32, dtype, device)
    for x in tensors:
        x[40:60] = float("nan")
    out = run(tensors, [40, 20, 30], causal=causal, impl="triton")
    assert torch.isnan(out[40:60]).all()
    assert not torch.isnan(out[:40]).any() and not torch.isnan(out[60:]).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_scores_give_the_mean_of_the_values(impl, device):
    q, k, v = draw(130, 2, 2, 32, device=device)
    k = k[:1].expand(130, -1, -1)
    out = run((q, k, v), [130], causal=True, impl=impl)
    count = torch.arange(1, 131, device=device)[:, None, None]
    torch.testing.assert_close(out, v.cumsum(0) / count, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_pick_the_best_key(dtype, impl, device):
    q, k, v = draw(65, 1, 1, 32, dtype, device)
    out = run((q, k, v), [65], causal=False, softmax_scale=1e4, impl=impl)
    best = (q[:, 0].double() @ k[:, 0].double().T).argmax(1)
    torch.testing.assert_close(out, v[best], **TOLERANCE[dtype])


@pytest.mark.parametrize("impl", IMPLS)
def test_softmax_scale(impl, device):
    tensors = draw(30, 2, 1, 32, device=device)
    out = run(tensors, [30], causal=True, softmax_scale=0.5, impl=impl)
    check(out, reference(*tensors, [30], causal=True, scale=0.5))


@pytest.mark.parametrize("impl", IMPLS)
def test_order_of_keys_does_not_matter(impl, device):
    q, k, v = draw(150, 2, 1, 32, device=device)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1)).to(device)
    shuffled = run((q, k[order], v[order]), [150], causal=False, impl=impl)
    expected = run((q, k, v), [150], causal=False, impl=impl)
    torch.testing.assert_close(shuffled, expected, rtol=1e-5, atol=1e-5)


def slices(tensors, rows):
    return [x[rows] for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_bits_do_not_depend_on_the_batch(causal, dtype, device):
    lengths = [3, 140, 1, 90]
    tensors = draw(sum(lengths), 2, 1, 32, dtype, device)
    together = run(tensors, lengths, causal=causal, impl="triton").split(lengths)
    begins = ragged(lengths).tolist()
    for i, length in enumerate(lengths):
        alone = slices(tensors, slice(begins[i], begins[i] + length))
        assert torch.equal(run(alone, [length], causal=causal, impl="triton"), together[i])
    order = [2, 3, 0, 1]
    rows = torch.cat([torch.arange(begins[i], begins[i + 1]) for i in order]).to(device)
    permuted = [lengths[i] for i in order]
    out = run(slices(tensors, rows), permuted, causal=causal, impl="triton").split(permuted)
    assert all(torch.equal(out[place], together[i]) for place, i in enumerate(order))


@settings(max_examples=8)
@given(
    first=st.lists(st.integers(0, 40), max_size=3),
    second=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_joined_batches_equal_separate_ones(first, second, seed):
    tensors = draw(sum(first) + sum(second), 1, 1, 32, seed=seed)
    head, tail = (slices(tensors, slice(*r)) for r in ((0, sum(first)), (sum(first), None)))
    apart = [
        run(x, lengths, causal=True, impl="triton")
        for x, lengths in ((head, first), (tail, second))
    ]
    together = run(tensors, first + second, causal=True, impl="triton")
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 5, 0]], ids=str)
def test_no_rows(lengths, impl, device, poisoned_memory):
    tensors = draw(sum(lengths), 2, 1, 32, device=device)
    out = run(tensors, lengths, causal=True, impl=impl)
    torch.testing.assert_close(
        out.double(), reference(*tensors, lengths, causal=True), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("config", [(128, 64, 4, 2, True), (64, 32, 4, 2, True)])
@pytest.mark.parametrize("causal", [True, False])
def test_other_launch_configurations(causal, config):
    """The descriptor variants in the interpreter, with a batch that ends in sequences without rows."""
    from jv5kernels.kernels.attention import Config, launch_attention

    lengths = [70, 1, 0]
    q, k, v = draw(71, 2, 1, 32)
    out = torch.full((71, 2, 32), float("nan"))
    launch_attention(q, k, v, ragged(lengths), 70, causal, 0.2, out, Config(*config))
    check(out, reference(q, k, v, lengths, causal=causal, scale=0.2))


def test_runs_of_equal_length():
    runs = list(runs_of_equal_length(ragged([4, 4, 0, 3, 4])))
    assert runs == [
        Run(0, 2, 4, slice(0, 8)),
        Run(3, 1, 3, slice(8, 11)),
        Run(4, 1, 4, slice(11, 15)),
    ]


def test_heads_share_the_cache():
    from jv5kernels.kernels.attention import L2_SHARE, heads_together

    assert heads_together(16, 8, 1, 512) == 16
    assert heads_together(16, 8, L2_SHARE // 512 // 3, 512) == 4  # 2 of the 3 that fit divide 8
    assert heads_together(16, 8, L2_SHARE, 512) == 2
    assert heads_together(12, 12, 0, 256) == 12


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, device):
    q, k, v = draw(9, 2, 1, 32, device=device)
    arguments = (q, k, v, ragged([4, 5], device), 5, True, 0.2, impl)
    torch.library.opcheck(torch.ops.jv5kernels.attention_varlen.default, arguments)


def test_compiles_without_graph_breaks():
    compiled = torch.compile(attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([4, 5], [7]):
        q, k, v = draw(sum(lengths), 2, 1, 32)
        arguments = (q, k, v, ragged(lengths), max(lengths))
        expected = attention_varlen(*arguments, causal=True)
        torch.testing.assert_close(compiled(*arguments, causal=True), expected)


def test_docstring_example():
    x, cu_seqlens = torch.eye(2).reshape(2, 1, 2), torch.tensor([0, 1, 2], dtype=torch.int32)
    out = attention_varlen(x, x, x, cu_seqlens, 1, causal=True)
    torch.testing.assert_close(out.flatten(1), torch.eye(2))


def test_errors_name_the_argument():
    q, k, v = draw(5, 4, 2, 32)
    good = ragged([5])

    def call(q=q, k=k, v=v, cu_seqlens=good, **options):
        return attention_varlen(q, k, v, cu_seqlens, 5, causal=True, **options)

    with pytest.raises(TypeError, match="q has dtype int64"):
        call(q=q.long())
    with pytest.raises(TypeError, match="k has dtype float16: allowed are float32"):
        call(k=k.half())
    with pytest.raises(ValueError, match=r"v must have shape \(5, 2, 32\)"):
        call(v=v[:, :1])
    with pytest.raises(ValueError, match="q has 3 heads, which is no multiple of the 2 heads"):
        call(q=q[:, :3])
    with pytest.raises(ValueError, match=r"k must have shape \(5, \*, 32\)"):
        call(k=k[:4], v=v[:4])
    with pytest.raises(TypeError, match="cu_seqlens has dtype int64: allowed are int32"):
        call(cu_seqlens=good.long())
    with pytest.raises(ValueError, match="cu_seqlens names no sequence, but q has 5 tokens"):
        call(cu_seqlens=good[:1])
    with pytest.raises(ValueError, match="softmax_scale must be positive, not -1"):
        call(softmax_scale=-1.0)
    with pytest.raises(ValueError, match="impl='cuda' is no implementation of attention_varlen"):
        call(impl="cuda")
    with pytest.raises(ValueError, match="flash_attn: needs a CUDA device"):
        call(impl="flash_attn")
    with pytest.raises(ValueError, match="contiguous in its last dimension"):
        call(q=q.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="computes no gradients"):
        call(q=q.clone().requires_grad_())
    odd = draw(5, 4, 2, 48)
    with pytest.raises(ValueError, match="triton: the kernel takes head_dim .32, 64, 128, 256., n"):
        run(odd, [5], causal=True, impl="triton")
    check(run(odd, [5], causal=True), reference(*odd, [5], causal=True))


def sm90_case(head_dim, causal, config, dtype="bf16"):
    pointers = {name: f"*{dtype}" for name in ("q", "k", "v", "out")} | {"cu_seqlens": "*i32"}
    if config.descriptors:
        pointers |= {x: f"tensordesc<{dtype}[1, 1, {config.BN}, {head_dim}]>" for x in "kv"}
    strides = [f"stride_{x}{axis}" for x in "qkv" for axis in "th"]
    integers = [*strides, "slots", "B", "search_steps", "section"]
    return Case(
        "jv5kernels.kernels.attention",
        "attention_kernel",
        pointers | dict.fromkeys(integers, "i32") | {"scale": "fp32"},
        {
            "HQ": 16,
            "GROUP": 2,
            "D": head_dim,
            "BM": config.BM,
            "BN": config.BN,
            "IS_CAUSAL": causal,
            "USE_DESCRIPTORS": config.descriptors,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible=tuple(strides),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_compiles_for_sm90(causal):
    from jv5kernels.kernels.attention import CONFIGS

    shipped = [(dim, causal, CONFIGS["sm_90", 2, dim, causal]) for dim in KERNEL_HEAD_DIMS]
    for report in compile_for_sm90([sm90_case(*case) for case in shipped]):
        assert report.stack <= STACK_BYTES
        replace(report, stack=0).check()
        assert "wgmma.mma_async" in report.ptx
        assert "cp.async.bulk.tensor" in report.ptx


def test_fp32_compiles_for_sm90_without_tf32():
    from jv5kernels.kernels.attention import CONFIGS

    (report,) = compile_for_sm90([sm90_case(64, True, CONFIGS["sm_90", 4, 64, True], "fp32")])
    report.check()
    assert "tf32" not in report.ptx
