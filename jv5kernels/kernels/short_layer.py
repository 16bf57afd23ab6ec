"""The two kernels of a layer over a few tokens, where launches and the reading of weights are all there is.

`short_linear_kernel`, for up to 64 rows, streams the weight once through as many programs as keep the memory busy:

    total = x (+ y)                                                           with HAS_NORM, fp32
    out   = rsqrt(mean(total²) + eps) · (total ⊙ norm_weight) · Wᵀ            x · Wᵀ without
    out   = silu(gate) · up                                                   with IS_SWIGLU

The row's factor is taken out of the product, so one pass over K finds both. Every program adds and squares the few rows
for itself (they come from the L2 cache), which costs less than a kernel of its own; the first one stores the total.

With IS_CHAINED (programmatic dependent launch, sm_90 and later) the next kernel starts while this one runs: its
programs have their part of the weight fetched into the L2 cache, which depends on nothing, and then wait until this one
is done. So memory is read without a pause from layer to layer.

`short_attention_kernel` takes one head of one sequence: norm and rotation of q and k, scores, softmax and the product
with v in registers. Positions are the rows' places in their sequence.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = 1.4426950408889634
MAX_ROWS = 64
# (with a norm, rows of a tile) -> (columns of K a step, stages): as much of the weight in flight as the registers of
# the norm's arithmetic and the shared memory leave room for.
STEPS = {
    (True, 16): (256, 4),
    (True, 32): (64, 5),
    (True, 64): (64, 4),
    (False, 16): (256, 6),
    (False, 32): (128, 8),
    (False, 64): (128, 6),
}
LINEAR_WARPS = {16: 4, 32: 4, 64: 8}
ATTENTION_WARPS = 4


@triton.jit
def dot(a, b, out):
    """out + a · b in fp32."""
    if INTERPRET:  # the interpreter multiplies bf16 bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, out, input_precision="ieee")


@triton.jit
def wait_for_the_kernel_before():
    """Everything behind this sees the results of the kernel before; the kernel after may start, up to this point."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def fetch_into_l2(p_row, K: tl.constexpr, LINES: tl.constexpr):
    """Asks for all of some rows of K values of 2 bytes; p_row [BN, 1] points to their first ones."""
    o_line = tl.minimum(
        tl.arange(0, LINES) * 64, K - 1
    )  # 128 bytes; the last one may be asked for again
    address = (p_row + o_line[None, :]).to(tl.int64)  # [BN, LINES]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [address],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["T"])
def short_linear_kernel(
    x,  # [T, K], fp32 with HAS_NORM
    y,  # [T, K] or None
    norm_weight,  # [K] or None
    weight,  # [N, K]; with IS_SWIGLU [2 * N, K], gate and then up
    out,  # [T, N]
    total,  # [T, K] fp32 or None
    T,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_Y: tl.constexpr,
    IS_SWIGLU: tl.constexpr,
    IS_CHAINED: tl.constexpr,
    LINES: tl.constexpr,
):
    i_n = tl.program_id(0)
    o_m = tl.arange(0, BM)[:, None]  # [BM, 1]
    o_n = i_n * BN + tl.arange(0, BN)  # [BN]
    o_k = tl.arange(0, BK)  # [BK]
    m_m = o_m < T
    m_total = o_m < tl.where(i_n == 0, T, 0)
    o_x = o_m * K + o_k[None, :]  # [BM, BK]
    p_row = weight + o_n[:, None] * K  # [BN, 1]
    if IS_CHAINED:
        fetch_into_l2(p_row, K, LINES)
        if IS_SWIGLU:
            fetch_into_l2(p_row + N * K, K, LINES)
        wait_for_the_kernel_before()
    p_weight = p_row + o_k[None, :]  # [BN, BK]
    b_out = tl.zeros([BM, BN], tl.float32)
    b_up = tl.zeros([BM, BN], tl.float32)
    b_square = tl.zeros([BM], tl.float32)
    for i_k in range(0, K, BK):
        b_weight = tl.load(p_weight + i_k)
        b_x = tl.load(x + o_x + i_k, mask=m_m, other=0.0)
        if HAS_NORM:
            if HAS_Y:
                b_x += tl.load(y + o_x + i_k, mask=m_m, other=0.0).to(tl.float32)
            tl.store(total + o_x + i_k, b_x, mask=m_total)
            b_square += tl.sum(b_x * b_x, 1)
            b_x *= tl.load(norm_weight + i_k + o_k).to(tl.float32)[None, :]
        b_x = b_x.to(weight.dtype.element_ty)
        b_out = dot(b_x, b_weight.T, b_out)
        if IS_SWIGLU:
            b_up = dot(b_x, tl.load(p_weight + N * K + i_k).T, b_up)
    if HAS_NORM:
        b_inverse = (1.0 / tl.sqrt_rn(b_square / K + eps))[:, None]
        b_out *= b_inverse
        b_up *= b_inverse
    if IS_SWIGLU:
        b_out = b_out / (1.0 + tl.exp(-b_out)) * b_up
    tl.store(out + o_m * N + o_n[None, :], b_out.to(out.dtype.element_ty), mask=m_m)


