"""The short convolution with the library of ``csrc/``: one token, and on a CPU also sequences."""

import torch

from . import native
from .reference import document_ids, last_inputs


def takes(x, weight, bias, initial_state, output_final_state, cu_seqlens):
    """Whether ``impl="auto"`` of :func:`rodimus_kernels.short_conv` may choose :func:`forward`."""
    return _has_form(x, weight, initial_state, output_final_state, cu_seqlens) and native.fits(
        x, weight, bias, initial_state, one_dtype=True
    )


def _has_form(x, weight, initial_state, output_final_state, cu_seqlens):
    states = initial_state is not None or output_final_state
    taps = weight.shape[1]
    return x.device.type == "cpu" and taps <= native.MAX_TAPS and (cu_seqlens is None or not states)


def forward(
    x,
    weight,
    bias=None,
    *,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    seq_idx=None,
):
    """:func:`rodimus_kernels.short_conv` on a CPU, without gradient: all tensors are float32, or
    all bfloat16, and packed documents have no states."""
    if not _has_form(x, weight, initial_state, output_final_state, cu_seqlens):
        raise ValueError(
            f"short_conv(impl='native') takes at most {native.MAX_TAPS} taps on a CPU and packed"
            f" documents without states, got {weight.shape[1]} taps on {x.device.type}"
            + (" and packed documents with states" if cu_seqlens is not None else "")
        )
    native.check("short_conv", x, weight, bias, initial_state, one_dtype=True)
    if cu_seqlens is not None:
        seq_idx = document_ids(cu_seqlens, x.shape[1])[None]
    # an empty tensor counts as contiguous with any strides, and would not be copied
    rows = native.dense_rows(x) if x.numel() else x.new_empty(x.shape)
    y = torch.ops.rodimus.native_short_conv(
        rows,
        native.dense_rows(weight),
        native.dense_rows(bias),
        None if initial_state is None else initial_state.contiguous(),
        None if seq_idx is None else seq_idx.long().contiguous(),
    )
    final_state = last_inputs(x, weight.shape[1], initial_state) if output_final_state else None
    return y, final_state


def step(x, conv_state, weight, bias=None):
    """:func:`rodimus_kernels.short_conv_step`; all tensors float32, or all bfloat16."""
    native.check("short_conv_step", x, conv_state, weight, bias, one_dtype=True)
    return torch.ops.rodimus.native_short_conv_step(
        native.dense_rows(x), conv_state, weight.contiguous(), native.dense_rows(bias)
    )
