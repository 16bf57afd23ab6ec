"""RMSNorm, with or without the residual addition, one pass over the rows.

    total = x (+ residual (+ also))              [T, C], fp32 in registers
    out   = total · rsqrt(mean(total²) + eps) · weight

A program takes BT rows, one for each warp, in CHUNKS tiles of [BT, BC]: BC columns are 16 bytes for each
lane of a warp (of the wider dtype, when x and residual differ), so a row's sum stays inside its warp,
without shared memory, and rows of 768 need no padding. Only rows that would not fit into a warp's
registers are spread over all warps.

Rows of bytes are float24 (ops/float24.py). Traffic: the inputs and outputs that there are, once each; the
weight stays in the caches.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from jv5kernels.kernels.launch import has_sm_90, launch, wait_for_the_kernel_before

NUM_WARPS = 4
# Bytes of a row that one warp loads at a time: 16 for each lane.
WARP_BYTES = 512
# Most chunks of a row that one warp holds, 64 values a lane.
MAX_WARP_CHUNKS = 8


@triton.jit
def load_chunks(x, o_t, stride, o_c, m_t, C: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr):
    """Rows o_t of x as CHUNKS blocks of [BT, BC]; float24 becomes fp32, all else stays what it is."""
    p = x + o_t * stride
    p_upper = p.to(tl.pointer_type(tl.uint16)) if x.dtype.element_ty == tl.uint8 else p
    b_chunks = ()
    for i in tl.static_range(CHUNKS):
        m = m_t & (i * BC + o_c < C)
        if x.dtype.element_ty == tl.uint8:
            b_upper = tl.load(p_upper + i * BC + o_c, mask=m, other=0).to(tl.uint32)
            b_lower = tl.load(p + 2 * C + i * BC + o_c, mask=m, other=0).to(tl.uint32)
            b_bits = (b_upper << 16) | (b_lower << 8)
            b_chunks += (b_bits.to(tl.float32, bitcast=True),)
        else:
            b_chunks += (tl.load(p + i * BC + o_c, mask=m, other=0.0),)
    return b_chunks


@triton.jit
def store_chunks(
    x, b_chunks, o_t, o_c, m_t, C: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr
):
    """Rounds blocks to the format of x, whose rows are contiguous, and stores them."""
    for i in tl.static_range(CHUNKS):
        m = m_t & (i * BC + o_c < C)
        if x.dtype.element_ty == tl.uint8:
            p = x + o_t * (3 * C)
            b_bits = b_chunks[i].to(tl.uint32, bitcast=True)
            # A NaN whose bits are all ones would become zero.
            b_bits = tl.where(b_chunks[i] == b_chunks[i], b_bits + 0x80, b_bits)
            p_upper = p.to(tl.pointer_type(tl.uint16)) + i * BC + o_c
            tl.store(p_upper, (b_bits >> 16).to(tl.uint16), mask=m)
            tl.store(p + 2 * C + i * BC + o_c, (b_bits >> 8).to(tl.uint8), mask=m)
        else:
            tl.store(x + o_t * C + i * BC + o_c, b_chunks[i].to(x.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x,  # [T, C], or float24 [T, 3 * C]
    residual,  # likewise, or None
    also,  # [T, C] or None
    weight,  # [C]
    out,  # [T, C]
    total,  # [T, C], or float24 [T, 3 * C], or None
    T,
    eps,
    stride_xt,
    stride_rt,
    stride_at,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    if IS_CHAINED:
        wait_for_the_kernel_before()
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]  # [BT, 1]
    o_c = tl.arange(0, BC)[None, :]  # [1, BC]
    m_t = o_t < T

    # All loads before the first store, which the compiler would not move them over.
    b_x = load_chunks(x, o_t, stride_xt, o_c, m_t, C, CHUNKS, BC)
    if residual is not None:
        b_residual = load_chunks(residual, o_t, stride_rt, o_c, m_t, C, CHUNKS, BC)
    if also is not None:
        b_also = load_chunks(also, o_t, stride_at, o_c, m_t, C, CHUNKS, BC)
    # For every row anew: from the L1 cache, where sharing would go through shared memory.
    b_weight = load_chunks(weight, o_t, 0, o_c, m_t, C, CHUNKS, BC)

    b_totals = ()
    b_square = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(CHUNKS):
        b_total = b_x[i].to(tl.float32)
        if residual is not None:
            b_total += b_residual[i].to(tl.float32)
        if also is not None:
            b_total += b_also[i].to(tl.float32)
        b_square += b_total * b_total
        b_totals += (b_total,)
    if total is not None:
        store_chunks(total, b_totals, o_t, o_c, m_t, C, CHUNKS, BC)

    b_mean = tl.sum(b_square, axis=1) / C  # [BT]
    b_inverse = (1.0 / tl.sqrt_rn(b_mean + eps))[:, None]
    b_out = ()
    for i in tl.static_range(CHUNKS):
        b_out += (b_totals[i] * b_inverse * b_weight[i].to(tl.float32),)
    store_chunks(out, b_out, o_t, o_c, m_t, C, CHUNKS, BC)


@lru_cache
def tile(width: int, element_size: int) -> tuple[int, int, int]:
    """Chunks of a row, rows of a program and columns of a chunk, for rows of `width` values."""
    columns = WARP_BYTES // element_size
    if width > MAX_WARP_CHUNKS * columns:
        columns *= NUM_WARPS
        return triton.cdiv(width, columns), 1, columns
    columns = min(columns, triton.next_power_of_2(width))
    rows = NUM_WARPS * WARP_BYTES // (element_size * columns)
    return triton.cdiv(width, columns), rows, columns


def launch_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    also: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """Fills `out`, and `total` with the sum where it is wanted; both are contiguous. Rows of bytes are float24."""
    T, C = out.shape
    if T == 0:
        return
    # The widest dtype: stores of more than 16 bytes a lane would pass through shared memory. float24 has 2-byte words.
    rows = [t for t in (x, residual, also, out, total) if t is not None]
    CHUNKS, BT, BC = tile(C, max(max(t.element_size(), 2) for t in rows))
    is_chained = has_sm_90(x.device)
    strides = [0 if t is None else t.stride(0) for t in (x, residual, also)]
    launch(
        rms_norm_kernel,
        x.device,
        -(-T // BT),
        (x, residual, also, weight, out, total),
        (T, eps),
        (*strides, C, CHUNKS, BT, BC, is_chained),
        (("num_warps", NUM_WARPS), ("launch_pdl", is_chained)),
    )
