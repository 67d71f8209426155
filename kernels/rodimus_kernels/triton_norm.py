"""The norms in Triton, forward and backward: one pass over the rows each way.

A program keeps a row, of up to ``TRITON_NORM_WIDTH`` elements, in registers. In the backward it
walks over rows ``id, id + programs, ...`` while the next ones are loading; the gradients of weights
are summed per program and then over programs in a fixed order, without atomics. No statistics are
saved: the backward computes the row's mean square again.
"""

import torch
import triton
import triton.language as tl

from ._schemas import TRITON_NORM_WIDTH, register_gradient
from ._triton import FP_FUSION, as_rows, capability, check_runs_here, implement, row_block, sigmoid

# programs of a backward pass, and rows of each in flight or in registers: nearly the best of one to
# three rows, four to sixteen elements and 132 to 1056 programs on an H200, for 32768 rows of 4096
# (gated) and of 2048
_PROGRAMS, _ROWS = 264, 3
# elements per thread in a row of up to 4096; the backward holds five values per element, and sums
_FORWARD_ELEMENTS, _BACKWARD_ELEMENTS = 16, 8
# wider rows: fewer warps, which use all registers, and less shared memory for rows in flight
_WIDE, _WIDE_ELEMENTS = 4096, 32
# most columns of a block in the backward of a plain row; in that of a gated row it is _WIDE
_PLAIN_WIDE = 8192


@triton.jit
def normalized(b_x, D: tl.constexpr, eps):
    """``x / rms`` of a row; columns past D must be zero."""
    return b_x * (1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps))


@triton.jit
def normalized_backward(b_dn, b_x, r_square, r_dot, D: tl.constexpr, eps):
    """``(x / rms, gradient of x)`` for a block of a row, from the gradient of ``x / rms`` and the
    ``(sum x^2, sum dn x)`` of the whole row."""
    r_rms = 1.0 / tl.sqrt(r_square / D + eps)
    b_n = b_x * r_rms
    # r_dot is a sum with x rather than n, so it does not have to wait for r_rms
    return b_n, r_rms * (b_dn - b_n * (r_rms * (r_dot / D)))


@triton.jit
def add_rms_norm_fwd_kernel(
    x, residual, weight, y, stream, eps, x_t, residual_t, D: tl.constexpr, BD: tl.constexpr
):
    """``stream = residual + x`` (or ``x`` alone without a residual), ``y = rms_norm(stream)``."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    mask = o_d < D
    b_x = tl.load(x + i_t * x_t + o_d, mask=mask, other=0.0)
    if residual is not None:
        b_r = tl.load(residual + i_t * residual_t + o_d, mask=mask, other=0.0).to(tl.float32)
        # the interpreter adds bf16 wrongly; a sum of two numbers has the same bits through fp32
        b_x = (b_x.to(stream.dtype.element_ty).to(tl.float32) + b_r).to(stream.dtype.element_ty)
        tl.store(stream + i_t * D + o_d, b_x, mask=mask)
    b_n = normalized(b_x.to(tl.float32), D, eps)
    b_w = tl.load(weight + o_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + i_t * D + o_d, (b_n * b_w).to(y.dtype.element_ty), mask=mask)


@triton.jit
def rounded_sum(b_x, b_residual, b_rw):
    """``x + residual * residual_weight`` in fp32, rounded as x is."""
    return (b_x.to(tl.float32) + b_residual * b_rw).to(b_x.dtype).to(tl.float32)


@triton.jit
def row_sums(x, gate, weight, residual, residual_weight, dy, D: tl.constexpr, BD: tl.constexpr):
    """``(sum h^2, sum dy w h)`` of a row ``h`` that is cut into blocks, with or without gate and
    residual; the program of each block reads the whole row."""
    r_square = 0.0
    r_dot = 0.0
    for first in tl.static_range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        mask = o_d < D
        b_x = tl.load(x + o_d, mask=mask, other=0.0)
        b_h = b_x.to(tl.float32)
        if residual is not None:
            b_rw = tl.load(residual_weight + o_d, mask=mask, other=0.0).to(tl.float32)
            b_residual = tl.load(residual + o_d, mask=mask, other=0.0).to(tl.float32)
            b_h = rounded_sum(b_x, b_residual, b_rw)
        if gate is not None:
            b_gate = tl.load(gate + o_d, mask=mask, other=0.0).to(tl.float32)
            b_h = b_h * (b_gate * sigmoid(b_gate))
        b_w = tl.load(weight + o_d, mask=mask, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + o_d, mask=mask, other=0.0).to(tl.float32)
        r_square += tl.sum(b_h * b_h, 0)
        r_dot += tl.sum(b_dy * b_w * b_h, 0)
    return r_square, r_dot


@triton.jit(do_not_specialize=["T"])
def rms_norm_bwd_kernel(
    stream,
    weight,
    dy,
    dstream,
    dx,
    dbranch,
    dweight,
    eps,
    T,
    stream_t,
    dy_t,
    dstream_t,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``dx`` of the normalised stream, plus ``dstream`` if the stream has other uses; ``dbranch``
    is the same in the dtype of the branch that was added. A program takes a block of ``BD`` columns
    or, if it is no wider, the whole row."""
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = o_d < D
    b_w = tl.load(weight + o_d, mask=mask, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BD], tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for i_t in tl.range(first, T, tl.num_programs(0), num_stages=ROWS):
        b_x = tl.load(stream + i_t * stream_t + o_d, mask=mask, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + i_t * dy_t + o_d, mask=mask, other=0.0).to(tl.float32)
        if BD < D:
            p_x, p_dy = stream + i_t * stream_t, dy + i_t * dy_t
            r_square, r_dot = row_sums(p_x, None, weight, None, None, p_dy, D, BD)
        else:
            r_square, r_dot = tl.sum(b_x * b_x, 0), tl.sum(b_dy * b_w * b_x, 0)
        b_n, b_dx = normalized_backward(b_dy * b_w, b_x, r_square, r_dot, D, eps)
        b_dw += b_dy * b_n
        if dstream is not None:
            b_dx += tl.load(dstream + i_t * dstream_t + o_d, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + i_t * D + o_d, b_dx.to(dx.dtype.element_ty), mask=mask)
        if dbranch is not None:
            tl.store(dbranch + i_t * D + o_d, b_dx.to(dbranch.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0) * D + o_d, b_dw, mask=mask)


