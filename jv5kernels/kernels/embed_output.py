"""The last step of encoding: one program turns the pooled token of a sequence into its embedding.

    row   = hidden[t]                               t: last or first token of sequence i, or row i
    row   = row · rsqrt(mean(row²) + eps) · weight  over all C columns, when there is a weight
    row   = row[:dim]
    row   = row / max(‖row‖, 1e-12)                 when normalising
    out   = cast(row);  flag = 1 unless out and ‖row‖ are finite

Traffic: B rows in, B rows out; the T - B other rows of hidden are never touched. Means come from the
kernels of pool.py, and pass through here as rows that are already normed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_WARPS = 4
# How a program finds its row.
ROW_LAST, ROW_FIRST, ROW_OWN = 0, 1, 2
ROW_OF_MODE = {"lasttoken": ROW_LAST, "cls": ROW_FIRST, "mean": ROW_OWN}


@triton.jit
def is_finite(b):
    """1 where a value is finite."""
    return tl.abs(b) < float("inf")


@triton.jit
def embed_output_kernel(
    hidden,  # [T, C], or [B, C] with ROW = 2
    cu_seqlens,  # [B + 1]
    weight,  # [C] or None
    out,  # [B, DIM]
    flags,  # [B] uint8
    stride_ht,
    eps,
    C: tl.constexpr,
    DIM: tl.constexpr,
    BC: tl.constexpr,
    ROW: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    i_sequence = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)  # [BC]
    start = tl.load(cu_seqlens + i_sequence).to(tl.int64)
    end = tl.load(cu_seqlens + i_sequence + 1).to(tl.int64)
    if ROW == 0:
        i_row = end - 1
    elif ROW == 1:
        i_row = start
    else:
        i_row = i_sequence

    columns = tl.where(start < end, C, 0)
    b = tl.load(hidden + i_row * stride_ht + o_c, mask=o_c < columns, other=0.0).to(tl.float32)
    if HAS_NORM:
        b_weight = tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        mean_square = tl.sum(b * b, axis=0) / C
        # An empty sequence with eps = 0 would be 0 · inf.
        b = b * (1.0 / tl.sqrt_rn(tl.where(start < end, mean_square + eps, 1.0))) * b_weight

    m_out = o_c < DIM
    b = tl.where(m_out, b, 0.0)
    bad = 0
    if NORMALIZE:
        norm = tl.sqrt_rn(tl.sum(b * b, axis=0))
        bad = 1 - is_finite(norm).to(tl.int32)
        b = b / tl.maximum(norm, 1e-12)
    b_out = b.to(out.dtype.element_ty)
    bad = tl.maximum(bad, tl.max(1 - is_finite(b_out.to(tl.float32)).to(tl.int32), axis=0))
    tl.store(out + i_sequence * DIM + o_c, b_out, mask=m_out)
    tl.store(flags + i_sequence, bad.to(tl.uint8))


def launch_embed_output(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mode: str,
    weight: torch.Tensor | None,
    eps: float,
    normalize: bool,
    out: torch.Tensor,
    flags: torch.Tensor,
) -> None:
    """Fills `out` (B, dim) and `flags` (B,); for mode "mean", hidden holds the means, one a sequence."""
    B, dim = out.shape
    if B == 0:
        return
    C = hidden.shape[1]
    embed_output_kernel[(B,)](
        hidden,
        cu_seqlens,
        weight,
        out,
        flags,
        hidden.stride(0),
        eps,
        C=C,
        DIM=dim,
        BC=triton.next_power_of_2(C),
        ROW=ROW_OF_MODE[mode],
        HAS_NORM=weight is not None,
        NORMALIZE=normalize,
        num_warps=NUM_WARPS,
    )
