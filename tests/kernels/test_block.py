"""A whole block in one call: the native form against the reference, states included."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from rodimus_kernels import (
    BlockWeights,
    Int4Weight,
    Int8Weight,
    blocks_step,
    int8_row_bytes,
    native,
    native_block,
    quantize_int4,
    read_ring,
    reference,
    ring_parts,
    write_ring,
)
from rodimus_kernels.block import MATRICES
from rodimus_kernels.testing import assert_within_budget, relative_error

PROBLEM = native.problem("cpu")
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"native operators: {PROBLEM}")
DTYPES = [torch.float32, torch.bfloat16]
NAMED = {"window_size": 5, "head_dim": 6, "key_eps": 1e-5, "norm_eps": 1e-5}
# float32 against float64, measured at most 6e-7
LIMIT = 2e-6


def of_one_block(function, **more):
    """A form of ``blocks_step`` as a function of one block's arguments."""

    def step(stream, weights, taps, state, ring, *shared, **named):
        rings = [] if ring is None else [ring]
        return function(stream, [weights], [taps], [state], rings, *shared, **named, **more)

    return step


native_step = of_one_block(blocks_step, impl="native")
reference_step = of_one_block(reference.blocks_step)
composed_step = of_one_block(native_block.compose)


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


def in_8_bits(weights):
    """The block with every matrix of a linear layer in 8 bits."""

    def rounded(matrix):
        scale = matrix.float().abs().amax(1) / 127
        return Int8Weight((matrix.float() / scale[:, None]).round().to(torch.int8), scale)

    found = {name: getattr(weights, name) for name in MATRICES}
    return weights._replace(**{name: rounded(x) for name, x in found.items() if x is not None})


def in_4_bits(weights):
    """Those of gates in 8."""
    kept = ("gate_in", "gate_out", "mem_gate")
    found = {name: getattr(weights, name) for name in set(MATRICES) - set(kept)}
    packed = {name: quantize_int4(x) for name, x in found.items() if x is not None}
    return in_8_bits(weights)._replace(**packed)


ROUNDED = pytest.mark.parametrize("rounded", [in_8_bits, in_4_bits])


def parted(blocks):
    """Values and scales, as the operator of the library takes them."""
    given = [x for block in blocks for x in block if x is not None]
    values = [x.values if isinstance(x, tuple) else x for x in given]
    return values, [x.scale for x in given if isinstance(x, tuple)]


def converted(weights, convert):
    """The block with its numbers converted, but for those of 8 or 4 bits."""

    def one(x):
        if isinstance(x, tuple):
            return x._replace(scale=convert(x.scale))
        return x if x is None else convert(x)

    return BlockWeights._make(map(one, weights))


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


def states_of(
    dtype, batch, attends, width=18, inner=22, keys=7, taps=4, dim=6, turned=4, rows=8, age=0
):
    """Taps, state, ring, positions of different ages and rotary tables of part of a head."""
    states = [torch.randn(batch, inner, taps).to(dtype), torch.randn(batch, 1, keys, inner)]
    if not attends:
        return [*states, None, None, None]
    position = age + 3 * torch.arange(batch)
    tables = reference.rope_tables(position[:, None], turned)
    rotary = tuple(table[:, 0].to(dtype) for table in tables)
    return [*states, torch.randn(batch, rows, dim + width).to(dtype), position, rotary]


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
    dtype, batch = weights.conv.dtype, states[0].shape[0]
    stream = torch.randn(batch, weights.fc.shape[1])
    wide = converted(weights, torch.Tensor.double)
    base_states, exact_states = copied(states), copied(states, torch.double)
    dim = named.get("head_dim", NAMED["head_dim"])
    if int8:
        values = states[2].shape[-1] // dim - 1
        base_states[2] = int8_ring(states[2], dim, dtype)
        exact_states[2] = int8_ring(states[2], dim, torch.double)
        states = [*states[:2], base_states[2].clone(), *states[3:]]
    base = steps(reference_step, stream, weights, base_states, 3, **named)
    exact = steps(reference_step, stream.double(), wide, exact_states, 3, **named)
    there = lambda x: None if x is None else x.to(device, copy=True)
    rotary = states[4] and tuple(map(there, states[4]))
    actual_states = [*map(there, states[:4]), rotary]
    moved = converted(weights, there)
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
@pytest.mark.parametrize("batch", [1, 3, 8, 19])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_equals_reference(isa, dtype, batch, attends):
    torch.manual_seed(0)
    weights, states = weights_of(dtype, attends), states_of(dtype, batch, attends)
    assert_equals_reference(native_step, weights, states)


