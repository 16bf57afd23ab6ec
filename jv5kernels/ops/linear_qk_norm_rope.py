"""The fused projection of queries, keys and values, with q/k norm and rotary embedding in its epilogue.

qkv = x · weightᵀ, then `qk_norm_rope` of it. In one kernel the products are normed and rotated before they are rounded,
and the projection is written once instead of being read and written again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.linear import linear
from jv5kernels.ops.linear_swiglu import FUSED_ROWS
from jv5kernels.ops.qk_norm_rope import check_heads, check_rotation, qk_norm_rope
from jv5kernels.ops.registry import Implementation, Operator, Reason, gluon_unavailable


def linear_qk_norm_rope(
    x: Tensor,
    weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    batch_invariant: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Returns x · weightᵀ with its query and key heads normed and rotated; its value heads stay as they are.

    Args:
        x: (T, K), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        weight: ((num_heads + 2·num_kv_heads)·head_dim, K), dtype of x, the rows of queries, keys and values in that
            order; rows may be strided.
        positions, cos_sin, num_heads, num_kv_heads, head_dim, q_weight, k_weight, eps: as in `qk_norm_rope`.
        batch_invariant: as in `linear`.
        impl: "auto", "gluon" (one kernel, fp32 up to one rounding; sm_90, 16-bit dtypes, head_dim 64 or 128, numbers of
            heads that are multiples of 256 / head_dim, rows that start at multiples of 16 bytes) or "torch" (`linear`
            and then `qk_norm_rope`, each by its own "auto"; the projection is rounded before its heads are). "auto" is
            "gluon" where that can run and there are FUSED_ROWS rows or batch_invariant.

    Returns:
        (T, (num_heads + 2·num_kv_heads)·head_dim), dtype of x, contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, one weight without the other, inputs that require gradients, an `impl` that
            cannot run here or cannot be batch invariant.

    Example:
        >>> table = rope_table(2, 32, 10000.0, "cpu")
        >>> x, weight, position = torch.ones(1, 1), torch.ones(32, 1), torch.tensor([1], dtype=torch.int32)
        >>> linear_qk_norm_rope(x, weight, position, table, num_heads=1, num_kv_heads=0, head_dim=32)[0, 0]
        tensor(-0.3012)
    """
    check_tensor("x", x, ndim=2, dtypes=REFERENCE_DTYPES)
    check_tensor("weight", weight, shape=(None, x.shape[1]), dtypes=(x.dtype,), device=x.device)
    check_heads(weight.shape[0], num_heads, num_kv_heads, head_dim, "weight", "rows")
    check_rotation(
        x.shape[0],
        positions,
        cos_sin,
        num_heads,
        num_kv_heads,
        head_dim,
        q_weight,
        k_weight,
        x.device,
    )
    if impl == "auto" and not batch_invariant and x.shape[0] < FUSED_ROWS:
        impl = "torch"
    return _linear_qk_norm_rope(
        x,
        weight,
        positions,
        cos_sin,
        num_heads,
        num_kv_heads,
        head_dim,
        q_weight if num_heads else None,
        k_weight if num_kv_heads else None,
        float(eps),
        batch_invariant,
        impl,
    )


def _linear_qk_norm_rope_torch(
    x: Tensor,
    weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    batch_invariant: bool,
) -> Tensor:
    return qk_norm_rope(
        linear(x, weight, batch_invariant=batch_invariant),
        positions,
        cos_sin,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
    )


def _linear_qk_norm_rope_gluon(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    from jv5kernels.kernels.linear_qk_norm_rope import launch_linear_qk_norm_rope

    *rotation, _ = others  # its bits never depend on the batch
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    launch_linear_qk_norm_rope(x, weight, *rotation, out)
    return out


def _gluon_unsupported(
    x: Tensor,
    weight: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *_: object,
) -> Reason:
    if x.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float16 and bfloat16, not {x.dtype}"
    if cos_sin.dtype != torch.float32:
        return f"the kernel takes cos_sin in float32, not {cos_sin.dtype}"
    from jv5kernels.kernels.linear_qk_norm_rope import reason_against

    return reason_against(x, weight, num_heads, num_kv_heads, head_dim)


_linear_qk_norm_rope = Operator(
    name="linear_qk_norm_rope",
    schema=(
        "(Tensor x, Tensor weight, Tensor positions, Tensor cos_sin, int num_heads, int num_kv_heads, int head_dim, "
        "Tensor? q_weight, Tensor? k_weight, float eps, bool batch_invariant, str impl) -> Tensor"
    ),
    implementations={
        "gluon": Implementation(_linear_qk_norm_rope_gluon, gluon_unavailable, _gluon_unsupported),
        "torch": Implementation(_linear_qk_norm_rope_torch),
    },
    auto={"cuda": ("gluon", "torch"), "cpu": ("torch",)},
    fake=lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[0])),
)
