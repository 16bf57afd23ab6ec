"""attention_varlen and attention_pooled at real sizes on the GPU: error against cuDNN's, bits, compilations."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import pytest
import torch
from conftest import ragged

from jv5kernels.ops import attention_pooled, attention_varlen

pytestmark = pytest.mark.gpu
TOKENS = 32768
# query heads, kv heads, head_dim, causal
SHAPES = {"small": (16, 8, 128, True), "nano": (12, 12, 64, False)}
OURS = ("gluon", "triton")


@lru_cache
def log_normal_lengths(tokens=TOKENS):
    """A batch as real text gives it: median 180 tokens, longest first, no multiples of a tile."""
    draw = random.Random(0)
    lengths = []
    while sum(lengths) < tokens - 8192:
        lengths.append(min(8192, max(1, round(draw.lognormvariate(math.log(180), 1.2)))))
    return sorted([*lengths, tokens - sum(lengths)], reverse=True)


BATCHES = {
    "1x32768": [TOKENS],
    "4x8192": [8192] * 4,
    "64x512": [512] * 64,
    "log-normal": log_normal_lengths(),
}


def draw(tokens, shape, seed=0, dtype=torch.bfloat16):
    heads, kv_heads, head_dim, _ = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(seed)
    width = (heads + 2 * kv_heads) * head_dim
    fused = torch.randn(tokens, width, generator=generator, device="cuda").to(dtype)
    return fused.unflatten(1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 1)


def run(tensors, lengths, shape, impl="triton"):
    cu_seqlens = ragged(lengths, "cuda")
    return attention_varlen(*tensors, cu_seqlens, max(lengths), causal=SHAPES[shape][3], impl=impl)


def reference_rows(tensors, lengths, causal, rows):
    """float64 attention of chosen rows over all their keys."""
    q, k, v = tensors
    ends = torch.tensor(lengths).cumsum(0)
    out = []
    for row in rows:
        i = int(torch.searchsorted(ends, row, right=True))
        begin = int(ends[i]) - lengths[i]
        keys = slice(begin, row + 1 if causal else int(ends[i]))
        group = q.shape[1] // k.shape[1]
        query = q[row].double().unflatten(0, (-1, group))  # [HKV, GROUP, D]
        scores = torch.einsum("hgd,nhd->hgn", query, k[keys].double()) * q.shape[2] ** -0.5
        attended = torch.einsum("hgn,nhd->hgd", torch.softmax(scores, 2), v[keys].double())
        out.append(attended.flatten(0, 1))
    return torch.stack(out)


def sampled_rows(lengths, count=48):
    draw = random.Random(1)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    edges = {0, ends[0] - 1, ends[-1] - 1, ends[len(ends) // 2] - 1}
    return sorted(edges | {draw.randrange(ends[-1]) for _ in range(count)})


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_error_is_that_of_sdpa(batch, shape, impl, poisoned_memory):
    lengths, tensors = BATCHES[batch], draw(TOKENS, shape)
    rows = sampled_rows(lengths)
    expected = reference_rows(tensors, lengths, SHAPES[shape][3], rows)
    ours = relative_error(run(tensors, lengths, shape, impl)[rows], expected)
    theirs = relative_error(run(tensors, lengths, shape, "sdpa")[rows], expected)
    assert ours <= 1.1 * theirs, f"ours {ours:.2e}, SDPA {theirs:.2e}"


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_row_is_left_out(shape, impl, poisoned_memory):
    """Every row, not a sample, against SDPA: both err by less than a bf16 step of the largest values."""
    lengths = BATCHES["log-normal"]
    tensors = draw(TOKENS, shape, seed=2)
    out, sdpa = (run(tensors, lengths, shape, name).float() for name in (impl, "sdpa"))
    torch.testing.assert_close(out, sdpa, rtol=1.6e-2, atol=1.6e-2)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 130, 1500])
def test_bits_do_not_depend_on_the_batch(length, shape, impl):
    others = [2, 700, 64, 1, 2048, 333]
    alone = draw(length, shape, seed=3)
    expected = run(alone, [length], shape, impl)
    for count in (1, 6, 63):
        for place in (0, count // 2, count):
            lengths = [others[i % 6] for i in range(count)]
            before, after = sum(lengths[:place]), sum(lengths[place:])
            parts = zip(draw(before, shape, 4), alone, draw(after, shape, 5), strict=True)
            tensors = [torch.cat(part) for part in parts]
            out = run(tensors, [*lengths[:place], length, *lengths[place:]], shape, impl)
            assert torch.equal(out[before : before + length], expected)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_repeat_bit_for_bit(shape, impl):
    lengths, tensors = BATCHES["log-normal"], draw(TOKENS, shape)
    first = run(tensors, lengths, shape, impl)
    assert all(torch.equal(run(tensors, lengths, shape, impl), first) for _ in range(20))


@pytest.mark.parametrize("shape", SHAPES)
def test_calls_on_several_streams_and_in_graphs_at_once(shape):
    """Each has a counter of row tiles of its own, which every call leaves at zero."""
    lengths, tensors = BATCHES["log-normal"], draw(TOKENS, shape)
    cu_seqlens = ragged(lengths, "cuda")

    def call():
        return attention_varlen(
            *tensors, cu_seqlens, max(lengths), causal=SHAPES[shape][3], impl="gluon"
        )

    expected = call()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams[0]):
        recorded = call()
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(call())
        with torch.cuda.stream(streams[-1]):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in (*found, recorded))


@pytest.mark.parametrize("made_ahead", [True, False])
def test_a_graph_of_more_than_one_call(made_ahead, monkeypatch):
    """Every captured call has a counter that no fill in the graph has to clear, until those made ahead are used up."""
    from jv5kernels.kernels import attention_sm90

    lengths, tensors = BATCHES["log-normal"], draw(TOKENS, "small")
    expected = run(tensors, lengths, "small", "gluon")
    device = tensors[0].device
    if not made_ahead:
        monkeypatch.setitem(attention_sm90._COUNTERS_OF_GRAPHS, device, iter(()))
    fills, counters = [], []
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: fills.append(a) or real(*a, **k))
    made = attention_sm90.tile_counter
    monkeypatch.setattr(
        attention_sm90, "tile_counter", lambda d: counters.append(made(d)) or counters[-1]
    )
    cu_seqlens = ragged(lengths, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = [
            attention_varlen(*tensors, cu_seqlens, max(lengths), causal=True, impl="gluon")
            for _ in range(3)
        ]
    assert len(fills) == (0 if made_ahead else 3)
    assert len({c.data_ptr() for c in counters}) == 3
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in recorded)
    assert all(c[0] == 0 for c in counters)


@pytest.mark.parametrize("impl", OURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_kernel_for_all_lengths(shape, impl, monkeypatch):
    import triton

    compiled = []
    run(draw(300, shape), [300], shape, impl)
    hook = lambda *_, **fields: compiled.append(fields["repr"])  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    for lengths in ([1], [16], [17, 3], [4096], [512] * 16, [1] * 33, [2, 0, 1000, 5]):
        tensors = draw(sum(lengths), shape)
        run(tensors, lengths, shape, impl)
    assert compiled == []


def pooled(tensors, lengths, causal_rows=None):
    q, k, v = tensors
    return attention_pooled(
        q, k, v, ragged(lengths, "cuda"), max(lengths), query_positions=causal_rows, impl="triton"
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_pooled_is_the_last_row(batch, shape, poisoned_memory):
    lengths = BATCHES[batch]
    q, k, v = draw(TOKENS, shape)
    rows = (ragged(lengths)[1:] - 1).tolist()
    picked = rows[:: max(1, len(rows) // 24)]
    out = pooled((q[rows], k, v), lengths)[:: max(1, len(rows) // 24)]
    expected = reference_rows((q, k, v), lengths, SHAPES[shape][3], picked)
    assert relative_error(out, expected) <= 4e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_pooled_bits_do_not_depend_on_the_batch(shape):
    lengths = [3000, 5, 512, 513, 1]
    q, k, v = draw(sum(lengths), shape)
    rows = (ragged(lengths)[1:] - 1).tolist()
    together = pooled((q[rows], k, v), lengths)
    begins = ragged(lengths).tolist()
    for i, length in enumerate(lengths):
        keys = slice(begins[i], begins[i] + length)
        alone = pooled((q[rows[i] : rows[i] + 1], k[keys], v[keys]), [length])
        assert torch.equal(alone[0], together[i])
    assert all(torch.equal(pooled((q[rows], k, v), lengths), together) for _ in range(20))
