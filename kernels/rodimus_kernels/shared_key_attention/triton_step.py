"""One to eight tokens of shared-key attention against the ring cache, in Triton.

A program takes one token of one sequence, the query heads of a key head (at most 16), and a part
of the window: keys are read once for all these heads, each value once, and invisible rows not at
all. The parts are joined by a second, small kernel. The program that sees new tokens writes their
rows first: a row that is overwritten holds a token that no query sees any more, so one launch can
write and read.
"""

import math

import torch
import triton
import triton.language as tl

from .. import _schemas, reference  # noqa: F401  (the schemas come first)
from .._triton import (
    FP_FUSION,
    block_dim,
    check_grid,
    check_runs_here,
    implement,
    multiprocessors,
    unit_stride,
)

MAX_DIM = 256
# query heads of a program: 16 threads hold a head of 128 channels, so these are 8 warps
_HEADS = 16
# keys of a tile: their keys and values are loaded into registers together. With few of them, many
# programs share a multiprocessor: 564 us with 4, 848 us with 8 (H200, 256 sequences).
_KEYS = 4
# a part shorter than this costs more to join than it saves
_MIN_KEYS_PER_PART = 16
_PROGRAMS_PER_SM = 4
# parts that the second kernel reads together
_JOINED = 16


@triton.jit
def quantize_values(b_v):
    """Steps ``[BH, BDV]`` and scale ``[BH]`` of values in fp32, both in fp32 and bitwise equal to
    those of :func:`rodimus_kernels.reference.quantize_values`."""
    # magnitudes are in the order of their bits, with NaN above infinity above all numbers
    largest = tl.max(b_v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale = largest.to(tl.float32, bitcast=True) * (1.0 / 127.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    scale = scale.to(tl.bfloat16).to(tl.float32)
    scale = tl.where(largest < 0x7F800000, scale, float("nan"))
    usable = scale > 0
    b_steps = tl.div_rn(b_v, tl.broadcast_to(tl.where(usable, scale, 1.0)[:, None], b_v.shape))
    # adding 1.5 * 2 ** 23 rounds to an integer, ties to even
    b_steps = tl.where(usable[:, None], b_steps, 0.0) + 12582912.0
    return b_steps - 12582912.0, scale


@triton.jit
def store_quantized(p_steps, p_scale, b_v, mask, is_head, BH: tl.constexpr, BDV: tl.constexpr):
    """Store values ``[BH * BDV]`` of BH heads in 8 bits, and a scale for each head."""
    b_steps, b_scale = quantize_values(tl.reshape(b_v.to(tl.float32), (BH, BDV)))
    tl.store(p_steps, tl.reshape(b_steps, (BH * BDV,)).to(tl.int8), mask=mask)
    tl.store(p_scale, b_scale.to(p_scale.dtype.element_ty), mask=is_head)


@triton.jit
def add_keys(acc, top, total, b_s, b_v, b_scales):
    """``(acc [BH, BDV], top [BH], total [BH])`` of a softmax with BN more keys, from their scores
    ``[BN, BH]``, -inf where there is no key, and values ``[BN, BH * BDV]``, which are in steps of
    ``b_scales [BN, BH]`` unless that is None."""
    # every tile begins with a visible key, so the maximum is finite
    highest = tl.maximum(top, tl.max(b_s, 0))
    b_p = tl.exp2(b_s - highest[None, :])
    fade = tl.exp2(top - highest)
    b_v = tl.reshape(b_v.to(tl.float32), (b_s.shape[0], acc.shape[0], acc.shape[1]))
    total = total * fade + tl.sum(b_p, 0)
    if b_scales is not None:
        b_p *= b_scales.to(tl.float32)
    return acc * fade[:, None] + tl.sum(b_p[:, :, None] * b_v, 0), highest, total


@triton.jit
def ring_attention_kernel(
    q,
    k,
    v,
    cache,
    values,
    scales,
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
    VECTOR: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    INT8: tl.constexpr,
):
    """``o [parts, B * T, H, DV]`` and ``lse [parts, B * T, H]`` of each part of the window, and the
    new rows of the cache. Grid: parts, key heads times blocks of their query heads, B * T.

    INT8: ``cache`` is the keys of a ring of bytes, ``values`` and ``scales`` are its other parts;
    the rows of all three are c_t keys of KEY_BYTES apart.

    Keys and values are tiles ``[BN, BH * BD]`` of one layout, a key repeated for all heads: a score
    is a sum over the threads of a head, and no data goes through shared memory to other threads.
    """
    i_p = tl.program_id(0)
    i_hk = tl.program_id(1) % HK
    i_block = tl.program_id(1) // HK
    i_bt = tl.program_id(2).to(tl.int64)
    i_b = i_bt // T
    i_t = (i_bt % T).to(tl.int32)
    # tokens that the sequence has seen before this call; the newest visible key is the token's own
    new = tl.load(position + i_b)
    last = new + i_t
    first = tl.maximum(last - W + 1, 0) + i_p * PART
    count = tl.minimum(last + 1 - first, PART).to(tl.int32)
    # row of the part's first key; the part is no longer than the ring and wraps at most once
    first_row = (first % R).to(tl.int32)

    o_n = tl.arange(0, BN)
    o_j = i_block * BH + tl.arange(0, BH)
    heads = i_hk + HK * o_j
    is_head = o_j < H // HK
    o_v = tl.arange(0, BDV)
    # heads and their channels in one dimension: a thread's channels are contiguous in every layout
    o_hd, o_hv = tl.arange(0, BH * BD), tl.arange(0, BH * BDV)
    o_d, o_hv_d = o_hd % BD, o_hv % BDV
    heads_d = i_hk + HK * (i_block * BH + o_hd // BD)
    heads_v = i_hk + HK * (i_block * BH + o_hv // BDV)
    keys_mask = (heads_d < H) & (o_d < D)
    values_mask = (heads_v < H) & (o_hv_d < DV)
    p_q = q + i_b * q_b + i_t * q_t + heads_d * q_h + o_d
    b_q = tl.load(p_q, mask=keys_mask, other=0.0).to(tl.float32) * scale

    c_row = cache + i_b * c_b
    key_columns = i_hk * D + o_d
    # 8-bit values have their own pointer
    before: tl.constexpr = 0 if INT8 else HK * D
    value_columns = tl.max_contiguous(
        tl.multiple_of(before + (heads_v % HV) * DV + o_hv_d, VECTOR), VECTOR
    )
    # this part's new tokens, written before they are read; another program may write the same
    if first + count > new:
        p_k = k + i_b * k_b + i_hk * k_h + o_d
        p_v = v + i_b * v_b + (heads_v % HV) * v_h + o_hv_d
        for t in range(tl.maximum(first - new, 0).to(tl.int32), i_t + 1):
            p_row = c_row + ((new + t) % R) * c_t
            b_k = tl.load(p_k + t * k_t, mask=keys_mask, other=0.0)
            tl.store(p_row + key_columns, b_k, mask=keys_mask)
            b_v = tl.load(p_v + t * v_t, mask=values_mask, other=0.0)
            if INT8:
                at = i_b * c_b + ((new + t) % R) * c_t
                p_steps = values + at * KEY_BYTES + value_columns
                p_scale = scales + at * (KEY_BYTES // 2) + heads % HV
                store_quantized(p_steps, p_scale, b_v, values_mask, is_head, BH, BDV)
            else:
                tl.store(p_row + value_columns, b_v, mask=values_mask)
        tl.debug_barrier()

    acc = tl.zeros([BH, BDV], tl.float32)
    top = tl.full([BH], float("-inf"), tl.float32)
    total = tl.zeros([BH], tl.float32)
    for n in tl.range(0, count, BN, num_stages=1):
        seen = n + o_n < count
        rows = first_row + n + o_n
        rows = tl.where(rows < R, rows, rows - R)
        p_rows = c_row + rows.to(tl.int64)[:, None] * c_t
        b_k = tl.load(p_rows + key_columns, mask=seen[:, None] & keys_mask, other=0.0)
        b_scales = None
        if INT8:
            at = i_b * c_b + rows.to(tl.int64)[:, None] * c_t
            p_values = values + at * KEY_BYTES + value_columns
            b_v = tl.load(p_values, mask=seen[:, None] & values_mask, other=0)
            p_scales = scales + at * (KEY_BYTES // 2) + (heads % HV)[None, :]
            b_scales = tl.load(p_scales, mask=seen[:, None] & is_head[None, :], other=0.0)
        else:
            b_v = tl.load(p_rows + value_columns, mask=seen[:, None] & values_mask, other=0.0)
        b_s = tl.sum(tl.reshape(b_q * b_k.to(tl.float32), (BN, BH, BD)), 2)
        b_s = tl.where(seen[:, None], b_s, float("-inf"))
        acc, top, total = add_keys(acc, top, total, b_s, b_v, b_scales)

    o_rows = (i_p * tl.num_programs(2).to(tl.int64) + i_bt) * H + heads
    # a part past the newest key is empty and gets weight 0
    b_o = acc / tl.where(total > 0, total, 1.0)[:, None]
    p_o = o + o_rows[:, None] * DV + o_v[None, :]
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=is_head[:, None] & (o_v < DV)[None, :])
    tl.store(lse + o_rows, top + tl.log2(total), mask=is_head)


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
    BN: tl.constexpr,
):
    """``o [B * T, H, DV]`` from the parts, weighted by their sums of exponentials. Grid: heads,
    B * T."""
    i_h = tl.program_id(0)
    i_bt = tl.program_id(1).to(tl.int64)
    tokens = tl.num_programs(1).to(tl.int64)
    o_p = tl.arange(0, BP)
    o_v = tl.arange(0, BDV)
    p_lse = lse + (o_p * tokens + i_bt) * H + i_h
    b_lse = tl.load(p_lse, mask=o_p < PARTS, other=float("-inf"))
    top = tl.max(b_lse, 0)
    total = tl.sum(tl.exp2(b_lse - top), 0)
    b_o = tl.zeros([BDV], tl.float32)
    for first in tl.range(0, PARTS, BN, num_stages=1):
        o_n = first + tl.arange(0, BN)
        rows = (o_n * tokens + i_bt) * H + i_h
        weight = tl.exp2(tl.load(lse + rows, mask=o_n < PARTS, other=float("-inf")) - top)
        mask = (o_n < PARTS)[:, None] & (o_v < DV)[None, :]
        b_part = tl.load(parts + rows[:, None] * DV + o_v[None, :], mask=mask, other=0.0)
        b_o += tl.sum(b_part * weight[:, None], 0)
    p_o = o + (i_bt * H + i_h) * DV + o_v
    tl.store(p_o, (b_o / total).to(o.dtype.element_ty), mask=o_v < DV)


def split_window(window: int, programs: int, multiprocessors: int) -> tuple[int, int]:
    """``(parts, keys per part)``: enough parts to fill the GPU, none too short to be worth it."""
    parts = max(_PROGRAMS_PER_SM * multiprocessors // programs, 1)
    parts = min(parts, triton.cdiv(window, _MIN_KEYS_PER_PART))
    part = triton.cdiv(triton.cdiv(window, parts), _KEYS) * _KEYS
    return triton.cdiv(window, part), part


def step(q, k, v, cache, position, *, window_size, scale):
    """``shared_key_attention_step`` in Triton; the contract is that of
    :func:`rodimus_kernels.shared_key_attention_step`.

    Raises:
        ValueError: D or Dv is above ``MAX_DIM``, dtypes differ or are not float32, bfloat16 or
            float16, the cache's rows are not dense, there are more than 65,535 tokens, or Triton
            does not run on the tensors' device.
    """
    alike = (q, k, v) if cache.dtype == torch.uint8 else (q, k, v, cache)
    check_runs_here("shared_key_attention_step", *alike)
    dtypes = [x.dtype for x in alike]
    if len(set(dtypes)) > 1:
        raise ValueError(
            "shared_key_attention_step(impl='triton'): expected q, k, v and cache of one dtype,"
            f" or a cache of bytes, got {[x.dtype for x in (q, k, v, cache)]}"
        )
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        raise ValueError(
            f"shared_key_attention_step(impl='triton'): expected D and Dv up to {MAX_DIM},"
            f" got D = {q.shape[-1]}, Dv = {v.shape[-1]}"
        )
    if cache.stride(-1) != 1:
        raise ValueError(f"cache must have dense rows, got strides {cache.stride()}")
    return torch.ops.rodimus.ring_attention(q, k, v, cache, position, window_size, scale)


@implement("ring_attention")
def _step(q, k, v, cache, position, window_size, scale):
    q, k, v = (unit_stride(x) for x in (q, k, v))
    (batch, steps, heads, dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    key_heads, tokens = k.shape[2], batch * steps
    check_grid("shared_key_attention_step", "tokens", tokens)
    groups = key_heads * triton.cdiv(heads // key_heads, _HEADS)
    parts, part = split_window(window_size, max(groups * tokens, 1), multiprocessors(q.device))
    o = v.new_empty((batch, steps, heads, value_dim))
    partial = o
    if parts > 1:
        partial = v.new_empty((parts, *o.shape), dtype=torch.float32)
    lse = q.new_empty((parts, tokens, heads), dtype=torch.float32)
    rows, int8 = (cache, cache, cache), cache.dtype == torch.uint8
    if int8:
        rows = reference.ring_parts(cache, key_heads, dim, value_heads, value_dim, k.dtype)
    ring_attention_kernel[(parts, groups, tokens)](
        q,
        k,
        v,
        *rows,
        position,
        partial,
        lse,
        scale * math.log2(math.e),
        steps,
        window_size,
        cache.shape[1],
        part,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *rows[0].stride()[:2],
        H=heads,
        HK=key_heads,
        HV=value_heads,
        D=dim,
        DV=value_dim,
        BH=_HEADS,
        BD=block_dim(dim),
        BDV=block_dim(value_dim),
        BN=_KEYS,
        VECTOR=math.gcd(16, value_dim) if int8 else math.gcd(16, value_dim, dim * key_heads),
        KEY_BYTES=k.dtype.itemsize,
        INT8=int8,
        num_warps=8,
        **FP_FUSION,
    )
    if parts > 1:
        join_parts_kernel[(heads, tokens)](
            partial,
            lse,
            o,
            parts,
            H=heads,
            DV=value_dim,
            BDV=block_dim(value_dim),
            BP=triton.next_power_of_2(parts),
            BN=_JOINED,
            num_warps=4,
            **FP_FUSION,
        )
    return o
