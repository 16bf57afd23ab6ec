"""A Qwen3 or EuroBERT backbone inside a live object, recognised by its structure.

Remote code is never imported and classes are never compared: a backbone is a module with embed_tokens, layers of the
known parts, and norm, whose `config` states a known model_type. It may sit in anything that holds it as a submodule:
a PeftModel, the v5 remote class (a PeftMixedModel), a SentenceTransformer, a compiled module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from jv5kernels.model_spec import ModelSpec
from jv5kernels.ops.attention import KERNEL_HEAD_DIMS

# An nn.Module. Its parts are found by name, and nn.Module types every attribute as Tensor | Module.
Module: TypeAlias = Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
QK_NORMS = ("q_norm", "k_norm")
LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
BACKBONE = ("embed_tokens", "layers", "norm")

# A structure alone does not tell that a model multiplies its residuals or skips RoPE in some layers (Granite, SmolLM3),
# so the config must say that it is one of these.
MODEL_TYPES = ("qwen3", "eurobert", "jina_embeddings_v5")

# Buffers follow `model.to(torch.bfloat16)` and are rounded by it; any other angle base is further away than that.
INV_FREQ_TOLERANCE = 0.01


def find_backbone(model: Module) -> tuple[str, Module]:
    """Returns the path and the module of the one Qwen3 or EuroBERT backbone in `model` (path "" for itself).

    Raises:
        TypeError: not a torch module, or no such backbone in it, or several.

    Example:
        >>> find_backbone(sentence_transformer)[0]
        '0.model'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    found = {
        name: module for name, module in model.named_modules() if not missing_parts(module, deep=1)
    }
    if not found:
        near = [(n, m) for n, m in model.named_modules() if len(missing_parts(m, deep=0)) < 2]
        details = "".join(
            f"; {name or type(module).__name__} lacks {', '.join(missing_parts(module, deep=1))}"
            for name, module in near[:3]
        )
        raise TypeError(
            f"no Qwen3 or EuroBERT backbone in this {type(model).__name__}: looked for a module with "
            f"{', '.join(BACKBONE)} whose layers have {', '.join(LAYER)} with "
            f"{', '.join((*ATTENTION, *MLP))}{details}"
        )
    if len(found) > 1:
        raise TypeError(
            f"{len(found)} backbones in this {type(model).__name__} ({', '.join(found)}): pass one of them"
        )
    return next(iter(found.items()))


def missing_parts(module: Module, *, deep: int) -> list[str]:
    """Names of the parts that a backbone has and `module` has not; with deep=1 those of its layers too."""
    children = module._modules
    missing = [name for name in BACKBONE if children.get(name) is None]
    layers = children.get("layers")
    if not deep or missing:
        return missing
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return ["layers (a ModuleList with at least one layer)"]
    for index, layer in enumerate(layers):
        missing += [f"layers.{index}.{n}" for n in LAYER if layer._modules.get(n) is None]
        for part, names in (("self_attn", ATTENTION), ("mlp", MLP)):
            inside = getattr(layer._modules.get(part), "_modules", {})
            missing += [f"layers.{index}.{part}.{n}" for n in names if inside.get(n) is None]
    return missing


def base_linear(module: Module) -> Module:
    """The layer under any number of PEFT wrappers."""
    while "base_layer" in module._modules:
        module = module._modules["base_layer"]
    return module


def spec_of(inner: Module) -> ModelSpec:
    """Returns the architecture of a live backbone, read from its config and its modules.

    Args:
        inner: the module that `find_backbone` returned.

    Raises:
        ValueError: something that the packed backbone does not compute; all reasons are listed.
    """
    config = inner.config
    reasons = [*_config_reasons(config), *_module_reasons(inner)]
    if reasons:
        raise _refusal(inner, reasons)
    attention, mlp = inner.layers[0].self_attn, inner.layers[0].mlp
    head_dim = _head_dim(attention, config)
    spec = ModelSpec(
        model_type="qwen3" if hasattr(attention, "q_norm") else "eurobert",
        hidden_size=inner.embed_tokens.weight.shape[1],
        num_layers=len(inner.layers),
        num_heads=base_linear(attention.q_proj).weight.shape[0] // head_dim,
        num_kv_heads=base_linear(attention.k_proj).weight.shape[0] // head_dim,
        head_dim=head_dim,
        intermediate_size=base_linear(mlp.gate_proj).weight.shape[0],
        vocab_size=inner.embed_tokens.weight.shape[0],
        rope_theta=rope_theta(config),
        rms_norm_eps=_eps(inner.norm),
        causal=is_causal(inner),
        qk_norm=hasattr(attention, "q_norm"),
        max_position_embeddings=config.max_position_embeddings,
    )
    reasons = [*_shape_reasons(inner, spec), *_rotary_reasons(inner, spec)]
    if reasons:
        raise _refusal(inner, reasons)
    return spec


