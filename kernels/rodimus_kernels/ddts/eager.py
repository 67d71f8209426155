"""Chunked DDTS in torch operations, with a backward written by hand: training and prefill where
Triton is not.

The forward is the chunked form of ``reference.py``. The backward recomputes the gates of the chunk
from the inputs, walks the state gradient backwards over the chunks, and sends the gate gradient
down the same dyadic tree
that the forward climbed: sums only, so a decay of -20 a step does not cancel its gradient away.
    Saved beyond the inputs:
one state ``[K, V]`` per chunk of 64 tokens.
"""

import torch

from .. import reference
from .._library import EAGER_CHUNK


def forward(
    q, k, v, log_decay, *, scale, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """``ddts`` by chunks; the contract is that of :func:`rodimus_kernels.ddts`."""
    if cu_seqlens is not None and (output_final_state or initial_state is not None):
        return reference.each_document(
            lambda *piece, **states: forward(*piece, scale=scale, **states),
            *(q, k, v, log_decay, initial_state, output_final_state, cu_seqlens),
        )
    if cu_seqlens is not None:
        log_decay = reference.reset_at_starts(log_decay, cu_seqlens)
    inputs = (q, k, v, log_decay, initial_state)
    save_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final_state, _ = torch.ops.rodimus.ddts_eager(
        q, k, v, log_decay, scale, initial_state, save_states
    )
    return o, (final_state if output_final_state else None)


def step(q, k, v, log_decay, state, *, scale):
    """``ddts_step``: the update in place, without a second state in memory."""
    flat = state.flatten(0, 1)
    k, log_decay, q = (x.flatten(0, 1).to(state.dtype) for x in (k, log_decay, q))
    flat.mul_(log_decay.exp()[..., None])
    flat.baddbmm_(k[..., None], v.flatten(0, 1).to(state.dtype)[:, None])
    o = torch.bmm(q[:, None] * scale, flat)
    return o.view(v.shape).to(v.dtype)


@torch.library.impl("rodimus::ddts_eager", "CompositeExplicitAutograd")
def _forward(q, k, v, log_decay, scale, initial_state, save_states):
    with torch.autocast(q.device.type, enabled=False):
        o, final_state, states = reference.ddts_chunk_states(
            q, k, v, log_decay, scale, initial_state, EAGER_CHUNK
        )
    # the fake promises contiguous outputs, and torch.compile relies on it
    states = states if save_states else states[:, :, :0].clone()
    return o.contiguous(), final_state.contiguous(), states


@torch.library.impl("rodimus::ddts_eager_backward", "CompositeExplicitAutograd")
def _backward(q, k, v, log_decay, scale, states, do, dfinal_state):
    with torch.autocast(q.device.type, enabled=False):
        grads = _chunked_backward(q, k, v, log_decay, scale, states, do, dfinal_state)
    return tuple(x.contiguous() for x in grads)


def _chunked_backward(q, k, v, log_decay, scale, states, do, dfinal_state):
    qc, kc, vc, gc, doc = (
        reference.to_chunks(x.to(states.dtype), EAGER_CHUNK)
        for x in (q * scale, k, v, log_decay, do)
    )
    levels, prefix, suffix, total = reference.decay_tree(gc)
    grow, shrink, keep = prefix.exp(), suffix.exp(), total.exp()
    read, write = qc * grow, kc * shrink

    # The state gradient walks backwards: dstates[n] is the gradient of the state after chunk n.
    dstate = torch.zeros_like(states[:, :, 0]) if dfinal_state is None else dfinal_state
    dstates = torch.empty_like(states)
    for n in reversed(range(states.shape[2])):
        dstates[:, :, n] = dstate
        dstate = keep[:, :, n, :, None] * dstate + read[:, :, n].transpose(-1, -2) @ doc[:, :, n]

    scores = reference.chunk_scores(qc, kc, levels)
    dv = scores.transpose(-1, -2) @ doc + write @ dstates
    dscores = doc @ vc.transpose(-1, -2)
    # The diagonal of the scores carries no gate.
    diagonal = dscores.diagonal(dim1=-2, dim2=-1)[..., None]
    through_prefix = (doc @ states.transpose(-1, -2)) * grow
    through_suffix = (vc @ dstates.transpose(-1, -2)) * shrink
    dq, dk = through_prefix + diagonal * kc, through_suffix + diagonal * qc
    dprefix, dsuffix = qc * through_prefix, kc * through_suffix
    dtotal = (keep * (states * dstates).sum(-1))[..., None, :]

    for level in reversed(range(len(levels))):
        dtotal = _split_total(dprefix, dsuffix, dtotal, half=1 << level)
        grow, shrink = (x.exp() for x in levels[level])
        pairs = dscores * reference.level_mask(EAGER_CHUNK, level, q.device)
        through_prefix = (pairs @ (kc * shrink)) * grow
        through_suffix = (pairs.transpose(-1, -2) @ (qc * grow)) * shrink
        dq, dk = dq + through_prefix, dk + through_suffix
        dprefix, dsuffix = dprefix + qc * through_prefix, dsuffix + kc * through_suffix
    dlog_decay = dprefix + dtotal

    length = q.shape[1]
    dq = reference.from_chunks(dq, length) * scale
    dk, dv, dlog_decay = (reference.from_chunks(x, length) for x in (dk, dv, dlog_decay))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dlog_decay.to(log_decay.dtype), dstate


def _split_total(dprefix, dsuffix, dtotal, *, half):
    """Gradient of the block sums one level down: ``[..., C / 2h, K]`` to ``[..., C / h, K]``.

    An even block's sum entered the prefixes of the odd block after it, an odd block's the suffixes
    of the even block before it, and both the sum of the pair.
    """
    pairs = (dtotal.shape[-2], 2, half)
    odd_prefix = dprefix.unflatten(-2, pairs)[..., 1, :, :].sum(-2)
    even_suffix = dsuffix.unflatten(-2, pairs)[..., 0, :, :].sum(-2)
    return torch.stack((dtotal + odd_prefix, dtotal + even_suffix), dim=-2).flatten(-3, -2)


def _setup_context(ctx, inputs, output):
    q, k, v, log_decay, ctx.scale, initial_state, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, dfinal_state, _dstates):
    q, k, v, log_decay, states = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    *grads, dinitial_state = torch.ops.rodimus.ddts_eager_backward(
        q, k, v, log_decay, ctx.scale, states, do, dfinal_state
    )
    dinitial_state = None if ctx.state_dtype is None else dinitial_state.to(ctx.state_dtype)
    return *grads, None, dinitial_state, None


torch.library.register_autograd("rodimus::ddts_eager", _autograd, setup_context=_setup_context)
