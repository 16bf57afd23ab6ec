"""Pooling: one float32 row a sequence, or a span of tokens: its last token, its first token, or the mean.

Sums are taken in chunks of a constant number of tokens that start at the sequence's first token, and
the chunks are added in a fixed order. So the bits of a sequence's mean do not depend on its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from jv5kernels.ops.checks import FLOAT_DTYPES, REFERENCE_DTYPES, check_cu_seqlens, check_tensor
from jv5kernels.ops.registry import (
    Implementation,
    Operator,
    Reason,
    cpp_unavailable,
    triton_unavailable,
)

if TYPE_CHECKING:
    from jv5kernels.kernels.embed_output import Target

POOLING_MODES = ("lasttoken", "mean", "cls")


def pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    *,
    spans: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Returns one pooled row for every sequence, or for every span.

    Args:
        hidden: (T, C), float32, float16 or bfloat16 (float64 with impl="torch"); rows may be strided.
        cu_seqlens: (B+1,), int32; sequence i is rows cu_seqlens[i]:cu_seqlens[i+1].
        mode: "lasttoken", "mean" or "cls" (the first token).
        spans: (S, 2), int32, half-open ranges [start, end) of packed rows that take the place of the
            sequences, in any order, overlapping or not. Best on the CPU, where a chunker leaves them:
            the host sizes its work by their lengths, and reads them back from any other device.
        impl: "auto", "triton", "cpp" (float32 on the CPU) or "torch".

    Returns:
        (B, C), or (S, C) with spans; float32 (float64 for a float64 input), contiguous. An empty
        sequence or span gives a row of zeros: its length is known on the device alone.

    Raises:
        TypeError: a dtype that is not allowed.
        ValueError: an unknown mode, shapes that do not fit, inputs that require gradients, an `impl`
            that cannot run here, spans that leave the tokens; with "cpp" also such sequences.

    Example:
        >>> hidden = torch.tensor([[1.0], [3.0], [5.0]])
        >>> pool(hidden, torch.tensor([0, 2, 3], dtype=torch.int32), "mean")
        tensor([[2.],
                [5.]])
    """
    check_tensor("hidden", hidden, ndim=2, dtypes=REFERENCE_DTYPES)
    check_cu_seqlens(cu_seqlens, hidden.device)
    check_pooling_mode(mode)
    check_spans(spans, hidden.device)
    return _pool(hidden, cu_seqlens, mode, spans, impl)


def check_pooling_mode(mode: str) -> None:
    """Raises ValueError unless `mode` is one of POOLING_MODES."""
    if mode not in POOLING_MODES:
        raise ValueError(f"mode={mode!r} is unknown: choose one of {list(POOLING_MODES)}")


def check_spans(spans: Tensor | None, device: torch.device) -> None:
    """Checks dtype, shape and device of spans; their values are checked where the host reads them."""
    if spans is None:
        return
    check_tensor("spans", spans, shape=(None, 2), dtypes=(torch.int32,))
    if spans.device.type != "cpu" and spans.device != device:
        raise ValueError(f"spans is on {spans.device}: allowed are cpu and {device}")


def spans_on_host(spans: Tensor, total_tokens: int) -> Tensor:
    """The spans on the CPU, or a ValueError that names the first that leaves the tokens."""
    spans = spans.cpu()
    starts, ends = spans.unbind(1)
    outside = (starts < 0) | (ends < starts) | (ends > total_tokens)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"spans[{row}] is {spans[row].tolist()}: rows must keep 0 <= start <= end <= {total_tokens}"
        )
    return spans


def pooled_ranges(
    cu_seqlens: Tensor, mode: str, spans: Tensor | None, total_tokens: int
) -> list[tuple[int, int]]:
    """The rows [start, end) that each pooled row is the mean of; reads the lengths (a host sync)."""
    if spans is None:
        offsets = cu_seqlens.tolist()
        ranges = list(zip(offsets[:-1], offsets[1:], strict=True))
    else:
        ranges = [(start, end) for start, end in spans_on_host(spans, total_tokens).tolist()]
    if mode == "lasttoken":
        return [(max(start, end - 1), end) for start, end in ranges]
    if mode == "cls":
        return [(start, min(start + 1, end)) for start, end in ranges]
    return ranges


def _pool_torch(hidden: Tensor, cu_seqlens: Tensor, mode: str, spans: Tensor | None) -> Tensor:
    ranges = pooled_ranges(cu_seqlens, mode, spans, hidden.shape[0])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    out = hidden.new_zeros((len(ranges), hidden.shape[1]), dtype=dtype)
    for row, (start, end) in enumerate(ranges):
        if start < end:
            out[row] = hidden[start:end].sum(0, dtype=dtype) / (end - start)
    return out


