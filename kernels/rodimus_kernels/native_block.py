"""One token through a block by the library of ``csrc/``: one call instead of dozens."""

import torch

from . import native


def step(
    stream,
    weights,
    taps,
    state,
    ring,
    position,
    rotary,
    *,
    window_size,
    head_dim,
    key_eps,
    norm_eps,
):
    """:func:`rodimus_kernels.block_step`, for up to eight rows on a CPU."""
    given = [x for x in weights if x is not None]
    native.check("block_step", stream, *given, taps, state, ring)
    if not 1 <= stream.shape[0] <= native.MAX_ROWS:
        raise ValueError(
            f"block_step(impl='native') takes 1 to {native.MAX_ROWS} rows, got {stream.shape[0]}"
        )
    cos, sin = (None, None) if rotary is None else rotary
    return torch.ops.rodimus.native_block_step(
        *(stream, given, taps, state, ring, position, cos, sin),
        *(window_size or 0, head_dim or 0, key_eps, norm_eps),
    )
