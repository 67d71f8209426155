"""Sliding-window shared-key attention in Triton: training and prefill on a GPU.

Keys are read where they are, never repeated over the heads. Backward is two passes and
deterministic: dq by query tiles, then dk and dv by key tiles, dk added up in registers over the
heads that share the key. Saved beyond the inputs: o, and fp32 ``lse [B, H, T]``. The kernels are in
``triton_attention_kernels.py``.
"""

import math
from typing import NamedTuple

import torch
import triton

from .._schemas import register_gradient
from .._triton import (
    FP_FUSION,
    block_dim,
    capability,
    check_grid,
    check_runs_here,
    implement,
    multiprocessors,
    near_tokens,
    strides,
)
from .triton_attention_kernels import (
    shared_key_attention_dkv_kernel,
    shared_key_attention_dq_kernel,
    shared_key_attention_fwd_kernel,
)

MAX_DIM = 256

# with fewer dkv programs per multiprocessor than this, the heads are split over programs
_WAVES = 2


class Tile(NamedTuple):
    """Launch configuration: queries and keys of a tile, warps, stages of the pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# Tiles of the forward, dq and dkv kernels, by head dimension: the largest that compile with no (on
# Ampere at most 40 bytes of) spilled registers, except that at D = 128 on Hopper four warps with
# half the queries were faster on an H200 (B = 8, T = 4096, bfloat16): several programs then share a
# multiprocessor, and one multiplies while another computes its exponentials.
#
# dkv holds dk and dv in float32, 2 * BN * D / 256 registers per thread at 8 warps, and two scores,
# 2 * BN * BM / 256: together 192 of 255 at 64 x 128 and D = 128. The rest suffices with Hopper's
# copy engine, which needs no addresses; loads by pointer fit only with 64 keys, which reads the
# queries twice as often, and at D = 256 dk and dv alone would take 256 registers with 64 keys.
_HOPPER = {
    64: (Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
    128: (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 128, 8, 2)),
    256: (Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
}
_AMPERE = {
    64: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    128: (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
    256: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 2)),
}
# float32 takes three tf32 products, and the parts of their operands need registers: at D = 256 more
# than there are with any tile (dkv spills 6 KiB), so impl="auto" does not choose it
_SINGLE = {
    64: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    128: (Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    256: (Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


def tiles(dim: int, dtype: torch.dtype, tma: bool) -> tuple[Tile, Tile, Tile]:
    """Tiles of the forward, dq and dkv kernels.

    Args:
        dim: the larger of D and Dv.
        dtype: that of q, k and v.
        tma: tiles are loaded by the copy engine.
    """
    table = _SINGLE if dtype == torch.float32 else _HOPPER if tma else _AMPERE
    return table[max(block_dim(dim), 64)]


def head_groups(programs: int, pairs: int, multiprocessors: int) -> int:
    """Over how many programs to split the pairs of a key head: the fewest that fill the GPU."""
    groups = 1
    while groups < pairs and programs * groups < _WAVES * multiprocessors:
        groups *= 2
    return min(groups, pairs)


def use_tma(*tensors: torch.Tensor) -> bool:
    """Whether to load these ``[B, T, H, D]`` with Hopper's copy engine, which needs strides in
    multiples of 16 bytes. Not for float32, which is split into parts in registers anyway."""
    if tensors[0].dtype == torch.float32 or capability(tensors[0]) < 90:
        return False
    if not tensors[0].numel():
        return False
    return all(
        x.data_ptr() % 16 == 0
        and x.shape[-1] == block_dim(x.shape[-1])
        and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
        for x in tensors
    )


def _with_strides(x):
    """``x`` with a dense last dimension, and with strides that the copy engine takes in dimensions
    of size 1, where they do not matter: one head of a key expanded over all heads has stride 0."""
    x = near_tokens(x)
    given = [s if n > 1 else x.shape[-1] for n, s in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, [*given[:-1], 1])


def forward(q, k, v, *, window_size, scale, cu_seqlens=None):
    """``shared_key_attention`` in Triton; the contract is that of
    :func:`rodimus_kernels.shared_key_attention`.

    Raises:
        ValueError: D or Dv is above ``MAX_DIM``, a dtype is not float32, bfloat16 or float16,
            there are more than 65,535 rows, or Triton does not run on the tensors' device.
    """
    check_runs_here("shared_key_attention", q, k, v)
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        raise ValueError(
            f"shared_key_attention(impl='triton'): expected D and Dv up to {MAX_DIM},"
            f" got D = {q.shape[-1]}, Dv = {v.shape[-1]}"
        )
    # else searchsorted copies them in each call, and warns
    bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
    o, _ = torch.ops.rodimus.shared_key_attention(
        q.to(v.dtype), k.to(v.dtype), v, window_size, scale, bounds
    )
    return o


class _Launch(NamedTuple):
    """What all three kernels take: sizes, and how to compute."""

    starts: torch.Tensor | None
    ends: torch.Tensor | None
    scales: tuple[float, float]
    sizes: tuple[int, int, int]
    constants: dict


def _launch(q, k, v, window_size, scale, cu_seqlens):
    (_, queries, heads, dim), (keys, key_heads) = q.shape, k.shape[1:3]
    value_heads, value_dim = v.shape[2:]
    starts, ends = _document_bounds(cu_seqlens, keys)
    return _Launch(
        starts,
        ends,
        # scores in units of log2 for exp2
        (scale * math.log2(math.e), scale),
        (queries, keys, keys if window_size is None else min(window_size, keys)),
        {
            "H": heads,
            "HK": key_heads,
            "HV": value_heads,
            "D": dim,
            "DV": value_dim,
            "BD": block_dim(dim),
            "BDV": block_dim(value_dim),
            "PRECISION": "tf32x3" if v.dtype == torch.float32 else "tf32",
            **FP_FUSION,
        },
    )


def _document_bounds(cu_seqlens, length):
    """First token and end of the document of each token, int32 ``[T]``; the host does not wait for
    the device."""
    if cu_seqlens is None:
        return None, None
    token = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # the first boundary past the token; the one before it is the last of equal ones, which empty
    # documents have
    after = torch.searchsorted(cu_seqlens, token, right=True)
    return tuple(cu_seqlens[i].to(torch.int32) for i in (after - 1, after))


def _options(tile: Tile) -> dict:
    return {
        "BM": tile.queries,
        "BN": tile.keys,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


class _Operands(NamedTuple):
    """Tensors, or Hopper's descriptors of them, and how they are loaded."""

    by_query: list
    by_key: list
    tile: Tile
    tma: bool


