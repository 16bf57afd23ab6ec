"""Sums of rows over programs: a tree of partial sums in memory, in one launch and without a bit left to chance.

The sums of a row's chunks are the leaves. A node has FAN children, of which the last to arrive adds them all and goes
on to the node above; the one that reaches the root has the row's sum. Which one that is changes no bit: sums go in an
order that the number of chunks fixes.

Arrivals are counted in words that need no initial value, so the memory may be any and no launch has to clear it: see
`open_counter`.
"""

from __future__ import annotations

import itertools
import secrets

import torch
import triton
import triton.language as tl

# Children of a node: sums that are loaded before the first two are added.
FAN = tl.constexpr(8)
# A call's number is written into its counters, above 16 bits of count. It starts at random so that memory which
# other programs left behind holds it with a chance of 2⁻⁴⁵.
COUNT_BITS = tl.constexpr(16)
CALLS = itertools.count((1 << 45) + secrets.randbits(45))


@triton.jit
def row_stride(C: tl.constexpr):
    """Floats from one row of partial sums to the next: 16 bytes for a counter are behind each."""
    return (C + 3) // 4 * 4 + 4


@triton.jit
def counter_of(partials, i_program, C: tl.constexpr):
    """The counter behind a program's row of partial sums."""
    p = partials + (i_program.to(tl.int64) + 1) * row_stride(C) - 4
    return p.to(tl.pointer_type(tl.int64))


@triton.jit
def open_counter(p, found, call):
    """Sets a counter to this call's number and no arrivals, unless another of its programs has done so.

    `found` was loaded from it before. Where the exchange finds another word by now, only a program of the
    same call can have written it, and its first one was this exchange.
    """
    # No branch: the threads of a program may have found different words. The first one's exchange counts.
    is_open = found >> COUNT_BITS == call >> COUNT_BITS
    tl.atomic_cas(p, found, tl.where(is_open, found, call), sem="relaxed")


@triton.jit
def arrives_last(p, count, call):
    """Whether this program is the last of `count` to arrive, and so sees what all of them stored."""
    # The stores of all threads come before the one that reports them.
    tl.debug_barrier()
    is_last = tl.atomic_add(p, 1, sem="acq_rel") == call + (count - 1)
    if is_last:
        # A graph repeats its calls with the numbers that they had.
        tl.store(p, tl.zeros([], dtype=tl.int64))
    return is_last


@triton.jit
def family_of(i_node, nodes, width):
    """The first chunk below the parent of a node that spans `width` chunks, and how many children it has."""
    i_oldest = i_node // FAN * FAN
    return i_oldest * width, tl.minimum(nodes - i_oldest, FAN)


@triton.jit
def sum_rows(p, count, stride, o_c, C: tl.constexpr):
    """The sum [BC] of at most FAN rows, past the L1 cache."""
    b = ()
    for k in tl.static_range(FAN):
        m = o_c < tl.where(k < count, C, 0)
        b += (tl.load(p + k * stride + o_c, mask=m, other=0.0, cache_modifier=".cg"),)
    b_sum = b[0] + b[1]
    for k in tl.static_range(2, FAN, 2):
        b_sum += b[k] + b[k + 1]
    return b_sum


@triton.jit
def load_counter(partials, i_first, i_chunk, chunks, C: tl.constexpr):
    """What the counter of a chunk's node holds now, for `climb`; 0 where it has none."""
    i_oldest, children = family_of(i_chunk, chunks, 1)
    p_counter = counter_of(partials, i_first + i_oldest, C)
    return tl.load(p_counter, mask=children > 1, other=0, cache_modifier=".cg")


@triton.jit
def climb(b, partials, i_first, i_chunk, chunks, found, call, C: tl.constexpr):
    """From the sum [BC] of a chunk to (the sum of its row, true) in one program, and (anything, false) in the others.

    `i_first` is the program of the row's first chunk, and `found` what load_counter gave.
    """
    o_c = tl.arange(0, b.shape[0])  # [BC]
    stride = row_stride(C)
    i_node, nodes, width, level = i_chunk, chunks, 1, 0
    finishes = True
    while nodes > 1:
        # A node keeps its sum where its first chunk had its own. Its counter is as many rows behind that as
        # it has levels below it, and so no other node's: one of two children has a chunk there.
        i_oldest, children = family_of(i_node, nodes, width)
        p = partials + (i_first + i_oldest).to(tl.int64) * stride
        if children > 1:
            p_counter = counter_of(partials, i_first + i_oldest + level, C)
            tl.store(p + i_node % FAN * width * stride + o_c, b, mask=o_c < C)
            open_counter(p_counter, found, call)
            finishes = arrives_last(p_counter, children, call)
        if finishes:
            i_node, nodes, level = i_node // FAN, tl.cdiv(nodes, FAN), level + 1
            i_above, siblings = family_of(i_node, nodes, width * FAN)
            p_counter = counter_of(partials, i_first + i_above + level, C)
            found = tl.load(p_counter, mask=siblings > 1, other=0, cache_modifier=".cg")
            if children > 1:
                b = sum_rows(p, children, width * stride, o_c, C)
            width *= FAN
        else:
            nodes = 0
    return b, finishes


def partial_sums(hidden: torch.Tensor, programs: int) -> torch.Tensor:
    """Working memory of a call, of any content: a row of sums and a counter for each program."""
    shape = (programs, row_stride.fn(hidden.shape[1]))
    return torch.empty(shape, dtype=torch.float32, device=hidden.device)


def next_call() -> int:
    """The number that a call writes into its counters."""
    return next(CALLS) << COUNT_BITS.value
