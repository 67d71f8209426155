"""A few tokens against the ring cache with the library of ``csrc/``: the window is read once."""

import torch

from .. import native


def step(q, k, v, cache, position, *, window_size, scale):
    """``shared_key_attention_step``; all tensors except ``position`` and a ring of bytes are
    float32, or all are bfloat16."""
    ring = None if cache.dtype == torch.uint8 else cache
    native.check("shared_key_attention_step", q, k, v, ring, one_dtype=True)
    rows = (x.contiguous() for x in (q, k, v))
    return torch.ops.rodimus.native_shared_key_attention_step(
        *rows, cache, position, window_size, scale
    )
