"""The layer loop's two forms of the MLP, in the GEMM and apart, compute the same, chunk by chunk or in one go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jv5kernels import backbone as module
from jv5kernels.backbone import LowRank, PackedBackbone, Projection, fuse_layer
from jv5kernels.model_spec import ModelSpec
from jv5kernels.ops import linear_swiglu, rope_table
from jv5kernels.ops.float24 import FLOAT24
from jv5kernels.packing import pack

SPEC = ModelSpec(
    model_type="qwen3",
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=96,
    vocab_size=50,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    causal=True,
    qk_norm=True,
    max_position_embeddings=64,
)
LENGTHS = (5, 1, 17, 9)
POOLINGS = ["lasttoken", "cls", "mean"]


def build(dtype: torch.dtype, device: torch.device | str, **options: object) -> PackedBackbone:
    """A backbone with random weights, of order one after every projection."""
    generator = torch.Generator().manual_seed(0)
    C, F, D = SPEC.hidden_size, SPEC.intermediate_size, SPEC.head_dim
    shapes = {
        "self_attn.q_proj": (SPEC.q_width, C),
        "self_attn.k_proj": (SPEC.kv_width, C),
        "self_attn.v_proj": (SPEC.kv_width, C),
        "self_attn.o_proj": (C, SPEC.q_width),
        "mlp.gate_proj": (F, C),
        "mlp.up_proj": (F, C),
        "mlp.down_proj": (C, F),
    }
    weights = {}
    for layer in range(SPEC.num_layers):
        for name, (rows, columns) in shapes.items():
            weight = torch.randn(rows, columns, generator=generator) / columns**0.5
            weights[f"layers.{layer}.{name}.weight"] = weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"layers.{layer}.{name}.weight"] = torch.ones(C)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            weights[f"layers.{layer}.{name}.weight"] = torch.ones(D)
    target = torch.device(device)
    return PackedBackbone(
        SPEC,
        [fuse_layer(weights, i, target, dtype) for i in range(SPEC.num_layers)],
        embedding=torch.randn(SPEC.vocab_size, C, generator=generator).to(target, dtype),
        norm_weight=torch.ones(C, device=target, dtype=dtype),
        rope=rope_table(SPEC.max_position_embeddings, D, SPEC.rope_theta, target),
        **options,
    )


def batch(device: torch.device | str):
    ids = [np.arange(n, dtype=np.int32) * 7 % SPEC.vocab_size for n in LENGTHS]
    return pack(ids, np.arange(len(ids)), device)


@pytest.fixture
def fused(monkeypatch):
    """Lets the loop take the fused MLP for every number of rows: on a GPU its kernel, on a CPU what stands for it."""

    def fused_swiglu(x: torch.Tensor, weight: torch.Tensor, **options) -> torch.Tensor:
        return linear_swiglu(x, weight, impl="gluon" if x.is_cuda else "torch", **options)

    monkeypatch.setattr(module, "keeps_intermediate", lambda *_: True)
    monkeypatch.setattr(module, "linear_swiglu", fused_swiglu)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_fused_blocks_are_as_exact_as_separate_ones(pooling, device, request):
    """Error against the same weights in float32."""
    exact = build(torch.float32, "cpu")
    for layer, other in zip(exact.layers, build(torch.float16, "cpu").layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            getattr(layer, name).weight.copy_(getattr(other, name).weight)
    exact.embedding.copy_(build(torch.float16, "cpu").embedding)
    expected, _ = exact.forward_pooled(batch("cpu"), pooling)
    half = build(torch.float16, device)
    apart, _ = half.forward_pooled(batch(device), pooling)
    request.getfixturevalue("fused")
    together, cu_seqlens = half.forward_pooled(batch(device), pooling)
    assert together.dtype == torch.float32 and together.shape == expected.shape
    assert cu_seqlens[-1] == len(expected)
    norm = expected.norm()
    errors = [((out.cpu() - expected).norm() / norm).item() for out in (together, apart)]
    assert errors[0] < 1.5 * errors[1] and errors[1] < 2e-3, errors


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_float24_stream_is_as_exact_as_a_float32_one(pooling):
    half = build(torch.bfloat16, "cpu")
    exact = build(torch.float32, "cpu")
    for layer, other in zip(exact.layers, half.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            getattr(layer, name).weight.copy_(getattr(other, name).weight)
    exact.embedding.copy_(half.embedding)
    assert half.stream_dtype == torch.float32, "on a CPU the stream is float32"
    whole, _ = half.forward_pooled(batch("cpu"), pooling)
    half.stream_dtype = FLOAT24
    short, _ = half.forward_pooled(batch("cpu"), pooling)
    assert short.dtype == torch.float32 and not torch.equal(short, whole)
    expected, _ = exact.forward_pooled(batch("cpu"), pooling)
    errors = [((out - expected).norm() / expected.norm()).item() for out in (short, whole)]
    assert errors[0] < 1.05 * errors[1] and errors[1] < 2e-2, errors
    torch.testing.assert_close(
        half.forward(batch("cpu")), exact.forward(batch("cpu")).bfloat16(), rtol=0.1, atol=0.1
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_chunks_of_the_mlp_change_nothing(pooling, monkeypatch):
    whole, _ = build(torch.float32, "cpu").forward_pooled(batch("cpu"), pooling)
    monkeypatch.setattr(module, "MLP_CHUNK_TOKENS", 7)
    chunked, _ = build(torch.float32, "cpu").forward_pooled(batch("cpu"), pooling)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_low_rank_terms_are_never_left_out(fused):
    """A projection with LoRA terms beside its weight is computed apart, even where the kernels would run."""
    plain = build(torch.float32, "cpu")
    half = build(torch.float16, "cpu")
    generator = torch.Generator().manual_seed(1)

    def with_term(projection: Projection, dtype: torch.dtype) -> Projection:
        rows, columns = projection.weight.shape
        a = torch.randn(4, columns, generator=generator).to(dtype) / columns**0.5
        b = torch.randn(rows, 4, generator=generator).to(dtype)
        return Projection(projection.weight, (LowRank(0, rows, a, b, 0.5),))

    results = []
    for model, dtype in ((plain, torch.float32), (half, torch.float16)):
        generator.manual_seed(1)
        for layer in model.layers:
            for name in ("o", "gate_up", "down"):
                object.__setattr__(layer, name, with_term(getattr(layer, name), dtype))
        results.append(model.forward_pooled(batch("cpu"), "mean")[0])
    error = (results[1] - results[0]).norm() / results[0].norm()
    assert error < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", POOLINGS)
def test_bits_of_a_sequence_do_not_depend_on_the_batch(pooling):
    model = build(torch.bfloat16, "cuda", batch_invariant=True)
    ids = [np.arange(n, dtype=np.int32) * 7 % SPEC.vocab_size for n in LENGTHS]
    together, cu_seqlens = model.forward_pooled(pack(ids, np.arange(4), "cuda"), pooling)
    for i in range(4):
        alone, _ = model.forward_pooled(pack(ids[i : i + 1], np.arange(1), "cuda"), pooling)
        assert torch.equal(alone, together[cu_seqlens[i] : cu_seqlens[i + 1]])
