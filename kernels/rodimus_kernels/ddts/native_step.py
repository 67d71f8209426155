"""One token of DDTS with the library of ``csrc/``: the state is read and written once."""

import torch

from .. import native


def step(q, k, v, log_decay, state, *, scale):
    """``ddts_step``; the contract is that of :func:`rodimus_kernels.ddts_step`, in float32 and
    bfloat16."""
    native.check("ddts_step", q, k, v, log_decay, state)
    rows = (x.contiguous() for x in (q, k, v, log_decay))
    return torch.ops.rodimus.native_ddts_step(*rows, state, scale)
