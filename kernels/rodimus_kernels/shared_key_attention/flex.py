"""Sliding-window shared-key attention through torch's FlexAttention.

The blocks that a query block touches are computed, not searched: T / 128 times S / 128 flags. One
key head is expanded with stride 0, never copied. On a GPU it is compiled; on a CPU it is the slow
form that materialises scores, without gradients.
"""

import functools

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .. import reference

_BLOCK = 128


def forward(q, k, v, *, window_size, scale, cu_seqlens=None):
    """``shared_key_attention`` by FlexAttention; the contract is that of
    :func:`rodimus_kernels.shared_key_attention`.

    Raises:
        ValueError: a gradient is asked for on the CPU.
    """
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("shared_key_attention(impl='flex') has no gradient on the CPU")
    heads, dtype = q.shape[2], v.dtype
    k, v = (reference.expand_heads(x.to(dtype), heads) for x in (k, v))
    mask = block_mask(q.shape[1], k.shape[2], window_size, cu_seqlens, q.device)
    attend = _compiled() if q.is_cuda else flex_attention
    with reference.no_autocast(q.device):
        o = attend(q.to(dtype).transpose(1, 2), k, v, block_mask=mask, scale=scale)
    return o.transpose(1, 2)


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=False)


def block_mask(queries, keys, window_size, cu_seqlens, device) -> BlockMask:
    """Which key blocks a query block touches, and which it sees whole."""
    window = keys if window_size is None else window_size
    position = torch.arange(keys, device=device)
    first = (position - window + 1).clamp_min(0)
    if cu_seqlens is not None:
        document = reference.document_ids(cu_seqlens, keys)
        starts = reference.document_starts(cu_seqlens, keys)
        first = torch.maximum(first, torch.where(starts, position, 0).cummax(0).values)
    offset = keys - queries

    def visible(batch, head, query, key):
        i = query + offset
        seen = (key <= i) & (key > i - window)
        return seen if cu_seqlens is None else seen & (document[i] == document[key])

    low = torch.arange(offset, keys, _BLOCK, device=device)
    high = (low + _BLOCK - 1).clamp_max(keys - 1)
    start = torch.arange(0, keys, _BLOCK, device=device)[None]
    end = start + _BLOCK - 1
    # the first visible key rises with the query, so the corners of a block decide for all of it
    touched = (end >= first[low, None]) & (start <= high[:, None])
    whole = (start >= first[high, None]) & (end <= low[:, None])
    return BlockMask.from_kv_blocks(
        *_listed(touched & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(queries, keys),
    )


def _listed(flags):
    """Counts and indices of the flagged blocks of each row, ``[1, 1, rows]`` and ``[1, 1, rows,
    columns]``."""
    order = torch.argsort(flags.int(), dim=-1, descending=True, stable=True)
    return flags.sum(-1).int()[None, None], order.int()[None, None]
