"""Build the native operators of ``csrc/``: ``python -m rodimus_kernels build``, or ``make native``.

Two libraries on torch's stable ABI, without Python.h, so one build serves every Python and every
torch from 2.11 on. ``_rodimus_cpu.so`` needs a C++17 compiler and seconds; ``_rodimus_cuda.so``
needs nvcc and a minute. There are two because either compiler may be absent, and so that a machine
without a GPU never maps megabytes of GPU code. A library that cannot be built is reported in one
line and skipped, because every operator has a form in plain torch.

A library carries a digest of the sources and of this file, and the CUDA library also the
architectures it has code for. An up-to-date library is not built again; a library that does not
match the sources beside it is never loaded.

Environment:
    RODIMUS_BUILD_CPU: ``auto`` (build if a compiler is found), ``0`` (never), or ``1`` (raise an
        error if it cannot be built).
    RODIMUS_BUILD_CUDA: the same for nvcc.
    RODIMUS_CUDA_ARCHS: for example ``"80;90a"``, from old to new. The default is those of
        ``80;90a;100`` that nvcc knows; GPUs newer than the last run its PTX.
    CXX, CUDA_HOME: compilers to use; naming one that does not exist is an error.

Only the standard library is imported, so setup.py can run this file before anything is installed.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent
LIBRARIES = {"cpu": "_rodimus_cpu.so", "cuda": "_rodimus_cuda.so"}
DEFAULT_ARCHS = "80;90a;100"

_MARK = b"RODIMUS-SOURCES:"
_ARCHS_MARK = b"RODIMUS-ARCHS:"
_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
# torch 2.11, the oldest release the package supports
_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
_AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
CPU_ISAS = {
    "portable": "",
    "avx2": "-mavx2 -mfma",
    "avx512": _AVX512,
    "avx512bf16": f"{_AVX512} -mavx512bf16 -mavx512vnni",
}
_CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"]
# numeric loops need neither errno nor floating-point exceptions
_KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]


class Unavailable(Exception):
    """Something needed for a library is not on this machine; the message says what."""


def sources() -> Path | None:
    """The folder ``csrc`` of this checkout, or of the installed package; None if there is none."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent.parent / "csrc"):
        if (folder / "arguments.h").is_file():
            return folder
    return None


def digest(folder: Path) -> str:
    """Digest of the sources in a folder and of how they are built."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _SUFFIXES):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0")
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def recorded_digest(library: Path) -> str | None:
    """The digest a built library carries, or None if it carries none."""
    return _recorded(library, _MARK + rb"([0-9a-f]{16})")


def recorded_archs(library: Path) -> str | None:
    """The architectures that a built library has code for, as in ``RODIMUS_CUDA_ARCHS``; None if
    it has none for a GPU."""
    return _recorded(library, _ARCHS_MARK + rb"([0-9af;]+)\0")


def _recorded(library, pattern):
    found = re.search(pattern, library.read_bytes())
    return found[1].decode() if found else None


def has_code_for(archs: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs what was built for these architectures.

    Code for an architecture also runs on its later minor versions; with the letter ``a`` it runs on
    no other, with ``f`` on its family. PTX of the last architecture runs on it and all later ones.
    """
    major, minor = capability
    for arch in archs.split(";"):
        known, letter = int(arch.rstrip("af")), arch.lstrip("0123456789")
        later = known % 10 == minor if letter == "a" else known % 10 <= minor
        if known // 10 == major and later:
            return True
    return int(archs.split(";")[-1].rstrip("af")) <= 10 * major + minor


def build(output: Path = PACKAGE, *, force: bool = False) -> dict[str, str]:
    """Build what this machine can build and report the outcome for each library.

    Args:
        output: folder the libraries are written to.
        force: build even what is up to date.

    Returns:
        One line per library: ``built``, ``up to date``, or why it was ``skipped`` or ``failed``.

    Raises:
        RuntimeError: a library was required and cannot be built.
    """
    lines = {}
    for kind in LIBRARIES:
        variable = f"RODIMUS_BUILD_{kind.upper()}"
        wanted = os.environ.get(variable, "auto")
        if wanted not in ("auto", "0", "1"):
            raise RuntimeError(f"{variable} must be auto, 0 or 1, got {wanted!r}")
        if wanted == "0":
            lines[kind] = f"skipped: {variable}=0"
            continue
        try:
            lines[kind] = _build_one(kind, output / LIBRARIES[kind], force)
        except (Unavailable, RuntimeError, OSError) as reason:
            if wanted == "1":
                raise RuntimeError(f"{variable}=1, but {reason}") from None
            word = "skipped" if isinstance(reason, Unavailable) else "failed"
            lines[kind] = f"{word}: {reason}"
    return lines


