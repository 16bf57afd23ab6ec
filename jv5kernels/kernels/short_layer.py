"""The kernels of a layer over a few tokens, where launches and the reading of weights are all there is.

`short_norm_kernel` takes a row of the residual stream: total = x + y in fp32, and RMSNorm of it.

`short_linear_kernel`, for up to 16 rows, streams the weight once through as many programs as keep the memory busy:

    out = x · Wᵀ
    out = silu(gate) · up                                                     with IS_SWIGLU

K is cut into one piece a warp, so that the products of a program run side by side; their sum is taken at the end.

`short_attention_kernel` takes one head of one sequence: norm and rotation of q and k, scores, softmax and the product
with v in registers. Positions are the rows' places in their sequence.

With IS_CHAINED (programmatic dependent launch, sm_90 and later) the next kernel starts while this one runs: its
programs have their part of the weight on the way to registers, which depends on nothing, and then wait until this one
is done. So memory is read without a pause from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from jv5kernels.kernels.launch import has_sm_90, wait_for_the_kernel_before

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = 1.4426950408889634
# The height of a tile: rows of a product, tokens of a sequence.
ROWS = 16
ATTENTION_WARPS = NORM_WARPS = 4


@dataclass(frozen=True)
class Config:
    """Output columns of a program, its warps (pieces of K), and the most columns of K that are multiplied at once."""

    BN: int
    num_warps: int
    max_BK: int


# Kind of projection -> configuration; bench/bench_short_layer.py --sweep times others.
CONFIGS = {
    "swiglu": Config(16, 4, 1024),
    "wide": Config(32, 4, 1024),
    "narrow": Config(16, 8, 2048),
    "deep": Config(8, 8, 2048),
}
# Columns from which 32 a program leave a program for each multiprocessor; values of K that fill the registers of 16.
WIDE, DEEP = 2048, 3072
# 16-bit values of a thread: 192 of 255 registers, as many as small's widest projections take without spills.
MAX_VALUES = 384


@triton.jit
def dot(a, b, out):
    """out + a · b in fp32."""
    if INTERPRET:  # the interpreter multiplies bf16 bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, out, input_precision="ieee")


@triton.jit
def short_norm_kernel(
    x,  # [T, K] fp32, or dtype of weight
    y,  # [T, K] or None
    weight,  # [K]
    out,  # [T, K], dtype of weight
    total,  # [T, K] fp32
    eps,
    K: tl.constexpr,
    BK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    o_k = tl.arange(0, BK)  # [BK]
    m_k = o_k < K
    o_x = tl.program_id(0) * K + o_k
    b_weight = tl.load(weight + o_k, mask=m_k, other=0.0).to(tl.float32)
    if IS_CHAINED:
        wait_for_the_kernel_before()
    b_x = tl.load(x + o_x, mask=m_k, other=0.0).to(tl.float32)
    if y is not None:
        b_x += tl.load(y + o_x, mask=m_k, other=0.0).to(tl.float32)
    tl.store(total + o_x, b_x, mask=m_k)
    b_out = b_x * (1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, 0) / K + eps)) * b_weight
    tl.store(out + o_x, b_out.to(out.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["T"])
def short_linear_kernel(
    x,  # [T, K]
    weight,  # [N, K]; with IS_SWIGLU [2 * N, K], gate and then up
    out,  # [T, N]
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PIECES: tl.constexpr,
    IS_SWIGLU: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    STEPS: tl.constexpr = K // BK
    i_n = tl.program_id(0)
    o_m = tl.arange(0, BM)  # [BM]
    o_n = i_n * BN + tl.arange(0, BN)  # [BN]
    o_k = tl.arange(0, PIECES)[:, None, None] * (BK // PIECES)
    o_k += tl.arange(0, BK // PIECES)[None, None, :]  # [PIECES, 1, BK / PIECES]
    m_x = o_m[None, :, None] < T
    p_x = x + o_m[None, :, None] * K + o_k  # [PIECES, BM, BK / PIECES]
    p_weight = weight + o_n[None, :, None] * K + o_k  # [PIECES, BN, BK / PIECES]
    # All loads are under way before the first product, those of the weight even before the wait.
    b_weight = ()
    b_weight_up = ()
    for i in tl.static_range(STEPS):
        b_weight += (tl.load(p_weight + i * BK),)
        if IS_SWIGLU:
            b_weight_up += (tl.load(p_weight + N * K + i * BK),)
    if IS_CHAINED:
        wait_for_the_kernel_before()
    b_x = ()
    for i in tl.static_range(STEPS):
        b_x += (tl.load(p_x + i * BK, mask=m_x, other=0.0),)
    b_out = tl.zeros([PIECES, BM, BN], tl.float32)
    b_up = tl.zeros([PIECES, BM, BN], tl.float32)
    for i in tl.static_range(STEPS):
        b_out = dot(b_x[i], tl.permute(b_weight[i], (0, 2, 1)), b_out)
        if IS_SWIGLU:
            b_up = dot(b_x[i], tl.permute(b_weight_up[i], (0, 2, 1)), b_up)
    b_sum = tl.sum(b_out, 0)
    if IS_SWIGLU:
        b_sum = b_sum / (1.0 + tl.exp(-b_sum)) * tl.sum(b_up, 0)
    p_out = out + o_m[:, None] * N + o_n[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=(o_m < T)[:, None])


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


def config_of(columns: int, inner: int, is_swiglu: bool) -> tuple[Config, int]:
    """The configuration for a weight (columns, inner), and the columns of K at once."""
    narrow = "deep" if inner >= DEEP else "narrow"
    config = CONFIGS["swiglu" if is_swiglu else "wide" if columns >= WIDE else narrow]
    return config, min(config.max_BK, inner & -inner)


def fits(columns: int, inner: int, is_swiglu: bool) -> bool:
    """Whether tiles cover a weight (columns, inner) without a rest, and registers hold a program's part and x."""
    if columns % 32 or inner % 256:
        return False
    config, _ = config_of(columns, inner, is_swiglu)
    values = (ROWS + config.BN * (1 + is_swiglu)) * inner
    return values <= MAX_VALUES * 32 * config.num_warps


