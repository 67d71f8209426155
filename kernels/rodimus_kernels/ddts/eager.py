"""Chunked DDTS in torch operations, with a hand-written backward: training and prefill where
Triton does not run.

The forward is the chunked form of ``reference.py``. The backward recomputes the decays of the chunk
from the inputs, walks the state gradient backwards over the chunks, and sends the gate gradient
down the same dyadic tree that the forward climbed: these are sums only, so even with a log-decay of
-20 per step the gradient does not cancel. Both work in place, one chunk at a time, on tensors that
fit in a processor's cache. Saved beyond the inputs: one state ``[K, V]`` per chunk of 64 tokens.
"""

import torch

from .. import reference
from .._schemas import EAGER_CHUNK, refuse_forward_mode, register_gradient


def forward(
    q, k, v, log_decay, *, scale, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """``ddts`` by chunks; the contract is that of :func:`rodimus_kernels.ddts`."""
    refuse_forward_mode("ddts")
    if cu_seqlens is not None and (output_final_state or initial_state is not None):
        return reference.each_document(
            lambda *piece, **states: forward(*piece, scale=scale, **states),
            q,
            k,
            v,
            log_decay,
            initial_state,
            output_final_state,
            cu_seqlens,
        )
    if cu_seqlens is not None:
        log_decay = reference.reset_at_starts(log_decay, cu_seqlens)
    inputs = (q, k, v, log_decay, initial_state)
    save_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final_state, _ = torch.ops.rodimus.ddts_eager(
        q, k, v, log_decay, scale, initial_state, save_states
    )
    return o, (final_state if output_final_state else None)


@reference.outside_autocast
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
    with reference.no_autocast(q.device):
        o, *states = _chunked_forward(q, k, v, log_decay, scale, initial_state, save_states)
    # the fake promises contiguous outputs, and torch.compile relies on it
    return o.contiguous(), *states


@torch.library.impl("rodimus::ddts_eager_backward", "CompositeExplicitAutograd")
def _backward(q, k, v, log_decay, scale, states, do, dfinal_state):
    with reference.no_autocast(q.device):
        grads = _chunked_backward(q, k, v, log_decay, scale, states, do, dfinal_state)
    return tuple(x.contiguous() for x in grads)


def _chunked_forward(q, k, v, log_decay, scale, initial_state, save_states):
    dtype = reference.accumulation_dtype(q, k, v, log_decay)
    qc, kc, vc, gc = _chunks(dtype, q.to(dtype) * scale, k, v, log_decay)
    levels, grow, shrink, keep = reference.chunk_decays(gc)
    scores = reference.chunk_scores(qc, kc, levels)
    read, write = qc * grow, (kc * shrink).mT

    rows, chunks, _, key_dim, value_dim = *qc.shape, vc.shape[-1]
    state = qc.new_zeros(rows, key_dim, value_dim)
    if initial_state is not None:
        state.copy_(initial_state.flatten(0, 1))
    states = state.new_empty(rows, chunks if save_states else 0, key_dim, value_dim)
    o = torch.empty_like(vc)
    for n in range(chunks):
        if save_states:
            states[:, n] = state
        torch.bmm(read[:, n], state, out=o[:, n])
        o[:, n].baddbmm_(scores[:, n], vc[:, n])
        state.mul_(keep[:, n, :, None]).baddbmm_(write[:, n], vc[:, n])
    sequences = q.shape[0], q.shape[2]
    o = reference.from_chunks(o.unflatten(0, sequences), q.shape[1])
    return o.to(v.dtype), state.unflatten(0, sequences), states.unflatten(0, sequences)


def _chunks(dtype, *tensors):
    """``[B, T, H, X]`` to ``[B * H, NT, C, X]``: views if there is one head."""
    return (reference.to_chunks(x.to(dtype), EAGER_CHUNK).flatten(0, 1) for x in tensors)


def _chunked_backward(q, k, v, log_decay, scale, states, do, dfinal_state):
    dtype = states.dtype
    qc, kc, vc, gc, doc = _chunks(dtype, q.to(dtype) * scale, k, v, log_decay, do)
    levels, grow, shrink, keep = reference.chunk_decays(gc)
    scores = reference.chunk_scores(qc, kc, levels).mT
    read, write = (qc * grow).mT, kc * shrink

    # The state gradient walks backwards: at chunk n it is the gradient of the state after it.
    states = states.flatten(0, 1)
    dstate = torch.zeros_like(states[:, 0])
    if dfinal_state is not None:
        dstate.copy_(dfinal_state.flatten(0, 1))
    dv, dscores, dtotal = torch.empty_like(vc), torch.empty_like(scores), torch.empty_like(keep)
    dread, dwrite = torch.empty_like(qc), torch.empty_like(kc)
    for n in reversed(range(states.shape[1])):
        torch.bmm(write[:, n], dstate, out=dv[:, n])
        dv[:, n].baddbmm_(scores[:, n], doc[:, n])
        torch.bmm(doc[:, n], vc[:, n].mT, out=dscores[:, n])
        torch.bmm(doc[:, n], states[:, n].mT, out=dread[:, n])
        torch.bmm(vc[:, n], dstate.mT, out=dwrite[:, n])
        torch.sum(states[:, n] * dstate, -1, out=dtotal[:, n])
        dstate.mul_(keep[:, n, :, None]).baddbmm_(read[:, n], doc[:, n])

    # The diagonal of the scores does not depend on the gates.
    diagonal = dscores.diagonal(dim1=-2, dim2=-1)[..., None]
    through_prefix, through_suffix = dread.mul_(grow), dwrite.mul_(shrink)
    dprefix, dsuffix = qc * through_prefix, kc * through_suffix
    dq, dk = through_prefix.addcmul_(diagonal, kc), through_suffix.addcmul_(diagonal, qc)
    dtotal = (keep * dtotal)[..., None, :]
    for level, (grow, shrink) in reversed(list(enumerate(levels))):
        dtotal = _split_total(dprefix, dsuffix, dtotal, level)
        odd_q, even_k = reference.odd_blocks(qc, level), reference.even_blocks(kc, level)
        dcorner = reference.corners(dscores, level)
        through_prefix = _product(dcorner, even_k * shrink).mul_(grow)
        through_suffix = _product(dcorner.mT, odd_q * grow).mul_(shrink)
        reference.odd_blocks(dq, level).add_(through_prefix)
        reference.even_blocks(dk, level).add_(through_suffix)
        reference.odd_blocks(dprefix, level).addcmul_(odd_q, through_prefix)
        reference.even_blocks(dsuffix, level).addcmul_(even_k, through_suffix)
    dlog_decay = dprefix.add_(dtotal)

    sequences = q.shape[0], q.shape[2]
    grads = (
        reference.from_chunks(dx.unflatten(0, sequences), x.shape[1]).to(x.dtype)
        for dx, x in ((dq.mul_(scale), q), (dk, k), (dv, v), (dlog_decay, log_decay))
    )
    return *grads, dstate.unflatten(0, sequences)


def _product(a, b):
    """``a @ b``; torch is slow at products of very small matrices."""
    return a @ b if a.shape[-1] > 2 else (a[..., None] * b[..., None, :, :]).sum(-2)


def _split_total(dprefix, dsuffix, dtotal, level):
    """Gradient of the block sums one level down: ``[..., C / 2h, K]`` to ``[..., C / h, K]``.

    An even block's sum is part of the prefixes of the odd block after it, an odd block's sum is
    part of the suffixes of the even block before it, and both are part of the sum of the pair.
    """
    odd_prefix = reference.odd_blocks(dprefix, level).sum(-2)
    even_suffix = reference.even_blocks(dsuffix, level).sum(-2)
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


register_gradient("ddts_eager", _autograd, _setup_context)
