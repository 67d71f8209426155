"""The short convolution in Triton, forward and backward: one walk over time each way.

Channels are independent. A program takes a block of channels and a run of tokens and walks over
it: the last ``W - 1`` inputs stay in registers, and in the backward also the unfinished sums of
``W - 1`` tokens of dx, so that each tensor is read or written once. The ``W - 1`` tokens before a
run are read again, in the backward also those after it. Gradients of weight and bias are summed per
program and then over programs in a fixed order, without atomics.

Packed rows come with ``documents [B, T]``, the id of each token's document. A tap on a token of
another id reads the document's initial state, or zero.
"""

import torch
import triton
import triton.language as tl

from ._schemas import register_gradient
from ._triton import FP_FUSION, check_grid, check_runs_here, implement, sigmoid, unit_stride
from .reference import last_inputs

# channels of a program, four per thread: 16 bytes of fp32, and few enough registers for many warps
_CHANNELS, _WARPS = 512, 4
# tokens of a run; in the backward each run has its own sums, which are written and read once more
_FORWARD_TOKENS, _BACKWARD_TOKENS = 64, 256
# tokens whose loads are in flight together; divides both runs
_AHEAD = 4


@triton.jit
def mask_if(mask, condition):
    """``mask`` if the scalar holds; ``!= 0``, as the interpreter broadcasts a bool to an int."""
    return (mask & condition) != 0


@triton.jit
def document_at(documents, i_b, t, T):
    """Id of the document of token ``t``, past the end of a row that of its last token; unpacked
    rows hold one document each."""
    if documents is None:
        return i_b
    else:
        return tl.load(documents + i_b * T + tl.minimum(t, T - 1)).to(tl.int64)


@triton.jit
def past_documents(documents, i_b, t, T, W: tl.constexpr):
    """Ids of the ``W - 1`` tokens before ``t``: -1 before a row, past its end that of its last
    token; none if rows are not packed."""
    ids = ()
    if documents is not None:
        for i in tl.static_range(W - 1):
            before = t - (W - 1) + i
            p_id = documents + i_b * T + tl.minimum(before, T - 1)
            ids += (tl.load(p_id, mask=before >= 0, other=-1).to(tl.int64),)
    return ids


@triton.jit
def load_tokens(p, t, stride, T, mask, COUNT: tl.constexpr):
    """``COUNT`` rows from token ``t`` on, in the tensor's dtype; zero from T on."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows += (tl.load(p + (t + i) * stride, mask=mask_if(mask, t + i < T), other=0.0),)
    return rows


@triton.jit
def load_taps(weight, bias, o_d, mask, W: tl.constexpr):
    """``(taps, bias)`` in fp32, oldest tap first."""
    taps = ()
    for tap in tl.static_range(W):
        taps += (tl.load(weight + o_d * W + tap, mask=mask, other=0.0).to(tl.float32),)
    b_b = tl.zeros(o_d.shape, tl.float32)
    if bias is not None:
        b_b += tl.load(bias + o_d, mask=mask, other=0.0).to(tl.float32)
    return taps, b_b


@triton.jit
def past_inputs(p_x, h0, bounds, ids, i_n, t, o_d, x_t, D, mask, W: tl.constexpr):
    """The ``W - 1`` inputs of document ``i_n`` before token ``t``, oldest first, in fp32.

    Inputs before its first token are columns of the state ``h0 [N, D, W]``, whose last column is
    the token just before. Tokens of other ``ids`` are zero, and so are tokens that do not exist.
    """
    past = ()
    start = t * 0
    if bounds is not None:
        start += tl.load(bounds + i_n)
    for i in tl.static_range(W - 1):
        before = t - (W - 1) + i
        own = before >= start
        if len(ids) > 0:
            own &= ids[i] == i_n
        b_x = tl.load(p_x + before * x_t, mask=mask_if(mask, own), other=0.0).to(tl.float32)
        if h0 is not None:
            p_h0 = h0 + (i_n * D + o_d) * W + (W + before - start)
            b_x += tl.load(p_h0, mask=mask_if(mask, before < start), other=0.0).to(tl.float32)
        past += (b_x,)
    return past


@triton.jit
def preactivation(inputs, taps, b_b):
    """The convolution before silu, of the last ``W`` inputs."""
    b_y = b_b
    for tap in tl.static_range(len(taps)):
        b_y += inputs[tap] * taps[tap]
    return b_y


@triton.jit
def backward_step(inputs, taps, b_b, b_dy, pending, ids, i_n):
    """``(dp, pending)``: the gradient before silu at a token of document ``i_n``, and the sums for
    dx.

    On entry ``pending`` holds the sums of the ``W - 1`` tokens before, of documents ``ids`` if rows
    are packed; on return it also holds that of the token, and the first sum is complete.
    """
    b_y = preactivation(inputs, taps, b_b)
    b_sigmoid = sigmoid(b_y)
    b_dp = b_dy.to(tl.float32) * b_sigmoid * (1.0 + b_y * (1.0 - b_sigmoid))
    sums = ()
    for tap in tl.static_range(len(pending)):
        b_dx = b_dp * taps[tap]
        if len(ids) > 0:
            b_dx = tl.where(ids[tap] == i_n, b_dx, 0.0)
        sums += (pending[tap] + b_dx,)
    return b_dp, sums + (b_dp * taps[len(pending)],)


@triton.jit
def zeros(like, COUNT: tl.constexpr):
    """A tuple of fp32 zeros."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros(like.shape, tl.float32),)
    return sums


