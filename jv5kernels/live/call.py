"""One call of a patched forward: what it asks for, whether it can be computed on packed tokens, and its packing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from jv5kernels.backbone import LayerWeights
from jv5kernels.live.structure import Module
from jv5kernels.live.weights import NotSupported, active_adapters
from jv5kernels.packing import PackedBatch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda")

_CAPTURE = "transformers.utils.output_capturing"


@dataclass(frozen=True)
class Call:
    """The arguments of a call that the packed backbone can compute.

    Args:
        ids: (B, S) token ids, or None when embeddings are given.
        embeddings: (B, S, C) inputs_embeds, or None.
        mask: (B, S), not 0 where there is a token, or None when there is no padding.
        as_dict: whether an output class is returned, or a tuple.
        with_past: whether the output class has room for a KV cache.
    """

    ids: Tensor | None
    embeddings: Tensor | None
    mask: Tensor | None
    as_dict: bool
    with_past: bool

    @property
    def tokens(self) -> Tensor:
        given = self.ids if self.ids is not None else self.embeddings
        assert given is not None
        return given

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    def output(self, hidden: Tensor) -> Any:
        """The class that the original forward returns, around hidden states (B, S, C)."""
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPast

        kind = BaseModelOutputWithPast if self.with_past else BaseModelOutput
        output = kind(last_hidden_state=hidden)
        return output if self.as_dict else output.to_tuple()


def read_call(
    config: Any, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Call:
    """Reads the arguments of a call.

    Args:
        config: the model's.
        names: parameters of the original forward, in order.

    Raises:
        NotSupported: an argument that the packed backbone cannot serve, or that the original forward will refuse.
    """
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or given.keys() & kwargs.keys():
        raise NotSupported("arguments that the original forward does not take")
    given.update(kwargs)
    ids, embeddings = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    mask = given.pop("attention_mask", None)
    as_dict = given.pop("return_dict", None)
    if as_dict is None:
        as_dict = getattr(config, "return_dict", True)
    for name in ("output_attentions", "output_hidden_states"):
        if given.pop(name, None):
            raise NotSupported(name)
        if getattr(config, name, False):
            raise NotSupported(f"config.{name}")
    if given.pop("use_cache", None):
        raise NotSupported("use_cache=True")
    for name, value in given.items():
        if value is not None:
            raise NotSupported(f"argument {name}")
    # Transformers 5.24 renamed past_key_values to cache.
    with_past = not {"past_key_values", "cache"}.isdisjoint(names)
    call = Call(ids, embeddings, mask, bool(as_dict), with_past)
    _check_shapes(call)
    return call


def _check_shapes(call: Call) -> None:
    if (call.ids is None) == (call.embeddings is None):
        raise NotSupported("exactly one of input_ids and inputs_embeds is needed")
    tokens, dims = call.tokens, 2 if call.ids is not None else 3
    if not isinstance(tokens, Tensor) or tokens.dim() != dims or not tokens.numel():
        raise NotSupported("input that is empty or has other dimensions than (batch, sequence)")
    if call.ids is not None and tokens.dtype not in (torch.int64, torch.int32):
        raise NotSupported(f"input_ids of {tokens.dtype}")
    mask = call.mask
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != call.shape:
        kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotSupported(f"attention_mask {kind}; (batch, sequence) is supported")
    if mask.device != tokens.device:
        raise NotSupported("attention_mask on another device than the input")


def obstacle(inner: Module, *, gradients: bool) -> str | None:
    """Why the modules in `inner` must run themselves now, or None.

    Args:
        gradients: whether gradients are recorded, so that no parameter may require them.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a global forward hook is registered"
    if inner.training:
        return "the model is in training mode"
    stack = [child for child in inner._modules.values() if child is not None]
    while stack:
        module = stack.pop()
        # Straight from __dict__: this walk is part of every call, and nn.Module's attribute lookup is slow.
        state = module.__dict__
        if state["training"]:
            return f"a {type(module).__name__} in it is in training mode"
        if "forward" in state:
            return f"forward of a {type(module).__name__} in it is replaced"
        if state["_forward_pre_hooks"] or _active(state["_forward_hooks"]):
            return f"a forward hook is registered on a {type(module).__name__} in it"
        if gradients and any(
            p is not None and p.requires_grad for p in state["_parameters"].values()
        ):
            return "a parameter requires grad"
        try:
            stack.extend(_running_children(module, state["_modules"]))
        except NotSupported as reason:
            return str(reason)
    return None


