"""Operators called straight and through torch's dispatcher: what may see a call does see it."""

import warnings
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jv5kernels.kernels import launch as launches
from jv5kernels.ops import quantize_binary, rms_norm
from jv5kernels.ops.registry import OPERATORS, is_observed

OPERATOR = OPERATORS["quantize_binary"]


class Subclass(torch.Tensor):
    pass


class Calls(TorchDispatchMode):
    """The names of the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def x():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def test_a_plain_call_is_not_observed(x):
    weight = torch.nn.Parameter(torch.ones(16))
    assert not is_observed([x, None, weight])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_observed([x.clone()])


def test_tensors_of_another_kind_are_observed(x):
    negated = torch._neg_view(x)
    assert negated.is_neg()
    for tensor in (x.as_subclass(Subclass), x.to("meta"), negated):
        assert is_observed([tensor])
    assert torch.equal(quantize_binary(negated), quantize_binary(-x))
    assert quantize_binary(x.to("meta")).device.type == "meta"


def test_modes_see_the_call(x):
    with Calls() as calls:
        quantize_binary(x)
    assert "jv5kernels::quantize_binary" in calls.names
    with FakeTensorMode() as mode:
        assert isinstance(quantize_binary(mode.from_tensor(x)), FakeTensor)
    with torch.device("cpu"):
        assert is_observed([x])


def test_profiler_names_the_operator(x):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        quantize_binary(x)
    assert "jv5kernels::quantize_binary" in {event.key for event in profile.key_averages()}


def test_transforms_see_the_call(x):
    def inner(row):
        seen.append(is_observed([row]))
        return row

    seen = []
    torch.func.vmap(inner)(x)
    assert seen == [True]


def test_traces_hold_the_operator(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(lambda x: quantize_binary(x), x, check_trace=False)
    assert "jv5kernels::quantize_binary" in str(traced.graph)


def test_schemas_name_the_tensors():
    for operator in OPERATORS.values():
        parsed = torch._C.parse_schema(operator.name + operator.schema).arguments
        places = tuple(i for i, a in enumerate(parsed) if "Tensor" in str(a.type))
        assert operator._tensor_places == places
        assert places[0] == 0


def test_versions_of_what_is_written_are_counted():
    qkv = torch.randn(2, 3 * 8)
    positions = torch.arange(2, dtype=torch.int32)
    cos_sin = torch.randn(2, 8)
    before = qkv._version
    OPERATORS["qk_norm_rope"](qkv, positions, cos_sin, 1, 1, 8, None, None, 1e-6, "torch")
    assert qkv._version > before


def test_both_ways_agree(x):
    weight = torch.ones(16)
    with Calls():
        through = rms_norm(x, weight, 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), through)


class Compiled:
    """Stands for what Triton returns from a launch."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """Stands for a function under triton.jit: notes what it was launched with."""

    def __init__(self, result):
        self.result, self.launches = result, []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.launches.append((grid, arguments, options))
            return self.result() if self.result else None

        return run


@pytest.fixture
def cache(monkeypatch):
    monkeypatch.setattr(launches, "COMPILED", {})
    return launches.COMPILED


CPU = torch.device("cpu")
OPTIONS = (("num_warps", 2),)


def test_launch_finds_the_compiled_kernel(cache, x):
    kernel = Kernel(Compiled)
    launches.launch(kernel, CPU, 5, (x, None), (1,), (16,), OPTIONS)
    assert kernel.launches == [((5,), (x, None, 1, 16), {"num_warps": 2})]
    other = x + 1
    launches.launch(kernel, CPU, 6, (other, None), (2,), (16,), OPTIONS)
    assert len(kernel.launches) == 1
    (compiled,) = cache.values()
    assert compiled.launches == [((6, 1, 1), (other, None, 2, 16))]


def test_launch_asks_triton_for_what_it_specialises_on(cache, x):
    kernel = Kernel(Compiled)
    cases = [
        ((x, None), (16,), OPTIONS),
        ((x, x), (16,), OPTIONS),
        ((x.double(), None), (16,), OPTIONS),
        ((x, None), (17,), OPTIONS),
        ((x, None), (16,), (("num_warps", 4),)),
    ]
    for tensors, fixed, options in cases:
        launches.launch(kernel, CPU, 1, tensors, (1,), fixed, options)
    assert len(kernel.launches) == len(cache) == len(cases)
    misaligned = x.flatten()[1:]
    for _ in range(2):
        launches.launch(kernel, CPU, 1, (misaligned, None), (1,), (16,), OPTIONS)
    assert len(kernel.launches) == len(cases) + 2


def test_launch_keeps_nothing_of_the_interpreter(cache, x):
    kernel = Kernel(None)
    for _ in range(2):
        launches.launch(kernel, CPU, 1, (x,), (), (), OPTIONS)
    assert len(kernel.launches) == 2 and not cache


def test_descriptors_are_made_once_and_keep_no_tensor_alive():
    from jv5kernels.kernels.hopper import block_descriptor

    memory = torch.zeros(256, 64, dtype=torch.bfloat16)
    first = block_descriptor(memory, 64, 64)
    assert block_descriptor(memory, 64, 64) is first
    assert (first.shape, first.strides, first.block_shape) == ([256, 64], [64, 1], [64, 64])
    assert first.base.data_ptr() == memory.data_ptr() and first.base.dtype == memory.dtype
    others = [block_descriptor(memory[64:], 64, 64), block_descriptor(memory[:100], 64, 64)]
    assert all(other is not first and other.kind == first.kind for other in others)
    assert block_descriptor(memory, 32, 64).kind != first.kind
    assert block_descriptor(memory.half(), 64, 64).kind != first.kind
    gone = weakref.ref(memory)
    del memory
    assert gone() is None


def test_launch_tells_kinds_of_descriptors_apart(cache, x):
    class Descriptor:
        def __init__(self, kind):
            self.kind = kind

    kernel = Kernel(Compiled)
    first, alike, other = (Descriptor(kind) for kind in (1, 1, 2))
    for descriptor in (first, alike, other):
        launches.launch(kernel, CPU, 3, (x,), (2,), (16,), OPTIONS, (descriptor,))
    assert [arguments for _, arguments, _ in kernel.launches] == [
        (first, x, 2, 16),
        (other, x, 2, 16),
    ]
    assert next(iter(cache.values())).launches == [((3, 1, 1), (alike, x, 2, 16))]