@triton.jit(do_not_specialize=["T"])
def short_conv_fwd_kernel(
    x,
    h0,
    weight,
    bias,
    documents,
    bounds,
    y,
    T,
    D,
    x_b,
    x_t,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    AHEAD: tl.constexpr,
    BD: tl.constexpr,
):
    """``y = silu(bias + taps)``, contiguous ``[B, T, D]``; program (channels, run, row)."""
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask = o_d < D
    first = tl.program_id(1).to(tl.int64) * TOKENS
    p_x = x + i_b * x_b + o_d
    p_y = y + i_b * T * D + o_d
    taps, b_b = load_taps(weight, bias, o_d, mask, W)
    ids = past_documents(documents, i_b, first, T, W)
    i_n = document_at(documents, i_b, first, T)
    past = past_inputs(p_x, h0, bounds, ids, i_n, first, o_d, x_t, D, mask, W)
    for i_t in range(0, min(TOKENS, T - first), AHEAD):
        rows = load_tokens(p_x, first + i_t, x_t, T, mask, AHEAD)
        for i in tl.static_range(AHEAD):
            t = first + i_t + i
            if len(ids) > 0:
                # read again from the cache: kept from token to token, they cost more registers
                ids = past_documents(documents, i_b, t, T, W)
                i_n = document_at(documents, i_b, t, T)
                if i_n != ids[W - 2]:
                    past = past_inputs(p_x, h0, bounds, ids, i_n, t, o_d, x_t, D, mask, W)
            inputs = past + (rows[i].to(tl.float32),)
            b_y = preactivation(inputs, taps, b_b)
            b_y = b_y * sigmoid(b_y)
            tl.store(p_y + t * D, b_y.to(y.dtype.element_ty), mask=mask_if(mask, t < T))
            past = inputs[1:]