def _running_children(module: Module, children: Mapping[str, Module]) -> Iterator[Module]:
    """The submodules that would run: of a LoRA layer, with several adapters in it, only those of the active ones."""
    if "lora_A" not in children or "base_layer" not in children:
        yield from (child for child in children.values() if child is not None)
        return
    base = children["base_layer"]
    assert base is not None
    yield base
    for name in active_adapters(module):
        for part in ("lora_A", "lora_B", "lora_dropout"):
            child = getattr(children.get(part), "_modules", {}).get(name)
            if child is not None:
                yield child


def _active(hooks: Mapping[int, Any]) -> bool:
    """Whether a hook is there that acts: Transformers leaves hooks behind that act only while outputs are captured."""
    if not hooks:
        return False
    if any(getattr(hook, "__module__", None) != _CAPTURE for hook in hooks.values()):
        return True
    collector = getattr(sys.modules[_CAPTURE], "_active_collector", None)
    return collector is None or bool(collector.get())


def check_tensors(call: Call, table: Tensor, norm: Tensor, layers: Sequence[LayerWeights]) -> None:
    """Raises NotSupported unless weights and input are of one supported device and one supported dtype."""
    kind = (table.device, table.dtype)
    if table.device.type not in DEVICES or table.dtype not in DTYPES:
        raise NotSupported(f"weights of {table.dtype} on {table.device}")
    if torch.is_autocast_enabled(table.device.type):
        raise NotSupported("autocast")
    if call.tokens.device != table.device:
        raise NotSupported(f"input on {call.tokens.device}, weights on {table.device}")
    if call.embeddings is not None and call.embeddings.dtype != table.dtype:
        raise NotSupported(f"inputs_embeds of {call.embeddings.dtype}, weights of {table.dtype}")
    weights = [norm]
    for layer in layers:
        weights += [layer.input_norm, layer.post_norm]
        weights += [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
        for projection in (layer.qkv, layer.o, layer.gate_up, layer.down):
            weights.append(projection.weight)
            for term in projection.low_rank:
                if term.a.device != table.device or term.b.device != table.device:
                    raise NotSupported("an adapter on another device than the weights")
                if term.a.dtype != term.b.dtype:
                    raise NotSupported("an adapter whose matrices differ in dtype")
    if any((weight.device, weight.dtype) != kind for weight in weights):
        raise NotSupported("weights of several dtypes or devices")


def packed(call: Call) -> tuple[PackedBatch, Tensor | None]:
    """Packs the tokens of a padded batch; waits for the device once if there is a mask.

    Positions are the columns of the padded batch, as Transformers numbers them: with padding on the left a sequence
    does not start at 0.

    Returns:
        The batch; its ids are rows of the flattened input where that is embeddings. And (T,) int64, the place of every
        token in the flattened (B·S) batch, or None if all places hold a token.

    Raises:
        NotSupported: a mask with holes, or without any token.
    """
    rows, columns = call.shape
    device = call.tokens.device
    spans = None if call.mask is None else _spans(call.mask)
    if spans is None or (spans[:, 1] == columns).all():
        spans = np.stack([np.arange(rows) * columns, np.full(rows, columns)], axis=1)
        place = torch.arange(rows * columns, device=device)
        index = None
    else:
        spans = spans[spans[:, 1] > 0]
        ends = spans[:, 1].cumsum()
        shift, lengths = torch.from_numpy(
            np.stack([spans[:, 0] - ends + spans[:, 1], spans[:, 1]])
        ).to(device)
        total = int(ends[-1])
        place = shift.repeat_interleave(lengths, output_size=total)
        place += torch.arange(total, device=device)
        index = place
    cu_seqlens = torch.from_numpy(np.append(0, spans[:, 1].cumsum()).astype(np.int32)).to(device)
    ids = place if call.ids is None else call.ids.reshape(-1)
    if call.ids is not None and index is not None:
        ids = ids[index]
    batch = PackedBatch(
        ids.to(torch.int32),
        (place % columns).to(torch.int32),
        cu_seqlens,
        int(spans[:, 1].max()),
        np.arange(len(spans)),
    )
    return batch, index


def _spans(mask: Tensor) -> np.ndarray:
    """(B, 2) int64: the place of each row's first token in the flattened batch, and its number of tokens."""
    rows, columns = mask.shape
    valid = (mask != 0).to(torch.int32)
    lengths = valid.sum(1)
    first = valid.argmax(1)
    last = columns - 1 - valid.flip(1).argmax(1)
    lengths, first, last = torch.stack([lengths, first, last]).cpu().numpy()
    if ((lengths > 0) & (last - first + 1 != lengths)).any():
        raise NotSupported("attention_mask with holes")
    if not lengths.any():
        raise NotSupported("attention_mask without any token")
    return np.stack([np.arange(rows) * columns + first, lengths], axis=1)
