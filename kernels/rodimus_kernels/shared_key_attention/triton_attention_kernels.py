"""Triton kernels of sliding-window shared-key attention: forward, and the two backward passes.

Positions are those of the keys, 0 to S; the T queries are at the last T of them. Query position i
sees key j where ``first[i] <= j <= i`` with ``first[i] = max(i - W + 1, start of i's document)``;
seen from the key, ``j <= i < end[j]`` with ``end[j] = min(j + W, end of j's document)``. Both grow
with the position, so the tiles of a program fall into three runs: one edge, whole tiles, the other
edge, and only edges pay for masks. Forward and dq have a loop for each run; dkv, whose accumulators
leave no registers for that, one loop that branches.

    forward   o, lse            one program: BM queries of one head; streams keys and values
    dq        dq, delta         the same program and the same runs; delta = rowsum(o * do)
    dkv       dk, dv            one program: BN keys of one key head; streams the queries of all
                                heads that read it, so dk adds up in registers

Scores are in units of log2: exp2 of them, and ``lse = log2 sum exp2``. A head's tile is loaded by
pointers, or by Hopper's copy engine from a descriptor of ``[B, H, T, D]`` (TMA).
"""

import triton
import triton.language as tl

from .._triton import exp2, product


@triton.jit
def load_tile(
    x,
    i_b,
    i_h,
    row,
    end,
    x_b,
    x_t,
    x_h,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    MASK: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows ``row .. row + ROWS`` of one head, zero from ``end`` on: ``[ROWS, BD]``."""
    if TMA:
        return tl.reshape(x.load([i_b, i_h, row, 0]), [ROWS, BD])
    else:
        o_r = tl.arange(0, ROWS)
        o_d = tl.arange(0, BD)
        p_x = x + tl.cast(i_b, tl.int64) * x_b + tl.cast(i_h, tl.int64) * x_h
        p_x += tl.cast(row, tl.int64) * x_t
        p_x += o_r[:, None] * x_t + o_d[None, :]
        if MASK and D < BD:
            return tl.load(p_x, mask=(row + o_r < end)[:, None] & (o_d < D)[None, :], other=0.0)
        elif MASK:
            return tl.load(p_x, mask=(row + o_r < end)[:, None], other=0.0)
        elif D < BD:
            return tl.load(p_x, mask=(o_d < D)[None, :], other=0.0)
        else:
            return tl.load(p_x)


@triton.jit
def store_tile(
    x,
    b_x,
    i_b,
    i_h,
    row,
    end,
    x_b,
    x_t,
    x_h,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """The inverse of :func:`load_tile`, by pointers, converted to the dtype of ``x``."""
    o_r = tl.arange(0, ROWS)
    o_d = tl.arange(0, BD)
    p_x = x + tl.cast(i_b, tl.int64) * x_b + tl.cast(i_h, tl.int64) * x_h
    p_x += tl.cast(row, tl.int64) * x_t
    mask = (row + o_r < end)[:, None] & (o_d < D)[None, :]
    tl.store(p_x + o_r[:, None] * x_t + o_d[None, :], b_x.to(x.dtype.element_ty), mask=mask)


@triton.jit
def first_key(position, starts, W):
    """First key that a query position sees."""
    first = tl.maximum(position - W + 1, 0)
    if starts is not None:
        first = tl.maximum(first, tl.load(starts + position))
    return first


@triton.jit
def end_query(position, ends, S, W):
    """The query position after the last one that sees this key."""
    if ends is not None:
        return tl.minimum(position + W, tl.load(ends + position))
    else:
        return tl.minimum(position + W, S)


@triton.jit
def key_runs(query, last_query, starts, W, BN: tl.constexpr):
    """Where the runs of key tiles of these queries begin: ``(left edge, whole, diagonal)``.

    Whole tiles are seen by every query: from the last query's first key up to the first query.
    """
    left = first_key(query, starts, W)
    whole = left + tl.cdiv(first_key(last_query, starts, W) - left, BN) * BN
    return left, whole, whole + tl.maximum(query + 1 - whole, 0) // BN * BN


@triton.jit
def attend(
    acc,
    top,
    total,
    b_q,
    k,
    v,
    i_b,
    i_hk,
    i_hv,
    begin,
    stop,
    positions,
    first,
    S,
    scale,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    BN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    MASK: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of key tiles through the online softmax: ``acc`` and ``total`` are relative to
    ``exp2(top)``."""
    for n in tl.range(begin, stop, BN, num_stages=STAGES):
        b_k = load_tile(k, i_b, i_hk, n, S, k_b, k_t, k_h, BN, D, BD, MASK, TMA)
        b_s = product(b_q, tl.trans(b_k), None, PRECISION)
        if MASK:
            keys = n + tl.arange(0, BN)
            seen = (keys[None, :] <= positions[:, None]) & (keys[None, :] >= first[:, None])
            b_s = tl.where(seen, b_s * scale, float("-inf"))
            highest = tl.maximum(top, tl.max(b_s, 1))
            # a query that has seen no key yet gets weights of 0, relative to any finite base
            base = tl.where(highest == float("-inf"), 0.0, highest)
        else:
            highest = tl.maximum(top, tl.max(b_s, 1) * scale)
            base = highest
            b_s = b_s * scale
        b_p = exp2(b_s - base[:, None])
        fade = exp2(top - base)
        b_v = load_tile(v, i_b, i_hv, n, S, v_b, v_t, v_h, BN, DV, BDV, MASK, TMA)
        acc = product(b_p, b_v, acc * fade[:, None], PRECISION)
        total = total * fade + tl.sum(b_p, 1)
        top = highest
    return acc, top, total


@triton.jit(do_not_specialize=["T", "S", "W"])
def shared_key_attention_fwd_kernel(
    q,
    k,
    v,
    o,
    lse,
    starts,
    scale,
    T,
    S,
    W,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    H: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``o [B, T, H, DV]`` and ``lse [B, H, T]``. Grid: query tiles, heads, batch."""
    # the last queries have the fullest windows, so they start first
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    query = S - T + row
    last_query = tl.minimum(query + BM, S) - 1
    # rows after the last query repeat it; they are not stored
    positions = tl.minimum(query + tl.arange(0, BM), S - 1)
    first = first_key(positions, starts, W)
    b_q = load_tile(q, i_b, i_h, row, T, q_b, q_t, q_h, BM, D, BD, True, TMA)
    acc = tl.zeros([BM, BDV], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    left, whole, diagonal = key_runs(query, last_query, starts, W, BN)
    stop = last_query + 1
    # fmt: off
    acc, top, total = attend(
        acc, top, total, b_q, k, v, i_b, i_h % HK, i_h % HV, left, tl.minimum(whole, stop),
        positions, first, S, scale, k_b, k_t, k_h, v_b, v_t, v_h,
        BN, D, DV, BD, BDV, True, TMA, STAGES, PRECISION,
    )
    acc, top, total = attend(
        acc, top, total, b_q, k, v, i_b, i_h % HK, i_h % HV, whole, diagonal,
        positions, first, S, scale, k_b, k_t, k_h, v_b, v_t, v_h,
        BN, D, DV, BD, BDV, False, TMA, STAGES, PRECISION,
    )
    acc, top, total = attend(
        acc, top, total, b_q, k, v, i_b, i_h % HK, i_h % HV, diagonal, stop,
        positions, first, S, scale, k_b, k_t, k_h, v_b, v_t, v_h,
        BN, D, DV, BD, BDV, True, TMA, STAGES, PRECISION,
    )
    # fmt: on
    # o is dense
    o_b = tl.cast(T, tl.int64) * (H * DV)
    store_tile(o, acc / total[:, None], i_b, i_h, row, T, o_b, H * DV, DV, BM, DV, BDV)
    rows = row + tl.arange(0, BM)
    p_lse = lse + (i_b.to(tl.int64) * H + i_h) * T + rows
    tl.store(p_lse, top + tl.log2(total), mask=rows < T)


@triton.jit
def query_gradient(
    dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    k,
    v,
    i_b,
    i_hk,
    i_hv,
    begin,
    stop,
    positions,
    first,
    S,
    scale,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    BN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    MASK: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of key tiles: dq += p * (do v^T - delta) k, with p = exp2(scores - lse)."""
    for n in tl.range(begin, stop, BN, num_stages=STAGES):
        b_k = load_tile(k, i_b, i_hk, n, S, k_b, k_t, k_h, BN, D, BD, MASK, TMA)
        b_s = product(b_q, tl.trans(b_k), None, PRECISION)
        b_p = exp2(b_s * scale - b_lse[:, None])
        if MASK:
            keys = n + tl.arange(0, BN)
            seen = (keys[None, :] <= positions[:, None]) & (keys[None, :] >= first[:, None])
            b_p = tl.where(seen, b_p, 0.0)
        b_v = load_tile(v, i_b, i_hv, n, S, v_b, v_t, v_h, BN, DV, BDV, MASK, TMA)
        b_dp = product(b_do, tl.trans(b_v), None, PRECISION)
        dq = product(b_p * (b_dp - b_delta[:, None]), b_k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "S", "W"])
def shared_key_attention_dq_kernel(
    q,
    k,
    v,
    o,
    do,
    lse,
    delta,
    dq,
    starts,
    scale,
    softmax_scale,
    T,
    S,
    W,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    do_b,
    do_t,
    do_h,
    H: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dq [B, T, H, D]`` and ``delta [B, H, T]``. Grid: query tiles, heads, batch."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i_h = tl.program_id(1)
    i_b = tl.program_id(2)
    query = S - T + row
    last_query = tl.minimum(query + BM, S) - 1
    positions = tl.minimum(query + tl.arange(0, BM), S - 1)
    first = first_key(positions, starts, W)
    b_q = load_tile(q, i_b, i_h, row, T, q_b, q_t, q_h, BM, D, BD, True, TMA)
    # o and dq are dense
    o_b = tl.cast(T, tl.int64) * (H * DV)
    dq_b = tl.cast(T, tl.int64) * (H * D)
    b_o = load_tile(o, i_b, i_h, row, T, o_b, H * DV, DV, BM, DV, BDV, True, False)
    b_do = load_tile(do, i_b, i_h, row, T, do_b, do_t, do_h, BM, DV, BDV, True, TMA)
    rows = row + tl.arange(0, BM)
    o_rows = (i_b.to(tl.int64) * H + i_h) * T + rows
    b_lse = tl.load(lse + o_rows, mask=rows < T, other=float("inf"))
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(delta + o_rows, b_delta, mask=rows < T)
    acc = tl.zeros([BM, BD], tl.float32)
    left, whole, diagonal = key_runs(query, last_query, starts, W, BN)
    stop = last_query + 1
    # fmt: off
    acc = query_gradient(
        acc, b_q, b_do, b_lse, b_delta, k, v, i_b, i_h % HK, i_h % HV,
        left, tl.minimum(whole, stop), positions, first, S, scale, k_b, k_t, k_h, v_b, v_t, v_h,
        BN, D, DV, BD, BDV, True, TMA, STAGES, PRECISION,
    )
    acc = query_gradient(
        acc, b_q, b_do, b_lse, b_delta, k, v, i_b, i_h % HK, i_h % HV,
        whole, diagonal, positions, first, S, scale, k_b, k_t, k_h, v_b, v_t, v_h,
        BN, D, DV, BD, BDV, False, TMA, STAGES, PRECISION,
    )
    acc = query_gradient(
        acc, b_q, b_do, b_lse, b_delta, k, v, i_b, i_h % HK, i_h % HV,
        diagonal, stop, positions, first, S, scale, k_b, k_t, k_h, v_b, v_t, v_h,
        BN, D, DV, BD, BDV, True, TMA, STAGES, PRECISION,
    )
    # fmt: on
    store_tile(dq, acc * softmax_scale, i_b, i_h, row, T, dq_b, H * D, D, BM, D, BD)


@triton.jit
def key_gradients(
    dk,
    dv,
    b_k,
    b_v,
    q,
    do,
    p_lse,
    p_delta,
    i_b,
    i_h,
    begin,
    whole,
    edge,
    stop,
    keys,
    ends,
    offset,
    T,
    scale,
    q_b,
    q_t,
    q_h,
    do_b,
    do_t,
    do_h,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The query tiles of one head: dv += p^T do, dk += (p * (do v^T - delta))^T q.

    Two accumulators and two scores fill the registers, so the loop must not hold anything else:
    there is one copy of it, dp starts from -delta instead of subtracting it, and rows need no mask.
    """
    # with two buffers in Blackwell's tensor memory, the accumulator would pass through registers
    for m in tl.range(begin, stop, BM, num_stages=STAGES, disallow_acc_multi_buffer=True):
        row = m - offset
        b_q = load_tile(q, i_b, i_h, row, T, q_b, q_t, q_h, BM, D, BD, True, TMA)
        b_s = product(b_k, tl.trans(b_q), None, PRECISION)
        # a row after the last query repeats it: no key sees its position
        rows = tl.minimum(row + tl.arange(0, BM), T - 1)
        b_lse = tl.load(p_lse + rows)
        b_delta = tl.load(p_delta + rows)
        b_p = exp2(b_s * scale - b_lse[None, :])
        if (m < whole) | (m >= edge):
            queries = (m + tl.arange(0, BM))[None, :]
            b_p = tl.where((queries >= keys[:, None]) & (queries < ends[:, None]), b_p, 0.0)
        b_do = load_tile(do, i_b, i_h, row, T, do_b, do_t, do_h, BM, DV, BDV, True, TMA)
        b_dp = tl.broadcast_to(-b_delta[None, :], [BN, BM])
        b_dp = product(b_v, tl.trans(b_do), b_dp, PRECISION)
        dv = product(b_p, b_do, dv, PRECISION)
        dk = product(b_p * b_dp, b_q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "W"])
def shared_key_attention_dkv_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    ends,
    scale,
    softmax_scale,
    T,
    S,
    W,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    do_b,
    do_t,
    do_h,
    H: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dk [GROUPS, B, S, HK, D]`` and ``dv [B, S, PAIRS, DV]``, to be summed over groups and over
    pairs of one value head. Grid: key tiles, key heads times groups, batch.

    Query heads that are equal modulo PAIRS = lcm(HK, HV) read the same key and value head. A
    program takes every GROUPS-th of its key head's pairs: its dk adds up over all of them.
    """
    n = tl.program_id(0) * BN
    i_hk = tl.program_id(1) % HK
    i_g = tl.program_id(1) // HK
    i_b = tl.program_id(2)
    offset = S - T
    last_key = tl.minimum(n + BN, S) - 1
    keys = n + tl.arange(0, BN)
    end = end_query(tl.minimum(keys, S - 1), ends, S, W)
    b_k = load_tile(k, i_b, i_hk, n, S, k_b, k_t, k_h, BN, D, BD, True, TMA)
    # runs of query tiles: the diagonal, tiles that see all these keys, the far edge
    begin = tl.maximum(n, offset)
    whole = begin + tl.cdiv(tl.maximum(last_key - begin, 0), BM) * BM
    edge = whole + tl.maximum(end_query(n, ends, S, W) - whole, 0) // BM * BM
    stop = end_query(last_key, ends, S, W)
    acc_k = tl.zeros([BN, BD], tl.float32)
    for pair in tl.range(i_hk + i_g * HK, PAIRS, HK * GROUPS, num_stages=1):
        b_v = load_tile(v, i_b, pair % HV, n, S, v_b, v_t, v_h, BN, DV, BDV, True, TMA)
        acc_v = tl.zeros([BN, BDV], tl.float32)
        for i_h in tl.range(pair, H, PAIRS, num_stages=1):
            o_rows = (i_b.to(tl.int64) * H + i_h) * T
            # fmt: off
            acc_k, acc_v = key_gradients(
                acc_k, acc_v, b_k, b_v, q, do, lse + o_rows, delta + o_rows, i_b, i_h,
                begin, whole, edge, stop, keys, end, offset, T, scale,
                q_b, q_t, q_h, do_b, do_t, do_h,
                BM, BN, D, DV, BD, BDV, TMA, STAGES, PRECISION,
            )
            # fmt: on
        dv_b = tl.cast(S, tl.int64) * (PAIRS * DV)
        store_tile(dv, acc_v, i_b, pair, n, S, dv_b, PAIRS * DV, DV, BN, DV, BDV)
    dk_b = tl.cast(S, tl.int64) * (HK * D)
    i_gb = i_g * tl.num_programs(2) + i_b
    store_tile(dk, acc_k * softmax_scale, i_gb, i_hk, n, S, dk_b, HK * D, D, BN, D, BD)
