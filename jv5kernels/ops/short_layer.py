"""The steps of a layer over a few tokens, each in one kernel.

For up to SHORT_TOKENS tokens a layer is bound by reading its weights and by the launches between. The matrix products
add up in another order than those of the library or of `linear`, so a row may differ from theirs in its last bits.
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

SHORT_TOKENS = 16  # one tile of rows
HEAD_DIMS = (32, 64, 128)


def short_norm(
    x: Tensor, y: Tensor | None, norm_weight: Tensor, eps: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Returns RMSNorm(x + y) and x + y, as `add_rms_norm` does, in a kernel that overlaps with the next one.

    Args:
        x: (T, K) float32 or dtype of norm_weight, contiguous.
        y: (T, K), dtype of norm_weight, contiguous; None adds nothing.
        norm_weight: (K,) float32, float16 or bfloat16.
        eps: added to the mean square.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, K), dtype of norm_weight, and (T, K) float32.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, inputs that require gradients, an `impl` that cannot run here.

    Example:
        >>> short_norm(torch.full((1, 2), 3.0), None, torch.ones(2), 0.0)[0]
        tensor([[1., 1.]])
    """
    check_tensor("norm_weight", norm_weight, ndim=1, dtypes=FLOAT_DTYPES)
    check_tensor(
        "x",
        x,
        shape=(None, norm_weight.shape[0]),
        dtypes=(torch.float32, norm_weight.dtype),
        device=norm_weight.device,
    )
    _check_contiguous("x", x)
    if y is not None:
        check_tensor("y", y, shape=tuple(x.shape), dtypes=(norm_weight.dtype,), device=x.device)
        _check_contiguous("y", y)
    return _short_norm(x, y, norm_weight, float(eps), impl)


def short_linear(
    x: Tensor, weight: Tensor, *, is_swiglu: bool = False, impl: str = "auto"
) -> Tensor:
    """Returns the projection x · weightᵀ of a few rows; with `is_swiglu` silu(gate) · up of it.

    Args:
        x: (T, K), T at most SHORT_TOKENS, contiguous, dtype of weight.
        weight: (N, K), or (2·N, K) with `is_swiglu` (gate and then up rows), contiguous, float32, float16 or bfloat16.
        impl: "auto", "triton" (N in steps of 32, K of 256, as far as registers go) or "torch".

    Returns:
        (T, N), dtype of weight.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, too many rows, inputs that require gradients, an `impl` that cannot run
            here.

    Example:
        >>> short_linear(torch.ones(1, 2), torch.ones(3, 2))
        tensor([[2., 2., 2.]])
    """
    check_tensor("weight", weight, ndim=2, dtypes=FLOAT_DTYPES)
    check_tensor(
        "x", x, shape=(None, weight.shape[1]), dtypes=(weight.dtype,), device=weight.device
    )
    if x.shape[0] > SHORT_TOKENS:
        raise ValueError(f"x has {x.shape[0]} rows: at most {SHORT_TOKENS} are short")
    if is_swiglu and weight.shape[0] % 2:
        raise ValueError(f"weight has {weight.shape[0]} rows, which are not gate and up alike")
    _check_contiguous("x", x)
    _check_contiguous("weight", weight)
    return _short_linear(x, weight, is_swiglu, impl)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not have strides {tensor.stride()}")


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


def _short_norm_torch(
    x: Tensor, y: Tensor | None, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x.to(torch.float32, copy=True) if y is None else x.float() + y
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * norm_weight
    return normed.to(norm_weight.dtype), total


def _short_norm_triton(
    x: Tensor, y: Tensor | None, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from jv5kernels.kernels.short_layer import launch_short_norm

    out = torch.empty_like(x, dtype=norm_weight.dtype)
    total = torch.empty_like(x, dtype=torch.float32)
    launch_short_norm(x, y, norm_weight, eps, out, total)
    return out, total


def _short_linear_torch(x: Tensor, weight: Tensor, is_swiglu: bool) -> Tensor:
    out = F.linear(x, weight)
    return swiglu(out, impl="torch") if is_swiglu else out


def _short_linear_triton(x: Tensor, weight: Tensor, is_swiglu: bool) -> Tensor:
    from jv5kernels.kernels.short_layer import launch_short_linear

    out = _projected(x, weight, is_swiglu)
    launch_short_linear(x, weight, is_swiglu, out)
    return out


def _projected(x: Tensor, weight: Tensor, is_swiglu: bool) -> Tensor:
    return weight.new_empty((x.shape[0], weight.shape[0] // (2 if is_swiglu else 1)))


def _linear_unsupported(x: Tensor, weight: Tensor, is_swiglu: bool, *_: object) -> Reason:
    from jv5kernels.kernels.short_layer import fits

    if weight.dtype == torch.float32 and weight.is_cuda:
        return "the kernel's tiles of float32 weights do not fit into registers"
    columns = weight.shape[0] // (2 if is_swiglu else 1)
    if not fits(columns, weight.shape[1], is_swiglu):
        return (
            "the kernel takes N in steps of 32 and K in steps of 256 as far as registers go, "
            f"not {columns} and {weight.shape[1]}"
        )
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
        causal,
        out,
    )
    return out


_short_norm = Operator(
    name="short_norm",
    schema="(Tensor x, Tensor? y, Tensor norm_weight, float eps, str impl) -> (Tensor, Tensor)",
    implementations={
        "triton": Implementation(_short_norm_triton, triton_unavailable),
        "torch": Implementation(_short_norm_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda x, y, norm_weight, *_: (
        torch.empty_like(x, dtype=norm_weight.dtype),
        torch.empty_like(x, dtype=torch.float32),
    ),
)

_short_linear = Operator(
    name="short_linear",
    schema="(Tensor x, Tensor weight, bool is_swiglu, str impl) -> Tensor",
    implementations={
        "triton": Implementation(_short_linear_triton, triton_unavailable, _linear_unsupported),
        "torch": Implementation(_short_linear_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda x, weight, is_swiglu, *_: _projected(x, weight, is_swiglu),
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