@pytest.mark.parametrize("batch", [1, 3, 8, 19])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_ring_of_bytes_equals_the_reference(isa, dtype, batch):
    torch.manual_seed(0)
    weights, states = weights_of(dtype, True), states_of(dtype, batch, True)
    assert_equals_reference(native_step, weights, states, int8=True)


@pytest.mark.parametrize("attends", [False, True], ids=["rodimus", "rodimus_plus"])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ROUNDED
def test_quantized_weights_equal_the_reference(isa, rounded, dtype, batch, attends):
    torch.manual_seed(0)
    # more channels than one task of the mixer has
    weights = rounded(weights_of(dtype, attends, inner=300))
    assert_equals_reference(native_step, weights, states_of(dtype, batch, attends, inner=300))


@pytest.mark.parametrize("attends", [False, True], ids=["rodimus", "rodimus_plus"])
@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_composed_equals_reference(dtype, batch, attends):
    """What a GPU runs for shapes that its kernels do not take whole."""
    torch.manual_seed(0)
    weights, states = weights_of(dtype, attends), states_of(dtype, batch, attends)
    assert_equals_reference(composed_step, weights, states)
    if attends:
        assert_equals_reference(composed_step, weights, states, int8=True)


@pytest.mark.parametrize("dtype, other", [DTYPES, DTYPES[::-1]], ids=str)
def test_composed_norms_may_have_another_dtype(dtype, other):
    torch.manual_seed(0)
    weights, states = weights_of(dtype, True), states_of(dtype, 2, True)
    norms = ("mixer_norm", "act_norm", "attn_norm", "ffn_norm")
    weights = weights._replace(**{name: getattr(weights, name).to(other) for name in norms})
    stream = torch.randn(2, 18)
    forms = (composed_step, reference_step)
    found, expected = (form(stream, weights, *copied(states), **NAMED) for form in forms)
    assert relative_error(found, expected) < 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_matrices_may_be_apart(isa, dtype):
    torch.manual_seed(0)
    dense, states = weights_of(dtype, True), states_of(dtype, 2, True)
    apart = lambda x: F.pad(x, (0, 3))[:, : x.shape[1]]
    names = (*MATRICES, "conv")
    weights = dense._replace(**{name: apart(getattr(dense, name)) for name in names})
    stream = torch.randn(2, 18)
    found, expected = (native_step(stream, w, *copied(states), **NAMED) for w in (weights, dense))
    assert not weights.conv.is_contiguous() and torch.equal(found, expected)


def test_stream_in_the_dtype_of_the_weights():
    torch.manual_seed(0)
    weights, states = weights_of(torch.bfloat16, True), states_of(torch.bfloat16, 2, True)
    stream = torch.randn(2, 18).bfloat16()
    out = native_step(stream, weights, *copied(states), **NAMED)
    base = reference_step(stream, weights, *copied(states), **NAMED)
    assert out.dtype == torch.bfloat16 and relative_error(out, base) < 2e-2


@pytest.mark.parametrize("batch", [5, 9])
def test_a_row_does_not_depend_on_its_neighbours(isa, batch):
    torch.manual_seed(0)
    weights, states = weights_of(torch.float32, True), states_of(torch.float32, batch, True)
    stream = torch.randn(batch, 18)
    together = native_step(stream, weights, *copied(states), **NAMED)
    one = [x[-1:].clone() for x in states[:4]] + [tuple(x[-1:] for x in states[4])]
    alone = native_step(stream[-1:], weights, *one, **NAMED)
    assert len(together) == batch and torch.equal(together[-1:], alone)


def blocks_of(dtypes, batch, attends):
    """Blocks of different widths inside, the last the smallest: weights, taps, states and rings of
    each, and what they share."""
    widths = [22 + 150 * i for i in reversed(range(len(dtypes)))]
    sizes = list(zip(dtypes, widths, strict=True))
    weights = [weights_of(dtype, attends, inner=inner) for dtype, inner in sizes]
    states = [states_of(dtype, batch, attends, inner=inner) for dtype, inner in sizes]
    taps, states, rings, (position, *_), (rotary, *_) = map(list, zip(*states, strict=True))
    return weights, taps, states, rings, position, rotary


