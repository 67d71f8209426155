"""Operators whose gradient is an operator of its own refuse to be differentiated twice: torch would
take that gradient for a constant, and the second derivative would be wrong without a word."""

import pytest
import torch

from tests.kernels.device import DEVICE
from tests.kernels.differentiable import OPERATORS


@pytest.mark.parametrize("call, shapes", OPERATORS)
def test_a_second_derivative_is_refused(call, shapes):
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    loss = call(*leaves).square().sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(x.square().sum() for x in gradients).backward()
