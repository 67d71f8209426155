"""Sliding-window shared-key attention through torch's scaled_dot_product_attention: one band of
queries at a time, or a few tokens against the ring cache.

A band of queries sees its own keys and one window before them, so memory and time grow with T *
window and never with T * T. One key head is expanded with stride 0, never copied.
"""

import itertools

import torch
import torch.nn.functional as F

from .. import reference

# Shorter bands waste the kernel's tiles; in longer ones most of the scores are masked.
_MIN_BAND, _MAX_BAND = 128, 1024

# torch's kernel on a CPU cuts a band into tiles: with a window of 129, bands of 129 took 1.3 times
# as long as bands of 192, forward and backward.
_TILE = 64


def forward(q, k, v, *, window_size, scale, cu_seqlens=None):
    """``shared_key_attention`` in bands; the contract is that of
    :func:`rodimus_kernels.shared_key_attention`."""
    queries, heads = q.shape[1], q.shape[2]
    window = k.shape[1] if window_size is None else min(window_size, k.shape[1])
    # keys before the first query's window are seen by no query
    unseen = max(k.shape[1] - queries - window + 1, 0)
    documents = None
    if cu_seqlens is not None:
        documents = reference.document_ids(cu_seqlens, k.shape[1])[unseen:]
    k, v = (reference.expand_heads(x[:, unseen:].to(v.dtype), heads) for x in (k, v))
    q = q.to(v.dtype).transpose(1, 2)
    with reference.no_autocast(q.device):
        o = _attend(q, k, v, window, scale, documents)
    return o.transpose(1, 2)


def step(q, k, v, cache, position, *, window_size, scale):
    """``shared_key_attention_step``; the rows of the ring are read in their order in memory, as a
    softmax does not depend on the order of its keys. The contract is that of
    :func:`rodimus_kernels.shared_key_attention_step`."""
    batch, steps, key_heads, dim = k.shape
    ring = cache.shape[1]
    new = position[:, None] + torch.arange(steps, device=q.device)
    shape = (key_heads, dim, *v.shape[2:], k.dtype)
    index = (torch.arange(batch, device=q.device)[:, None], new % ring)
    reference.write_ring(reference.ring_parts(cache, *shape), index, k, v)

    last = new[:, -1:]
    may_look = reference.can_read_values(last)
    if may_look and batch:
        # drop the rows that no sequence has reached yet
        cache = cache[:, : int(last.max()) + 1]
    # row r holds the newest position p <= last with p % R = r; if p is negative, it is still empty
    held = last - (last - torch.arange(cache.shape[1], device=q.device)) % ring
    age = new[:, :, None] - held[:, None, :]
    visible = (held[:, None, :] >= 0) & (age >= 0) & (age < window_size)
    # 8-bit values times their scales have more bits than bfloat16 holds
    dtype = (
        torch.promote_types(k.dtype, torch.float32) if cache.dtype == torch.uint8 else cache.dtype
    )
    keys, values = reference.read_ring(reference.ring_parts(cache, *shape), dtype)
    if not may_look or (held < 0).any():
        # an empty row can hold anything, and zero times NaN is NaN
        keys, values = (x.masked_fill((held < 0)[..., None, None], 0) for x in (keys, values))
    keys, values = (reference.expand_heads(x, q.shape[2]) for x in (keys, values))
    q = q.to(dtype).transpose(1, 2)
    with reference.no_autocast(q.device):
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible[:, None], scale=scale)
    return o.transpose(1, 2).to(v.dtype)


def _attend(q, k, v, window, scale, documents):
    """``[B, H, T, Dv]`` from ``[B, H, T, D]`` and the S keys that some query sees."""
    queries, keys = q.shape[2], k.shape[2]
    if documents is None and queries == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if documents is None and queries == keys and window >= keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    band = min(-(-max(window, _MIN_BAND) // _TILE) * _TILE, _MAX_BAND)
    # the keys before the first query, then one piece per band. Joining pieces instead of slicing
    # keeps the backward linear in T: the gradient of a slice is as long as all keys
    pieces = [
        [x[:, :, : keys - queries], *x[:, :, keys - queries :].split(band, 2)] for x in (k, v)
    ]
    edges = [0, *itertools.accumulate(piece.shape[2] for piece in pieces[0])]
    outputs = []
    for n, q_band in enumerate(q.split(band, 2), start=1):
        first, last = edges[n], edges[n + 1]
        low = max(first - window + 1, 0)
        begin = sum(edge <= low for edge in edges) - 1
        k_band, v_band = (
            torch.cat(x[begin : n + 1], 2)[:, :, low - edges[begin] :] for x in pieces
        )
        mask = _band_mask(first, last, low, window, documents, q.device)
        outputs.append(
            F.scaled_dot_product_attention(q_band, k_band, v_band, attn_mask=mask, scale=scale)
        )
    return torch.cat(outputs, dim=2)


def _band_mask(first, last, low, window, documents, device):
    """Which keys low..last the queries first..last see in their window and document: bool
    ``[queries, keys]``."""
    i = torch.arange(first, last, device=device)[:, None]
    j = torch.arange(low, last, device=device)
    visible = (j <= i) & (j > i - window)
    if documents is not None:
        visible &= documents[first:last, None] == documents[low:last]
    return visible
