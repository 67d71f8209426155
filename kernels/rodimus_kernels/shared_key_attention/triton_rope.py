"""Rotary position embedding in Triton: every channel is read once and written once, and the tables
are read once per token for all its heads.

Only the tables are saved for the backward pass: the gradient is rotated back by the same angles.
"""

import torch
import triton
import triton.language as tl

from .._schemas import register_gradient
from .._triton import FP_FUSION, check_runs_here, implement, row_block, unit_stride

# elements of a program's tile: 16 per thread at 4 warps
_TILE = 2048


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    x,
    cos,
    sin,
    y,
    T,
    x_b,
    x_t,
    x_h,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BH: tl.constexpr,
    BHALF: tl.constexpr,
    BREST: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """``y [B, T, H, D]``: the first ``2 * HALF`` channels rotated, the rest copied. Grid: B * T,
    blocks of heads."""
    i_bt = tl.program_id(0).to(tl.int64)
    i_b = i_bt // T
    i_t = i_bt % T
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    o_c = tl.arange(0, BHALF)
    b_cos = tl.load(cos + i_b * cos_b + i_t * cos_t + o_c, mask=o_c < HALF, other=0.0)
    b_sin = tl.load(sin + i_b * sin_b + i_t * sin_t + o_c, mask=o_c < HALF, other=0.0)
    b_cos = b_cos.to(tl.float32)[None, :]
    b_sin = b_sin.to(tl.float32)[None, :]
    if INVERSE:
        b_sin = -b_sin

    p_x = x + i_b * x_b + i_t * x_t + heads[:, None].to(tl.int64) * x_h
    p_y = y + (i_bt * H + heads)[:, None] * D
    mask = (heads < H)[:, None] & (o_c < HALF)[None, :]
    b_first = tl.load(p_x + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    b_second = tl.load(p_x + HALF + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype = y.dtype.element_ty
    tl.store(p_y + o_c[None, :], (b_first * b_cos - b_second * b_sin).to(dtype), mask=mask)
    tl.store(p_y + HALF + o_c[None, :], (b_first * b_sin + b_second * b_cos).to(dtype), mask=mask)
    if 2 * HALF < D:
        o_d = 2 * HALF + tl.arange(0, BREST)
        rest = (heads < H)[:, None] & (o_d < D)[None, :]
        tl.store(p_y + o_d[None, :], tl.load(p_x + o_d[None, :], mask=rest), mask=rest)


def forward(x, cos, sin):
    """``rope`` in Triton; the contract is that of :func:`rodimus_kernels.rope`.

    Raises:
        ValueError: a dtype is not float32, bfloat16 or float16, or Triton does not run on the
            tensors' device.
    """
    check_runs_here("rope", x, cos, sin)
    return torch.ops.rodimus.rope(x, cos, sin, False)


@implement("rope")
def _rope(x, cos, sin, inverse):
    x, cos, sin = (unit_stride(y) for y in (x, cos, sin))
    batch, length, heads, dim = x.shape
    half = cos.shape[-1]
    y = x.new_empty(x.shape)
    block_half = row_block(half)
    block = min(max(_TILE // (2 * block_half), 1), row_block(heads))
    # dimensions of size 1 get step 0: all rows may share one table
    steps = [
        0 if size == 1 else stride
        for table in (cos, sin)
        for size, stride in zip(table.shape[:2], table.stride()[:2], strict=True)
    ]
    if y.numel():
        rope_kernel[(batch * length, triton.cdiv(heads, block))](
            x,
            cos,
            sin,
            y,
            length,
            *x.stride()[:3],
            *steps,
            H=heads,
            D=dim,
            HALF=half,
            BH=block,
            BHALF=block_half,
            BREST=row_block(dim - 2 * half),
            INVERSE=inverse,
            num_warps=4,
            **FP_FUSION,
        )
    return y


def _setup_context(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy):
    return torch.ops.rodimus.rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


register_gradient("rope", _backward, _setup_context)
