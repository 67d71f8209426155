"""Public functions for sequences cut into segments: the state each leaves, and each starts from.

A segment of DDTS acts on the state before it through two things: its total log-decay, and the state
it leaves when it starts from zero. So segments can be computed in parallel, over the programs of
one GPU or over many GPUs, and only these summaries are exchanged.
"""

import torch
import torch.nn.functional as F

from .._dispatch import check_floating, check_same_device, check_shape, load, runs_triton
from .._schemas import TRITON_KEY_DIMS, is_transformed
from ..reference import accumulation_dtype, no_autocast

_SCAN = {
    "reference": "rodimus_kernels.reference:ddts_scan",
    "triton": "rodimus_kernels.ddts.triton_chunk:scan",
}


def ddts_summary(
    k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a segment does to the state before it: one matrix product, differentiable.

        total = sum_t log_decay_t        state = sum_t (k_t exp(sum_{s > t} log_decay_s))^T v_t

    so that the state after the segment is ``exp(total)[:, None] * before + state``. Rodimus* (arXiv
    2410.06577), section 3.1, unrolled. Every exponent is a sum of numbers <= 0.

    Args:
        k: Keys ``[B, T, H, K]``, gates already applied.
        v: Values ``[B, T, H, V]``.
        log_decay: Natural log of the decay, shaped like ``k``, entries <= 0.

    Returns:
        ``(state, total)``: ``[B, H, K, V]`` and ``[B, H, K]``, float32 (float64 for float64
        inputs).

    Raises:
        ValueError: a shape, dtype or device breaks the contract, or T = 0.
    """
    check_shape("k", k, ("B", "T", "H", "K"))
    check_shape("v", v, (*k.shape[:3], "V"))
    check_shape("log_decay", log_decay, tuple(k.shape))
    check_floating(k=k, v=v, log_decay=log_decay)
    check_same_device("k", k, v=v, log_decay=log_decay)
    if k.shape[1] == 0:
        raise ValueError("ddts_summary needs at least one token, got T = 0")
    # torch.func refuses _Summary, and differentiates the operations themselves
    return (_summarise if is_transformed() else _Summary.apply)(k, v, log_decay)


def _summarise(k, v, log_decay):
    dtype = accumulation_dtype(k, v, log_decay)
    fade, total = _fade(log_decay.to(dtype))
    with no_autocast(k.device):
        state = torch.einsum("bthk,bthv->bhkv", k.to(dtype) * fade, v.to(dtype))
    return state, total


class _Summary(torch.autograd.Function):
    """Saves only its inputs: a float32 copy of the values would be twice their size."""

    @staticmethod
    def forward(ctx, k, v, log_decay):
        ctx.save_for_backward(k, v, log_decay)
        return _summarise(k, v, log_decay)

    @staticmethod
    def backward(ctx, dstate, dtotal):
        k, v, log_decay = ctx.saved_tensors
        fade, _ = _fade(log_decay.to(dstate.dtype))
        with no_autocast(k.device):
            dk = torch.einsum("bthv,bhkv->bthk", v.to(dstate.dtype), dstate) * fade
            dv = torch.einsum("bthk,bhkv->bthv", k.to(dstate.dtype) * fade, dstate)
        # a decay fades what all tokens before it have written
        written = (k.to(dstate.dtype) * dk)[:, :-1].cumsum(1)
        dlog_decay = dtotal[:, None] + F.pad(written, (0, 0, 0, 0, 1, 0))
        return dk.to(k.dtype), dv.to(v.dtype), dlog_decay.to(log_decay.dtype)


def _fade(log_decay):
    """How much of each token is left at the end of the segment, and the total log-decay."""
    # summed from the end, without the token's own decay: a difference of two sums would cancel
    after = F.pad(log_decay[:, 1:].flip(1).cumsum(1).flip(1), (0, 0, 0, 0, 0, 1))
    return after.exp(), log_decay.sum(1)


def ddts_scan(
    states: torch.Tensor, log_decays: torch.Tensor, *, reverse: bool = False, impl: str = "auto"
) -> torch.Tensor:
    """State that each segment of a sequence starts from. Not differentiable: its gradient is the
    same scan in reverse.

        before[0] = 0        before[s + 1] = exp(log_decays[s])[:, None] * before[s] + states[s]

    Args:
        states: What each segment leaves when it starts from zero, ``[S, N, H, K, V]``, in order.
        log_decays: Total log-decay of each segment, ``[S, N, H, K]``.
        reverse: Scan from the last segment to the first, which turns the gradients of ``before``
            into the gradients of ``states``.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; an explicit choice never falls back.

    Returns:
        ``[S, N, H, K, V]`` in the dtype of ``states``.

    Raises:
        ValueError: a shape, dtype or device breaks the contract, or ``impl`` is unknown.
        ImportError: the chosen implementation cannot be loaded.
    """
    check_shape("states", states, ("S", "N", "H", "K", "V"))
    check_shape("log_decays", log_decays, tuple(states.shape[:4]))
    check_floating(states=states, log_decays=log_decays)
    check_same_device("states", states, log_decays=log_decays)
    if states.numel() == 0:
        return torch.empty_like(states)
    if impl == "auto":
        key_dim, value_dim = states.shape[-2:]
        fits = states.dtype == torch.float32 and key_dim in TRITON_KEY_DIMS and value_dim % 16 == 0
        impl = "triton" if fits and runs_triton(states.device) else "reference"
    with torch.no_grad():
        return load("ddts_scan", impl, _SCAN)(states, log_decays, reverse=reverse)


__all__ = ["ddts_scan", "ddts_summary"]
