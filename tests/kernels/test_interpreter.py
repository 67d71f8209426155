"""Triton's interpreter rounds as a GPU does; where there is a GPU, the GPU is tested."""

import pytest
import torch

from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module

triton = pytest.importorskip("triton")
tl = triton.language
# with it, Triton's interpreter rounds as a GPU does
triton_module("rodimus_kernels._triton")
pytestmark = TRITON_MARKS


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(x, y, z, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(z + o, tl.dot(tl.load(x + o), tl.load(y + o), input_precision=PRECISION))


@triton.jit
def add_kernel(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.load(x + o) + tl.load(x + o))


def cast(x, dtype):
    """In many programs: a GPU takes a minute to compile one for half a million numbers."""
    y, block = torch.empty_like(x, dtype=dtype), 4096
    cast_kernel[(x.numel() // block,)](x, y, N=block)
    return y


def special_numbers():
    """All bits of bfloat16, each with the ends and the middle of what is rounded away."""
    high = torch.arange(1 << 16, dtype=torch.int32)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD], dtype=torch.int32)
    return (high | low).flatten().view(torch.float32).to(DEVICE)


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even():
    x = special_numbers()
    y = cast(x, torch.bfloat16)
    number = ~x.isnan()
    expected = x.bfloat16()
    assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))
    assert y[~number].isnan().all()


def test_float32_holds_every_bfloat16():
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    y = cast(x, torch.float32)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "dtype, precision, least, most",
    [
        (torch.bfloat16, "tf32", 0, 2**-22),
        (torch.float16, "tf32", 0, 2**-22),
        (torch.float32, "ieee", 0, 2**-22),
        # what is left of a factor is 2 ** -11 of it at most, and is rounded, too; that of both is
        # not multiplied
        (torch.float32, "tf32x3", 2**-25, 3 * 2**-22 + 2**-22),
        # each factor may lose 2 ** -10
        (torch.float32, "tf32", 2**-13, 2**-9),
    ],
)
def test_products_have_the_digits_that_are_asked(dtype, precision, least, most):
    x, y = (torch.rand(16, 16, device=DEVICE).add(1).to(dtype) for _ in range(2))
    z = torch.empty(16, 16, device=DEVICE)
    dot_kernel[(1,)](x, y, z, N=16, PRECISION=precision)
    exact = x.double() @ y.double()
    assert least <= ((z - exact).abs() / exact).max() <= most
    if (dtype, precision) == (torch.float32, "tf32"):
        # what is cut off makes every factor smaller
        assert (z < exact).all()


def test_the_parts_of_a_factor_are_the_nearest():
    """Cut off, the parts of this one would leave out 2 ** -20 of a product."""
    x = torch.full((16, 16), 1 + 2**-10 - 2**-23, device=DEVICE)
    z = torch.empty_like(x)
    dot_kernel[(1,)](x, x, z, N=16, PRECISION="tf32x3")
    exact = x.double() @ x.double()
    assert ((z - exact).abs() / exact).max() <= 2**-22


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_infinity_and_nan_stay_what_they_are(precision):
    x = torch.eye(16, device=DEVICE)
    x[0, 0], x[1, 1], x[2, 2] = torch.inf, -torch.inf, torch.nan
    z = torch.empty(16, 16, device=DEVICE)
    dot_kernel[(1,)](x, torch.ones_like(x), z, N=16, PRECISION=precision)
    assert z[:2, 0].tolist() == [torch.inf, -torch.inf] and z[2].isnan().all()
    assert (z[3:] == 1).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU does not look for it")
def test_an_integer_that_overflows_is_an_error():
    y = torch.empty(2, dtype=torch.int32)
    add_kernel[(1,)](torch.tensor([3, (1 << 30) - 1], dtype=torch.int32), y, N=2)
    assert y.tolist() == [6, (1 << 31) - 2]
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 add: 6 to 2147483648"):
        add_kernel[(1,)](torch.tensor([3, 1 << 30], dtype=torch.int32), y, N=2)
