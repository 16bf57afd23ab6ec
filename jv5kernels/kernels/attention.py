"""Attention inside packed sequences: one pass over keys and values with an online softmax.

    out[i] = softmax(softmax_scale · q[i] · kᵀ) · v      keys of the same sequence, j <= i when causal

FlashAttention-2 order (Dao, arXiv 2307.08691): a program owns BM rows of one query head, walks over its
keys in tiles of BN and keeps the running row maximum m, row sum l and output in fp32. Exponentials are
base 2 with the scale folded in. Only tiles that touch the diagonal or the end of the sequence are masked.

Tile map: sequence i owns the tile slots from cu_seqlens[i] // BM + i on, which are enough whatever its
length, so the grid needs total_tokens alone and no host sync; a program finds its sequence by binary
search and leaves when its slot holds no rows. Within a sequence the last rows, which have the most keys
when causal, come first. Heads are taken in sections whose keys and values fit into the L2 cache together.

A row's result depends on its sequence and the launch configuration alone, and the configuration on the
device class, dtype, head_dim and causal alone: never on what else is packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged

LOG2_E = 1.4426950408889634
# Bytes of keys and values that neighbouring programs may share through the L2 cache.
L2_SHARE = 32 << 20
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one kernel variant.

    Args:
        descriptors: read keys and values through TMA descriptors (sm_90 and later), where they are aligned.
    """

    BM: int
    BN: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# (device class, bytes of an element, head_dim, causal) -> configuration. Compiled by Triton 3.6 for sm_90 none spills.
# Timed on an H200 (32768 tokens in all, TFLOP/s at S = 512 / 8192 / 32768):
# head_dim 128 causal, chosen 197 / 486 / 506, (128, 64, 8, 3) 190 / 447 / 474, without descriptors 183 / 423 / 471;
# head_dim 64 bidirectional, chosen 288 / 435 / 439, (128, 64, 8, 3) 296 / 408 / 415, (128, 128, 8, 3) 214 / 360 / 376.
# The compiler's warp specialisation (4 warps) gave 202 / 501 / 522 at head_dim 128, and NaN: Triton 3.6 miscompiles it.
# More: `python bench/bench_attention.py --sweep`.
CONFIGS: dict[tuple[str, int, int, bool], Config] = {
    (*key, causal): config
    for causal in (False, True)
    for key, config in {
        ("sm_90", 2, 32): Config(128, 128, 8, 3, descriptors=True),
        ("sm_90", 2, 64): Config(128, 128, 4, 3, descriptors=True),
        ("sm_90", 2, 128): Config(128, 128, 8, 3, descriptors=True),
        ("sm_90", 2, 256): Config(128, 32, 8, 3, descriptors=True),
        ("sm_90", 4, 32): Config(64, 32, 4, 2),
        ("sm_90", 4, 64): Config(64, 32, 8, 2),
        ("sm_90", 4, 128): Config(32, 16, 8, 2),
        ("sm_90", 4, 256): Config(16, 16, 8, 2),
        # Within the 99 KiB of shared memory that sm_86, sm_89 and sm_120 have.
        ("sm_80", 2, 32): Config(128, 64, 4, 3),
        ("sm_80", 2, 64): Config(128, 64, 8, 3),
        ("sm_80", 2, 128): Config(128, 32, 8, 3),
        ("sm_80", 2, 256): Config(64, 32, 8, 2),
        ("sm_80", 4, 32): Config(64, 32, 4, 2),
        ("sm_80", 4, 64): Config(64, 32, 8, 2),
        ("sm_80", 4, 128): Config(32, 16, 8, 2),
        ("sm_80", 4, 256): Config(16, 16, 8, 2),
    }.items()
}


@lru_cache
def device_class(index: int) -> str:
    """Which rows of CONFIGS a CUDA device reads."""
    return "sm_90" if torch.cuda.get_device_capability(index)[0] == 9 else "sm_80"


