"""RMSNorm, with or without the residual addition, one pass over the rows.

    total = x (+ residual (+ also))              [T, C], fp32 in registers
    out   = total · rsqrt(mean(total²) + eps) · weight

A program takes BT rows, one for each warp, in CHUNKS tiles of [BT, BC]: BC columns are 16 bytes for each
lane of a warp (of the wider dtype, when x and residual differ), so a row's sum stays inside its warp,
without shared memory, and rows of 768 need no padding. Only rows that would not fit into a warp's
registers are spread over all warps.

Traffic: the inputs and outputs that there are, once each; the weight stays in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_WARPS = 4
# Bytes of a row that one warp loads at a time: 16 for each lane.
WARP_BYTES = 512
# Most chunks of a row that one warp holds, 64 values a lane.
MAX_WARP_CHUNKS = 8


@triton.jit
def load_chunks(p, m_t, o_c, C: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr):
    """The columns of some rows as CHUNKS blocks of [BT, BC]; p points to the first of them."""
    b_chunks = ()
    for i in tl.static_range(CHUNKS):
        b_chunks += (tl.load(p + i * BC, mask=m_t & (i * BC + o_c < C), other=0.0),)
    return b_chunks


@triton.jit
def store_chunks(p, b_chunks, m_t, o_c, C: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr):
    """Rounds blocks to the dtype behind p and stores them."""
    for i in tl.static_range(CHUNKS):
        tl.store(p + i * BC, b_chunks[i].to(p.dtype.element_ty), mask=m_t & (i * BC + o_c < C))


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x,  # [T, C]
    residual,  # [T, C] or None
    also,  # [T, C] or None
    weight,  # [C]
    out,  # [T, C]
    total,  # [T, C] or None
    stride_xt,
    stride_rt,
    stride_at,
    T,
    eps,
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]  # [BT, 1]
    o_c = tl.arange(0, BC)[None, :]  # [1, BC]
    m_t = o_t < T
    o_out = o_t * C + o_c

    # All loads before the first store, which the compiler would not move them over.
    b_x = load_chunks(x + o_t * stride_xt + o_c, m_t, o_c, C, CHUNKS, BC)
    if residual is not None:
        b_residual = load_chunks(residual + o_t * stride_rt + o_c, m_t, o_c, C, CHUNKS, BC)
    if also is not None:
        b_also = load_chunks(also + o_t * stride_at + o_c, m_t, o_c, C, CHUNKS, BC)
    # For every row anew: from the L1 cache, where sharing would go through shared memory.
    b_weight = load_chunks(weight + 0 * o_t + o_c, m_t, o_c, C, CHUNKS, BC)

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
        store_chunks(total + o_out, b_totals, m_t, o_c, C, CHUNKS, BC)

    b_mean = tl.sum(b_square, axis=1) / C  # [BT]
    b_inverse = (1.0 / tl.sqrt_rn(b_mean + eps))[:, None]
    b_out = ()
    for i in tl.static_range(CHUNKS):
        b_out += (b_totals[i] * b_inverse * b_weight[i].to(tl.float32),)
    store_chunks(out + o_out, b_out, m_t, o_c, C, CHUNKS, BC)


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
    """Fills `out`, and `total` with the sum where it is wanted; both are contiguous (T, C)."""
    T, C = x.shape
    if T == 0:
        return
    # The widest dtype: stores of more than 16 bytes a lane would pass through shared memory.
    rows = [t for t in (x, residual, also, out) if t is not None]
    CHUNKS, BT, BC = tile(C, max(t.element_size() for t in rows))
    rms_norm_kernel[(triton.cdiv(T, BT),)](
        x,
        residual,
        also,
        weight,
        out,
        total,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        also.stride(0) if also is not None else 0,
        T,
        eps,
        C=C,
        CHUNKS=CHUNKS,
        BT=BT,
        BC=BC,
        num_warps=NUM_WARPS,
    )
