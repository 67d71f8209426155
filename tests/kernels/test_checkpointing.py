"""Operators in functions that are computed again in the backward pass, or compiled as one graph:
the same numbers, to the bit."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.device import DEVICE
from tests.kernels.differentiable import OPERATORS

WAYS = {
    "checkpointed": lambda call: lambda *x: checkpoint(call, *x, use_reentrant=False),
    "compiled": lambda call: torch.compile(call, fullgraph=True, backend="aot_eager"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call, shapes", OPERATORS)
def test_values_and_gradients_are_the_same(call, shapes, way):
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]

    def run(function):
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    for got, expected in zip(run(WAYS[way](call)), run(call), strict=True):
        assert torch.equal(got, expected)
