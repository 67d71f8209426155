"""The low-rank input gate of the mixer: how much of each channel may enter the state."""

import torch
import torch.nn.functional as F

from ._dispatch import (
    check_floating,
    check_same_device,
    check_shape,
    check_vectors,
    load,
    runs_triton,
)
from .linear import multiplies_slowly

_IMPLS = {
    "reference": "rodimus_kernels.reference:input_gate",
    "eager": "rodimus_kernels.input_gate:eager_input_gate",
    "triton": "rodimus_kernels.triton_input_gate:input_gate",
}
IMPLS = tuple(_IMPLS)

# the largest rank that a program of the Triton form holds
_MAX_RANK = 128


def input_gate(
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """``x * sigmoid(hidden @ weight.T + bias)``; differentiable.

    Rodimus* (arXiv 2410.06577), section 3.1: the gate of the value, with a rank of 32 or 48. In
    Triton the gate is never written to memory.

    Args:
        x: ``[..., D]``; may be a strided slice of a wider projection.
        hidden: The input projected to the rank, ``[..., R]``.
        weight: ``[D, R]``.
        bias: ``[D]``.
        impl: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``; an explicit choice never
            falls back.

    Returns:
        ``[..., D]`` in x's dtype. The gate is computed in float32 or wider, except with
        ``impl="eager"``: then in the common dtype of hidden, weight and bias. ``"eager"`` is the
        automatic choice without Triton if torch multiplies that dtype fast.

    Raises:
        ValueError: a shape, dtype or device breaks the contract.
    """
    check_vectors("x", x, "D")
    check_shape("hidden", hidden, (*x.shape[:-1], "R"))
    check_shape("weight", weight, (x.shape[-1], hidden.shape[-1]))
    check_shape("bias", bias, (x.shape[-1],))
    check_floating(x=x, hidden=hidden, weight=weight, bias=bias)
    check_same_device("x", x, hidden=hidden, weight=weight, bias=bias)
    if impl == "auto":
        double = torch.float64 in (x.dtype, hidden.dtype, weight.dtype, bias.dtype)
        alike = _are_alike(x, hidden, weight, bias)
        suits = alike and not multiplies_slowly(x.device, weight.dtype)
        impl = _choose(runs_triton(x.device), hidden.shape[-1], double, suits)
    return load("input_gate", impl, _IMPLS)(x, hidden, weight, bias)


def _choose(triton: bool, rank: int, double: bool, suits: bool) -> str:
    """What ``impl="auto"`` means: Triton on a GPU if the rank fits in a program, else torch's own
    product if it takes these dtypes and is not slow, else the reference."""
    if triton and rank <= _MAX_RANK and not double:
        return "triton"
    return "eager" if suits else "reference"


def _are_alike(x, *product):
    """Whether the tensors of the product have one dtype, or autocast gives them one."""
    # the meta device has no autocast
    casts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return casts or len({t.dtype for t in product}) == 1


def eager_input_gate(x, hidden, weight, bias):
    """Three torch operations in the given dtypes, which autocast may change.

    Raises:
        ValueError: hidden, weight and bias differ in dtype, outside autocast.
    """
    if not _are_alike(x, hidden, weight, bias):
        raise ValueError(
            "input_gate(impl='eager'): expected hidden, weight and bias of one dtype, got"
            f" {hidden.dtype}, {weight.dtype}, {bias.dtype}; impl='reference' takes any"
        )
    return (F.linear(hidden, weight, bias).sigmoid() * x).to(x.dtype)