def is_causal(inner: Module) -> bool:
    """Whether a token attends to earlier tokens only: what the layers state, unless config.is_causal=False."""
    return bool(inner.layers[0].self_attn.is_causal) and _config_causal(inner.config) is not False


def rope_theta(config: Any) -> float:
    """The RoPE base: transformers 5 keeps it in `rope_parameters`, older configs as an attribute of their own."""
    return float((_rope_parameters(config) or {}).get("rope_theta") or config.rope_theta)


def _rope_parameters(config: Any) -> dict[str, Any] | None:
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)


def _config_causal(config: Any) -> bool | None:
    return getattr(config, "is_causal", None)


def _refusal(inner: Module, reasons: list[str]) -> ValueError:
    listed = "".join(f"\n  - {reason}" for reason in dict.fromkeys(reasons))
    return ValueError(f"this {type(inner).__name__} is not supported:{listed}")


def _head_dim(attention: Module, config: Any) -> int:
    stated = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return stated or config.hidden_size // config.num_attention_heads


def _eps(norm: Module) -> float:
    """Epsilon of an RMSNorm, NaN (which equals nothing) when it states none."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return math.nan if eps is None else float(eps)


def _config_reasons(config: Any) -> Iterator[str]:
    model_type = getattr(config, "model_type", None)
    if model_type not in MODEL_TYPES:
        yield f"config.model_type is {model_type!r}; known are {', '.join(MODEL_TYPES)}"
    rope = _rope_parameters(config) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    # EuroBERT's remote code writes its default as linear scaling by 1.
    if kind != "default" and not (kind == "linear" and rope.get("factor") == 1.0):
        yield f"config.rope_parameters has rope_type {kind!r}; only 'default' is supported"
    if rope.get("rope_theta") is None and getattr(config, "rope_theta", None) is None:
        yield "config states no rope_theta"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"config.rope_parameters has partial_rotary_factor {rope['partial_rotary_factor']}"


def _module_reasons(inner: Module) -> Iterator[str]:
    """What the kinds of modules say; the first layer that deviates is described, the others are not."""
    if inner.config.num_hidden_layers != len(inner.layers):
        yield f"config.num_hidden_layers={inner.config.num_hidden_layers}, but there are {len(inner.layers)} layers"
    embedding = inner.embed_tokens
    if type(embedding).forward is not nn.Embedding.forward or embedding.max_norm is not None:
        yield f"embed_tokens is a {type(embedding).__name__} that does more than look up"
    if math.isnan(_eps(inner.norm)) or list(inner.norm._parameters) != ["weight"]:
        yield "norm is not an RMSNorm (a weight and an eps)"
    if _config_causal(inner.config) and not getattr(inner.layers[0].self_attn, "is_causal", True):
        yield "config.is_causal is True, but the layers' self_attn.is_causal is False"
    for index, layer in enumerate(inner.layers):
        reasons = [
            *_part_reasons(layer, inner.layers[0]),
            *_linear_reasons(layer),
            *_norm_reasons(layer, _eps(inner.norm)),
            *_attention_reasons(layer.self_attn, inner),
        ]
        if not _is_silu(getattr(layer.mlp, "act_fn", None)):
            reasons.append("mlp.act_fn is not SiLU")
        if reasons:
            yield from (f"layers.{index}.{reason}" for reason in reasons)
            return
    weights = [id(linear.weight) for layer in inner.layers for linear in _linears(layer).values()]
    if len(set(weights)) < len(weights):
        yield "some layers share one weight"


def _linears(layer: Module) -> dict[str, Module]:
    """The seven Linear modules of a layer, without PEFT's wrappers."""
    parts = {f"self_attn.{name}": getattr(layer.self_attn, name) for name in ATTENTION}
    parts |= {f"mlp.{name}": getattr(layer.mlp, name) for name in MLP}
    return {name: base_linear(part) for name, part in parts.items()}


def _part_reasons(layer: Module, first: Module) -> Iterator[str]:
    known = {
        "": {*LAYER},
        "self_attn": {*ATTENTION, *QK_NORMS},
        "mlp": {*MLP, "act_fn"},
    }
    for path, names in known.items():
        parts = set(layer.get_submodule(path)._modules)
        if unknown := parts - names:
            yield f"{path or 'parts'}: {', '.join(sorted(unknown))} not known"
        if parts ^ set(first.get_submodule(path)._modules):
            yield f"{path or 'parts'}: other parts than in layers.0"
    if len({*QK_NORMS} & set(layer.self_attn._modules)) == 1:
        yield "self_attn has only one of q_norm and k_norm"


