"""Per-head RMSNorm of queries and keys and rotary embedding, in place over the fused projection.

Per head x of D values: n = x / sqrt(mean(x²) + eps) · weight (Qwen3 alone), then with h = D/2 and angles
a[i] = position · theta^(-2i/D)

    y[:h] = n[:h]·cos a - n[h:]·sin a,    y[h:] = n[h:]·cos a + n[:h]·sin a

(RoFormer, arXiv 2104.09864, in the half-split order of GPT-NeoX). All arithmetic is in fp32 with one
rounding at the end; Transformers rounds the norm, the angles' cosines and each product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.registry import Implementation, Operator, Reason, triton_unavailable

MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256


def qk_norm_rope(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Normalises and rotates the query and key heads of `qkv` in place and returns it.

    The columns of `qkv` are num_heads query heads, num_kv_heads key heads and num_kv_heads value heads;
    the values stay as they are. Either number may be 0: queries alone, or keys and values alone.

    Args:
        qkv: (T, (num_heads + 2·num_kv_heads)·head_dim), float32, float16 or bfloat16 (float64 with
            impl="torch"); rows may be strided.
        positions: (T,), int32, in 0 to P-1. They are not checked, which would need a host sync: a
            position outside is taken as the nearest row of cos_sin, nothing else is ever read.
        cos_sin: (P, head_dim), float32, contiguous: cosines in the first half of a row, sines in the
            second (`rope_table`).
        num_heads, num_kv_heads: query heads and key heads.
        head_dim: 32, 64, 128 or 256.
        q_weight, k_weight: (head_dim,), weights of the RMSNorms, any of these dtypes; None for models
            without them. A weight whose heads are absent is ignored.
        eps: added to the mean square.
        impl: "auto", "triton" or "torch".

    Returns:
        `qkv` itself.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, one weight without the other, rows that overlap, inputs that
            require gradients, an `impl` that cannot run here.

    Example:
        >>> qkv, table = torch.ones(1, 32), rope_table(2, 32, 10000.0, "cpu")
        >>> position = torch.tensor([1], dtype=torch.int32)
        >>> qk_norm_rope(qkv, position, table, num_heads=1, num_kv_heads=0, head_dim=32)[0, 0]
        tensor(-0.3012)
    """
    check_tensor("qkv", qkv, ndim=2, dtypes=REFERENCE_DTYPES)
    tokens, width = qkv.shape
    check_heads(width, num_heads, num_kv_heads, head_dim)
    if tokens > 1 and qkv.stride(0) < width:
        raise ValueError(f"qkv is written in place: its rows overlap (strides {qkv.stride()})")
    check_rotation(
        tokens,
        positions,
        cos_sin,
        num_heads,
        num_kv_heads,
        head_dim,
        q_weight,
        k_weight,
        qkv.device,
    )
    _qk_norm_rope(
        qkv,
        positions,
        cos_sin,
        num_heads,
        num_kv_heads,
        head_dim,
        q_weight if num_heads else None,
        k_weight if num_kv_heads else None,
        float(eps),
        impl,
    )
    return qkv


