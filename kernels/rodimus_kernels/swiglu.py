"""The gated activation of the MLP."""

import torch
import torch.nn.functional as F

from ._dispatch import check_floating, check_vectors, load, runs_triton

_IMPLS = {
    "reference": "rodimus_kernels.reference:swiglu",
    "eager": "rodimus_kernels.swiglu:eager_swiglu",
    "triton": "rodimus_kernels.triton_swiglu:swiglu",
}
IMPLS = tuple(_IMPLS)


def swiglu(projection: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """``silu(gate) * x`` of the halves ``x, gate`` of one projection; differentiable.

    GLU variants (arXiv 2002.05202). It takes the whole projection so that in Triton one kernel
    writes its gradient; the gradients of separate halves would have to be copied into one tensor.

    Args:
        projection: ``[..., 2 D]``: x in the first D channels, its gate in the others.
        impl: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``; an explicit choice never
            falls back.

    Returns:
        ``[..., D]`` in the projection's dtype, computed in float32 or wider; with
        ``impl="eager"``, the automatic choice off a GPU, in the projection's dtype.

    Raises:
        ValueError: the width is odd, or the dtype or device breaks the contract.
    """
    check_vectors("projection", projection, "2 D")
    if projection.shape[-1] % 2:
        raise ValueError(f"projection must have shape [..., 2 D], got {tuple(projection.shape)}")
    check_floating(projection=projection)
    if impl == "auto":
        double = projection.dtype == torch.float64
        impl = "triton" if runs_triton(projection.device) and not double else "eager"
    return load("swiglu", impl, _IMPLS)(projection)


def eager_swiglu(projection):
    """Two torch operations in the projection's dtype."""
    x, gate = projection.chunk(2, dim=-1)
    return F.silu(gate) * x
