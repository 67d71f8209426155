"""One token through whole blocks of the model, for decoding."""

from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter
from typing import NamedTuple

import torch

from . import native
from ._dispatch import (
    check_floating,
    check_position,
    check_same_device,
    check_shape,
    load,
    mark_written,
    plain_integer,
)
from .linear import multiplies_slowly
from .quantized_weight import QUANTIZED, Int4Weight, QuantizedWeight
from .reference import int8_row_bytes

_IMPLS = {
    "reference": "rodimus_kernels.reference:blocks_step",
    "native": "rodimus_kernels.native_block:step",
    "persistent": "rodimus_kernels.native_block:persistent_step",
}
IMPLS = tuple(_IMPLS)
Matrix = torch.Tensor | QuantizedWeight


MATRICES = ("fc", "query_key", "gate_in", "gate_out", "mem_gate", "mixer_out")
MATRICES += ("query", "key", "value", "attn_out", "ffn_in", "ffn_out")
"""Weights of a block that are matrices of linear layers."""


class BlockWeights(NamedTuple):
    """Weights of a block; those of attention and MLP are None in a Rodimus block.

    D d_model, V d_inner, K mem_size, R rank of the input gate, W taps, I width of the MLP. Matrices
    are ``[outputs, inputs]`` and have one dtype. On a CPU the matrices of linear layers may be
    quantised, all of them together: to 8 bits, or, except for gate_out, to 4 bits.

    Attributes:
        mixer_norm: ``[D]``. fc: ``[2V, D]``. conv: ``[V, W]``. conv_bias: ``[V]``.
        query_key: ``[2K, V]``. gate_in: ``[R, V]``. gate_out: ``[V, R]``. gate_bias: ``[V]``.
        mem_gate: ``[2K, V]``, selection above temperature. mem_gate_bias: ``[2K]``.
        residual_weight: ``[V]``. act_norm: ``[V]``. mixer_out: ``[D, V]``.
        attn_norm: ``[D]``. query: ``[H * dim, D]``. key: ``[Hk * dim, D]``. value: ``[Hv * dim,
            D]``. attn_out: ``[D, H * dim]``. ffn_norm: ``[D]``. ffn_in: ``[2I, D]``. ffn_out:
            ``[D, I]``.
    """

    mixer_norm: torch.Tensor
    fc: Matrix
    conv: torch.Tensor
    conv_bias: torch.Tensor
    query_key: Matrix
    gate_in: Matrix
    gate_out: Matrix
    gate_bias: torch.Tensor
    mem_gate: Matrix
    mem_gate_bias: torch.Tensor
    residual_weight: torch.Tensor
    act_norm: torch.Tensor
    mixer_out: Matrix
    attn_norm: torch.Tensor | None = None
    query: Matrix | None = None
    key: Matrix | None = None
    value: Matrix | None = None
    attn_out: Matrix | None = None
    ffn_norm: torch.Tensor | None = None
    ffn_in: Matrix | None = None
    ffn_out: Matrix | None = None

    @property
    def is_uniform(self) -> bool:
        """Whether the native form takes these weights: all matrices have one dtype or those of
        linear layers are all quantised, and the rows of all weights are dense."""
        given = [matrix for name in MATRICES if (matrix := getattr(self, name)) is not None]
        uniform = all(type(x) in QUANTIZED for x in given) and type(self.gate_out) is not Int4Weight
        uniform = uniform or {matrix.dtype for matrix in given} == {self.conv.dtype}
        return uniform and all(map(_is_dense, self))


def _is_dense(weight):
    if type(weight) in QUANTIZED:
        return all(map(native.has_dense_rows, weight[:2]))
    return weight is None or native.has_dense_rows(weight)


_WITHOUT_ATTENTION = BlockWeights._fields.index("attn_norm")
_place = attrgetter("shape", "device")


class _Fitting:
    """Shapes and devices of the last block, and of its ring, that passed the checks. The next block
    or token mostly has the same ones, and then skips the checks of every tensor by name."""

    block = ring = None


_fitting = _Fitting()


def _fitting_before(stream):
    # symbolic sizes, from a compiler or of fake tensors, are valid in that call only
    is_plain = type(stream) in (torch.Tensor, torch.nn.Parameter)
    return _fitting if is_plain and not torch.compiler.is_compiling() else _Fitting()


