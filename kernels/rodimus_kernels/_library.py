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
torch.library.define(
    "rodimus::ddts_chunk",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial_state,"
    " Tensor? resets, Tensor? cu_seqlens, bool save_states)"
    " -> (Tensor o, Tensor final_state, Tensor states)",
)
torch.library.define(
    "rodimus::ddts_chunk_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? resets,"
    " Tensor? cu_seqlens, Tensor states, Tensor do, Tensor? dfinal_state)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_state)",
)

EAGER_CHUNK = 64
TRITON_CHUNK = 64
TRITON_KEY_DIMS = (16, 32, 64, 128, 256)


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


def chunk_columns(batch: int, length: int, cu_seqlens: torch.Tensor | None) -> int:
    """Chunks of the Triton form; packed documents with states of their own get an upper bound."""
    if cu_seqlens is None:
        return batch * ((length + TRITON_CHUNK - 1) // TRITON_CHUNK)
    return length // TRITON_CHUNK + cu_seqlens.shape[0] - 1


def tile_dtype(v: torch.Tensor) -> torch.dtype:
    """Operand dtype of the Triton products: float16 goes through tf32, which keeps its 11 bits and
    the range of float32 for the state."""
    return torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32


@torch.library.register_fake("rodimus::ddts_chunk")
def _(q, k, v, log_decay, scale, initial_state, resets, cu_seqlens, save_states):
    batch, length, heads, key_dim = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    columns = chunk_columns(batch, length, cu_seqlens) if save_states else 0
    return (
        v.new_empty(v.shape),
        v.new_empty((sequences, heads, key_dim, v.shape[-1]), dtype=torch.float32),
        v.new_empty((heads, columns, v.shape[-1], key_dim), dtype=tile_dtype(v)),
    )


@torch.library.register_fake("rodimus::ddts_chunk_backward")
def _(q, k, v, log_decay, scale, resets, cu_seqlens, states, do, dfinal_state):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    return (
        *(x.new_empty(x.shape) for x in (q, k, v, log_decay)),
        q.new_empty(state_shape, dtype=torch.float32),
    )


torch.library.define(
    "rodimus::shared_key_attention",
    "(Tensor q, Tensor k, Tensor v, SymInt? window_size, float scale, Tensor? cu_seqlens)"
    " -> (Tensor o, Tensor lse)",
)
torch.library.define(
    "rodimus::shared_key_attention_backward",
    "(Tensor q, Tensor k, Tensor v, SymInt? window_size, float scale, Tensor? cu_seqlens, Tensor o,"
    " Tensor lse, Tensor do) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.register_fake("rodimus::shared_key_attention")
def _(q, k, v, window_size, scale, cu_seqlens):
    batch, queries, heads, _ = q.shape
    return (
        v.new_empty((batch, queries, heads, v.shape[-1])),
        q.new_empty((batch, heads, queries), dtype=torch.float32),
    )


@torch.library.register_fake("rodimus::shared_key_attention_backward")
def _(q, k, v, window_size, scale, cu_seqlens, o, lse, do):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))
