"""The softmax passes of attention on Hopper: what one consumer warpgroup does with the key tiles after the first.

A pass walks over n - 1 key tiles. It is given, and gives back, the weights p of the tile before, the output and the
row sums without them (their product with values is still to come, and so is their sum, by that product or by lanes
while the next scores are computed), and the place in the ring of key and value tiles.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from jv5kernels.kernels.attention_sm90_ptx import (
    issue_output_and_sums,
    output_and_sums,
    spread_exponentials,
)
from jv5kernels.kernels.hopper import advance, left_and_right

ROWS = gl.constexpr(64)  # of one consumer, the height of a wgmma


@gluon.jit
def issue_scores(b_q, b_k, D: gl.constexpr, BN: gl.constexpr):
    """q · kᵀ, in flight: [64, BN]."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    b_zero = gl.zeros([ROWS, BN], gl.float32, s_layout)
    return warpgroup_mma(
        b_q, b_k.reshape([BN, D]).permute((1, 0)), b_zero, use_acc=False, is_async=True
    )


@gluon.jit
def exponentials(b_s, scale, b_offset, n, EXP_BOUND: gl.constexpr):
    """2^(score · scale - offset), [64, BN] fp32; n > 0."""
    if EXP_BOUND:
        return spread_exponentials(b_s, scale, b_offset, n)
    else:
        return gl.exp2(b_s * scale - b_offset[:, None])


@gluon.jit
def weights(b_e, D: gl.constexpr, dtype: gl.constexpr, EXP_BOUND: gl.constexpr):
    """The exponentials rounded to bf16, as the left operand of the product with v."""
    b_p = b_e.to(dtype)
    if EXP_BOUND:
        return b_p
    else:
        o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
        p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
        return gl.convert_layout(b_p, p_layout, assert_trivial=True)


@gluon.jit
def no_output(D: gl.constexpr, EXP_BOUND: gl.constexpr):
    """Zeros to which issue_output can add: [64, D], or [64, 2 * D] where the row sums are among them."""
    WIDTH: gl.constexpr = 2 * D if EXP_BOUND else D
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    return gl.zeros([ROWS, WIDTH], gl.float32, layout)


@gluon.jit
def issue_output(
    b_p, kv_smem, stage, b_out,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, EXP_BOUND: gl.constexpr,
):  # fmt: skip
    """b_out + p · v, in flight."""
    if EXP_BOUND:
        return issue_output_and_sums(b_p, stage, b_out, D, STAGES)
    else:
        b_v = kv_smem.index(STAGES + stage).reshape([BN, D])
        return warpgroup_mma(b_p, b_v, b_out, is_async=True)


@gluon.jit
def fold(b):
    """[64, 2 * N] bf16 -> [64, N]: columns c and c + N added, two sums an instruction."""
    b_left, b_right = left_and_right(b)
    add: gl.constexpr = "add.rn.bf16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(add, "=r,r,r", [b_left, b_right], gl.bfloat16, True, 2)