def blocks_step(
    stream: torch.Tensor,
    weights: Sequence[BlockWeights],
    taps: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    rings: Sequence[torch.Tensor | None] = (),
    position: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    window_size: int | None = None,
    head_dim: int | None = None,
    key_eps: float = 1e-12,
    norm_eps: float = 1e-5,
    impl: str = "auto",
) -> torch.Tensor:
    """One token of each sequence through blocks of one kind, one after the other; taps, states and
    rings are updated in place. Not differentiable.

        rodimus:       h + mixer(norm(h))
        rodimus_plus:  h' = h + mixer(norm(h));  a = attention(norm(h'));  h' + mlp(norm(h' + a))

    The native form rounds to the weights' dtype only where the modules of the model do, but just
    once in the mixer and once in the MLP.

    Args:
        stream: Residual stream ``[B, D]``; float32 or the weights' dtype, which for quantised
            weights is that of the convolution. On a CPU the native form reads the weights once for
            every 8 rows, and a row's result does not depend on the other rows.
        weights: Each block's own tensors; nothing is copied.
        taps: Each block's last W inputs of the convolution, oldest first, ``[B, V, W]``.
        states: float32 ``[B, 1, K, V]``, one per block.
        rings: Each block's keys and values ``[B, R, Hk * dim + Hv * dim]``, or bytes with 8-bit
            values, as in :func:`shared_key_attention_step`; empty or None without attention.
        position: int64 ``[B]``: tokens each sequence has seen before this one.
        rotary: ``(cos, sin)``, each ``[B, n]`` with 2n <= dim, or None.
        window_size: Keys a query sees, its own position included.
        head_dim: Channels of a head.
        key_eps: Lower bound of the key norm.
        norm_eps: Added to the mean squares.
        impl: ``"auto"``, ``"native"``, ``"persistent"`` or ``"reference"``; an explicit choice
            never falls back. ``"persistent"`` is one kernel per block, on a GPU with cooperative
            launches: bfloat16 weights, B <= 8, a plain ring, one key head and an even number up to
            32 of query heads of 128 channels. It has not run on a GPU yet, so ``"auto"`` does not
            choose it.

    Returns:
        ``[B, D]`` in the stream's dtype.

    Raises:
        ValueError: a shape, dtype or device breaks the contract; nothing has been written then.
        RuntimeError: ``"native"`` or ``"persistent"`` was chosen and does not take the strides or
            heads, or needs another GPU; nothing has been written then.
        ImportError: the chosen implementation cannot be loaded.
    """
    rings = [ring for ring in rings if ring is not None]
    window_size = plain_integer("window_size", window_size)
    head_dim = plain_integer("head_dim", head_dim)
    _check_blocks(stream, weights, taps, states, rings)
    if rings:
        _check_attention(stream, weights, rings, position, rotary, window_size, head_dim)
    with torch.no_grad():
        if impl == "auto":
            uniform = all(block.is_uniform for block in weights)
            read = (stream, *chain.from_iterable(weights), *(rotary or ()))
            fits = can_fuse_block(stream.shape[0], *read)
            fits = fits and uniform and _can_write_natively(weights, taps, states, rings)
            impl = "native" if fits else "reference"
        if impl == "reference":
            _check_written(taps, states, rings)
        stream = load("blocks_step", impl, _IMPLS)(
            stream,
            weights,
            taps,
            states,
            rings,
            position,
            rotary,
            window_size=window_size,
            head_dim=head_dim,
            key_eps=key_eps,
            norm_eps=norm_eps,
        )
    mark_written(*taps, *states, *rings)
    return stream


def _can_write_natively(weights, taps, states, rings) -> bool:
    """Whether the native form can write taps, states and rings in place as they are."""
    for w, tap, state, ring in zip(weights, taps, states, rings or repeat(None), strict=False):
        dtype = w.conv.dtype
        if tap.dtype != dtype or state.dtype != torch.float32:
            return False
        if ring is not None and not (ring.dtype in (torch.uint8, dtype) and ring.is_contiguous()):
            return False
        if not (tap.is_contiguous() and state.is_contiguous()):
            return False
    return True


def _check_written(taps, states, rings):
    """Raise ValueError for integers, which would lose most of what is written to them; the native
    form refuses them itself."""
    rings = [None if ring.dtype == torch.uint8 else ring for ring in rings]
    for name, tensors in (("taps", taps), ("states", states), ("rings", rings)):
        check_floating(**{f"{name}[{i}]": x for i, x in enumerate(tensors)})


def _check_blocks(stream, weights, taps, states, rings):
    blocks, attending = len(weights), sum(w.query is not None for w in weights)
    if blocks == 0 or attending not in (0, blocks):
        raise ValueError(
            "expected one block or more, all with attention or all without;"
            f" got {blocks}, {attending} of them with attention"
        )
    counts = (len(taps), len(states), len(rings))
    if counts != (blocks, blocks, attending):
        raise ValueError(
            f"expected {blocks} taps, {blocks} states and {attending} rings for {blocks} blocks,"
            f" got {counts[0]}, {counts[1]} and {counts[2]}"
        )
    check_shape("stream", stream, ("B", "D"))
    fitting = _fitting_before(stream)
    for i, (w, tap, state) in enumerate(zip(weights, taps, states, strict=True)):
        given = (stream, *(w if attending else w[:_WITHOUT_ATTENTION]), tap, state)
        found = list(map(_place, given))
        if found != fitting.block:
            _check_block(i, stream, w, tap, state)
            fitting.block = found


def _check_block(i, stream, w, taps, state):
    _check_weights(f"weights[{i}].", stream, w)
    batch, inner, keys = stream.shape[0], w.conv.shape[0], w.mem_gate.shape[0] // 2
    check_shape(f"taps[{i}]", taps, (batch, *w.conv.shape))
    check_shape(f"states[{i}]", state, (batch, 1, keys, inner))
    check_same_device("stream", stream, taps=taps, state=state)