@triton.jit(do_not_specialize=["T"])
def short_conv_bwd_kernel(
    x,
    h0,
    weight,
    bias,
    documents,
    bounds,
    dy,
    dx,
    dweight,
    dbias,
    T,
    D,
    x_b,
    x_t,
    dy_b,
    dy_t,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    AHEAD: tl.constexpr,
    BD: tl.constexpr,
):
    """``dx`` contiguous ``[B, T, D]``; ``dweight [programs, W, D]``, ``dbias [programs, D]``."""
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask = o_d < D
    first = tl.program_id(1).to(tl.int64) * TOKENS
    p_x = x + i_b * x_b + o_d
    p_dy = dy + i_b * dy_b + o_d
    p_dx = dx + i_b * T * D + o_d
    taps, b_b = load_taps(weight, bias, o_d, mask, W)
    ids = past_documents(documents, i_b, first, T, W)
    i_n = document_at(documents, i_b, first, T)
    past = past_inputs(p_x, h0, bounds, ids, i_n, first, o_d, x_t, D, mask, W)
    pending = zeros(o_d, W - 1)
    sums = zeros(o_d, W)
    b_db = tl.zeros([BD], tl.float32)
    for i_t in range(0, min(TOKENS, T - first), AHEAD):
        rows = load_tokens(p_x, first + i_t, x_t, T, mask, AHEAD)
        drows = load_tokens(p_dy, first + i_t, dy_t, T, mask, AHEAD)
        for i in tl.static_range(AHEAD):
            t = first + i_t + i
            if len(ids) > 0:
                # read again from the cache: kept from token to token, they cost more registers
                ids = past_documents(documents, i_b, t, T, W)
                i_n = document_at(documents, i_b, t, T)
                if i_n != ids[W - 2]:
                    past = past_inputs(p_x, h0, bounds, ids, i_n, t, o_d, x_t, D, mask, W)
            inputs = past + (rows[i].to(tl.float32),)
            b_dp, pending = backward_step(inputs, taps, b_b, drows[i], pending, ids, i_n)
            done = t - (W - 1)
            mask_done = mask_if(mask, (done >= first) & (done < T))
            tl.store(p_dx + done * D, pending[0].to(dx.dtype.element_ty), mask=mask_done)
            b_db += b_dp
            added = ()
            for tap in tl.static_range(W):
                added += (sums[tap] + b_dp * inputs[tap],)
            sums = added
            past = inputs[1:]
            pending = pending[1:]
    # what the tokens after the run add to dx of its last tokens
    after = first + tl.cdiv(min(TOKENS, T - first), AHEAD) * AHEAD
    rows = load_tokens(p_x, after, x_t, T, mask, W - 1)
    drows = load_tokens(p_dy, after, dy_t, T, mask, W - 1)
    for i in tl.static_range(W - 1):
        t = after + i
        if len(ids) > 0:
            ids = past_documents(documents, i_b, t, T, W)
            i_n = document_at(documents, i_b, t, T)
            if i_n != ids[W - 2]:
                past = past_inputs(p_x, h0, bounds, ids, i_n, t, o_d, x_t, D, mask, W)
        inputs = past + (rows[i].to(tl.float32),)
        b_dp, pending = backward_step(inputs, taps, b_b, drows[i], pending, ids, i_n)
        done = t - (W - 1)
        mask_done = mask_if(mask, (done >= first) & (done < T))
        tl.store(p_dx + done * D, pending[0].to(dx.dtype.element_ty), mask=mask_done)
        past = inputs[1:]
        pending = pending[1:]
    part = i_b * tl.num_programs(1) + tl.program_id(1)
    for tap in tl.static_range(W):
        tl.store(dweight + (part * W + tap) * D + o_d, sums[tap], mask=mask)
    tl.store(dbias + part * D + o_d, b_db, mask=mask)


@triton.jit(do_not_specialize=["T"])
def short_conv_dstate_kernel(
    x,
    h0,
    weight,
    bias,
    bounds,
    dy,
    dh0,
    T,
    D,
    x_b,
    x_t,
    dy_b,
    dy_t,
    W: tl.constexpr,
    BD: tl.constexpr,
):
    """``dh0 [N, D, W]``; program (channels, document). ``bounds [N + 1]`` of packed documents.

    The first ``W - 1`` tokens complete the sums of the state's columns instead of those of dx; no
    token reads the oldest column.
    """
    i_n = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask = o_d < D
    if bounds is None:
        i_b = i_n
        start = i_n * 0
        end = start + T
    else:
        i_b = i_n * 0
        start = tl.load(bounds + i_n).to(tl.int64)
        end = tl.load(bounds + i_n + 1).to(tl.int64)
    p_x = x + i_b * x_b + o_d
    taps, b_b = load_taps(weight, bias, o_d, mask, W)
    past = past_inputs(p_x, h0, bounds, (), i_n, start, o_d, x_t, D, mask, W)
    rows = load_tokens(p_x, start, x_t, end, mask, W - 1)
    drows = load_tokens(dy + i_b * dy_b + o_d, start, dy_t, end, mask, W - 1)
    pending = zeros(o_d, W - 1)
    p_dh0 = dh0 + (i_n * D + o_d) * W
    tl.store(p_dh0, tl.zeros([BD], dh0.dtype.element_ty), mask=mask)
    for i in tl.static_range(W - 1):
        inputs = past + (rows[i].to(tl.float32),)
        _, pending = backward_step(inputs, taps, b_b, drows[i], pending, (), i_n)
        tl.store(p_dh0 + i + 1, pending[0].to(dh0.dtype.element_ty), mask=mask)
        past = inputs[1:]
        pending = pending[1:]


