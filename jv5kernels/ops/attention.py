"""Attention inside the sequences of a packed batch.

out = softmax(softmax_scale · q kᵀ) v per sequence and head (Vaswani et al., arXiv 1706.03762), causal or
bidirectional, with grouped-query attention (Ainslie et al., arXiv 2305.13245): query head h reads kv head
h // (Hq / Hkv). Softmax and sums are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_cu_seqlens, check_tensor
from jv5kernels.ops.registry import (
    Implementation,
    Operator,
    Reason,
    gluon_unavailable,
    triton_unavailable,
)

KERNEL_HEAD_DIMS = (32, 64, 128, 256)
HOPPER_HEAD_DIMS = (64, 128)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns the attention of every token over the tokens of its own sequence.

    Sequence i is rows cu_seqlens[i]:cu_seqlens[i+1]; it may be empty. "triton" never lets a row depend on the
    other sequences of the batch and needs no host synchronisation; "gluon", for Hopper GPUs, keeps the same promise
    and is faster. "torch" and "sdpa" call torch's
    scaled_dot_product_attention (which takes cuDNN or flash where it can) once for each run of neighbours of
    equal length, so they copy cu_seqlens to the host. "flash_attn" needs the package of that name.

    Args:
        q: (T, Hq, D), float32, float16 or bfloat16 (float64 with impl="torch"). Tokens and heads may be
            strided, so q, k and v may be views of one fused projection; the last dimension is contiguous.
            The Triton kernel takes D of 32, 64, 128 and 256; the Gluon kernel bfloat16 with D of 64 and 128, whose
            tokens start at multiples of 16 bytes and whose heads lie side by side.
        k: (T, Hkv, D), dtype of q; Hkv divides Hq.
        v: (T, Hkv, D), dtype of q.
        cu_seqlens: (B+1,) int32, on the device of q, rising from 0 to T.
        max_seqlen: at least the length of the longest sequence.
        causal: whether a token sees only itself and the tokens before it.
        softmax_scale: factor of the scores, positive; None means 1/sqrt(D).
        impl: "auto", "gluon", "triton", "sdpa", "flash_attn" or "torch".

    Returns:
        (T, Hq, D), dtype of q, contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, inputs that require gradients, an `impl` that cannot run here.

    Example:
        >>> x, cu_seqlens = torch.eye(2).reshape(2, 1, 2), torch.tensor([0, 1, 2], dtype=torch.int32)
        >>> attention_varlen(x, x, x, cu_seqlens, 1, causal=True).flatten(1)
        tensor([[1., 0.],
                [0., 1.]])
    """
    check_attention(q, k, v, cu_seqlens, softmax_scale)
    check_tensor("k", k, shape=(q.shape[0], None, q.shape[2]))
    if cu_seqlens.shape[0] == 1 and q.shape[0] > 0:
        raise ValueError(f"cu_seqlens names no sequence, but q has {q.shape[0]} tokens")
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return cast(Tensor, _attention(q, k, v, cu_seqlens, max_seqlen, bool(causal), scale, impl))


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, softmax_scale: float | None
) -> None:
    """Checks what attention_varlen and attention_pooled ask alike of q, k, v, cu_seqlens and softmax_scale."""
    check_tensor("q", q, ndim=3, dtypes=REFERENCE_DTYPES)
    check_tensor("k", k, shape=(None, None, q.shape[2]), dtypes=(q.dtype,), device=q.device)
    check_tensor("v", v, shape=tuple(k.shape), dtypes=(q.dtype,), device=q.device)
    check_cu_seqlens(cu_seqlens, q.device)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, which is no multiple of the {k.shape[1]} heads of k and v"
        )
    if softmax_scale is not None and not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, not {softmax_scale}")


def head_dim_unsupported(q: Tensor, *_: object) -> Reason:
    """Why the Triton kernels of attention cannot take q, or None."""
    if q.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {q.dtype}"
    if q.shape[2] not in KERNEL_HEAD_DIMS:
        return f"the kernel takes head_dim {KERNEL_HEAD_DIMS}, not {q.shape[2]}"
    return None


@dataclass(frozen=True)
class Run:
    """Neighbouring sequences of equal, non-zero length: rows of the packed tokens and numbers of sequences."""

    sequence: int
    count: int
    length: int
    rows: slice


def runs_of_equal_length(cu_seqlens: Tensor) -> Iterator[Run]:
    """The runs of neighbours of equal length, which a batched call can take together (copies to the host)."""
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:], strict=False)]
    sequence = 0
    for length, neighbours in groupby(lengths):
        count = len(list(neighbours))
        if length:
            begin = bounds[sequence]
            yield Run(sequence, count, length, slice(begin, begin + count * length))
        sequence += count


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of a CUDA tensor with rows off the 16-byte grid: torch's memory-efficient kernel faults on it."""
    offsets = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    is_off = x.is_cuda and any(offset % 16 for offset in offsets)
    return x.clone(memory_format=torch.contiguous_format) if is_off else x


def _attention_torch(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    is_grouped = q.shape[1] != k.shape[1]
    for run in runs_of_equal_length(cu_seqlens):
        # (T, H, D) -> (count, H, length, D), all views
        queries, keys, values, result = (
            x[run.rows].unflatten(0, (run.count, run.length)).transpose(1, 2)
            for x in (q, k, v, out)
        )
        result.copy_(
            F.scaled_dot_product_attention(
                queries, keys, values, is_causal=causal, scale=scale, enable_gqa=is_grouped
            )
        )
    return out


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    from jv5kernels.kernels.attention import launch_attention

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch_attention(q, k, v, cu_seqlens, max_seqlen, causal, scale, out)
    return out


def _attention_gluon(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    from jv5kernels.kernels.attention_sm90 import launch_attention_sm90

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch_attention_sm90(q, k, v, cu_seqlens, max_seqlen, causal, scale, out)
    return out


def _gluon_unsupported(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Reason:
    if q.dtype != torch.bfloat16:
        return f"the kernel takes bfloat16, not {q.dtype}"
    if q.shape[2] not in HOPPER_HEAD_DIMS:
        return f"the kernel takes head_dim {HOPPER_HEAD_DIMS}, not {q.shape[2]}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(1) != x.shape[2]:
            return (
                f"the kernel takes tokens at multiples of 16 bytes with their heads side by side, not {name} at "
                f"{x.data_ptr() % 16} bytes past one with strides {x.stride()}"
            )
    return None


def _attention_flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=causal
    )
    return out.contiguous()


def _flash_unavailable(device: torch.device) -> Reason:
    if device.type != "cuda":
        return "needs a CUDA device"
    if find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    return None


def _flash_unsupported(q: Tensor, *_: object) -> Reason:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash_attn takes float16 and bfloat16, not {q.dtype}"
    if q.shape[2] > 256 or q.shape[2] % 8:
        return f"flash_attn takes multiples of 8 up to 256 as head_dim, not {q.shape[2]}"
    return None


_attention = Operator(
    name="attention_varlen",
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, bool causal, "
    "float softmax_scale, str impl) -> Tensor",
    implementations={
        "gluon": Implementation(_attention_gluon, gluon_unavailable, _gluon_unsupported),
        "triton": Implementation(_attention_triton, triton_unavailable, head_dim_unsupported),
        "sdpa": Implementation(_attention_torch),
        "flash_attn": Implementation(_attention_flash, _flash_unavailable, _flash_unsupported),
        "torch": Implementation(_attention_torch),
    },
    auto={"cuda": ("gluon", "triton", "torch"), "cpu": ("torch",)},
    fake=lambda q, *_: q.new_empty(q.shape),
)
