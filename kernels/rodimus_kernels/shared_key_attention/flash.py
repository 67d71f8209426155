"""Sliding-window shared-key attention through flash-attn, where that is installed.

flash-attn wants as many key as value heads: one key head is expanded with stride 0, never copied.
"""

import torch

from .heads import expand_heads

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError as error:
    raise ImportError("flash_attn is not installed (pip install flash-attn)") from error


def forward(q, k, v, *, window_size, scale, cu_seqlens=None):
    """``shared_key_attention`` by flash-attn; the contract is that of
    :func:`rodimus_kernels.shared_key_attention`.

    Raises:
        ValueError: v is not float16 or bfloat16, or D and Dv differ.
    """
    if v.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v.shape[-1]:
        raise ValueError(
            "shared_key_attention(impl='flash'): expected float16 or bfloat16 and D = Dv,"
            f" got {v.dtype}, D = {q.shape[-1]}, Dv = {v.shape[-1]}"
        )
    length, heads, keys = *q.shape[1:3], k.shape[1]
    q, k = q.to(v.dtype), k.to(v.dtype)
    # flash-attn gives query head i the key head i // (H / Hk): all H are spelled out
    k, v = (expand_heads(x, heads).transpose(1, 2) for x in (k, v))
    # it counts the keys before the query, and -1 is all of them
    window = (-1 if window_size is None else window_size - 1, 0)
    options = {"softmax_scale": scale, "causal": True, "window_size": window}
    if cu_seqlens is None:
        return flash_attn_func(q, k, v, **options)
    bounds = cu_seqlens.to(torch.int32)
    # the queries are the last of the keys: of a document that ends before them there is none
    q_bounds = (bounds - (keys - length)).clamp_min(0)
    # the longest document is not known on the host; all tokens bound it
    o = flash_attn_varlen_func(
        *(q[0], k[0], v[0], q_bounds, bounds, length, keys),
        **options,
    )
    return o[None]
