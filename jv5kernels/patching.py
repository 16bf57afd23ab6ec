"""patch and unpatch: a live Transformers or Sentence Transformers model computes on packed tokens, called as before.

Only `forward` of the one backbone instance is bound anew. Its class, its module and every other model stay as they are,
and every call that cannot be computed exactly goes to the original forward; the report counts these with the reason.

What differs from the original forward when a call is computed here:

* hidden states at padded positions are zero (the original leaves values there that nothing should read);
* with `use_cache` not given, `past_key_values` (`cache` since Transformers 5.24) is None: an embedding model's caller
  has no use for a cache;
* rotary angles are exact, also in a model that was cast to bfloat16 after loading, which rounds its `inv_freq` buffer.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from threading import RLock
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from jv5kernels.backbone import PackedBackbone
from jv5kernels.live.call import Call, check_tensors, obstacle, packed, read_call
from jv5kernels.live.structure import Module, find_backbone, is_causal, spec_of
from jv5kernels.live.weights import NotSupported, fuse_live_layers, unfuse_live_layers
from jv5kernels.model_spec import ModelSpec
from jv5kernels.ops.qk_norm_rope import rope_table

_lock = RLock()


@dataclass
class PatchReport:
    """What `patch` replaced, what it left, and how the calls went since. A context manager that undoes the patch.

    Args:
        path: where the backbone is in the model ("" for the model itself).
        kind: class name of the backbone.
        spec: its architecture.
        replaced: what is computed by this package.
        kept: what goes on as before, and why.
        packed: calls computed on packed tokens.
        fallbacks: reason -> calls that went to the original forward for it.
    """

    path: str
    kind: str
    spec: ModelSpec
    replaced: tuple[str, ...]
    kept: tuple[str, ...]
    packed: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    _inner: Module | None = field(default=None, repr=False, compare=False)
    _depth: int = field(default=0, repr=False, compare=False)

    def __enter__(self) -> PatchReport:
        with _lock:
            self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            self._depth -= 1
            if self._depth == 0 and self._inner is not None:
                unpatch(self._inner)

    def __str__(self) -> str:
        where = f"{self.path} ({self.kind})" if self.path else self.kind
        lines = [f"patched {where}", "  computed on packed tokens:"]
        lines += [f"    {item}" for item in self.replaced]
        lines += ["  left as it is:", *(f"    {item}" for item in self.kept)]
        lines += [
            f"  calls: {self.packed} packed, {self.fallbacks.total()} by the original forward"
        ]
        lines += [f"    {count} x {reason}" for reason, count in self.fallbacks.most_common()]
        return "\n".join(lines)


def patch(model: nn.Module, *, attention: str = "auto") -> PatchReport:
    """Lets the Qwen3 or EuroBERT backbone in `model` compute on packed tokens, and returns what was replaced.

    The same calls give the same output classes and shapes. Weights are not copied: they are fused in place and the
    model's parameters become views, so `state_dict()` and `save_pretrained()` stay what they were. Call the model under
    `torch.inference_mode()` or `torch.no_grad()`: while gradients are recorded the original forward computes.

    Args:
        model: a Qwen3Model or EuroBertModel, or anything that holds one: a PeftModel or PeftMixedModel (the v5 remote
            class is one), a SentenceTransformer.
        attention: implementation of `ops.attention_varlen`.

    Returns:
        The report, also a context manager that undoes the patch at its end. Of a model that is patched already, the
        report it has; the end of the outermost `with` then undoes it.

    Raises:
        TypeError: no such backbone in `model`; what was looked for is listed.
        ValueError: a backbone with something that is not supported; the reasons are listed, the model is untouched.

    Example:
        >>> with torch.inference_mode(), patch(model) as report:
        ...     hidden = model(**batch).last_hidden_state
        >>> print(report)
    """
    path, inner = find_backbone(model)
    with _lock:
        present = inner.__dict__.get("forward")
        if isinstance(present, PatchedForward):
            return present.report
        if present is not None:
            raise ValueError(
                f"forward of this {type(inner).__name__} instance is replaced already, by "
                f"{getattr(present, '__module__', type(present).__module__)}: undo that first"
            )
        spec = spec_of(inner)
        report = PatchReport(
            path,
            type(inner).__name__,
            spec,
            _replaced(spec),
            _kept(model, inner, _present_reason(inner, spec)),
            _inner=inner,
        )
        inner.__dict__["forward"] = PatchedForward(inner, report, attention)
    return report


def unpatch(model: nn.Module) -> None:
    """Undoes `patch`: the class's forward again, and every parameter in a storage of its own. Nothing if not patched.

    Raises:
        TypeError: no Qwen3 or EuroBERT backbone in `model`.
    """
    _, inner = find_backbone(model)
    with _lock:
        if isinstance(inner.__dict__.get("forward"), PatchedForward):
            del inner.__dict__["forward"]
            unfuse_live_layers(inner)


class PatchedForward:
    """The `forward` that `patch` puts on a backbone instance. It holds no weights and may be copied and pickled.

    Args:
        inner: the backbone.
        report: where calls are counted.
        attention: implementation of `ops.attention_varlen`.
    """

    def __init__(self, inner: Module, report: PatchReport, attention: str) -> None:
        self.inner = inner
        self.report = report
        self.attention = attention
        parameters = inspect.signature(self.original).parameters.values()
        self._names = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        self._warned = False

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Any:
        """The class's own forward, bound to the instance."""
        return type(self.inner).forward.__get__(self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.original(*args, **kwargs)
        try:
            call = read_call(self.inner.config, self._names, args, kwargs)
            self._check_state(call)
            output = self._packed(call)
        except NotSupported as reason:
            with _lock:
                self.report.fallbacks[str(reason)] += 1
            return self.original(*args, **kwargs)
        with _lock:
            self.report.packed += 1
        return output

    def _check_state(self, call: Call) -> None:
        records = torch.is_grad_enabled()
        reason = obstacle(self.inner, gradients=records)
        if reason is None and records and call.embeddings is not None:
            reason = "inputs_embeds requires grad" if call.embeddings.requires_grad else None
        if reason is not None:
            if "requires grad" in reason and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the patched model runs its original forward, because {reason} while gradients are recorded: "
                    "call it under torch.inference_mode()",
                    stacklevel=4,
                )
            raise NotSupported(reason)
        if is_causal(self.inner) != self.report.spec.causal:
            raise NotSupported("config.is_causal has changed since patching")

    def _packed(self, call: Call) -> Any:
        spec, inner = self.report.spec, self.inner
        table, norm = inner.embed_tokens.weight.detach(), inner.norm.weight.detach()
        layers = fuse_live_layers(inner, spec)
        check_tensors(call, table, norm, layers)
        with torch.no_grad(), torch.cuda.device_of(table):
            batch, index = packed(call)
            backbone = PackedBackbone(
                spec,
                layers,
                embedding=table if call.embeddings is None else call.embeddings.flatten(0, 1),
                norm_weight=norm,
                rope=_rope(max(spec.max_position_embeddings, call.shape[1]), spec, table.device),
                attention=self.attention,
            )
            hidden = backbone.forward(batch)
            if index is not None:
                places = hidden.new_zeros(call.shape[0] * call.shape[1], hidden.shape[1])
                hidden = places.index_copy_(0, index, hidden)
        return call.output(hidden.view(*call.shape, -1))