def _linear_reasons(layer: Module) -> Iterator[str]:
    for name, linear in _linears(layer).items():
        if type(linear).forward is not nn.Linear.forward:
            yield f"{name} is a {type(linear).__name__}, not a plain Linear"
        elif linear.bias is not None:
            yield f"{name} has a bias"
        elif type(linear._parameters.get("weight")) is not nn.Parameter:
            yield f"{name}.weight is not a plain parameter"


def _norm_reasons(layer: Module, eps: float) -> Iterator[str]:
    norms = {name: layer._modules[name] for name in LAYER[2:]}
    attention = layer.self_attn._modules
    norms |= {f"self_attn.{name}": attention[name] for name in QK_NORMS if name in attention}
    for name, norm in norms.items():
        if norm is None or list(norm._parameters) != ["weight"]:
            yield f"{name} is not an RMSNorm (a weight and an eps)"
        elif _eps(norm) != eps:
            yield f"{name} has eps {_eps(norm)}, the final norm {eps}"


def _attention_reasons(attention: Module, inner: Module) -> Iterator[str]:
    if getattr(attention, "sliding_window", None) is not None:
        yield f"self_attn uses a sliding window of {attention.sliding_window}"
    scale = _head_dim(attention, inner.config) ** -0.5
    if abs(getattr(attention, "scaling", scale) - scale) > 1e-6:
        yield f"self_attn scales by {attention.scaling}, not by head_dim ** -0.5 = {scale}"
    stated = getattr(attention, "is_causal", None)
    if stated is None or stated != inner.layers[0].self_attn.is_causal:
        yield f"self_attn.is_causal is {stated}"


def _is_silu(activation: Any) -> bool:
    """By what it computes: the classes and functions that are SiLU have several names."""
    if not callable(activation):
        return False
    x = torch.linspace(-4, 4, 9)
    with torch.no_grad():
        return torch.allclose(activation(x), nn.functional.silu(x))


def _shape_reasons(inner: Module, spec: ModelSpec) -> Iterator[str]:
    wide, narrow = spec.hidden_size, spec.intermediate_size
    expected = {
        "self_attn.q_proj": (spec.q_width, wide),
        "self_attn.k_proj": (spec.kv_width, wide),
        "self_attn.v_proj": (spec.kv_width, wide),
        "self_attn.o_proj": (wide, spec.q_width),
        "mlp.gate_proj": (narrow, wide),
        "mlp.up_proj": (narrow, wide),
        "mlp.down_proj": (wide, narrow),
        "input_layernorm": (wide,),
        "post_attention_layernorm": (wide,),
    }
    if spec.qk_norm:
        expected |= {"self_attn.q_norm": (spec.head_dim,), "self_attn.k_norm": (spec.head_dim,)}
    shapes = {
        f"layers.{i}.{name}": (tuple(base_linear(layer.get_submodule(name)).weight.shape), shape)
        for i, layer in enumerate(inner.layers)
        for name, shape in expected.items()
    }
    shapes["norm"] = (tuple(inner.norm.weight.shape), (wide,))
    for name, (actual, shape) in shapes.items():
        if actual != shape:
            yield f"{name}.weight is {actual}, expected {shape}"
    if spec.head_dim not in KERNEL_HEAD_DIMS:
        yield f"head_dim is {spec.head_dim}; the kernels take {KERNEL_HEAD_DIMS}"
    if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
        yield f"{spec.num_heads} heads cannot share {spec.num_kv_heads} key/value heads"


def _rotary_reasons(inner: Module, spec: ModelSpec) -> Iterator[str]:
    """The live angles must be those of rope_theta: the config may have been changed after the model was made."""
    rotary = inner._modules.get("rotary_emb")
    inv_freq = getattr(rotary, "inv_freq", None)
    if inv_freq is None or inv_freq.device.type == "meta":
        return
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
    expected = spec.rope_theta**-exponents
    actual = inv_freq.detach().float().cpu()
    if actual.shape != expected.shape or not torch.allclose(
        actual, expected, rtol=INV_FREQ_TOLERANCE, atol=0.0
    ):
        yield f"rotary_emb.inv_freq is not that of rope_theta={spec.rope_theta}"
    if getattr(rotary, "attention_scaling", 1.0) != 1.0:
        yield f"rotary_emb.attention_scaling is {rotary.attention_scaling}"
