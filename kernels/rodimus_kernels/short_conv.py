"""Short causal depthwise convolution with silu: the local mixing before the gates of DDTS."""

import torch

from . import native_conv
from ._dispatch import (
    check_floating,
    check_same_device,
    check_shape,
    choose_compiled,
    load,
    mark_written,
    runs_triton,
)
from .reference import check_cu_seqlens

_SEQUENCE = {
    "reference": "rodimus_kernels.reference:short_conv",
    "triton": "rodimus_kernels.triton_conv:forward",
    "native": "rodimus_kernels.native_conv:forward",
}
_STEP = {
    "reference": "rodimus_kernels.reference:short_conv_step",
    "native": "rodimus_kernels.native_conv:step",
}
IMPLS = tuple(_SEQUENCE)


def short_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``silu(bias + causal depthwise convolution of x over time)``; differentiable.

    Args:
        x: ``[B, T, D]``; may be a strided slice of a wider projection.
        weight: ``[D, W]``; the last tap multiplies the current token.
        bias: ``[D]`` or None.
        initial_state: The W inputs before x, oldest first, ``[N, D, W]``. Default zeros.
        output_final_state: Return the last W inputs of each sequence.
        cu_seqlens: int ``[N + 1]`` boundaries of packed documents, rising from 0 to T; requires B
            = 1. The values are checked as in :func:`ddts`.
        seq_idx: int ``[B, T]`` document of each token, for packed rows of any batch; without
            states.
        impl: ``"auto"``, ``"triton"``, ``"reference"`` or, on a CPU and without gradient,
            ``"native"``; an explicit choice never falls back.

    Returns:
        ``(y, final_state)``: ``y`` is ``[B, T, D]`` in x's dtype, ``final_state`` ``[N, D, W]`` or
        None.

    Raises:
        ValueError: a shape, dtype or device breaks the contract, or T = 0.
    """
    check_shape("x", x, ("B", "T", "D"))
    batch, length, channels = x.shape
    _check_weight(weight, channels)
    if bias is not None:
        check_shape("bias", bias, (channels,))
    check_floating(x=x, weight=weight, bias=bias, initial_state=initial_state)
    check_same_device(
        "x",
        x,
        weight=weight,
        bias=bias,
        initial_state=initial_state,
        seq_idx=seq_idx,
        cu_seqlens=cu_seqlens,
    )
    if length == 0:
        raise ValueError("short_conv needs at least one token, got T = 0")
    sequences = check_cu_seqlens(cu_seqlens, batch, length)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, channels, weight.shape[1]))
    if seq_idx is not None:
        check_shape("seq_idx", seq_idx, (batch, length))
        if seq_idx.is_floating_point() or seq_idx.dtype == torch.bool:
            raise ValueError(f"seq_idx must be integers, got {seq_idx.dtype}")
        if cu_seqlens is not None or initial_state is not None or output_final_state:
            raise ValueError(
                "seq_idx excludes cu_seqlens and states: packed rows start and end inside the row"
            )
    if impl == "auto":
        if runs_triton(x.device) and torch.float64 not in (x.dtype, weight.dtype):
            impl = "triton"
        elif native_conv.takes(x, weight, bias, initial_state, output_final_state, cu_seqlens):
            impl = "native"
        else:
            impl = "reference"
    function = load("short_conv", impl, _SEQUENCE)
    return function(
        x,
        weight,
        bias,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        seq_idx=seq_idx,
    )


def short_conv_step(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """One token of :func:`short_conv`; ``conv_state`` is updated in place. Not differentiable.

    Args:
        x: ``[B, D]``.
        conv_state: The last W inputs, oldest first, ``[B, D, W]``; overwritten.
        weight: ``[D, W]``.
        bias: ``[D]`` or None.
        impl: ``"auto"``, ``"native"`` or ``"reference"``; an explicit choice never falls back.

    Returns:
        ``[B, D]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device breaks the contract.
    """
    check_shape("x", x, ("B", "D"))
    _check_weight(weight, x.shape[1])
    check_shape("conv_state", conv_state, (*x.shape, weight.shape[1]))
    if bias is not None:
        check_shape("bias", bias, (x.shape[1],))
    check_floating(x=x, conv_state=conv_state, weight=weight, bias=bias)
    check_same_device("x", x, conv_state=conv_state, weight=weight, bias=bias)
    with torch.no_grad():
        if impl == "auto":
            tensors = (x, conv_state, weight, bias)
            fits = conv_state.is_contiguous()
            impl = choose_compiled("reference", *tensors, one_dtype=True) if fits else "reference"
        y = load("short_conv_step", impl, _STEP)(x, conv_state, weight, bias)
    mark_written(conv_state)
    return y


def _check_weight(weight, channels):
    check_shape("weight", weight, (channels, "W"))
    if weight.shape[1] == 0:
        raise ValueError("weight needs at least one tap, got W = 0")