def _build_one(kind, library, force):
    folder = sources()
    if folder is None:
        raise Unavailable("the sources (csrc) are not there")
    if platform.system() != "Linux":
        raise Unavailable(f"it is built on Linux only, this is {platform.system()}")
    current = digest(folder)
    if not force and library.is_file() and recorded_digest(library) == current:
        if kind == "cpu" or _has_wanted_archs(library):
            return "up to date"
    make = {"cpu": _build_cpu, "cuda": _build_cuda}[kind]
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / library.name
        make(folder, Path(scratch), built, f'-DRODIMUS_SOURCES="{current}"')
        # written beside its destination, then renamed: processes that map the old file keep it
        beside = library.with_suffix(f".{os.getpid()}.new")
        try:
            shutil.copyfile(built, beside)
            os.replace(beside, library)
        finally:
            beside.unlink(missing_ok=True)
    return "built"


def _build_cpu(folder, scratch, library, mark):
    cxx, torch = _cxx(), _torch()
    isas = [name for name in _usable_isas() if _accepts(cxx, CPU_ISAS[name].split())]
    has = [f"-DRODIMUS_HAS_{name}" for name in isas]
    includes = [f"-I{torch / 'include'}", _TARGET]
    commands, objects = [], []
    for name in isas:
        defines = [f"-DRODIMUS_ISA={name}", f'-DRODIMUS_ISA_NAME="{name}"', *CPU_ISAS[name].split()]
        objects.append(scratch / f"kernels_{name}.o")
        commands.append([*_CXX_FLAGS, *_KERNEL_FLAGS, *defines, "-c", "cpu/kernels.cpp"])
    objects += [scratch / "operators.o", scratch / "block.o", scratch / "select.o"]
    commands.append([*_CXX_FLAGS, *includes, mark, "-c", "cpu/operators.cpp"])
    commands.append([*_CXX_FLAGS, *includes, "-c", "cpu/block.cpp"])
    commands.append([*_CXX_FLAGS, *has, "-c", "cpu/select.cpp"])
    _run_all(
        ([cxx, *command, "-o", str(out)] for command, out in zip(commands, objects, strict=True)),
        folder,
    )
    _run([cxx, "-shared", *map(str, objects), *_links(torch), "-o", str(library)], folder)


def _build_cuda(folder, scratch, library, mark):
    nvcc, cxx, torch = _nvcc(), _cxx(), _torch()
    _check_release(nvcc)
    archs = cuda_archs(nvcc)
    objects = [scratch / f"{name}.o" for name in ("kernels", "operators", "block")]
    include = [f"-I{torch / 'include'}", f"-I{nvcc.parent.parent / 'include'}"]
    host = [cxx, *_CXX_FLAGS, *include, _TARGET, "-DUSE_CUDA", mark]
    host.append(f'-DRODIMUS_ARCHS="{";".join(archs)}"')
    device = [str(nvcc), *nvcc_flags(archs), "-ccbin", cxx]
    _run_all(
        [
            [*device, "-c", "cuda/kernels.cu", "-o", str(objects[0])],
            [*host, "-c", "cuda/operators.cpp", "-o", str(objects[1])],
            [*host, "-c", "cuda/block.cpp", "-o", str(objects[2])],
        ],
        folder,
    )
    # the runtime is linked statically: the library needs a driver, but no particular toolkit
    _run(
        [str(nvcc), "-shared", "-cudart", "static", *map(str, objects), *_links(torch)]
        + ["-o", str(library)],
        folder,
    )


def cuda_archs(nvcc: Path) -> list[str]:
    """Architectures to build for: those asked for, or the default ones that this nvcc knows."""
    asked = os.environ.get("RODIMUS_CUDA_ARCHS")
    archs = (asked or DEFAULT_ARCHS).replace(",", ";").split(";")
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise RuntimeError(
                f'RODIMUS_CUDA_ARCHS must be like "80;90a", got {asked!r} with {arch!r} in it'
            )
    if asked:
        return archs
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return [arch for arch in archs if f"compute_{arch.rstrip('af')}\n" in listed] or archs


def nvcc_flags(archs: list[str]) -> list[str]:
    """Flags for the GPU code: one binary per architecture, and PTX of the last for future ones,
    without the instructions that only that architecture has."""
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC", "--threads=0"]
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    last = archs[-1].rstrip("af")
    return [*flags, "-gencode", f"arch=compute_{last},code=compute_{last}"]


