"""The instruction sets of the native operators, for the tests that compare them."""

import pytest

from rodimus_kernels import native


@pytest.fixture(params=native.CPU_ISAS)
def isa(request):
    """Each instruction set in turn; the best one again afterwards."""
    best = native.cpu_isa()
    if not native.select_cpu_isa(request.param):
        pytest.skip(f"this processor or this build lacks {request.param}")
    yield request.param
    native.select_cpu_isa(best)