def forward(
    x,
    weight,
    bias=None,
    *,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    seq_idx=None,
):
    """The contract is that of :func:`rodimus_kernels.short_conv`."""
    check_runs_here("short_conv", x, weight)
    # the kernels index vectors with stride 1
    bias, cu_seqlens = (y if y is None else y.contiguous() for y in (bias, cu_seqlens))
    y = torch.ops.rodimus.short_conv(x, weight, bias, initial_state, cu_seqlens, seq_idx)
    final_state = None
    if output_final_state:
        final_state = last_inputs(x, weight.shape[1], initial_state, cu_seqlens)
    return y, final_state


def _documents(x, cu_seqlens, seq_idx):
    """Document ids ``[B, T]``, made on the device; None if rows are not packed."""
    if cu_seqlens is None:
        return None if seq_idx is None else seq_idx.contiguous()
    column = torch.arange(x.shape[1], device=x.device)
    # an empty document has no tokens but has a state, so ids count it
    return torch.searchsorted(cu_seqlens[1:].long(), column, right=True, out_int32=True)[None]


@implement("short_conv")
def _forward(x, weight, bias, initial_state, cu_seqlens, seq_idx):
    x, weight, y = unit_stride(x), weight.contiguous(), x.new_empty(x.shape)
    batch, length, channels = x.shape
    h0 = None if initial_state is None else initial_state.contiguous()
    grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _FORWARD_TOKENS), batch)
    check_grid("short_conv", "rows", batch)
    check_grid("short_conv", f"runs of {_FORWARD_TOKENS} tokens", grid[1])
    short_conv_fwd_kernel[grid](
        x,
        h0,
        weight,
        bias,
        _documents(x, cu_seqlens, seq_idx),
        cu_seqlens,
        y,
        length,
        channels,
        *x.stride()[:2],
        W=weight.shape[1],
        TOKENS=_FORWARD_TOKENS,
        AHEAD=_AHEAD,
        BD=_CHANNELS,
        num_warps=_WARPS,
        **FP_FUSION,
    )
    return y


@implement("short_conv_backward")
def _backward(x, weight, bias, initial_state, cu_seqlens, seq_idx, dy):
    x, weight, dy = unit_stride(x), weight.contiguous(), unit_stride(dy)
    batch, length, channels = x.shape
    width = weight.shape[1]
    h0 = None if initial_state is None else initial_state.contiguous()
    blocks = triton.cdiv(length, _BACKWARD_TOKENS)
    dx = x.new_empty(x.shape)
    dweight = x.new_empty((batch * blocks, width, channels), dtype=torch.float32)
    dbias = x.new_empty((batch * blocks, channels), dtype=torch.float32)
    strides = (*x.stride()[:2], *dy.stride()[:2])
    tiles = triton.cdiv(channels, _CHANNELS)
    short_conv_bwd_kernel[(tiles, blocks, batch)](
        x,
        h0,
        weight,
        bias,
        _documents(x, cu_seqlens, seq_idx),
        cu_seqlens,
        dy,
        dx,
        dweight,
        dbias,
        length,
        channels,
        *strides,
        W=width,
        TOKENS=_BACKWARD_TOKENS,
        AHEAD=_AHEAD,
        BD=_CHANNELS,
        num_warps=_WARPS,
        **FP_FUSION,
    )
    dh0 = x.new_empty(0)
    if h0 is not None:
        check_grid("short_conv", "documents with a state", h0.shape[0])
        dh0 = torch.empty_like(h0)
        short_conv_dstate_kernel[(tiles, h0.shape[0])](
            x,
            h0,
            weight,
            bias,
            cu_seqlens,
            dy,
            dh0,
            length,
            channels,
            *strides,
            W=width,
            BD=_CHANNELS,
            num_warps=_WARPS,
            **FP_FUSION,
        )
    dbias = x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight.sum(0).t().contiguous().to(weight.dtype), dbias, dh0


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    # read once: with activation checkpointing, saved tensors cannot be unpacked a second time
    saved = ctx.saved_tensors
    _, _, bias, initial_state, _, _ = saved
    dx, dweight, dbias, dh0 = torch.ops.rodimus.short_conv_backward(*saved, dy)
    dbias = None if bias is None else dbias
    return dx, dweight, dbias, None if initial_state is None else dh0, None, None


register_gradient("short_conv", _autograd, _setup_context)
