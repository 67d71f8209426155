"""Chunked DDTS in Triton: training and prefill on a GPU.

Forward: prepare, walk. Backward: prepare again, the walk in reverse, products, gate. Saved beyond
the inputs: one state ``[V, K]`` in the operands' dtype per chunk of 64 tokens, so 2 V bytes per
token for K = 64 in bfloat16, and nothing without gradients. The kernels are in
``triton_chunk_kernels.py``.
"""

import contextlib
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from .. import reference
from .._schemas import (
    TRITON_CHUNK,
    TRITON_KEY_DIMS,
    chunk_columns,
    register_gradient,
    tile_dtype,
)
from .._triton import (
    FP_FUSION,
    capability,
    check_grid,
    check_runs_here,
    divisor_tile,
    implement,
    multiprocessors,
    near_tokens,
    strides,
)
from .triton_chunk_kernels import (
    ddts_chunk_gate_kernel,
    ddts_chunk_prepare_kernel,
    ddts_chunk_products_kernel,
    ddts_chunk_walk_kernel,
    ddts_scan_segments_kernel,
)

_LEVELS = int(math.log2(TRITON_CHUNK))

_MIN_CHUNKS_PER_SEGMENT = 4
_MAX_SEGMENTS = 16
# chunks that a walk takes in the time of the two launches that segments add (estimated, not timed)
_CHUNKS_OF_SPLITTING = 8


class Tile(NamedTuple):
    """Launch configuration: how much of V (or K) a program takes, its warps and its stages."""

    width: int
    num_warps: int
    num_stages: int


