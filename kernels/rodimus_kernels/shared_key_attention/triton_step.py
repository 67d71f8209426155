"""One to eight tokens of shared-key attention against the ring cache, in Triton.

A program takes one token of one sequence, the query heads of a key head (at most 16), and a part
of the window: keys are read once for all these heads, each value once, and nothing that is not
visible. The parts are joined by a second, small kernel. New tokens are read from the inputs and
written to their rows by the way: a row that is overwritten holds a token that no query sees any
more, so one launch may do both.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .. import _library  # noqa: F401  (the schemas come first)
from .._triton import FP_FUSION, INTERPRETED, check_runs_here, implement, unit_stride

MAX_DIM = 256
# as many query heads as a tensor core's tile has columns
_HEADS = 16
# keys of a tile: all their values stand in registers
_KEYS = 16
# a part shorter than this costs more to join than it saves
_MIN_KEYS_PER_PART = 64
_PROGRAMS_PER_SM = 2


@triton.jit
def _attend_rows(
    acc,
    top,
    total,
    b_q,
    p_k,
    p_v,
    row_stride_k,
    row_stride_v,
    begin,
    stop,
    first,
    R,
    heads_mask,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    RING: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Keys ``begin .. stop`` through the online softmax.

    ``p_k`` points at row 0 of the key head, ``p_v [1, BH, BDV]`` at row 0 of the value heads; a
    key stands in row ``key % R`` of a ring, else in row ``key - first``.
    """
    o_d = tl.arange(0, BD)
    for n in tl.range(begin, stop, BN, num_stages=2):
        keys = n + tl.arange(0, BN)
        rows = keys % R if RING else keys - first
        seen = keys < stop
        p_rows = p_k + rows[:, None] * row_stride_k + o_d[None, :]
        b_k = tl.load(p_rows, mask=seen[:, None] & (o_d < D)[None, :], other=0.0)
        b_qt = tl.trans(b_q)
        if UPCAST:
            b_k = b_k.to(tl.float32)
            b_qt = b_qt.to(tl.float32)
        b_s = tl.dot(b_k, b_qt, input_precision=PRECISION) * scale
        b_s = tl.where(seen[:, None], b_s, float("-inf"))
        # every tile begins with a visible key, so the maximum is finite
        highest = tl.maximum(top, tl.max(b_s, 0))
        b_p = tl.exp2(b_s - highest[None, :])
        fade = tl.exp2(top - highest)
        p_values = p_v + rows[:, None, None] * row_stride_v
        b_v = tl.load(p_values, mask=seen[:, None, None] & heads_mask, other=0.0)
        acc = acc * fade[:, None] + tl.sum(b_p[:, :, None] * b_v.to(tl.float32), 0)
        total = total * fade + tl.sum(b_p, 0)
        top = highest
    return acc, top, total


