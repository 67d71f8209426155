"""The gated activation in Triton: the gradients of both halves are written into one tensor."""

import torch
import triton
import triton.language as tl

from ._schemas import register_gradient
from ._triton import FP_FUSION, as_rows, check_runs_here, implement, row_block, sigmoid

# channels of a program: the best of 512 to 4096 on an H200 for 5632 channels; not timed for the
# 2736 of the 1.6B model, which a single program takes
_CHANNELS = 4096


@triton.jit
def swiglu_fwd_kernel(xg, y, xg_t, D, BD: tl.constexpr):
    """``y [T, D]`` contiguous, from the halves of ``xg [T, 2 D]``; program (token, channels)."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = o_d < D
    b_x = tl.load(xg + i_t * xg_t + o_d, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(xg + i_t * xg_t + D + o_d, mask=mask, other=0.0).to(tl.float32)
    b_y = b_x * (b_g * sigmoid(b_g))
    tl.store(y + i_t * D + o_d, b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(xg, dy, dxg, xg_t, dy_t, D, BD: tl.constexpr):
    """``dxg [T, 2 D]`` contiguous; program (token, channels)."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = o_d < D
    b_x = tl.load(xg + i_t * xg_t + o_d, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(xg + i_t * xg_t + D + o_d, mask=mask, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + i_t * dy_t + o_d, mask=mask, other=0.0).to(tl.float32)
    b_sigmoid = sigmoid(b_g)
    # the gate's factors first: where they are zero, the product of the others may be infinite
    b_dg = b_dy * (b_sigmoid * (1.0 + b_g * (1.0 - b_sigmoid))) * b_x
    p_dx = dxg + i_t * 2 * D + o_d
    tl.store(p_dx, (b_dy * (b_g * b_sigmoid)).to(dxg.dtype.element_ty), mask=mask)
    tl.store(p_dx + D, b_dg.to(dxg.dtype.element_ty), mask=mask)


def swiglu(projection):
    """The contract is that of :func:`rodimus_kernels.swiglu`."""
    check_runs_here("swiglu", projection)
    return torch.ops.rodimus.swiglu(projection)


def _launch(kernel, rows, *args):
    length, width = rows.shape[0], rows.shape[1] // 2
    block = min(_CHANNELS, row_block(width))
    options = {"BD": block, "num_warps": max(block // 512, 1), **FP_FUSION}
    kernel[(length, triton.cdiv(width, block))](rows, *args, width, **options)


@implement("swiglu")
def _forward(projection):
    rows = as_rows(projection)
    y = projection.new_empty((*projection.shape[:-1], projection.shape[-1] // 2))
    _launch(swiglu_fwd_kernel, rows, y, rows.stride(0))
    return y


@implement("swiglu_backward")
def _backward(projection, dy):
    rows, dys = as_rows(projection), as_rows(dy)
    dprojection = projection.new_empty(projection.shape)
    _launch(swiglu_bwd_kernel, rows, dys, dprojection, rows.stride(0), dys.stride(0))
    return dprojection


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dy):
    return torch.ops.rodimus.swiglu_backward(*ctx.saved_tensors, dy)


register_gradient("swiglu", _autograd, _setup_context)
