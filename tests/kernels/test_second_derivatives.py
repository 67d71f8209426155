"""Operators whose gradient is an operator of its own refuse to be differentiated twice: torch would
take that gradient for a constant, and the second derivative would be wrong without a word."""

import pytest
import torch

from tests.kernels.device import DEVICE
from tests.kernels.differentiable import OPERATORS


@pytest.mark.parametrize("is_linear", [False, True], ids=["square", "sum"])
@pytest.mark.parametrize("call, shapes", OPERATORS)
def test_a_second_derivative_is_refused(call, shapes, is_linear):
    """Of a linear loss, too, whose own derivative is a constant."""
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    result = call(*leaves)
    loss = result.sum() if is_linear else result.square().sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(x.square().sum() for x in gradients).backward()
