"""A whole block in one call: the native form against the reference, states included."""

import functools

import pytest
import torch

from rodimus_kernels import (
    BlockWeights,
    block_step,
    int8_row_bytes,
    native,
    native_block,
    read_ring,
    reference,
    ring_parts,
    write_ring,
)
from rodimus_kernels.testing import assert_within_budget, relative_error

PROBLEM = native.problem("cpu")
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"native operators: {PROBLEM}")
DTYPES = [torch.float32, torch.bfloat16]
NAMED = {"window_size": 5, "head_dim": 6, "key_eps": 1e-5, "norm_eps": 1e-5}
# float32 against float64, measured at most 6e-7
LIMIT = 2e-6


def weights_of(dtype, attends, width=18, inner=22, keys=7, rank=3, taps=4, dim=6, mlp=26):
    """Lively weights of a small block: as many query and value heads as fit, one key head."""
    matrix = lambda rows, columns: (torch.randn(rows, columns) / columns**0.5).to(dtype)
    vector = lambda size: (1 + 0.3 * torch.randn(size)).to(dtype)
    found = [vector(width), matrix(2 * inner, width), matrix(inner, taps), vector(inner)]
    found += [matrix(2 * keys, inner), matrix(rank, inner), matrix(inner, rank), vector(inner)]
    found += [matrix(2 * keys, inner), torch.randn(2 * keys), torch.randn(inner), vector(inner)]
    found += [matrix(width, inner)]
    if attends:
        found += [vector(width), matrix(width, width), matrix(dim, width), matrix(width, width)]
        found += [matrix(width, width), vector(width), matrix(2 * mlp, width), matrix(width, mlp)]
    return BlockWeights(*found)


