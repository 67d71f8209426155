"""Sliding-window shared-key attention through flash-attn, if that is installed: version 4
(``flash_attn.cute``) for the GPUs and head sizes where it has forward and backward, else version 2
(``flash_attn``).

Both need as many key heads as value heads: one key head is expanded with stride 0, never copied.
"""

import importlib.metadata

import torch

from .. import reference

_missing = []


def _import(name, distribution):
    """The module of this distribution, or None. The name alone is not enough: flash-attn 2 has an
    early flash_attn.cute with other parameters, and with flash-attn 4 alone flash_attn is a folder
    without functions."""
    try:
        importlib.metadata.version(distribution)
        return importlib.import_module(name)
    except ImportError as error:
        _missing.append(str(error))
        return None


_version_4 = _import("flash_attn.cute", "flash-attn-4")
_version_2 = _import("flash_attn", "flash-attn")
_HELP = f"pip install flash-attn-4, or flash-attn for version 2: {'; '.join(_missing)}"
if _version_4 is None and _version_2 is None:
    raise ImportError(f"flash_attn is not installed ({_HELP})")


def forward(q, k, v, *, window_size, scale, cu_seqlens=None):
    """``shared_key_attention`` by flash-attn; the contract is that of
    :func:`rodimus_kernels.shared_key_attention`.

    Raises:
        ValueError: v is not float16 or bfloat16, or D and Dv differ.
        ImportError: version 4 does not take this head size on this device, and version 2 is not
            installed.
    """
    if v.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v.shape[-1]:
        raise ValueError(
            "shared_key_attention(impl='flash'): expected float16 or bfloat16 and D = Dv,"
            f" got {v.dtype}, D = {q.shape[-1]}, Dv = {v.shape[-1]}"
        )
    library = _choose(_capability(v.device), v.shape[-1])
    length, heads, keys = *q.shape[1:3], k.shape[1]
    q, k = q.to(v.dtype), k.to(v.dtype)
    # flash-attn gives query head i the key head i // (H / Hk), so keys are expanded to all H heads
    k, v = (reference.expand_heads(x, heads).transpose(1, 2) for x in (k, v))
    # its window counts the keys before the query; no limit is None in version 4, -1 in version 2
    every = None if library is _version_4 else -1
    window = (every if window_size is None else window_size - 1, 0)
    options = {"softmax_scale": scale, "causal": True, "window_size": window}
    if cu_seqlens is None:
        return _output(library.flash_attn_func(q, k, v, **options))
    bounds = cu_seqlens.to(torch.int32).contiguous()
    # the queries are at the last keys' positions; a document that ends before them has no queries
    options["cu_seqlens_q"] = (bounds - (keys - length)).clamp_min(0)
    options["cu_seqlens_k"] = bounds
    if library is _version_2:
        # the host does not know the longest document; the number of all tokens bounds it, as
        # version 4 assumes
        options.update(max_seqlen_q=length, max_seqlen_k=keys)
    return _output(library.flash_attn_varlen_func(q[0], k[0], v[0], **options))[None]


def _output(result):
    """Version 4 returns ``(o, lse)``, version 2 o alone."""
    return result[0] if isinstance(result, tuple) else result


def _capability(device):
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _choose(major, dim):
    """The library for a device of this compute capability and heads of ``dim`` channels. Version 4
    takes 256 channels on Blackwell too, but without a window in the backward pass."""
    most = {9: 256, 10: 128, 11: 128}.get(major, 0)
    if _version_4 is not None and dim <= most and dim % 8 == 0:
        return _version_4
    if _version_2 is None:
        where = f"compute capability {major}" if major else "no GPU"
        raise ImportError(f"flash-attn 4 does not take D = {dim} on {where} ({_HELP})")
    return _version_2
