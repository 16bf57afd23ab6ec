"""From the last hidden states to what a vector store keeps: norm, pool, slice, L2, and a cast or quantisation.

The order is that of the jina-embeddings-v5-text models: norm every pooled token, pool, keep the
first `truncate_dim` dimensions, then divide by the length of what was kept. Everything is fp32 until
the last step, which casts, or quantises as ops/quantize.py defines it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jv5kernels.ops.checks import REFERENCE_DTYPES, check_cu_seqlens, check_tensor
from jv5kernels.ops.pool import (
    POOLING_MODES,
    check_native_status,
    check_pooling_mode,
    check_spans,
    cpp_unsupported,
    native_ranges,
    pooled_ranges,
    run_triton,
    spans_on_host,
    triton_unsupported,
)
from jv5kernels.ops.quantize import (
    BINARY_PRECISIONS,
    INT8_PRECISIONS,
    check_precision,
    quantize_binary,
    quantize_int8,
)
from jv5kernels.ops.registry import (
    Implementation,
    Operator,
    cpp_unavailable,
    triton_unavailable,
)

# torch.nn.functional.normalize divides by max(‖x‖, this).
NORMALIZE_EPS = 1e-12
FLOAT_PRECISIONS = ("float32", "float16", "bfloat16")
OUTPUT_PRECISIONS = (*FLOAT_PRECISIONS, *INT8_PRECISIONS, *BINARY_PRECISIONS)


def embed_output(
    hidden: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: str,
    spans: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    truncate_dim: int | None = None,
    normalize: bool = True,
    precision: str = "float32",
    ranges: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Returns the embeddings of packed sequences or spans, and a flag for each that holds NaN or Inf.

    Args:
        hidden: (T, C) before the final norm, float32, float16 or bfloat16 (float64 with
            impl="torch"); rows may be strided.
        cu_seqlens: (B+1,), int32; sequence i is rows cu_seqlens[i]:cu_seqlens[i+1].
        mode: "lasttoken", "mean" or "cls" (the first token), of each sequence or span.
        spans: (S, 2), int32, half-open ranges [start, end) of rows of hidden that take the place of
            the sequences, in any order, overlapping or not. Best on the CPU, where a chunker leaves
            them: the host sizes its work by their lengths, and reads them back from another device.
        norm_weight: (C,), weight of the final RMSNorm; None means that hidden is already normed.
        eps: added to the mean square by the RMSNorm.
        truncate_dim: dimensions to keep, 1 to C; None keeps all.
        normalize: whether to divide each row by max(‖row‖, 1e-12), after the slice.
        precision: "float32", "float16", "bfloat16"; "int8" or "uint8" (one byte a dimension, as
            quantize_int8); "binary" or "ubinary" (one bit a dimension, as quantize_binary).
        ranges: (2, truncate_dim), float32, minima and maxima of the dimensions; for int8 and uint8.
        impl: "auto", "triton", "cpp" (float32 on the CPU) or "torch".

    Returns:
        values (rows, truncate_dim), or (rows, ceil(truncate_dim / 8)) for bits, contiguous, one row
        a sequence or span; and (rows,) uint8 flags: 1 where the embedding or its length is not finite
        before it is quantised. An empty sequence or span has the embedding zero and the flag 0.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: an unknown mode or precision, a dimension out of range, ranges missing or not
            wanted, shapes that do not fit, spans that leave the tokens, inputs that require
            gradients, an `impl` that cannot run here; with "cpp" also such cu_seqlens.

    Example:
        >>> hidden = torch.tensor([[9.0, 9.0], [3.0, 4.0]])
        >>> embed_output(hidden, torch.tensor([0, 2], dtype=torch.int32), mode="lasttoken")[0]
        tensor([[0.6000, 0.8000]])
    """
    check_tensor("hidden", hidden, ndim=2, dtypes=REFERENCE_DTYPES)
    check_cu_seqlens(cu_seqlens, hidden.device)
    check_pooling_mode(mode)
    check_spans(spans, hidden.device)
    device, width = hidden.device, hidden.shape[1]
    if norm_weight is not None:
        check_tensor(
            "norm_weight", norm_weight, shape=(width,), dtypes=REFERENCE_DTYPES, device=device
        )
    dim = width if truncate_dim is None else truncate_dim
    if not 1 <= dim <= width:
        raise ValueError(f"truncate_dim must lie in 1 to {width}, not be {truncate_dim}")
    check_precision(precision, OUTPUT_PRECISIONS)
    _check_ranges(ranges, precision, dim, device)
    return _embed_output(
        hidden,
        cu_seqlens,
        mode,
        spans,
        norm_weight,
        float(eps),
        dim,
        normalize,
        precision,
        ranges,
        impl,
    )


