"""attention_varlen against torch's cuDNN and flash attention (and FlashAttention-2 and -4 where installed).

python bench/bench_attention.py            the shipped configurations, at 32768 tokens a batch
python bench/bench_attention.py --only "small 64x512" log-normal                some of them
python bench/bench_attention.py --sweep    candidate launch configurations of the Triton kernel side by side

FlashAttention-4 is pure Python and need not be installed: unpack its wheels into a folder that travels along,
`pip install --pre --target DIR --no-deps flash-attn-4 nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base
nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13 quack-kernels apache-tvm-ffi torch-c-dlpack-ext einops`, and
put that folder on PYTHONPATH. It compiles for some seconds a shape.

What was tried for the Gluon kernel, and what it gave, is in log_attention.md.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from harness import (
    Work,
    cpu_benchmarks,
    gate,
    main,
    operator_records,
    print_records,
    time_interleaved,
    write_records,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from jv5kernels.ops import attention_varlen

NAME = "attention"
TOKENS = 32768
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Shape:
    """Heads of one model."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool


SMALL = Shape("small", 16, 8, 128, True)
NANO = Shape("nano", 12, 12, 64, False)


@dataclass(frozen=True)
class Problem:
    """Packed q, k and v of one batch, as views of one fused projection."""

    shape: Shape
    lengths: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def cu_seqlens(self) -> torch.Tensor:
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32, device=self.q.device)
        return ends.cumsum(0, dtype=torch.int32)

    @property
    def flops(self) -> int:
        full = sum(4 * self.shape.heads * s * s * self.shape.head_dim for s in self.lengths)
        return full // 2 if self.shape.causal else full

    @property
    def bytes(self) -> int:
        return 2 * self.q.nbytes + self.k.nbytes + self.v.nbytes

    def batched(self) -> tuple[torch.Tensor, ...]:
        """q, k and v as (B, H, S, D) views, for a batch of equal lengths."""
        size = (len(self.lengths), self.lengths[0])
        return tuple(x.unflatten(0, size).transpose(1, 2) for x in (self.q, self.k, self.v))


