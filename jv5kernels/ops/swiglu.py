"""The gate of the MLP: SwiGLU over the fused gate and up projections.

y = silu(gate) · up with silu(g) = g / (1 + exp(-g)) (Shazeer, arXiv 2002.05202). All arithmetic is in
fp32 with one rounding at the end; Transformers rounds silu(gate) once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_tensor
from jv5kernels.ops.registry import Implementation, Operator, Reason, triton_unavailable


def swiglu(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """Returns silu(gate) · up, where the first half of every row is gate and the second half up.

    Args:
        gate_up: (T, 2·F), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        impl: "auto", "triton" or "torch".

    Returns:
        (T, F), dtype of gate_up, contiguous.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: an odd number of columns, strides that do not fit, inputs that require gradients, an
            `impl` that cannot run here.

    Example:
        >>> swiglu(torch.tensor([[0.0, 2.0, 5.0, 3.0]]))
        tensor([[0.0000, 5.2848]])
    """
    check_tensor("gate_up", gate_up, ndim=2, dtypes=REFERENCE_DTYPES)
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up must have an even number of columns, not shape {tuple(gate_up.shape)}"
        )
    return _swiglu(gate_up, impl)


def _swiglu_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    accumulation = torch.promote_types(gate_up.dtype, torch.float32)
    return F.silu(gate.to(accumulation)).mul_(up).to(gate_up.dtype)


def _swiglu_triton(gate_up: Tensor) -> Tensor:
    from jv5kernels.kernels.swiglu import launch_swiglu

    out = torch.empty(_out_shape(gate_up), dtype=gate_up.dtype, device=gate_up.device)
    launch_swiglu(gate_up, out)
    return out


def _triton_unsupported(gate_up: Tensor) -> Reason:
    if gate_up.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {gate_up.dtype}"
    return None


def _out_shape(gate_up: Tensor) -> tuple[int, int]:
    return gate_up.shape[0], gate_up.shape[1] // 2


_swiglu = Operator(
    name="swiglu",
    schema="(Tensor gate_up, str impl) -> Tensor",
    implementations={
        "triton": Implementation(_swiglu_triton, triton_unavailable, _triton_unsupported),
        "torch": Implementation(_swiglu_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("torch",)},
    fake=lambda gate_up, impl: gate_up.new_empty(_out_shape(gate_up)),
)
