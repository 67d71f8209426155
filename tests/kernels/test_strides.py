"""Halves of a projection are read where they are: DDTS and the convolution copy no input."""

import pytest
import torch

import rodimus_kernels as rk
from rodimus_kernels import native
from tests.kernels.device import DEVICE, TRITON_MARKS

B, T, K, V = 2, 70, 16, 48


def halves(*shape):
    """Both halves of a projection ``[..., 2 D]``, neither of them contiguous."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE, requires_grad=True)
    found = wide.chunk(2, -1)
    assert not any(x.is_contiguous() for x in found)
    return found


def ddts(impl):
    q, k = halves(B, T, 1, K)
    log_decay = -halves(B, T, 1, K)[1].detach().abs()
    inputs = q, k, halves(B, T, 1, V)[1]
    return inputs, lambda *inputs: rk.ddts(*inputs, log_decay, impl=impl)[0]


def ddts_gates(impl):
    inputs = *halves(B, T, 1, K), halves(B, T, 1, K)[1]
    return inputs, lambda *inputs: torch.cat(rk.ddts_gates(*inputs, impl=impl))


def gated_ddts(impl):
    inputs = *halves(B, T, 1, K), halves(B, T, 1, V)[1], *halves(B, T, 1, K)
    return inputs, lambda *inputs: rk.gated_ddts(*inputs, impl=impl)[0]


def short_conv(impl):
    weight = torch.randn(V, 4, device=DEVICE)
    return halves(B, T, V)[1:], lambda x: rk.short_conv(x, weight, impl=impl)[0]


def copied(call, inputs):
    """What a call returns, and the shapes of what torch copied that is as large as an input. Copies
    of one dimension are those of the interpreter, which holds memory as it is stored."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profiler:
        result = call()
    shapes = [x.input_shapes[0] for x in profiler.events() if x.name == "aten::copy_"]
    least = min(x.numel() for x in inputs)
    large = [x for x in shapes if len(x) > 1 and torch.Size(x).numel() >= least]
    return result, large


def test_a_copy_is_seen():
    x = halves(B, T, V)[1]
    assert copied(x.contiguous, [x])[1] == [[B, T, V]]


@pytest.mark.parametrize(
    "case, impl",
    [
        pytest.param(ddts, "triton_chunk", marks=TRITON_MARKS),
        pytest.param(ddts_gates, "triton", marks=TRITON_MARKS),
        pytest.param(gated_ddts, "triton_chunk", marks=TRITON_MARKS),
        pytest.param(short_conv, "triton", marks=TRITON_MARKS),
    ],
)
def test_no_half_is_copied_forwards_or_backwards(case, impl):
    inputs, operator = case(impl)
    y, forwards = copied(lambda: operator(*inputs), inputs)
    dy = torch.randn_like(y)
    _, backwards = copied(lambda: torch.autograd.grad(y, inputs, dy), inputs)
    assert forwards == backwards == []


@pytest.mark.parametrize(
    "case, impl",
    [
        pytest.param(ddts, "triton_recurrent", marks=TRITON_MARKS),
        pytest.param(
            short_conv,
            "native",
            marks=pytest.mark.skipif(
                DEVICE != "cpu" or native.problem("cpu") is not None, reason="needs the library"
            ),
        ),
    ],
)
@torch.no_grad()
def test_no_half_is_copied_without_gradient(case, impl):
    inputs, operator = case(impl)
    assert copied(lambda: operator(*inputs), inputs)[1] == []