def config_for(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> Config:
    """The launch configuration of a device (the interpreter takes that of sm_90), dtype, head_dim and mask."""
    name = device_class(device.index or 0) if device.type == "cuda" else "sm_90"
    return CONFIGS[name, dtype.itemsize, head_dim, causal]


@triton.jit
def find_sequence(cu_seqlens, slot, B, search_steps, BLOCK: tl.constexpr):
    """The sequence that owns a tile slot: the last i with cu_seqlens[i] // BLOCK + i <= slot."""
    low = 0
    high = B
    for _ in range(search_steps):
        middle = (low + high) // 2
        is_left = tl.load(cu_seqlens + middle) // BLOCK + middle <= slot
        low = tl.where(is_left, middle, low)
        high = tl.where(is_left, high, middle)
    return low


@triton.jit
def exact_dot(a, b):
    """a · b in fp32, with fp32 inputs kept exact."""
    if INTERPRET:  # the interpreter multiplies bf16 bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_keys(
    source,  # descriptor, or pointer to the sequence's first row of the head
    stride_t,
    begin,
    length,
    first_key,
    column,
    BN: tl.constexpr,
    D: tl.constexpr,
    IS_MASKED: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """Rows first_key … first_key + BN of a sequence's keys or values, zeros after its end (if masked)."""
    if USE_DESCRIPTORS:
        b = load_ragged(source, begin, length, [first_key, column])
    else:
        o_n = tl.arange(0, BN)[:, None]
        p = source + first_key * tl.cast(stride_t, tl.int64)
        p += o_n * stride_t + tl.arange(0, D)[None, :]
        if IS_MASKED:
            b = tl.load(p, mask=first_key + o_n < length, other=0.0)
        else:
            b = tl.load(p)
    return b  # [BN, D]


@triton.jit
def attend(
    b_q,  # [BM, D]
    b_out,  # [BM, D] fp32
    b_max,  # [BM] fp32
    b_sum,  # [BM] fp32
    k,
    v,
    stride_kt,
    stride_vt,
    begin,
    length,
    column,
    first_row,
    start,
    end,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_MASKED: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """Adds the keys from `start` (a multiple of BN) to `end` to the running softmax of one row tile."""
    for first_key in tl.range(start, end, BN):
        b_k = load_keys(
            k, stride_kt, begin, length, first_key, column, BN, D, IS_MASKED, USE_DESCRIPTORS
        )  # [BN, D]
        b_s = exact_dot(b_q, tl.trans(b_k))  # [BM, BN]
        if IS_MASKED:
            o_n = first_key + tl.arange(0, BN)
            m_s = (o_n < length)[None, :]
            if IS_CAUSAL:
                # Rows after the end are not stored, so the diagonal alone bounds the keys.
                m_s = (first_row + tl.arange(0, BM))[:, None] >= o_n[None, :]
            b_s = tl.where(m_s, b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.math.exp2(b_s * scale - b_new_max[:, None])
        b_decay = tl.math.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_out = b_out * b_decay[:, None]
        b_v = load_keys(
            v, stride_vt, begin, length, first_key, column, BN, D, IS_MASKED, USE_DESCRIPTORS
        )  # [BN, D]
        if not INTERPRET:  # the interpreter truncates instead of rounding
            b_p = b_p.to(b_v.dtype)
        b_out += exact_dot(b_p, b_v)
        b_max = b_new_max
    return b_out, b_max, b_sum


@triton.jit(do_not_specialize=["slots", "B", "search_steps", "section"])
def attention_kernel(
    q,  # [T, HQ, D]
    k,  # [T, HQ // GROUP, D], or a ragged descriptor of [T, HQ // GROUP * D]
    v,  # [T, HQ // GROUP, D], likewise
    out,  # [T, HQ, D], contiguous
    cu_seqlens,  # [B + 1]
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    scale,  # softmax_scale · log2(e)
    slots,
    B,
    search_steps,
    section,  # query heads taken together
    HQ: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    program = tl.program_id(0)
    slot = program // section % slots
    i_h = program // section // slots * section + program % section
    i_b = find_sequence(cu_seqlens, slot, B, search_steps, BM)
    begin = tl.load(cu_seqlens + i_b)
    length = tl.load(cu_seqlens + i_b + 1) - begin
    i_m = tl.cdiv(length, BM) - 1 - (slot - begin // BM - i_b)
    if i_m < 0:
        return

    first_row = i_m * BM
    o_d = tl.arange(0, D)
    o_m = first_row + tl.arange(0, BM)  # [BM]
    m_m = (o_m < length)[:, None]
    o_row = begin.to(tl.int64) + o_m[:, None]
    q += begin.to(tl.int64) * stride_qt + i_h * tl.cast(stride_qh, tl.int64)
    p_q = q + o_m[:, None] * tl.cast(stride_qt, tl.int64) + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m, other=0.0)  # [BM, D]
    if not USE_DESCRIPTORS:
        k += begin.to(tl.int64) * stride_kt + (i_h // GROUP) * tl.cast(stride_kh, tl.int64)
        v += begin.to(tl.int64) * stride_vt + (i_h // GROUP) * tl.cast(stride_vh, tl.int64)

    b_out = tl.zeros([BM, D], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    column = i_h // GROUP * D
    end = length
    unmasked = length // BN * BN
    if IS_CAUSAL:
        end = tl.minimum(first_row + BM, length)
        unmasked = first_row // BN * BN
    b_out, b_max, b_sum = attend(
        b_q, b_out, b_max, b_sum, k, v, stride_kt, stride_vt, begin, length, column, first_row,
        0, unmasked, scale, BM, BN, D, IS_CAUSAL, False, USE_DESCRIPTORS,
    )  # fmt: skip
    b_out, b_max, b_sum = attend(
        b_q, b_out, b_max, b_sum, k, v, stride_kt, stride_vt, begin, length, column, first_row,
        unmasked, end, scale, BM, BN, D, IS_CAUSAL, True, USE_DESCRIPTORS,
    )  # fmt: skip
    b_out = b_out / b_sum[:, None]
    p_out = out + o_row * (HQ * D) + i_h * D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m)


def heads_together(heads: int, kv_heads: int, max_seqlen: int, key_bytes: int) -> int:
    """How many query heads to take together so that their keys and values share the L2 cache.

    Args:
        key_bytes: bytes of one token's keys and values of one kv head.
    """
    fitting = max(1, L2_SHARE // max(1, max_seqlen * key_bytes))
    divisor = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= fitting)
    return divisor * (heads // kv_heads)


def search_steps(sequences: int) -> int:
    """How many halvings find one of so many sequences."""
    return max(sequences - 1, 0).bit_length()


def fits_descriptor(x: torch.Tensor) -> bool:
    """Whether the rows of x (T, H, D) can be read through a TMA descriptor."""
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return is_aligned and x.stride(1) == x.shape[2]


def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    causal: bool,
    softmax_scale: float,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Fills `out`, contiguous (T, HQ, D). `config` overrides the shipped launch configuration."""
    T, HQ, D = q.shape
    HKV = k.shape[1]
    B = cu_seqlens.shape[0] - 1
    if T == 0:
        return
    config = config or config_for(q.device, q.dtype, D, causal)
    use_descriptors = config.descriptors and all(map(fits_descriptor, (q, k, v)))
    keys, values = k, v
    if use_descriptors:
        keys, values = (create_ragged_descriptor(x.flatten(1), [config.BN, D]) for x in (k, v))
    slots = T // config.BM + B
    attention_kernel[(slots * HQ,)](
        q,
        keys,
        values,
        out,
        cu_seqlens,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        softmax_scale * LOG2_E,
        slots,
        B,
        search_steps(B),
        heads_together(HQ, HKV, max_seqlen, 2 * D * k.element_size()),
        HQ=HQ,
        GROUP=HQ // HKV,
        D=D,
        BM=config.BM,
        BN=config.BN,
        IS_CAUSAL=causal,
        USE_DESCRIPTORS=use_descriptors,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
