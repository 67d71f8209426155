"""Public functions of DDTS (data-dependent tempered selection), their checks and the one
dispatch."""

import torch

from .. import native
from .._dispatch import (
    check_floating,
    check_same_device,
    check_shape,
    check_vectors,
    choose_compiled,
    load,
    mark_written,
    query_scale,
    runs_triton,
)
from .._schemas import TRITON_KEY_DIMS, is_transformed
from ..reference import accumulation_dtype, check_cu_seqlens

_SEQUENCE = {
    "reference": "rodimus_kernels.reference:ddts",
    "eager": "rodimus_kernels.ddts.eager:forward",
    "triton_chunk": "rodimus_kernels.ddts.triton_chunk:forward",
    "triton_recurrent": "rodimus_kernels.ddts.triton_recurrent:forward",
}
_STEP = {
    "reference": "rodimus_kernels.reference:ddts_step",
    "eager": "rodimus_kernels.ddts.eager:step",
    "native": "rodimus_kernels.ddts.native_step:step",
    "triton": "rodimus_kernels.ddts.triton_recurrent:step",
}
_GATES = {
    "reference": "rodimus_kernels.reference:ddts_gates",
    "triton": "rodimus_kernels.ddts.triton_gates:gates",
}
IMPLS = tuple(_SEQUENCE)

# Below this many tokens the token loop beats a padded chunk of 64 on a CPU.
_SHORT = 8

# Counted in machine code, not timed (K = 64, V = 4096, bfloat16, sm_90, Triton 3.9): a row takes
# 129,000 warp instructions per token in the recurrent kernel, and 164,000 for up to 64 tokens in
# the chunked ones. Recurrent pays off while most of a GPU is idle: up to 4 rows of 64 programs take
# the time of one row, and the latency of the two chunked kernels is estimated as that of 32 tokens.
_RECURRENT_ROWS, _RECURRENT_TOKENS = 4, 128

# Longest sequence that goes to the recurrent form if the chunked one lacks its shape (not timed).
_ONE_CHUNK = 64


