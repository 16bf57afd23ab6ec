"""The Gluon kernel for Hopper: its machine code without a GPU, and on one its error, its fallback and its bits."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import ragged
from sm90 import Case, compile_for_sm90, wgmma_loops
from test_attention_gpu import SHAPES, draw, reference_rows, relative_error, run, sampled_rows

from jv5kernels.ops import attention_varlen

# Of cuDNN's error, both against float64.
ERROR_SHARE = 1.1


def sm90_case(head_dim: int, causal: bool) -> Case:
    from jv5kernels.kernels.attention_sm90 import CONFIGS

    config = CONFIGS[head_dim]
    keys = [1, 1, config.BN, head_dim]
    integers = ("slots", "B", "section", "total")
    return Case(
        module="jv5kernels.kernels.attention_sm90",
        kernel="attention_sm90_kernel",
        signature={"cu_seqlens": "*i32", "counter": "*i32", "scale": "fp32"}
        | dict.fromkeys(integers, "i32"),
        constants={
            "GROUP": 2,
            "D": head_dim,
            "BN": config.BN,
            "STAGES": config.STAGES,
            "IS_CAUSAL": causal,
            "EXP_BOUND": config.EXP_BOUND,
        },
        descriptors={
            "q_desc": [64, head_dim],
            "k_desc": keys,
            "v_desc": keys,
            "out_desc": [1, 1, 64, head_dim],
        },
        inspected=True,
    )


def test_machine_code():
    """What the speed rests on and a new compiler could undo unnoticed."""
    cases = [sm90_case(64, causal=False), sm90_case(128, causal=True)]  # as in nano and in small
    for case, report in zip(cases, compile_for_sm90(cases), strict=True):
        report.check()
        report.check_chained()
        assert report.losses == [], "ptxas serialises wgmma or ignores setmaxnreg"
        assert "setmaxnreg" in report.ptx
        static = [body for body in wgmma_loops(report.sass) if not holds(body, "FMNMX")]
        consumers = 3
        assert len(static) == consumers, f"{len(static)} static softmax loops"
        for body in static:
            check_static_loop(body, case.constants["D"], case.constants["BN"])
            if case.constants["EXP_BOUND"]:
                check_spread(body)
                check_sums(body)
        if case.constants["EXP_BOUND"]:
            check_ring_comes_first(report.ptx)


def holds(body: list[str], name: str) -> bool:
    return any(name in instruction for instruction in body)


def check_static_loop(body: list[str], head_dim: int, keys: int) -> None:
    """q·k and p·v issued, one wait for the scores, all exponentials, one wait for the output; nothing spilled."""
    assert not holds(body, "LDL") and not holds(body, "STL")
    limit = 3.5 * keys if head_dim == 128 else 2.25 * keys
    assert len(body) <= limit, f"{len(body)} instructions for {keys} keys"
    products = [i for i, text in enumerate(body) if "HGMMA" in text]
    assert len(products) == head_dim // 16 + keys // 16
    waits = [i for i, text in enumerate(body) if "WARPGROUP.DEPBAR" in text]
    assert sum("TRYWAIT" in text for text in body) == 2, "keys and values are each waited for once"
    exponentials = [i for i, text in enumerate(body) if "MUFU.EX2" in text]
    assert len(waits) == 2 and len(exponentials) == keys // 2
    first, last = waits
    assert max(products) < first < last
    between = [i for i in exponentials if first < i < last]
    assert len(between) == len(exponentials), "exponentials outside the shadow of p·v"


def check_spread(body: list[str]) -> None:
    """The unit for exponentials does not wait for a tile's multiplications: few of them stand together."""
    run = longest = 0
    for instruction in body:
        run = run + 1 if "FFMA" in instruction else run * ("MUFU" not in instruction)
        longest = max(longest, run)
    assert longest <= 16, f"{longest} multiplications without an exponential between"


def check_sums(body: list[str]) -> None:
    """Row sums are a ninth block of columns of p·v, and take no other instruction."""
    sums = [text for text in body if "HGMMA.64x72x16" in text]
    assert len(sums) == 8
    assert not holds(body, "HMMA") and not holds(body, "FADD") and not holds(body, "HADD2")


def check_ring_comes_first(ptx: str) -> None:
    """The product with ones reads its tiles at the distance from where shared memory begins: keys of stage 0."""
    place = re.search(r"bulk\.tensor\.4d\.shared\S*complete_tx::bytes \[(%r\d+)\]", ptx)[1]
    begin = re.search(rf"add\.s32 \t{place}, (%r\d+), %r\d+;", ptx)
    assert begin and f"mov.b32 \t{begin[1]}, global_smem;" in ptx, "another buffer comes first"


