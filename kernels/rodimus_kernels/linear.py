"""Linear layer for the few rows of a decode step, where reading the weights is all the time."""

import torch
import torch.nn.functional as F

from . import native, reference
from ._dispatch import check_same_device, check_shape, choose_compiled, load
from .int8_weight import Int8Weight

_IMPLS = {
    "reference": "rodimus_kernels.reference:linear_step",
    "eager": "rodimus_kernels.linear:eager_linear",
    "native": "rodimus_kernels.native_linear:step",
}
IMPLS = tuple(_IMPLS)


def linear_step(
    x: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    bias: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32 and rounded once. Not differentiable.

    Args:
        x: ``[M, K]``; the native form takes M <= 8.
        weight: ``[N, K]`` of x's dtype, or 8-bit weights, which the native form takes on a CPU.
        bias: ``[N]`` or None; float32 or x's dtype.
        impl: ``"auto"``, ``"native"``, ``"eager"`` or ``"reference"``; an explicit choice never
            falls back.

    Returns:
        ``[M, N]`` in x's dtype. With the native form a row does not depend on the other rows.

    Raises:
        ValueError: a shape, dtype or device breaks the contract.
        ImportError: the chosen implementation cannot be loaded.
    """
    check_shape("x", x, ("M", "K"))
    check_shape("weight", weight, ("N", x.shape[1]))
    if type(weight) is Int8Weight:
        check_shape("weight.scale", weight.scale, (weight.shape[0],))
    elif weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} like x, got {weight.dtype}")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
    check_same_device("x", x, weight=weight, bias=bias)
    with torch.no_grad():
        if impl == "auto":
            rows = x.shape[0]
            suits = 1 <= rows and (rows <= native.MAX_ROWS or type(weight) is Int8Weight)
            impl = choose_compiled("eager", x, weight, bias) if suits else "eager"
            if impl == "native" and rows > native.MAX_ROWS:
                # widening 8-bit weights takes longer than reading them a few times
                parts = x.split(native.MAX_ROWS)
                return torch.cat([linear_step(part, weight, bias) for part in parts])
        return load("linear_step", impl, _IMPLS)(x, weight, bias)


@reference.outside_autocast
def eager_linear(x, weight, bias=None):
    """``F.linear``; a wider bias is added in its own dtype, then rounded. 8-bit weights are
    multiplied out: the sum of their values times x is more than float16 holds."""
    if type(weight) is Int8Weight:
        return reference.linear_step(x, weight, bias)
    if bias is None or bias.dtype == x.dtype:
        return F.linear(x, weight, bias)
    return (F.linear(x, weight).to(bias.dtype) + bias).to(x.dtype)
