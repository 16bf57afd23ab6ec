"""A layer over a few tokens in five kernels: the steps around each projection are done inside it.

For up to SHORT_TOKENS tokens a layer is bound by reading its weights and by the launches between. So a norm, a residual
addition or an activation is cheaper done again by every program of the next projection than once by a kernel of its
own. The matrix products add up in another order than those of the library or of `linear`, so a row may differ from
theirs in its last bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jv5kernels.ops.attention import attention_varlen
from jv5kernels.ops.checks import FLOAT_DTYPES, check_cu_seqlens, check_tensor
from jv5kernels.ops.qk_norm_rope import qk_norm_rope
from jv5kernels.ops.registry import Implementation, Operator, Reason, triton_unavailable
from jv5kernels.ops.swiglu import swiglu

SHORT_TOKENS = 64
HEAD_DIMS = (32, 64, 128)


def short_linear(
    x: Tensor,
    weight: Tensor,
    *,
    y: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    is_swiglu: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns a projection of a few rows together with what comes before and after it.

    With `norm_weight`: total = x + y in fp32, and RMSNorm(total) · weightᵀ; otherwise x · weightᵀ. With `is_swiglu`
    the weight holds gate and then up rows, and the result is silu(gate) · up.

    Args:
        x: (T, K), T at most SHORT_TOKENS, contiguous; float32 with a norm, else dtype of weight.
        weight: (N, K), or (2·N, K) with `is_swiglu`, contiguous, float32, float16 or bfloat16.
        y: (T, K), dtype of weight, contiguous; None adds nothing. Only with a norm.
        norm_weight: (K,), dtype of weight; None for no norm.
        eps: added to the mean square.
        impl: "auto", "triton" (N in steps of 32, K of 256) or "torch".

    Returns:
        (T, N), dtype of weight, and (T, K) float32, the total; empty without a norm.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, too many rows, inputs that require gradients, an `impl` that cannot run
            here.

    Example:
        >>> out, total = short_linear(torch.ones(1, 2), torch.ones(3, 2), norm_weight=torch.ones(2))
        >>> out
        tensor([[2., 2., 2.]])
    """
    check_tensor("weight", weight, ndim=2, dtypes=FLOAT_DTYPES)
    kind = weight.dtype if norm_weight is None else torch.float32
    check_tensor("x", x, shape=(None, weight.shape[1]), dtypes=(kind,), device=weight.device)
    if x.shape[0] > SHORT_TOKENS:
        raise ValueError(f"x has {x.shape[0]} rows: at most {SHORT_TOKENS} are short")
    if is_swiglu and weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows, which are not gate and up alike")
    if norm_weight is not None:
        check_tensor(
            "norm_weight",
            norm_weight,
            shape=(weight.shape[1],),
            dtypes=(weight.dtype,),
            device=weight.device,
        )
    if y is not None:
        if norm_weight is None:
            raise ValueError("y is added before the norm, so it needs norm_weight")
        check_tensor("y", y, shape=tuple(x.shape), dtypes=(weight.dtype,), device=x.device)
    for name, tensor in (("x", x), ("weight", weight), ("y", y)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not have strides {tensor.stride()}")
    return _short_linear(x, weight, y, norm_weight, float(eps), is_swiglu, impl)


def short_attention(
    qkv: Tensor,
    cos_sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    causal: bool,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Returns the attention over short sequences from the fused projection, norm and rotation included.

    What `qk_norm_rope` (with the rows' places in their sequence as positions) and `attention_varlen` do; `qkv` is left
    as it is. Rows that belong to no sequence are not written.

    Args:
        qkv: (T, (num_heads + 2·num_kv_heads)·head_dim), contiguous, float32, float16 or bfloat16.
        cos_sin: (P, head_dim) float32 of `rope_table`; P at least max_seqlen.
        cu_seqlens: (B+1,) int32; sequences may be empty.
        max_seqlen: at least the longest sequence, at most SHORT_TOKENS.
        num_heads, num_kv_heads, head_dim, q_weight, k_weight, eps: as in `qk_norm_rope`; head_dim 32, 64 or 128.
        causal: as in `attention_varlen`.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, num_heads·head_dim), dtype of qkv.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, longer sequences, inputs that require gradients, an `impl` that cannot run
            here.
    """
    width = (num_heads + 2 * num_kv_heads) * head_dim
    check_tensor("qkv", qkv, shape=(None, width), dtypes=FLOAT_DTYPES)
    check_tensor(
        "cos_sin", cos_sin, shape=(None, head_dim), dtypes=(torch.float32,), device=qkv.device
    )
    check_cu_seqlens(cu_seqlens, qkv.device)
    if not qkv.is_contiguous() or not cos_sin.is_contiguous():
        raise ValueError("qkv and cos_sin must be contiguous")
    if not max_seqlen <= min(SHORT_TOKENS, cos_sin.shape[0]):
        raise ValueError(
            f"max_seqlen={max_seqlen}: at most {SHORT_TOKENS} is short, and cos_sin has {cos_sin.shape[0]} rows"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads or head_dim not in HEAD_DIMS:
        raise ValueError(
            f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}, "
            f"and head_dim={head_dim} one of {HEAD_DIMS}"
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight go together")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor(name, weight, shape=(head_dim,), dtypes=FLOAT_DTYPES, device=qkv.device)
    heads = [num_heads, num_kv_heads, head_dim]
    return _short_attention(
        qkv, cos_sin, cu_seqlens, max_seqlen, heads, causal, q_weight, k_weight, float(eps), impl
    )


def _short_linear_torch(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    is_swiglu: bool,
) -> tuple[Tensor, Tensor]:
    total = x.new_empty((0,), dtype=torch.float32)
    if norm_weight is not None:
        total = x.clone() if y is None else x + y
        x = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * norm_weight
    out = F.linear(x.to(weight.dtype), weight)
    return (swiglu(out, impl="torch") if is_swiglu else out), total


def _short_linear_triton(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    is_swiglu: bool,
) -> tuple[Tensor, Tensor]:
    from jv5kernels.kernels.short_layer import launch_short_linear

    columns = weight.shape[0] // (2 if is_swiglu else 1)
    out = torch.empty((x.shape[0], columns), dtype=weight.dtype, device=x.device)
    total = torch.empty(
        x.shape if norm_weight is not None else (0,), dtype=torch.float32, device=x.device
    )
    launch_short_linear(
        x, y, norm_weight, weight, eps, is_swiglu, out, None if norm_weight is None else total
    )
    return out, total


def _linear_unsupported(
    x: Tensor, weight: Tensor, y: Tensor | None, norm_weight: Tensor | None, *rest: object
) -> Reason:
    from jv5kernels.kernels.short_layer import fits

    if weight.dtype == torch.float32 and weight.is_cuda:
        return "the kernel's tiles of float32 weights do not fit into shared memory"
    columns = weight.shape[0] // (2 if rest[-1] else 1)
    if not fits(columns, weight.shape[1]):
        return f"the kernel takes N in steps of 32 and K in steps of 256, not {columns} and {weight.shape[1]}"
    return None


def _short_attention_torch(
    qkv: Tensor,
    cos_sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: list[int],
    causal: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    num_heads, num_kv_heads, head_dim = heads
    rows = torch.arange(qkv.shape[0], dtype=torch.int32, device=qkv.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    rotated = qk_norm_rope(
        qkv.clone(),
        rows - cu_seqlens[sequence],
        cos_sin,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        impl="torch",
    )
    q, k, v = rotated.unflatten(-1, (-1, head_dim)).split(
        [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    out = attention_varlen(q, k, v, cu_seqlens, max_seqlen, causal=causal, impl="torch")
    return out.flatten(1)


def _short_attention_triton(
    qkv: Tensor,
    cos_sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: list[int],
    causal: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    from jv5kernels.kernels.short_layer import launch_short_attention

    num_heads, num_kv_heads, head_dim = heads
    out = torch.empty((qkv.shape[0], num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    launch_short_attention(
        qkv,
        cos_sin,
        cu_seqlens,
        q_weight,
        k_weight,
        eps,
        head_dim**-0.5,
        (num_heads, num_kv_heads, head_dim),
        max_seqlen,
        causal,
        out,
    )
    return out


def _fake_linear(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    is_swiglu: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    columns = weight.shape[0] // (2 if is_swiglu else 1)
    total = x.shape if norm_weight is not None else (0,)
    return weight.new_empty((x.shape[0], columns)), x.new_empty(total, dtype=torch.float32)


_short_linear = Operator(
    name="short_linear",
    schema="(Tensor x, Tensor weight, Tensor? y, Tensor? norm_weight, float eps, bool is_swiglu, "
    "str impl) -> (Tensor, Tensor)",
    implementations={
        "triton": Implementation(_short_linear_triton, triton_unavailable, _linear_unsupported),
        "torch": Implementation(_short_linear_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=_fake_linear,
)

_short_attention = Operator(
    name="short_attention",
    schema="(Tensor qkv, Tensor cos_sin, Tensor cu_seqlens, SymInt max_seqlen, int[] heads, "
    "bool causal, Tensor? q_weight, Tensor? k_weight, float eps, str impl) -> Tensor",
    implementations={
        "triton": Implementation(_short_attention_triton, triton_unavailable),
        "torch": Implementation(_short_attention_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda qkv, cos_sin, cu_seqlens, max_seqlen, heads, *_: qkv.new_empty(
        (qkv.shape[0], heads[0] * heads[2])
    ),
)
