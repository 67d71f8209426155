"""Sliding-window shared-key attention through torch's scaled_dot_product_attention, one band of
queries at a time.

A band of window-sized queries sees at most two windows of keys, so memory and time grow with T *
window and never with T * T. The key heads are expanded with stride 0 where there is one of them,
never copied.
"""

import torch
import torch.nn.functional as F

from .. import reference

# Bands shorter than this waste the kernel's tiles; longer ones waste masked work.
_MIN_BAND = 128


def forward(q, k, v, *, window_size, scale, cu_seqlens=None):
    """``shared_key_attention`` in bands; the contract is that of
    :func:`rodimus_kernels.shared_key_attention`."""
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q = q.transpose(1, 2)
    k, v = _expand_heads(k, heads).to(v.dtype), _expand_heads(v, heads)
    documents = None if cu_seqlens is None else reference.document_ids(cu_seqlens, keys)
    window = keys if window_size is None else min(window_size, keys)
    band = max(window, _MIN_BAND)
    outputs = []
    for start in range(0, queries, band):
        stop = min(start + band, queries)
        first, last = start + keys - queries, stop + keys - queries
        low = max(first - window + 1, 0)
        mask = _band_mask(first, last, low, window, documents, q.device)
        outputs.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop].to(v.dtype),
                k[:, :, low:last],
                v[:, :, low:last],
                attn_mask=mask,
                scale=scale,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _expand_heads(x, heads):
    """``[B, S, Hx, D]`` to ``[B, H, S, D]``: head i reads head i % Hx."""
    x = x.transpose(1, 2)
    if x.shape[1] == heads:
        return x
    repeated = x[:, None].expand(-1, heads // x.shape[1], -1, -1, -1)
    return repeated.flatten(1, 2) if x.shape[1] > 1 else repeated[:, :, 0]


def _band_mask(first, last, low, window, documents, device):
    """Positions first..last see low..last inside the window and their document: bool ``[queries,
    keys]``."""
    i = torch.arange(first, last, device=device)[:, None]
    j = torch.arange(low, last, device=device)
    visible = (j <= i) & (j > i - window)
    if documents is not None:
        visible &= documents[first:last, None] == documents[low:last]
    return visible
