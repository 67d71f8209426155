"""The norms of a block with the library of ``csrc/``: one pass, no gradient."""

import math

import torch

from . import native


def _rows(x):
    """``[..., D]`` as the matrix that the operators take; a view where possible."""
    return native.dense_rows(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def rms_norm(x, weight, *, eps):
    """:func:`rodimus_kernels.rms_norm` in float32 and bfloat16."""
    native.check("rms_norm", x, weight)
    return torch.ops.rodimus.native_rms_norm(_rows(x), native.dense_rows(weight), eps).view(x.shape)


def add_rms_norm(x, residual, weight, *, eps):
    """:func:`rodimus_kernels.add_rms_norm` in float32 and bfloat16."""
    native.check("add_rms_norm", x, residual, weight)
    y, stream = torch.ops.rodimus.native_add_rms_norm(
        _rows(x), _rows(residual), native.dense_rows(weight), eps
    )
    return y.view(x.shape), stream.view(x.shape)


def gated_rms_norm(x, gate, weight, *, eps, residual=None, residual_weight=None):
    """:func:`rodimus_kernels.gated_rms_norm` in float32 and bfloat16."""
    native.check("gated_rms_norm", x, gate, weight, residual, residual_weight)
    if residual is not None:
        residual = _rows(residual)
    weight, residual_weight = map(native.dense_rows, (weight, residual_weight))
    y = torch.ops.rodimus.native_gated_rms_norm(
        _rows(x), _rows(gate), weight, residual, residual_weight, eps
    )
    return y.view(x.shape)
