"""Linear layer for up to eight rows with the library of ``csrc/``: weights are streamed once."""

import torch

from . import native
from .quantized_weight import QUANTIZED


def linear(x, weight, bias=None):
    """:func:`rodimus_kernels.linear`, where x and weight are both float32 or both bfloat16, or the
    weight is quantised and x is either."""
    native.check("linear", x, weight, bias)
    if not 1 <= x.shape[0] <= native.MAX_ROWS:
        raise ValueError(
            f"linear(impl='native') takes 1 to {native.MAX_ROWS} rows, got {x.shape[0]}"
        )
    values, scale = weight[:2] if type(weight) in QUANTIZED else (weight, None)
    return torch.ops.rodimus.native_linear_step(*map(native.dense_rows, (x, values, bias, scale)))
