"""Schemas and fakes of the torch.library namespace ``rodimus``, before any backend is loaded.

An implementation registers its kernels and autograd formula on these names in its own file. They
are kept apart so that all schemas can be read in one place, and torch.compile, selective
checkpointing and the native library can name an operator without importing its implementation.
"""

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .reference import accumulation_dtype

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
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? temper, float eps, float scale,"
    " Tensor? initial_state, Tensor? resets, Tensor? cu_seqlens, bool save_states)"
    " -> (Tensor o, Tensor final_state, Tensor states)",
)
torch.library.define(
    "rodimus::ddts_chunk_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? temper, float eps, float scale,"
    " Tensor? resets, Tensor? cu_seqlens, Tensor states, Tensor do, Tensor? dfinal_state)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dtemper,"
    " Tensor dinitial_state)",
)


def refuse_second_derivative(backward: Callable) -> Callable:
    """Wrap a backward so that differentiating its results raises RuntimeError. torch's
    ``once_differentiable`` treats them as constants if all incoming gradients are constants, as
    after a plain sum, although they depend on the saved tensors."""
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def refusing(ctx, *grads):
        if torch.is_grad_enabled():
            grads = [x if x is None else x.detach().requires_grad_() for x in grads]
        return once(ctx, *grads)

    return refusing