def _check_ranges(ranges: Tensor | None, precision: str, dim: int, device: torch.device) -> None:
    if precision in INT8_PRECISIONS:
        if ranges is None:
            raise ValueError(f"precision={precision!r} needs ranges, shape (2, {dim})")
        check_tensor("ranges", ranges, shape=(2, dim), dtypes=(torch.float32,), device=device)
    elif ranges is not None:
        raise ValueError(f"precision={precision!r} takes no ranges: int8 and uint8 do")


def output_layout(precision: str, dim: int) -> tuple[int, torch.dtype]:
    """Stored values a row and their dtype, for embeddings of `dim` dimensions."""
    if precision in BINARY_PRECISIONS:
        return -(-dim // 8), torch.uint8 if precision == "ubinary" else torch.int8
    return dim, getattr(torch, precision)


def _embed_output_torch(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    spans: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    dim: int,
    normalize: bool,
    precision: str,
    ranges: Tensor | None,
) -> tuple[Tensor, Tensor]:
    pooled = pooled_ranges(cu_seqlens, mode, spans, hidden.shape[0])
    compute = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.new_zeros((len(pooled), hidden.shape[1]), dtype=compute)
    for row, (start, end) in enumerate(pooled):
        tokens = hidden[start:end].to(compute)
        if norm_weight is not None:
            tokens = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + eps)
        if start < end:
            rows[row] = tokens.sum(0) / (end - start)
    if norm_weight is not None:
        rows *= norm_weight.to(compute)
    rows = rows[:, :dim]
    finite = torch.ones(len(pooled), dtype=torch.bool, device=hidden.device)
    if normalize:
        length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        finite &= length.isfinite()[:, 0]
        rows = rows / length.clamp_min(NORMALIZE_EPS)
    rows = rows.float()
    finite &= rows.isfinite().all(-1)
    if precision in BINARY_PRECISIONS:
        return quantize_binary(rows, precision, impl="torch"), (~finite).to(torch.uint8)
    if ranges is not None:
        return quantize_int8(rows, ranges, precision, impl="torch"), (~finite).to(torch.uint8)
    out = rows.to(getattr(torch, precision), copy=True).contiguous()
    finite &= out.isfinite().all(-1)
    return out, (~finite).to(torch.uint8)


def _embed_output_cpp(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    spans: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    dim: int,
    normalize: bool,
    precision: str,
    ranges: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from jv5kernels import _C

    spans = None if spans is None else spans_on_host(spans, hidden.shape[0])
    address, rows, step = native_ranges(cu_seqlens, spans)
    weight = None if norm_weight is None else norm_weight.float().contiguous()
    ranges = None if ranges is None else ranges.contiguous()
    # Halves are cast from float32 rows.
    stored = "float32" if precision in FLOAT_PRECISIONS else precision
    out, flags = _empty_outputs(hidden, rows, stored, dim)
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
        _stored_kind(precision),
        0 if ranges is None else ranges.data_ptr(),
        0x80 if precision in ("int8", "binary") else 0,
        out.data_ptr(),
        flags.data_ptr(),
        torch.get_num_threads(),
    )
    check_native_status(status)
    if stored != precision:
        out = out.to(getattr(torch, precision))
        # The cast overflows where a row is not normalised.
        flags |= (~out.isfinite().all(-1)).to(torch.uint8)
    return out, flags


def _stored_kind(precision: str) -> int:
    """What a row holds, as jv5kernels._C numbers it: floats, a byte a column, a bit a column."""
    return 1 if precision in INT8_PRECISIONS else 2 if precision in BINARY_PRECISIONS else 0


def _embed_output_triton(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    spans: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    dim: int,
    normalize: bool,
    precision: str,
    ranges: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from jv5kernels.kernels.embed_output import Target

    rows = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    out, flags = _empty_outputs(hidden, rows, precision, dim)
    target = Target(out, flags, dim, normalize, ranges)
    run_triton(hidden, cu_seqlens, mode, spans, norm_weight, eps, target)
    return out, flags


def _empty_outputs(hidden: Tensor, rows: int, precision: str, dim: int) -> tuple[Tensor, Tensor]:
    width, dtype = output_layout(precision, dim)
    out = torch.empty((rows, width), dtype=dtype, device=hidden.device)
    return out, torch.empty(rows, dtype=torch.uint8, device=hidden.device)


def _fake(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    spans: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    dim: int,
    normalize: bool,
    precision: str,
    ranges: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    rows = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    return _empty_outputs(hidden, rows, precision, dim)


_embed_output = Operator(
    name="embed_output",
    schema=(
        "(Tensor hidden, Tensor cu_seqlens, str mode, Tensor? spans, Tensor? norm_weight, float eps, "
        "int dim, bool normalize, str precision, Tensor? ranges, str impl) -> (Tensor, Tensor)"
    ),
    implementations={
        "triton": Implementation(_embed_output_triton, triton_unavailable, triton_unsupported),
        "cpp": Implementation(_embed_output_cpp, cpp_unavailable, cpp_unsupported),
        "torch": Implementation(_embed_output_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")},
    fake=_fake,
)
