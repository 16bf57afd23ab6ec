"""The first half of the MLP in one kernel: the gate and up projections, and SwiGLU in their epilogue.

y = silu(x · Wgᵀ) · (x · Wuᵀ). The intermediate, twice as wide as y, is neither rounded nor written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.linear import linear
from jv5kernels.ops.registry import Implementation, Operator, Reason, gluon_unavailable
from jv5kernels.ops.swiglu import swiglu

# Fewer rows leave multiprocessors without a tile; there the library's GEMM, with smaller tiles, and a kernel
# for the rest are faster. Not with batch_invariant, which knows one way for every number of rows.
FUSED_ROWS = 1024


def linear_swiglu(
    x: Tensor, weight: Tensor, *, batch_invariant: bool = False, impl: str = "auto"
) -> Tensor:
    """Returns silu(x · gateᵀ) · (x · upᵀ), where gate is the first half of the weight's rows and up the second.

    Args:
        x: (T, K), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        weight: (2·F, K), dtype of x; rows may be strided.
        batch_invariant: as in `linear`.
        impl: "auto", "gluon" (one kernel, fp32 up to one rounding; sm_90, 16-bit dtypes, rows that start at multiples
            of 16 bytes) or "torch" (`linear` and then `swiglu`, each by its own "auto"; the intermediate is rounded).
            "auto" is "gluon" where that can run and there are FUSED_ROWS rows or batch_invariant.

    Returns:
        (T, F), dtype of x, contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: shapes that do not fit, inputs that require gradients, an `impl` that cannot run here
            or cannot be batch invariant.

    Example:
        >>> linear_swiglu(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        tensor([[5.2848]])
    """
    check_tensor("x", x, ndim=2, dtypes=REFERENCE_DTYPES)
    check_tensor("weight", weight, shape=(None, x.shape[1]), dtypes=(x.dtype,), device=x.device)
    if weight.shape[0] % 2:
        raise ValueError(
            f"weight must have an even number of rows, not shape {tuple(weight.shape)}"
        )
    if impl == "auto" and not batch_invariant and x.shape[0] < FUSED_ROWS:
        impl = "torch"
    return _linear_swiglu(x, weight, batch_invariant, impl)


def keeps_intermediate(x: Tensor, weight: Tensor, batch_invariant: bool) -> bool:
    """Whether "auto" computes these without writing the intermediate (T, 2·F)."""
    if not batch_invariant and x.shape[0] < FUSED_ROWS:
        return False
    first = _linear_swiglu.auto[x.device.type][0]
    inputs = (x, weight, batch_invariant)
    return first == "gluon" and _linear_swiglu.reason_against(first, x.device, inputs) is None


def _linear_swiglu_torch(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    return swiglu(linear(x, weight, batch_invariant=batch_invariant))


def _linear_swiglu_gluon(x: Tensor, weight: Tensor, batch_invariant: bool) -> Tensor:
    from jv5kernels.kernels.linear_swiglu import launch_linear_swiglu

    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device)
    launch_linear_swiglu(x, weight, out)
    return out


def _gluon_unsupported(x: Tensor, weight: Tensor, batch_invariant: bool) -> Reason:
    if x.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float16 and bfloat16, not {x.dtype}"
    from jv5kernels.kernels.linear_swiglu import reason_against

    return reason_against(x, weight)


_linear_swiglu = Operator(
    name="linear_swiglu",
    schema="(Tensor x, Tensor weight, bool batch_invariant, str impl) -> Tensor",
    implementations={
        "gluon": Implementation(_linear_swiglu_gluon, gluon_unavailable, _gluon_unsupported),
        "torch": Implementation(_linear_swiglu_torch),
    },
    auto={"cuda": ("gluon", "torch"), "cpu": ("torch",)},
    fake=lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[0] // 2)),
)
