"""Compiles Triton kernels for sm_90a without a GPU and reports what ptxas made of them.

The compilation runs in a process of its own, because this one may have Triton's interpreter switched on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One kernel with one launch configuration.

    Args:
        module, kernel: where the jit function lives, e.g. "jv5kernels.kernels.rms_norm", "rms_norm_kernel".
        signature: argument -> Triton type ("*bf16", "*fp32", "i32", "fp32"); constexprs are left out.
        constants: constexpr (or None) arguments -> value.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True
    divisible: tuple[str, ...] = ()  # scalar arguments known to be multiples of 16


@dataclass(frozen=True)
class Report:
    """What the compiler says: bytes of shared memory, registers, stack and spills a thread, and the PTX."""

    shared: int
    registers: int
    stack: int
    local: int
    ptx: str = field(repr=False)

    def check(self, *, max_registers: int = 255) -> None:
        """Asserts what every shipped configuration must keep: fits the SM, no spills, no float64."""
        assert self.shared <= 227 * 1024, f"{self.shared} bytes of shared memory"
        assert self.stack == 0 and self.local == 0, (
            f"spills: stack {self.stack}, local {self.local}"
        )
        assert self.registers <= max_registers, f"{self.registers} registers"
        assert ".f64" not in self.ptx, "float64 arithmetic in the kernel"


def compile_for_sm90(cases: list[Case]) -> list[Report]:
    """Compiles all cases in one child process; raises with its output when one fails."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
    )
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        child = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([asdict(case) for case in cases]),
            capture_output=True,
            text=True,
            env=environment,
        )
    assert child.returncode == 0, child.stderr
    return [Report(**report) for report in json.loads(child.stdout.splitlines()[-1])]


def _compile(case: Case) -> Report:
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(case.module), case.kernel)
    aligned = {n for n, t in case.signature.items() if t.startswith("*")} | set(case.divisible)
    signature = {n: case.signature.get(n, "constexpr") for n in kernel.arg_names}
    missing = [n for n, t in signature.items() if t == "constexpr" and n not in case.constants]
    assert not missing, f"{case.kernel}: no type or constant for {missing}"
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): v for n, v in case.constants.items()},
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.enable_fp_fusion,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Report(shared=compiled.metadata.shared, ptx=compiled.asm["ptx"], **usage)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}


if __name__ == "__main__":
    cases = [Case(**case) for case in json.load(sys.stdin)]
    print(json.dumps([asdict(_compile(case)) for case in cases]))
