"""The low-rank input gate against its formula in float64, with gradients."""

import pytest
import torch

from rodimus_kernels import input_gate
from rodimus_kernels.input_gate import _choose
from rodimus_kernels.testing import assert_close, relative_error
from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module

# a float32 product is three tf32 products on a GPU, each term known to 2^-21
LIMIT = 1e-6 if DEVICE == "cpu" else 3e-6
IMPLS = ["reference", "eager", pytest.param("triton", marks=TRITON_MARKS)]


def make(tokens=(2, 35), width=140, rank=12, dtype=torch.float32):
    shapes = {"x": (*tokens, width), "hidden": (*tokens, rank)}
    shapes |= {"weight": (width, rank), "bias": (width,)}
    return {name: torch.randn(shape).to(DEVICE, dtype) for name, shape in shapes.items()}


def exact_gate(x, hidden, weight, bias):
    return x * (hidden @ weight.t() + bias).sigmoid()


def run(function, tensors, dtype=None):
    leaves = {n: x.detach().to(dtype or x.dtype, copy=True) for n, x in tensors.items()}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    y = function(**leaves)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(seed)
    return {"y": y.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


@pytest.mark.parametrize(
    "tokens, rank",
    [((1,), 12), ((70,), 12), ((2, 35), 12), ((0, 35), 12), ((70,), 72), ((70,), 0)],
)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_formula_with_all_gradients(impl, tokens, rank):
    tensors = make(tokens, rank=rank)
    ours = lambda **t: input_gate(**t, impl=impl)
    assert_close(run(ours, tensors), run(exact_gate, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_channels_it_is_empty(impl):
    found = run(lambda **t: input_gate(**t, impl=impl), make(width=0))
    assert found["y"].shape == (2, 35, 0)
    assert not any(x.any() for x in found.values())


@pytest.mark.parametrize("programs", [1, 6], ids="programs {}".format)
@pytest.mark.parametrize("impl", IMPLS[2:])
def test_sums_over_blocks_of_tokens_and_groups_of_channels(impl, programs, monkeypatch):
    module = triton_module("rodimus_kernels.triton_input_gate")
    monkeypatch.setattr(module, "_SUMMED_TOKENS", 64)
    monkeypatch.setattr(module, "_BACKWARD_CHANNELS", 32)
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    tensors = make((150,))
    ours = lambda **t: input_gate(**t, impl=impl)
    assert_close(run(ours, tensors), run(exact_gate, tensors, torch.float64), LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision(impl):
    tensors = make(dtype=torch.bfloat16)
    ours = lambda **t: input_gate(**t, impl=impl)
    actual = run(ours, tensors)
    assert actual["y"].dtype == torch.bfloat16
    # a few roundings to 8 bits, each of 2 ** -8 at most
    assert_close(actual, run(exact_gate, tensors, torch.float64), 2**-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_reads_a_slice_of_a_projection(impl):
    t = make()
    wide = torch.cat((t["x"] + 1, t["x"]), dim=-1)
    sliced = input_gate(wide[..., 140:], t["hidden"], t["weight"], t["bias"], impl=impl)
    assert relative_error(sliced, input_gate(**t, impl=impl)) < LIMIT


@pytest.mark.parametrize("impl", IMPLS)
def test_saturated_gates_stay_finite(impl):
    tensors = make()
    tensors["bias"] = torch.linspace(-300, 300, 140, device=DEVICE)
    ours = lambda **t: input_gate(**t, impl=impl)
    assert all(torch.isfinite(x).all() for x in run(ours, tensors).values())


def test_opcheck():
    triton_module("rodimus_kernels.triton_input_gate")
    arguments = tuple(x.requires_grad_() for x in make((7,)).values())
    torch.library.opcheck(torch.ops.rodimus.input_gate.default, arguments)


def test_automatic_choice():
    assert _choose(True, 128, False, True) == "triton"
    assert _choose(True, 129, False, True) == "eager"
    assert _choose(True, 32, False, True) == "triton"
    assert _choose(True, 32, False, False) == "triton"
    assert _choose(True, 300, False, True) == "eager"
    assert _choose(True, 300, False, False) == "reference"
    assert _choose(True, 32, True, True) == "eager"
    assert _choose(False, 32, False, True) == "eager"
    assert _choose(False, 32, False, False) == "reference"


def test_bad_input_says_what_was_expected():
    t = make()
    for message, change in [
        (r"hidden must have shape \[2, 35, R\]", {"hidden": t["hidden"][:1]}),
        (r"weight must have shape \[140, 12\]", {"weight": t["weight"][:3]}),
        (r"bias must have shape \[140\], got \(3,\)", {"bias": t["bias"][:3]}),
        ("bias must be floating point", {"bias": t["bias"].long()}),
        ("unknown impl 'fast'", {"impl": "fast"}),
    ]:
        with pytest.raises(ValueError, match=message):
            input_gate(**{**t, **change})


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_dtypes_that_differ_are_refused_in_the_dtypes_given(name):
    t = {key: x.float() for key, x in make().items()}
    t[name] = t[name].bfloat16()
    with pytest.raises(ValueError, match="weight and bias of one dtype, got .*torch.bfloat16"):
        input_gate(**t, impl="eager")
    expected = input_gate(**t, impl="reference")
    assert expected.dtype == torch.float32
    assert relative_error(input_gate(**t), expected) < LIMIT
    assert input_gate(**{key: x.to("meta") for key, x in t.items()}).dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_a_broken_value_stays_visible(impl):
    x, hidden, weight, bias = (
        torch.ones(s, device=DEVICE) for s in ((2, 32), (2, 16), (32, 16), 32)
    )
    hidden[1, 3] = torch.nan
    found = input_gate(x, hidden, weight, bias, impl=impl).isnan()
    assert found[1].all() and not found[0].any()
