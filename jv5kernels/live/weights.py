"""The weights of a live backbone as the packed backbone wants them, without a second copy.

q/k/v are put into one matrix and gate/up into another, and the module's parameters become views of these. Nothing else
refers to the matrices: that parameters are neighbours in one storage is the only record, and it is read at every call.
So `.to()`, `load_state_dict`, copying and pickling need no care: what comes apart is seen and fused again.

LoRA layers of PEFT are read at every call too, so `set_adapter`, `disable_adapter` and merging work at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock

import torch
from torch import Tensor, nn

from jv5kernels.backbone import LayerWeights, LowRank, Projection
from jv5kernels.live.structure import ATTENTION, MLP, Module, base_linear
from jv5kernels.model_spec import ModelSpec

_fusing = Lock()


class NotSupported(Exception):
    """Something in the live model's present state that the packed backbone does not compute."""


def fuse_live_layers(inner: Module, spec: ModelSpec) -> list[LayerWeights]:
    """Returns the layers' weights; parameters that are not yet views of fused matrices become so.

    One layer at a time, so that the peak is one layer above what the weights take.

    Args:
        inner: a backbone, as `find_backbone` returns it.
        spec: its architecture, as `spec_of` returns it.

    Raises:
        NotSupported: a LoRA variant, or a weight that is not what `spec` says.
    """
    return [_layer_weights(layer, spec) for layer in inner.layers]


def unfuse_live_layers(inner: Module) -> None:
    """Gives every parameter a storage of its own again, one layer at a time; values stay bit for bit."""
    with _fusing, torch.inference_mode(False):
        for layer in inner.layers:
            for group in _groups(layer):
                for weight in _weights(group):
                    if weight.untyped_storage().nbytes() != weight.nbytes:
                        weight.data = weight.data.clone()


def _groups(layer: Module) -> tuple[list[Module], list[Module]]:
    attention, mlp = layer.self_attn._modules, layer.mlp._modules
    return [attention[name] for name in ATTENTION[:3]], [mlp[name] for name in MLP[:2]]


def _weights(modules: Sequence[Module]) -> list[nn.Parameter]:
    return [plain_weight(module) for module in modules]


def plain_weight(module: Module) -> nn.Parameter:
    """The weight under PEFT's wrappers; NotSupported unless it is a plain parameter of a Linear without bias."""
    linear = base_linear(module)
    weight = linear._parameters.get("weight")
    if type(weight) is not nn.Parameter or type(linear).forward is not nn.Linear.forward:
        raise NotSupported(f"a projection is a {type(linear).__name__} without a plain weight")
    if linear._parameters.get("bias") is not None:
        raise NotSupported("a projection has a bias")
    return weight


def _layer_weights(layer: Module, spec: ModelSpec) -> LayerWeights:
    attention, mlp = layer.self_attn._modules, layer.mlp._modules
    qkv, gate_up = _groups(layer)
    norms = [layer._modules["input_layernorm"], layer._modules["post_attention_layernorm"]]
    if spec.qk_norm:
        norms += [attention["q_norm"], attention["k_norm"]]
    input_norm, post_norm, *qk_norms = (norm.weight.detach() for norm in norms)
    q_norm, k_norm = qk_norms or (None, None)
    width, wide = spec.hidden_size, spec.intermediate_size
    return LayerWeights(
        input_norm=input_norm,
        qkv=_projection(qkv, (spec.qkv_width, width)),
        q_norm=q_norm,
        k_norm=k_norm,
        o=_projection([attention["o_proj"]], (width, spec.q_width)),
        post_norm=post_norm,
        gate_up=_projection(gate_up, (2 * wide, width)),
        down=_projection([mlp["down_proj"]], (width, wide)),
    )


def _projection(modules: Sequence[Module], shape: tuple[int, int]) -> Projection:
    """One matrix of `shape` for several modules of the model, with the LoRA terms that are active now."""
    weights = _weights(modules)
    fused = weights[0].detach() if len(weights) == 1 else _joined(weights)
    if fused is None:
        # Outside inference mode, because a parameter whose data is an inference tensor could never be trained again.
        with _fusing, torch.inference_mode(False):
            fused = _joined(weights)
            if fused is None:
                fused = _join(weights)
    if tuple(fused.shape) != shape:
        raise NotSupported(f"a weight has become {tuple(fused.shape)}; it was {shape}")
    terms: list[LowRank] = []
    start = 0
    for module, weight in zip(modules, weights, strict=True):
        terms += low_rank_terms(module, start, start + weight.shape[0])
        start += weight.shape[0]
    return Projection(fused, tuple(terms))


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """The matrix that `weights` are consecutive row blocks of, or None if they are not."""
    first = weights[0]
    storage = first.untyped_storage().data_ptr()
    end = first.data_ptr()
    for weight in weights:
        # Neighbouring addresses are not enough: an allocator may place two storages side by side.
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage:
            return None
        if weight.dtype != first.dtype or not weight.is_contiguous():
            return None
        end += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), first.stride())


def _join(weights: Sequence[Tensor]) -> Tensor:
    """Puts `weights` into one matrix and makes them views of it."""
    kinds = {(weight.dtype, weight.device, weight.shape[1]) for weight in weights}
    if len(kinds) > 1:
        raise NotSupported(
            "projections that belong together differ in dtype, device or input width"
        )
    fused = torch.cat([weight.detach() for weight in weights])
    for weight, rows in zip(
        weights, fused.split([weight.shape[0] for weight in weights]), strict=True
    ):
        weight.data = rows
    return fused


def low_rank_terms(
    module: Module, start: int, stop: int, adapter: str | None = None
) -> Iterator[LowRank]:
    """The LoRA terms that PEFT adds in eval mode to columns start:stop, read from its layers.

    Args:
        module: a Linear, or PEFT's wrapper around one.
        adapter: this one instead of those that are active.

    Raises:
        NotSupported: another tuner, a variant such as DoRA, a bias, or a state in which PEFT unmerges weights.
    """
    while "base_layer" in module._modules:
        parts = module._modules
        if not isinstance(parts.get("lora_A"), nn.ModuleDict):
            raise NotSupported(f"{type(module).__name__} is not a LoRA layer")
        downs, ups = parts["lora_A"]._modules, parts["lora_B"]._modules
        for name in (adapter,) if adapter is not None else active_adapters(module):
            if name in downs:
                if name in getattr(module, "lora_variant", ()):
                    variant = type(module.lora_variant[name]).__name__
                    raise NotSupported(f"adapter {name!r} is a LoRA variant ({variant})")
                a, b = _matrix(downs[name], name), _matrix(ups[name], name)
                yield LowRank(start, stop, a, b, float(module.scaling[name]))
        module = parts["base_layer"]


def active_adapters(module: Module) -> Sequence[str]:
    """The adapters whose terms a LoRA layer of PEFT would add now.

    Raises:
        NotSupported: adapters are merged and disabled at once: PEFT would unmerge them.
    """
    if module.disable_adapters:
        if module.merged:
            raise NotSupported(
                "adapters are merged and disabled: PEFT unmerges them in its forward"
            )
        return ()
    return () if module.merged else module.active_adapters


def _matrix(linear: Module, adapter: str) -> Tensor:
    if type(linear) is not nn.Linear or linear._parameters["bias"] is not None:
        raise NotSupported(f"adapter {adapter!r} has parts that are not a Linear without bias")
    weight = linear._parameters["weight"]
    assert weight is not None
    return weight.detach()
