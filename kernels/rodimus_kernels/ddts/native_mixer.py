"""One token of the mixer with the library of ``csrc/``: between the projections, only the state and
the result are written to memory."""

import torch

from .. import native


def mixer_step(
    q,
    k,
    select,
    temper,
    gate_hidden,
    x,
    shifted,
    gate,
    state,
    *,
    gate_weight,
    gate_bias,
    residual_weight,
    norm_weight,
    scale,
    key_eps,
    norm_eps,
):
    """``ddts_mixer_step``; the contract is that of :func:`rodimus_kernels.ddts_mixer_step`, in
    float32 and bfloat16."""
    rows = (q, k, select, temper, gate_hidden, x, shifted, gate)
    weights = (gate_weight, gate_bias, residual_weight, norm_weight)
    native.check("ddts_mixer_step", *rows, state, *weights)
    rows, weights = map(native.dense_rows, rows), map(native.dense_rows, weights)
    return torch.ops.rodimus.native_ddts_mixer_step(
        *rows, state, *weights, scale, key_eps, norm_eps
    )
