"""The low-rank input gate in Triton: the gate exists in registers only, forward and backward.

The backward is one pass over x and dy: a program takes a block of tokens and walks over a group of
the channels. Its sums, over tokens and over channels, are added to those of other programs in a
fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl

from ._schemas import register_gradient
from ._triton import (
    FP_FUSION,
    as_rows,
    check_grid,
    check_runs_here,
    implement,
    product,
    sigmoid,
)

# tile of the forward
_TOKENS, _CHANNELS, _WARPS = 64, 128, 8
# tile of the backward: the more tokens a program sums over, the fewer sums are written. On an H200
# (8 * 4096 tokens, 4096 channels, rank 32) it takes 438 us including the sums; tiles that were up
# to 14 us faster spill registers.
_SUMMED_TOKENS, _BACKWARD_CHANNELS, _BACKWARD_WARPS = 128, 32, 4
# tiles of the backward in flight or in registers
_STAGES = 3
# programs of the backward: if there are fewer blocks of tokens, groups of channels make up for it
_PROGRAMS = 256


@triton.jit
def load_rows(p, o_t, o_c, stride, T, D):
    """``[tokens, channels]`` of rows ``stride`` apart, zero outside."""
    mask = (o_t < T)[:, None] & (o_c < D)[None, :]
    return tl.load(p + o_t[:, None] * stride + o_c[None, :], mask=mask, other=0.0)


@triton.jit
def gate_of(b_h, b_w, bias, o_d, D, PRECISION: tl.constexpr):
    """``sigmoid(hidden weight^T + bias)``: fp32 ``[tokens, channels]``."""
    b_b = tl.load(bias + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_gate = tl.zeros([b_h.shape[0], b_w.shape[0]], tl.float32) + b_b[None, :]
    return sigmoid(product(b_h, tl.trans(b_w), b_gate, PRECISION))


@triton.jit(do_not_specialize=["T"])
def input_gate_fwd_kernel(
    x,
    hidden,
    weight,
    bias,
    y,
    T,
    D,
    x_t,
    hidden_t,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y`` contiguous ``[T, D]``; program (channels, tokens)."""
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    o_r = tl.arange(0, BR)
    b_h = load_rows(hidden, o_t, o_r, hidden_t, T, R)
    b_w = load_rows(weight, o_d, o_r, R, D, R).to(b_h.dtype)
    b_gate = gate_of(b_h, b_w, bias, o_d, D, PRECISION)
    b_x = load_rows(x, o_t, o_d, x_t, T, D).to(tl.float32)
    mask = (o_t < T)[:, None] & (o_d < D)[None, :]
    p_y = y + o_t[:, None] * D + o_d[None, :]
    tl.store(p_y, (b_x * b_gate).to(y.dtype.element_ty), mask=mask)


