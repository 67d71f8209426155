"""Calls that launch every Triton kernel in the shapes of the models, for ``aot.py``: with
uninitialised CPU tensors, because launches are only compiled there."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from rodimus_kernels import reference
from rodimus_kernels._triton import FP_FUSION, capability

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = torch.ops.rodimus


class Case(NamedTuple):
    """A call that launches kernels of a module."""

    module: str
    name: str
    call: Callable[[], object]


def cases(*, everything: bool) -> Iterator[Case]:
    """Imports every module and yields its cases: in the shapes and dtypes of the models, and with
    ``everything`` in others as well."""
    for module, make in MODULES.items():
        importlib.import_module(f"rodimus_kernels.{module}")
        for name, call, is_models in make():
            if is_models or everything:
                yield Case(module, name, call)


def _text(dtype):
    return str(dtype).removeprefix("torch.")


def _ddts_chunk():
    others = [(16, 64), (32, 512), (64, 6144), (128, 4096), (256, 4096), (64, 16)]
    shapes = [(64, 4096, BF16), *((*shape, BF16) for shape in others)]
    # not float32 with K = 256: it spills, and the dispatch of ddts does not choose it
    shapes += [(keys, 4096, dtype) for keys in (16, 32, 64, 128) for dtype in (FP32, FP16)]
    shapes += [(256, 4096, FP16), (16, 64, FP32), (16, 64, FP16)]
    for i, (keys, values, dtype) in enumerate(shapes):
        name = f"K{keys} V{values} {_text(dtype)}"
        yield f"{name} training", partial(_train_ddts, keys, values, dtype, gated=False), i == 0
        if dtype != FP32 and keys <= 128:
            # the others spill, and the dispatch of gated_ddts does not choose them
            call = partial(_train_ddts, keys, values, dtype, gated=True)
            yield f"{name} gates inside", call, i == 0
    # not K = 16 in float32, which spills on sm_80 with every tile
    packed = [
        (64, 4096, BF16),
        (16, 64, BF16),
        (16, 4096, FP16),
        *((keys, 4096, dtype) for keys in (32, 64) for dtype in (FP32, FP16)),
    ]
    for i, (keys, values, dtype) in enumerate(packed):
        name = f"K{keys} V{values} {_text(dtype)} packed"
        yield name, partial(_train_packed_ddts, keys, values, dtype), i == 0
    yield "K64 V4096 bfloat16 segments", partial(_walk_segments, 64, 4096), True


def _ddts_inputs(keys, values, dtype):
    q, k = (torch.empty(1, 128, 1, keys, dtype=dtype) for _ in range(2))
    return q, k, torch.empty(1, 128, 1, values, dtype=dtype), torch.empty(q.shape)


def _train_ddts(keys, values, dtype, gated):
    inputs = _ddts_inputs(keys, values, dtype)
    inputs = (*inputs, inputs[3].clone() if gated else None, 1e-5, 1.0)
    o, state, states = OPS.ddts_chunk(*inputs, None, None, None, True)
    OPS.ddts_chunk_backward(*inputs, None, None, states, o, state)


def _train_packed_ddts(keys, values, dtype):
    inputs, bounds = _ddts_inputs(keys, values, dtype), torch.tensor([0, 70, 128])
    inputs, state = (*inputs, None, 0.0, 1.0), torch.empty(2, 1, keys, values)
    o, state, states = OPS.ddts_chunk(*inputs, state, None, bounds, True)
    OPS.ddts_chunk_backward(*inputs, None, bounds, states, o, state)


def _walk_segments(keys, values):
    from rodimus_kernels.ddts import triton_chunk as chunk

    q, k, v, g = _ddts_inputs(keys, values, BF16)
    columns = chunk._columns(1, q.shape[1], None)
    tma = chunk.use_tma(v, BF16, columns)
    tile = chunk.walk_tile(keys, values, BF16, tma, capability(v), False)
    tiles = chunk._prepare(chunk._keys(q, k, g, None, 0.0, 1.0, None), v, columns)
    run = chunk._walk_launcher(v, tiles, columns, tile, 1, tma=tma, reverse=False)
    chunk._segment_states(run, v, tiles, None, 1, 2)


def _ddts_gates():
    for keys in (64, 16, 256):
        yield f"K{keys} bfloat16", partial(_train_gates, keys), keys == 64


def _train_gates(keys):
    raw = torch.empty(1, 128, 1, 4 * keys, dtype=BF16).split(keys, dim=-1)
    written, log_decay = OPS.ddts_gates(*raw[1:], 1e-5)
    OPS.ddts_gates_backward(*raw[1:], 1e-5, written, log_decay)


def _ddts_recurrent():
    for keys in (64, 16, 256):
        yield f"K{keys} V4096 bfloat16", partial(_step_ddts, keys), keys == 64


def _step_ddts(keys):
    q, v = (torch.empty(2, 32, 1, n, dtype=BF16) for n in (keys, 4096))
    _, state = OPS.ddts_recurrent(q, q, v, q.float(), 0.125, None, None)
    OPS.ddts_recurrent_step(q[:, 0], q[:, 0], v[:, 0], q[:, 0].float(), state, 0.125)


def _norm():
    shapes = [(4096, True, BF16), (2048, True, BF16), (6144, True, BF16)]
    shapes += [(4096, False, BF16), (4096, True, FP32)]
    shapes += [(16384, residual, dtype) for residual in (True, False) for dtype in (BF16, FP32)]
    for i, (width, residual, dtype) in enumerate(shapes):
        name = f"D{width} {_text(dtype)}" + ("" if residual else " without residual")
        yield name, partial(_train_norms, width, residual, dtype), i == 0


def _train_norms(width, residual, dtype):
    x, weight = torch.empty(16, width, dtype=dtype), torch.empty(width)
    if residual:
        y, stream = OPS.add_rms_norm_rows(x, x.float(), weight, 1e-5)
        OPS.rms_norm_rows_backward(stream, weight, 1e-5, y, stream, x.dtype)
    else:
        y = OPS.rms_norm_rows(x, weight, 1e-5)
        OPS.rms_norm_rows_backward(x, weight, 1e-5, y, None, None)
    extra = (x, weight) if residual else (None, None)
    y = OPS.gated_rms_norm_rows(x, x, weight, 1e-5, *extra)
    OPS.gated_rms_norm_rows_backward(x, x, weight, 1e-5, *extra, y)


def _conv():
    yield "D4096 W4 bfloat16", partial(_train_conv, None), True
    yield "D4096 W4 bfloat16 packed", partial(_train_conv, torch.tensor([0, 10, 32])), False


def _train_conv(cu_seqlens):
    x = torch.empty(1, 32, 8192, dtype=BF16)[..., :4096]
    weight, bias = torch.empty(4096, 4, dtype=BF16), torch.empty(4096, dtype=BF16)
    h0 = torch.empty(1 if cu_seqlens is None else 2, 4096, 4, dtype=BF16)
    y = OPS.short_conv(x, weight, bias, h0, cu_seqlens, None)
    OPS.short_conv_backward(x, weight, bias, h0, cu_seqlens, None, y)


def _input_gate():
    shapes = [(4096, 32, BF16), (6144, 48, BF16), (4096, 32, FP32)]
    shapes += [(10240, 128, BF16), (10240, 128, FP32)]
    for i, (width, rank, dtype) in enumerate(shapes):
        name = f"D{width} R{rank} {_text(dtype)}"
        yield name, partial(_train_input_gate, width, rank, dtype), i == 0


def _train_input_gate(width, rank, dtype):
    x = torch.empty(128, 2 * width, dtype=dtype)[:, :width]
    hidden = torch.empty(128, rank, dtype=dtype)
    weight, bias = torch.empty(width, rank, dtype=dtype), torch.empty(width, dtype=dtype)
    y = OPS.input_gate(x, hidden, weight, bias)
    OPS.input_gate_backward(x, hidden, weight, bias, y)


def _swiglu():
    for dtype in (BF16, FP32):
        yield _text(dtype), partial(_train_swiglu, dtype), dtype == BF16


def _train_swiglu(dtype):
    projection = torch.empty(16, 2 * 2736, dtype=dtype)
    OPS.swiglu_backward(projection, OPS.swiglu(projection))


def _cross_entropy():
    for dtype in (BF16, FP32):
        yield f"V126464 {_text(dtype)}", partial(_loss_of_rows, dtype), dtype == BF16


def _loss_of_rows(dtype):
    logits, labels = torch.empty(16, 126464, dtype=dtype), torch.zeros(16, dtype=torch.long)
    OPS.cross_entropy_rows(logits, labels, 0.1, -100, True)


def _attention():
    shapes = [(128, BF16), (64, BF16), (256, BF16), (96, BF16), (128, FP16), (128, FP32)]
    for i, (dim, dtype) in enumerate(shapes):
        for bounds in (None, torch.tensor([0, 100, 300])):
            name = f"D{dim} {_text(dtype)}" + ("" if bounds is None else " packed")
            yield name, partial(_train_attention, dim, dim, dtype, bounds), i == 0
    yield "D16 Dv80 bfloat16", partial(_train_attention, 16, 80, BF16, None), False


def _train_attention(dim, value_dim, dtype, bounds):
    sizes = ((16, dim), (1, dim), (16, value_dim))
    q, k, v = (torch.empty(1, 300, *size, dtype=dtype) for size in sizes)
    o, lse = OPS.shared_key_attention(q, k, v, 130, 0.1, bounds)
    OPS.shared_key_attention_backward(q, k, v, 130, 0.1, bounds, o, lse, o)


def _rope():
    shapes = [(128, 64, BF16), (128, 32, BF16), (96, 48, BF16), (128, 64, FP32)]
    for i, (dim, half, dtype) in enumerate(shapes):
        yield f"D{dim} of {2 * half} {_text(dtype)}", partial(_turn, dim, half, dtype), i == 0


def _turn(dim, half, dtype):
    x, table = torch.empty(1, 300, 16, dim, dtype=dtype), torch.empty(1, 300, half, dtype=dtype)
    for inverse in (False, True):
        OPS.rope(x, table, table, inverse)


def _ring():
    for i, (dim, dtype) in enumerate([(128, BF16), (64, BF16), (256, BF16), (128, FP32)]):
        for int8 in (False, True):
            name = f"D{dim} {_text(dtype)}" + " int8" * int8
            yield name, partial(_step_attention, dim, dtype, int8), i == 0


def _step_attention(dim, dtype, int8):
    from rodimus_kernels.shared_key_attention import triton_step

    q, k, v = (torch.empty(1, 1, heads, dim, dtype=dtype) for heads in (16, 1, 16))
    cache = torch.empty(1, 2112, 17 * dim, dtype=dtype)
    if int8:
        row = reference.int8_row_bytes(1, dim, 16, dim, dtype)
        cache = torch.empty(1, 2112, row, dtype=torch.uint8)
    OPS.ring_attention(q, k, v, cache, torch.tensor([5000]), 2049, 0.1)
    # on a CPU the launcher makes a single part, so the kernel that joins parts is launched here
    parts, lse = torch.empty(129, *v.shape), torch.empty(129, 1, 16)
    sizes = {"H": 16, "DV": dim, "BDV": dim, "BP": 256, "BN": triton_step._JOINED}
    triton_step.join_parts_kernel[(16, 1)](parts, lse, v, 129, **sizes, num_warps=4, **FP_FUSION)


MODULES = {
    "ddts.triton_chunk": _ddts_chunk,
    "ddts.triton_gates": _ddts_gates,
    "ddts.triton_recurrent": _ddts_recurrent,
    "triton_norm": _norm,
    "triton_conv": _conv,
    "triton_input_gate": _input_gate,
    "triton_swiglu": _swiglu,
    "triton_cross_entropy": _cross_entropy,
    "shared_key_attention.triton_attention": _attention,
    "shared_key_attention.triton_rope": _rope,
    "shared_key_attention.triton_step": _ring,
}