def test_refusals_give_reasons():
    x = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gluon: needs a CUDA device"):
        attention_varlen(x, x, x, ragged([4]), 4, causal=True, impl="gluon")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, head_dim", [(torch.float16, 64), (torch.bfloat16, 32)])
def test_refuses_what_it_cannot_compute(dtype, head_dim):
    x = torch.zeros(4, 2, head_dim, dtype=dtype, device="cuda")
    with pytest.raises(ValueError, match="gluon: the kernel takes"):
        attention_varlen(x, x, x, ragged([4], "cuda"), 4, causal=True, impl="gluon")


def point_at_keys(tensors, lengths, causal, rows, factor):
    """Turns chosen queries towards one random key that they see: its score exceeds the others by far."""
    q, k, v = (x.clone() for x in tensors)
    draw_key = torch.Generator().manual_seed(9)
    begins = ragged(lengths).tolist()
    for row in rows:
        i = max(i for i, begin in enumerate(begins[:-1]) if begin <= row)
        end = row + 1 if causal else begins[i + 1]
        key = k[int(torch.randint(begins[i], end, (1,), generator=draw_key))].float()
        key = key.repeat_interleave(q.shape[1] // k.shape[1], 0)
        q[row] = (key / key.norm(dim=1, keepdim=True) * q.shape[2] ** 0.5 * factor).to(q.dtype)
    return q, k, v


@pytest.mark.gpu
@pytest.mark.parametrize(
    "factor", [2, 3, 8, 60], ids=["most", "dominated", "far apart", "beyond float32"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_one_key_dominates(shape, factor, poisoned_memory):
    """As exact as cuDNN; with the larger factors some tiles must take the online softmax to stay finite."""
    lengths = [2048] * 16
    causal = SHAPES[shape][3]
    rows = sampled_rows(lengths)
    tensors = point_at_keys(draw(sum(lengths), shape), lengths, causal, rows, factor)
    expected = reference_rows(tensors, lengths, causal, rows)
    ours, theirs = (
        relative_error(run(tensors, lengths, shape, impl)[rows], expected)
        for impl in ("gluon", "sdpa")
    )
    assert ours <= ERROR_SHARE * theirs + 1e-6, f"ours {ours:.2e}, cuDNN {theirs:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("length", [64, 512, 2048])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_random_rows(shape, length, poisoned_memory):
    lengths = [length] * (16384 // length)
    rows = sampled_rows(lengths, 192)
    tensors = draw(sum(lengths), shape)
    expected = reference_rows(tensors, lengths, SHAPES[shape][3], rows)
    ours, theirs = (
        relative_error(run(tensors, lengths, shape, impl)[rows], expected)
        for impl in ("gluon", "sdpa")
    )
    assert ours <= ERROR_SHARE * theirs, f"ours {ours:.2e}, cuDNN {theirs:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_all_tiles_online(shape):
    """Every row needs the online softmax: every tile of every program is done twice."""
    lengths = [700, 1, 65, 2048, 130]
    causal = SHAPES[shape][3]
    tensors = draw(sum(lengths), shape)
    tensors = point_at_keys(tensors, lengths, causal, range(sum(lengths)), 60)
    rows = sampled_rows(lengths)
    out = run(tensors, lengths, shape, "gluon")
    assert out.isfinite().all()
    expected = reference_rows(tensors, lengths, causal, rows)
    assert relative_error(out[rows], expected) <= 1e-3
    assert all(torch.equal(run(tensors, lengths, shape, "gluon"), out) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_not_a_number_stays_in_its_sequence(shape):
    lengths = [200, 193, 64, 500]
    q, k, v = draw(sum(lengths), shape)
    expected = run((q, k, v), lengths, shape, "gluon")
    second = slice(200, 393)
    for x in (q, k, v):
        x[second] = float("nan")
    out = run((q, k, v), lengths, shape, "gluon")
    assert out[second].isnan().all()
    for rows in (slice(0, 200), slice(393, None)):
        assert torch.equal(out[rows], expected[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_minus_infinity_and_large_values(shape):
    lengths = [300]
    causal = SHAPES[shape][3]
    q, k, v = draw(300, shape)
    v *= 2.0**60
    rows = list(range(0, 300, 7))
    expected = reference_rows((q, k, v), lengths, causal, rows)
    assert relative_error(run((q, k, v), lengths, shape, "gluon")[rows], expected) <= 4e-3