def launch_short_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor,
) -> None:
    """Fills `out` and `total` (T, K); all tensors are contiguous."""
    T, K = x.shape
    if T == 0:
        return
    short_norm_kernel[(T,)](
        x,
        y,
        weight,
        out,
        total,
        eps,
        K=K,
        BK=triton.next_power_of_2(K),
        IS_CHAINED=has_sm_90(x.device),
        launch_pdl=has_sm_90(x.device),
        num_warps=NORM_WARPS,
    )


def launch_short_linear(
    x: torch.Tensor, weight: torch.Tensor, is_swiglu: bool, out: torch.Tensor
) -> None:
    """Fills `out` (T, N); all tensors are contiguous, T is at most ROWS."""
    T, K = x.shape
    N = out.shape[1]
    if T == 0:
        return
    config, BK = config_of(N, K, is_swiglu)
    short_linear_kernel[(N // config.BN,)](
        x,
        weight,
        out,
        T,
        N=N,
        K=K,
        BM=ROWS,
        BN=config.BN,
        BK=BK,
        PIECES=config.num_warps,
        IS_SWIGLU=is_swiglu,
        IS_CHAINED=has_sm_90(x.device),
        launch_pdl=has_sm_90(x.device),
        num_warps=config.num_warps,
        num_stages=1,
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
    is_causal: bool,
    out: torch.Tensor,
) -> None:
    """Fills `out` (T, HQ · D) for sequences of at most ROWS tokens; `heads` is (HQ, HK, D)."""
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
        BT=ROWS,
        IS_CAUSAL=is_causal,
        HAS_NORM=q_weight is not None,
        IS_CHAINED=has_sm_90(qkv.device),
        launch_pdl=has_sm_90(qkv.device),
        num_warps=ATTENTION_WARPS,
    )
