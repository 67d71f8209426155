"""Operators that write a state in place are seen by autograd: what a backward has saved and a step
has overwritten raises, as after torch's own in-place operators."""

import pytest
import torch

import rodimus_kernels as rk
from rodimus_kernels import native
from tests.kernels.device import DEVICE, TRITON_MARKS
from tests.kernels.test_block import NAMED, PROBLEM, states_of, weights_of
from tests.kernels.test_native import (
    attention_step,
    cast,
    conv_step,
    ddts_step,
    int8_attention_step,
    mixer_step,
    run,
)

MARKS = {
    "native": pytest.mark.skipif(native.problem(DEVICE) is not None, reason="needs the library"),
    "triton": TRITON_MARKS,
}
FORMS = {
    ddts_step: ("reference", "eager", "native", "triton"),
    mixer_step: ("reference", "native"),
    conv_step: ("reference", "native"),
    attention_step: ("reference", "sdpa", "native", "triton"),
    int8_attention_step: ("reference", "sdpa", "native", "triton"),
}
STEPS = [
    pytest.param(maker, impl, marks=MARKS.get(impl, ()), id=f"{maker.__name__}-{impl}")
    for maker, impls in FORMS.items()
    for impl in impls
]
MODIFIED = "modified by an inplace operation"


def on_device(x):
    return x.to(DEVICE, copy=True)


def on_tensors(maker):
    """The public operator of a case, its arguments where they are tested, and the state."""
    operator, _, arguments, named, state = maker(torch.float32)
    arguments = [cast(x, on_device) for x in arguments]
    return operator, arguments, {name: cast(x, on_device) for name, x in named.items()}, state


def loss_that_saves(*tensors):
    """A loss whose gradient is the tensors."""
    return sum(
        (torch.ones_like(x, dtype=torch.float, requires_grad=True) * x).sum() for x in tensors
    )


@pytest.mark.parametrize("maker, impl", STEPS)
def test_a_state_that_a_backward_needs_may_not_be_overwritten(maker, impl):
    operator, arguments, named, state = on_tensors(maker)
    loss = loss_that_saves(arguments[state])
    operator(*arguments, **named, impl=impl)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()


@pytest.mark.parametrize("maker, impl", STEPS)
def test_what_a_step_only_reads_may_be_saved(maker, impl):
    operator, arguments, named, state = on_tensors(maker)
    read = [x for i, x in enumerate(arguments) if i != state]
    loss = loss_that_saves(*read)
    operator(*arguments, **named, impl=impl)
    loss.backward()


@pytest.mark.parametrize("maker, impl", STEPS)
def test_tensors_of_inference_mode_are_written_too(maker, impl):
    """They have no version to raise."""
    case = maker(torch.float32)
    plain = run(case[0], case, on_device, impl=impl)
    with torch.inference_mode():
        found = run(case[0], case, on_device, impl=impl)
    assert found[-1].is_inference()
    for x, expected in zip(found, plain, strict=True):
        assert torch.equal(x, expected)


@pytest.mark.skipif(PROBLEM is not None, reason=f"native operators: {PROBLEM}")
@pytest.mark.parametrize("written", ["taps", "states", "rings"])
@pytest.mark.parametrize("impl", ["reference", "native"])
def test_no_state_of_a_block_that_a_backward_needs_may_be_overwritten(impl, written):
    found = [states_of(torch.float32, 1, True) for _ in "ab"]
    taps, states, rings, (position, _), (rotary, _) = zip(*found, strict=True)
    saved = {"taps": taps, "states": states, "rings": rings}[written]
    weights = [weights_of(torch.float32, True) for _ in "ab"]
    losses = [loss_that_saves(x) for x in saved]
    rk.blocks_step(
        torch.randn(1, 18), weights, taps, states, rings, position, rotary, **NAMED, impl=impl
    )
    for loss in losses:
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()


@pytest.mark.parametrize("maker", FORMS)
def test_a_compiled_step_is_seen_too(maker):
    torch.compiler.reset()
    operator, arguments, named, state = on_tensors(maker)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    loss = loss_that_saves(arguments[state])
    compiled(*arguments, **named)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()
