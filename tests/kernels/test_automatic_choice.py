"""What ``impl="auto"`` means of every operator where Triton runs."""

import sys

import pytest

from rodimus_kernels._dispatch import implementations_used
from tests.kernels.test_bad_input import CASES, call


@pytest.fixture
def where_triton_runs(monkeypatch):
    for name, module in sys.modules.items():
        if name.startswith("rodimus_kernels") and hasattr(module, "runs_triton"):
            monkeypatch.setattr(module, "runs_triton", lambda device: True)


@pytest.mark.parametrize("operator", CASES, ids=lambda operator: operator.__name__)
def test_float64_is_left_to_torch(operator, where_triton_runs):
    """Triton's forms refuse it."""
    given = CASES[operator].items()
    double = {name: x.double() if x.is_floating_point() else x for name, x in given}
    used = implementations_used(lambda: call(operator, **double))
    assert not [name for name in used if "triton" in name]
