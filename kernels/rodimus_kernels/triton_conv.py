"""The short convolution in Triton, forward and backward: one pass each way, taps from the cache.

Packed rows come with ``documents`` and ``starts [B, T]``: the document of each token and its first
token. A tap that reaches behind it reads the document's initial state, or zero. A backward program
computes what it needs of the tokens after its own again; gradients of weight and bias are summed
per program and then over programs in a fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl

from . import _library  # noqa: F401  (the schemas come first)
from ._triton import FP_FUSION, check_runs_here, implement, unit_stride

# tokens and channels of a tile; tokens of a backward program, which has a partial sum of its own
_TOKENS, _CHANNELS, _BACKWARD_TOKENS = 16, 128, 256
# the backward keeps twice as much
_FORWARD_WARPS, _BACKWARD_WARPS = 4, 8


@triton.jit
def document_at(documents, starts, i_b, T, o_t, valid):
    """``(document, first token)`` of tokens; rows that are not packed hold one document each."""
    if documents is None:
        return o_t * 0 + i_b, o_t * 0
    else:
        b_n = tl.load(documents + i_b * T + o_t, mask=valid, other=-1).to(tl.int64)
        return b_n, tl.load(starts + i_b * T + o_t, mask=valid, other=0).to(tl.int64)


@triton.jit
def load_inputs(p_x, h0, o_t, b_n, b_start, valid, o_d, x_t, D, W: tl.constexpr):
    """Inputs at tokens ``o_t`` of documents ``b_n``, fp32 ``[tokens, BD]``.

    Before the first token are the columns of the state ``h0 [N, D, W]``: token -1 is its last.
    """
    mask_d = (o_d < D)[None, :]
    inside = (valid & (o_t >= b_start))[:, None] & mask_d
    b_x = tl.load(p_x + o_t[:, None] * x_t + o_d[None, :], mask=inside, other=0.0).to(tl.float32)
    if h0 is not None:
        column = W + o_t - b_start
        before = (valid & (o_t < b_start) & (column >= 0))[:, None] & mask_d
        p_h0 = h0 + (b_n[:, None] * D + o_d[None, :]) * W + column[:, None]
        b_x += tl.load(p_h0, mask=before, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def preactivation(p_x, h0, weight, bias, o_t, b_n, b_start, valid, o_d, x_t, D, W: tl.constexpr):
    """The convolution before silu at tokens ``o_t``: fp32 ``[tokens, BD]``."""
    mask_d = o_d < D
    b_y = tl.zeros([o_t.shape[0], o_d.shape[0]], tl.float32)
    if bias is not None:
        b_y += tl.load(bias + o_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(W):
        b_w = tl.load(weight + o_d * W + tap, mask=mask_d, other=0.0).to(tl.float32)
        o_tap = o_t - (W - 1 - tap)
        b_y += load_inputs(p_x, h0, o_tap, b_n, b_start, valid, o_d, x_t, D, W) * b_w[None, :]
    return b_y


@triton.jit
def dpreactivation(
    p_x, h0, weight, bias, p_dy, o_t, b_n, b_start, valid, o_d, x_t, dy_t, D, W: tl.constexpr
):
    """Gradient at :func:`preactivation`, through silu."""
    b_y = preactivation(p_x, h0, weight, bias, o_t, b_n, b_start, valid, o_d, x_t, D, W)
    mask = valid[:, None] & (o_d < D)[None, :]
    b_dy = tl.load(p_dy + o_t[:, None] * dy_t + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_y)
    return b_dy * b_sigmoid * (1.0 + b_y * (1.0 - b_sigmoid))


@triton.jit
def short_conv_fwd_kernel(
    x,
    h0,
    weight,
    bias,
    documents,
    starts,
    y,
    T,
    D,
    x_b,
    x_t,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """``y = silu(bias + taps)``, contiguous ``[B, T, D]``; program (channels, tokens, row)."""
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    valid = o_t < T
    b_n, b_start = document_at(documents, starts, i_b, T, o_t, valid)
    p_x = x + i_b * x_b
    b_y = preactivation(p_x, h0, weight, bias, o_t, b_n, b_start, valid, o_d, x_t, D, W)
    p_y = y + (i_b * T + o_t[:, None]) * D + o_d[None, :]
    b_y = b_y * tl.sigmoid(b_y)
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=valid[:, None] & (o_d < D)[None, :])


@triton.jit
def short_conv_bwd_kernel(
    x,
    h0,
    weight,
    bias,
    documents,
    starts,
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
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """``dx`` contiguous ``[B, T, D]``; ``dweight [programs, W, D]``, ``dbias [programs, D]``."""
    i_b = tl.program_id(2).to(tl.int64)
    part = i_b * tl.num_programs(1) + tl.program_id(1)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    mask_d = o_d < D
    p_x = x + i_b * x_b
    p_dy = dy + i_b * dy_b
    b_db = tl.zeros([BD], tl.float32)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    for i_t in range(0, min(TOKENS, T - first), BT):
        o_t = first + i_t + tl.arange(0, BT)
        valid = o_t < T
        b_n, b_start = document_at(documents, starts, i_b, T, o_t, valid)
        b_dx = tl.zeros([BT, BD], tl.float32)
        for back in tl.static_range(W):
            o_later = o_t + back
            later = o_later < T
            b_n_later, b_start_later = document_at(documents, starts, i_b, T, o_later, later)
            same = later & (b_n_later == b_n)
            b_dp = dpreactivation(
                *(p_x, h0, weight, bias, p_dy, o_later, b_n_later, b_start_later, same),
                *(o_d, x_t, dy_t, D, W),
            )
            p_w = weight + o_d * W + (W - 1 - back)
            b_dx += b_dp * tl.load(p_w, mask=mask_d, other=0.0).to(tl.float32)[None, :]
            if back == 0:
                b_own = b_dp
        b_db += tl.sum(b_own, 0)
        for tap in tl.static_range(W):
            o_tap = o_t - (W - 1 - tap)
            b_x = load_inputs(p_x, h0, o_tap, b_n, b_start, valid, o_d, x_t, D, W)
            p_dw = dweight + (part * W + tap) * D + o_d
            # a program adds to its own sums only
            b_dw = tl.sum(b_own * b_x, 0) + tl.load(p_dw, mask=mask_d, other=0.0)
            tl.store(p_dw, b_dw, mask=mask_d)
        p_dx = dx + (i_b * T + o_t[:, None]) * D + o_d[None, :]
        tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=valid[:, None] & mask_d[None, :])
    tl.store(dbias + part * D + o_d, b_db, mask=mask_d)


@triton.jit
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
    BW: tl.constexpr,
    BD: tl.constexpr,
):
    """``dh0 [N, D, W]``; program (channels, document). ``bounds [N + 1]`` of packed documents."""
    i_n = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_w = tl.arange(0, BW)
    if bounds is None:
        i_b = i_n
        start = i_n * 0
        end = start + T
    else:
        i_b = i_n * 0
        start = tl.load(bounds + i_n).to(tl.int64)
        end = tl.load(bounds + i_n + 1).to(tl.int64)
    b_n = o_w * 0 + i_n
    b_start = o_w * 0 + start
    b_dh0 = tl.zeros([BW, BD], tl.float32)
    for back in tl.static_range(1, W):
        o_t = start + o_w - W + back
        valid = (o_t >= start) & (o_t < end) & (o_w < W)
        b_dp = dpreactivation(
            *(x + i_b * x_b, h0, weight, bias, dy + i_b * dy_b, o_t, b_n, b_start, valid),
            *(o_d, x_t, dy_t, D, W),
        )
        p_w = weight + o_d * W + (W - 1 - back)
        b_dh0 += b_dp * tl.load(p_w, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    p_dh0 = dh0 + (i_n * D + o_d[None, :]) * W + o_w[:, None]
    mask = (o_w < W)[:, None] & (o_d < D)[None, :]
    tl.store(p_dh0, b_dh0.to(dh0.dtype.element_ty), mask=mask)


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
    y = torch.ops.rodimus.short_conv(x, weight, bias, initial_state, cu_seqlens, seq_idx)
    final_state = None
    if output_final_state:
        final_state = _last_inputs(x, weight.shape[1], initial_state, cu_seqlens)
    return y, final_state


def _last_inputs(x, width, initial_state, cu_seqlens):
    """The last inputs of each sequence, oldest first ``[N, D, W]``, from its state where short."""
    if cu_seqlens is None:
        past = x.new_zeros(x.shape[0], width, x.shape[2])
        if initial_state is not None:
            past = initial_state.transpose(1, 2).to(x.dtype)
        return torch.cat((past, x[:, -width:]), dim=1)[:, -width:].transpose(1, 2)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    token = ends[:, None] - width + torch.arange(width, device=x.device)
    last = x[0, token.clamp_min(0)]
    inside = (token >= starts[:, None])[..., None]
    if initial_state is None:
        return last.masked_fill(~inside, 0).transpose(1, 2)
    column = (width + token - starts[:, None]).clamp(0, width - 1)
    past = initial_state.transpose(1, 2).to(x.dtype)
    past = past.gather(1, column[..., None].expand_as(last))
    return torch.where(inside, last, past).transpose(1, 2)


def _packing(x, cu_seqlens, seq_idx):
    """``(documents, starts)`` of each token, or two None; made on the device."""
    if cu_seqlens is None and seq_idx is None:
        return None, None
    length = x.shape[1]
    if seq_idx is None:
        column = torch.arange(length, device=x.device)
        bounds = cu_seqlens.long()
        # empty documents share their start with the next: only bounds tell them apart
        documents = torch.searchsorted(bounds[1:], column, right=True)[None]
        return documents.to(torch.int32), bounds[documents].to(torch.int32)
    column = torch.arange(length, device=x.device).expand_as(seq_idx)
    changed = seq_idx != torch.nn.functional.pad(seq_idx, (1, 0), value=-1)[:, :-1]
    starts = torch.where(changed, column, 0).cummax(1).values
    return seq_idx.to(torch.int32).contiguous(), starts.to(torch.int32)


@implement("short_conv")
def _forward(x, weight, bias, initial_state, cu_seqlens, seq_idx):
    x, weight, y = unit_stride(x), weight.contiguous(), x.new_empty(x.shape)
    batch, length, channels = x.shape
    h0 = None if initial_state is None else initial_state.contiguous()
    grid = (triton.cdiv(channels, _CHANNELS), triton.cdiv(length, _TOKENS), batch)
    short_conv_fwd_kernel[grid](
        *(x, h0, weight, bias, *_packing(x, cu_seqlens, seq_idx), y),
        *(length, channels, *x.stride()[:2]),
        W=weight.shape[1],
        BT=_TOKENS,
        BD=_CHANNELS,
        num_warps=_FORWARD_WARPS,
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
    dweight = x.new_zeros((batch * blocks, width, channels), dtype=torch.float32)
    dbias = x.new_empty((batch * blocks, channels), dtype=torch.float32)
    strides = (*x.stride()[:2], *dy.stride()[:2])
    tiles = triton.cdiv(channels, _CHANNELS)
    short_conv_bwd_kernel[(tiles, blocks, batch)](
        *(x, h0, weight, bias, *_packing(x, cu_seqlens, seq_idx), dy, dx, dweight, dbias),
        *(length, channels, *strides),
        W=width,
        TOKENS=_BACKWARD_TOKENS,
        BT=_TOKENS,
        BD=_CHANNELS,
        num_warps=_BACKWARD_WARPS,
        **FP_FUSION,
    )
    dh0 = x.new_empty(0)
    if h0 is not None:
        dh0 = torch.empty_like(h0)
        short_conv_dstate_kernel[(tiles, h0.shape[0])](
            *(x, h0, weight, bias, cu_seqlens, dy, dh0, length, channels, *strides),
            W=width,
            BW=triton.next_power_of_2(width),
            BD=_CHANNELS,
            **FP_FUSION,
        )
    dbias = x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dweight.sum(0).t().contiguous().to(weight.dtype), dbias, dh0


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    _, _, bias, initial_state, _, _ = ctx.saved_tensors
    dx, dweight, dbias, dh0 = torch.ops.rodimus.short_conv_backward(*ctx.saved_tensors, dy)
    dbias = None if bias is None else dbias
    return dx, dweight, dbias, None if initial_state is None else dh0, None, None


torch.library.register_autograd("rodimus::short_conv", _autograd, setup_context=_setup_context)


def aot_launches(everything: bool):
    """Calls that launch every kernel of this file, for ``benchmarks/aot.py``: name and function."""
    yield "D4096 W4 bfloat16", lambda: _aot(None)
    if everything:
        yield "D4096 W4 bfloat16 packed", lambda: _aot(torch.tensor([0, 10, 32]))


def _aot(cu_seqlens):
    x = torch.empty(1, 32, 8192, dtype=torch.bfloat16)[..., :4096]
    weight, bias = torch.empty(4096, 4, dtype=torch.bfloat16), torch.empty(4096, dtype=x.dtype)
    h0 = torch.empty(1 if cu_seqlens is None else 2, 4096, 4, dtype=x.dtype)
    y = torch.ops.rodimus.short_conv(x, weight, bias, h0, cu_seqlens, None)
    torch.ops.rodimus.short_conv_backward(x, weight, bias, h0, cu_seqlens, None, y)