def ddts_gates(
    k: torch.Tensor,
    select: torch.Tensor,
    temper: torch.Tensor,
    *,
    eps: float = 1e-12,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tempered selection gates: what is written and what survives, from raw projections.

        log_decay = -softplus(select) * sigmoid(temper)
        k         = k / max(|k|, eps) * softplus(select) ** sigmoid(temper)

    Rodimus* (arXiv 2410.06577), section 3.1. In float32 both results are finite for
    pre-activations of any size up to 1e38. Their gradients are finite up to 1e36, if incoming
    gradients are at most 1 and keys have a norm of at least 1: beyond that, the derivative of the
    written key with respect to temper overflows before a saturated sigmoid makes it small.

    Args:
        k: Raw keys ``[..., K]``; float of any width.
        select: Pre-activation of the selection gate, shaped like ``k``.
        temper: Pre-activation of the temperature gate, shaped like ``k``.
        eps: Lower bound of the key norm; the released configurations use 1e-5 or 1e-12.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; an explicit choice never falls back.

    Returns:
        ``(k, log_decay)``: both shaped like ``k``, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or devices differ, a tensor is not floating point, or ``impl`` is
            unknown.
    """
    check_vectors("k", k, "K")
    check_shape("select", select, tuple(k.shape))
    check_shape("temper", temper, tuple(k.shape))
    check_floating(k=k, select=select, temper=temper)
    check_same_device("k", k, select=select, temper=temper)
    if impl == "auto":
        double = torch.float64 in (k.dtype, select.dtype, temper.dtype)
        impl = "triton" if runs_triton(k.device) and not double else "reference"
    return load("ddts_gates", impl, _GATES)(k, select, temper, eps=eps)


def ddts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Linear attention with a data-dependent decay per key channel: the sequence form,
    differentiable.

        S_t = exp(log_decay_t)[:, None] * S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    Rodimus* (arXiv 2410.06577), section 3.1. The state is kept in float32 for every input dtype.

    Args:
        q: Queries ``[B, T, H, K]``; float32, bfloat16, float16 or float64.
        k: Keys shaped like ``q``, gates already applied.
        v: Values ``[B, T, H, V]``.
        log_decay: Natural log of the decay, shaped like ``q``, entries <= 0.
        scale: Query scale. Default ``K ** -0.5``.
        initial_state: ``[N, H, K, V]``; N = B, or the number of packed documents. Default zeros.
        output_final_state: Return the state after the last token of each sequence.
        cu_seqlens: int ``[N + 1]`` boundaries of packed documents, rising from 0 to T; requires B
            = 1. The values are checked only on a CPU and outside ``torch.compile``: on a GPU a
            check would stall the stream, and a compiler has no values to read. Elsewhere the caller
            must make sure that they are right: with others, results are wrong or cut short.
        impl: ``"auto"``, ``"triton_chunk"``, ``"triton_recurrent"``, ``"eager"`` or
            ``"reference"``; an explicit choice never falls back.

    Returns:
        ``(o, final_state)``: ``o`` is ``[B, T, H, V]`` in ``v.dtype``; ``final_state`` is float32
        (float64 for float64 inputs) ``[N, H, K, V]`` or None. Always a pair.

    Raises:
        ValueError: a shape, dtype or device breaks the contract, or T = 0.
        ImportError: the chosen implementation cannot be loaded.
    """
    check_shape("q", q, ("B", "T", "H", "K"))
    batch, length, heads, key_dim = q.shape
    check_shape("k", k, (batch, length, heads, key_dim))
    check_shape("v", v, (batch, length, heads, "V"))
    check_shape("log_decay", log_decay, (batch, length, heads, key_dim))
    check_floating(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)
    others = {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    check_same_device("q", q, k=k, v=v, log_decay=log_decay, **others)
    if length == 0:
        raise ValueError("ddts needs at least one token, got T = 0")
    scale = query_scale(scale, key_dim)
    sequences = check_cu_seqlens(cu_seqlens, batch, length)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (sequences, heads, key_dim, v.shape[-1]))
    if impl == "auto":
        impl = choose_sequence(q, k, v, log_decay, initial_state)
    function = load("ddts", impl, _SEQUENCE)
    return function(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def choose_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor | None
) -> str:
    """What ``impl="auto"`` of :func:`ddts` means for these tensors."""
    if is_transformed():
        return "reference"
    given = [x for x in (q, k, v, *others) if x is not None]
    double = any(x.dtype == torch.float64 for x in given)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    # descriptors of tensors without elements cannot be made on a GPU
    triton = runs_triton(q.device) and not double and q.shape[0] > 0
    rows = q.shape[0] * q.shape[2]
    return _choose(triton, needs_grad, rows, q.shape[1], q.shape[-1], v.shape[-1], v.dtype)


def _choose(
    triton: bool,
    needs_grad: bool,
    rows: int,
    length: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
) -> str:
    """What ``impl="auto"`` means for a device, with or without gradients, and a shape."""
    # the registers cannot hold a state of 256 channels with its float32 operands
    spills = key_dim == 256 and dtype == torch.float32
    chunked = triton and key_dim in TRITON_KEY_DIMS and value_dim % 16 == 0 and not spills
    short = max(rows, _RECURRENT_ROWS) * length <= _RECURRENT_TOKENS
    if triton and not needs_grad and (short if chunked else length <= _ONE_CHUNK):
        return "triton_recurrent"
    if chunked:
        return "triton_chunk"
    return "eager" if length > _SHORT else "reference"


def ddts_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """One token of :func:`ddts`; ``state`` is updated in place. Not differentiable.

    Args:
        q: Query ``[B, H, K]``; k and log_decay are shaped like it.
        k: Key, gates already applied.
        v: Value ``[B, H, V]``.
        log_decay: Natural log of the decay, entries <= 0.
        state: ``[B, H, K, V]``, float32 (float64 for float64 inputs), contiguous; overwritten.
        scale: Query scale. Default ``K ** -0.5``.
        impl: ``"auto"``, ``"native"``, ``"triton"``, ``"eager"`` or ``"reference"``; an explicit
            choice never falls back.

    Returns:
        ``[B, H, V]`` in ``v.dtype``.

    Raises:
        ValueError: a shape, dtype, device or stride breaks the contract.
    """
    check_shape("q", q, ("B", "H", "K"))
    batch, heads, key_dim = q.shape
    check_shape("k", k, (batch, heads, key_dim))
    check_shape("v", v, (batch, heads, "V"))
    check_shape("log_decay", log_decay, (batch, heads, key_dim))
    check_shape("state", state, (batch, heads, key_dim, v.shape[-1]))
    check_floating(q=q, k=k, v=v, log_decay=log_decay)
    check_same_device("q", q, k=k, v=v, log_decay=log_decay, state=state)
    expected = accumulation_dtype(q, k, v, log_decay)
    if state.dtype != expected or not state.is_contiguous():
        layout = "contiguous" if state.is_contiguous() else f"strides {state.stride()}"
        raise ValueError(f"state must be contiguous {expected}, got {layout} {state.dtype}")
    scale = query_scale(scale, key_dim)
    with torch.no_grad():
        if impl == "auto":
            if runs_triton(q.device) and state.dtype != torch.float64:
                impl = "triton"
            else:
                fits = q.device.type == "cpu" or key_dim <= native.MAX_CUDA_KEYS
                tensors = (q, k, v, log_decay, state)
                impl = choose_compiled("eager", *tensors) if fits else "eager"
        o = load("ddts_step", impl, _STEP)(q, k, v, log_decay, state, scale=scale)
    mark_written(state)
    return o


__all__ = ["IMPLS", "ddts", "ddts_gates", "ddts_step"]