def _operands(kernel: int, by_query, by_key):
    """Operands of a kernel, numbered as in :func:`tiles`, from ``[B, T, H, D]``."""
    tma = use_tma(*by_query, *by_key)
    dims = [x.shape[-1] for x in (*by_query, *by_key)]
    tile = tiles(max(dims), by_key[0].dtype, tma)[kernel]
    # on eight warps, 64 rows of 16 channels are 8 columns per warpgroup, and such a wgmma ended in
    # an illegal access on an H200 (Triton 3.6)
    rows = tile.keys if kernel == 2 else tile.queries
    if min(dims) <= 16 and rows == 64 and capability(by_key[0]) >= 90:
        tile = tile._replace(num_warps=4)
    if not tma:
        return _Operands(by_query, by_key, tile, tma)
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(x, height):
        # the tile's unit dimensions come first, else Triton passes it through registers
        return TensorDescriptor.from_tensor(x.transpose(1, 2), [1, 1, height, x.shape[-1]])

    queries = [describe(x, tile.queries) for x in by_query]
    return _Operands(queries, [describe(x, tile.keys) for x in by_key], tile, tma)


@implement("shared_key_attention")
def _forward(q, k, v, window_size, scale, cu_seqlens):
    q, k, v = (_with_strides(x) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    check_grid("shared_key_attention", "rows", batch)
    launch = _launch(q, k, v, window_size, scale, cu_seqlens)
    o = v.new_empty((batch, queries, heads, v.shape[-1]))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    (b_q,), (b_k, b_v), tile, tma = _operands(0, [q], [k, v])
    shared_key_attention_fwd_kernel[(triton.cdiv(queries, tile.queries), heads, batch)](
        b_q,
        b_k,
        b_v,
        o,
        lse,
        launch.starts,
        launch.scales[0],
        *launch.sizes,
        *strides(q, k, v),
        TMA=tma,
        **launch.constants,
        **_options(tile),
    )
    return o, lse


@implement("shared_key_attention_backward")
def _backward(q, k, v, window_size, scale, cu_seqlens, o, lse, do):
    q, k, v, do = (_with_strides(x) for x in (q, k, v, do))
    launch = _launch(q, k, v, window_size, scale, cu_seqlens)
    dq, delta = _dq(q, k, v, o.contiguous(), lse, do, launch)
    dk, dv = _dkv(q, k, v, lse, delta, do, launch)
    return dq, dk, dv


def _dq(q, k, v, o, lse, do, launch):
    batch, queries, heads, dim = q.shape
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    (b_q, b_do), (b_k, b_v), tile, tma = _operands(1, [q, do], [k, v])
    shared_key_attention_dq_kernel[(triton.cdiv(queries, tile.queries), heads, batch)](
        b_q,
        b_k,
        b_v,
        o,
        b_do,
        lse,
        delta,
        dq,
        launch.starts,
        *launch.scales,
        *launch.sizes,
        *strides(q, k, v, do),
        TMA=tma,
        **launch.constants,
        **_options(tile),
    )
    return dq, delta


def _dkv(q, k, v, lse, delta, do, launch):
    batch, keys, key_heads, _ = k.shape
    value_heads, value_dim = v.shape[2:]
    (b_q, b_do), (b_k, b_v), tile, tma = _operands(2, [q, do], [k, v])
    key_tiles, pairs = triton.cdiv(keys, tile.keys), math.lcm(key_heads, value_heads)
    groups = head_groups(
        key_tiles * key_heads * batch, pairs // key_heads, multiprocessors(k.device)
    )
    # partial sums stay fp32; a single one is the gradient itself
    dk = k.new_empty((groups, *k.shape), dtype=k.dtype if groups == 1 else torch.float32)
    dv = v.new_empty(
        (batch, keys, pairs, value_dim), dtype=v.dtype if pairs == value_heads else torch.float32
    )
    shared_key_attention_dkv_kernel[(key_tiles, key_heads * groups, batch)](
        b_q,
        b_k,
        b_v,
        b_do,
        lse,
        delta,
        dk,
        dv,
        launch.ends,
        *launch.scales,
        *launch.sizes,
        *strides(q, k, v, do),
        PAIRS=pairs,
        GROUPS=groups,
        TMA=tma,
        **launch.constants,
        **_options(tile),
    )
    dk = dk[0] if groups == 1 else dk.sum(0).to(k.dtype)
    if pairs > value_heads:
        # pair p reads value head p % Hv
        dv = dv.unflatten(2, (-1, value_heads)).sum(2).to(v.dtype)
    return dk, dv


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.window_size, ctx.scale, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, _dlse):
    if do is None:
        return (None,) * 6
    q, k, v, cu_seqlens, o, lse = ctx.saved_tensors
    grads = torch.ops.rodimus.shared_key_attention_backward(
        q, k, v, ctx.window_size, ctx.scale, cu_seqlens, o, lse, do
    )
    return *grads, None, None, None


register_gradient("shared_key_attention", _autograd, _setup_context)