def int8_ring(ring, dim, dtype):
    """A ring of one key head, with its keys in ``dtype`` and its values in 8 bits."""
    heads = (1, dim, ring.shape[-1] // dim - 1, dim)
    cache = torch.zeros(*ring.shape[:2], int8_row_bytes(*heads, dtype), dtype=torch.uint8)
    keys, values, _ = ring_parts(ring, *heads, ring.dtype)
    write_ring(ring_parts(cache, *heads, dtype), ..., keys, values)
    return cache


def plain_ring(ring, dim, value_heads, dtype):
    """What a ring holds, as float64 ``[B, R, row]``."""
    parts = ring_parts(ring.cpu(), 1, dim, value_heads, dim, dtype)
    return torch.cat([x.flatten(2) for x in read_ring(parts, torch.float64)], -1)


def states_of(dtype, batch, attends, width=18, inner=22, keys=7, taps=4, dim=6, turned=4):
    """Taps, state, ring, positions of different ages and rotary tables of part of a head."""
    states = [torch.randn(batch, inner, taps).to(dtype), torch.randn(batch, 1, keys, inner)]
    if not attends:
        return [*states, None, None, None]
    position = 3 * torch.arange(batch)
    tables = reference.rope_tables(position[:, None], turned)
    rotary = tuple(table[:, 0].to(dtype) for table in tables)
    return [*states, torch.randn(batch, 8, dim + width).to(dtype), position, rotary]


def copied(states, dtype=None):
    convert = lambda x: x.clone() if dtype is None or x.dtype == torch.int64 else x.to(dtype)
    rotary = states[4] and tuple(map(convert, states[4]))
    return [*(x if x is None else convert(x) for x in states[:4]), rotary]


def steps(function, stream, weights, states, count, **named):
    """Outputs of several tokens, one after the other; the states move on."""
    outputs = []
    for _ in range(count):
        stream = function(stream, weights, *states, **(NAMED | named))
        outputs.append(stream)
        if states[3] is not None:
            states[3] = states[3] + 1
    return torch.stack(outputs)


def assert_equals_reference(function, weights, states, device="cpu", int8=False, **named):
    """Three tokens: the stream and all states against float64, in bfloat16 with the reference's
    error as the budget. ``int8`` keeps the values of the ring in 8 bits: no value of float32 may
    then fall between two steps for one side and not for the other."""
    dtype, batch = weights.fc.dtype, states[0].shape[0]
    stream = torch.randn(batch, weights.fc.shape[1])
    wide = BlockWeights(*(x if x is None else x.double() for x in weights))
    base_states, exact_states = copied(states), copied(states, torch.double)
    dim = named.get("head_dim", NAMED["head_dim"])
    if int8:
        values = states[2].shape[-1] // dim - 1
        base_states[2] = int8_ring(states[2], dim, dtype)
        exact_states[2] = int8_ring(states[2], dim, torch.double)
        states = [*states[:2], base_states[2].clone(), *states[3:]]
    base = steps(reference.block_step, stream, weights, base_states, 3, **named)
    exact = steps(reference.block_step, stream.double(), wide, exact_states, 3, **named)
    there = lambda x: None if x is None else x.to(device, copy=True)
    rotary = states[4] and tuple(map(there, states[4]))
    actual_states = [*map(there, states[:4]), rotary]
    moved = BlockWeights(*map(there, weights))
    actual = steps(function, stream.to(device), moved, actual_states, 3, **named)
    compared = {"stream": (actual, exact, base)}
    for i, name in enumerate(("taps", "state", "ring")):
        if states[i] is not None:
            compared[name] = (actual_states[i], exact_states[i], base_states[i])
    if int8:
        dtypes = (dtype, torch.double, dtype)
        rings = zip(compared["ring"], dtypes, strict=True)
        compared["ring"] = [plain_ring(ring, dim, values, kind) for ring, kind in rings]
    for name, (found, truth, baseline) in compared.items():
        if dtype == torch.float32:
            assert relative_error(found.cpu(), truth) < LIMIT, name
        else:
            assert_within_budget(name, found.cpu(), truth, baseline)


@pytest.mark.parametrize("attends", [False, True], ids=["rodimus", "rodimus_plus"])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference(isa, dtype, batch, attends):
    torch.manual_seed(0)
    weights, states = weights_of(dtype, attends), states_of(dtype, batch, attends)
    assert_equals_reference(functools.partial(block_step, impl="native"), weights, states)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_ring_of_bytes_equals_the_reference(isa, dtype, batch):
    torch.manual_seed(0)
    weights, states = weights_of(dtype, True), states_of(dtype, batch, True)
    native_step = functools.partial(block_step, impl="native")
    assert_equals_reference(native_step, weights, states, int8=True)


@pytest.mark.parametrize("attends", [False, True], ids=["rodimus", "rodimus_plus"])
@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_composed_equals_reference(dtype, batch, attends):
    """What a GPU runs for shapes that its kernels do not take whole."""
    torch.manual_seed(0)
    weights, states = weights_of(dtype, attends), states_of(dtype, batch, attends)
    assert_equals_reference(native_block.compose, weights, states)
    if attends:
        assert_equals_reference(native_block.compose, weights, states, int8=True)


def test_stream_in_the_dtype_of_the_weights():
    torch.manual_seed(0)
    weights, states = weights_of(torch.bfloat16, True), states_of(torch.bfloat16, 2, True)
    stream = torch.randn(2, 18).bfloat16()
    out = block_step(stream, weights, *copied(states), **NAMED, impl="native")
    base = reference.block_step(stream, weights, *copied(states), **NAMED)
    assert out.dtype == torch.bfloat16 and relative_error(out, base) < 2e-2


def test_a_row_does_not_depend_on_its_neighbours(isa):
    torch.manual_seed(0)
    weights, states = weights_of(torch.float32, True), states_of(torch.float32, 5, True)
    stream = torch.randn(5, 18)
    together = block_step(stream, weights, *copied(states), **NAMED, impl="native")
    one = [x[3:4].clone() for x in states[:4]] + [tuple(x[3:4] for x in states[4])]
    alone = block_step(stream[3:4], weights, *one, **NAMED, impl="native")
    assert torch.equal(together[3:4], alone)


def test_opcheck():
    weights, states = weights_of(torch.float32, True), states_of(torch.float32, 2, True)
    named = (NAMED["window_size"], NAMED["head_dim"], 1e-5, 1e-5)
    arguments = (torch.randn(2, 18), list(weights), *states[:4], *states[4], *named)
    torch.library.opcheck(torch.ops.rodimus.native_block_step.default, arguments)
    ring = int8_ring(states[2], NAMED["head_dim"], torch.float32)
    arguments = (*arguments[:4], ring, *arguments[5:])
    torch.library.opcheck(torch.ops.rodimus.native_block_step.default, arguments)


def test_errors_come_before_any_state_is_touched():
    weights, states = weights_of(torch.float32, True), states_of(torch.float32, 2, True)
    stream, kept = torch.randn(2, 18), copied(states)

    def refuses(message, error=RuntimeError, stream=stream, weights=weights, **changed):
        named = dict(zip(("taps", "state", "ring", "position", "rotary"), states, strict=True))
        with pytest.raises(error, match=message):
            block_step(stream, weights, **(named | changed), **NAMED, impl="native")

    refuses(r"taps must have shape \[2, 22, 4\]", ValueError, taps=states[0][:1])
    refuses("takes 1 to 8 rows, got 9", ValueError, torch.randn(9, 18), taps=torch.zeros(9, 22, 4))
    refuses(r"state must have shape \[2, 1, 7, 22\]", state=states[1][:, :, :5])
    refuses("needs ring and position", ring=None)
    refuses("at least window_size = 5 rows", ring=states[2][:, :4].contiguous())
    small = int8_ring(states[2][:, :4], NAMED["head_dim"], torch.float32)
    refuses("at least window_size = 5 rows", ring=small)
    refuses(r"ring must have shape \[any, any, 48\]", ring=states[2].byte())
    refuses("position must be >= 0, got -1", position=torch.tensor([-1, 0]))
    refuses(r"key must have shape \[any, 18\]", weights=weights._replace(key=torch.randn(6, 17)))
    refuses(
        r"stream must have shape \[B, 17\]",
        ValueError,
        weights=weights._replace(fc=torch.randn(4, 17)),
    )
    for before, after in zip(kept[:3], states[:3], strict=True):
        assert torch.equal(before, after)
