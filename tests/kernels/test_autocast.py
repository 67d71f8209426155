"""Autocast changes no operator, in float32 or with activations already rounded, but the input gate
made of torch's operations, whose product it rounds."""

import pytest
import torch
import torch.nn.functional as F

import rodimus_kernels as rk
from tests.kernels.device import DEVICE, TRITON_MARKS

TOKENS, WIDTH, RANK = (2, 5), 16, 4
ROWS, VECTOR = (*TOKENS, WIDTH), (WIDTH,)
# name: shapes of activations, shapes of parameters, implementations
OPERATORS = {
    "short_conv": ((ROWS,), ((WIDTH, 4), VECTOR), ("reference", "triton")),
    "rms_norm": ((ROWS,), (VECTOR,), ("reference", "triton")),
    "add_rms_norm": ((ROWS, ROWS), (VECTOR,), ("reference", "triton")),
    "gated_rms_norm": ((ROWS, ROWS), (VECTOR,), ("reference", "triton")),
    "input_gate": (
        (ROWS, (*TOKENS, RANK)),
        ((WIDTH, RANK), VECTOR),
        ("reference", "triton"),
    ),
    "swiglu": (((*TOKENS, 2 * WIDTH),), (), ("reference", "eager", "triton")),
}
CASES = [
    pytest.param(name, impl, id=f"{name}-{impl}", marks=TRITON_MARKS if impl == "triton" else ())
    for name, (_, _, impls) in OPERATORS.items()
    for impl in impls
]
DTYPES = [torch.float32, torch.bfloat16]


def make(name, dtype):
    """Activations of a dtype and parameters in float32, as autocast hands them on."""
    activations, parameters, _ = OPERATORS[name]
    found = [torch.randn(shape, device=DEVICE).to(dtype) for shape in activations]
    return [*found, *(torch.randn(shape, device=DEVICE) for shape in parameters)]


def run(operator, inputs, autocast):
    """Outputs, and the gradients of their sum: backward runs outside autocast, as torch wants."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        outputs = operator(*leaves)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    sum(y.float().square().sum() for y in outputs).backward()
    return [*outputs, *(x.grad for x in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, impl", CASES)
def test_autocast_changes_nothing(name, impl, dtype):
    inputs = make(name, dtype)
    operator = lambda *inputs: getattr(rk, name)(*inputs, impl=impl)
    plain, cast = (run(operator, inputs, autocast) for autocast in (False, True))
    assert [x.dtype for x in cast] == [x.dtype for x in plain]
    assert all(map(torch.equal, cast, plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_rounds_the_product_of_the_eager_input_gate(dtype):
    x, hidden, weight, bias = make("input_gate", dtype)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = rk.input_gate(x, hidden, weight, bias, impl="eager")
    product = F.linear(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert y.dtype == dtype
    assert torch.equal(y, product.sigmoid() * x)
    assert not torch.equal(y, rk.input_gate(x, hidden, weight, bias, impl="reference"))