@triton.jit
def ring_attention_kernel(
    q,
    k,
    v,
    cache,
    position,
    o,
    lse,
    scale,
    T,
    W,
    R,
    PART,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    c_b,
    c_t,
    H: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``o [parts, B * T, H, DV]`` and ``lse [parts, B * T, H]`` of each part of the window, and the
    new rows of the cache. Grid: parts, key heads times blocks of their query heads, B * T."""
    i_p = tl.program_id(0)
    i_hk = tl.program_id(1) % HK
    i_block = tl.program_id(1) // HK
    i_bt = tl.program_id(2).to(tl.int64)
    i_b = i_bt // T
    i_t = i_bt % T
    # tokens the sequence has seen before this call; the newest visible key is the token itself
    new = tl.load(position + i_b)
    last = new + i_t
    begin = tl.maximum(last - W + 1, 0) + i_p * PART
    stop = tl.minimum(begin + PART, last + 1)

    o_j = i_block * BH + tl.arange(0, BH)
    heads = i_hk + HK * o_j
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BDV)
    is_head = o_j < H // HK
    p_q = q + i_b * q_b + i_t * q_t + heads[:, None] * q_h + o_d[None, :]
    b_q = tl.load(p_q, mask=is_head[:, None] & (o_d < D)[None, :], other=0.0)
    values_mask = is_head[:, None] & (o_v < DV)[None, :]
    acc = tl.zeros([BH, BDV], tl.float32)
    top = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)

    c_row = cache + i_b * c_b
    o_values = (heads % HV)[None, :, None]
    # fmt: off
    acc, top, total = _attend_rows(
        acc, top, total, b_q, c_row + i_hk * D, c_row + HK * D + o_values * DV + o_v[None, None, :],
        c_t, c_t, begin, tl.minimum(stop, new), new, R, values_mask[None, :, :], scale,
        D, DV, BD, BN, True, PRECISION, UPCAST,
    )
    acc, top, total = _attend_rows(
        acc, top, total, b_q, k + i_b * k_b + i_hk * k_h,
        v + i_b * v_b + o_values * v_h + o_v[None, None, :],
        k_t, v_t, tl.maximum(begin, new), stop, new, R, values_mask[None, :, :], scale,
        D, DV, BD, BN, False, PRECISION, UPCAST,
    )
    # fmt: on

    o_rows = (i_p * tl.num_programs(2).to(tl.int64) + i_bt) * H + heads
    # a part behind the newest key is empty: weight 0
    b_o = acc / tl.where(total > 0, total, 1.0)[:, None]
    p_o = o + o_rows[:, None] * DV + o_v[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=values_mask)
    tl.store(lse + o_rows, top + tl.log2(total), mask=is_head)

    if i_p == 0:
        p_row = c_row + (last % R) * c_t
        if i_block == 0:
            b_k = tl.load(k + i_b * k_b + i_t * k_t + i_hk * k_h + o_d, mask=o_d < D, other=0.0)
            tl.store(p_row + i_hk * D + o_d, b_k, mask=o_d < D)
        # every value head is once the number of a query head
        owned = values_mask & (heads < HV)[:, None]
        p_v = v + i_b * v_b + i_t * v_t + heads[:, None] * v_h + o_v[None, :]
        p_values = p_row + HK * D + heads[:, None] * DV + o_v[None, :]
        tl.store(p_values, tl.load(p_v, mask=owned, other=0.0), mask=owned)


@triton.jit
def join_parts_kernel(
    parts,
    lse,
    o,
    PARTS,
    H: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BP: tl.constexpr,
):
    """``o [B * T, H, DV]`` from the parts, weighted by their sums of exponentials. Grid: heads,
    B * T."""
    i_h = tl.program_id(0)
    i_bt = tl.program_id(1).to(tl.int64)
    o_p = tl.arange(0, BP)
    o_v = tl.arange(0, BDV)
    rows = (o_p * tl.num_programs(1).to(tl.int64) + i_bt) * H + i_h
    b_lse = tl.load(lse + rows, mask=o_p < PARTS, other=float("-inf"))
    weight = tl.exp2(b_lse - tl.max(b_lse, 0))
    mask = (o_p < PARTS)[:, None] & (o_v < DV)[None, :]
    b_o = tl.load(parts + rows[:, None] * DV + o_v[None, :], mask=mask, other=0.0)
    b_o = tl.sum(b_o * (weight / tl.sum(weight, 0))[:, None], 0)
    p_o = o + (i_bt * H + i_h) * DV + o_v
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=o_v < DV)


def split_window(window: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """``(parts, keys a part)``: enough parts to fill the GPU, none too short to be worth it."""
    parts = max(_PROGRAMS_PER_SM * multiprocessors // programs, 1)
    parts = min(parts, triton.cdiv(window, _MIN_KEYS_PER_PART))
    part = triton.cdiv(triton.cdiv(window, parts), _KEYS) * _KEYS
    return triton.cdiv(window, part), part


def step(q, k, v, cache, position, *, window_size, scale):
    """``shared_key_attention_step`` in Triton; the contract is that of
    :func:`rodimus_kernels.shared_key_attention_step`.

    Raises:
        ValueError: D or Dv is above ``MAX_DIM``, dtypes differ or are not float32, bfloat16 or
            float16, the cache's rows are not dense, or the tensors are not where Triton runs.
    """
    check_runs_here("shared_key_attention_step", q, k, v, cache)
    dtypes = [x.dtype for x in (q, k, v, cache)]
    if len(set(dtypes)) > 1:
        raise ValueError(
            "shared_key_attention_step(impl='triton'): expected q, k, v and cache of one dtype,"
            f" got {dtypes}"
        )
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        raise ValueError(
            f"shared_key_attention_step(impl='triton'): expected D and Dv up to {MAX_DIM},"
            f" got D = {q.shape[-1]}, Dv = {v.shape[-1]}"
        )
    if cache.stride(-1) != 1:
        raise ValueError(f"cache must have dense rows, got strides {cache.stride()}")
    return torch.ops.rodimus.ring_attention(q, k, v, cache, position, window_size, scale)


@functools.cache
def _multiprocessors(device):
    """1 in the interpreter: nothing runs side by side."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@implement("ring_attention")
def _step(q, k, v, cache, position, window_size, scale):
    q, k, v = (unit_stride(x) for x in (q, k, v))
    (batch, steps, heads, dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    key_heads, tokens = k.shape[2], batch * steps
    groups = key_heads * triton.cdiv(heads // key_heads, _HEADS)
    parts, part = split_window(window_size, groups * tokens, _multiprocessors(q.device))
    o = v.new_empty((batch, steps, heads, value_dim))
    partial = o
    if parts > 1:
        partial = v.new_empty((parts, *o.shape), dtype=torch.float32)
    lse = q.new_empty((parts, tokens, heads), dtype=torch.float32)
    block_dim = lambda size: max(triton.next_power_of_2(size), 16)
    ring_attention_kernel[(parts, groups, tokens)](
        *(q, k, v, cache, position, partial, lse, scale * math.log2(math.e)),
        *(steps, window_size, cache.shape[1], part),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cache.stride()[:2]),
        H=heads,
        HK=key_heads,
        HV=value_heads,
        D=dim,
        DV=value_dim,
        BH=_HEADS,
        BD=block_dim(dim),
        BDV=block_dim(value_dim),
        BN=_KEYS,
        PRECISION="tf32x3" if v.dtype == torch.float32 else "tf32",
        UPCAST=INTERPRETED and v.dtype == torch.bfloat16,
        num_warps=8,
        **FP_FUSION,
    )
    if parts > 1:
        join_parts_kernel[(heads, tokens)](
            *(partial, lse, o, parts),
            H=heads,
            DV=value_dim,
            BDV=block_dim(value_dim),
            BP=triton.next_power_of_2(parts),
            num_warps=4,
            **FP_FUSION,
        )
    return o


def aot_launches(everything: bool):
    """Calls that launch every kernel of this file, for ``benchmarks/aot.py``: name and function.

    Args:
        everything: other head dimensions and dtypes, not only the models' own.
    """
    cases = [(128, torch.bfloat16)]
    if everything:
        cases += [(64, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)]
    for dim, dtype in cases:
        name = f"D{dim} {str(dtype).removeprefix('torch.')}"
        yield name, functools.partial(_aot_step, dim, dtype)


def _aot_step(dim, dtype):
    q, k, v = (torch.empty(1, 1, heads, dim, dtype=dtype) for heads in (16, 1, 16))
    cache = torch.empty(1, 2112, 17 * dim, dtype=dtype)
    torch.ops.rodimus.ring_attention(q, k, v, cache, torch.tensor([5000]), 2049, 0.1)
    parts = torch.empty(4, *v.shape)
    join_parts_kernel[(16, 1)](
        *(parts, torch.empty(4, 1, 16), v, 4), H=16, DV=dim, BDV=dim, BP=4, num_warps=4, **FP_FUSION
    )