def _check_weights(prefix, stream, w):
    check_shape(f"{prefix}gate_out", w.gate_out, ("V", "R"))
    check_shape(f"{prefix}mem_gate", w.mem_gate, ("2K", "V"))
    (inner, rank), gates, width = w.gate_out.shape, w.mem_gate.shape[0], stream.shape[1]
    for name, matrix in (("mem_gate", w.mem_gate), ("ffn_in", w.ffn_in)):
        if matrix is not None and matrix.shape[0] % 2:
            rows = matrix.shape[0]
            raise ValueError(f"{prefix}{name} must have an even number of rows, got {rows}")
    expected = {
        "mixer_norm": (width,),
        "fc": (2 * inner, width),
        "conv": (inner, "W"),
        "conv_bias": (inner,),
        "query_key": (gates, inner),
        "gate_in": (rank, inner),
        "gate_bias": (inner,),
        "mem_gate": (gates, inner),
        "mem_gate_bias": (gates,),
        "residual_weight": (inner,),
        "act_norm": (inner,),
        "mixer_out": (width, inner),
    }
    if w.query is not None:
        check_shape(f"{prefix}query", w.query, ("H * dim", width))
        check_shape(f"{prefix}ffn_in", w.ffn_in, ("2I", width))
        expected |= {
            "attn_norm": (width,),
            "key": ("Hk * dim", width),
            "value": ("Hv * dim", width),
            "attn_out": (width, w.query.shape[0]),
            "ffn_norm": (width,),
            "ffn_out": (width, w.ffn_in.shape[0] // 2),
        }
    for name, shape in expected.items():
        check_shape(prefix + name, getattr(w, name), shape)
    given = {f"{prefix}{name}": x for name, x in zip(w._fields, w, strict=True)}
    check_same_device("stream", stream, **given)


def _check_attention(stream, weights, rings, position, rotary, window_size, head_dim):
    if None in (window_size, head_dim):
        raise ValueError("blocks with attention need window_size and head_dim, got None")
    if position is None:
        raise ValueError("blocks with attention need position, got None")
    if window_size < 1 or head_dim < 1:
        raise ValueError(f"window_size and head_dim must be >= 1, got {window_size} and {head_dim}")
    batch = stream.shape[0]
    check_position(position, batch)
    cos, sin = rotary or (None, None)
    check_same_device("stream", stream, position=position, cos=cos, sin=sin)
    if rotary is not None:
        turned = cos.shape[-1]
        check_shape("cos", cos, (batch, turned))
        check_shape("sin", sin, (batch, turned))
        if 2 * turned > head_dim:
            raise ValueError(f"rotary tables must fit heads of {head_dim}, got {turned} angles")
    fitting = _fitting_before(stream)
    for i, (w, ring) in enumerate(zip(weights, rings, strict=True)):
        found = list(map(_place, (stream, w.query, w.key, w.value, ring)))
        found += (ring.dtype, w.conv.dtype, window_size, head_dim)
        if found != fitting.ring:
            _check_ring(i, stream, w, ring, window_size, head_dim)
            fitting.ring = found


def _check_ring(i, stream, w, ring, window_size, head_dim):
    attended, keys, values = w.query.shape[0], w.key.shape[0], w.value.shape[0]
    whole = keys % head_dim == values % head_dim == 0 < min(keys, values)
    if not whole or attended % keys or attended % values:
        raise ValueError(
            f"heads of {head_dim} do not fit {attended} query, {keys} key and {values} value"
            " channels"
        )
    row, value_heads = keys + values, values // head_dim
    if ring.dtype == torch.uint8:
        row = int8_row_bytes(keys // head_dim, head_dim, value_heads, head_dim, w.conv.dtype)
    check_shape(f"rings[{i}]", ring, (stream.shape[0], "R", row))
    if ring.shape[1] < window_size:
        raise ValueError(
            f"rings[{i}] must have at least window_size = {window_size} rows, got {ring.shape[1]}"
        )
    check_same_device("stream", stream, ring=ring)


def can_fuse_block(rows: int, *tensors: torch.Tensor | QuantizedWeight | None) -> bool:
    """Whether :func:`blocks_step` should take this many rows natively: plain float32 or bfloat16
    tensors, or quantised weights, on a device whose native operators are built, and no gradient to
    record. On a CPU at most 32 rows, or 8 with bfloat16 where torch multiplies that fast: torch's
    products read the weights once, the native form once for every 8 rows.

    Args:
        rows: sequences in the batch.
        tensors: the residual stream, the weights and the rotary tables; None for those that a
            block lacks.
    """
    few = rows <= native.MAX_ROWS or tensors[0].device.type != "cpu"
    if not few and rows <= native.MAX_CPU_ROWS:
        few = multiplies_slowly(tensors[0].device, torch.bfloat16) or not any(
            x is not None and x.dtype == torch.bfloat16 for x in tensors
        )
    return rows >= 1 and few and native.fits(*tensors, is_decoding=True)
