"""The norms against their formulas in float64, with gradients."""

import pytest
import torch
import torch.nn.functional as F

from rodimus_kernels import add_rms_norm, gated_rms_norm, rms_norm
from rodimus_kernels.norm import IMPLS
from rodimus_kernels.testing import assert_close, relative_error

LIMIT = 1e-6
EPS = 1e-5


def exact_rms_norm(x, weight, eps=EPS):
    return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5 * weight


def exact_add_rms_norm(x, residual, weight):
    return exact_rms_norm(x + residual, weight), x + residual


def exact_gated_rms_norm(x, gate, weight, residual=None, residual_weight=None):
    if residual is not None:
        x = x + residual * residual_weight
    return exact_rms_norm(x * F.silu(gate), weight)


def run(function, tensors, dtype=torch.float32):
    """Outputs, and the gradients of a fixed random combination of them."""
    leaves = {name: x.detach().to(dtype, copy=True).requires_grad_() for name, x in tensors.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, seeds)
    named = {f"output {n}": o.detach() for n, o in enumerate(outputs)}
    return named | {f"d{name}": x.grad for name, x in leaves.items()}


def make(*names, shape=(2, 7, 48)):
    return {n: torch.randn(shape[-1:] if n.endswith("weight") else shape) for n in names}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(48,), (3, 16), (2, 7, 1000)])
def test_rms_norm(impl, shape):
    tensors = make("x", "weight", shape=shape)
    ours = lambda **t: rms_norm(**t, impl=impl)
    assert_close(run(ours, tensors), run(exact_rms_norm, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
def test_add_rms_norm(impl):
    tensors = make("x", "residual", "weight")
    ours = lambda **t: add_rms_norm(**t, impl=impl)
    assert_close(run(ours, tensors), run(exact_add_rms_norm, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("residual", [("residual", "residual_weight"), ()])
def test_gated_rms_norm(impl, residual):
    tensors = make("x", "gate", "weight", *residual)
    ours = lambda **t: gated_rms_norm(**t, impl=impl)
    assert_close(run(ours, tensors), run(exact_gated_rms_norm, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_branch_on_a_float32_stream(impl):
    t = make("x", "residual", "weight")
    half, weight = t["x"].bfloat16(), t["weight"].bfloat16()
    normed, stream = add_rms_norm(half, t["residual"], weight, impl=impl)
    assert normed.dtype == torch.bfloat16 and stream.dtype == torch.float32
    assert torch.equal(stream, half.float() + t["residual"])
    exact = exact_rms_norm(stream.double(), weight.double())
    # one rounding to 8 bits
    assert relative_error(normed, exact) < 3e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_gated_norm_rounds_the_weighted_sum_to_the_dtype_of_x(impl):
    t = make("x", "gate", "weight", "residual", "residual_weight")
    t = {n: x if n == "residual_weight" else x.bfloat16() for n, x in t.items()}
    y = gated_rms_norm(**t, impl=impl)
    total = (t["x"].double() + t["residual"].double() * t["residual_weight"]).float().bfloat16()
    exact = exact_gated_rms_norm(total.double(), t["gate"].double(), t["weight"].double())
    assert y.dtype == torch.bfloat16 and relative_error(y, exact) < 3e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_gates_stay_finite(impl):
    tensors = make("x", "gate", "weight")
    tensors["gate"] = torch.linspace(-200, 200, 48).expand(2, 7, 48)
    assert all(torch.isfinite(x).all() for x in run(gated_rms_norm, tensors).values())


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    t = make("x", "gate", "weight")
    wide = torch.cat((t["x"], t["gate"]), dim=-1)
    strided = gated_rms_norm(wide[..., :48], wide[..., 48:], t["weight"], impl=impl)
    plain = gated_rms_norm(t["x"], t["gate"], t["weight"], impl=impl)
    assert relative_error(strided, plain) < LIMIT


def test_bad_input_says_what_was_expected():
    t = make("x", "gate", "weight")
    x, gate, weight = t["x"], t["gate"], t["weight"]
    with pytest.raises(ValueError, match=r"weight must have shape \[48\], got \(47,\)"):
        rms_norm(x, weight[:47])
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 7, 48\]"):
        add_rms_norm(x, x[:1], weight)
    with pytest.raises(ValueError, match="come together"):
        gated_rms_norm(x, gate, weight, residual=x)
    with pytest.raises(ValueError, match="gate must have shape"):
        gated_rms_norm(x, gate[..., :3], weight)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        rms_norm(x, weight, impl="fast")
