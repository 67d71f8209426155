"""The gated activation against its formula in float64, with gradients."""

import pytest
import torch

from rodimus_kernels import swiglu
from rodimus_kernels.testing import assert_close
from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module

IMPLS = ["reference", "eager", pytest.param("triton", marks=TRITON_MARKS)]


def make(shape=(2, 35, 2 * 140), dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def exact(projection):
    x, gate = projection.chunk(2, dim=-1)
    return x * gate / (1 + torch.exp(-gate))


def run(function, projection, dtype=None):
    leaf = projection.detach().to(dtype or projection.dtype, copy=True).requires_grad_()
    y = function(leaf)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(seed)
    return {"y": y.detach(), "dprojection": leaf.grad}


@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 35, 280), (1, 5000), (0, 6), (3, 0)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_formula_with_gradient(impl, shape):
    projection = make(shape)
    ours = lambda x: swiglu(x, impl=impl)
    assert_close(run(ours, projection), run(exact, projection, torch.float64), 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision(impl):
    projection = make(dtype=torch.bfloat16)
    actual = run(lambda x: swiglu(x, impl=impl), projection)
    assert actual["y"].dtype == torch.bfloat16
    # one or two roundings to 8 bits, each of 2 ** -8 at most
    assert_close(actual, run(exact, projection, torch.float64), 2**-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_projection_and_gradient(impl):
    wide = make((35, 300))
    ours = lambda x: swiglu(x[:, 7:287], impl=impl).t().square()
    formula = lambda x: exact(x[:, 7:287]).t().square()
    assert_close(run(ours, wide), run(formula, wide, torch.float64), 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_saturated_gates_stay_finite(impl):
    projection = make((4, 20))
    projection[:, 10:] = torch.linspace(-300, 300, 10, device=DEVICE)
    assert all(
        torch.isfinite(x).all() for x in run(lambda x: swiglu(x, impl=impl), projection).values()
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_closed_gate_lets_nothing_through(impl):
    projection = torch.tensor([[1e20, -1.0, 1e38, -1e20, -1e38, -1e38]], device=DEVICE)
    results = run(lambda x: swiglu(x, impl=impl), projection)
    assert all(not x.any() for x in results.values()), results


def test_opcheck():
    triton_module("rodimus_kernels.triton_swiglu")
    torch.library.opcheck(torch.ops.rodimus.swiglu.default, (make((7, 24)).requires_grad_(),))


def test_bad_input_says_what_was_expected():
    with pytest.raises(ValueError, match=r"projection must have shape \[..., 2 D\], got \(2, 3\)"):
        swiglu(make((2, 3)))
    with pytest.raises(ValueError, match="projection must be floating point"):
        swiglu(torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        swiglu(make(), impl="fast")