def flat(arguments):
    """Every tensor of what ``blocks_of`` makes."""
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    return [tensor for part in arguments or () for tensor in flat(part)]


@pytest.mark.parametrize("attends", [False, True], ids=["rodimus", "rodimus_plus"])
@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.bfloat16, torch.float32]], ids=str)
def test_blocks_in_one_call_are_the_blocks_one_by_one(dtypes, attends):
    torch.manual_seed(0)
    given = blocks_of(dtypes, 3, attends)
    for form in (partial(blocks_step, impl="native"), native_block.compose, reference.blocks_step):
        together, alone = copy.deepcopy(given), copy.deepcopy(given)
        stream = expected = torch.randn(3, 18)
        out = form(stream, *together, **NAMED)
        *lists, position, rotary = alone
        for block in zip(*lists, strict=True):
            expected = of_one_block(form)(expected, *block, position, rotary, **NAMED)
        assert torch.equal(out, expected)
        assert all(map(torch.equal, flat(together), flat(alone)))


@pytest.mark.parametrize("form", ["native", "reference", "composed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype, form):
    composed = form == "composed"
    function = native_block.compose if composed else partial(blocks_step, impl=form)
    given, stream = blocks_of([dtype] * 2, 2, True), torch.randn(2, 18).to(dtype)
    again = copy.deepcopy(given)
    expected = function(stream, *given, **NAMED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(stream, *again, **NAMED)
    assert found.dtype == dtype and torch.equal(found, expected)
    assert all(map(torch.equal, flat(again), flat(given)))


@pytest.mark.parametrize("attends", [False, True], ids=["rodimus", "rodimus_plus"])
@pytest.mark.parametrize("rounded", [in_8_bits, pytest.param(in_4_bits, marks=pytest.mark.slow)])
def test_opcheck(attends, rounded):
    named = (NAMED["window_size"], NAMED["head_dim"], 1e-5, 1e-5)
    weights, *lists, rings, position, rotary = blocks_of([torch.float32] * 2, 2, attends)
    given = [x for block in weights for x in block if x is not None]
    kinds, tables = [[]], rotary or (None, None)
    if attends:
        small = [int8_ring(ring, NAMED["head_dim"], torch.float32) for ring in rings]
        kinds = [rings, small]
    for matrices in ((given, []), parted(map(rounded, weights))):
        for rings in kinds:
            arguments = (torch.randn(2, 18), *matrices, *lists, rings, position, *tables)
            arguments += (*named, False)
            torch.library.opcheck(torch.ops.rodimus.native_blocks_step.default, arguments)


@pytest.mark.parametrize("name", ["mixer_norm", "conv", "conv_bias", "act_norm"])
def test_only_matrices_of_linear_layers_may_be_int8(name):
    """Asked of the operator itself; in the second block, before the first has changed anything."""
    weights, taps, states, *_ = blocks_of([torch.float32] * 2, 2, False)
    small = [in_8_bits(block) for block in weights]
    small[1] = small[1]._replace(**{name: getattr(small[1], name).to(torch.int8)})
    values, scales = parted(small)
    before = copy.deepcopy((taps, states))
    with pytest.raises(RuntimeError, match=f"{name} must be float32 or bfloat16"):
        torch.ops.rodimus.native_blocks_step(
            torch.randn(2, 18),
            values,
            scales,
            taps,
            states,
            [],
            None,
            None,
            None,
            0,
            0,
            1e-5,
            1e-5,
            False,
        )
    assert all(map(torch.equal, flat(before), flat((taps, states))))


def test_a_narrow_gate_is_not_taken_in_4_bits():
    weights, taps, states, *_ = blocks_of([torch.float32], 2, False)
    small = in_4_bits(weights[0])
    assert small.is_uniform and not small._replace(fc=weights[0].fc).is_uniform
    narrow = small._replace(gate_out=quantize_int4(weights[0].gate_out))
    assert not narrow.is_uniform
    with pytest.raises(RuntimeError, match="gate_out is taken in at least 8 bits, got 4"):
        blocks_step(torch.randn(2, 18), [narrow], taps, states, impl="native", **NAMED)
    scale = small.fc.scale[:-1]
    with pytest.raises(RuntimeError, match=r"scale must have shape \[44, 4\], got \[43, 4\]"):
        wrong = small._replace(fc=Int4Weight(small.fc.values, scale, 18))
        blocks_step(torch.randn(2, 18), [wrong], taps, states, impl="native", **NAMED)


def test_weights_that_are_not_dense_are_left_to_the_reference():
    weights, *given = blocks_of([torch.float32] * 2, 2, True)
    assert weights[1].is_uniform
    weights[1] = weights[1]._replace(mixer_out=weights[1].mixer_out.T.contiguous().T)
    assert not weights[1].is_uniform
    stream, one, other = torch.randn(2, 18), copy.deepcopy(given), copy.deepcopy(given)
    y = blocks_step(stream, weights, *one, **NAMED)
    assert torch.equal(y, blocks_step(stream, weights, *other, **NAMED, impl="reference"))
    assert all(map(torch.equal, flat(one), flat(other)))
    scale = torch.ones(18, 2)[:, 0]
    assert not weights[0]._replace(mixer_out=Int8Weight(torch.ones(18, 22), scale)).is_uniform


columns_apart = lambda x: x.mT.contiguous().mT
NOT_NATIVE = {
    "taps of another dtype": (1, torch.Tensor.bfloat16),
    "taps apart": (1, columns_apart),
    "a state apart": (2, columns_apart),
    "a state in float64": (2, torch.Tensor.double),
    "a ring of another dtype": (3, torch.Tensor.half),
    "a ring apart": (3, columns_apart),
    "tables in float16": (5, torch.Tensor.half),
    "tables in float64": (5, torch.Tensor.double),
}


@pytest.mark.parametrize("which, change", NOT_NATIVE.values(), ids=NOT_NATIVE)
def test_what_the_native_form_does_not_take_is_left_to_the_reference(which, change):
    arguments = list(blocks_of([torch.float32] * 2, 2, True))
    first, last = arguments[which]
    arguments[which] = (first if which < 5 else change(first), change(last))
    stream, other = torch.randn(2, 18), copy.deepcopy(arguments)
    y = blocks_step(stream, *arguments, **NAMED)
    assert torch.equal(y, blocks_step(stream, *other, **NAMED, impl="reference"))
    assert all(map(torch.equal, flat(arguments), flat(other)))


def test_stream_position_and_tables_need_not_be_dense():
    weights, *lists, position, rotary = blocks_of([torch.float32] * 2, 2, True)
    stream = torch.randn(2, 18)
    plain = (torch.full_like(position, 3), rotary)
    other = (torch.tensor([3]).expand(2), tuple(map(columns_apart, rotary)))
    step = partial(blocks_step, **NAMED, impl="native")
    expected = step(stream, weights, *copy.deepcopy(lists), *plain)
    y = step(columns_apart(stream), weights, *copy.deepcopy(lists), *other)
    assert torch.equal(y, expected)


def test_a_step_after_one_that_fits_is_checked_all_the_same():
    """And after one that does not fit."""
    weights, *lists, position, rotary = blocks_of([torch.float32], 2, True)
    good = {**dict(zip(("taps", "states", "rings"), lists, strict=True)), "rotary": rotary}
    good |= {"weights": weights, "position": position}
    step = lambda **changed: blocks_step(torch.randn(2, 18), **{**good, **NAMED, **changed})
    wrong = {
        "taps": r"taps\[0\] must have shape",
        "states": r"states\[0\] must have shape",
        "rings": r"rings\[0\] must have shape",
    }
    for name, message in wrong.items():
        step()
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                step(**{name: [good[name][0][:1]]})
    others = {
        "at least window_size = 9 rows": {"window_size": 9},
        "heads of 5 do not fit": {"head_dim": 5},
        r"rings\[0\] must have shape \[2, R, 48\], got": {"rings": [lists[2][0].byte()]},
    }
    for name in ("taps", "states", "rings"):
        others[f"{name[:-1]}s? must be on the device of stream"] = {
            name: [good[name][0].to("meta")]
        }
    others["position must be on the device of"] = {"position": position.to("meta")}
    moved = weights[0]._replace(act_norm=weights[0].act_norm.to("meta"))
    others[r"weights\[0\].act_norm must be on the device of"] = {"weights": [moved]}
    for message, changed in others.items():
        # as many rows as the ring has
        step(window_size=8)
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                step(**changed)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_errors_come_before_any_state_is_touched(impl):
    """Also those of the last block of several."""
    names = ("taps", "states", "rings")
    weights, *lists, position, rotary = given = blocks_of([torch.float32] * 2, 2, True)
    stream, kept = torch.randn(2, 18), copy.deepcopy(given)

    def refuses(message, stream=stream, weights=weights, error=ValueError, **changed):
        arguments = {**dict(zip(names, lists, strict=True)), "position": position}
        arguments |= {"rotary": rotary, **NAMED, **changed}
        with pytest.raises(error, match=message):
            blocks_step(stream, weights, **arguments, impl=impl)

    second = lambda values, value: [values[0], value]
    taps, states, rings = lists
    refuses(r"taps\[1\] must have shape \[2, 22, 4\]", taps=second(taps, taps[1][:1]))
    tables = [table.to("meta") for table in rotary]
    refuses("cos must be on the device of stream", rotary=tables)
    state = states[1][:, :, :5]
    refuses(r"states\[1\] must have shape \[2, 1, 7, 22\]", states=second(states, state))
    refuses("need position", position=None)
    refuses("need window_size and head_dim", head_dim=None)
    refuses("2 rings for 2 blocks, got 2, 2 and 0", rings=[])
    refuses("2 taps, 2 states .* got 2, 1 and 2", states=states[:1])
    ring = rings[1][:, :4].contiguous()
    refuses(r"rings\[1\] must have at least window_size = 5 rows", rings=second(rings, ring))
    small = int8_ring(rings[1][:, :4], NAMED["head_dim"], torch.float32)
    refuses("at least window_size = 5 rows", rings=second(rings, small))
    bytes_ = rings[1].byte()
    refuses(r"rings\[1\] must have shape \[2, R, 48\]", rings=second(rings, bytes_))
    refuses(r"position must have shape \[2\]", position=torch.zeros(3, dtype=torch.long))
    refuses(r"sin must have shape \[2, 2\]", rotary=(rotary[0], rotary[1][:, :1]))
    refuses("rotary tables must fit heads of 6", rotary=(torch.zeros(2, 4), torch.zeros(2, 4)))
    refuses("heads of 5 do not fit 18 query, 6 key and 18 value", head_dim=5)
    fewer = weights[1]._replace(value=weights[1].value[:12])
    ring = rings[1][..., :18].contiguous()
    refused = {"weights": second(weights, fewer), "rings": second(rings, ring)}
    refuses("heads of 6 do not fit 18 query, 6 key and 12 value", **refused)
    for name, weight in zip(BlockWeights._fields, weights[1], strict=True):
        if name != "conv":  # taps then are too many
            wrong = weights[1]._replace(**{name: weight[..., :-1]})
            refuses(r"weights\[1\]\.\w+ must have shape", weights=second(weights, wrong))
    odd = weights[1]._replace(mem_gate=weights[1].mem_gate[:-1])
    refuses(r"\]\.mem_gate must have an even number of rows", weights=second(weights, odd))
    halves = {"ffn_in": weights[1].ffn_in[:-1], "ffn_out": weights[1].ffn_out[:, :-1]}
    odd = weights[1]._replace(**halves)
    refuses(r"\]\.ffn_in must have an even number of rows, got 51", weights=second(weights, odd))
    refuses("window_size must be an integer, got True", window_size=True)
    refuses("head_dim must be an integer, got 6.0", head_dim=6.0)
    refuses("window_size and head_dim must be >= 1, got 0 and 6", window_size=0)
    refuses("window_size and head_dim must be >= 1, got 5 and 0", head_dim=0)
    for name, (first, last) in zip(names, lists, strict=True):
        message = rf"{name}\[1\] must be floating point|takes float32 and bfloat16, got torch.int64"
        refuses(message, **{name: [first, last.long()]})
    refuses("position must be int64, got torch.int32", position=position.int())
    refuses("position must be >= 0, got -1", position=torch.tensor([-1, 0]))
    other = weights_of(torch.float32, False)
    refuses("2, 1 of them with attention", weights=second(weights, other))
    refuses("one block or more, .* got 0", weights=[])
    if impl == "native":
        refuses("takes float32 and bfloat16", states=second(states, states[1].double()))
        for name, weight in zip(BlockWeights._fields, weights[1], strict=True):
            apart = weights[1]._replace(**{name: torch.stack([weight, weight], -1)[..., 0]})
            changed = second(weights, apart)
            refuses("or a matrix with dense rows", weights=changed, error=RuntimeError)
    with pytest.raises(ValueError, match="takes bfloat16 weights on a GPU, .* got .* on cpu"):
        blocks_step(stream, weights, *lists, position, rotary, **NAMED, impl="persistent")
    assert all(map(torch.equal, flat(kept), flat(given)))