def register_gradient(operator: str, backward: Callable, setup_context: Callable) -> None:
    """Register the gradient of ``rodimus::operator``, with the arguments of
    ``torch.library.register_autograd``. A second derivative raises RuntimeError: the backward
    operators have no gradient, and torch would treat their results as constants."""
    torch.library.register_autograd(
        f"rodimus::{operator}", refuse_second_derivative(backward), setup_context=setup_context
    )


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active (``torch.func.jvp`` and everything built on
    it, ``forward_ad.dual_level``). Operators of ``torch.library`` would silently drop the tangents,
    and under other transforms a tensor does not show whether it has a tangent."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether forward-mode differentiation or a transform of ``torch.func`` is active: the
    gradients of operators of ``torch.library`` support neither."""
    return in_forward_mode() or torch._C._functorch.maybe_current_level() is not None


def refuse_forward_mode(operator: str) -> None:
    """Raise ValueError if forward-mode differentiation is active."""
    if in_forward_mode():
        raise ValueError(
            f"{operator}: this implementation has no forward-mode derivative;"
            " expected impl='reference' or 'auto'"
        )


EAGER_CHUNK = 64
TRITON_CHUNK = 64
TRITON_KEY_DIMS = (16, 32, 64, 128, 256)
# a row of a norm is one block of registers
TRITON_NORM_WIDTH = 16384


@torch.library.register_fake("rodimus::ddts_eager")
def _(q, k, v, log_decay, scale, initial_state, save_states):
    batch, length, heads, key_dim = q.shape
    dtype = accumulation_dtype(q, k, v, log_decay)
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
    """Number of chunks in the Triton form; for packed documents with states, an upper bound."""
    if cu_seqlens is None:
        return batch * ((length + TRITON_CHUNK - 1) // TRITON_CHUNK)
    return length // TRITON_CHUNK + cu_seqlens.shape[0] - 1


def tile_dtype(v: torch.Tensor) -> torch.dtype:
    """Operand dtype of the Triton products: float16 goes through tf32, which keeps its 11 bits and
    gives the state the range of float32."""
    return torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32


@torch.library.register_fake("rodimus::ddts_chunk")
def _(q, k, v, log_decay, temper, eps, scale, initial_state, resets, cu_seqlens, save_states):
    batch, length, heads, key_dim = q.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    columns = chunk_columns(batch, length, cu_seqlens) if save_states else 0
    return (
        v.new_empty(v.shape),
        v.new_empty((sequences, heads, key_dim, v.shape[-1]), dtype=torch.float32),
        v.new_empty((heads, columns, v.shape[-1], key_dim), dtype=tile_dtype(v)),
    )


@torch.library.register_fake("rodimus::ddts_chunk_backward")
def _(q, k, v, log_decay, temper, eps, scale, resets, cu_seqlens, states, do, dfinal_state):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    return (
        *(x.new_empty(x.shape) for x in (q, k, v, log_decay)),
        v.new_empty(0) if temper is None else temper.new_empty(temper.shape),
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


torch.library.define("rodimus::rms_norm_rows", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.define(
    "rodimus::add_rms_norm_rows",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor stream)",
)
torch.library.define(
    "rodimus::rms_norm_rows_backward",
    "(Tensor stream, Tensor weight, float eps, Tensor dy, Tensor? dstream, ScalarType? branch)"
    " -> (Tensor dx, Tensor dweight, Tensor dbranch)",
)
torch.library.define(
    "rodimus::gated_rms_norm_rows",
    "(Tensor x, Tensor gate, Tensor weight, float eps, Tensor? residual, Tensor? residual_weight)"
    " -> Tensor",
)
torch.library.define(
    "rodimus::gated_rms_norm_rows_backward",
    "(Tensor x, Tensor gate, Tensor weight, float eps, Tensor? residual, Tensor? residual_weight,"
    " Tensor dy)"
    " -> (Tensor dx, Tensor dgate, Tensor dweight, Tensor dresidual, Tensor dresidual_weight)",
)


@torch.library.register_fake("rodimus::rms_norm_rows")
def _(x, weight, eps):
    return x.new_empty(x.shape, dtype=weight.dtype)


@torch.library.register_fake("rodimus::add_rms_norm_rows")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape, dtype=weight.dtype), residual.new_empty(residual.shape)


@torch.library.register_fake("rodimus::rms_norm_rows_backward")
def _(stream, weight, eps, dy, dstream, branch):
    dbranch = stream.new_empty(0 if branch is None else stream.shape, dtype=branch)
    return stream.new_empty(stream.shape), weight.new_empty(weight.shape), dbranch


@torch.library.register_fake("rodimus::gated_rms_norm_rows")
def _(x, gate, weight, eps, residual, residual_weight):
    return x.new_empty(x.shape)


@torch.library.register_fake("rodimus::gated_rms_norm_rows_backward")
def _(x, gate, weight, eps, residual, residual_weight, dy):
    given = (x, gate, weight, residual, residual_weight)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


torch.library.define(
    "rodimus::short_conv",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens,"
    " Tensor? seq_idx) -> Tensor",
)
torch.library.define(
    "rodimus::short_conv_backward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens,"
    " Tensor? seq_idx, Tensor dy)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)",
)


@torch.library.register_fake("rodimus::short_conv")
def _(x, weight, bias, initial_state, cu_seqlens, seq_idx):
    return x.new_empty(x.shape)


@torch.library.register_fake("rodimus::short_conv_backward")
def _(x, weight, bias, initial_state, cu_seqlens, seq_idx, dy):
    given = (x, weight, bias, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


torch.library.define(
    "rodimus::ddts_gates",
    "(Tensor k, Tensor select, Tensor temper, float eps) -> (Tensor written, Tensor log_decay)",
)
torch.library.define(
    "rodimus::ddts_gates_backward",
    "(Tensor k, Tensor select, Tensor temper, float eps, Tensor dwritten, Tensor dlog_decay)"
    " -> (Tensor dk, Tensor dselect, Tensor dtemper)",
)
torch.library.define(
    "rodimus::ddts_recurrent",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial_state,"
    " Tensor? cu_seqlens) -> (Tensor o, Tensor final_state)",
)
torch.library.define(
    "rodimus::ddts_recurrent_step",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, float scale) -> Tensor",
)


@torch.library.register_fake("rodimus::ddts_gates")
def _(k, select, temper, eps):
    return tuple(k.new_empty(k.shape, dtype=torch.float32) for _ in range(2))


@torch.library.register_fake("rodimus::ddts_gates_backward")
def _(k, select, temper, eps, dwritten, dlog_decay):
    return tuple(x.new_empty(x.shape) for x in (k, select, temper))


@torch.library.register_fake("rodimus::ddts_recurrent")
def _(q, k, v, log_decay, scale, initial_state, cu_seqlens):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    return v.new_empty(v.shape), v.new_empty(state_shape, dtype=torch.float32)


@torch.library.register_fake("rodimus::ddts_recurrent_step")
def _(q, k, v, log_decay, state, scale):
    return v.new_empty(v.shape)


torch.library.define("rodimus::rope", "(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor")


@torch.library.register_fake("rodimus::rope")
def _(x, cos, sin, inverse):
    return x.new_empty(x.shape)


torch.library.define(
    "rodimus::ring_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, Tensor position, int window_size,"
    " float scale) -> Tensor",
)


@torch.library.register_fake("rodimus::ring_attention")
def _(q, k, v, cache, position, window_size, scale):
    return v.new_empty((*q.shape[:3], v.shape[-1]))


torch.library.define(
    "rodimus::input_gate", "(Tensor x, Tensor hidden, Tensor weight, Tensor bias) -> Tensor"
)
torch.library.define(
    "rodimus::input_gate_backward",
    "(Tensor x, Tensor hidden, Tensor weight, Tensor bias, Tensor dy)"
    " -> (Tensor dx, Tensor dhidden, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("rodimus::input_gate")
def _(x, hidden, weight, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("rodimus::input_gate_backward")
def _(x, hidden, weight, bias, dy):
    return tuple(t.new_empty(t.shape) for t in (x, hidden, weight, bias))


torch.library.define("rodimus::swiglu", "(Tensor projection) -> Tensor")
torch.library.define("rodimus::swiglu_backward", "(Tensor projection, Tensor dy) -> Tensor")


@torch.library.register_fake("rodimus::swiglu")
def _(projection):
    return projection.new_empty((*projection.shape[:-1], projection.shape[-1] // 2))


@torch.library.register_fake("rodimus::swiglu_backward")
def _(projection, dy):
    return projection.new_empty(projection.shape)


torch.library.define(
    "rodimus::cross_entropy_rows",
    "(Tensor(a!) logits, Tensor labels, float z_loss, int ignore_index, bool write_gradient)"
    " -> Tensor",
)


@torch.library.register_fake("rodimus::cross_entropy_rows")
def _(logits, labels, z_loss, ignore_index, write_gradient):
    return logits.new_empty((logits.shape[0], 2), dtype=torch.float32)