@lru_cache(maxsize=8)
def _rope(positions: int, spec: ModelSpec, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return rope_table(positions, spec.head_dim, spec.rope_theta, device)


def _replaced(spec: ModelSpec) -> tuple[str, ...]:
    norms = "q/k norms and rotary embedding" if spec.qk_norm else "rotary embedding"
    return (
        f"{spec.num_layers} layers without padding: fused q/k/v and gate/up projections, {norms}, "
        f"{'causal' if spec.causal else 'bidirectional'} attention, SwiGLU, RMSNorms with the residual additions",
        "the final norm; padded positions of the output are zero",
        "LoRA terms of the active adapters, unmerged as PEFT computes them",
    )


def _present_reason(inner: Module, spec: ModelSpec) -> str | None:
    """Fuses the weights; why calls would go to the original forward as the model is now, or None."""
    try:
        fuse_live_layers(inner, spec)
    except NotSupported as reason:
        return str(reason)
    return obstacle(inner, gradients=False)


def _kept(model: nn.Module, inner: Module, reason: str | None) -> tuple[str, ...]:
    kept = ["input_ids -> the model's own embedding table; parameters, state_dict and config"]
    if model is not inner:
        kept.append(
            f"everything around the backbone in {type(model).__name__}: its own code runs as before"
        )
    if reason is not None:
        kept.append(f"at present all calls: {reason}")
    kept.append(
        "calls with output_attentions, output_hidden_states, a KV cache, position_ids or other arguments, masks with "
        "holes or of another shape, training mode, recorded gradients, autocast, forward hooks: the original forward"
    )
    return tuple(kept)
