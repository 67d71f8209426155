"""The gates of DDTS in Triton, forward and backward: one pass over the raw projections each way.
Only the inputs are saved.
"""

import torch
import triton
import triton.language as tl

from .._schemas import register_gradient
from .._triton import (
    FP_FUSION,
    check_runs_here,
    implement,
    row_block,
    strides,
    tempered_gate_gradients,
    tempered_gates,
    unit_stride,
)

# elements of a program; a row is the K channels of one head at one token
_ELEMENTS = 4096


@triton.jit
def load_row(x, o_r, o_k, mask, T, H, x_b, x_t, x_h):
    """Rows ``(b, t, h)`` of a strided ``[B, T, H, K]`` as fp32."""
    i_h = o_r % H
    i_t = (o_r // H) % T
    i_b = o_r // (H * T)
    p_x = x + (i_b * x_b + i_t * x_t + i_h * x_h)[:, None] + o_k[None, :]
    return tl.load(p_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R", "T"])
def ddts_gates_fwd_kernel(
    k,
    select,
    temper,
    written,
    log_decay,
    eps,
    R,
    T,
    H,
    k_b,
    k_t,
    k_h,
    s_b,
    s_t,
    s_h,
    t_b,
    t_t,
    t_h,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """``written = k / |k| softplus(select)^tau``, ``log_decay = -softplus(select) tau``."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    mask = (o_r < R)[:, None] & (o_k < K)[None, :]
    b_k = load_row(k, o_r, o_k, mask, T, H, k_b, k_t, k_h)
    b_s = load_row(select, o_r, o_k, mask, T, H, s_b, s_t, s_h)
    b_t = load_row(temper, o_r, o_k, mask, T, H, t_b, t_t, t_h)
    b_in, b_decay = tempered_gates(b_s, b_t)
    b_k = b_k / tl.maximum(tl.sqrt(tl.sum(b_k * b_k, 1)), eps)[:, None]
    o_rk = o_r[:, None] * K + o_k[None, :]
    tl.store(written + o_rk, b_k * b_in, mask=mask)
    tl.store(log_decay + o_rk, b_decay, mask=mask)


@triton.jit(do_not_specialize=["R", "T"])
def ddts_gates_bwd_kernel(
    k,
    select,
    temper,
    dwritten,
    dlog_decay,
    dk,
    dselect,
    dtemper,
    eps,
    R,
    T,
    H,
    k_b,
    k_t,
    k_h,
    s_b,
    s_t,
    s_h,
    t_b,
    t_t,
    t_h,
    dw_b,
    dw_t,
    dw_h,
    dg_b,
    dg_t,
    dg_h,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Gradients of the raw projections, contiguous, shaped ``[B, T, H, K]``."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_k = tl.arange(0, BK)
    mask = (o_r < R)[:, None] & (o_k < K)[None, :]
    b_k = load_row(k, o_r, o_k, mask, T, H, k_b, k_t, k_h)
    b_s = load_row(select, o_r, o_k, mask, T, H, s_b, s_t, s_h)
    b_t = load_row(temper, o_r, o_k, mask, T, H, t_b, t_t, t_h)
    b_dw = load_row(dwritten, o_r, o_k, mask, T, H, dw_b, dw_t, dw_h)
    b_dg = load_row(dlog_decay, o_r, o_k, mask, T, H, dg_b, dg_t, dg_h)
    norm = tl.sqrt(tl.sum(b_k * b_k, 1))[:, None]
    b_unit = b_k / tl.maximum(norm, eps)
    b_dunit, b_ds, b_dt = tempered_gate_gradients(b_dw, b_dg, b_unit, b_s, b_t)
    # a norm below eps was replaced by a constant
    along = tl.where(norm > eps, tl.sum(b_unit * b_dunit, 1)[:, None], 0.0)
    b_dk = (b_dunit - b_unit * along) / tl.maximum(norm, eps)
    o_rk = o_r[:, None] * K + o_k[None, :]
    tl.store(dk + o_rk, b_dk.to(dk.dtype.element_ty), mask=mask)
    tl.store(dselect + o_rk, b_ds.to(dselect.dtype.element_ty), mask=mask)
    tl.store(dtemper + o_rk, b_dt.to(dtemper.dtype.element_ty), mask=mask)


def gates(k, select, temper, *, eps):
    """The contract is that of :func:`rodimus_kernels.ddts_gates`."""
    check_runs_here("ddts_gates", k, select, temper)
    return torch.ops.rodimus.ddts_gates(k, select, temper, eps)


def _four_dims(x):
    """``[B, T, H, K]`` for any leading dimensions; a slice of a projection is not copied."""
    return unit_stride(x if x.dim() == 4 else x.reshape(-1, 1, 1, x.shape[-1]))


def _launch(kernel, inputs, outputs, eps):
    inputs = [_four_dims(x) for x in inputs]
    batch, length, heads, key_dim = inputs[0].shape
    rows, block = batch * length * heads, row_block(key_dim)
    block_rows = max(_ELEMENTS // block, 1)
    kernel[(triton.cdiv(rows, block_rows),)](
        *inputs,
        *outputs,
        eps,
        rows,
        length,
        heads,
        *strides(*inputs),
        K=key_dim,
        BK=block,
        BR=block_rows,
        num_warps=8,
        **FP_FUSION,
    )


@implement("ddts_gates")
def _forward(k, select, temper, eps):
    outputs = [k.new_empty(k.shape, dtype=torch.float32) for _ in range(2)]
    _launch(ddts_gates_fwd_kernel, (k, select, temper), outputs, eps)
    return tuple(outputs)


@implement("ddts_gates_backward")
def _backward(k, select, temper, eps, dwritten, dlog_decay):
    inputs = (k, select, temper, dwritten, dlog_decay)
    outputs = [x.new_empty(x.shape) for x in inputs[:3]]
    _launch(ddts_gates_bwd_kernel, inputs, outputs, eps)
    return tuple(outputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dwritten, dlog_decay):
    grads = torch.ops.rodimus.ddts_gates_backward(*ctx.saved_tensors, ctx.eps, dwritten, dlog_decay)
    return *grads, None


register_gradient("ddts_gates", _autograd, _setup_context)
