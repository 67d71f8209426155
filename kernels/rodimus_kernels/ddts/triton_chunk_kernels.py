"""Triton kernels of chunked DDTS: prepare, walk, and the two backward passes over single chunks.

Inside a chunk of C tokens, with P and Q the prefix and suffix sums of log-decays (``chunk_decays``
of ``reference.py``) and A the decayed scores:

    prepare   A, read = q exp2(P), write = k exp2(Q), keep = exp2(P at the end)  one program a chunk
    walk      y = read S + A x,   S' = keep S + write^T x          one program a block of V columns
    products  dA = do v^T, dread = do S^T, dwrite = v dS^T, sum_V S dS           one program a chunk
    gate      dq, dk, dlog_decay from those, down the same tree       one program a chunk, K a slice

The backward of the state is the same walk in reverse with read and write exchanged: x is do, y is
dv. Every exponent is <= 0 by construction and the gate gradient is a sum without cancellation, so
a log-decay may be anything from 0 to -inf.

The chunk-local tensors (A, read, write, keep, states) are indexed by slot: ``head * NC + column``.
A column is ``batch * NT + chunk`` in dense rows. Packed documents with states of their own get
whole chunks each: ``starts`` and ``ends`` give the tokens of a column, ``offsets`` the first column
of a document; all three are made on the device, so the host does not wait for it.
"""

import triton
import triton.language as tl

from .._triton import (
    LOG2_E,
    exp2,
    product,
    reciprocal,
    settle,
    tempered_gate_gradients,
    tempered_gates,
)

# reference.RESET, in units of log2; finite, so that 64 of them still add up in fp32
RESET = tl.constexpr(-1.4426950408889634e30)
# pre-activation of a closed selection gate: the token neither writes nor decays
CLOSED = tl.constexpr(-1e30)


@triton.jit
def operand(x, ROUND: tl.constexpr):
    """fp32 x as an operand of a product. Tensor cores truncate to tf32, which would make every
    product smaller; with ROUND, x is rounded to nearest first."""
    if ROUND:
        bits = x.to(tl.int32, bitcast=True)
        # the NaN of all ones overflows, and would become -0
        rounded = tl.add(bits, 0x1000, sanitize_overflow=False) & -0x2000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    else:
        return x


@triton.jit
def chunk_tokens(i_c, starts, ends, T, NT, C: tl.constexpr):
    """Row of the batch, first token and end of the tokens that column ``i_c`` may touch."""
    if starts is None:
        return i_c // NT, (i_c % NT) * C, T
    else:
        return i_c * 0, tl.load(starts + i_c).to(tl.int64), tl.load(ends + i_c).to(tl.int64)


