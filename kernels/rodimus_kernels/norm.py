"""The norms of a block: plain, after a residual addition, and after the mixer's silu gate."""

import torch

from . import native
from ._dispatch import (
    check_floating,
    check_same_device,
    check_shape,
    check_vectors,
    load,
    runs_triton,
)
from ._schemas import TRITON_NORM_WIDTH

_RMS = {
    "reference": "rodimus_kernels.reference:rms_norm",
    "native": "rodimus_kernels.native_norm:rms_norm",
    "triton": "rodimus_kernels.triton_norm:rms_norm",
}
_ADD = {
    "reference": "rodimus_kernels.reference:add_rms_norm",
    "native": "rodimus_kernels.native_norm:add_rms_norm",
    "triton": "rodimus_kernels.triton_norm:add_rms_norm",
}
_GATED = {
    "reference": "rodimus_kernels.reference:gated_rms_norm",
    "native": "rodimus_kernels.native_norm:gated_rms_norm",
    "triton": "rodimus_kernels.triton_norm:gated_rms_norm",
}
IMPLS = tuple(_RMS)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-5, impl: str = "auto"
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32 or wider.

    Args:
        x: ``[..., D]``, usually the float32 residual stream.
        weight: ``[D]``.
        eps: Added to the mean square.
        impl: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``; an explicit choice never
            falls back.

    Returns:
        ``[..., D]`` in weight's dtype.

    Raises:
        ValueError: weight does not fit x, or one of them is not floating point.
    """
    _check_weight(x, weight)
    check_floating(x=x, weight=weight)
    check_same_device("x", x, weight=weight)
    return load("rms_norm", _choose(impl, x, weight), _RMS)(x, weight, eps=eps)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    Args:
        x: Output of a branch ``[..., D]``.
        residual: Stream ``[..., D]``, usually float32; its dtype is kept.
        weight: ``[D]``.
        eps: Added to the mean square.
        impl: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``; an explicit choice never
            falls back.

    Returns:
        ``(rms_norm(residual + x), residual + x)``: the first in weight's dtype, the second in the
        stream's.

    Raises:
        ValueError: shapes or devices differ, or a tensor is not floating point.
    """
    _check_weight(x, weight)
    check_shape("residual", residual, tuple(x.shape))
    check_floating(x=x, residual=residual, weight=weight)
    check_same_device("x", x, residual=residual, weight=weight)
    impl = _choose(impl, x, residual, weight)
    return load("add_rms_norm", impl, _ADD)(x, residual, weight, eps=eps)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    residual_weight: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """``rms_norm((x + residual * residual_weight) * silu(gate)) * weight``: gate first, then norm.

    Args:
        x: ``[..., D]``.
        gate: Pre-activation of the gate ``[..., D]``.
        weight: ``[D]``.
        eps: Added to the mean square.
        residual: ``[..., D]`` or None; comes with ``residual_weight``.
        residual_weight: ``[D]``, usually float32.
        impl: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``; an explicit choice never
            falls back.

    Returns:
        ``[..., D]`` in x's dtype; the weighted sum is rounded to it before gating.

    Raises:
        ValueError: shapes or devices differ, a tensor is not floating point, or only one of
            residual and residual_weight is given.
    """
    _check_weight(x, weight)
    check_shape("gate", gate, tuple(x.shape))
    if (residual is None) != (residual_weight is None):
        raise ValueError("residual and residual_weight come together, got only one of them")
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape))
        check_shape("residual_weight", residual_weight, (x.shape[-1],))
    given = {"gate": gate, "weight": weight, "residual": residual}
    given["residual_weight"] = residual_weight
    check_floating(x=x, **given)
    check_same_device("x", x, **given)
    impl = _choose(impl, x, gate, weight, residual, residual_weight)
    return load("gated_rms_norm", impl, _GATED)(
        x, gate, weight, eps=eps, residual=residual, residual_weight=residual_weight
    )


def _check_weight(x, weight):
    check_vectors("x", x, "D")
    check_shape("weight", weight, (x.shape[-1],))


def _choose(impl, *tensors):
    if impl != "auto":
        return impl
    fallback = "reference"
    if runs_triton(tensors[0].device):
        double = any(x is not None and x.dtype == torch.float64 for x in tensors)
        fallback = _gpu_form(tensors[0].shape[-1], double)
    # Triton is preferred where it runs, because it takes any number of rows
    return "native" if fallback != "triton" and native.fits(*tensors) else fallback


def _gpu_form(width: int, double: bool) -> str:
    """Triton if it takes the dtype and a row fits in its registers, else the reference."""
    return "triton" if width <= TRITON_NORM_WIDTH and not double else "reference"
