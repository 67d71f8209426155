"""Triton's interpreter, made to round as the tensor cores of a GPU do."""

from functools import partial

import numpy as np
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime import interpreter


def _rounded(x: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 nearest to float32 ``x``, ties to even; NaN stays NaN."""
    bits = np.asarray(x).view(np.uint32)
    with np.errstate(over="ignore"):
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def _widened(bits: np.ndarray) -> np.ndarray:
    """The float32 values of the bits of bfloat16."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _in_tf32(x: np.ndarray, *, half: int = 0) -> np.ndarray:
    """float32 ``x`` with the digits of tf32: truncated, or with half a digit added before."""
    bits = (x.view(np.uint32) + np.uint32(half)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), x, bits.view(np.float32))


@np.errstate(invalid="ignore")
def _product(a: np.ndarray, b: np.ndarray, precision: INPUT_PRECISION) -> np.ndarray:
    """``a @ b`` of float32 matrices in a precision."""
    if precision == INPUT_PRECISION.TF32:
        # a tensor core ignores the digits that tf32 does not have
        return _in_tf32(a) @ _in_tf32(b)
    if precision != INPUT_PRECISION.TF32x3:
        return a @ b
    nearest = partial(_in_tf32, half=0x1000)
    large_a, large_b = nearest(a), nearest(b)
    product = large_a @ large_b
    rest = large_a @ nearest(b - large_b) + nearest(a - large_a) @ large_b
    # what is left of infinity is no number, which Triton takes for nothing
    return np.where(np.isnan(rest), product, rest + product)


def round_as_a_gpu() -> None:
    """Change the interpreter. By itself it truncates to bfloat16, multiplies the bits of bfloat16
    as if they were integers, and float32 in full, whatever precision is asked for."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, x, dtype):
        kinds = x.dtype.scalar, dtype.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return handle(_rounded(x.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(_widened(x.data), tl.float32)
        return cast(self, x, dtype)

    def create_dot(self, a, b, acc, precision, *rest):
        kinds = a.dtype.scalar, b.dtype.scalar
        if kinds == (tl.bfloat16, tl.bfloat16):
            product = _widened(a.data) @ _widened(b.data)
        elif kinds == (tl.float32, tl.float32):
            product = _product(a.data, b.data, precision)
        else:
            return dot(self, a, b, acc, precision, *rest)
        return handle(product + acc.data, acc.dtype.scalar)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