@gluon.jit
def lane_sums(b_p):
    """[64, BN] bf16 -> [64, 4] fp32: what each lane of a quad holds of a row, without a shuffle."""
    b_p = fold(fold(b_p))
    COLUMNS: gl.constexpr = b_p.shape[1]
    # Both halves of a register with an instruction each; the compiler takes two.
    unpack: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    b = gl.inline_asm_elementwise(unpack, "=r,=r,r", [b_p], gl.float32, True, 2)
    return gl.sum(gl.sum(gl.reshape(b, [ROWS, COLUMNS // 8, 4, 2]), 3), 1)


@gluon.jit
def no_sums(b_p):
    """Zeros to which add_weights can add; where it adds nothing, they stay zero and take no registers."""
    return gl.zeros_like(lane_sums(b_p))


@gluon.jit
def add_weights(b_sum, b_p, EXP_BOUND: gl.constexpr):
    """b_sum plus what lanes have of the weights of a key tile, if the product with v does not sum them."""
    return b_sum if EXP_BOUND else b_sum + lane_sums(b_p)


@gluon.jit
def finish(b_out, b_sum, D: gl.constexpr, EXP_BOUND: gl.constexpr):
    """The output [64, D] before it is divided, and the row sums [64] to divide it by."""
    if EXP_BOUND:
        return output_and_sums(b_out, D)
    else:
        return b_out, gl.sum(b_sum, 1)


@gluon.jit
def static_pass(
    keys, state, n, scale, b_offset,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, EXP_BOUND: gl.constexpr,
):  # fmt: skip
    """p = 2^(score - offset) under the offset of the first tile; the exponentials run beside p·v of the tile before."""
    b_q, kv_smem, k_bars, v_bars = keys
    b_p, b_out, b_sum, stage, phase = state
    if n > 1:
        k_stage, k_phase = advance(stage, phase, STAGES)
        mbarrier.wait(k_bars[0].index(k_stage), k_phase)
    for i in range(n - 1):
        v_stage = stage
        v_phase = phase
        stage, phase = advance(stage, phase, STAGES)
        b_s = issue_scores(b_q, kv_smem.index(stage), D, BN)
        b_sum = add_weights(b_sum, b_p, EXP_BOUND)
        mbarrier.wait(v_bars[0].index(v_stage), v_phase)
        b_out = issue_output(b_p, kv_smem, v_stage, b_out, D, BN, STAGES, EXP_BOUND)
        b_s = warpgroup_mma_wait(1, [b_s])
        mbarrier.arrive(k_bars[1].index(stage))
        b_e = exponentials(b_s, scale, b_offset, n, EXP_BOUND)
        # For the next step, and it keeps ptxas from moving the next wait above the exponentials.
        k_stage, k_phase = advance(stage, phase, STAGES)
        mbarrier.wait(k_bars[0].index(k_stage), k_phase, pred=i < n - 2)
        b_out, b_p = warpgroup_mma_wait(0, [b_out, b_p])
        mbarrier.arrive(v_bars[1].index(v_stage))
        b_p = weights(b_e, D, b_p.dtype, EXP_BOUND)
    return b_p, b_out, b_sum, stage, phase


@gluon.jit
def online_pass(
    keys, state, n, scale, b_offset,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, EXP_BOUND: gl.constexpr,
):  # fmt: skip
    """The same with a running maximum as offset: for rows whose scores lie too far apart. Rare, so plain."""
    b_q, kv_smem, k_bars, v_bars = keys
    b_p, b_out, b_sum, stage, phase = state
    o_rows: gl.constexpr = gl.SliceLayout(1, b_out.type.layout)
    l_rows: gl.constexpr = gl.SliceLayout(1, b_sum.type.layout)
    for _ in range(n - 1):
        b_sum = add_weights(b_sum, b_p, EXP_BOUND)
        mbarrier.wait(v_bars[0].index(stage), phase)
        b_out = issue_output(b_p, kv_smem, stage, b_out, D, BN, STAGES, EXP_BOUND)
        b_out, b_p = warpgroup_mma_wait(0, [b_out, b_p])
        mbarrier.arrive(v_bars[1].index(stage))
        stage, phase = advance(stage, phase, STAGES)
        mbarrier.wait(k_bars[0].index(stage), phase)
        b_s = warpgroup_mma_wait(0, [issue_scores(b_q, kv_smem.index(stage), D, BN)])
        mbarrier.arrive(k_bars[1].index(stage))
        b_new = gl.maximum(b_offset, gl.max(b_s, 1) * scale)
        b_decay = gl.exp2(b_offset - b_new)
        b_offset = b_new
        b_e = exponentials(b_s, scale, b_offset, n, EXP_BOUND)
        b_p = weights(b_e, D, b_p.dtype, EXP_BOUND)
        b_sum = b_sum * gl.convert_layout(b_decay, l_rows)[:, None]
        b_out = b_out * gl.convert_layout(b_decay, o_rows)[:, None]
    return b_p, b_out, b_sum, stage, phase
