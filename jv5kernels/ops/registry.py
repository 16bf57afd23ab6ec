"""How an operator is defined, registered with torch and dispatched to one of its implementations.

Every operator is one `Operator`: a schema in the ``jv5kernels`` namespace of ``torch.ops``, a fake
implementation that gives shapes and dtypes (so that torch.compile and torch.export see through it),
and named implementations. ``impl="auto"`` takes the first usable one of a short ordered list per
device; any other value is an order that is carried out or refused with reasons.

A call goes through torch's dispatcher where something in it may want to see the call: a compiler, a mode, a
transform, a profiler. Otherwise it goes straight to the implementation, which saves 8 to 10 µs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

LIBRARY = torch.library.Library("jv5kernels", "DEF")

# Every operator by name, for `jv5kernels info` and for tests that visit them all.
OPERATORS: dict[str, Operator] = {}

Reason = str | None

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def no_objection(*_: Any) -> Reason:
    """The check of an implementation that takes whatever the operator takes."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Args:
        run: takes the schema's arguments in order, without the last one (`impl`).
        unavailable: device -> why this machine cannot run it there, or None.
        unsupported: the same arguments as `run` -> why it cannot compute these, or None.
    """

    run: Callable[..., Any]
    unavailable: Callable[[torch.device], Reason] = no_objection
    unsupported: Callable[..., Reason] = no_objection


@dataclass(frozen=True)
class Operator:
    """A torch operator with several implementations.

    Args:
        name: name in ``torch.ops.jv5kernels``.
        schema: torch schema without the name; its last argument is ``str impl``.
        implementations: name -> implementation.
        auto: device type -> names that ``impl="auto"`` tries, in order.
        fake: the schema's arguments -> empty outputs of the right shape and dtype.
    """

    name: str
    schema: str
    implementations: Mapping[str, Implementation]
    auto: Mapping[str, Sequence[str]]
    fake: Callable[..., Any] = field(repr=False)
    # Where the schema has tensors, and whether it writes into one. Found at once: a property that finds them when first
    # asked takes a lock, which torch.compile does not trace.
    _tensor_places: tuple[int, ...] = field(init=False, repr=False)
    _writes: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parameters = self.schema[1 : self.schema.index(") ->")].split(",")
        places = tuple(i for i, p in enumerate(parameters) if p.strip().startswith("Tensor"))
        object.__setattr__(self, "_tensor_places", places)
        object.__setattr__(self, "_writes", "!" in self.schema)
        tags = (torch.Tag.needs_exact_strides,)
        LIBRARY.define(self.name + self.schema, tags=tags)
        LIBRARY.impl(self.name, self._dispatch, "CPU")
        LIBRARY.impl(self.name, self._dispatch, "CUDA")
        torch.library.register_fake(f"jv5kernels::{self.name}", self.fake, lib=LIBRARY)
        OPERATORS[self.name] = self

    def __call__(self, *arguments: Any) -> Any:
        """Calls the operator; arguments as in the schema."""
        tensors = [arguments[i] for i in self._tensor_places]
        self.refuse_gradients(tensors)
        # Compilers look for calls in the dispatcher, which also counts the versions of tensors that are written into.
        if torch.compiler.is_compiling() or self._writes or is_observed(tensors):
            return getattr(torch.ops.jv5kernels, self.name)(*arguments)
        return self._dispatch(*arguments)

    def refuse_gradients(self, arguments: Sequence[torch.Tensor | None]) -> None:
        """Raises ValueError when gradients are recorded and a tensor requires them."""
        if not torch.is_grad_enabled():
            return
        for argument in arguments:
            if argument is not None and argument.requires_grad:
                raise ValueError(
                    f"jv5kernels.ops.{self.name} computes no gradients, but an input requires them: "
                    "call it under torch.no_grad() or torch.inference_mode(), or detach the input"
                )

    def _dispatch(self, *arguments: Any) -> Any:
        inputs = arguments[:-1]
        # The first argument of every schema is a tensor.
        device = inputs[0].device
        run = self.choose(arguments[-1], device, inputs).run
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device(device):
                return run(*inputs)
        return run(*inputs)

    def choose(
        self, impl: str, device: torch.device, inputs: Sequence[Any] | None = None
    ) -> Implementation:
        """The implementation that `impl` means on a device, for given inputs when they are known.

        Raises:
            ValueError: `impl` is unknown, or cannot run here (with the reasons).
        """
        return self.implementations[self.choose_name(impl, device, inputs)]

    def choose_name(
        self, impl: str, device: torch.device, inputs: Sequence[Any] | None = None
    ) -> str:
        """Like `choose`, but the implementation's name."""
        if impl == "auto":
            impl = os.environ.get("JV5_IMPL", "auto")
            if impl not in self.implementations:
                impl = "auto"
        if impl == "auto":
            candidates: Sequence[str] = self.auto.get(device.type, ())
        elif impl in self.implementations:
            candidates = (impl,)
        else:
            raise ValueError(
                f"impl={impl!r} is no implementation of {self.name}: "
                f"choose 'auto' or one of {sorted(self.implementations)}"
            )
        reasons = []
        for name in candidates:
            reason = self.reason_against(name, device, inputs)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise ValueError(
            f"{self.name} with impl={impl!r} cannot run on {device.type}: "
            + ("; ".join(reasons) or "no implementation for this device")
        )

    def reason_against(
        self, name: str, device: torch.device, inputs: Sequence[Any] | None = None
    ) -> Reason:
        """Why implementation `name` cannot be used on `device` (for `inputs`), or None when it can."""
        implementation = self.implementations[name]
        reason = implementation.unavailable(device)
        if reason is None and inputs is not None:
            reason = implementation.unsupported(*inputs)
        return reason