@triton.jit
def norm_and_rotate(p, weight, b_cos, b_sin, m, eps, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Both halves, [BT, D / 2], of the rows of one head, normed and rotated in fp32, rounded to the head's dtype."""
    o_d = tl.arange(0, D // 2)
    b_1 = tl.load(p, mask=m, other=0.0).to(tl.float32)
    b_2 = tl.load(p + D // 2, mask=m, other=0.0).to(tl.float32)
    if HAS_NORM:
        b_mean = tl.sum(b_1 * b_1 + b_2 * b_2, axis=1) / D
        b_inverse = (1.0 / tl.sqrt_rn(b_mean + eps))[:, None]
        b_1 = b_1 * b_inverse * tl.load(weight + o_d).to(tl.float32)[None, :]
        b_2 = b_2 * b_inverse * tl.load(weight + D // 2 + o_d).to(tl.float32)[None, :]
    dtype = p.dtype.element_ty
    return (b_1 * b_cos - b_2 * b_sin).to(dtype), (b_2 * b_cos + b_1 * b_sin).to(dtype)


@triton.jit
def short_attention_kernel(
    qkv,  # [T, (HQ + 2 * HK) * D]
    cos_sin,  # [P, D] fp32
    q_weight,  # [D] or None
    k_weight,  # [D] or None
    cu_seqlens,  # [B + 1]
    out,  # [T, HQ * D]
    eps,
    scale,  # softmax_scale · log2(e)
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    if IS_CHAINED:
        wait_for_the_kernel_before()
    WIDTH: tl.constexpr = (HQ + 2 * HK) * D
    i_b = tl.program_id(0) // HQ
    i_h = tl.program_id(0) % HQ
    i_k = i_h // (HQ // HK)
    begin = tl.load(cu_seqlens + i_b)
    length = tl.load(cu_seqlens + i_b + 1) - begin
    if length <= 0:
        return
    o_t = tl.arange(0, BT)  # [BT]
    o_half = tl.arange(0, D // 2)  # [D / 2]
    o_d = tl.arange(0, D)  # [D]
    m = (o_t < length)[:, None]
    p_cos = cos_sin + o_t[:, None] * D + o_half[None, :]
    b_cos = tl.load(p_cos, mask=m, other=0.0)  # [BT, D / 2]
    b_sin = tl.load(p_cos + D // 2, mask=m, other=0.0)
    p_row = qkv + (begin + o_t[:, None]) * WIDTH
    p_q = p_row + i_h * D + o_half[None, :]
    p_k = p_row + (HQ + i_k) * D + o_half[None, :]
    p_v = p_row + (HQ + HK + i_k) * D + o_d[None, :]
    b_v = tl.load(p_v, mask=m, other=0.0)  # [BT, D]
    b_q1, b_q2 = norm_and_rotate(p_q, q_weight, b_cos, b_sin, m, eps, D, HAS_NORM)
    b_k1, b_k2 = norm_and_rotate(p_k, k_weight, b_cos, b_sin, m, eps, D, HAS_NORM)
    b_s = dot(b_q1, b_k1.T, tl.zeros([BT, BT], tl.float32))
    b_s = dot(b_q2, b_k2.T, b_s) * scale
    m_s = (o_t < length)[None, :]
    if IS_CAUSAL:
        m_s = m_s & (o_t[None, :] <= o_t[:, None])
    b_s = tl.where(m_s, b_s, float("-inf"))
    b_p = tl.math.exp2(b_s - tl.max(b_s, 1)[:, None])
    b_sum = tl.sum(b_p, 1)
    if not INTERPRET:  # the interpreter truncates instead of rounding
        b_p = b_p.to(b_v.dtype)
    b_out = dot(b_p, b_v, tl.zeros([BT, D], tl.float32)) / b_sum[:, None]
    p_out = out + (begin + o_t[:, None]) * (HQ * D) + i_h * D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m)


@lru_cache
def can_chain(device: torch.device) -> bool:
    """Whether the device launches a kernel while the one before runs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def rows_of_tile(rows: int) -> int:
    """The tile that holds so many rows."""
    return max(16, triton.next_power_of_2(rows))


def columns_of_tile(columns: int) -> int:
    """Output columns of a program: few enough for a program on most multiprocessors."""
    return 32 if columns >= 3072 else 16


def fits(columns: int, inner: int) -> bool:
    """Whether tiles cover a weight (columns, inner) without a rest."""
    return columns % 32 == 0 and inner % max(step for step, _ in STEPS.values()) == 0


def launch_short_linear(
    x: torch.Tensor,
    y: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    is_swiglu: bool,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """Fills `out` (T, N) and, with a norm, `total` (T, K); all tensors are contiguous, T is at most MAX_ROWS."""
    T, K = x.shape
    N = out.shape[1]
    if T == 0:
        return
    BM, BN = rows_of_tile(T), columns_of_tile(N)
    BK, num_stages = STEPS[norm_weight is not None, BM]
    short_linear_kernel[(N // BN,)](
        x,
        y,
        norm_weight,
        weight,
        out,
        total,
        T,
        eps,
        N=N,
        K=K,
        BM=BM,
        BN=BN,
        BK=BK,
        HAS_NORM=norm_weight is not None,
        HAS_Y=y is not None,
        IS_SWIGLU=is_swiglu,
        IS_CHAINED=can_chain(x.device),
        LINES=triton.next_power_of_2(triton.cdiv(K, 64)),
        launch_pdl=can_chain(x.device),
        num_warps=LINEAR_WARPS[BM],
        num_stages=num_stages,
    )


def launch_short_attention(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    softmax_scale: float,
    heads: tuple[int, int, int],
    max_seqlen: int,
    is_causal: bool,
    out: torch.Tensor,
) -> None:
    """Fills `out` (T, HQ · D) for sequences of at most max_seqlen tokens; `heads` is (HQ, HK, D)."""
    HQ, HK, D = heads
    B = cu_seqlens.shape[0] - 1
    if B == 0 or qkv.shape[0] == 0:
        return
    short_attention_kernel[(B * HQ,)](
        qkv,
        cos_sin,
        q_weight,
        k_weight,
        cu_seqlens,
        out,
        eps,
        softmax_scale * LOG2_E,
        HQ=HQ,
        HK=HK,
        D=D,
        BT=rows_of_tile(max_seqlen),
        IS_CAUSAL=is_causal,
        HAS_NORM=q_weight is not None,
        IS_CHAINED=can_chain(qkv.device),
        launch_pdl=can_chain(qkv.device),
        num_warps=ATTENTION_WARPS,
    )
