"""The norms against their formulas in float64, with gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from rodimus_kernels import add_rms_norm, gated_rms_norm, rms_norm
from rodimus_kernels.norm import _gpu_form
from rodimus_kernels.testing import assert_close, relative_error
from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module

LIMIT = 1e-6
EPS = 1e-5
# one or two roundings to 8 bits, each of 2 ** -8 at most
HALF_LIMIT = 2**-8
IMPLS = ["reference", pytest.param("triton", marks=TRITON_MARKS)]


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
    seeds = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    torch.autograd.backward(outputs, seeds)
    named = {f"output {n}": o.detach() for n, o in enumerate(outputs)}
    return named | {f"d{name}": x.grad for name, x in leaves.items()}


def make(*names, shape=(2, 7, 48)):
    sizes = {name: shape[-1:] if name.endswith("weight") else shape for name in names}
    return {name: torch.randn(size).to(DEVICE) for name, size in sizes.items()}


def in_wider_rows(tensors):
    """The same, each in rows of a stride of its own."""
    named = enumerate(tensors.items(), start=1)
    return {name: F.pad(x, (0, 8 * i))[..., : x.shape[-1]] for i, (name, x) in named}


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
def test_a_closed_gate_lets_nothing_through(impl):
    tensors = make("x", "gate", "weight")
    tensors["x"][..., ::2] = 1e20
    tensors["gate"][..., ::2] = -1e20
    ours = lambda **t: gated_rms_norm(**t, impl=impl)
    assert_close(run(ours, tensors), run(exact_gated_rms_norm, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("residual", [("residual", "residual_weight"), ()])
@pytest.mark.parametrize("width", [48, 64, 100])
def test_gradients_where_a_row_is_cut_into_blocks(impl, residual, width, monkeypatch):
    """Two whole blocks, or a last one that is not full."""
    module = triton_module("rodimus_kernels.triton_norm")
    monkeypatch.setattr(module, "_WIDE", 32)
    assert module._backward_blocks(width, 32, torch.empty(0))[0] == -(-width // 32)
    tensors = make("x", "gate", "weight", *residual, shape=(2, 7, width))
    ours = lambda **t: gated_rms_norm(**in_wider_rows(t), impl=impl)
    assert_close(run(ours, tensors), run(exact_gated_rms_norm, tensors, torch.float64), LIMIT)
    monkeypatch.setattr(module, "_PLAIN_WIDE", 32)
    tensors = make("x", "residual", "weight", shape=(2, 7, width))
    ours = lambda **t: add_rms_norm(**in_wider_rows(t), impl=impl)
    assert_close(run(ours, tensors), run(exact_add_rms_norm, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("widest", [64, 16], ids="blocks of {}".format)
def test_gradients_are_those_of_the_rounded_sum(impl, widest, monkeypatch):
    """Of x and the weighted residual, as the forward rounds it before the gate."""
    if impl == "triton":
        monkeypatch.setattr(triton_module("rodimus_kernels.triton_norm"), "_WIDE", widest)
    tensors = make("x", "gate", "weight", "residual", "residual_weight")
    tensors["x"] = tensors["x"].half()
    # a product without rounding: with or without fma, the sum is the same
    tensors["residual_weight"].fill_(0.5)
    rounded = (tensors["x"] + 0.5 * tensors["residual"]).half().double()
    gate, weight = (tensors[name].requires_grad_() for name in ("gate", "weight"))
    y = gated_rms_norm(**tensors, impl=impl)
    dy = torch.randn_like(y)
    exact = exact_gated_rms_norm(rounded, gate.double(), weight.double())
    for found, wanted in zip(
        torch.autograd.grad(y, (gate, weight), dy),
        torch.autograd.grad(exact, (gate, weight), dy.double()),
        strict=True,
    ):
        assert relative_error(found, wanted) < LIMIT


@pytest.mark.parametrize("exact", [exact_add_rms_norm, exact_gated_rms_norm])
@pytest.mark.parametrize("impl", IMPLS[1:])
def test_gradients_where_a_program_walks_over_rows(impl, exact, monkeypatch):
    module = triton_module("rodimus_kernels.triton_norm")
    monkeypatch.setattr(module, "_PROGRAMS", 4)
    gated = exact is exact_gated_rms_norm
    operator = gated_rms_norm if gated else add_rms_norm
    tensors = make("x", "residual", "weight", *(["gate", "residual_weight"] if gated else []))
    ours = lambda **t: operator(**t, impl=impl)
    assert_close(run(ours, tensors), run(exact, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_branch_on_a_float32_stream(impl):
    t = make("x", "residual", "weight")
    half, weight = t["x"].bfloat16(), t["weight"].bfloat16()
    normed, stream = add_rms_norm(half, t["residual"], weight, impl=impl)
    assert normed.dtype == torch.bfloat16 and stream.dtype == torch.float32
    assert torch.equal(stream, half.float() + t["residual"])
    exact = exact_rms_norm(stream.double(), weight.double())
    assert relative_error(normed, exact) < HALF_LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_half_precision_stream(impl, branch, dtype):
    t = make("x", "residual", "weight")
    x, residual = t["x"].to(branch), t["residual"].to(dtype)
    normed, stream = add_rms_norm(x, residual, t["weight"], impl=impl)
    assert normed.dtype == torch.float32 and stream.dtype == dtype
    # of both, which are rounded to the stream's dtype, and rounded once more
    exact = x.to(dtype).double() + residual.double()
    assert relative_error(stream, exact) < HALF_LIMIT
    assert relative_error(normed, exact_rms_norm(stream.double(), t["weight"].double())) < LIMIT


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_a_half_precision_branch_on_a_float32_stream(impl):
    t = make("x", "residual", "weight")
    half = {"x": t["x"].bfloat16(), "residual": t["residual"], "weight": t["weight"].bfloat16()}
    leaves = {name: x.clone().requires_grad_() for name, x in half.items()}
    outputs = add_rms_norm(**leaves, impl=impl)
    seeds = [torch.randn(o.shape).to(o) for o in outputs]
    torch.autograd.backward(outputs, seeds)
    exact = {name: x.double().requires_grad_() for name, x in half.items()}
    torch.autograd.backward(exact_add_rms_norm(**exact), [x.double() for x in seeds])
    assert leaves["x"].grad.dtype == torch.bfloat16
    limits = {"x": HALF_LIMIT, "residual": LIMIT, "weight": HALF_LIMIT}
    for name, limit in limits.items():
        assert relative_error(leaves[name].grad, exact[name].grad) < limit, name


@pytest.mark.parametrize("impl", IMPLS)
def test_gated_norm_rounds_the_weighted_sum_to_the_dtype_of_x(impl):
    t = make("x", "gate", "weight", "residual", "residual_weight")
    t = {n: x if n == "residual_weight" else x.bfloat16() for n, x in t.items()}
    y = gated_rms_norm(**t, impl=impl)
    total = (t["x"].double() + t["residual"].double() * t["residual_weight"]).float().bfloat16()
    exact = exact_gated_rms_norm(total.double(), t["gate"].double(), t["weight"].double())
    assert y.dtype == torch.bfloat16 and relative_error(y, exact) < HALF_LIMIT


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_gates_stay_finite(impl):
    tensors = make("x", "gate", "weight")
    tensors["gate"] = torch.linspace(-200, 200, 48, device=DEVICE).expand(2, 7, 48)
    ours = lambda **t: gated_rms_norm(**t, impl=impl)
    assert all(torch.isfinite(x).all() for x in run(ours, tensors).values())


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_the_normed_output_alone(impl):
    tensors = make("x", "residual", "weight")
    ours = lambda **t: add_rms_norm(**t, impl=impl)[0]
    exact = lambda **t: exact_add_rms_norm(**t)[0]
    assert_close(run(ours, tensors), run(exact, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_the_stream_alone(impl):
    tensors = make("x", "residual")
    weight = torch.ones(48, device=DEVICE)
    ours = lambda x, residual: add_rms_norm(x, residual, weight, impl=impl)[1]
    exact = lambda x, residual: x + residual
    assert_close(run(ours, tensors), run(exact, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    t = make("x", "gate", "weight")
    wide = torch.cat((t["x"], t["gate"]), dim=-1)
    strided = gated_rms_norm(wide[..., :48], wide[..., 48:], t["weight"], impl=impl)
    plain = gated_rms_norm(t["x"], t["gate"], t["weight"], impl=impl)
    assert relative_error(strided, plain) < LIMIT


@pytest.mark.parametrize("impl", IMPLS)
def test_a_strided_gradient(impl):
    """Half of one, as that of an output that was joined with another."""
    tensors = make("x", "weight", shape=(3, 48))
    dy = torch.randn(3, 96, device=DEVICE)[:, :48]
    leaves = [x.requires_grad_() for x in tensors.values()]
    y = rms_norm(*leaves, impl=impl)
    found = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(y, leaves, dy.contiguous())))


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck(residual):
    triton_module("rodimus_kernels.triton_norm")
    t = make("x", "gate", "weight", "residual", "residual_weight")
    x, gate, weight, r, rw = (v.requires_grad_() for v in t.values())
    check, ops = torch.library.opcheck, torch.ops.rodimus
    extra = (r, rw) if residual else (None, None)
    check(ops.gated_rms_norm_rows.default, (x, gate, weight, EPS, *extra))
    if residual:
        check(ops.add_rms_norm_rows.default, (x, r, weight, EPS))
    else:
        check(ops.rms_norm_rows.default, (x, weight, EPS))


def test_automatic_choice():
    assert _gpu_form(16384, False) == "triton"
    assert _gpu_form(16385, False) == "reference"
    assert _gpu_form(4096, True) == "reference"


@pytest.mark.parametrize("shape", [(0, 48), (3, 0), (2, 3, 0), (0,)])
@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_of_nothing_is_nothing(impl, shape):
    for norm, *names in (
        (rms_norm, "x", "weight"),
        (add_rms_norm, "x", "residual", "weight"),
        (gated_rms_norm, "x", "gate", "weight", "residual", "residual_weight"),
    ):
        tensors = make(*names, shape=shape)
        with torch.no_grad():
            y = norm(**tensors, impl=impl)
        assert all(o.shape == shape for o in (y if isinstance(y, tuple) else (y,)))
        found = run(partial(norm, impl=impl), tensors)
        assert all(not found[f"d{name}"].any() for name in names)


def test_bad_input_says_what_was_expected():
    t = make("x", "gate", "weight")
    x, gate, weight = t["x"], t["gate"], t["weight"]
    with pytest.raises(ValueError, match=r"weight must have shape \[48\], got \(47,\)"):
        rms_norm(x, weight[:47])
    for norm in (rms_norm, partial(add_rms_norm, x[0, 0, 0]), partial(gated_rms_norm, x[0, 0, 0])):
        with pytest.raises(ValueError, match=r"x must have shape \[..., D\], got \(\)"):
            norm(x[0, 0, 0], weight)
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 7, 48\]"):
        add_rms_norm(x, x[:1], weight)
    with pytest.raises(ValueError, match="weight must be floating point, got torch.int64"):
        rms_norm(x, weight.long())
    with pytest.raises(ValueError, match="residual must be floating point, got torch.int64"):
        add_rms_norm(x, x.long(), weight)
    with pytest.raises(ValueError, match="residual_weight must be floating point, got torch.int"):
        gated_rms_norm(x, gate, weight, residual=x, residual_weight=weight.int())
    with pytest.raises(ValueError, match="come together"):
        gated_rms_norm(x, gate, weight, residual=x)
    with pytest.raises(ValueError, match="gate must have shape"):
        gated_rms_norm(x, gate[..., :3], weight)
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        rms_norm(x, weight, impl="fast")


@pytest.mark.parametrize("impl", IMPLS)
def test_vectors_may_have_strides(impl):
    """A weight for all channels, and one of several that were stacked."""
    x, gate, stacked = torch.randn(3, 2, 4, 32, device=DEVICE)
    vectors = stacked[0, :, :].T[:, 1], torch.full((), 1.5, device=DEVICE).expand(32)
    for weight, other in (vectors, vectors[::-1]):
        for function, arguments, named in (
            (rms_norm, (x,), {}),
            (add_rms_norm, (x, gate), {}),
            (gated_rms_norm, (x, gate), {"residual": x, "residual_weight": other}),
        ):
            found = function(*arguments, weight, impl=impl, **named)
            named = {name: y.contiguous() for name, y in named.items()}
            expected = function(*arguments, weight.contiguous(), impl=impl, **named)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
