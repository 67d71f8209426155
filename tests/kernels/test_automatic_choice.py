"""What ``impl="auto"`` means of every operator where Triton runs."""

import sys

import pytest
import torch

import rodimus_kernels as rk
from rodimus_kernels._dispatch import implementations_used
from tests.kernels.device import TRITON_MARKS
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


# without a form in Triton, or with one of other shapes, or one that is not the first choice
OTHERS = {rk.ddts_mixer_step, rk.ddts_summary, rk.short_conv_step, rk.linear}
OTHERS |= {rk.ddts_scan, rk.shared_key_attention_step}


@pytest.mark.parametrize(
    "operator",
    [pytest.param(operator, marks=TRITON_MARKS) for operator in CASES if operator not in OTHERS],
    ids=lambda operator: operator.__name__,
)
def test_triton_comes_before_all_else(operator, where_triton_runs):
    used = implementations_used(lambda: call(operator))
    assert any("triton" in name for name in used) and not any("native" in name for name in used)


def scan(key_dim, value_dim):
    states = torch.zeros(3, 1, 1, key_dim, value_dim)
    return rk.ddts_scan(states, states[..., 0])


def attention(dim, value_dim):
    q, v = torch.zeros(1, 1, 1, dim), torch.zeros(1, 1, 1, value_dim)
    return rk.shared_key_attention(q, q, v)


def attention_step(dim, value_dim):
    q, v = (torch.zeros(1, 1, 1, n, dtype=torch.float16) for n in (dim, value_dim))
    cache, position = q.new_zeros(1, 4, dim + value_dim), torch.zeros(1, dtype=torch.int64)
    return rk.shared_key_attention_step(q, q, v, cache, position, window_size=4)


def test_a_ring_apart_is_left_to_torch():
    """The library would take its rows for dense ones."""
    q, cache = torch.zeros(1, 1, 1, 16), torch.zeros(1, 4, 40)[..., :32]
    position = torch.zeros(1, dtype=torch.int64)
    step = lambda: rk.shared_key_attention_step(q, q, q, cache, position, window_size=4)
    assert not [name for name in implementations_used(step) if "native" in name]


@pytest.mark.parametrize(
    "function, sizes, triton",
    [
        pytest.param(scan, (16, 32), True, marks=TRITON_MARKS),
        (scan, (16, 24), False),
        (scan, (24, 16), False),
        (attention, (16, 136), False),
        (attention, (136, 16), False),
        (attention_step, (16, 264), False),
        (attention_step, (264, 16), False),
    ],
)
def test_shapes_that_triton_lacks_are_left_to_torch(function, sizes, triton, where_triton_runs):
    used = implementations_used(lambda: function(*sizes))
    assert [name for name in used if "triton" in name] == used * triton