def _has_wanted_archs(library: Path) -> bool:
    """Whether a library was built for the wanted architectures; True if there is no nvcc, because
    it cannot be built again then."""
    try:
        return recorded_archs(library) == ";".join(cuda_archs(_nvcc()))
    except Unavailable:
        return True


def _cxx() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found and _accepts(found, ["-std=c++17", "-include", "optional"]):
            return os.path.abspath(found)
    if named:
        raise RuntimeError(f"CXX must name a program that compiles C++17, got {named!r}")
    raise Unavailable("no C++17 compiler was found (g++ or clang++, or name one in CXX)")


def _nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for name in candidates:
        found = shutil.which(name)
        if found:
            return _toolkit_of(Path(found))
    if home:
        raise RuntimeError(f"CUDA_HOME must name a folder with bin/nvcc in it, got {home!r}")
    raise Unavailable("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)")


def _check_release(nvcc: Path) -> None:
    """Raise Unavailable for a toolkit whose headers lack the split grid barrier (arrive, wait)."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found and tuple(map(int, found.groups())) < (12, 2):
        raise Unavailable(f"expected nvcc of CUDA 12.2 or newer, got {found[1]}.{found[2]}: {nvcc}")


def _toolkit_of(nvcc: Path) -> Path:
    """The nvcc inside the toolkit that a wrapper or link on PATH leads to."""
    text = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", text, re.MULTILINE)
    return Path(top[1]).resolve() / "bin" / "nvcc" if top else nvcc.resolve()


def _torch() -> Path:
    """Folder of the installed torch, found without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise Unavailable(
            "torch is not installed where the build runs (pip install --no-build-isolation,"
            " or python -m rodimus_kernels build afterwards)"
        )
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < (2, 11):
        raise Unavailable(f"torch >= 2.11 is needed, this is {version}")
    return Path(found.submodule_search_locations[0])


def _links(torch: Path) -> list[str]:
    return [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]


def _usable_isas() -> Iterable[str]:
    return CPU_ISAS if platform.machine() in ("x86_64", "AMD64") else ("portable",)


def _accepts(cxx: str, flags: list[str]) -> bool:
    command = [cxx, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run_all(commands, folder):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(lambda command: _run(command, folder), commands):
            pass


def _run(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


class Usage(NamedTuple):
    """What one compiled kernel uses: registers per thread, bytes of stack and of register spills,
    and bytes of shared memory that it declares."""

    kernel: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int


def report() -> list[Usage]:
    """Resources of every CUDA kernel on every architecture, from compiling them without a GPU.

    Raises:
        Unavailable: there is no nvcc.
        RuntimeError: nvcc failed.
    """
    nvcc, folder = _nvcc(), sources()
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(nvcc), *nvcc_flags(cuda_archs(nvcc)), "-ccbin", _cxx(), "-Xptxas=-v"]
        command += ["-c", "cuda/kernels.cu"]
        text = _run([*command, "-o", str(Path(scratch) / "kernels.o")], folder)
    pattern = (
        r"entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    )
    found = re.findall(pattern, text, re.DOTALL)
    names = _demangled([name for name, *_ in found])
    return [
        Usage(name, arch, int(registers), int(stack), int(spills), int(shared or 0))
        for name, (_, arch, stack, spills, registers, shared) in zip(names, found, strict=True)
    ]


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run([tool, *names], capture_output=True, text=True, check=True).stdout
    return [line.removeprefix("void ").replace("rodimus::", "") for line in text.splitlines()]


def main() -> None:
    """Build, and print one line per library."""
    parser = argparse.ArgumentParser(description="Build the native operators of csrc/.")
    add = parser.add_argument
    add("--force", action="store_true", help="build what is up to date as well")
    add("--report", action="store_true", help="only print the registers of the CUDA kernels")
    options = parser.parse_args()
    if options.report:
        try:
            usages = sorted(report())
        except (Unavailable, RuntimeError) as reason:
            sys.exit(f"native operators (cuda): {reason}")
        for usage in usages:
            print(
                f"sm_{usage.arch:<4} {usage.registers:>4} registers {usage.stack:>4} B stack",
                end="",
            )
            print(f" {usage.spills:>4} B spilled  {usage.kernel.partition('(')[0]}")
        return
    try:
        lines = build(force=options.force)
    except RuntimeError as reason:
        sys.exit(f"native operators: {reason}")
    for kind, line in lines.items():
        print(f"native operators ({kind}): {line}")
    sys.exit(any(line.startswith("failed") for line in lines.values()))


if __name__ == "__main__":
    main()
