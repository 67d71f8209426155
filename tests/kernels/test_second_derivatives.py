"""Operators whose gradient is an operator of its own refuse to be differentiated twice: torch would
take that gradient for a constant, and the second derivative would be wrong without a word."""

import pytest
import torch

import rodimus_kernels as rk
from tests.kernels.device import DEVICE, TRITON_MARKS


def triton(name, call, *shapes):
    return pytest.param(call, shapes, id=name, marks=TRITON_MARKS)


KEYS, VALUES = (1, 3, 1, 16), (1, 3, 1, 16)
OPERATORS = [
    pytest.param(
        lambda q, k, v, g: rk.ddts(q, k, v, -g.abs(), impl="eager")[0],
        (KEYS, KEYS, VALUES, KEYS),
        id="ddts eager",
    ),
    pytest.param(
        lambda x, w: rk.linear_cross_entropy(x, w, torch.tensor([1, 0], device=DEVICE))[0],
        ((2, 4), (3, 4)),
        id="linear_cross_entropy",
    ),
    triton(
        "ddts",
        lambda q, k, v, g: rk.ddts(q, k, v, -g.abs(), impl="triton_chunk")[0],
        KEYS,
        KEYS,
        VALUES,
        KEYS,
    ),
    triton("ddts_gates", lambda *x: rk.ddts_gates(*x, impl="triton")[0], KEYS, KEYS, KEYS),
    triton(
        "shared_key_attention",
        lambda *x: rk.shared_key_attention(*x, window_size=2, impl="triton"),
        KEYS,
        KEYS,
        VALUES,
    ),
    triton("short_conv", lambda *x: rk.short_conv(*x, impl="triton")[0], (1, 3, 8), (8, 4)),
    triton("rms_norm", lambda *x: rk.rms_norm(*x, impl="triton"), (3, 8), (8,)),
    triton("input_gate", lambda *x: rk.input_gate(*x, impl="triton"), (3, 8), (3, 4), (8, 4), (8,)),
    triton("swiglu", lambda x: rk.swiglu(x, impl="triton"), (3, 16)),
]


@pytest.mark.parametrize("call, shapes", OPERATORS)
def test_a_second_derivative_is_refused(call, shapes):
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    loss = call(*leaves).square().sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(x.square().sum() for x in gradients).backward()
