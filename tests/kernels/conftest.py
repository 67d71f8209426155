"""Where operators are tested, and the instruction sets of the native ones, to compare them."""

import contextlib
import subprocess

import pytest
import torch

from rodimus_kernels import build, native
from tests.kernel_memory import checked_memory
from tests.kernels.device import DEVICE


@pytest.fixture(autouse=True)
def _checked_memory(request):
    is_asked = DEVICE == "cpu" and request.config.getoption("--check-kernel-memory")
    with checked_memory() if is_asked else contextlib.nullcontext():
        yield


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU (Triton kernels then run in the interpreter)."""
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def compiler():
    try:
        return build._cxx()
    except build.Unavailable as reason:
        pytest.skip(f"nothing can be compiled: {reason}")


@pytest.fixture(scope="session")
def sanitizer(compiler, tmp_path_factory):
    """The flag that reports data races, or none where it does not work."""
    empty = tmp_path_factory.mktemp("sanitizer") / "empty.cpp"
    empty.write_text("int main() {}")
    program, flag = empty.with_suffix(""), "-fsanitize=thread"
    built = subprocess.run([compiler, flag, empty, "-o", program], capture_output=True)
    return [flag] if not built.returncode and not subprocess.run([program]).returncode else []


@pytest.fixture(params=native.CPU_ISAS)
def isa(request):
    """Each instruction set in turn; the best one again afterwards."""
    best = native.cpu_isa()
    if not native.select_cpu_isa(request.param):
        pytest.skip(f"this processor or this build lacks {request.param}")
    yield request.param
    native.select_cpu_isa(best)