def prepare_tile(key_dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """As much of K at once as the registers hold; the scores are summed over the slices. Four warps
    leave room for a second program. Before sm_90 each warp holds the log-decays of all rows.
    Sixteen columns are too few for eight warps (see :func:`gate_tile`).
    """
    if dtype == torch.bfloat16:
        return Tile(key_dim if key_dim <= 64 and arch >= 90 else min(key_dim, 32), 4, 1)
    return Tile(min(key_dim, 32), 4 if key_dim == 16 else 8, 1)


def walk_tile(
    key_dim: int, value_dim: int, dtype: torch.dtype, tma: bool, arch: int, saves: bool
) -> Tile:
    """The state is ``width * K`` fp32 in registers. The addresses of the pointer variant need 8
    warps, and before sm_90 the products' operands take registers that halve the width.

    With the copy engine and K = 64 on an H200 (B = 8, T = 4096, V = 4096): 163 us with 128 columns
    and four stages in flight, 168 with 64 and three, 190 with 128 and two. While states are saved,
    228 us with 64 and three against 236 with 128 and four: two programs share a multiprocessor.
    """
    if tma and dtype == torch.bfloat16 and key_dim <= 64:
        width, stages = (64, 3) if saves else (128, 4)
        return Tile(divisor_tile(value_dim, width), 4, stages)
    if dtype == torch.float32:
        return _single_walk_tile(key_dim, value_dim, tma, arch)
    limit = (8192 if tma or arch >= 90 else 4096) // key_dim
    width = divisor_tile(value_dim, max(min(limit, 128), 16))
    stages = 2 if arch >= 90 else 3
    # read and write take 64 * K numbers each per stage; all stages share 99 KiB
    if arch == 86:
        stages = max(min(stages, 256 // key_dim), 1)
    # on eight warps, 64 rows and K = 16 are 8 columns per warpgroup (see gate_tile)
    narrow = arch >= 90 and key_dim == 16 and width == 64
    return Tile(width, 4 if narrow or (tma and key_dim <= 128) else 8, stages)


def _single_walk_tile(key_dim: int, value_dim: int, tma: bool, arch: int) -> Tile:
    """For float32 operands: besides state and output ``[64, width]``, the parts of three products
    take registers, which leaves 16 columns. K = 16 would spill (in reverse, 800 bytes on sm_90)
    unless ``wgmma`` reads operands from shared memory: that needs 64 columns for every four warps,
    and leaves registers for only one stage, or for two with 128 columns and the copy engine.
    """
    if key_dim == 16 and arch >= 90:
        width = divisor_tile(value_dim, 128)
        return Tile(width, 8 if width == 128 else 4, 2 if tma and width == 128 else 1)
    width = divisor_tile(value_dim, 32 if tma and key_dim == 64 else 16)
    if arch >= 90:
        return Tile(width, 8, 2)
    # read and write take 64 * K numbers each per stage; all stages share 163 KiB, or 99
    return Tile(width, 8, max(min(3, (128 if arch == 86 else 256) // key_dim), 1))


def products_tile(key_dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """Accumulators are C * C + 2 C * K fp32; V streams through shared memory. For K = 64 on an H200
    (B = 8, T = 4096, V = 4096) 208 us with 128 columns and two stages, 225 with 64 and three;
    before sm_90 more than 32 columns spill registers in Triton 3.6. Sixteen channels of K are too
    few for eight warps (see :func:`gate_tile`)."""
    if dtype == torch.float32:
        return Tile(16, 4 if key_dim == 16 else 8, 3)
    if key_dim > 64:
        return Tile(divisor_tile(value_dim, 64), 8, 3)
    width = divisor_tile(value_dim, 128 if arch >= 90 else 32)
    return Tile(width, 4, 2 if width == 128 else 3)


def gate_tile(key_dim: int, dtype: torch.dtype, arch: int) -> Tile:
    """Slices of K: five ``[C, width]`` fp32 values and dA live across the levels. In float32 the
    parts of three products take more registers than four warps have, so eight share them before
    sm_90. On sm_90 eight warps would make ``wgmma`` 8 columns wide, as 32 columns on 16 warps do,
    which ended in an illegal access on an H200 (Triton 3.6)."""
    return Tile(min(key_dim, 16), 8 if dtype == torch.float32 and arch < 90 else 4, 1)


def forward(
    q, k, v, log_decay, *, scale, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """``ddts`` by chunks in Triton; the contract is that of :func:`rodimus_kernels.ddts`.

    Raises:
        ValueError: K is not one of ``TRITON_KEY_DIMS``, V is not a multiple of 16, a dtype is not
            float32, bfloat16 or float16, sequences * heads is more than 65,535, or Triton does not
            run on the tensors' device.
    """
    resets = None
    if cu_seqlens is not None and initial_state is None and not output_final_state:
        # without states of their own, documents share chunks: a reset separates them
        resets = reference.document_starts(cu_seqlens, q.shape[1])[None]
        cu_seqlens = None
    o, final_state = _run(
        "ddts", q, k, v, log_decay, None, 0.0, scale, initial_state, resets, cu_seqlens
    )
    return o, (final_state if output_final_state else None)


def gated_forward(
    q, k, v, select, temper, *, eps, scale, initial_state, output_final_state, starts
):
    """``gated_ddts`` with the gates inside the kernels, forward and backward; the contract is that
    of :func:`rodimus_kernels.gated_ddts`.

    Raises:
        ValueError: as :func:`forward`.
    """
    resets = None if starts is None else starts.expand(q.shape[:2]).contiguous()
    o, final_state = _run(
        "gated_ddts", q, k, v, select, temper, eps, scale, initial_state, resets, None
    )
    return o, (final_state if output_final_state else None)


def _run(operator, q, k, v, g, temper, eps, scale, initial_state, resets, cu_seqlens):
    inputs = (q, k, v, g) if temper is None else (q, k, v, g, temper)
    check_runs_here(operator, *inputs)
    _check_dims(f"{operator}(impl='triton_chunk')", q.shape[-1], v.shape[-1])
    if initial_state is not None:
        inputs += (initial_state,)
    save_states = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    o, final_state, _ = torch.ops.rodimus.ddts_chunk(
        q, k, v, g, temper, eps, scale, initial_state, resets, cu_seqlens, save_states
    )
    return o, final_state


def _check_dims(call, key_dim, value_dim):
    if key_dim not in TRITON_KEY_DIMS or value_dim % 16:
        raise ValueError(
            f"{call}: expected K in {TRITON_KEY_DIMS} and V a multiple of 16,"
            f" got K = {key_dim}, V = {value_dim}"
        )


class _Columns(NamedTuple):
    """Where the chunks are. The tensors are None for dense rows."""

    count: int
    per_row: int
    starts: torch.Tensor | None
    ends: torch.Tensor | None
    offsets: torch.Tensor | None


def _columns(batch, length, cu_seqlens):
    count = chunk_columns(batch, length, cu_seqlens)
    if cu_seqlens is None:
        return _Columns(count, count // max(batch, 1), None, None, None)
    bounds = cu_seqlens.long()
    chunks = (bounds.diff() + TRITON_CHUNK - 1) // TRITON_CHUNK
    offsets = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))
    column = torch.arange(count, device=bounds.device)
    # columns after the last chunk start past the end of the last document, so they are empty
    document = torch.searchsorted(offsets[1:], column, right=True).clamp(max=len(chunks) - 1)
    starts = bounds[document] + (column - offsets[document]) * TRITON_CHUNK
    ends = bounds[document + 1]
    return _Columns(count, 0, *(x.to(torch.int32) for x in (starts, ends, offsets)))


class _Tiles(NamedTuple):
    """What prepare writes, by slot."""

    a: torch.Tensor
    read: torch.Tensor
    write: torch.Tensor
    keep: torch.Tensor


def _precision(v):
    """float32 inputs get float32 products; halves are rounded to 8 or 11 bits anyway."""
    return "tf32x3" if v.dtype == torch.float32 else "tf32"


def _round(v):
    """Whether to round fp32 operands to tf32: neither for bfloat16, nor for three products."""
    return v.dtype == torch.float16


class _Keys(NamedTuple):
    """All inputs with K channels, and how they are used. With ``temper``, k is raw, g is the
    pre-activation of the selection gate, and eps the least norm of k; otherwise g is the
    log-decay."""

    q: torch.Tensor
    k: torch.Tensor
    g: torch.Tensor
    temper: torch.Tensor | None
    eps: float
    scale: float
    resets: torch.Tensor | None


def _keys(q, k, g, temper, eps, scale, resets):
    temper = None if temper is None else near_tokens(temper)
    # rows of zeros after the last token are divided by their norm, too
    eps = max(eps, torch.finfo(torch.float32).tiny)
    return _Keys(*(near_tokens(x) for x in (q, k, g)), temper, eps, scale, resets)


def _key_strides(keys):
    """Strides of q, k, g and temper, as prepare and gate take them."""
    return strides(keys.q, keys.k, keys.g, keys.g if keys.temper is None else keys.temper)


@functools.cache
def _summed(device):
    """Which log-decays the decay of each row of a chunk sums up, ``[levels + 2, C, C]`` of zeros
    and ones in bfloat16: at level l of the tree, in an odd block of ``2^l`` those from the start of
    the block to the row, in an even block those after the row to the end of the block; then those
    of the whole chunk up to the row, and those after it. The first call copies the masks to the
    device, so a CUDA graph cannot capture that call.

    They are made in a thread of their own: while torch.compile(mode="reduce-overhead") runs a
    function for the first time, everything that its thread allocates is memory of the future graph,
    in which nothing may remain.
    """
    with ThreadPoolExecutor(1) as other:
        return other.submit(_make_summed, device).result()


def _make_summed(device):
    row = torch.arange(TRITON_CHUNK)
    before = row[:, None] >= row
    masks = []
    for level in range(_LEVELS):
        block = row >> level
        odd = (block % 2 == 1)[:, None]
        masks.append((block[:, None] == block) & (before == odd))
    return torch.stack([*masks, before, ~before]).to(device, torch.bfloat16)


def _prepare(keys, v, columns):
    heads, key_dim = keys.q.shape[2:]
    slots, dtype = heads * columns.count, tile_dtype(v)
    tiles = _Tiles(
        v.new_empty((slots, TRITON_CHUNK, TRITON_CHUNK), dtype=dtype),
        v.new_empty((slots, TRITON_CHUNK, key_dim), dtype=dtype),
        v.new_empty((slots, TRITON_CHUNK, key_dim), dtype=dtype),
        v.new_empty((slots, key_dim), dtype=torch.float32),
    )
    tile = prepare_tile(key_dim, dtype, capability(v))
    ddts_chunk_prepare_kernel[(columns.count, heads)](
        *keys[:4],
        keys.resets,
        columns.starts,
        columns.ends,
        *tiles,
        _summed(v.device),
        keys.scale,
        keys.eps,
        keys.q.shape[1],
        columns.per_row,
        *_key_strides(keys),
        K=key_dim,
        C=TRITON_CHUNK,
        BK=tile.width,
        LEVELS=_LEVELS,
        PRECISION=_precision(v),
        ROUND=_round(v),
        num_warps=tile.num_warps,
        **FP_FUSION,
    )
    return tiles


def use_tma(x: torch.Tensor, dtype: torch.dtype, columns: _Columns) -> bool:
    """Whether Hopper's copy engine can load x. It clips at the end of a row but not of a packed
    document, does not convert dtypes, and needs strides in multiples of 16 bytes."""
    if capability(x) < 90 or not x.numel():
        return False
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    return aligned and x.data_ptr() % 16 == 0 and x.dtype == dtype and columns.offsets is None


def segments(programs: int, chunks: int, slots: int) -> int:
    """Into how many segments to cut each sequence, by the estimated time of the waves.

    With segments, chunks are walked once more, at about half the work, to find the state that each
    segment leaves behind, and two more kernels are launched. This pays off where few sequences
    leave multiprocessors idle.

    Args:
        programs: programs of a walk without segments.
        chunks: chunks of a sequence.
        slots: programs that run at the same time.
    """
    best, best_time = 1, None
    for count in (1 << n for n in range(_MAX_SEGMENTS.bit_length())):
        if count > 1 and chunks < count * _MIN_CHUNKS_PER_SEGMENT:
            break
        waves = -(-programs * count // slots) + 0.5 * -(-programs * (count - 1) // slots)
        duration = waves * -(-chunks // count) + (_CHUNKS_OF_SPLITTING if count > 1 else 0)
        if best_time is None or duration < best_time:
            best, best_time = count, duration
    return best


def programs_per_multiprocessor(tile: Tile, key_dim: int, dtype: torch.dtype, saves: bool) -> int:
    """How many programs of a walk run on a multiprocessor at the same time: two, if their registers
    and their shared memory fit, the latter in 228 KiB.

    Args:
        tile: that of the walk.
        key_dim: K.
        dtype: that of the products' operands.
        saves: states are saved, from a tile in shared memory.
    """
    # x, read, write and a in each stage; y and states while they are stored
    stage = TRITON_CHUNK * (tile.width + 2 * key_dim + TRITON_CHUNK)
    out = tile.width * (TRITON_CHUNK + (key_dim if saves else 0))
    shared = (tile.num_stages * stage + out) * dtype.itemsize
    # 1280 bytes: barriers, and 1 KiB per program for the system. A thread of 8 warps has over 128
    # registers
    return 2 if tile.num_warps <= 4 and 2 * (shared + 1280) <= 228 * 1024 else 1


def _segments(x, programs, columns, per_multiprocessor):
    if columns.offsets is not None or not x.is_cuda:
        return 1
    slots = multiprocessors(x.device) * per_multiprocessor
    return segments(programs, columns.per_row, slots)


def _walk(x, tiles, columns, initial_state, sequences, *, reverse, states):
    """``(y, final state)`` of the walk; fills ``states`` unless that is None."""
    heads, key_dim, value_dim = x.shape[2], tiles.keep.shape[-1], x.shape[-1]
    dtype, saves = tiles.a.dtype, states is not None
    tma = use_tma(x, dtype, columns)
    tile = walk_tile(key_dim, value_dim, dtype, tma, capability(x), saves)
    final_state = x.new_empty((sequences, heads, key_dim, value_dim), dtype=torch.float32)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    side_by_side = programs_per_multiprocessor(tile, key_dim, dtype, saves)
    count = _segments(x, sequences * heads * (value_dim // tile.width), columns, side_by_side)
    run = _walk_launcher(x, tiles, columns, tile, sequences, tma=tma, reverse=reverse)
    if count > 1:
        initial_state = _segment_states(run, x, tiles, initial_state, sequences, count)
    run(y, initial_state, final_state, None, states, count)
    return y, final_state


def _walk_launcher(x, tiles, columns, tile, sequences, *, tma, reverse):
    heads, key_dim, value_dim = x.shape[2], tiles.keep.shape[-1], x.shape[-1]

    def run(y, initial_state, final_state, segment_keep, states, count):
        tensors = (x, y, tiles.a, tiles.read, tiles.write, states)
        if reverse:
            tensors = (x, y, tiles.a, tiles.write, tiles.read, states)
        y_strides = strides(x if y is None else y)
        if tma:
            tensors = _descriptors(*tensors, tile.width)
        *inputs, states = tensors
        ddts_chunk_walk_kernel[(value_dim // tile.width, count, sequences * heads)](
            *inputs,
            tiles.keep,
            initial_state,
            final_state,
            segment_keep,
            states,
            columns.starts,
            columns.ends,
            columns.offsets,
            x.shape[1],
            columns.per_row,
            columns.count,
            _segment_length(columns, count),
            *strides(x),
            *y_strides,
            H=heads,
            K=key_dim,
            V=value_dim,
            C=TRITON_CHUNK,
            BV=tile.width,
            REVERSE=reverse,
            TMA=tma,
            STAGES=tile.num_stages,
            PRECISION=_precision(x),
            ROUND=_round(x),
            num_warps=tile.num_warps,
            **FP_FUSION,
        )

    return run


def _segment_length(columns, count):
    """Chunks of a segment; packed documents of any length are walked in one segment."""
    return -(-columns.per_row // count) if columns.offsets is None else columns.count


def _descriptors(x, y, a, read, write, states, width):
    from triton.tools.tensor_descriptor import TensorDescriptor

    def rows(t, block):
        return TensorDescriptor.from_tensor(t.flatten(0, -2), [block, t.shape[-1]])

    def sequence(t):
        return TensorDescriptor.from_tensor(t.transpose(1, 2), [1, 1, TRITON_CHUNK, width])

    return (
        sequence(x),
        None if y is None else sequence(y),
        *(rows(t, TRITON_CHUNK) for t in (a, read, write)),
        None if states is None else rows(states, width),
    )


def _segment_states(run, x, tiles, initial_state, sequences, count):
    """The state each segment starts from: ``[sequences, H, segments, K, V]``."""
    heads, key_dim, value_dim = x.shape[2], tiles.keep.shape[-1], x.shape[-1]
    local = x.new_empty((sequences, heads, count, key_dim, value_dim), dtype=torch.float32)
    decay = x.new_empty((sequences, heads, count, key_dim), dtype=torch.float32)
    run(None, None, local, decay, None, count)
    return _scan(local, decay, initial_state)


def _scan(local, decay, initial_state):
    """Replace each segment's own state ``[N, H, S, K, V]`` in place by the one it starts from."""
    sequences, heads, count, key_dim, value_dim = local.shape
    check_grid("ddts_scan", "sequences * heads", sequences * heads)
    block_k, block_v = min(key_dim, 32), divisor_tile(value_dim, 32)
    grid = (value_dim // block_v, key_dim // block_k, sequences * heads)
    ddts_scan_segments_kernel[grid](
        local,
        decay,
        initial_state,
        count,
        K=key_dim,
        V=value_dim,
        BK=block_k,
        BV=block_v,
        **FP_FUSION,
    )
    return local


def scan(states, log_decays, *, reverse):
    """``ddts_scan``; the contract is that of :func:`rodimus_kernels.ddts_scan`.

    Raises:
        ValueError: K is not one of ``TRITON_KEY_DIMS``, V is not a multiple of 16, a dtype is not
            float32, sequences * heads is more than 65,535, or Triton does not run on the tensors'
            device.
    """
    check_runs_here("ddts_scan", states, log_decays)
    if states.dtype != torch.float32 or log_decays.dtype != torch.float32:
        raise ValueError(
            f"ddts_scan(impl='triton'): expected float32, got {states.dtype}, {log_decays.dtype}"
        )
    _check_dims("ddts_scan(impl='triton')", *states.shape[-2:])
    if reverse:
        states, log_decays = states.flip(0), log_decays.flip(0)
    # written in place, so a copy even if the layout is right already
    local = states.movedim(0, 2).clone(memory_format=torch.contiguous_format)
    # Triton launches on the current device
    guard = torch.cuda.device(states.device) if states.is_cuda else contextlib.nullcontext()
    with guard:
        before = _scan(local, log_decays.movedim(0, 2).exp().contiguous(), None).movedim(2, 0)
    return before.flip(0) if reverse else before


@implement("ddts_chunk")
def _forward(
    q, k, v, log_decay, temper, eps, scale, initial_state, resets, cu_seqlens, save_states
):
    keys, v = _keys(q, k, log_decay, temper, eps, scale, resets), near_tokens(v)
    heads, key_dim, value_dim = q.shape[2], q.shape[3], v.shape[3]
    columns = _columns(q.shape[0], q.shape[1], cu_seqlens)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_grid("ddts", "sequences * heads", sequences * heads)
    if initial_state is not None:
        initial_state = initial_state.to(torch.float32).contiguous()
    tiles = _prepare(keys, v, columns)
    saved = columns.count if save_states else 0
    states = v.new_empty((heads, saved, value_dim, key_dim), dtype=tile_dtype(v))
    if cu_seqlens is not None:
        # columns after the last document are not read, but are made the same in each run
        states[:, -(-q.shape[1] // TRITON_CHUNK) :] = 0.0
    o, final_state = _walk(
        v,
        tiles,
        columns,
        initial_state,
        sequences,
        reverse=False,
        states=states if save_states else None,
    )
    return o, final_state, states


@implement("ddts_chunk_backward")
def _backward(q, k, v, log_decay, temper, eps, scale, resets, cu_seqlens, states, do, dfinal_state):
    keys = _keys(q, k, log_decay, temper, eps, scale, resets)
    v, do = near_tokens(v), near_tokens(do)
    columns = _columns(q.shape[0], q.shape[1], cu_seqlens)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if dfinal_state is not None:
        dfinal_state = dfinal_state.to(torch.float32).contiguous()
    tiles = _prepare(keys, v, columns)
    dstates = torch.empty_like(states)
    dv, dinitial_state = _walk(
        do, tiles, columns, dfinal_state, sequences, reverse=True, states=dstates
    )
    products = _products(v, do, states, dstates, columns, None if temper is None else tiles)
    dq, dk, dlog_decay, dtemper = _gate(keys, v, columns, products)
    dtemper = v.new_empty(0) if dtemper is None else dtemper
    return dq, dk, dv, dlog_decay, dtemper, dinitial_state


class _Products(NamedTuple):
    """What products writes, fp32 by slot; ``along`` only if keys were normalised."""

    da: torch.Tensor
    dread: torch.Tensor
    dwrite: torch.Tensor
    dkeep: torch.Tensor
    along: torch.Tensor | None


def _products(v, do, states, dstates, columns, normalised):
    """``normalised``: the tiles of prepare if a gradient of normalised keys is wanted, or None."""
    heads, value_dim, key_dim = states.shape[0], states.shape[2], states.shape[3]
    tile = products_tile(key_dim, value_dim, states.dtype, capability(v))
    slots = heads * columns.count
    block, square = min(key_dim, 128), (TRITON_CHUNK, key_dim)
    shapes = [(TRITON_CHUNK, TRITON_CHUNK), square, square, (key_dim,)]
    shapes += [] if normalised is None else [(key_dim // block, TRITON_CHUNK)]
    outputs = [v.new_empty((slots, *shape), dtype=torch.float32) for shape in shapes]
    products = _Products(*outputs[:4], None if normalised is None else outputs[4])
    tiles = (None, None) if normalised is None else (normalised.a, normalised.write)
    ddts_chunk_products_kernel[(columns.count, heads, key_dim // block)](
        v,
        do,
        states,
        dstates,
        columns.starts,
        columns.ends,
        *products[:4],
        *tiles,
        products.along,
        v.shape[1],
        columns.per_row,
        *strides(v, do),
        K=key_dim,
        V=value_dim,
        C=TRITON_CHUNK,
        BK=block,
        BV=tile.width,
        STAGES=tile.num_stages,
        PRECISION=_precision(v),
        num_warps=tile.num_warps,
        **FP_FUSION,
    )
    return products


def _gate(keys, v, columns, products):
    """``(dq, dk, dg, dtemper or None)`` from the products."""
    heads, key_dim = keys.q.shape[2:]
    new = lambda x: None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grads, tile = [new(x) for x in keys[:4]], gate_tile(key_dim, v.dtype, capability(v))
    ddts_chunk_gate_kernel[(columns.count, heads, key_dim // tile.width)](
        *keys[:4],
        keys.resets,
        columns.starts,
        columns.ends,
        *products,
        *grads,
        _summed(v.device),
        keys.scale,
        keys.eps,
        keys.q.shape[1],
        columns.per_row,
        *_key_strides(keys),
        H=heads,
        K=key_dim,
        C=TRITON_CHUNK,
        BK=tile.width,
        SLICES=1 if products.along is None else products.along.shape[1],
        LEVELS=_LEVELS,
        PRECISION=_precision(v),
        ROUND=_round(v),
        num_warps=tile.num_warps,
        **FP_FUSION,
    )
    return grads


def _setup_context(ctx, inputs, output):
    q, k, v, log_decay, temper, ctx.eps, ctx.scale, initial_state, resets, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, temper, resets, cu_seqlens, output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, dfinal_state, _dstates):
    q, k, v, log_decay, temper, resets, cu_seqlens, states = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    *grads, dtemper, dinitial_state = torch.ops.rodimus.ddts_chunk_backward(
        q,
        k,
        v,
        log_decay,
        temper,
        ctx.eps,
        ctx.scale,
        resets,
        cu_seqlens,
        states,
        do,
        dfinal_state,
    )
    dtemper = None if temper is None else dtemper
    dinitial_state = None if ctx.state_dtype is None else dinitial_state.to(ctx.state_dtype)
    return *grads, dtemper, None, None, dinitial_state, None, None, None


register_gradient("ddts_chunk", _autograd, _setup_context)