@triton.jit
def gated_rms_norm_fwd_kernel(
    x,
    gate,
    weight,
    residual,
    residual_weight,
    y,
    eps,
    x_t,
    gate_t,
    residual_t,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """``rms_norm((x + residual * residual_weight) * silu(gate)) * weight``, one row per program."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    mask = o_d < D
    b_x = tl.load(x + i_t * x_t + o_d, mask=mask, other=0.0)
    b_gate = tl.load(gate + i_t * gate_t + o_d, mask=mask, other=0.0).to(tl.float32)
    b_z = b_x.to(tl.float32)
    if residual is not None:
        b_rw = tl.load(residual_weight + o_d, mask=mask, other=0.0).to(tl.float32)
        p_residual = residual + i_t * residual_t + o_d
        b_residual = tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
        b_z = rounded_sum(b_x, b_residual, b_rw)
    b_n = normalized(b_z * (b_gate * sigmoid(b_gate)), D, eps)
    b_w = tl.load(weight + o_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + i_t * D + o_d, (b_n * b_w).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def gated_rms_norm_bwd_kernel(
    x,
    gate,
    weight,
    residual,
    residual_weight,
    dy,
    dx,
    dgate,
    dresidual,
    dweight,
    dresidual_weight,
    eps,
    T,
    x_t,
    gate_t,
    residual_t,
    dy_t,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """All gradients of :func:`gated_rms_norm_fwd_kernel`; those of the weights are per program. A
    program takes a block of ``BD`` columns or, if it is no wider, the whole row."""
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = o_d < D
    b_w = tl.load(weight + o_d, mask=mask, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BD], tl.float32)
    if residual is not None:
        b_rw = tl.load(residual_weight + o_d, mask=mask, other=0.0).to(tl.float32)
        b_drw = tl.zeros([BD], tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for i_t in tl.range(first, T, tl.num_programs(0), num_stages=ROWS):
        b_x = tl.load(x + i_t * x_t + o_d, mask=mask, other=0.0)
        b_gate = tl.load(gate + i_t * gate_t + o_d, mask=mask, other=0.0).to(tl.float32)
        b_z = b_x.to(tl.float32)
        if residual is not None:
            p_residual = residual + i_t * residual_t + o_d
            b_residual = tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
            b_z = rounded_sum(b_x, b_residual, b_rw)
        b_sigmoid = sigmoid(b_gate)
        b_silu = b_gate * b_sigmoid
        b_h = b_z * b_silu
        b_dy = tl.load(dy + i_t * dy_t + o_d, mask=mask, other=0.0).to(tl.float32)
        if BD < D:
            p_residual = residual if residual is None else residual + i_t * residual_t
            r_square, r_dot = row_sums(
                x + i_t * x_t,
                gate + i_t * gate_t,
                weight,
                p_residual,
                residual_weight,
                dy + i_t * dy_t,
                D,
                BD,
            )
        else:
            r_square, r_dot = tl.sum(b_h * b_h, 0), tl.sum(b_dy * b_w * b_h, 0)
        b_n, b_dh = normalized_backward(b_dy * b_w, b_h, r_square, r_dot, D, eps)
        b_dw += b_dy * b_n
        b_dz = b_dh * b_silu
        b_dgate = b_dh * (b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))) * b_z
        tl.store(dx + i_t * D + o_d, b_dz.to(dx.dtype.element_ty), mask=mask)
        tl.store(dgate + i_t * D + o_d, b_dgate.to(dgate.dtype.element_ty), mask=mask)
        if residual is not None:
            p_dresidual = dresidual + i_t * D + o_d
            tl.store(p_dresidual, (b_dz * b_rw).to(dresidual.dtype.element_ty), mask=mask)
            b_drw += b_dz * b_residual
    tl.store(dweight + tl.program_id(0) * D + o_d, b_dw, mask=mask)
    if residual is not None:
        tl.store(dresidual_weight + tl.program_id(0) * D + o_d, b_drw, mask=mask)


def rms_norm(x, weight, *, eps):
    """The contract is that of :func:`rodimus_kernels.rms_norm`."""
    _check("rms_norm", x, weight)
    return torch.ops.rodimus.rms_norm_rows(x, weight.contiguous(), eps)


def add_rms_norm(x, residual, weight, *, eps):
    """The contract is that of :func:`rodimus_kernels.add_rms_norm`."""
    _check("add_rms_norm", x, residual, weight)
    return torch.ops.rodimus.add_rms_norm_rows(x, residual, weight.contiguous(), eps)


def gated_rms_norm(x, gate, weight, *, eps, residual=None, residual_weight=None):
    """The contract is that of :func:`rodimus_kernels.gated_rms_norm`."""
    given = [t for t in (residual, residual_weight) if t is not None]
    _check("gated_rms_norm", x, gate, weight, *given)
    # the kernels index vectors with stride 1
    weight = weight.contiguous()
    residual_weight = None if residual_weight is None else residual_weight.contiguous()
    return torch.ops.rodimus.gated_rms_norm_rows(x, gate, weight, eps, residual, residual_weight)


def _check(operator, *tensors):
    check_runs_here(operator, *tensors)
    if tensors[0].shape[-1] > TRITON_NORM_WIDTH:
        raise ValueError(
            f"{operator}: Triton takes up to D = {TRITON_NORM_WIDTH}, got {tensors[0].shape[-1]}"
        )


def _tile(width, elements):
    """One row in a program's registers, ``elements`` per thread as far as warps allow."""
    block = row_block(width)
    warps = max(1, min(block // (32 * elements), 16))
    return {"D": width, "BD": block, "num_warps": warps, **FP_FUSION}


def _backward_tile(width, x):
    """Like :func:`_tile`, with rows in flight; one fewer where a thread block has only 99 KiB."""
    tile = _tile(width, _WIDE_ELEMENTS if width > _WIDE else _BACKWARD_ELEMENTS)
    rows = min(_ROWS, 2 * _WIDE // tile["BD"] + 1) - (capability(x) == 86)
    return {**tile, "ROWS": max(rows, 1)}


def _backward_blocks(width, widest, x):
    """Programs per row, and the tile of each. The registers cannot hold all values of a row that is
    wider than the widest block. Its blocks, each with the sums over the whole row, leave no room
    for rows in flight."""
    tile = _backward_tile(min(width, widest), x)
    blocks = triton.cdiv(width, tile["BD"])
    return blocks, {**tile, "D": width, "ROWS": 1 if blocks > 1 else tile["ROWS"]}


def _like(x, dtype=None):
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _row_stride(x):
    return 0 if x is None else x.stride(0)


def _partial_sums(rows, width, like):
    return like.new_empty((min(rows, _PROGRAMS), width), dtype=torch.float32)


@implement("rms_norm_rows")
def _rms_norm(x, weight, eps):
    rows, y = as_rows(x), _like(x, weight.dtype)
    add_rms_norm_fwd_kernel[(rows.shape[0],)](
        rows,
        None,
        weight,
        y,
        None,
        eps,
        rows.stride(0),
        0,
        **_tile(x.shape[-1], _FORWARD_ELEMENTS),
    )
    return y


@implement("add_rms_norm_rows")
def _add_rms_norm(x, residual, weight, eps):
    rows, streams = as_rows(x), as_rows(residual)
    y, stream = _like(x, weight.dtype), _like(residual)
    add_rms_norm_fwd_kernel[(rows.shape[0],)](
        rows,
        streams,
        weight,
        y,
        stream,
        eps,
        rows.stride(0),
        streams.stride(0),
        **_tile(x.shape[-1], _FORWARD_ELEMENTS),
    )
    return y, stream


@implement("rms_norm_rows_backward")
def _rms_norm_backward(stream, weight, eps, dy, dstream, branch):
    rows, dys, dstreams = as_rows(stream), as_rows(dy), as_rows(dstream)
    dx, dweight = _like(stream), _partial_sums(*rows.shape, rows)
    dbranch = None if branch is None else _like(stream, branch)
    blocks, tile = _backward_blocks(stream.shape[-1], _PLAIN_WIDE, stream)
    rms_norm_bwd_kernel[(dweight.shape[0], blocks)](
        rows,
        weight,
        dys,
        dstreams,
        dx,
        dbranch,
        dweight,
        eps,
        rows.shape[0],
        rows.stride(0),
        dys.stride(0),
        _row_stride(dstreams),
        **tile,
    )
    dbranch = stream.new_empty(0) if dbranch is None else dbranch
    return dx, dweight.sum(0).to(weight.dtype), dbranch


@implement("gated_rms_norm_rows")
def _gated_rms_norm(x, gate, weight, eps, residual, residual_weight):
    rows, gates, residuals, y = as_rows(x), as_rows(gate), as_rows(residual), _like(x)
    gated_rms_norm_fwd_kernel[(rows.shape[0],)](
        rows,
        gates,
        weight,
        residuals,
        residual_weight,
        y,
        eps,
        rows.stride(0),
        gates.stride(0),
        _row_stride(residuals),
        **_tile(x.shape[-1], _FORWARD_ELEMENTS),
    )
    return y


@implement("gated_rms_norm_rows_backward")
def _gated_rms_norm_backward(x, gate, weight, eps, residual, residual_weight, dy):
    rows, gates, residuals, dys = as_rows(x), as_rows(gate), as_rows(residual), as_rows(dy)
    dx, dgate, dweight = _like(x), _like(gate), _partial_sums(*rows.shape, rows)
    dresidual, dresidual_weight = x.new_empty(0), x.new_empty(0)
    if residual is not None:
        dresidual, dresidual_weight = _like(residual), torch.empty_like(dweight)
    blocks, tile = _backward_blocks(x.shape[-1], _WIDE, x)
    gated_rms_norm_bwd_kernel[(dweight.shape[0], blocks)](
        rows,
        gates,
        weight,
        residuals,
        residual_weight,
        dys,
        dx,
        dgate,
        dresidual,
        dweight,
        dresidual_weight,
        eps,
        rows.shape[0],
        rows.stride(0),
        gates.stride(0),
        _row_stride(residuals),
        dys.stride(0),
        **tile,
    )
    if residual is not None:
        dresidual_weight = dresidual_weight.sum(0).to(residual_weight.dtype)
    return dx, dgate, dweight.sum(0).to(weight.dtype), dresidual, dresidual_weight


def _setup_rms_norm(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _autograd_rms_norm(ctx, dy):
    x, weight = ctx.saved_tensors
    gradients = torch.ops.rodimus.rms_norm_rows_backward(x, weight, ctx.eps, dy, None, None)
    return *gradients[:2], None


def _setup_add_rms_norm(ctx, inputs, output):
    x, _, weight, ctx.eps = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _autograd_add_rms_norm(ctx, dy, dstream):
    stream, weight = ctx.saved_tensors
    if dy is None:
        return (None if dstream is None else dstream.to(ctx.x_dtype)), dstream, None, None
    # a branch with the stream's dtype has the same gradient as the stream
    branch = None if ctx.x_dtype == stream.dtype else ctx.x_dtype
    dstream, dweight, dx = torch.ops.rodimus.rms_norm_rows_backward(
        stream, weight, ctx.eps, dy, dstream, branch
    )
    return (dstream if branch is None else dx), dstream, dweight, None


def _setup_gated_rms_norm(ctx, inputs, output):
    x, gate, weight, ctx.eps, residual, residual_weight = inputs
    ctx.save_for_backward(x, gate, weight, residual, residual_weight)


def _autograd_gated_rms_norm(ctx, dy):
    x, gate, weight, residual, residual_weight = ctx.saved_tensors
    dx, dgate, dweight, *dresidual = torch.ops.rodimus.gated_rms_norm_rows_backward(
        x, gate, weight, ctx.eps, residual, residual_weight, dy
    )
    dresidual = (None, None) if residual is None else dresidual
    return dx, dgate, dweight, None, *dresidual


for _name, _setup, _formula in (
    ("rms_norm", _setup_rms_norm, _autograd_rms_norm),
    ("add_rms_norm", _setup_add_rms_norm, _autograd_add_rms_norm),
    ("gated_rms_norm", _setup_gated_rms_norm, _autograd_gated_rms_norm),
):
    register_gradient(f"{_name}_rows", _formula, _setup)
