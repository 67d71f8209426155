"""Schemas and fakes of the torch.library namespace ``rodimus``, before any backend is loaded.

An implementation registers its kernels and autograd formula on these names in its own file. Kept
apart so that a schema is readable in one place, and torch.compile, selective checkpointing and the
native library can name an operator without importing its implementation.
"""

import torch

torch.library.define(
    "rodimus::ddts_eager",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial_state,"
    " bool save_states)"
    " -> (Tensor o, Tensor final_state, Tensor states)",
)
torch.library.define(
    "rodimus::ddts_eager_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor states, Tensor do,"
    " Tensor? dfinal_state)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_state)",
)

EAGER_CHUNK = 64


def state_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Dtype of a recurrent state: float32, and float64 when any input is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.register_fake("rodimus::ddts_eager")
def _(q, k, v, log_decay, scale, initial_state, save_states):
    batch, length, heads, key_dim = q.shape
    dtype = state_dtype(q, k, v, log_decay)
    chunks = (length + EAGER_CHUNK - 1) // EAGER_CHUNK if save_states else 0
    state_shape = (key_dim, v.shape[-1])
    return (
        q.new_empty(v.shape, dtype=v.dtype),
        q.new_empty((batch, heads, *state_shape), dtype=dtype),
        q.new_empty((batch, heads, chunks, *state_shape), dtype=dtype),
    )


@torch.library.register_fake("rodimus::ddts_eager_backward")
def _(q, k, v, log_decay, scale, states, do, dfinal_state):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        log_decay.new_empty(log_decay.shape),
        states.new_empty((*states.shape[:2], *states.shape[3:])),
    )
