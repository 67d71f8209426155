"""What the interpreter of Triton computes is what a GPU computes; with a GPU, the GPU is asked."""

import pytest
import torch

from tests.kernels.device import DEVICE, TRITON_MARKS

triton = pytest.importorskip("triton")
tl = triton.language
# with it, Triton's interpreter computes with bfloat16 as a GPU does
pytest.importorskip("rodimus_kernels._triton")
pytestmark = TRITON_MARKS


@triton.jit
def cast_kernel(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.load(x + o).to(y.dtype.element_ty))


@triton.jit
def dot_kernel(x, y, z, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(z + o, tl.dot(tl.load(x + o), tl.load(y + o)))


@triton.jit
def add_kernel(x, y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y + o, tl.load(x + o) + tl.load(x + o))


def special_numbers():
    """All bits of bfloat16, each with the ends and the middle of what is rounded away."""
    high = torch.arange(1 << 16, dtype=torch.int32)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD], dtype=torch.int32)
    return (high | low).flatten().view(torch.float32).to(DEVICE)


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even():
    x = special_numbers()
    y = torch.empty_like(x, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, N=x.numel())
    number = ~x.isnan()
    expected = x.bfloat16()
    assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))
    assert y[~number].isnan().all()


def test_float32_holds_every_bfloat16():
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16).to(DEVICE)
    y = torch.empty_like(x, dtype=torch.float32)
    cast_kernel[(1,)](x, y, N=x.numel())
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


def test_products_of_bfloat16_are_not_rounded():
    x, y = (torch.randn(16, 16, device=DEVICE).bfloat16() for _ in range(2))
    z = torch.empty(16, 16, device=DEVICE)
    dot_kernel[(1,)](x, y, z, N=16)
    torch.testing.assert_close(z.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU does not look for it")
def test_an_integer_that_overflows_is_an_error():
    y = torch.empty(2, dtype=torch.int32)
    add_kernel[(1,)](torch.tensor([3, (1 << 30) - 1], dtype=torch.int32), y, N=2)
    assert y.tolist() == [6, (1 << 31) - 2]
    with pytest.raises(triton.runtime.errors.InterpreterError, match="int32 add: 6 to 2147483648"):
        add_kernel[(1,)](torch.tensor([3, 1 << 30], dtype=torch.int32), y, N=2)