def draw(shape: Shape, lengths: list[int], device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    fused = torch.randn(sum(lengths), width, generator=generator, device=device).to(dtype)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return Problem(shape, lengths, *fused.unflatten(1, (-1, shape.head_dim)).split(heads, 1))


def log_normal_lengths(tokens: int, longest: int) -> list[int]:
    """Lengths as real text has them (median 180 tokens), longest first."""
    generator = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < tokens - longest:
        lengths.append(min(longest, max(1, round(generator.lognormvariate(math.log(180), 1.2)))))
    return sorted([*lengths, tokens - sum(lengths)], reverse=True)


def batches(device: str) -> Iterator[tuple[str, list[int]]]:
    tokens, sizes = (TOKENS, (512, 2048, 8192, 32768)) if device == "cuda" else (2048, (512, 2048))
    for size in sizes:
        yield f"{tokens // size}x{size}", [size] * (tokens // size)
    yield "log-normal", log_normal_lengths(tokens, tokens // 4)


def sampled_rows(lengths: list[int]) -> list[int]:
    generator = random.Random(1)
    total = sum(lengths)
    return sorted({0, lengths[0] - 1, total - 1, *generator.sample(range(total), SAMPLED_ROWS)})


def reference_rows(problem: Problem, rows: list[int]) -> torch.Tensor:
    """float64 attention of chosen rows over all the keys that they see."""
    q, k, v = problem.q, problem.k, problem.v
    ends = torch.tensor(problem.lengths).cumsum(0)
    out = []
    for row in rows:
        i = int(torch.searchsorted(ends, row, right=True))
        end = row + 1 if problem.shape.causal else int(ends[i])
        keys = slice(int(ends[i]) - problem.lengths[i], end)
        query = q[row].double().unflatten(0, (k.shape[1], -1))  # [HKV, GROUP, D]
        scores = torch.einsum("hgd,nhd->hgn", query, k[keys].double()) * q.shape[2] ** -0.5
        weights = torch.softmax(scores, 2)
        out.append(torch.einsum("hgn,nhd->hgd", weights, v[keys].double()).flatten(0, 1))
    return torch.stack(out)


def take(rows: list[int], out: torch.Tensor) -> torch.Tensor:
    """Chosen tokens of (T, H, D), or of the (B, H, S, D) that SDPA gives."""
    return (out.transpose(1, 2).flatten(0, 1) if out.ndim == 4 else out)[rows]


def ours(problem: Problem, impl: str) -> Callable[[], torch.Tensor]:
    tensors = problem.q, problem.k, problem.v, problem.cu_seqlens
    longest, causal = max(problem.lengths), problem.shape.causal
    return lambda: attention_varlen(*tensors, longest, causal=causal, impl=impl)


def sdpa(problem: Problem, backend: SDPBackend | None) -> Callable[[], torch.Tensor]:
    q, k, v = problem.batched()
    causal, grouped = problem.shape.causal, q.shape[1] != k.shape[1]
    call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal, enable_gqa=grouped)
    if backend is None:
        return call

    def restricted() -> torch.Tensor:
        with sdpa_kernel(backend):
            return call()

    return restricted


def flash_varlen(problem: Problem) -> Callable[[], torch.Tensor]:
    """torch's own FlashAttention-2 for packed sequences, which torch.nn.attention.varlen wraps."""
    cu_seqlens, longest = problem.cu_seqlens, max(problem.lengths)
    packed = (problem.q, problem.k, problem.v, cu_seqlens, cu_seqlens, longest, longest)
    forward = torch.ops.aten._flash_attention_forward
    return lambda: forward(*packed, 0.0, problem.shape.causal, False)[0]


def flash_attn_4(problem: Problem) -> Callable[[], torch.Tensor]:
    from flash_attn.cute import flash_attn_varlen_func

    packed = (problem.q, problem.k, problem.v)
    bounds, longest = problem.cu_seqlens, max(problem.lengths)

    def call() -> torch.Tensor:
        found = flash_attn_varlen_func(
            *packed,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            causal=problem.shape.causal,
        )
        return found[0] if isinstance(found, tuple) else found

    return call


def is_installed(module: str) -> bool:
    """Whether a module of a package that may be there in part can be found."""
    package, _, _ = module.rpartition(".")
    return find_spec(package) is not None and find_spec(module) is not None


def padded(problem: Problem) -> Callable[[], torch.Tensor]:
    """One SDPA call over a padded batch with a mask: what a model without packing does."""
    tensors = problem.q, problem.k, problem.v
    lengths, longest = problem.lengths, max(problem.lengths)
    keys = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    mask = keys[:, None, None, :]
    if problem.shape.causal:
        mask = mask & torch.ones(longest, longest, dtype=torch.bool).tril()
    batch = [torch.zeros(len(lengths), longest, *x.shape[1:]) for x in tensors]
    for target, x in zip(batch, tensors, strict=True):
        target[keys] = x
    q, k, v = (x.transpose(1, 2) for x in batch)
    grouped = q.shape[1] != k.shape[1]

    def call() -> torch.Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2)[keys]

    return call


def variants(problem: Problem) -> tuple[dict[str, Callable[[], torch.Tensor]], str]:
    """The calls to time, ours first, and the label of the peer."""
    is_ragged = len(set(problem.lengths)) > 1
    if problem.q.device.type == "cpu":
        calls = {"ours (torch)": ours(problem, "torch")}
        peer = "padded SDPA" if is_ragged else "SDPA"
        return calls | {peer: padded(problem) if is_ragged else sdpa(problem, None)}, peer
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    calls = {"ours (gluon)": ours(problem, "gluon")} if is_hopper else {}
    calls["ours (triton)"] = ours(problem, "triton")
    if is_ragged:
        calls["flash varlen"] = flash_varlen(problem)
    else:
        calls["cuDNN"] = sdpa(problem, SDPBackend.CUDNN_ATTENTION)
        calls["flash"] = sdpa(problem, SDPBackend.FLASH_ATTENTION)
    if is_installed("flash_attn.flash_attn_interface"):
        calls["flash_attn"] = ours(problem, "flash_attn")
    if is_installed("flash_attn.cute"):
        calls["flash-attn 4"] = flash_attn_4(problem)
    return calls, "flash varlen" if is_ragged else "cuDNN"


def work(shape: Shape, batch: str, lengths: list[int], device: str) -> Work:
    problem = draw(shape, lengths, device)
    rows = sampled_rows(lengths)
    calls, peer = variants(problem)
    return Work(
        name=f"attention {shape.name} {batch} {str(problem.q.dtype)[6:]}",
        variants=calls,
        reference=partial(reference_rows, problem, rows),
        tolerance=4e-3 if device == "cuda" else 1e-6,
        bytes=problem.bytes,
        flops=problem.flops,
        peer=peer,
        sample=partial(take, rows),
    )


def works(device: str) -> list[Work]:
    """The heads of small and nano over equal lengths and over lengths as real text has them."""
    return [
        work(shape, batch, lengths, device)
        for shape in (SMALL, NANO)
        for batch, lengths in batches(device)
    ]


# (BM, BN, warps, stages, descriptors)
CANDIDATES = {
    128: [
        (128, 128, 8, 2, True),
        (128, 128, 8, 3, True),
        (128, 64, 8, 3, True),
        (128, 64, 8, 4, True),
        (64, 128, 4, 2, True),
        (64, 64, 4, 3, True),
        (256, 64, 16, 3, True),
        (128, 128, 8, 2, False),
        (128, 64, 8, 3, False),
    ],
    64: [
        (128, 128, 4, 2, True),
        (128, 128, 4, 3, True),
        (128, 64, 8, 3, True),
        (128, 64, 8, 4, True),
        (128, 128, 8, 2, True),
        (128, 128, 8, 3, True),
        (256, 64, 8, 3, True),
        (256, 64, 16, 3, True),
        (64, 128, 4, 3, True),
        (64, 64, 4, 4, True),
        (128, 128, 8, 3, False),
        (128, 64, 8, 3, False),
    ],
}
# Bytes of keys and values that programs in flight share: one kv head at a time, as shipped, all heads together.
L2_SHARES = {"one head": 0, "shipped order": None, "all heads": 1 << 50}


def candidates(
    problem: Problem, out: torch.Tensor
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """The calls to compare, all of which fill `out`."""
    from jv5kernels.kernels import attention as kernel

    cu_seqlens, longest = problem.cu_seqlens, max(problem.lengths)
    shape, shipped_share = problem.shape, kernel.L2_SHARE

    def call(config: kernel.Config, share: int) -> torch.Tensor:
        kernel.L2_SHARE = share
        scale = shape.head_dim**-0.5
        kernel.launch_attention(
            problem.q, problem.k, problem.v, cu_seqlens, longest, shape.causal, scale, out, config
        )
        kernel.L2_SHARE = shipped_share
        return out

    for order, share in L2_SHARES.items():
        config = kernel.config_for(out.device, out.dtype, shape.head_dim, shape.causal)
        yield order, partial(call, config, shipped_share if share is None else share)
    for values in CANDIDATES[shape.head_dim]:
        config = kernel.Config(*values)
        kind = "tma" if config.descriptors else "pointers"
        label = f"{config.BM}x{config.BN} w{config.num_warps} s{config.num_stages} {kind}"
        yield label, partial(call, config, shipped_share)


def sweep() -> None:
    """Times the candidates that pass the gate; a candidate that fails is named and left out."""
    records = []
    for shape in (SMALL, NANO):
        for batch, lengths in batches("cuda"):
            problem = draw(shape, lengths, "cuda")
            case = work(shape, batch, lengths, "cuda")
            out = torch.empty(problem.q.shape, dtype=problem.q.dtype, device=problem.q.device)
            case.variants.update(candidates(problem, out))
            expected = case.reference()
            for label in list(case.variants):
                out.fill_(float("nan"))
                try:
                    gate(case, label, expected)
                except Exception as error:  # any failure of one candidate must not hide the others
                    print(f"{case.name} {label}: {error!s:.200}", flush=True)
                    del case.variants[label]
            lines = operator_records(case, time_interleaved(case.variants), "cuda")
            print_records(lines)
            sys.stdout.flush()
            records += lines
    print(write_records(f"{NAME}-sweep", records))


test_attention = cpu_benchmarks(NAME, works)

if __name__ == "__main__":
    if "--sweep" in sys.argv:
        sweep()
    else:
        main(NAME, works, __file__)
