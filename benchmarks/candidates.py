"""The launch configurations worth trying for each Triton kernel, with reasons.

``KERNELS`` is the one list, at the shapes of the 1.6B model; ``benchmarks/tune.py`` measures it.
The chosen configuration is a plain function or constant beside each launcher: nothing is tuned
while a model runs, so a first call is as fast as any other and every machine computes the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch

from rodimus_kernels import (
    triton_conv,
    triton_cross_entropy,
    triton_input_gate,
    triton_norm,
    triton_swiglu,
)
from rodimus_kernels._schemas import TRITON_CHUNK
from rodimus_kernels.ddts import triton_chunk
from rodimus_kernels.shared_key_attention import triton_attention, triton_rope, triton_step

from .sizes import visible_pairs

VALUE_DIM, KEY_DIM, RANK, WIDTH, FFN_WIDTH, VOCABULARY = 4096, 64, 32, 2048, 2736, 126464
HEADS, HEAD_DIM, WINDOW = 16, 128, 2049
EPS = 1e-5


class Case(NamedTuple):
    """How many tokens, and where."""

    batch: int
    length: int
    device: torch.device

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def tokens(self, *shape: int) -> torch.Tensor:
        return self.random(self.batch, self.length, *shape)


class Launch(NamedTuple):
    """A call that launches the kernel, what it must read, and its operations if they may matter."""

    call: Callable[[], Any]
    reads: tuple
    flops: int = 0


class Kernel:
    """A kernel and the values to try.

    Args:
        module: Module of the launcher.
        names: Names of the module's constants that a value sets, or of its function for a tile.
        values: The chosen values of every architecture, and others.
        make: Makes the launch, on its own inputs.
        place: Index of the tile, if the function returns several.
    """

    def __init__(
        self,
        module: ModuleType,
        names: str,
        values: str,
        make: Callable[[Case], Launch],
        place: int | None = None,
    ):
        self.module, self.names, self.make, self.place = module, names.split(), make, place
        self.values = [tuple(map(int, value.split("x"))) for value in values.split()]


# ----------------------------------------------------------------------------------------------
# Launches
# ----------------------------------------------------------------------------------------------


def _ddts(stage: str, case: Case) -> Launch:
    """A stage alone, on inputs of the size that the stage before it would produce."""
    columns = triton_chunk._columns(case.batch, case.length, None)
    slots, chunk = columns.count, TRITON_CHUNK
    keys = case.tokens(1, 4 * KEY_DIM).split(KEY_DIM, dim=-1)
    keys = triton_chunk._keys(*keys, 1e-12, KEY_DIM**-0.5, None)
    v, do = case.tokens(1, VALUE_DIM), case.tokens(1, VALUE_DIM)
    if stage == "prepare":
        return Launch(lambda: triton_chunk._prepare(keys, v, columns), keys[:4])
    if stage == "gate":
        shapes = ((chunk, chunk), (chunk, KEY_DIM), (chunk, KEY_DIM), (KEY_DIM,), (1, chunk))
        products = (case.random(slots, *shape, dtype=torch.float32) for shape in shapes)
        products = triton_chunk._Products(*products)
        gate = lambda: triton_chunk._gate(keys, v, columns, products)
        return Launch(gate, (*keys[:4], *products))
    a, read, write = (case.random(slots, chunk, n) / 8 for n in (chunk, KEY_DIM, KEY_DIM))
    tiles = triton_chunk._Tiles(a, read, write, torch.rand(slots, KEY_DIM, device=case.device))
    shape = (1, slots, VALUE_DIM, KEY_DIM)
    if stage == "products":
        inputs = (v, do, case.random(*shape), case.random(*shape))
        products = lambda: triton_chunk._products(*inputs, columns, tiles)
        return Launch(products, (*inputs, a, write))

    def walk() -> tuple:
        states = v.new_empty(shape) if stage == "walk-states" else None
        options = {"reverse": False, "states": states}
        return *triton_chunk._walk(v, tiles, columns, None, case.batch, **options), states

    return Launch(walk, (v, *tiles))


def _attention(stage: str, case: Case) -> Launch:
    q, v, do = (case.tokens(HEADS, HEAD_DIM) for _ in range(3))
    k, given = case.tokens(1, HEAD_DIM), (WINDOW, HEAD_DIM**-0.5, None)
    product = 2 * HEAD_DIM * case.batch * HEADS * visible_pairs(case.length, WINDOW)
    forward = lambda: torch.ops.rodimus.shared_key_attention(q, k, v, *given)
    if stage == "forward":
        return Launch(forward, (q, k, v), 2 * product)
    (o, lse), launch = forward(), triton_attention._launch(q, k, v, *given)
    dq = lambda: triton_attention._dq(q, k, v, o, lse, do, launch)
    if stage == "dq":
        return Launch(dq, (q, k, v, o, lse, do), 3 * product)
    delta = dq()[1]
    dkv = lambda: triton_attention._dkv(q, k, v, lse, delta, do, launch)
    return Launch(dkv, (q, k, v, lse, delta, do), 4 * product)


def operator(name: str, *makers: Callable[[Case], Any]) -> Callable[[Case], Launch]:
    """A registered operator, on inputs from ``makers``, each of which makes one or several."""

    def make(case: Case) -> Launch:
        made = (maker(case) for maker in makers)
        given = [x for found in made for x in (found if isinstance(found, tuple) else (found,))]
        tensors = tuple(x for x in given if isinstance(x, torch.Tensor))
        return Launch(lambda: getattr(torch.ops.rodimus, name)(*given), tensors)

    return make


def _value(case: Case) -> torch.Tensor:
    return case.tokens(VALUE_DIM)


def _dtype(case: Case) -> torch.dtype:
    return _branch(case).dtype


def _half(case: Case) -> torch.Tensor:
    """The first half of a projection's rows, as a layer has it."""
    return case.tokens(2 * VALUE_DIM)[..., :VALUE_DIM]


