"""The mathematics of Rodimus and Rodimus+ in plain torch, in reading order.

Gates, the recurrence, shared-key attention, short convolution, norms, loss. Every function here is
the definition that the other implementations are tested against: it runs on any device in any
dtype up to float64, is differentiable, and is written to be read. It imports torch alone, so an
exported checkpoint carries this file and needs nothing else.

Symbols of the paper (Rodimus*, arXiv 2410.06577, section 3) beside ours, for one head, one token:

    paper                                     here
    q_t, k_t, v_t                             q, k, v
    S_t, n x m                                state [K, V]      K = mem_size, V = d_inner
    g_t = softplus(x_t W_g + b_g)             softplus(select)  selection gate
    tau_t = sigmoid(x_t W_tau + b_tau)        sigmoid(temper)   temperature gate
    alpha_t = exp(-g_t * tau_t)               exp(log_decay)    how much of the state survives
    alpha^hat_t = g_t ** tau_t                folded into k     how much is written
    beta^hat_t = sigmoid(x_t W_1 W_2 + b)     folded into v     input gate, applied by the model
    S_t = (alpha_t^T 1) * S_{t-1} + k_t^T v_t ddts              the recurrence
    o_t = q_t S_t / sqrt(n)                   ddts              scale = K ** -0.5

Dimensions: B batch, T time, S keys in time, H heads, K state key, V state value, D head dim,
C chunk, W convolution width, N packed documents.
"""

import contextlib
import functools
import itertools
from types import EllipsisType

import torch
import torch.nn.functional as F

# A log-decay that erases any state, and still sums over a chunk without overflow in fp32.
RESET = -1e30


def accumulation_dtype(*tensors):
    """float64 if any input is float64, else float32: nothing is computed below single precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def can_read_values(x):
    """Whether a check may read a tensor's values: only a plain CPU tensor's, and not while a CUDA
    graph is captured, because a replay would not repeat the check. On a GPU reading would stall the
    stream; fake tensors and those of ``torch.compile`` and transforms have no values to read."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or _is_graph_recorded():
        return False
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _is_graph_recorded():
    try:
        return torch.cuda.is_current_stream_capturing()
    except RuntimeError:
        # torch was built without CUDA
        return False


def no_autocast(device):
    """Context that computes in the tensors' own dtypes: autocast would round products to half
    precision. The meta device has no autocast."""
    # torch.compile in torch 2.11 cannot trace the question whether a device has autocast
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def outside_autocast(function):
    """Run under :func:`no_autocast` of the first argument's device."""

    @functools.wraps(function)
    def wrapper(x, *args, **kwargs):
        with no_autocast(x.device):
            return function(x, *args, **kwargs)

    return wrapper


# ----------------------------------------------------------------------------------------------
# Gates
# ----------------------------------------------------------------------------------------------