def _pool_triton(hidden: Tensor, cu_seqlens: Tensor, mode: str, spans: Tensor | None) -> Tensor:
    from jv5kernels.kernels.embed_output import Target

    rows, width = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0], hidden.shape[1]
    out = torch.empty((rows, width), dtype=torch.float32, device=hidden.device)
    flags = torch.empty(rows, dtype=torch.uint8, device=hidden.device)
    target = Target(out, flags, width, normalize=False, ranges=None)
    run_triton(hidden, cu_seqlens, mode, spans, None, 0.0, target)
    return out


def run_triton(
    hidden: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    spans: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    target: Target,
) -> None:
    """Fills a target of kernels/embed_output.py, in one launch."""
    from jv5kernels.kernels.embed_output import launch_means, launch_tokens
    from jv5kernels.kernels.pool import number_of_chunks
    from jv5kernels.kernels.tree import partial_sums

    total_tokens, device = hidden.shape[0], hidden.device
    if spans is not None:
        spans = spans_on_host(spans, total_tokens)
    if mode != "mean":
        bounds = cu_seqlens if spans is None else _sent(spans, device)
        launch_tokens(hidden, bounds, mode == "lasttoken", norm_weight, eps, target)
        return
    if spans is None:
        offsets, table = cu_seqlens, None
        programs = number_of_chunks(total_tokens, target.out.shape[0])
    else:
        offsets, table = None, span_table(spans, device)
        programs = table.shape[0]
    partials = partial_sums(hidden, programs)
    launch_means(hidden, offsets, table, partials, norm_weight, eps, target)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for; from pageable memory, so it is taken at once."""
    return table.clone(memory_format=torch.contiguous_format).to(device, non_blocking=True)


def span_table(spans: Tensor, device: torch.device) -> Tensor:
    """(chunks, 4) int32: span, number of the chunk in it, its first token and its length, for every chunk.

    An empty span has one chunk too: a program that stores its zeros.
    """
    from jv5kernels.kernels.pool import CHUNK

    starts, ends = spans.unbind(1)
    lengths = ends - starts
    counts = ((lengths + CHUNK - 1) // CHUNK).clamp_min(1)
    span_of = torch.repeat_interleave(counts)
    chunk_of = torch.arange(len(span_of)) - (counts.cumsum(0) - counts)[span_of]
    columns = [span_of, chunk_of, starts[span_of], lengths[span_of]]
    return _sent(torch.stack([column.int() for column in columns], 1), device)


def _pool_cpp(hidden: Tensor, cu_seqlens: Tensor, mode: str, spans: Tensor | None) -> Tensor:
    from jv5kernels import _C

    spans = None if spans is None else spans_on_host(spans, hidden.shape[0])
    address, rows, step = native_ranges(cu_seqlens, spans)
    out = torch.empty((rows, hidden.shape[1]), dtype=torch.float32)
    status = _C.pool_float32(
        hidden.data_ptr(),
        hidden.shape[0],
        hidden.shape[1],
        hidden.stride(0),
        address,
        rows,
        step,
        POOLING_MODES.index(mode),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    check_native_status(status)
    return out


def native_ranges(cu_seqlens: Tensor, spans: Tensor | None) -> tuple[int, int, int]:
    """Address of the first range, number of ranges, and elements from one to the next, for jv5kernels._C."""
    if spans is None:
        return cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, cu_seqlens.stride(0)
    return spans.data_ptr(), spans.shape[0], spans.stride(0)


def check_native_status(status: int) -> None:
    """Raises the error that a status of jv5kernels._C stands for."""
    if status == 1:
        raise ValueError(
            "cu_seqlens and spans must give rows 0 <= start <= end <= T, and T is the length of hidden"
        )
    if status != 0:
        raise MemoryError("jv5kernels._C could not allocate its working memory")


def cpp_unsupported(hidden: Tensor, *_: object) -> Reason:
    """Why the C++ kernels cannot take `hidden`, or None."""
    if hidden.dtype != torch.float32:
        return f"takes float32, not {hidden.dtype}"
    return None


def triton_unsupported(hidden: Tensor, *_: object) -> Reason:
    """Why the Triton kernels cannot take `hidden`, or None."""
    if hidden.dtype not in FLOAT_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16, not {hidden.dtype}"
    return None


def _fake(hidden: Tensor, cu_seqlens: Tensor, mode: str, spans: Tensor | None, impl: str) -> Tensor:
    rows = cu_seqlens.shape[0] - 1 if spans is None else spans.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty((rows, hidden.shape[1]), dtype=dtype)


_pool = Operator(
    name="pool",
    schema="(Tensor hidden, Tensor cu_seqlens, str mode, Tensor? spans, str impl) -> Tensor",
    implementations={
        "triton": Implementation(_pool_triton, triton_unavailable, triton_unsupported),
        "cpp": Implementation(_pool_cpp, cpp_unavailable, cpp_unsupported),
        "torch": Implementation(_pool_torch),
    },
    auto={"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")},
    fake=_fake,
)