@triton.jit
def input_gate_bwd_kernel(
    x,
    hidden,
    weight,
    bias,
    dy,
    dx,
    dhidden,
    dweight,
    dbias,
    T,
    D,
    GROUP,
    x_t,
    hidden_t,
    dy_t,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``dx [T, D]``; program (channel group, tokens), whose sums are ``dhidden [groups, T, R]``,
    ``dweight [blocks, D, R]`` and ``dbias [blocks, D]``, contiguous fp32.
    """
    i_g = tl.program_id(0).to(tl.int64)
    i_p = tl.program_id(1).to(tl.int64)
    o_t = i_p * BT + tl.arange(0, BT)
    o_r = tl.arange(0, BR)
    b_h = load_rows(hidden, o_t, o_r, hidden_t, T, R)
    b_dh = tl.zeros([BT, BR], tl.float32)
    first = tl.program_id(0) * GROUP
    for i_d in tl.range(first, min(first + GROUP, D), BD, num_stages=STAGES):
        o_d = i_d + tl.arange(0, BD)
        b_x = load_rows(x, o_t, o_d, x_t, T, D).to(tl.float32)
        b_dy = load_rows(dy, o_t, o_d, dy_t, T, D).to(tl.float32)
        b_w = load_rows(weight, o_d, o_r, R, D, R).to(b_h.dtype)
        b_gate = gate_of(b_h, b_w, bias, o_d, D, PRECISION)
        b_dx = b_dy * b_gate
        mask = (o_t < T)[:, None] & (o_d < D)[None, :]
        p_dx = dx + o_t[:, None] * D + o_d[None, :]
        tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=mask)
        b_dgate = b_dx * b_x * (1.0 - b_gate)
        tl.store(dbias + i_p * D + o_d, tl.sum(b_dgate, 0), mask=o_d < D)
        b_dgate = b_dgate.to(b_h.dtype)
        b_dh = product(b_dgate, b_w, b_dh, PRECISION)
        b_dw = tl.zeros([BD, BR], tl.float32)
        b_dw = product(tl.trans(b_dgate), b_h, b_dw, PRECISION)
        mask = (o_d < D)[:, None] & (o_r < R)[None, :]
        tl.store(dweight + (i_p * D + o_d[:, None]) * R + o_r[None, :], b_dw, mask=mask)
    p_dh = dhidden + (i_g * T + o_t[:, None]) * R + o_r[None, :]
    tl.store(p_dh, b_dh, mask=(o_t < T)[:, None] & (o_r < R)[None, :])


def input_gate(x, hidden, weight, bias):
    """The contract is that of :func:`rodimus_kernels.input_gate`."""
    check_runs_here("input_gate", x, hidden, weight, bias)
    return torch.ops.rodimus.input_gate(x, hidden, weight, bias.contiguous())


def _tile(hidden, tokens, channels, warps):
    rank = hidden.shape[-1]
    return {
        "R": rank,
        "BR": max(triton.next_power_of_2(rank), 16),
        "BT": tokens,
        "BD": channels,
        "PRECISION": "tf32x3" if hidden.dtype == torch.float32 else "tf32",
        "num_warps": warps,
        **FP_FUSION,
    }


@implement("input_gate")
def _forward(x, hidden, weight, bias):
    rows, hiddens, y = as_rows(x), as_rows(hidden), x.new_empty(x.shape)
    length, width = rows.shape
    tokens, channels = _TOKENS, _CHANNELS
    if hidden.dtype == torch.float32 and hidden.shape[-1] > 64:
        tokens, channels = tokens // 2, channels // 2
    check_grid("input_gate", f"blocks of {tokens} tokens", triton.cdiv(length, tokens))
    input_gate_fwd_kernel[(triton.cdiv(width, channels), triton.cdiv(length, tokens))](
        rows,
        hiddens,
        weight.contiguous(),
        bias,
        y,
        length,
        width,
        rows.stride(0),
        hiddens.stride(0),
        **_tile(hidden, tokens, channels, _WARPS),
    )
    return y


@implement("input_gate_backward")
def _backward(x, hidden, weight, bias, dy):
    rows, hiddens, dys, weight = as_rows(x), as_rows(hidden), as_rows(dy), weight.contiguous()
    length, width = rows.shape
    tokens, channels, stages = _SUMMED_TOKENS, _BACKWARD_CHANNELS, _STAGES
    if hidden.dtype == torch.float32:
        # float32 tiles have twice the bytes, and each product is made of three
        tokens, channels, stages = tokens // 2, max(channels // 2, 16), 1
    if hidden.shape[-1] > 64:
        # fits in the shared memory that a block has on the smallest GPUs
        tokens, stages = tokens // 2, min(stages, 2)
    blocks = triton.cdiv(length, tokens)
    check_grid("input_gate", f"blocks of {tokens} tokens", blocks)
    tiles = max(triton.cdiv(width, channels), 1)
    group = triton.cdiv(tiles, min(triton.cdiv(_PROGRAMS, max(blocks, 1)), tiles)) * channels
    groups = triton.cdiv(width, group)
    dx = x.new_empty(x.shape)
    dhidden = hidden.new_empty((groups, *hiddens.shape), dtype=torch.float32)
    dweight = weight.new_empty((blocks, *weight.shape), dtype=torch.float32)
    dbias = weight.new_empty((blocks, width), dtype=torch.float32)
    input_gate_bwd_kernel[(groups, blocks)](
        rows,
        hiddens,
        weight,
        bias,
        dys,
        dx,
        dhidden,
        dweight,
        dbias,
        length,
        width,
        group,
        rows.stride(0),
        hiddens.stride(0),
        dys.stride(0),
        STAGES=stages,
        **_tile(hidden, tokens, channels, _BACKWARD_WARPS),
    )
    dhidden = dhidden.sum(0).to(hidden.dtype).view(hidden.shape)
    return dx, dhidden, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return tuple(torch.ops.rodimus.input_gate_backward(*ctx.saved_tensors, dy))


register_gradient("input_gate", _autograd, _setup_context)