def _conv(case: Case) -> tuple:
    return _half(case), case.random(VALUE_DIM, 4), case.random(VALUE_DIM), None, None, None


def _input_gate(case: Case) -> tuple:
    weight, bias = case.random(VALUE_DIM, RANK), case.random(VALUE_DIM)
    return _half(case), case.tokens(RANK), weight, bias


def _gated_norm(case: Case) -> tuple:
    weight = case.random(VALUE_DIM)
    return _value(case), _half(case), weight, EPS, _value(case), weight


def _branch(case: Case) -> torch.Tensor:
    return case.tokens(WIDTH)


def _stream(case: Case) -> torch.Tensor:
    return case.tokens(WIDTH).float()


def _weight(case: Case) -> tuple:
    return case.random(WIDTH), EPS


def _ffn(case: Case) -> torch.Tensor:
    return case.tokens(2 * FFN_WIDTH)


def _rope(case: Case) -> tuple:
    angles = case.random(1, case.length, HEAD_DIM // 2)
    return case.tokens(HEADS, HEAD_DIM), angles.cos(), angles.sin(), False


def _ring(case: Case) -> tuple:
    """One token per row, at a full window."""
    q, k, v = (case.random(case.batch, 1, heads, HEAD_DIM) for heads in (HEADS, 1, HEADS))
    cache = case.random(case.batch, WINDOW + 63, (HEADS + 1) * HEAD_DIM)
    position = torch.full((case.batch,), 2 * WINDOW, device=case.device)
    return q, k, v, cache, position, WINDOW, HEAD_DIM**-0.5


def _logits(case: Case) -> tuple:
    """Without the gradient, which would overwrite the logits."""
    labels = torch.randint(VOCABULARY, (case.length,), device=case.device)
    return case.random(case.length, VOCABULARY), labels, 1e-4, -100, False


# ----------------------------------------------------------------------------------------------
# What is worth trying, and why
# ----------------------------------------------------------------------------------------------

# width, warps, stages: half the width or few stages leave room for a second program, more stages
# load further ahead, twice the width loads `read`, `write` and `a` half as often; the last two are
# for GPUs without a copy engine
_WALK = "64x4x3 128x4x2 128x4x3 128x4x4 128x8x3 256x8x2 128x8x2 64x8x3"
# elements per thread, rows loaded together, programs: fewer programs leave fewer partial sums
_NORM_BACKWARD = " ".join(f"{e}x{r}x{p}" for e in (8, 16) for r in (1, 2, 3) for p in (264, 528))
_NORM_NAMES = "_BACKWARD_ELEMENTS _ROWS _PROGRAMS"
# channels, warps, tokens in flight: more loads in flight need more registers
_CONV = ("512x4x4", "512x4x2", "512x4x8", "256x2x4", "1024x8x4", "512x2x4")

KERNELS = {
    # width of K, warps, stages: four warps leave room for a second program and spill a little
    "prepare": Kernel(
        triton_chunk, "prepare_tile", "64x4x1 32x4x1 32x8x1 64x8x1", partial(_ddts, "prepare")
    ),
    # five stages of 40 KiB or three of 56 leave too little shared memory for tiles of states
    "walk": Kernel(triton_chunk, "walk_tile", f"{_WALK} 128x4x5 256x8x3", partial(_ddts, "walk")),
    "walk-states": Kernel(triton_chunk, "walk_tile", _WALK, partial(_ddts, "walk-states")),
    # width, warps, stages: wide tiles need fewer products, narrow ones load further ahead
    "products": Kernel(
        triton_chunk,
        "products_tile",
        "128x4x2 64x4x3 32x4x3 128x8x3",
        partial(_ddts, "products"),
    ),
    # width of K, warps; at least 16 columns for every four warps (see gate_tile)
    "gate": Kernel(triton_chunk, "gate_tile", "16x4x1 32x4x1 32x8x1", partial(_ddts, "gate")),
    # queries, keys, warps, stages: few warps, so that several programs share a multiprocessor,
    # or large tiles, which read less; the last of each list is for Ampere
    "attention": Kernel(
        triton_attention,
        "tiles",
        "64x64x4x3 64x64x4x4 64x64x4x2 64x32x4x3 64x32x4x4 128x128x8x3 128x64x8x4 128x64x8x2",
        partial(_attention, "forward"),
        0,
    ),
    "attention-dq": Kernel(
        triton_attention,
        "tiles",
        "64x64x4x2 64x32x4x3 64x32x4x2 128x64x8x3 128x64x8x2",
        partial(_attention, "dq"),
        1,
    ),
    "attention-dkv": Kernel(
        triton_attention,
        "tiles",
        "64x128x8x2 64x64x4x2 32x64x4x3 32x128x8x3 64x64x8x2",
        partial(_attention, "dkv"),
        2,
    ),
    # heads and keys of a tile, in registers, and how finely the window is cut
    "ring": Kernel(
        triton_step,
        "_HEADS _KEYS _PROGRAMS_PER_SM",
        "16x4x4 16x4x2 16x4x8 16x8x4 16x8x2 16x16x2",
        operator("ring_attention", _ring),
    ),
    # elements of a program
    "rope": Kernel(triton_rope, "_TILE", "512 1024 2048", operator("rope", _rope)),
    "conv": Kernel(
        triton_conv,
        "_CHANNELS _WARPS _AHEAD _FORWARD_TOKENS",
        " ".join([*(f"{c}x64" for c in _CONV), "512x2x2x32", "512x4x4x32", "512x4x4x128"]),
        operator("short_conv", _conv),
    ),
    "conv-backward": Kernel(
        triton_conv,
        "_CHANNELS _WARPS _AHEAD _BACKWARD_TOKENS",
        " ".join([*(f"{c}x512" for c in _CONV), "512x4x4x128", "512x4x4x256"]),
        operator("short_conv_backward", _conv, _value),
    ),
    "input-gate": Kernel(
        triton_input_gate,
        "_TOKENS _CHANNELS _WARPS",
        "64x128x8 64x128x4 64x64x4 128x64x8 32x128x4 32x256x8 128x128x8",
        operator("input_gate", _input_gate),
    ),
    # more tokens of a program leave fewer sums to write, fewer tokens more programs
    "input-gate-backward": Kernel(
        triton_input_gate,
        "_SUMMED_TOKENS _BACKWARD_CHANNELS _BACKWARD_WARPS _STAGES",
        "128x32x4x3 128x16x2x3 128x16x4x3 256x16x4x3 128x32x8x2 128x64x8x2 64x64x4x2",
        operator("input_gate_backward", _input_gate, _value),
    ),
    # elements per thread: few warps finish a row's sum sooner, many hold it in fewer registers
    "gated-norm": Kernel(
        triton_norm, "_FORWARD_ELEMENTS", "8 16 32", operator("gated_rms_norm_rows", _gated_norm)
    ),
    "gated-norm-backward": Kernel(
        triton_norm,
        _NORM_NAMES,
        _NORM_BACKWARD,
        operator("gated_rms_norm_rows_backward", _gated_norm, _value),
    ),
    "norm": Kernel(
        triton_norm,
        "_FORWARD_ELEMENTS",
        "4 8 16",
        operator("add_rms_norm_rows", _branch, _stream, _weight),
    ),
    "norm-backward": Kernel(
        triton_norm,
        _NORM_NAMES,
        _NORM_BACKWARD,
        operator("rms_norm_rows_backward", _stream, _weight, _branch, _stream, _dtype),
    ),
    # channels of a program: a row is few large programs or many small ones
    "swiglu": Kernel(triton_swiglu, "_CHANNELS", "512 1024 2048 4096", operator("swiglu", _ffn)),
    "swiglu-backward": Kernel(
        triton_swiglu,
        "_CHANNELS",
        "512 1024 2048 4096",
        operator("swiglu_backward", _ffn, lambda case: case.tokens(FFN_WIDTH)),
    ),
    # logits at once, warps
    "cross-entropy": Kernel(
        triton_cross_entropy,
        "_LOGITS _WARPS",
        "8192x16 4096x8 4096x16 16384x16 8192x8",
        operator("cross_entropy_rows", _logits),
    ),
}


@contextlib.contextmanager
def setting(kernel: Kernel, value: tuple[int, ...]) -> Iterator[None]:
    """Launch with the value."""
    original = getattr(kernel.module, kernel.names[0])
    if not callable(original):
        with mock.patch.multiple(kernel.module, **dict(zip(kernel.names, value, strict=True))):
            yield
        return
    tile = kernel.module.Tile(*value)

    def given(*args: Any) -> Any:
        if kernel.place is None:
            return tile
        tiles = list(original(*args))
        tiles[kernel.place] = tile
        return tuple(tiles)

    with mock.patch.object(kernel.module, kernel.names[0], given):
        yield


def chosen(kernel: Kernel, call: Callable[[], Any]) -> tuple[int, ...]:
    """The value that the launcher uses in the call."""
    original = getattr(kernel.module, kernel.names[0])
    if not callable(original):
        return tuple(getattr(kernel.module, name) for name in kernel.names)
    seen = []

    def asked(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    with mock.patch.object(kernel.module, kernel.names[0], asked):
        call()
    return tuple(seen[-1] if kernel.place is None else seen[-1][kernel.place])
