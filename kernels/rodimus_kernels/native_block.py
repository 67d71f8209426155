"""One token through the blocks of the model with the library of ``csrc/``: one call instead of
dozens per block. On a GPU, shapes that the library does not take are computed with torch's products
and the fused operators between them."""

from itertools import repeat

import torch
import torch.nn.functional as F

from . import native
from .ddts.mixer import ddts_mixer_step
from .norm import add_rms_norm, rms_norm
from .quantized_weight import QUANTIZED
from .reference import outside_autocast
from .shared_key_attention import rope, shared_key_attention_step
from .short_conv import short_conv_step
from .swiglu import swiglu

# as StepLinearLaunch in csrc/cuda/sizes.h: a block's shared memory, and the part without rows of x
_MOST_SHARED, _MOST_FIXED = 99 * 1024, 4 * 16 * (16 * native.MAX_ROWS + native.MAX_ROWS)


def step(
    stream,
    weights,
    taps,
    states,
    rings,
    position,
    rotary,
    *,
    window_size,
    head_dim,
    persistent=False,
    **eps,
):
    """:func:`rodimus_kernels.blocks_step`; on a CPU, eight rows at a time."""
    on_cpu, rows = stream.device.type == "cpu", stream.shape[0]
    sizes = {"window_size": window_size, "head_dim": head_dim}
    if on_cpu and rows > native.MAX_ROWS and not persistent:
        read = (stream, taps, states, rings, position, rotary)
        starts = range(0, rows, native.MAX_ROWS)
        parts = [_rows_of(read, slice(i, i + native.MAX_ROWS)) for i in starts]
        return torch.cat([step(part, weights, *others, **sizes, **eps) for part, *others in parts])
    given = [x for block in weights for x in block if x is not None]
    values = [x.values if type(x) in QUANTIZED else x for x in given]
    scales = [x.scale for x in given if type(x) in QUANTIZED]
    plain_rings = [ring for ring in rings if ring.dtype != torch.uint8]
    native.check("blocks_step", stream, *given, *taps, *states, *plain_rings)
    if rows < 1:
        raise ValueError("blocks_step(impl='native') needs at least one row, got none")
    cos, sin = (None, None) if rotary is None else map(native.dense_rows, rotary)
    position = None if position is None else position.contiguous()
    stream = native.dense_rows(stream)
    one_call = on_cpu or all(
        _is_one_call(rows, block, cos, head_dim, persistent) for block in weights
    )
    if one_call and not (persistent and on_cpu):
        if not on_cpu and not _in_pieces(stream):
            stream = stream.clone(memory_format=torch.contiguous_format)
        numbers = (window_size or 0, head_dim or 0, eps["key_eps"], eps["norm_eps"])
        return torch.ops.rodimus.native_blocks_step(
            stream, values, scales, taps, states, rings, position, cos, sin, *numbers, persistent
        )
    if persistent:
        raise ValueError(
            "blocks_step(impl='persistent') takes bfloat16 weights on a GPU, in rows of a multiple"
            f" of 8, and 1 to {native.MAX_ROWS} rows of x; got {weights[0].conv.dtype} on"
            f" {stream.device.type} and {rows} rows"
        )
    return compose(stream, weights, taps, states, rings, position, rotary, **sizes, **eps)


def _rows_of(given, rows):
    """The given rows of tensors and of lists of tensors; None stays None."""
    if given is None or isinstance(given, torch.Tensor):
        return None if given is None else given[rows]
    return [_rows_of(x, rows) for x in given]


def persistent_step(*arguments, **named):
    """:func:`step` with one kernel per block."""
    return step(*arguments, **named, persistent=True)


def _is_one_call(rows, w, cos, head_dim, persistent) -> bool:
    """Whether the GPU kernels take a whole block: few rows, and weights in 16-byte pieces."""
    streamed = [w.fc, w.query_key, w.mem_gate, w.gate_in, w.mixer_out]
    if w.query is not None:
        streamed += [w.query, w.key, w.value, w.attn_out, w.ffn_in, w.ffn_out]
        if head_dim > native.MAX_CUDA_HEAD_DIM:
            return False
    inputs = [x.shape[1] for x in streamed]
    return (
        rows <= native.MAX_ROWS
        # the persistent kernel asks the GPU itself how much shared memory there is
        and (persistent or _fits_shared(rows, max(inputs)))
        and w.mem_gate.shape[0] <= 2 * native.MAX_CUDA_KEYS
        and all(x.dtype == torch.bfloat16 and x.is_contiguous() for x in (w.gate_out, *streamed))
        and w.mixer_norm.dtype == torch.bfloat16
        and not any(size % 8 for size in inputs)
        and not any(x.data_ptr() % 16 for x in (w.mixer_norm, *streamed))
        and (cos is None or (cos.shape[1] % 8 == 0 and head_dim % 16 == 0))
    )


def _fits_shared(rows, inputs) -> bool:
    return _MOST_FIXED + 2 * rows * (-(-inputs // 64) * 64 + 32) <= _MOST_SHARED


def _in_pieces(x) -> bool:
    """Whether rows start on multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


@outside_autocast
def compose(stream, weights, taps, states, rings, position, rotary, **named):
    """The blocks with torch's products, which read each weight once for all rows."""
    for block in zip(weights, taps, states, rings or repeat(None), strict=False):
        stream = _compose_block(stream, *block, position, rotary, **named)
    return stream


def _compose_block(
    stream, w, taps, state, ring, position, rotary, *, window_size, head_dim, key_eps, norm_eps
):
    # a norm returns the dtype of its own weight
    dtype = w.fc.dtype
    expanded = F.linear(rms_norm(stream, w.mixer_norm, eps=norm_eps).to(dtype), w.fc)
    x, gate = expanded.chunk(2, -1)
    shifted = short_conv_step(x, taps, w.conv, w.conv_bias)
    q, k = F.linear(shifted, w.query_key).chunk(2, -1)
    select, temper = _wide_linear(shifted, w.mem_gate, w.mem_gate_bias).chunk(2, -1)
    y = ddts_mixer_step(
        q,
        k,
        select,
        temper,
        F.linear(x, w.gate_in),
        x,
        shifted,
        gate,
        state,
        gate_weight=w.gate_out,
        gate_bias=w.gate_bias,
        residual_weight=w.residual_weight,
        norm_weight=w.act_norm,
        key_eps=key_eps,
        norm_eps=norm_eps,
    )
    branch = F.linear(y, w.mixer_out)
    if w.query is not None:
        x, stream = add_rms_norm(branch, stream, w.attn_norm, eps=norm_eps)
        x = x.to(dtype)
        q, k, v = (
            F.linear(x, p).unflatten(-1, (1, -1, head_dim)) for p in (w.query, w.key, w.value)
        )
        if rotary is not None:
            tables = [table.unsqueeze(1) for table in rotary]
            q, k = rope(q, *tables), rope(k, *tables)
        o = shared_key_attention_step(q, k, v, ring, position, window_size=window_size)
        x, _ = add_rms_norm(F.linear(o.flatten(1), w.attn_out), stream, w.ffn_norm, eps=norm_eps)
        branch = F.linear(swiglu(F.linear(x.to(dtype), w.ffn_in)), w.ffn_out)
    return stream + branch


def _wide_linear(x, weight, bias):
    """A product whose float32 sums are kept: decays near 1 do not survive bfloat16."""
    if x.dtype == torch.float32 or x.device.type != "cuda":
        return F.linear(x.float(), weight.float(), bias.float())
    return torch.mm(x, weight.t(), out_dtype=torch.float32) + bias
