"""Attention of one query a sequence: what the last layer needs when a single token is pooled.

out[b] = softmax(softmax_scale · q[b] kᵀ) v over the keys of sequence b (Vaswani et al., arXiv 1706.03762),
with grouped-query attention as in `attention_varlen`. Softmax and sums are fp32.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from jv5kernels.ops.attention import (
    aligned,
    check_attention,
    head_dim_unsupported,
    runs_of_equal_length,
)
from jv5kernels.ops.checks import check_tensor
from jv5kernels.ops.registry import Implementation, Operator, triton_unavailable


def attention_pooled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    softmax_scale: float | None = None,
    query_positions: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns the attention of one query per sequence over the keys of that sequence.

    The last token of a causal sequence sees all keys, as does any token of a bidirectional one. For another
    token of a causal sequence give its position in `query_positions`. "triton" gives the same bits for a
    sequence whatever else is in the batch and needs no host synchronisation; "torch" copies cu_seqlens to the
    host.

    Args:
        q: (B, Hq, D), float32, float16 or bfloat16 (float64 with impl="torch"); sequences and heads may be
            strided, the last dimension is contiguous. The Triton kernel takes D of 32, 64, 128 and 256.
        k: (T, Hkv, D), dtype of q, strided likewise; Hkv divides Hq.
        v: (T, Hkv, D), dtype of q.
        cu_seqlens: (B+1,) int32, on the device of q, rising from 0 to T.
        max_seqlen: at least the length of the longest sequence.
        softmax_scale: factor of the scores, positive; None means 1/sqrt(D).
        query_positions: (B,) int32, position of the query in its sequence: keys after it are not seen.
            None: all keys are seen.
        impl: "auto", "triton" or "torch".

    Returns:
        (B, Hq, D), dtype of q, contiguous; zeros where a sequence has no visible key.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, inputs that require gradients, an `impl` that cannot run here.

    Example:
        >>> q, kv = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]], [[3.0, 5.0]]])
        >>> attention_pooled(q, kv, kv, torch.tensor([0, 2], dtype=torch.int32), 2)
        tensor([[[2., 4.]]])
    """
    check_attention(q, k, v, cu_seqlens, softmax_scale)
    check_tensor("q", q, shape=(cu_seqlens.shape[0] - 1, None, None))
    if query_positions is not None:
        check_tensor(
            "query_positions",
            query_positions,
            shape=(q.shape[0],),
            dtypes=(torch.int32,),
            device=q.device,
        )
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    out = _attention_pooled(q, k, v, cu_seqlens, max_seqlen, scale, query_positions, impl)
    return cast(Tensor, out)


def _pooled_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    query_positions: Tensor | None,
) -> Tensor:
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    kv_heads = k.shape[1]
    for run in runs_of_equal_length(cu_seqlens):
        sequences = slice(run.sequence, run.sequence + run.count)
        # The query heads of a group are the query rows of their kv head: (count, Hkv, Hq / Hkv, D).
        queries, result = (x[sequences].unflatten(1, (kv_heads, -1)) for x in (q, out))
        keys, values = (
            x[run.rows].unflatten(0, (run.count, run.length)).transpose(1, 2) for x in (k, v)
        )
        if query_positions is None:
            result.copy_(F.scaled_dot_product_attention(queries, keys, values, scale=scale))
            continue
        last = query_positions[sequences, None, None, None]
        mask = torch.arange(run.length, device=q.device) <= last
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale
        )
        result.copy_(attended.masked_fill(last < 0, 0.0))
    return out


def _pooled_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    query_positions: Tensor | None,
) -> Tensor:
    from jv5kernels.kernels.attention_pooled import launch_attention_pooled, slots_for

    sequences, heads, head_dim = q.shape
    slots = slots_for(k.shape[0], sequences)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    partial_out = torch.empty(slots, heads, head_dim, dtype=torch.float32, device=q.device)
    partial_max = torch.empty(slots, heads, dtype=torch.float32, device=q.device)
    partial_sum = torch.empty_like(partial_max)
    launch_attention_pooled(
        q,
        k,
        v,
        cu_seqlens,
        max_seqlen,
        scale,
        query_positions,
        out,
        partial_out,
        partial_max,
        partial_sum,
    )
    return out


_attention_pooled = Operator(
    name="attention_pooled",
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, "
    "float softmax_scale, Tensor? query_positions, str impl) -> Tensor",
    implementations={
        "triton": Implementation(_pooled_triton, triton_unavailable, head_dim_unsupported),
        "torch": Implementation(_pooled_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda q, *_: q.new_empty(q.shape),
)
