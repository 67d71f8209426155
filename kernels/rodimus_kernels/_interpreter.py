"""Triton's interpreter, made to compute with bfloat16 as a GPU does."""

import numpy as np
import triton.language as tl
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


def compute_bfloat16_as_a_gpu() -> None:
    """By itself the interpreter truncates to bfloat16, and ``tl.dot`` multiplies the bits of
    bfloat16 as if they were integers."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, x, dtype):
        kinds = x.dtype.scalar, dtype.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return handle(_rounded(x.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(_widened(x.data), tl.float32)
        return cast(self, x, dtype)

    def create_dot(self, a, b, *rest):
        a, b = (
            handle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
