"""Public function of DDTS from raw projections: gates and recurrence in one call."""

import torch

from .. import reference
from .._dispatch import check_floating, check_same_device, check_shape, load, query_scale
from .api import choose_sequence, ddts, ddts_gates

_IMPLS = {
    "reference": "rodimus_kernels.reference:gated_ddts",
    "separate": "rodimus_kernels.ddts.gated:separate",
    "triton_chunk": "rodimus_kernels.ddts.triton_chunk:gated_forward",
}
IMPLS = tuple(_IMPLS)


def gated_ddts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    select: torch.Tensor,
    temper: torch.Tensor,
    *,
    eps: float = 1e-12,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    starts: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`ddts_gates` and :func:`ddts` in one: the sequence form from raw projections,
    differentiable.

        k, log_decay = ddts_gates(k, select, temper)
        o, final_state = ddts(q, k, v, log_decay)

    Rodimus* (arXiv 2410.06577), section 3.1. In Triton the gated keys and the decays exist in
    registers only, and the gradient goes to the raw projections directly.

    Args:
        q: Queries ``[B, T, H, K]``; float32, bfloat16, float16 or float64.
        k: Raw keys shaped like ``q``.
        v: Values ``[B, T, H, V]``.
        select: Pre-activation of the selection gate, shaped like ``q``; -1e30 closes it, so that
            the token neither writes nor decays.
        temper: Pre-activation of the temperature gate, shaped like ``q``.
        eps: Lower bound of the key norm.
        scale: Query scale. Default ``K ** -0.5``.
        initial_state: ``[B, H, K, V]``. Default zeros.
        output_final_state: Return the state after the last token of each row.
        starts: bool ``[B, T]`` or ``[1, T]``, True at the first token of each packed document,
            which erases the state before it.
        impl: ``"auto"``, ``"triton_chunk"``, ``"separate"``, which calls the two functions, or
            ``"reference"``; an explicit choice never falls back.

    Returns:
        ``(o, final_state)`` as of :func:`ddts`.

    Raises:
        ValueError: a shape, dtype or device breaks the contract, or T = 0.
        ImportError: the chosen implementation cannot be loaded.
    """
    check_shape("q", q, ("B", "T", "H", "K"))
    batch, length, heads, key_dim = q.shape
    check_shape("v", v, (batch, length, heads, "V"))
    like_q = {"k": k, "select": select, "temper": temper}
    for name, tensor in like_q.items():
        check_shape(name, tensor, tuple(q.shape))
    check_floating(q=q, v=v, initial_state=initial_state, **like_q)
    check_same_device("q", q, v=v, initial_state=initial_state, starts=starts, **like_q)
    if length == 0:
        raise ValueError("gated_ddts needs at least one token, got T = 0")
    scale = query_scale(scale, key_dim)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (batch, heads, key_dim, v.shape[-1]))
    if starts is not None:
        _check_starts(starts, batch, length)
    if impl == "auto":
        tensors = (q, k, v, select, temper, initial_state)
        impl = _choose(choose_sequence(*tensors), v.dtype, key_dim)
    return load("gated_ddts", impl, _IMPLS)(
        q,
        k,
        v,
        select,
        temper,
        eps=eps,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        starts=starts,
    )


def _choose(sequence: str, dtype: torch.dtype, key_dim: int) -> str:
    """What ``impl="auto"`` means, given what ``ddts`` would choose: with float32 values or 256
    channels, gates inside the kernels would need more registers than the backward has."""
    inside = sequence == "triton_chunk" and dtype != torch.float32 and key_dim <= 128
    return "triton_chunk" if inside else "separate"


def _check_starts(starts, batch, length):
    rows = batch if starts.shape[:1] == (batch,) else 1
    check_shape("starts", starts, (rows, length))
    if starts.dtype != torch.bool:
        raise ValueError(f"starts must be torch.bool, got {starts.dtype}")


def separate(q, k, v, select, temper, *, eps, scale, initial_state, output_final_state, starts):
    """``gated_ddts`` as two calls, each with its own choice of implementation."""
    k, log_decay = ddts_gates(k, select, temper, eps=eps)
    if starts is not None:
        log_decay = log_decay.masked_fill(starts[..., None, None], reference.RESET)
    states = {"initial_state": initial_state, "output_final_state": output_final_state}
    return ddts(q, k, v, log_decay, scale=scale, **states)
