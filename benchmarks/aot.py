"""Compile every Triton kernel without a GPU and read what the machine code uses.

    python -m benchmarks.aot [--all] [--only NAME] [--arch 90]

Kernels are taken from their own launchers: the calls of ``aot_cases.py`` run on CPU tensors while
the launch itself is replaced by a compilation for the target, so what is compiled is what would
run. Prints one line per kernel: registers per thread, bytes of stack (spills), shared memory per
program. Fails on a stack over 128 bytes, shared memory over the architecture's limit, or a
``wgmma`` of 8 columns.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rodimus_kernels._triton import assume_capability

from . import aot_cases

# bytes of shared memory that a program may use: CUDA programming guide, technical specifications
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
STACK_LIMIT = 128

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
}


class Usage(NamedTuple):
    """Resources of one compiled kernel."""

    case: str
    kernel: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    shared: int
    narrow: bool  # wgmma of 8 columns, which ended in an illegal access on an H200

    @property
    def fault(self) -> str:
        """What breaks a limit, or an empty string."""
        if self.stack > STACK_LIMIT:
            return f"stack over {STACK_LIMIT}"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"shared memory over {SHARED_LIMIT[self.arch]}"
        if self.narrow:
            return "wgmma of 8 columns"
        return ""


def argument(value: Any) -> tuple[str, bool]:
    """Type of a launch argument in a Triton signature, and whether it is divisible by 16."""
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if hasattr(value, "block_shape"):
        shape = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_TYPES[value.base.dtype]}[{shape}]>", False
    raise TypeError(f"no Triton type for a {type(value).__name__}")


def compile_launch(kernel: JITFunction, args: tuple, options: dict, arch: int) -> Any:
    """Compile what ``kernel[grid](*args, **options)`` would run on the architecture."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.get(parameter.name, parameter.default)
        special = not parameter.do_not_specialize
        # None and 1 are compiled in, as at a launch
        is_one = special and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name], divisible = argument(value)
        if divisible and special:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def read_usage(compiled: Any) -> tuple[int, int]:
    """``(registers, stack bytes)`` from the cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(match[1]), int(match[2])


@contextlib.contextmanager
def compile_instead_of_launching(case: str, arch: int, found: dict) -> Iterator[None]:
    """Inside, a launch compiles its kernel for ``arch`` and records the usage in ``found``."""

    def run(kernel, *args, grid, warmup, **options):
        compiled = compile_launch(kernel, args, options, arch)
        registers, stack = read_usage(compiled)
        narrow = re.search(r"wgmma\.mma_async\S*\.m64n8k", compiled.asm["ptx"]) is not None
        warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        usage = Usage(case, kernel.__name__, arch, warps, registers, stack, shared, narrow)
        found[usage] = None

    launch, JITFunction.run = JITFunction.run, run
    try:
        with assume_capability(arch):
            yield
    finally:
        JITFunction.run = launch


def table(archs: tuple[int, ...], *, everything: bool = False, only: str = "") -> Iterator[Usage]:
    """Usage of every kernel, case and architecture; ``only`` keeps the names that contain it."""
    for case in aot_cases.cases(everything=everything):
        name = f"{case.module}: {case.name}"
        for arch in archs if only in name else ():
            found: dict[Usage, None] = {}
            with compile_instead_of_launching(name, arch, found):
                case.call()
            yield from found


def main() -> int:
    """Print the table; 1 if a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration, not the default")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    archs = {"type": int, "nargs": "+", "default": list(SHARED_LIMIT), "choices": SHARED_LIMIT}
    parser.add_argument("--arch", **archs)
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    kernels, faults, case = 0, 0, None
    for usage in table(tuple(options.arch), everything=options.all, only=options.only):
        kernels, faults = kernels + 1, faults + bool(usage.fault)
        if usage.case != case:
            case = usage.case
            print(case)
        print(
            f"  sm_{usage.arch:<4} {usage.kernel:<42} warps {usage.num_warps}"
            f"  registers {usage.registers:3}  stack {usage.stack:4}"
            f"  shared {usage.shared / 1024:6.1f} KiB  {usage.fault}",
            flush=True,
        )
    print(f"triton {triton.__version__}: {kernels} kernels, {faults} over a limit")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