def check_rotation(
    tokens: int,
    positions: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    device: torch.device,
) -> None:
    """Raises TypeError or ValueError unless positions, table and weights fit the heads of `tokens` tokens."""
    check_tensor("positions", positions, shape=(tokens,), dtypes=(torch.int32,), device=device)
    check_tensor(
        "cos_sin",
        cos_sin,
        shape=(None, head_dim),
        dtypes=(torch.float32, torch.float64),
        device=device,
    )
    if not cos_sin.is_contiguous() or cos_sin.shape[0] == 0:
        raise ValueError(
            "cos_sin must be contiguous with at least one row, not have shape "
            f"{tuple(cos_sin.shape)} and strides {cos_sin.stride()}"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor(name, weight, shape=(head_dim,), dtypes=REFERENCE_DTYPES, device=device)
    if num_heads and num_kv_heads and (q_weight is None) != (k_weight is None):
        missing = "q_weight" if q_weight is None else "k_weight"
        raise ValueError(f"q_weight and k_weight go together, {missing} is None")


def rope_table(
    max_positions: int, head_dim: int, rope_theta: float, device: torch.device | str
) -> Tensor:
    """Returns the cosines and sines of rotary embedding that `qk_norm_rope` reads.

    The arithmetic is that of Transformers' default RoPE: inverse frequencies, angles, cosines and sines
    in fp32. It is done on the CPU, so that every device holds the same bits.

    Args:
        max_positions: P, number of positions.
        head_dim: D, even.
        rope_theta: base of the frequencies.
        device: where the table is put.

    Returns:
        (P, D), float32: cos(position·theta^(-2i/D)) for i in 0 to D/2-1, then the sines.

    Raises:
        ValueError: fewer than one position, an odd head_dim, a base that is not positive.

    Example:
        >>> rope_table(2, 2, 10000.0, "cpu")
        tensor([[1.0000, 0.0000],
                [0.5403, 0.8415]])
    """
    if max_positions < 1:
        raise ValueError(f"max_positions must be at least 1, not {max_positions}")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even and at least 2, not {head_dim}")
    if not rope_theta > 0:
        raise ValueError(f"rope_theta must be positive, not {rope_theta}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse_frequencies = 1.0 / (rope_theta**exponents)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inverse_frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)


def check_heads(
    width: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    what: str = "qkv",
    axis: str = "columns",
) -> None:
    """Raises ValueError unless `width` is that of the heads of queries, keys and values."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim must be 32, 64, 128 or 256, not {head_dim}")
    for name, heads in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if heads < 0:
            raise ValueError(f"{name} must not be negative, not {heads}")
    if num_heads + num_kv_heads == 0:
        raise ValueError("num_heads and num_kv_heads must not both be 0")
    expected = (num_heads + 2 * num_kv_heads) * head_dim
    if width != expected:
        raise ValueError(
            f"{what} must have (num_heads + 2·num_kv_heads)·head_dim = {expected} {axis}, not {width}"
        )


def _rotate_torch(
    heads: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor
) -> None:
    """Overwrites heads (T, H, D); cos and sin are (T, 1, D/2) in the dtype of the arithmetic."""
    x = heads.to(cos.dtype)
    if weight is not None:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1]
        x = (x * torch.rsqrt(mean_square + eps)).mul_(weight.to(cos.dtype))
    first, second = x.chunk(2, dim=-1)
    rotated_first = (first * cos).addcmul_(second, sin, value=-1)
    rotated_second = (second * cos).addcmul_(first, sin)
    for half, rotated in zip(heads.chunk(2, dim=-1), (rotated_first, rotated_second), strict=True):
        half.copy_(rotated)


def _qk_norm_rope_torch(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    rows = cos_sin[positions.long().clamp(0, cos_sin.shape[0] - 1)]
    cos, sin = rows.to(torch.promote_types(qkv.dtype, torch.float32))[:, None].chunk(2, dim=-1)
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    if num_heads:
        _rotate_torch(heads[:, :num_heads], q_weight, eps, cos, sin)
    if num_kv_heads:
        _rotate_torch(heads[:, num_heads : num_heads + num_kv_heads], k_weight, eps, cos, sin)


def _qk_norm_rope_triton(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    from jv5kernels.kernels.qk_norm_rope import launch_qk_norm_rope

    launch_qk_norm_rope(
        qkv, positions, cos_sin, num_heads, num_kv_heads, head_dim, q_weight, k_weight, eps
    )


def _triton_unsupported(qkv: Tensor, positions: Tensor, cos_sin: Tensor, *_: object) -> Reason:
    if qkv.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {qkv.dtype}"
    if cos_sin.dtype != torch.float32:
        return f"the kernel takes cos_sin in float32, not {cos_sin.dtype}"
    return None


_qk_norm_rope = Operator(
    name="qk_norm_rope",
    schema=(
        "(Tensor(a!) qkv, Tensor positions, Tensor cos_sin, int num_heads, int num_kv_heads, "
        "int head_dim, Tensor? q_weight, Tensor? k_weight, float eps, str impl) -> ()"
    ),
    implementations={
        "triton": Implementation(_qk_norm_rope_triton, triton_unavailable, _triton_unsupported),
        "torch": Implementation(_qk_norm_rope_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda *_: None,
)
