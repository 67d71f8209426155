"""Forward-mode derivatives, and transforms of ``torch.func``, are those of the references: an
operator of the library would drop tangents without a word, so it is not chosen, and refuses."""

import pytest
import torch

import rodimus_kernels as rk
from tests.kernels.device import DEVICE

KEYS = (1, 12, 1, 16)
LABELS = torch.tensor([1, 0, 2], device=DEVICE)
TABLES = rk.rope_tables(torch.arange(12, device=DEVICE)[None], 8)
# of each: the operator with its impl left out, shapes of its inputs, implementations
OPERATORS = {
    "ddts_gates": (
        lambda k, select, temper, **impl: rk.ddts_gates(k, select, temper, **impl)[0],
        (KEYS, KEYS, KEYS),
        ("triton",),
    ),
    "ddts": (
        lambda q, k, v, g, **impl: rk.ddts(q, k, v, -g.abs(), **impl)[0],
        (KEYS, KEYS, KEYS, KEYS),
        ("eager", "triton_chunk", "triton_recurrent"),
    ),
    "gated_ddts": (
        lambda *x, **impl: rk.gated_ddts(*x, **impl)[0],
        (KEYS, KEYS, KEYS, KEYS, KEYS),
        ("separate", "triton_chunk"),
    ),
    # what a segment leaves when it starts from zero is the last state of the recurrence
    "ddts_summary": (
        lambda k, v, g, impl="auto": (
            rk.ddts(k, k, v, -g.abs(), output_final_state=True, impl=impl)[1]
            if impl == "reference"
            else rk.ddts_summary(k, v, -g.abs())[0]
        ),
        (KEYS, KEYS, KEYS),
        (),
    ),
    "shared_key_attention": (
        lambda *x, **impl: rk.shared_key_attention(*x, window_size=5, **impl),
        (KEYS, KEYS, KEYS),
        ("sdpa", "triton"),
    ),
    "rope": (lambda x, **impl: rk.rope(x, *TABLES, **impl), (KEYS,), ("triton",)),
    "short_conv": (
        lambda x, w, **impl: rk.short_conv(x, w, **impl)[0],
        ((1, 12, 8), (8, 4)),
        ("native", "triton"),
    ),
    "rms_norm": (rk.rms_norm, ((3, 8), (8,)), ("native", "triton")),
    "add_rms_norm": (
        lambda *x, **impl: rk.add_rms_norm(*x, **impl)[0],
        ((3, 8), (3, 8), (8,)),
        ("native", "triton"),
    ),
    "gated_rms_norm": (rk.gated_rms_norm, ((3, 8), (3, 8), (8,)), ("native", "triton")),
    "input_gate": (rk.input_gate, ((3, 8), (3, 4), (8, 4), (8,)), ("eager", "triton")),
    "swiglu": (rk.swiglu, ((3, 16),), ("eager", "triton")),
    "linear_cross_entropy": (
        lambda x, w, **impl: rk.linear_cross_entropy(x, w, LABELS, **impl)[0],
        ((3, 8), (5, 8)),
        ("eager", "triton"),
    ),
}
EXPLICIT = [(name, impl) for name, (*_, impls) in OPERATORS.items() for impl in impls]


def inputs_of(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = OPERATORS[name][1]
    return tuple(torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)


def derivative(name, impl):
    """Of the operator along ones, at one point for every implementation."""
    call, at = OPERATORS[name][0], inputs_of(name)
    along = tuple(map(torch.ones_like, at))
    return torch.func.jvp(lambda *x: call(*x, impl=impl), at, along)[1]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_choice_carries_tangents(name):
    torch.testing.assert_close(derivative(name, "auto"), derivative(name, "reference"))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_choice_has_a_gradient_for_each_sample(name):
    """As ``torch.func`` takes them: an operator of the library raises there, by torch itself."""
    call, shapes, _ = OPERATORS[name]
    loss, places = lambda *x: call(*x).square().sum(), tuple(range(len(shapes)))
    samples = [inputs_of(name, seed) for seed in (0, 1)]
    together = map(torch.stack, zip(*samples, strict=True))
    found = torch.func.vmap(torch.func.grad(loss, argnums=places))(*together)
    for row, sample in enumerate(samples):
        alone = [x.requires_grad_() for x in sample]
        expected = torch.autograd.grad(loss(*alone), alone)
        torch.testing.assert_close(tuple(x[row] for x in found), expected)


@pytest.mark.parametrize("name, impl", EXPLICIT)
def test_an_explicit_form_carries_tangents_or_refuses(name, impl):
    try:
        found = derivative(name, impl)
    except (ValueError, RuntimeError, ImportError):
        return
    torch.testing.assert_close(found, derivative(name, "reference"))


def test_tangents_below_other_transforms_are_seen():
    x, w = torch.randn(3, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    hessians = [
        torch.func.hessian(lambda y, impl=impl: rk.rms_norm(y, w, impl=impl).square().sum())(x)
        for impl in ("auto", "reference")
    ]
    torch.testing.assert_close(*hessians)


def test_a_graph_of_before_does_not_drop_the_tangents():
    """It is compiled again, or from torch 2.15 on left uncompiled."""
    torch._dynamo.reset()
    x, w = torch.randn(3, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    whole = torch.__version__ < "2.14"
    norm = torch.compile(rk.rms_norm, fullgraph=whole, backend="eager")
    norm(x, w)
    along = torch.ones_like(x)
    with torch.autograd.forward_ad.dual_level():
        y = norm(torch.autograd.forward_ad.make_dual(x, along), w)
        found = torch.autograd.forward_ad.unpack_dual(y).tangent
    expected = torch.func.jvp(lambda x: rk.rms_norm(x, w, impl="reference"), (x,), (along,))[1]
    torch.testing.assert_close(found, expected)
