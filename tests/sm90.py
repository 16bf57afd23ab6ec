"""Compiles Triton kernels for sm_90a without a GPU and reports what ptxas made of them.

The compilation runs in processes of their own, because this one may have Triton's interpreter switched on.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One kernel with one launch configuration.

    Args:
        module, kernel: where the jit function lives, e.g. "jv5kernels.kernels.rms_norm", "rms_norm_kernel".
        signature: argument -> Triton type ("*bf16", "*fp32", "i32", "fp32"); constexprs are left out.
        constants: constexpr (or None) arguments -> value.
        descriptors: TMA descriptor arguments of a Gluon kernel -> block shape (bf16).
        inspected: whether machine code and ptxas's warnings are wanted, which takes a second run of ptxas.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True
    maxnreg: int | None = None
    divisible: tuple[str, ...] = ()  # scalar arguments known to be multiples of 16
    descriptors: dict[str, list[int]] = field(default_factory=dict)
    inspected: bool = False


@dataclass(frozen=True)
class Report:
    """What the compiler says: bytes of shared memory, registers, stack and spills a thread, PTX and machine code.

    Args:
        sass, losses: of inspected cases, the machine code and ptxas's warnings of lost performance (serialised wgmma,
            ignored setmaxnreg).
    """

    shared: int
    registers: int
    stack: int
    local: int
    ptx: str = field(repr=False)
    sass: str = field(default="", repr=False)
    losses: list[str] = field(default_factory=list)

    def check(self, *, max_registers: int = 255) -> None:
        """Asserts what every shipped configuration must keep: fits the SM, no spills, no float64."""
        assert self.shared <= 227 * 1024, f"{self.shared} bytes of shared memory"
        assert self.stack == 0 and self.local == 0, (
            f"spills: stack {self.stack}, local {self.local}"
        )
        assert self.registers <= max_registers, f"{self.registers} registers"
        assert ".f64" not in self.ptx, "float64 arithmetic in the kernel"

    def check_chained(self) -> None:
        """Asserts that a kernel waits for the one before, once, and touches no memory until then."""
        before, after = self.ptx.split("griddepcontrol.wait")
        assert "griddepcontrol.launch_dependents" in after
        for access in ("ld.global", "st.global", "atom.global", "cp.async.bulk.tensor"):
            assert access not in before, f"{access} before the wait"


def compile_for_sm90(cases: list[Case]) -> list[Report]:
    """Compiles the cases, as many at a time as there are cores; raises what the compiler raised."""
    try:
        return list(_compilers().map(_compile, cases))
    except BrokenProcessPool:
        _compilers.cache_clear()
        raise


@lru_cache(maxsize=1)
def _compilers() -> ProcessPoolExecutor:
    """Processes that have imported torch and Triton once, for all tests of a run."""
    return ProcessPoolExecutor(
        min(4, os.cpu_count() or 1), get_context("spawn"), initializer=_leave_interpreter
    )


def _leave_interpreter() -> None:
    """Before anything imports Triton, as a case's constants do when they are unpickled."""
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(case: Case) -> Report:
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(case.module), case.kernel)
    pointers = {n for n, t in case.signature.items() if t.startswith("*")}
    types = case.signature | {n: _descriptor_type(b) for n, b in case.descriptors.items()}
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    missing = [n for n, t in signature.items() if t == "constexpr" and n not in case.constants]
    assert not missing, f"{case.kernel}: no type or constant for {missing}"
    source_class = ASTSource
    if case.descriptors:
        from triton.experimental.gluon._runtime import GluonASTSource as source_class
    source = source_class(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): v for n, v in case.constants.items()},
        attrs={
            (kernel.arg_names.index(n),): [["tt.divisibility", 16]]
            for n in pointers | set(case.divisible)
        },
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.enable_fp_fusion,
        "maxnreg": case.maxnreg,
    }
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return Report(
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        **_resource_usage(compiled.asm["cubin"]),
        **(_inspect(compiled.asm["cubin"], compiled.asm["ptx"]) if case.inspected else {}),
    )


def _descriptor_type(block: list[int]) -> str:
    from triton.experimental.gluon.language import NVMMASharedLayout

    return f"tensordesc<bf16{block},{NVMMASharedLayout(128, 16, rank=len(block))!r}>"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    found = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


def _inspect(cubin: bytes, ptx: str) -> dict[str, object]:
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        code, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        code.write_bytes(cubin)
        source.write_text(ptx)
        target = ("-v", "--gpu-name=sm_90a", "-o", str(Path(folder, "again.cubin")))
        said = _run(get_ptxas(90).path, *target, str(source))
        sass = _run(knobs.nvidia.cuobjdump.path, "-sass", str(code))
    return {"sass": sass, "losses": re.findall(r"C75\d\d[^\n]*", said)}


def wgmma_loops(sass: str) -> list[list[str]]:
    """The loops of machine code that hold wgmma instructions and no store: their instructions, innermost only."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    place = {int(address, 16): i for i, (address, _) in enumerate(found)}
    loops = []
    for i, (address, instruction) in enumerate(found):
        jump = re.search(r"BRA\S*.*?(0x[0-9a-f]+)", instruction)
        if not jump or int(jump[1], 16) >= int(address, 16):
            continue
        body = [text for _, text in found[place[int(jump[1], 16)] : i + 1]]
        if any("HGMMA" in text for text in body) and not any("STG" in text for text in body):
            loops.append(body)
    return loops