@triton.jit
def key_norms(p_k, o_i, k_t, mask, eps, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """``max(|k|, eps)`` of the rows of a chunk: ``[C]``; eps > 0 because rows outside are zero."""
    squares = tl.zeros([C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)[None, :]
        b_k = tl.load(p_k + o_i[:, None] * k_t + o_k, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(b_k * b_k, 1)
    return tl.maximum(tl.sqrt(squares), eps)


@triton.jit
def load_gates(p_select, p_temper, mask):
    """Pre-activations of the selection and the temper gate, fp32; a masked token lets nothing
    in."""
    b_select = tl.load(p_select, mask=mask, other=CLOSED).to(tl.float32)
    return b_select, tl.load(p_temper, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_gated(p_k, p_g, p_temper, p_resets, norms, o_i, mask):
    """The key as written and log2 of the decay, fp32; a document's first token erases what was
    before it. With ``p_temper``, ``p_k`` and ``p_g`` are a raw key and the pre-activation of the
    selection gate."""
    b_k = tl.load(p_k, mask=mask, other=0.0).to(tl.float32)
    if p_temper is None:
        b_g = tl.load(p_g, mask=mask, other=0.0).to(tl.float32)
    else:
        b_select, b_temper = load_gates(p_g, p_temper, mask)
        b_in, b_g = tempered_gates(b_select, b_temper)
        b_k *= reciprocal(norms)[:, None] * b_in
    # a NaN decay moves into the key, which only later tokens see; the decay itself becomes finite,
    # so that zero times it is zero
    b_k = tl.where(b_g == b_g, b_k, b_g)
    b_g *= LOG2_E
    b_g = tl.where(b_g > RESET, b_g, RESET)
    if p_resets is not None:
        b_reset = tl.load(p_resets + o_i[:, None], mask=mask, other=0)
        b_g = tl.where(b_reset != 0, RESET, b_g)
    return b_k, settle(b_g)


@triton.jit
def masked_sum(mask, x, acc, PRECISION: tl.constexpr):
    """acc + mask x for a bf16 mask of zeros and ones: fp32 x is split into the sum of three bf16
    values, of which two already hold more than products in ``tf32`` do."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    acc = product(mask, high, acc, "tf32")
    acc = product(mask, middle, acc, "tf32")
    if PRECISION != "tf32":
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = product(mask, low, acc, "tf32")
    return acc


@triton.jit
def is_odd(o_i, level):
    """Whether a row is in the odd one of the two blocks of ``1 << level`` positions that meet: rows
    of the odd block are queries, rows of the even block are keys."""
    return ((o_i >> level) & 1) == 1


@triton.jit
def load_summed(summed, level, C: tl.constexpr):
    """``[C, C]``: which log-decays the decay of each row sums up at a level."""
    o_i = tl.arange(0, C)
    return tl.load(summed + level * C * C + o_i[:, None] * C + o_i[None, :])


@triton.jit
def decay_over(b_summed, b_g, PRECISION: tl.constexpr):
    """The decays ``[C, BK]`` over the log-decays in ``b_summed``. Sums are products with ones: with
    numbers <= 0 nothing cancels, and products take fewer instructions than additions."""
    nothing = tl.zeros(b_g.shape, tl.float32)
    return exp2(masked_sum(b_summed, b_g, nothing, PRECISION))


@triton.jit(do_not_specialize=["T", "NT"])
def ddts_chunk_prepare_kernel(
    q,
    k,
    g,
    temper,
    resets,
    starts,
    ends,
    a,
    read,
    write,
    keep,
    summed,
    scale,
    eps,
    T,
    NT,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    g_b,
    g_t,
    g_h,
    temper_b,
    temper_t,
    temper_h,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Scores ``a [slots, C, C]``, ``read`` and ``write [slots, C, K]``, ``keep [slots, K]``.

    With ``temper``, k and g are a raw key and the pre-activation of the selection gate.
    ``summed [LEVELS + 2, C, C]`` is made by ``_summed`` of ``triton_chunk.py``.
    """
    i_c = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    slot = i_h * tl.num_programs(0) + i_c
    i_b, start, end = chunk_tokens(i_c, starts, ends, T, NT, C)
    o_i = tl.arange(0, C)
    mask = (start + o_i < end)[:, None]
    p_q = q + i_b * q_b + i_h * q_h + start * q_t
    p_k = k + i_b * k_b + i_h * k_h + start * k_t
    p_g = g + i_b * g_b + i_h * g_h + start * g_t
    p_resets = None if resets is None else resets + i_b * T + start
    norms = None
    if temper is not None:
        p_temper = temper + i_b * temper_b + i_h * temper_h + start * temper_t
        norms = key_norms(p_k, o_i, k_t, mask, eps, K, C, BK)
    b_a = tl.zeros([C, C], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)[None, :]
        b_q = tl.load(p_q + o_i[:, None] * q_t + o_k, mask=mask, other=0.0).to(tl.float32) * scale
        b_k, b_g = load_gated(
            p_k + o_i[:, None] * k_t + o_k,
            p_g + o_i[:, None] * g_t + o_k,
            None if temper is None else p_temper + o_i[:, None] * temper_t + o_k,
            p_resets,
            norms,
            o_i,
            mask,
        )
        b_a += tl.where(o_i[:, None] == o_i[None, :], tl.sum(b_q * b_k, 1)[:, None], 0.0)
        # a loop, not unrolled: unrolled, the scheduler hoists all exponentials and spills
        for level in tl.range(0, LEVELS, num_stages=1):
            decay = decay_over(load_summed(summed, level, C), b_g, PRECISION)
            b_row = operand(tl.where(is_odd(o_i, level)[:, None], b_q, b_k) * decay, ROUND)
            scores = tl.dot(b_row, tl.trans(b_row), input_precision=PRECISION)
            siblings = ((o_i[:, None] ^ o_i[None, :]) >> level) == 1
            b_a += tl.where(siblings, scores, 0.0)
        prefix = decay_over(load_summed(summed, LEVELS, C), b_g, PRECISION)
        suffix = decay_over(load_summed(summed, LEVELS + 1, C), b_g, PRECISION)
        o_ck = o_i[:, None] * K + o_k
        dtype = read.dtype.element_ty
        tl.store(read + slot * C * K + o_ck, operand(b_q * prefix, ROUND).to(dtype))
        tl.store(write + slot * C * K + o_ck, operand(b_k * suffix, ROUND).to(dtype))
        p_keep = keep + slot * K + o_k + tl.zeros([C, BK], tl.int32)
        tl.store(p_keep, prefix, mask=o_i[:, None] == C - 1)
    # b_row times its transpose also has the keys times later queries, above the diagonal
    b_a = tl.where(o_i[None, :] <= o_i[:, None], b_a, 0.0)
    p_a = a + slot * C * C + o_i[:, None] * C + o_i[None, :]
    tl.store(p_a, operand(b_a, ROUND).to(a.dtype.element_ty))


@triton.jit
def sequence_chunks(i_n, offsets, NT):
    """First column of a sequence, and its number of columns."""
    if offsets is None:
        return i_n * NT, NT
    else:
        first = tl.load(offsets + i_n).to(tl.int64)
        return first, (tl.load(offsets + i_n + 1) - first).to(tl.int32)


@triton.jit
def load_written(
    x,
    write,
    row,
    i_b,
    i_h,
    start,
    end,
    column,
    o_c,
    x_b,
    x_t,
    x_h,
    K: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    TMA: tl.constexpr,
):
    """The factors of what a chunk writes into the state, ``write^T x``: a block of the values ``x
    [C, BV]``, zero after the chunk's last token, and ``write [C, K]``."""
    if TMA:
        b_x = x.load([i_b.to(tl.int32), i_h.to(tl.int32), start, column])
        return tl.reshape(b_x, [C, BV]), write.load([row, 0])
    else:
        o_v = column + tl.arange(0, BV)
        mask = (start + o_c < end)[:, None]
        p_x = x + i_b * x_b + i_h * x_h + start * x_t
        b_x = tl.load(p_x + o_c[:, None] * x_t + o_v[None, :], mask=mask, other=0.0)
        o_ck = o_c[:, None] * K + tl.arange(0, K)[None, :]
        return b_x, tl.load(write + row * K + o_ck)


@triton.jit
def load_read(read, a, row, o_c, K: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """The factors of a chunk's outputs: ``read [C, K]`` for the state before it, and ``a [C, C]``
    for the chunk's own values."""
    if TMA:
        return read.load([row, 0]), a.load([row, 0])
    else:
        o_ck = o_c[:, None] * K + tl.arange(0, K)[None, :]
        b_read = tl.load(read + row * K + o_ck)
        return b_read, tl.load(a + row * C + o_c[:, None] * C + o_c[None, :])


@triton.jit
def store_state(
    states,
    b_state,
    slot,
    row,
    V: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
    TMA: tl.constexpr,
):
    """Store ``b_state [BV, K]`` into ``states[slot]``, ``[V, K]``, from row ``row`` on."""
    if TMA:
        states.store([(slot * V).to(tl.int32) + row, 0], b_state)
    else:
        o_v = row + tl.arange(0, BV)
        o_k = tl.arange(0, K)
        tl.store(states + slot * V * K + o_v[:, None] * K + o_k[None, :], b_state)


@triton.jit
def store_output(
    y,
    b_y,
    i_b,
    i_h,
    start,
    end,
    column,
    o_c,
    y_b,
    y_t,
    y_h,
    C: tl.constexpr,
    BV: tl.constexpr,
    TMA: tl.constexpr,
):
    """Store a chunk's outputs ``[C, BV]`` where :func:`load_written` has its values."""
    if TMA:
        place = [i_b.to(tl.int32), i_h.to(tl.int32), start, column]
        y.store(place, tl.reshape(b_y.to(y.dtype), [1, 1, C, BV]))
    else:
        o_v = column + tl.arange(0, BV)
        mask = (start + o_c < end)[:, None]
        p_y = y + i_b * y_b + i_h * y_h + start * y_t + o_c[:, None] * y_t + o_v[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit
def chunk_output(
    b_state,
    b_read,
    b_x,
    b_a,
    C: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output ``[C, BV]`` of a chunk from the state before it ``[BV, K]`` and its ``x [BV, C]``."""
    if not REVERSE:
        b_a = tl.trans(b_a)
    b_y = tl.zeros([BV, C], tl.float32)
    b_y = product(b_state, tl.trans(b_read), b_y, PRECISION)
    b_y = product(b_x, b_a, b_y, PRECISION)
    return tl.trans(b_y)


@triton.jit(do_not_specialize=["T", "NT", "NC", "SEGMENT"])
def ddts_chunk_walk_kernel(
    x,
    y,
    a,
    read,
    write,
    keep,
    h0,
    ht,
    segment_keep,
    states,
    starts,
    ends,
    offsets,
    T,
    NT,
    NC,
    SEGMENT,
    x_b,
    x_t,
    x_h,
    y_b,
    y_t,
    y_h,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Walk the chunks of one segment of one sequence with the state in registers.

    Program (block of V, segment, sequence * H + head). ``h0`` and ``ht`` are fp32 ``[sequences * H,
    segments, K, V]``. With ``y=None`` only the state is computed, from zero, and the total decay
    of the segment goes to ``segment_keep [sequences * H, segments, K]``; the last segment is not
    walked then, because no segment starts from its state. ``states [slots, V, K]`` takes the state
    at the start of each chunk. With ``TMA`` x, y, a, read, write and states are descriptors.
    """
    i_v = tl.program_id(0)
    i_s = tl.program_id(1)
    i_nh = tl.program_id(2).to(tl.int64)
    i_n = i_nh // H
    i_h = i_nh % H
    first, count = sequence_chunks(i_n, offsets, NT)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    # V first: the accumulator's layout is then the layout of the next product's left operand
    o_state = o_k[None, :] * V + o_v[:, None]
    segment = i_nh * tl.num_programs(1) + i_s
    state = tl.zeros([BV, K], tl.float32)
    if h0 is not None:
        state = tl.load(h0 + segment * K * V + o_state)
    if segment_keep is not None:
        all_keep = tl.full([K], 1.0, tl.float32)
    stop = min((i_s + 1) * SEGMENT, count)
    if y is None:
        stop = tl.where(i_s == tl.num_programs(1) - 1, 0, stop)
    for j in tl.range(i_s * SEGMENT, stop, num_stages=STAGES):
        i_c = first + count - 1 - j if REVERSE else first + j
        slot = i_h * NC + i_c
        b_keep = tl.load(keep + slot * K + o_k)
        # first row of the slot in read, write and a
        row = slot * C
        if TMA:
            # dense rows: a sequence is a row of the batch
            row = row.to(tl.int32)
            i_b, start, end = i_n, (i_c - first).to(tl.int32) * C, T
        else:
            i_b, start, end = chunk_tokens(i_c, starts, ends, T, NT, C)
        # fmt: off
        b_x, b_write = load_written(
            x, write, row, i_b, i_h, start, end, i_v * BV, o_c, x_b, x_t, x_h, K, C, BV, TMA
        )
        # fmt: on
        # TMA has no dtype conversion; without it x (fp16) becomes the products' dtype here
        b_x = tl.trans(b_x).to(b_write.dtype)
        if y is not None:
            b_state = operand(state, ROUND).to(b_write.dtype)
            b_read, b_a = load_read(read, a, row, o_c, K, C, TMA)
            if states is not None:
                store_state(states, b_state, slot, i_v * BV, V, K, BV, TMA)
            b_y = chunk_output(b_state, b_read, b_x, b_a, C, BV, REVERSE, PRECISION)
            store_output(y, b_y, i_b, i_h, start, end, i_v * BV, o_c, y_b, y_t, y_h, C, BV, TMA)
        if segment_keep is not None:
            all_keep *= b_keep
        state = product(b_x, b_write, state * b_keep[None, :], PRECISION)
    if y is None:
        tl.store(ht + segment * K * V + o_state, state)
        tl.store(segment_keep + segment * K + o_k, all_keep)
    elif i_s == tl.num_programs(1) - 1:
        tl.store(ht + i_nh * K * V + o_state, state)


@triton.jit(do_not_specialize=["S"])
def ddts_scan_segments_kernel(
    local, decay, h0, S, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """Replace each segment's own state by the state it starts from: ``local [N, S, K, V]``.

    Program (block of V, block of K, sequence): S' = decay S + local, in order of the segments.
    """
    i_n = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    o_kv = o_k[:, None] * V + o_v[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        state = tl.load(h0 + i_n * K * V + o_kv)
    for i_s in range(S):
        p_local = local + (i_n * S + i_s) * K * V
        b_local = tl.load(p_local + o_kv)
        tl.store(p_local + o_kv, state)
        b_decay = tl.load(decay + (i_n * S + i_s) * K + o_k)
        state = b_decay[:, None] * state + b_local


@triton.jit(do_not_specialize=["NT"])
def ddts_chunk_products_kernel(
    v,
    do,
    states,
    dstates,
    starts,
    ends,
    da,
    dread,
    dwrite,
    dkeep,
    a,
    write,
    along,
    T,
    NT,
    v_b,
    v_t,
    v_h,
    do_b,
    do_t,
    do_h,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of a chunk that are sums over V. ``da`` is symmetric, from the lower triangle.

    Program (column, head, slice of K). Outputs are fp32 in the layouts of prepare. ``along [slots,
    slices, C]`` takes what a slice adds to ``sum_K k dk`` of each key as written: the part of its
    gradient along the key, which has no effect on a normalised key.
    """
    i_c = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    slot = i_h * tl.num_programs(0) + i_c
    i_b, start, end = chunk_tokens(i_c, starts, ends, T, NT, C)
    o_c = tl.arange(0, C)
    o_k = tl.program_id(2) * BK + tl.arange(0, BK)
    mask = (start + o_c < end)[:, None]
    p_v = v + i_b * v_b + i_h * v_h + start * v_t
    p_do = do + i_b * do_b + i_h * do_h + start * do_t
    b_da = tl.zeros([C, C], tl.float32)
    b_dread = tl.zeros([C, BK], tl.float32)
    b_dwrite = tl.zeros([C, BK], tl.float32)
    b_dkeep = tl.zeros([BK], tl.float32)
    # a column after the last packed document gets zeros
    stop = tl.where(start < end, V, 0)
    for i_v in tl.range(0, stop, BV, num_stages=STAGES):
        o_v = i_v + tl.arange(0, BV)
        o_vk = o_v[:, None] * K + o_k[None, :]
        b_state = tl.load(states + slot * V * K + o_vk)
        b_dstate = tl.load(dstates + slot * V * K + o_vk)
        b_v = tl.load(p_v + o_c[:, None] * v_t + o_v[None, :], mask=mask, other=0.0)
        b_do = tl.load(p_do + o_c[:, None] * do_t + o_v[None, :], mask=mask, other=0.0)
        b_v = b_v.to(b_state.dtype)
        b_do = b_do.to(b_state.dtype)
        b_dkeep += tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 0)
        b_da = product(b_do, tl.trans(b_v), b_da, PRECISION)
        b_dread = product(b_do, b_state, b_dread, PRECISION)
        b_dwrite = product(b_v, b_dstate, b_dwrite, PRECISION)
    if tl.program_id(2) == 0:
        b_symmetric = tl.where(o_c[:, None] >= o_c[None, :], b_da, tl.trans(b_da))
        tl.store(da + slot * C * C + o_c[:, None] * C + o_c[None, :], b_symmetric)
    o_ck = o_c[:, None] * K + o_k[None, :]
    tl.store(dread + slot * C * K + o_ck, b_dread)
    tl.store(dwrite + slot * C * K + o_ck, b_dwrite)
    tl.store(dkeep + slot * K + o_k, b_dkeep)
    if along is not None:
        b_along = tl.sum(b_dwrite * tl.load(write + slot * C * K + o_ck).to(tl.float32), 1)
        if tl.program_id(2) == 0:
            # the scores above the diagonal are zero, but their gradient need not be
            b_a = tl.load(a + slot * C * C + o_c[:, None] * C + o_c[None, :]).to(tl.float32)
            lower = o_c[:, None] >= o_c[None, :]
            b_along += tl.sum(tl.where(lower, b_da * b_a, 0.0), 0)
        tl.store(along + (slot * tl.num_programs(2) + tl.program_id(2)) * C + o_c, b_along)


@triton.jit
def gradients_in_chunk(
    b_q,
    b_k,
    b_g,
    p_da,
    summed,
    o_i,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Gradients of queries, keys and log-decays through the scores of a chunk, without their
    diagonal.

    At each level the odd block's queries met the even block's keys, so one product with the
    symmetric ``da`` gives both. The gradient of a row's decay goes to each log-decay in it.
    """
    b_da = operand(tl.load(p_da + o_i[:, None] * C + o_i[None, :]), ROUND)
    b_dq = tl.zeros(b_q.shape, tl.float32)
    b_dk = tl.zeros(b_q.shape, tl.float32)
    b_dg = tl.zeros(b_q.shape, tl.float32)
    for level in tl.range(0, LEVELS, num_stages=2):
        odd = is_odd(o_i, level)[:, None]
        b_summed = load_summed(summed, level, C)
        decay = decay_over(b_summed, b_g, PRECISION)
        b_own = tl.where(odd, b_q, b_k)
        # same as siblings in prepare, but o_i ^ o_j would stay in registers throughout this loop
        block = o_i >> level
        b_met = tl.where((block[:, None] ^ block[None, :]) == 1, b_da, 0.0)
        b_faded = operand(b_own * decay, ROUND)
        level_d = tl.dot(b_met, b_faded, input_precision=PRECISION) * decay
        b_dq += tl.where(odd, level_d, 0.0)
        b_dk += tl.where(odd, 0.0, level_d)
        b_dg = masked_sum(tl.trans(b_summed), b_own * level_d, b_dg, PRECISION)
    return b_dq, b_dk, b_dg


@triton.jit
def gradients_beyond_chunk(
    b_q,
    b_k,
    b_dq,
    b_dk,
    b_dg,
    b_g,
    dread,
    dwrite,
    dkeep,
    summed,
    slot,
    o_i,
    o_k,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the gradients through the state: what queries read before, what keys leave after it."""
    o_ck = o_i[:, None] * K + o_k
    before = load_summed(summed, LEVELS, C)
    prefix = decay_over(before, b_g, PRECISION)
    across_d = tl.load(dread + slot * C * K + o_ck) * prefix
    b_dg = masked_sum(tl.trans(before), b_q * across_d, b_dg, PRECISION)
    b_dq += across_d
    after = load_summed(summed, LEVELS + 1, C)
    suffix = decay_over(after, b_g, PRECISION)
    across_d = tl.load(dwrite + slot * C * K + o_ck) * suffix
    b_dg = masked_sum(tl.trans(after), b_k * across_d, b_dg, PRECISION)
    b_dk += across_d
    # the decays before and after a position make up that of the whole chunk
    b_dg += prefix * suffix * tl.load(dkeep + slot * K + o_k)
    return b_dq, b_dk, b_dg


@triton.jit
def raw_key_gradient(
    b_dunit, b_unit, p_along, norms, eps, o_i, SLICES: tl.constexpr, C: tl.constexpr
):
    """Gradient of raw keys from that of their unit vectors: ``(dunit - unit (unit . dunit)) /
    norm``, where ``along [SLICES, C]`` are the parts of ``unit . dunit``."""
    b_along = tl.zeros([C], tl.float32)
    for i_s in range(SLICES):
        b_along += tl.load(p_along + i_s * C + o_i)
    # a norm that was raised to eps is a constant
    b_along = tl.where(norms > eps, b_along, 0.0)[:, None]
    return (b_dunit - b_unit * b_along) * reciprocal(norms)[:, None]


@triton.jit(do_not_specialize=["T", "NT"])
def ddts_chunk_gate_kernel(
    q,
    k,
    g,
    temper,
    resets,
    starts,
    ends,
    da,
    dread,
    dwrite,
    dkeep,
    along,
    dq,
    dk,
    dg,
    dtemper,
    summed,
    scale,
    eps,
    T,
    NT,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    g_b,
    g_t,
    g_h,
    temper_b,
    temper_t,
    temper_h,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Gradients of q, k and log_decay, contiguous ``[B, T, H, K]``; with ``temper``, of q, the raw
    key, select and temper. Program (column, head, slice of K)."""
    i_c = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    slot = i_h * tl.num_programs(0) + i_c
    i_b, start, end = chunk_tokens(i_c, starts, ends, T, NT, C)
    o_i = tl.arange(0, C)
    o_k = tl.program_id(2) * BK + tl.arange(0, BK)[None, :]
    mask = (start + o_i < end)[:, None]
    p_q = q + i_b * q_b + i_h * q_h + start * q_t
    p_k = k + i_b * k_b + i_h * k_h + start * k_t
    p_g = g + i_b * g_b + i_h * g_h + start * g_t
    p_resets = None if resets is None else resets + i_b * T + start
    o_kt = o_i[:, None] * k_t + o_k
    o_gt = o_i[:, None] * g_t + o_k
    norms = None
    p_temper = None
    if temper is not None:
        p_temper = temper + i_b * temper_b + i_h * temper_h + start * temper_t
        p_temper = p_temper + (o_i[:, None] * temper_t + o_k)
        norms = key_norms(p_k, o_i, k_t, mask, eps, K, C, BK)
    b_q = tl.load(p_q + o_i[:, None] * q_t + o_k, mask=mask, other=0.0).to(tl.float32) * scale
    b_k, b_g = load_gated(p_k + o_kt, p_g + o_gt, p_temper, p_resets, norms, o_i, mask)
    p_da = da + slot * C * C
    base = ((i_b * T + start) * H + i_h) * K
    o_out = o_i[:, None] * (H * K) + o_k
    b_dq, b_dk, b_dg = gradients_in_chunk(
        b_q, b_k, b_g, p_da, summed, o_i, C, LEVELS, PRECISION, ROUND
    )
    # fmt: off
    b_dq, b_dk, b_dg = gradients_beyond_chunk(
        b_q, b_k, b_dq, b_dk, b_dg, b_g, dread, dwrite, dkeep, summed, slot, o_i, o_k,
        K, C, LEVELS, PRECISION,
    )
    # fmt: on
    # the diagonal of the scores does not depend on the gates
    diagonal = tl.load(p_da + o_i * C + o_i)[:, None]
    b_dq = (b_dq + diagonal * b_k) * scale
    b_dk += diagonal * b_q
    tl.store(dq + base + o_out, b_dq.to(dq.dtype.element_ty), mask=mask)
    if temper is not None:
        b_unit = tl.load(p_k + o_kt, mask=mask, other=0.0).to(tl.float32)
        b_unit *= reciprocal(norms)[:, None]
        b_select, b_temper = load_gates(p_g + o_gt, p_temper, mask)
        b_dk, b_dg, b_dt = tempered_gate_gradients(b_dk, b_dg, b_unit, b_select, b_temper)
        tl.store(dtemper + base + o_out, b_dt.to(dtemper.dtype.element_ty), mask=mask)
        p_along = along + slot * SLICES * C
        b_dk = raw_key_gradient(b_dk, b_unit, p_along, norms, eps, o_i, SLICES, C)
    tl.store(dk + base + o_out, b_dk.to(dk.dtype.element_ty), mask=mask)
    tl.store(dg + base + o_out, b_dg.to(dg.dtype.element_ty), mask=mask)