def is_observed(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether torch's dispatcher would do more for a call with these tensors than call the kernel of their device.

    That is so under torch.jit.trace, a profiler, a mode (FakeTensorMode, torch.device as a context) or a transform
    (torch.func.vmap), and for a subclass of Tensor, a device that we have no kernel for, or a lazily negated tensor.
    """
    if (
        torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return True
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in PLAIN_TENSORS
            or not (tensor.is_cuda or tensor.is_cpu)
            or tensor.is_neg()
        ):
            return True
    return False


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter (environment variable TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_unavailable(device: torch.device) -> Reason:
    """Why our Triton kernels cannot run on a device, or None."""
    if find_triton() is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        reason = _capability_reason(device.index or 0)
    else:
        reason = "needs a CUDA device (or TRITON_INTERPRET=1)"
    # Asked last: looking at the environment takes longer than all else.
    return None if reason is None or triton_interpreted() else reason


def gluon_unavailable(device: torch.device) -> Reason:
    """Why our Gluon kernels for Hopper cannot run on a device, or None."""
    if find_triton() is None:
        return "the package triton is not installed"
    if device.type != "cuda" or triton_interpreted():
        return "needs a CUDA device (Triton's interpreter does not run Gluon)"
    return _hopper_reason(device.index or 0)


@lru_cache
def find_triton() -> Any:
    """The import spec of triton, or None; triton itself is not imported."""
    return find_spec("triton")


@lru_cache
def _capability_reason(index: int) -> Reason:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"needs compute capability 8.0 or later, this GPU has {major}.{minor}"
    return None


@lru_cache
def _hopper_reason(index: int) -> Reason:
    major, minor = torch.cuda.get_device_capability(index)
    if major != 9:
        return f"needs compute capability 9.0 (Hopper), this GPU has {major}.{minor}"
    if find_spec("triton.experimental.gluon.nvidia.hopper") is None:
        return "needs Triton 3.6 or later"
    return None


@lru_cache
def _native_module_reason() -> Reason:
    if find_spec("jv5kernels._C") is None:
        return "the extension jv5kernels._C was not built (install with a C++ compiler)"
    return None


def cpp_unavailable(device: torch.device) -> Reason:
    """Why the C++ kernels of jv5kernels._C cannot run on a device, or None."""
    if device.type != "cpu":
        return "runs on CPU tensors only"
    return _native_module_reason()
