"""Context parallelism: every rank of a group computes one piece of the same rows.

The recurrence needs no ring: a piece changes the incoming state only by its total decay and its own
final state, so one all-gather of these per layer gives every rank its initial state. The
convolution and the attention window look back a fixed number of tokens, which the preceding ranks
send. Logits and gradients equal those of one rank, also with packed documents. Source: Rodimus*
(arXiv 2410.06577), section 3.

    context = Context(group, position_ids)          # of the whole rows, on every rank
    out = model(input_ids=context.piece(ids), shift_labels=context.piece(labels),
                num_items_in_batch=predicted, context=context)

``out.loss`` is then this piece's part of the loss, and the parameters' gradients must be summed
over the group. All ranks must make the same calls; each exchange is one collective, or a message to
each rank that the window reaches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig

from rodimus_kernels import ddts, ddts_scan, ddts_summary, shared_key_attention
from rodimus_kernels.reference import RESET

from .. import RodimusConfig
from ..attention import boundaries_of
from ..errors import InputError
from .config import TrainConfig
from .rows import Batch


class Context:
    """One rank's piece of some rows, and the exchanges that bring what it needs from other ranks.

    Args:
        group: Ranks that share the rows, in the order of their pieces.
        position_ids: int64 ``[B or 1, T]`` of the whole rows: rotary positions, on the device that
            computes. A position that does not follow its predecessor starts a packed document.
        is_packed: Whether there is such a position. None checks, and the host waits for the device.

    Raises:
        ValueError: the rows do not divide over the ranks.
    """

    def __init__(
        self, group: dist.ProcessGroup, position_ids: torch.Tensor, is_packed: bool | None = None
    ) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.length, rest = divmod(position_ids.shape[1], self.size)
        if rest:
            raise ValueError(
                f"rows of {position_ids.shape[1]} tokens do not divide over {self.size} ranks"
            )
        self.position_ids = self.piece(position_ids)
        jumps = position_ids.diff(dim=1) != 1
        self.starts = F.pad(jumps, (1, 0), value=True)
        self.is_packed = bool(jumps.any()) if is_packed is None else is_packed

    def piece(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens ``[B, T / ranks, ...]`` of whole rows ``[B, T, ...]``."""
        return x.narrow(1, self.rank * self.length, self.length).contiguous()

    def _starts_of(self, tokens: int) -> torch.Tensor:
        """True where a document starts, in this piece and the ``tokens`` tokens before it."""
        return self.starts.narrow(1, self.rank * self.length - tokens, tokens + self.length)

    @torch.compiler.disable
    def extend(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """x ``[B, T / ranks, D]`` preceded by the ``tokens`` tokens before it, or as many as there
        are; differentiable."""
        return _Extend.apply(x, self, tokens)

    def convolve(self, conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """A causal convolution of width W over x ``[B, T / ranks, D]``: looks W - 1 tokens back."""
        x = self.extend(x, conv.kernel_size[0] - 1)
        documents = None
        if self.is_packed:
            documents = self._starts_of(x.shape[1] - self.length).cumsum(1)
            documents = documents.expand(x.shape[0], -1)
        return conv(x, documents=documents)[:, -self.length :]

    def recur(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor
    ) -> torch.Tensor:
        """:func:`rodimus_kernels.ddts` over the whole rows: this piece's output ``[B, T / ranks, H,
        V]``."""
        if self.is_packed:
            # RESET erases the state of the preceding documents
            log_decay = log_decay.masked_fill(self._starts_of(0)[..., None, None], RESET)
        state = self._state_before(*ddts_summary(k, v, log_decay))
        return ddts(q, k, v, log_decay, initial_state=state)[0]

    @torch.compiler.disable
    def _state_before(self, state, log_decay):
        return _StateBefore.apply(state, log_decay, self)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        window_size: int | None,
        scale: float,
    ) -> torch.Tensor:
        """:func:`rodimus_kernels.shared_key_attention` over the whole rows: this piece's output
        ``[B, T / ranks, H, Dv]``. One window of earlier keys and values is fetched, from as many
        ranks as it spans."""
        reach = self.size * self.length if window_size is None else window_size
        shapes = k.shape[2:], v.shape[2:]
        both = self.extend(torch.cat((k.flatten(2), v.flatten(2)), dim=-1), reach - 1)
        k, v = both.split([shape.numel() for shape in shapes], dim=-1)
        k, v = (x.unflatten(-1, shape) for x, shape in zip((k, v), shapes, strict=True))
        options = {"window_size": window_size, "scale": scale}
        if not self.is_packed:
            return shared_key_attention(q, k, v, **options)
        # the part of the first document that is in reach counts as its start
        starts = F.pad(self._starts_of(k.shape[1] - self.length)[:, 1:], (1, 0), value=True)
        starts = starts.expand(q.shape[0], -1)
        # attend row by row, because document boundaries differ between rows
        rows = [
            shared_key_attention(*(x[b : b + 1] for x in (q, k, v)), cu_seqlens=bounds, **options)
            for b, bounds in enumerate(map(boundaries_of, starts))
        ]
        return torch.cat(rows)


def check_splits(config: TrainConfig, model: PreTrainedConfig) -> None:
    """Refuses context parallelism for a model that does not support it.

    Raises:
        InputError: the model is a peer, or has attention dropout.
    """
    if config.parallel.context_parallel == 1:
        return
    if not isinstance(model, RodimusConfig):
        raise InputError(f"parallel.context_parallel is for Rodimus, not for {model.model_type}")
    if model.attention_dropout:
        raise InputError(
            "parallel.context_parallel has no dropout of attention weights, got "
            f"attention_dropout = {model.attention_dropout}"
        )


def model_inputs(
    batch: Batch, group: dist.ProcessGroup | None, *, is_packed: bool
) -> dict[str, Any]:
    """The model's arguments for a batch of whole rows: the rows, or with a group this rank's piece
    of them. ``is_packed`` is ``batch.is_packed()``, called before the batch went to a device."""
    if group is None:
        inputs = dict(zip(("input_ids", "shift_labels", "position_ids"), batch, strict=True))
        return inputs | {"is_packed": is_packed}
    context = Context(group, batch.position_ids, is_packed)
    ids, labels = context.piece(batch.input_ids), context.piece(batch.labels)
    return {"input_ids": ids, "shift_labels": labels, "context": context}


class _StateBefore(torch.autograd.Function):
    """The state before this piece, from the final states of all pieces; backward scans reversed."""

    @staticmethod
    def forward(ctx, state, log_decay, context):
        mine = torch.cat((state, log_decay[..., None]), dim=-1)
        states, log_decays = _gather(mine, context).split((state.shape[-1], 1), dim=-1)
        log_decays = log_decays[..., 0]
        before = ddts_scan(states, log_decays)[context.rank]
        ctx.context = context
        ctx.save_for_backward(before, log_decays)
        return before

    @staticmethod
    @once_differentiable
    def backward(ctx, dbefore):
        before, log_decays = ctx.saved_tensors
        dstates = ddts_scan(_gather(dbefore, ctx.context), log_decays, reverse=True)
        dstate = dstates[ctx.context.rank]
        keep = log_decays[ctx.context.rank].exp()
        return dstate, keep * (before * dstate).sum(-1), None


def _gather(x, context):
    """Every rank's x: ``[ranks, *x.shape]``."""
    whole = x.new_empty((context.size, *x.shape))
    dist.all_gather_into_tensor(whole.flatten(0, 1), x.contiguous(), group=context.group)
    return whole


class _Extend(torch.autograd.Function):
    """Prepends tokens of preceding ranks; backward sends their gradients back to those ranks."""

    @staticmethod
    def forward(ctx, x, context, tokens):
        ctx.context, ctx.tokens = context, tokens
        reach = _reach(context, tokens)
        mine = {context.rank + hop: x[:, -count:] for hop, count in reach}
        theirs = {
            context.rank - hop: x.new_empty((x.shape[0], count, *x.shape[2:]))
            for hop, count in reach
        }
        theirs = _exchange(mine, theirs, context)
        return torch.cat([*(theirs[rank] for rank in sorted(theirs)), x], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        context, reach = ctx.context, _reach(ctx.context, ctx.tokens)
        dx = dy[:, -context.length :].clone()
        home, end = {}, dy.shape[1] - context.length
        for hop, count in reach:
            home[context.rank - hop] = dy[:, max(end - count, 0) : end]
            end -= count
        theirs = {
            context.rank + hop: dy.new_empty((dy.shape[0], count, *dy.shape[2:]))
            for hop, count in reach
        }
        for _, part in sorted(_exchange(home, theirs, context).items()):
            dx[:, -part.shape[1] :] += part
        return dx, None, None


def _reach(context, tokens):
    """``(hop, count)``: a piece takes the last ``count`` tokens of the ``hop``-th piece before."""
    hops = range(1, min(context.size, -(-tokens // context.length) + 1))
    return [(hop, min(context.length, tokens - (hop - 1) * context.length)) for hop in hops]


def _exchange(mine, theirs, context):
    """Sends ``mine`` and fills ``theirs``, both keyed by rank in the group; ranks that do not exist
    are skipped."""
    ranks = range(context.size)
    mine = {rank: x.contiguous() for rank, x in mine.items() if rank in ranks}
    theirs = {rank: x for rank, x in theirs.items() if rank in ranks}
    peer = {rank: dist.get_global_rank(context.group, rank) for rank in (*mine, *theirs)}
    messages = [dist.P2POp(dist.isend, x, peer[rank], context.group) for rank, x in mine.items()]
    messages += [dist.P2POp(dist.irecv, x, peer[rank], context.group) for rank, x in theirs.items()]
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return theirs
