"""One token of the short convolution through the library of ``csrc/``."""

import torch

from . import native


def step(x, conv_state, weight, bias=None):
    """:func:`rodimus_kernels.short_conv_step`; all tensors float32, or all bfloat16."""
    native.check("short_conv_step", x, conv_state, weight, bias, one_dtype=True)
    return torch.ops.rodimus.native_short_conv_step(
        native.dense_rows(x), conv_state, weight.contiguous(), bias
    )
