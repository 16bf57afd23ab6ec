"""From the last hidden states to embeddings: final RMSNorm, pooling, slice, L2 normalisation, cast.

The order is that of the jina-embeddings-v5-text models: norm every pooled token, pool, keep the
first `truncate_dim` dimensions, then divide by the length of what was kept. Everything is fp32 until
the cast at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_cu_seqlens, check_tensor
from jv5kernels.ops.pool import (
    POOLING_MODES,
    check_native_status,
    check_pooling_mode,
    cpp_unsupported,
    native_ranges,
    partial_sums,
    pooled_ranges,
)
from jv5kernels.ops.registry import (
    Implementation,
    Operator,
    Reason,
    cpp_unavailable,
    triton_unavailable,
)

# torch.nn.functional.normalize divides by max(‖x‖, this).
NORMALIZE_EPS = 1e-12


def embed_output(
    hidden: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: str,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    truncate_dim: int | None = None,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns the embeddings of packed sequences and a flag for each that holds NaN or Inf.

    Args:
        hidden: (T, C) before the final norm, float32, float16 or bfloat16 (float64 with
            impl="torch"); rows may be strided.
        cu_seqlens: (B+1,), int32; sequence i is rows cu_seqlens[i]:cu_seqlens[i+1].
        mode: "lasttoken", "mean" or "cls" (the first token).
        norm_weight: (C,), weight of the final RMSNorm; None means that hidden is already normed.
        eps: added to the mean square by the RMSNorm.
        truncate_dim: dimensions to keep, 1 to C; None keeps all.
        normalize: whether to divide each row by max(‖row‖, 1e-12), after the slice.
        dtype: of the embeddings: float32, float16 or bfloat16 (or float64, for a float64 input).
        impl: "auto", "triton", "cpp" (float32 on the CPU) or "torch".

    Returns:
        (B, truncate_dim) embeddings, contiguous, and (B,) uint8 flags: 1 where the row or its length
        is not finite. An empty sequence gives zeros and the flag 0.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: an unknown mode, a dimension out of range, shapes that do not fit, inputs that
            require gradients, an `impl` that cannot run here; with "cpp" also cu_seqlens that leave
            the tokens.

    Example:
        >>> hidden = torch.tensor([[9.0, 9.0], [3.0, 4.0]])
        >>> embed_output(hidden, torch.tensor([0, 2], dtype=torch.int32), mode="lasttoken")[0]
        tensor([[0.6000, 0.8000]])
    """
    check_tensor("hidden", hidden, ndim=2, dtypes=REFERENCE_DTYPES)
    check_cu_seqlens(cu_seqlens, hidden.device)
    check_pooling_mode(mode)
    width = hidden.shape[1]
    if norm_weight is not None:
        check_tensor(
            "norm_weight",
            norm_weight,
            shape=(width,),
            dtypes=REFERENCE_DTYPES,
            device=hidden.device,
        )
    dim = width if truncate_dim is None else truncate_dim
    if not 1 <= dim <= width:
        raise ValueError(f"truncate_dim must lie in 1 to {width}, not be {truncate_dim}")
    _check_output_dtype(dtype, hidden.dtype)
    return _embed_output(
        hidden, cu_seqlens, mode, norm_weight, float(eps), dim, normalize, dtype, impl
    )


def _check_output_dtype(dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    allowed = (*FLOAT_DTYPES, torch.float64) if input_dtype == torch.float64 else FLOAT_DTYPES
    if dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"dtype must be one of {names}, not {str(dtype).removeprefix('torch.')}")


def _embed_output_torch(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    norm_weight: Tensor | None,
    eps: float,
    dim: int,
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    ranges = pooled_ranges(cu_seqlens, mode, None)
    compute = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.new_zeros((len(ranges), hidden.shape[1]), dtype=compute)
    for row, (start, end) in enumerate(ranges):
        tokens = hidden[start:end].to(compute)
        if norm_weight is not None:
            tokens = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + eps)
        if start < end:
            rows[row] = tokens.sum(0) / (end - start)
    if norm_weight is not None:
        rows *= norm_weight.to(compute)
    rows = rows[:, :dim]
    finite = torch.ones(len(ranges), dtype=torch.bool, device=hidden.device)
    if normalize:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        finite &= length.isfinite()[:, 0]
        rows = rows / length.clamp_min(NORMALIZE_EPS)
    out = rows.to(dtype, copy=True).contiguous()
    finite &= out.isfinite().all(-1)
    return out, (~finite).to(torch.uint8)


def _embed_output_cpp(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    norm_weight: Tensor | None,
    eps: float,
    dim: int,
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from jv5kernels import _C

    address, rows, step = native_ranges(cu_seqlens, None)
    weight = None if norm_weight is None else norm_weight.float().contiguous()
    out = torch.empty((rows, dim), dtype=torch.float32)
    flags = torch.empty(rows, dtype=torch.uint8)
    status = _C.embed_output_float32(
        hidden.data_ptr(),
        hidden.shape[0],
        hidden.shape[1],
        hidden.stride(0),
        address,
        rows,
        step,
        POOLING_MODES.index(mode),
        0 if weight is None else weight.data_ptr(),
        eps,
        dim,
        normalize,
        out.data_ptr(),
        flags.data_ptr(),
        torch.get_num_threads(),
    )
    check_native_status(status)
    if dtype != torch.float32:
        out = out.to(dtype)
        # The cast overflows where a row is not normalised.
        flags |= (~out.isfinite().all(-1)).to(torch.uint8)
    return out, flags


def _embed_output_triton(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    norm_weight: Tensor | None,
    eps: float,
    dim: int,
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from jv5kernels.kernels.embed_output import launch_embed_output
    from jv5kernels.kernels.pool import launch_pool_mean

    sequences = cu_seqlens.shape[0] - 1
    out = torch.empty((sequences, dim), dtype=dtype, device=hidden.device)
    flags = torch.empty(sequences, dtype=torch.uint8, device=hidden.device)
    if mode == "mean":
        shape = (sequences, hidden.shape[1])
        means = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        partials = partial_sums(hidden, cu_seqlens)
        launch_pool_mean(hidden, cu_seqlens, norm_weight, eps, partials, means)
        hidden, norm_weight = means, None
    launch_embed_output(hidden, cu_seqlens, mode, norm_weight, eps, normalize, out, flags)
    return out, flags


def _triton_unsupported(hidden: Tensor, *_: object) -> Reason:
    if hidden.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {hidden.dtype}"
    return None


def _fake(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    norm_weight: Tensor | None,
    eps: float,
    dim: int,
    normalize: bool,
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rows = cu_seqlens.shape[0] - 1
    return hidden.new_empty((rows, dim), dtype=dtype), hidden.new_empty((rows,), dtype=torch.uint8)


_embed_output = Operator(
    name="embed_output",
    schema=(
        "(Tensor hidden, Tensor cu_seqlens, str mode, Tensor? norm_weight, float eps, int dim, "
        "bool normalize, ScalarType dtype, str impl) -> (Tensor, Tensor)"
    ),
    implementations={
        "triton": Implementation(_embed_output_triton, triton_unavailable, _triton_unsupported),
        "cpp": Implementation(_embed_output_cpp, cpp_unavailable, cpp_unsupported),
        "torch": Implementation(_embed_output_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")},
    fake=_fake,
)
