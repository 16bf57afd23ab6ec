"""Quantisation of float32 rows to bytes, and the helpers by which embed_output does it in its registers.

    int8:    code = min(max(floor((x - min) / step), 0), 255),  step = (max - min) / 255, or 1 where that is 0
    binary:  bit  = x > 0, eight columns a byte, the first in the top bit

Divisions are IEEE, and a product is not contracted with the minimum that is subtracted from it (see the launches), so
the bytes are those of NumPy's float32 arithmetic. Traffic: x once, the bytes once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_WARPS = 4
# Rows of a program: the steps of the columns are computed once for them.
ROWS = 8
# What an output holds: floats, one byte a column, one bit a column.
FLOATS, CODES, BITS = 0, 1, 2


@triton.jit
def range_steps(ranges, stride_rr, o_c, m_c):
    """The minima of some columns and the width of a code's step."""
    b_min = tl.load(ranges + o_c, mask=m_c, other=0.0)
    b_max = tl.load(ranges + stride_rr + o_c, mask=m_c, other=0.0)
    b_step = tl.div_rn(b_max - b_min, tl.full(b_min.shape, 255.0, tl.float32))
    return b_min, tl.where(b_step == 0, 1.0, b_step)


@triton.jit
def codes_of(b, b_min, b_step):
    """Codes 0 to 255 as int32; NaN has the code 0."""
    b_code = tl.floor(tl.div_rn(b - b_min, b_step))
    # In this form NaN fails both comparisons.
    b_code = tl.where(b_code > 0, b_code, 0.0)
    return tl.where(b_code < 255, b_code, 255.0).to(tl.int32)


@triton.jit
def bits_of(b, BC: tl.constexpr):
    """[BC // 8] bytes as int32 of a row [BC]."""
    b_bits = tl.reshape((b > 0).to(tl.int32), [BC // 8, 8])
    b_weight = 128 >> tl.arange(0, 8)  # [8]
    return tl.sum(b_bits * b_weight[None, :], axis=1)


@triton.jit
def store_bytes(p, b_code, mask, FLIP: tl.constexpr):
    """Stores bytes held as int32, xored with FLIP, as int8 or uint8."""
    b_byte = (b_code ^ FLIP).to(tl.uint8)
    tl.store(p, b_byte.to(p.dtype.element_ty, bitcast=True), mask=mask)


@triton.jit(do_not_specialize=["B"])
def quantize_kernel(
    x,  # [B, DIM]
    ranges,  # [2, DIM] fp32, or None
    out,  # [B, WIDTH]
    stride_xb,
    stride_rr,
    B,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BC: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    FLIP: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * ROWS
    o_c = tl.arange(0, BC)  # [BC]
    if KIND == 1:
        b_min, b_step = range_steps(ranges, stride_rr, o_c, o_c < DIM)
    for i in tl.static_range(ROWS):
        i_row = i_first + i
        m_c = o_c < tl.where(i_row < B, DIM, 0)
        b = tl.load(x + i_row * stride_xb + o_c, mask=m_c, other=0.0).to(tl.float32)
        if KIND == 1:
            b_code = codes_of(b, b_min, b_step)
            store_bytes(out + i_row * WIDTH + o_c, b_code, m_c, FLIP)
        else:
            o_byte = tl.arange(0, BC // 8)
            m_byte = o_byte < tl.where(i_row < B, WIDTH, 0)
            store_bytes(out + i_row * WIDTH + o_byte, bits_of(b, BC), m_byte, FLIP)


def block_of_columns(width: int) -> int:
    """Columns of a block that holds a whole row, in whole bytes of bits."""
    return max(8, triton.next_power_of_2(width))


def flip_of(dtype: torch.dtype) -> int:
    """What turns codes into the bytes of a dtype: int8 is a code minus 128, its top bit flipped."""
    return 0x80 if dtype == torch.int8 else 0


def launch_quantize(x: torch.Tensor, ranges: torch.Tensor | None, out: torch.Tensor) -> None:
    """Fills `out` with a byte a column when there are ranges, and a bit a column otherwise."""
    B, dim = x.shape
    if B == 0 or dim == 0:
        return
    quantize_kernel[(triton.cdiv(B, ROWS),)](
        x,
        ranges,
        out,
        x.stride(0),
        0 if ranges is None else ranges.stride(0),
        B,
        DIM=dim,
        WIDTH=out.shape[1],
        BC=block_of_columns(dim),
        ROWS=ROWS,
        KIND=BITS if ranges is None else CODES,
        FLIP=flip_of(out.dtype),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
