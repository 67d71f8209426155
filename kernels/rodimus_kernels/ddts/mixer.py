"""Public function of the fused mixer step: what happens to one token between the projections."""

import torch

from .. import native
from .._dispatch import (
    check_floating,
    check_same_device,
    check_shape,
    choose_compiled,
    load,
    mark_written,
    query_scale,
)

_IMPLS = {
    "reference": "rodimus_kernels.reference:ddts_mixer_step",
    "native": "rodimus_kernels.ddts.native_mixer:mixer_step",
}
IMPLS = tuple(_IMPLS)


def ddts_mixer_step(
    q: torch.Tensor,
    k: torch.Tensor,
    select: torch.Tensor,
    temper: torch.Tensor,
    gate_hidden: torch.Tensor,
    x: torch.Tensor,
    shifted: torch.Tensor,
    gate: torch.Tensor,
    state: torch.Tensor,
    *,
    gate_weight: torch.Tensor,
    gate_bias: torch.Tensor,
    residual_weight: torch.Tensor,
    norm_weight: torch.Tensor,
    scale: float | None = None,
    key_eps: float = 1e-12,
    norm_eps: float = 1e-5,
    impl: str = "auto",
) -> torch.Tensor:
    """One token of a Rodimus mixer between its projections; ``state`` is updated in place. Not
    differentiable.

        k, log_decay = ddts_gates(k, select, temper)
        v = sigmoid(gate_hidden gate_weight^T + gate_bias) * x
        o = ddts_step(q, k, v, log_decay, state)
        y = rms_norm((o + shifted * residual_weight) * silu(gate)) * norm_weight

    Rodimus* (arXiv 2410.06577), section 3.1. The fused form rounds once, at the end; in bfloat16 it
    is therefore closer to exact than the four operators one after the other.

    Args:
        q: Queries ``[B, K]``.
        k: Raw keys ``[B, K]``.
        select: Pre-activation of the selection gate ``[B, K]``.
        temper: Pre-activation of the temperature gate ``[B, K]``.
        gate_hidden: Hidden layer of the input gate ``[B, R]``.
        x: Expanded branch ``[B, V]``.
        shifted: The branch after the short convolution ``[B, V]``.
        gate: Pre-activation of the output gate ``[B, V]``.
        state: float32 ``[B, 1, K, V]``, contiguous; overwritten.
        gate_weight: Second layer of the input gate ``[V, R]``, dtype of ``gate_hidden``.
        gate_bias: ``[V]``.
        residual_weight: ``[V]``.
        norm_weight: ``[V]``.
        scale: Query scale. Default ``K ** -0.5``.
        key_eps: Lower bound of the key norm.
        norm_eps: Added to the mean square.
        impl: ``"auto"``, ``"native"`` or ``"reference"``; an explicit choice never falls back.

    Returns:
        ``[B, V]`` in x's dtype: the input of the mixer's last projection.

    Raises:
        ValueError: a shape, dtype, device or stride breaks the contract.
        ImportError: the chosen implementation cannot be loaded.
    """
    gates = {"k": k, "select": select, "temper": temper}
    branches = {"x": x, "shifted": shifted, "gate": gate}
    vectors = {
        "gate_bias": gate_bias,
        "residual_weight": residual_weight,
        "norm_weight": norm_weight,
    }
    given = {"gate_hidden": gate_hidden, "gate_weight": gate_weight, **gates, **branches, **vectors}
    _check(q, state, gates, branches, vectors, given)
    scale = query_scale(scale, q.shape[1])
    with torch.no_grad():
        if impl == "auto":
            alike = gate_weight.dtype == gate_hidden.dtype and state.dtype == torch.float32
            fits = alike and (q.device.type == "cpu" or q.shape[1] <= native.MAX_CUDA_KEYS)
            tensors = (q, *given.values(), state)
            impl = choose_compiled("reference", *tensors) if fits else "reference"
        y = load("ddts_mixer_step", impl, _IMPLS)(
            q,
            k,
            select,
            temper,
            gate_hidden,
            x,
            shifted,
            gate,
            state,
            gate_weight=gate_weight,
            gate_bias=gate_bias,
            residual_weight=residual_weight,
            norm_weight=norm_weight,
            scale=scale,
            key_eps=key_eps,
            norm_eps=norm_eps,
        )
    mark_written(state)
    return y


def _check(q, state, gates, branches, vectors, given):
    """Raise ValueError unless the shapes, dtypes and devices of a step's tensors fit together."""
    x, gate_hidden = given["x"], given["gate_hidden"]
    check_shape("q", q, ("B", "K"))
    check_shape("x", x, (q.shape[0], "V"))
    check_shape("gate_hidden", gate_hidden, (q.shape[0], "R"))
    for expected, tensors in (
        (tuple(q.shape), gates),
        (tuple(x.shape), branches),
        ((x.shape[1],), vectors),
    ):
        for name, tensor in tensors.items():
            check_shape(name, tensor, expected)
    check_shape("gate_weight", given["gate_weight"], (x.shape[1], gate_hidden.shape[1]))
    check_shape("state", state, (q.shape[0], 1, q.shape[1], x.shape[1]))
    check_floating(q=q, state=state, **given)
    check_same_device("q", q, state=state, **given)
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {state.stride()}")