def softplus(x):
    """ln(1 + e^x), exact for any x (``F.softplus`` returns x above 20)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def log_softplus(x):
    """ln ln(1 + e^x), finite with finite gradients where softplus underflows.

    Below -20, ln(1 + e^x) = e^x (1 - e^x / 2 + ...), so its logarithm is x - e^x / 2 to 1e-17.
    """
    far = x < -20
    near_value = softplus(torch.where(far, torch.zeros_like(x), x)).log()
    far_value = x - 0.5 * torch.where(far, x, torch.zeros_like(x)).exp()
    return torch.where(far, far_value, near_value)


@outside_autocast
def ddts_gates(k, select, temper, *, eps=1e-12):
    """Tempered selection: the written key and the decay, from raw projections (paper section 3.1).

        log_decay = -softplus(select) * sigmoid(temper)
        k         = k / max(|k|, eps) * softplus(select) ** sigmoid(temper)

    Args:
        k, select, temper: raw projections ``[..., K]``.
        eps: lower bound of the norm that divides k.

    Returns:
        ``(k, log_decay)``, both ``[..., K]`` in float32 (float64 for float64 inputs).
    """
    dtype = accumulation_dtype(k, select, temper)
    k, select, temper = k.to(dtype), select.to(dtype), temper.to(dtype)
    tau = temper.sigmoid()
    log_decay = -softplus(select) * tau
    written = torch.exp(tau * log_softplus(select))
    return F.normalize(k, dim=-1, eps=eps) * written, log_decay


@outside_autocast
def input_gate(x, hidden, weight, bias):
    """The part of x that may enter the state: ``x * sigmoid(hidden weight^T + bias)``.

    Args:
        x: ``[..., D]``. hidden: ``[..., R]``. weight: ``[D, R]``. bias: ``[D]``.

    Returns:
        ``[..., D]`` in x's dtype.
    """
    dtype = accumulation_dtype(x, hidden, weight, bias)
    gate = F.linear(hidden.to(dtype), weight.to(dtype), bias.to(dtype)).sigmoid()
    return (x.to(dtype) * gate).to(x.dtype)


def swiglu(projection):
    """Gated activation of the MLP, ``silu(gate) * x``.

    Args:
        projection: x, then gate, in one tensor ``[..., 2 D]``.

    Returns:
        ``[..., D]`` in the projection's dtype.
    """
    x, gate = projection.to(accumulation_dtype(projection)).chunk(2, dim=-1)
    return (F.silu(gate) * x).to(projection.dtype)


# ----------------------------------------------------------------------------------------------
# DDTS: the recurrence, one token at a time and one chunk at a time
# ----------------------------------------------------------------------------------------------


@outside_autocast
def ddts(
    q,
    k,
    v,
    log_decay,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    compute_dtype=None,
):
    """Token by token: the definition.

        S_t = exp(log_decay_t)[:, None] * S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    Args:
        q, k, log_decay: ``[B, T, H, K]``. v: ``[B, T, H, V]``.
        scale: default ``K ** -0.5``.
        initial_state: ``[N, H, K, V]``; N = B, or the number of packed documents. Default zeros.
        cu_seqlens: ``[N + 1]`` boundaries of packed documents; requires B = 1.
        compute_dtype: dtype of the whole computation; default float32, float64 for float64 inputs.

    Returns:
        ``(o [B, T, H, V] in v's dtype, final_state [N, H, K, V] or None)``.
    """
    dtype = compute_dtype or accumulation_dtype(q, k, v, log_decay)
    if cu_seqlens is not None:
        one_document = functools.partial(ddts, scale=scale, compute_dtype=dtype)
        return each_document(
            one_document, q, k, v, log_decay, initial_state, output_final_state, cu_seqlens
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, _, heads, key_dim = q.shape
    state = q.new_zeros(batch, heads, key_dim, v.shape[-1], dtype=dtype)
    if initial_state is not None:
        state = state + initial_state.to(dtype)
    outputs = []
    for q_t, k_t, v_t, g_t in zip(
        *(x.to(dtype).unbind(1) for x in (q, k, v, log_decay)), strict=True
    ):
        state = g_t.exp()[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q_t, state))
    o = torch.stack(outputs, dim=1).to(v.dtype)
    return o, (state if output_final_state else None)


def each_document(function, q, k, v, log_decay, initial_state, output_final_state, cu_seqlens):
    """Run packed documents one by one, each from its own state; an empty one keeps its state."""
    outputs, finals = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        h0 = None if initial_state is None else initial_state[n : n + 1]
        if start == stop:
            empty = q.new_zeros(
                1, q.shape[2], q.shape[3], v.shape[3], dtype=accumulation_dtype(q, k, v)
            )
            finals.append(empty if h0 is None else h0.to(empty.dtype))
            continue
        piece = (x[:, start:stop] for x in (q, k, v, log_decay))
        o, final = function(*piece, initial_state=h0, output_final_state=True)
        outputs.append(o)
        finals.append(final)
    return torch.cat(outputs, dim=1), (torch.cat(finals) if output_final_state else None)


@outside_autocast
def ddts_step(q, k, v, log_decay, state, *, scale=None):
    """One token; ``state`` is written in place.

    Args:
        q, k, log_decay: ``[B, H, K]``. v: ``[B, H, V]``. state: ``[B, H, K, V]``.

    Returns:
        o ``[B, H, V]`` in v's dtype.
    """
    o, final_state = ddts(
        *(x.unsqueeze(1) for x in (q, k, v, log_decay)),
        scale=scale,
        initial_state=state,
        output_final_state=True,
    )
    state.copy_(final_state)
    return o.squeeze(1)


def ddts_scan(states, log_decays, *, reverse=False):
    """State before each segment of a sequence, from the state that each leaves starting from zero.

        before[0] = 0        before[s + 1] = exp(log_decays[s])[:, None] * before[s] + states[s]

    Args:
        states: ``[S, N, H, K, V]``. log_decays: total of each segment ``[S, N, H, K]``.
        reverse: from the last segment to the first.

    Returns:
        ``[S, N, H, K, V]`` in the dtype of ``states``.
    """
    dtype = accumulation_dtype(states, log_decays)
    before, state = [], torch.zeros_like(states[0], dtype=dtype)
    order = range(len(states))
    for s in reversed(order) if reverse else order:
        before.append(state)
        state = log_decays[s].to(dtype).exp()[..., None] * state + states[s]
    return torch.stack(before[::-1] if reverse else before).to(states.dtype)


@outside_autocast
def ddts_mixer_step(
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
    scale=None,
    key_eps=1e-12,
    norm_eps=1e-5,
):
    """One token of a mixer between its projections; ``state [B, 1, K, V]`` is written in place.

    Args:
        q, k, select, temper: raw projections ``[B, K]``. gate_hidden: ``[B, R]``, the hidden layer
            of the input gate. x, shifted, gate: ``[B, V]``.
        gate_weight: ``[V, R]``. gate_bias, residual_weight, norm_weight: ``[V]``.

    Returns:
        y ``[B, V]`` in x's dtype.
    """
    k, log_decay = ddts_gates(k, select, temper, eps=key_eps)
    v = input_gate(x, gate_hidden, gate_weight, gate_bias)
    o = ddts_step(*(t.unsqueeze(1) for t in (q, k, v, log_decay)), state, scale=scale)
    return gated_rms_norm(
        o.squeeze(1),
        gate,
        norm_weight,
        eps=norm_eps,
        residual=shifted,
        residual_weight=residual_weight,
    )


def gated_ddts(
    q,
    k,
    v,
    select,
    temper,
    *,
    eps=1e-12,
    scale=None,
    initial_state=None,
    output_final_state=False,
    starts=None,
):
    """:func:`ddts_gates` and :func:`ddts_chunk` in one, from raw projections ``[B, T, H, K]``.

    Args:
        starts: bool ``[B, T]`` or ``[1, T]``, True at the first token of each packed document.
    """
    k, log_decay = ddts_gates(k, select, temper, eps=eps)
    if starts is not None:
        log_decay = log_decay.masked_fill(starts[..., None, None], RESET)
    states = {"initial_state": initial_state, "output_final_state": output_final_state}
    return ddts_chunk(q, k, v, log_decay, scale=scale, **states)


def chunk_decays(log_decay):
    """The decays between the positions of a chunk, without a quotient that could overflow.

    For positions i > j of a chunk let l be the highest bit in which they differ and h = 2^l. Then
    j lies in an even block of h positions and i in the odd block after it, and

        exp(sum(log_decay[j+1 .. i])) = grow_l[i] shrink_l[j]

    with grow_l[i] the decay from the start of i's block to i, and shrink_l[j] the decay after j to
    the end of j's block. Each level of this dyadic tree multiplies them by the decay of a
    neighbouring block, which is the exponential of a sum of log-decays. All factors are <= 1, so
    nothing overflows, and nothing cancels.

    Args:
        log_decay: ``[..., C, K]``, C a power of two.

    Returns:
        ``(levels, grow, shrink, keep)``. ``levels[l]`` is (``grow_l`` of the odd blocks,
        ``shrink_l`` of the even blocks), each ``[..., C / 2h, h, K]``; ``grow`` and ``shrink`` are
        the same for the whole chunk, ``[..., C, K]``, and ``keep [..., K]`` is its total decay.
    """
    total, grow, shrink = log_decay, log_decay.exp().clone(), torch.ones_like(log_decay)
    levels = []
    while total.shape[-2] > 1:
        odd_grow, even_shrink = odd_blocks(grow, len(levels)), even_blocks(shrink, len(levels))
        levels.append((odd_grow.clone(), even_shrink.clone()))
        keep = total.exp()
        odd_grow *= even_blocks(keep, 0)
        even_shrink *= odd_blocks(keep, 0)
        total = total.unflatten(-2, (-1, 2)).sum(-2)
    return levels, grow, shrink, total.squeeze(-2).exp()


def even_blocks(x, level):
    """View of the even blocks of ``2^level`` rows: ``[..., C, X]`` to ``[..., C / 2h, h, X]``."""
    return x.unflatten(-2, (-1, 2, 1 << level))[..., 0, :, :]


def odd_blocks(x, level):
    """View of the odd blocks of ``2^level`` rows: ``[..., C, X]`` to ``[..., C / 2h, h, X]``."""
    return x.unflatten(-2, (-1, 2, 1 << level))[..., 1, :, :]


def corners(scores, level):
    """View of the scores between the blocks that meet at a level: ``[..., C, C]`` to ``[..., C /
    2h, h, h]``, the rows of each odd block and the columns of the even block before it."""
    blocks = scores.unflatten(-1, (-1, 2, 1 << level)).unflatten(-4, (-1, 2, 1 << level))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def chunk_scores(q, k, levels):
    """A[i, j] = sum_K q[i] k[j] exp(sum(log_decay[j+1 .. i])), 0 for i < j: ``[..., C, C]``."""
    scores = torch.diag_embed((q * k).sum(-1))
    for level, (grow, shrink) in enumerate(levels):
        read, write = odd_blocks(q, level) * grow, even_blocks(k, level) * shrink
        corners(scores, level).copy_(read @ write.transpose(-1, -2))
    return scores


def to_chunks(x, chunk):
    """``[B, T, H, X]`` to ``[B, H, NT, C, X]``, zero-padded: zeros change no state."""
    if x.shape[1] % chunk:
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)


def from_chunks(x, length):
    """The inverse of :func:`to_chunks`, cut to ``length`` tokens."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


@outside_autocast
def ddts_chunk(
    q,
    k,
    v,
    log_decay,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    chunk=64,
):
    """The same function as :func:`ddts`, C tokens at a time in matrix products.

    Inside a chunk, with P, Q the prefix and suffix sums of the chunk and A its decayed scores:

        o = A v + (q exp P) S        S' = exp(total) S + (k exp Q)^T v

    Packed documents are separated by a log-decay that erases the state at each first token.
    """
    if cu_seqlens is not None and (output_final_state or initial_state is not None):
        one_document = functools.partial(ddts_chunk, scale=scale, chunk=chunk)
        return each_document(
            one_document, q, k, v, log_decay, initial_state, output_final_state, cu_seqlens
        )
    if cu_seqlens is not None:
        log_decay = reset_at_starts(log_decay, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = accumulation_dtype(q, k, v, log_decay)
    qc, kc, vc, gc = (to_chunks(x.to(dtype), chunk) for x in (q, k, v, log_decay))
    qc = qc * scale
    levels, grow, shrink, keep = chunk_decays(gc)
    write = (kc * shrink).transpose(-1, -2)
    state = qc.new_zeros(*qc.shape[:2], qc.shape[-1], vc.shape[-1])
    if initial_state is not None:
        state = state + initial_state.to(dtype)
    states = []
    for n in range(qc.shape[2]):
        states.append(state)
        state = keep[:, :, n, :, None] * state + write[:, :, n] @ vc[:, :, n]
    o = (qc * grow) @ torch.stack(states, dim=2) + chunk_scores(qc, kc, levels) @ vc
    return from_chunks(o, q.shape[1]).to(v.dtype), (state if output_final_state else None)


# ----------------------------------------------------------------------------------------------
# Packed documents
# ----------------------------------------------------------------------------------------------


def check_cu_seqlens(cu_seqlens: torch.Tensor | None, batch: int, length: int) -> int:
    """Check the boundaries of packed documents and return how many sequences there are.

    Values are read only where :func:`can_read_values` allows it.
    """
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(f"cu_seqlens packs a batch of one row: expected B = 1, got B = {batch}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must be integers [N + 1] with N >= 1,"
            f" got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if can_read_values(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != length or bounds != sorted(bounds):
            shown = bounds if len(bounds) <= 16 else [*bounds[:8], "...", *bounds[-7:]]
            raise ValueError(f"cu_seqlens must rise from 0 to T = {length}, got {shown}")
    return cu_seqlens.shape[0] - 1


def document_starts(cu_seqlens, length):
    """True at the first token of each packed document: bool ``[T]``, without reading values on the
    host."""
    starts = torch.zeros(length + 1, dtype=torch.bool, device=cu_seqlens.device)
    return starts.index_fill(0, cu_seqlens[:-1].long(), True)[:length]


def reset_at_starts(log_decay, cu_seqlens):
    """log_decay ``[1, T, H, K]`` with a decay that erases the state at each document's first
    token."""
    starts = document_starts(cu_seqlens, log_decay.shape[1])
    return log_decay.masked_fill(starts[:, None, None], RESET)


def document_ids(cu_seqlens, length):
    """Index of the packed document of each token: int64 ``[T]``."""
    return torch.cumsum(document_starts(cu_seqlens, length), 0) - 1


# ----------------------------------------------------------------------------------------------
# Sliding-window shared-key attention (paper section 3.2)
# ----------------------------------------------------------------------------------------------


def rope_tables(
    position_ids: torch.Tensor,
    dim: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding.

    Angles are computed in fp32 and the tables rounded to ``dtype``, as the released models were
    trained.

    Args:
        position_ids: integers ``[..., T]``.
        dim: channels that are rotated, an even number.

    Returns:
        ``(cos, sin)``, each ``[..., T, dim // 2]`` in ``dtype``.
    """
    angles = position_ids[..., None] * _rope_frequencies(dim, base, position_ids)
    return angles.cos().to(dtype), angles.sin().to(dtype)


# cache for plain CPU tensors: computing these takes noticeable time in each token of a small model
_FREQUENCIES: dict[tuple[int, float], torch.Tensor] = {}


def _rope_frequencies(dim, base, position_ids):
    """Angle of each pair of channels at position 1: float32 ``[dim // 2]``."""
    is_kept = can_read_values(position_ids)
    if is_kept and (dim, base) in _FREQUENCIES:
        return _FREQUENCIES[dim, base]
    # a cached tensor must also be usable outside inference mode
    with torch.inference_mode(False) if is_kept else contextlib.nullcontext():
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / -dim
        frequencies = base**exponents
    if is_kept and can_read_values(frequencies):
        _FREQUENCIES[dim, base] = frequencies
    return frequencies


def rope(x, cos, sin):
    """Rotate the first ``2 * cos.shape[-1]`` channels of x ``[B, T, H, D]``; channel d pairs with
    d + dim / 2.

    Args:
        cos, sin: tables ``[B or 1, T, dim // 2]`` of :func:`rope_tables`.
    """
    half, dtype = cos.shape[-1], accumulation_dtype(x, cos)
    cos, sin = cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)
    a, b = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype)
    rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def visible_keys(queries, keys, window_size, *, cu_seqlens=None, device=None):
    """Which keys a query sees: bool ``[T, S]``. The queries are the last T of S positions.

    Query i sees keys j with ``i - window_size < j <= i`` of its own document; ``window_size=None``
    sees all.
    """
    j = torch.arange(keys, device=device)
    i = j[keys - queries :, None]
    visible = j <= i
    if window_size is not None:
        visible = visible & (j > i - window_size)
    if cu_seqlens is not None:
        document = document_ids(cu_seqlens, keys)
        visible = visible & (document == document[keys - queries :, None])
    return visible


def expand_heads(x, heads):
    """``[B, S, Hx, D]`` to ``[B, H, S, D]``, for attention functions with a single head count: head
    i reads head i % Hx. One head is expanded with stride 0, a few are copied."""
    x = x.transpose(1, 2)
    if x.shape[1] == 1:
        return x.expand(-1, heads, -1, -1)
    return x if x.shape[1] == heads else x.repeat(1, heads // x.shape[1], 1, 1)


@outside_autocast
def shared_key_attention(q, k, v, *, window_size=None, scale=None, cu_seqlens=None):
    """Causal attention with few key heads and many value heads, over a sliding window.

    Query head i uses key head ``i % Hk`` and value head ``i % Hv``.

    Args:
        q: ``[B, T, H, D]``. k: ``[B, S, Hk, D]``. v: ``[B, S, Hv, Dv]``; S >= T, the queries are
            the last T.
        window_size: visible keys, the query's own position included; None for all.
        scale: default ``D ** -0.5``.
        cu_seqlens: ``[N + 1]`` boundaries of packed documents among the keys; requires B = 1.

    Returns:
        ``[B, T, H, Dv]`` in v's dtype.
    """
    dtype = accumulation_dtype(q, k, v)
    heads = torch.arange(q.shape[2], device=q.device)
    k, v_wide = k[:, :, heads % k.shape[2]].to(dtype), v[:, :, heads % v.shape[2]].to(dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype) * scale, k)
    mask = visible_keys(q.shape[1], k.shape[1], window_size, cu_seqlens=cu_seqlens, device=q.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v_wide).to(v.dtype)


# Values of a window may be stored in one byte each: 127 steps on either side of zero, which suffice
# although the scale is rounded to nearest: amax / scale <= 127 * 257 / 256 < 127.5.
_STEPS = 127


def quantize_values(v):
    """Values in 8 bits, with one scale per token and head: ``v ~ values * scale``.

        scale = bfloat16(max |v| / 127)        values = round(v / scale), ties to even

    No value is off by more than half a scale, and the largest becomes 127 or -127. A head that
    holds NaN or infinity gets the scale NaN, so every query that attends to it gets NaN; a head
    whose scale is below 2 ** -126, the smallest normal number, becomes zeros with scale 0.

    Quantising the result of :func:`dequantize_values` in v's own dtype (float32, bfloat16, float16)
    gives the same bytes again. Rounding a product to that dtype moves it by less than 127 / 257 of
    a scale, so it keeps its step. The largest, ``127 * scale``, also gives the same scale again: in
    bfloat16 that fails only for a scale with the significand 1.5, and no bfloat16 value leads to
    such a scale.

    Args:
        v: ``[..., Hv, Dv]``, any floating dtype.

    Returns:
        ``(values, scales)``: int8 shaped like v and bfloat16 ``[..., Hv]``.
    """
    wide = v.to(torch.float32)
    largest = wide.abs().amax(-1)
    scale = largest * (1.0 / _STEPS)
    scale = scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 0.0)
    scale = scale.masked_fill(~largest.isfinite(), torch.nan).to(torch.bfloat16)
    usable = (scale > 0)[..., None]
    steps = wide / torch.where(usable, scale[..., None], 1.0).to(torch.float32)
    return torch.where(usable, steps, 0.0).round().to(torch.int8), scale


def dequantize_values(values, scales, dtype):
    """``values * scale`` of :func:`quantize_values`, rounded once to ``dtype``.

    Args:
        values: int8 ``[..., Hv, Dv]``. scales: bfloat16 ``[..., Hv]``.

    Returns:
        ``[..., Hv, Dv]``.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return (values.to(wide) * scales[..., None].to(wide)).to(dtype)


def int8_row_bytes(
    key_heads: int, dim: int, value_heads: int, value_dim: int, dtype: torch.dtype
) -> int:
    """Bytes per token in a window with 8-bit values: keys in ``dtype``, values, one bfloat16 scale
    per value head starting on an even byte, and padding to a multiple of 16."""
    scales_at = key_heads * dim * dtype.itemsize + value_heads * value_dim
    return -(-(scales_at + scales_at % 2 + 2 * value_heads) // 16) * 16


_RingParts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def ring_parts(
    cache: torch.Tensor,
    key_heads: int,
    dim: int,
    value_heads: int,
    value_dim: int,
    dtype: torch.dtype,
) -> _RingParts:
    """Views of the parts of a ring: keys, values, and the scales of the values or None.

    A floating-point ring has rows ``[keys | values]``. A ring of bytes has 8-bit values: rows of
    :func:`int8_row_bytes` with the keys in ``dtype``, then int8 values, then bfloat16 scales.

    Args:
        cache: ``[..., row]``; a ring of bytes, uint8, has dense rows that start on 16 bytes.
        key_heads, dim, value_heads, value_dim: Hk, D, Hv and Dv.
        dtype: that of the keys in a ring of bytes.

    Returns:
        ``(keys [..., Hk, D], values [..., Hv, Dv], scales [..., Hv] or None)``: in the ring's
        dtype, or for a ring of bytes in ``dtype``, int8 and bfloat16.
    """
    key_row, value_row = key_heads * dim, value_heads * value_dim
    keys_shape, values_shape = (key_heads, dim), (value_heads, value_dim)
    if cache.dtype != torch.uint8:
        keys, values = cache.split((key_row, value_row), dim=-1)
        return keys.unflatten(-1, keys_shape), values.unflatten(-1, values_shape), None
    values_at = key_row * dtype.itemsize
    scales_at = values_at + value_row + (values_at + value_row) % 2
    keys = cache[..., :values_at].view(dtype).unflatten(-1, keys_shape)
    values = cache[..., values_at : values_at + value_row].view(torch.int8)
    scales = cache[..., scales_at : scales_at + 2 * value_heads].view(torch.bfloat16)
    return keys, values.unflatten(-1, values_shape), scales


def write_ring(
    parts: _RingParts, index: tuple | EllipsisType, k: torch.Tensor, v: torch.Tensor
) -> None:
    """Write keys and values into rows of a ring, rounded to the ring's dtypes.

    Args:
        parts: result of :func:`ring_parts`; written in place.
        index: index into the parts that selects the rows ``[...]``.
        k: ``[..., Hk, D]``. v: ``[..., Hv, Dv]``.
    """
    keys, values, scales = parts
    keys[index] = k.to(keys.dtype)
    if scales is None:
        values[index] = v.to(values.dtype)
    else:
        values[index], scales[index] = quantize_values(v)


def read_ring(parts: _RingParts, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[..., Hk, D]`` and values ``[..., Hv, Dv]`` of :func:`ring_parts` in ``dtype``."""
    keys, values, scales = parts
    if scales is not None:
        values = dequantize_values(values, scales, dtype)
    return keys.to(dtype), values.to(dtype)


@outside_autocast
def shared_key_attention_step(q, k, v, cache, position, *, window_size, scale=None):
    """A few new tokens against a ring cache; the cache is written in place.

    Token p of a sequence lives in row ``p % R`` of its ring as ``[keys of Hk heads | values of Hv
    heads]``. A ring of bytes holds all values, also those of the new tokens, in 8 bits.

    Args:
        q: ``[B, T, H, D]``. k: ``[B, T, Hk, D]``, both after rotary embedding. v: ``[B, T, Hv,
            Dv]``.
        cache: ``[B, R, Hk * D + Hv * Dv]``, or uint8 ``[B, R, int8_row_bytes]`` with keys in the
            dtype of k; R >= window_size + T - 1.
        position: int64 ``[B]``, tokens already in each sequence.
        window_size: visible keys, the query's own position included.

    Returns:
        ``[B, T, H, Dv]`` in v's dtype.
    """
    batch, steps, key_heads, dim = k.shape
    ring = cache.shape[1]
    new_positions = position[:, None] + torch.arange(steps, device=q.device)
    parts = ring_parts(cache, key_heads, dim, *v.shape[2:], k.dtype)
    write_ring(parts, (torch.arange(batch, device=q.device)[:, None], new_positions % ring), k, v)

    # Row r holds the newest position p <= last with p % R = r; if p is negative, it is still empty.
    last = new_positions[:, -1:]
    held = last - (last - torch.arange(ring, device=q.device)) % ring
    age = new_positions[:, :, None] - held[:, None, :]
    visible = (held[:, None, :] >= 0) & (age >= 0) & (age < window_size)

    dtype = accumulation_dtype(q, k, v)
    keys, values = read_ring(parts, dtype)
    heads = torch.arange(q.shape[2], device=q.device)
    scale = dim**-0.5 if scale is None else scale
    scores = torch.einsum("bthd,brhd->bhtr", q.to(dtype) * scale, keys[:, :, heads % key_heads])
    # An empty row can hold anything: it is masked in the scores and zeroed in the values.
    values = values.masked_fill((held < 0)[:, :, None, None], 0)[:, :, heads % v.shape[2]]
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhtr,brhd->bthd", weights, values).to(v.dtype)


# ----------------------------------------------------------------------------------------------
# Short convolution
# ----------------------------------------------------------------------------------------------


def short_conv(
    x,
    weight,
    bias=None,
    *,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    seq_idx=None,
):
    """Causal depthwise convolution over time with silu: y_t = silu(bias + sum_w weight[w] x_{t - W
    + 1 + w}).

    Args:
        x: ``[B, T, D]``. weight: ``[D, W]``, the last tap on the current token. bias: ``[D]`` or
            None.
        initial_state: the W inputs before x, oldest first, ``[N, D, W]``; default zeros.
        cu_seqlens: ``[N + 1]`` boundaries of packed documents; requires B = 1.
        seq_idx: ``[B, T]`` document of each token, for packed rows; taps never cross documents.

    Returns:
        ``(y [B, T, D] in x's dtype, final_state [N, D, W] in x's dtype or None)``.
    """
    length, width = x.shape[1], weight.shape[1]
    if cu_seqlens is not None and (output_final_state or initial_state is not None):
        return _each_document_conv(x, weight, bias, initial_state, output_final_state, cu_seqlens)
    if cu_seqlens is not None:
        seq_idx = document_ids(cu_seqlens, length)[None]
    dtype = accumulation_dtype(x, weight)
    past = x.new_zeros(x.shape[0], width, x.shape[2])
    if initial_state is not None:
        past = initial_state.transpose(1, 2).to(x.dtype)
    padded = torch.cat((past, x), dim=1)
    y = torch.zeros_like(x, dtype=dtype)
    for tap in range(width):
        back = width - 1 - tap
        shifted = padded[:, width - back : width - back + length].to(dtype)
        if seq_idx is not None and back > 0:
            same = seq_idx == F.pad(seq_idx, (back, 0), value=-1)[:, :length]
            shifted = shifted * same[..., None]
        y = y + shifted * weight[:, tap].to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    final_state = last_inputs(x, width, initial_state) if output_final_state else None
    return F.silu(y).to(x.dtype), final_state


def last_inputs(x, width, initial_state=None, cu_seqlens=None):
    """The last W inputs of each sequence, oldest first and contiguous ``[N, D, W]``; a sequence
    shorter than W takes the rest from its state."""
    if cu_seqlens is None:
        past = x.new_zeros(x.shape[0], width, x.shape[2])
        if initial_state is not None:
            past = initial_state.transpose(1, 2).to(x.dtype)
        return torch.cat((past, x[:, -width:]), dim=1)[:, -width:].transpose(1, 2).contiguous()
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    token = ends[:, None] - width + torch.arange(width, device=x.device)
    last = x[0, token.clamp_min(0)]
    inside = (token >= starts[:, None])[..., None]
    if initial_state is None:
        return last.masked_fill(~inside, 0).transpose(1, 2).contiguous()
    column = (width + token - starts[:, None]).clamp(0, width - 1)
    past = initial_state.transpose(1, 2).to(x.dtype)
    past = past.gather(1, column[..., None].expand_as(last))
    return torch.where(inside, last, past).transpose(1, 2).contiguous()


def _each_document_conv(x, weight, bias, initial_state, output_final_state, cu_seqlens):
    outputs, finals = [], []
    for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        past = None if initial_state is None else initial_state[n : n + 1]
        y, final = short_conv(
            x[:, start:stop], weight, bias, initial_state=past, output_final_state=True
        )
        outputs.append(y)
        finals.append(final)
    return torch.cat(outputs, dim=1), (torch.cat(finals) if output_final_state else None)


def short_conv_step(x, conv_state, weight, bias=None):
    """One token x ``[B, D]``; ``conv_state [B, D, W]`` (the last W inputs, oldest first) is
    written in place.

    Returns:
        y ``[B, D]`` in x's dtype.
    """
    conv_state.copy_(torch.cat((conv_state[..., 1:], x[..., None].to(conv_state.dtype)), dim=-1))
    dtype = accumulation_dtype(x, weight)
    y = (conv_state.to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype)
    return F.silu(y).to(x.dtype)


# ----------------------------------------------------------------------------------------------
# Norms
# ----------------------------------------------------------------------------------------------


def rms_norm(x, weight, *, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or wider and
    returned in weight's dtype."""
    wide = x.to(accumulation_dtype(x, weight))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide.dtype)).to(weight.dtype)


def add_rms_norm(x, residual, weight, *, eps=1e-5):
    """Add a branch to the residual stream and normalise: the stream keeps its own, usually wider,
    dtype.

    Args:
        x: branch output ``[..., D]``. residual: stream ``[..., D]``. weight: ``[D]``.

    Returns:
        ``(rms_norm(residual + x) in weight's dtype, residual + x in residual's dtype)``.
    """
    stream = residual + x.to(residual.dtype)
    return rms_norm(stream, weight, eps=eps), stream


def gated_rms_norm(x, gate, weight, *, eps=1e-5, residual=None, residual_weight=None):
    """rms_norm((x + residual * residual_weight) * silu(gate)) * weight: gate first, then norm.

    The sum with the weighted residual is rounded to x's dtype before gating, as the released
    models do.

    Args:
        x, gate, residual: ``[..., D]``. weight, residual_weight: ``[D]``.

    Returns:
        ``[..., D]`` in x's dtype.
    """
    dtype = accumulation_dtype(x, gate, weight)
    if residual is not None:
        x = (x.to(dtype) + residual.to(dtype) * residual_weight.to(dtype)).to(x.dtype)
    gated = x.to(dtype) * F.silu(gate.to(dtype))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(dtype)).to(x.dtype)


# ----------------------------------------------------------------------------------------------
# Linear layer
# ----------------------------------------------------------------------------------------------


def dense_weight(weight):
    """The matrix ``[N, K]`` of a linear layer. Quantised weights are multiplied out: ``(values,
    scale)``, int8 and float32 ``[N]``, or the ``(values, scale, K)`` of
    ``rodimus_kernels.Int4Weight``."""
    if not isinstance(weight, tuple):
        return weight
    values, scale, *inputs = weight
    if not inputs:
        return values * scale[:, None]
    wide = scale.to(torch.promote_types(scale.dtype, torch.float32))
    return (int4_values(values) * wide[..., None]).flatten(1)[:, : inputs[0]]


def int4_values(values):
    """int16 ``[N, groups, 32]``: the integers of ``rodimus_kernels.Int4Weight``."""
    words = values.view(torch.int16).unflatten(1, (-1, 1, 32))
    left = torch.arange(12, -1, -4, dtype=torch.int16, device=values.device)
    return ((words << left[:, None]) >> 12).flatten(1, 2)


@outside_autocast
def linear(x, weight, bias=None):
    """x ``[M, K]`` times weight ``[N, K]`` transposed, plus bias ``[N]``; rounded once, to x's
    dtype. The weight may be any that :func:`dense_weight` takes."""
    weight = dense_weight(weight)
    dtype = accumulation_dtype(x, weight)
    y = x.to(dtype) @ weight.to(dtype).t()
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


# ----------------------------------------------------------------------------------------------
# Whole blocks
# ----------------------------------------------------------------------------------------------


def blocks_step(stream, weights, taps, states, rings=(), position=None, rotary=None, **named):
    """One token through blocks, one after the other; taps, states and rings are written in place.

    Args:
        stream: ``[B, D]``. For each block, weights: a ``BlockWeights``; taps: ``[B, V, W]``;
            states: ``[B, 1, K, V]``; rings: ``[B, R, Hk * dim + Hv * dim]``, or a ring of bytes;
            none without attention. position: int64 ``[B]``. rotary: tables ``(cos, sin)``, each
            ``[B, dim // 2]``, or None.

    Returns:
        the stream after the last block ``[B, D]``.
    """
    rings = rings or [None] * len(weights)
    for block in zip(weights, taps, states, rings, strict=True):
        stream = _block_step(stream, *block, position, rotary, **named)
    return stream


def _block_step(
    stream,
    w,
    taps,
    state,
    ring,
    position,
    rotary,
    *,
    window_size=None,
    head_dim=None,
    key_eps=1e-12,
    norm_eps=1e-5,
):
    x, gate = linear(rms_norm(stream, w.mixer_norm, eps=norm_eps), w.fc).chunk(2, -1)
    shifted = short_conv_step(x, taps, w.conv, w.conv_bias)
    q, k = linear(shifted, w.query_key).chunk(2, -1)
    gates = linear(shifted.to(w.mem_gate_bias.dtype), w.mem_gate, w.mem_gate_bias)
    y = ddts_mixer_step(
        q,
        k,
        *gates.chunk(2, -1),
        linear(x, w.gate_in),
        x,
        shifted,
        gate,
        state,
        gate_weight=dense_weight(w.gate_out),
        gate_bias=w.gate_bias,
        residual_weight=w.residual_weight,
        norm_weight=w.act_norm,
        key_eps=key_eps,
        norm_eps=norm_eps,
    )
    branch = linear(y, w.mixer_out)
    if w.query is not None:
        x, stream = add_rms_norm(branch, stream, w.attn_norm, eps=norm_eps)
        # [B, 1, heads, dim]
        rows = (linear(x, p).unflatten(-1, (1, -1, head_dim)) for p in (w.query, w.key, w.value))
        q, k, v = rows
        if rotary is not None:
            tables = [table.unsqueeze(1) for table in rotary]
            q, k = rope(q, *tables), rope(k, *tables)
        o = shared_key_attention_step(q, k, v, ring, position, window_size=window_size)
        attended = linear(o.flatten(1), w.attn_out)
        x, _ = add_rms_norm(attended, stream, w.ffn_norm, eps=norm_eps)
        x, gate = linear(x, w.ffn_in).chunk(2, -1)
        branch = linear(F.silu(gate) * x, w.ffn_out)
    return stream + branch


# ----------------------------------------------------------------------------------------------
# Loss
# ----------------------------------------------------------------------------------------------


@outside_autocast
def linear_cross_entropy(hidden, weight, labels, *, z_loss=0.0, ignore_index=-100, reduction="sum"):
    """Cross entropy of ``softmax(hidden weight^T)``, with all logits in memory.

        loss_n = lse_n - logit_n[label_n] + z_loss * lse_n^2

    Args:
        hidden: ``[N, D]``. weight: ``[vocabulary, D]``. labels: int64 ``[N]``.
        z_loss: weight of the squared log-partition term that keeps logits bounded.
        reduction: "sum", or "mean" over labels that are not ``ignore_index``.

    Returns:
        ``(loss, cross_entropy)``: scalars; the second is without the z term and detached, for logs.
    """
    dtype = accumulation_dtype(hidden, weight)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    lse = logits.logsumexp(-1)
    valid = labels != ignore_index
    target = logits.gather(-1, torch.where(valid, labels, 0)[:, None])[:, 0]
    cross_entropy = ((lse - target) * valid).sum()
    loss = cross_entropy + z_loss * (lse.square() * valid).sum()
    if reduction == "mean":
        loss, cross_entropy = loss / valid.sum(), cross_entropy / valid.sum()
    return loss, cross_entropy.detach()
