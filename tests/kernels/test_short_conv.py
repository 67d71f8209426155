"""Short convolution against torch's own convolution in float64: states, packed rows, steps."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from rodimus_kernels import native, native_conv, reference, short_conv, short_conv_step
from rodimus_kernels.testing import assert_close, relative_error
from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module

LIMIT = 1e-6
needs_native = pytest.mark.skipif(
    DEVICE != "cpu" or not native.is_available("cpu"), reason="needs the CPU's native operators"
)
IMPLS = ["reference", pytest.param("triton", marks=TRITON_MARKS)]
ALL = [*IMPLS, pytest.param("native", marks=needs_native)]


def make(batch=2, length=11, channels=24, width=4, sequences=None):
    shapes = (batch, length, channels), (channels, width), (channels,)
    state = (sequences or batch, channels, width)
    return tuple(torch.randn(shape).to(DEVICE) for shape in (*shapes, state))


def exact_conv(x, weight, bias, past):
    """``F.conv1d`` over the past and the sequence, in float64."""
    padded = torch.cat((past, x.transpose(1, 2)), dim=2).double()[:, :, 1:]
    y = F.conv1d(padded, weight.double()[:, None], bias.double(), groups=x.shape[2])
    return F.silu(y).transpose(1, 2)


def run(function, tensors, seed, **options):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves, **options)
    y.backward(seed.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


def double(tensors):
    return {name: x.double() for name, x in tensors.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 11, 70])
def test_matches_conv1d_with_all_gradients(impl, width, length):
    x, weight, bias, past = make(length=length, width=width)
    tensors = {"x": x, "weight": weight, "bias": bias, "past": past}
    ours = lambda x, weight, bias, past: short_conv(x, weight, bias, initial_state=past, impl=impl)[
        0
    ]
    seed = torch.randn_like(x)
    assert_close(run(ours, tensors, seed), run(exact_conv, double(tensors), seed), LIMIT)


@pytest.mark.parametrize("impl", ALL)
def test_state_is_the_last_inputs(impl):
    x, weight, bias, past = make(length=2)
    _, state = short_conv(x, weight, bias, initial_state=past, output_final_state=True, impl=impl)
    assert torch.equal(state, torch.cat((past[..., 2:], x.transpose(1, 2)), dim=-1))


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("split", [1, 3, 8])
def test_split_run_equals_whole_run(impl, split):
    x, weight, bias, past = make()
    options = {"output_final_state": True, "impl": impl}
    whole, final = short_conv(x, weight, bias, initial_state=past, **options)
    first, state = short_conv(x[:, :split], weight, bias, initial_state=past, **options)
    second, last = short_conv(x[:, split:], weight, bias, initial_state=state, **options)
    assert torch.allclose(torch.cat((first, second), 1), whole, atol=1e-6)
    assert torch.equal(last, final)


def test_steps_equal_the_sequence():
    x, weight, bias, past = make()
    y, final = short_conv(x, weight, bias, initial_state=past, output_final_state=True)
    state = past.clone()
    steps = [short_conv_step(x[:, t], state, weight, bias) for t in range(x.shape[1])]
    assert torch.allclose(torch.stack(steps, dim=1), y, atol=1e-6)
    assert torch.equal(state, final)


@pytest.mark.parametrize("impl", ALL)
def test_steps_go_on_from_a_sequence(impl):
    x, weight, bias, _ = make()
    y, _ = short_conv(x, weight, bias, impl="reference")
    _, state = short_conv(x[:, :8], weight, bias, output_final_state=True, impl=impl)
    steps = [short_conv_step(x[:, t], state, weight, bias) for t in range(8, 11)]
    torch.testing.assert_close(torch.stack(steps, dim=1), y[:, 8:])


@pytest.mark.parametrize("impl", IMPLS)
def test_steps_go_on_from_packed_documents(impl):
    x, weight, bias, past = make(batch=1, sequences=2)
    bounds = torch.tensor([0, 3, 11], device=DEVICE)
    for states in ({}, {"initial_state": past}):
        options = {"cu_seqlens": bounds, "output_final_state": True, "impl": impl}
        _, state = short_conv(x, weight, bias, **states, **options)
        expected = state.clone()
        y = short_conv_step(x[0, :2], state, weight, bias)
        torch.testing.assert_close(y, reference.short_conv_step(x[0, :2], expected, weight, bias))


def test_a_step_takes_any_strides_of_its_state():
    x, weight, bias, past = make()
    state = past.transpose(1, 2).contiguous().transpose(1, 2)
    y = short_conv_step(x[:, 0], state, weight, bias)
    torch.testing.assert_close(y, reference.short_conv_step(x[:, 0], past, weight, bias))
    assert torch.equal(state, past)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(4, 1, 6), (0, 2, 0, 9, 0), (11,)])
@pytest.mark.parametrize("states", [True, False])
def test_packed_documents_equal_separate_ones(impl, lengths, states):
    x, weight, bias, past = make(batch=1, sequences=len(lengths))
    bounds = [0, *itertools.accumulate(lengths)]
    y, final = short_conv(
        x,
        weight,
        bias,
        initial_state=past if states else None,
        output_final_state=states,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
        impl=impl,
    )
    past = past if states else torch.zeros_like(past)
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        document = x[:, start:stop]
        if start < stop:
            alone = exact_conv(document, weight, bias, past[n : n + 1])
            assert relative_error(y[:, start:stop], alone) < LIMIT
        if states:
            history = torch.cat((past[n], document[0].t()), dim=1)
            assert torch.equal(final[n], history[:, -4:])


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_rows_equal_separate_documents_with_gradients(impl):
    x, weight, bias, _ = make()
    seq_idx = torch.tensor([[0] * 5 + [1] * 1 + [2] * 5, [0] * 2 + [1] * 9]).to(DEVICE)
    tensors, seed = {"x": x, "weight": weight, "bias": bias}, torch.randn_like(x)
    ours = lambda x, weight, bias: short_conv(x, weight, bias, seq_idx=seq_idx, impl=impl)[0]

    def separate(x, weight, bias):
        rows = []
        for row, ids in zip(x, seq_idx, strict=True):
            documents = row.split(torch.bincount(ids).tolist())
            zeros = x.new_zeros(1, x.shape[2], weight.shape[1])
            rows.append(torch.cat([exact_conv(d[None], weight, bias, zeros) for d in documents], 1))
        return torch.cat(rows)

    assert_close(run(ours, tensors, seed), run(separate, double(tensors), seed), LIMIT)


@pytest.mark.parametrize("impl", ALL)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_id_that_comes_back_is_the_same_document(impl, dtype):
    """A tap on a token of the same id is seen, whatever lies between; ids of 64 bits differ by any
    of them."""
    x, weight, bias, _ = make(batch=2, length=6)
    far = 2**32 if dtype == torch.int64 else 2**30
    ids = torch.tensor([[0, 1, 0, 0, 1, 1], [-1, far, 0, -1, 0, far]], dtype=dtype, device=DEVICE)
    expected = bias.double().expand(2, 6, 24).clone()
    for row, t in itertools.product(range(2), range(6)):
        for tap, seen in enumerate(range(t - 3, t + 1)):
            if seen >= 0 and ids[row, seen] == ids[row, t]:
                expected[row, t] += x[row, seen].double() * weight[:, tap].double()
    y, _ = short_conv(x, weight, bias, seq_idx=ids, impl=impl)
    assert relative_error(y, F.silu(expected)) < LIMIT


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=TRITON_MARKS)])
@pytest.mark.parametrize("whole", [True, False])
def test_gradients_where_ids_come_back(impl, whole, monkeypatch):
    module = triton_module("rodimus_kernels.triton_conv")
    if not whole:
        for name in ("_FORWARD_TOKENS", "_BACKWARD_TOKENS"):
            monkeypatch.setattr(module, name, module._AHEAD)
    x, weight, bias, _ = make(length=23)
    ids = torch.randint(3, (2, 23)).to(DEVICE)
    tensors, seed = {"x": x, "weight": weight, "bias": bias}, torch.randn_like(x)

    def of(impl):
        return lambda x, weight, bias: short_conv(x, weight, bias, seq_idx=ids, impl=impl)[0]

    assert_close(run(of(impl), tensors, seed), run(of("reference"), double(tensors), seed), LIMIT)


@pytest.mark.parametrize("impl", ALL)
def test_reads_a_slice_of_a_projection(impl):
    x, weight, bias, _ = make()
    wide = torch.cat((x + 1, x), dim=-1)
    a = short_conv(wide[..., 24:], weight, bias, impl=impl)[0]
    assert torch.equal(a, short_conv(x, weight, bias, impl=impl)[0])


@pytest.mark.parametrize("impl", ALL)
def test_an_empty_batch_is_empty(impl):
    """Also with the strides that a product of no rows is given."""
    x, weight, bias, past = make()
    for none in (x[:0], x.transpose(1, 2).contiguous().transpose(1, 2)[:0]):
        y, state = short_conv(
            none, weight, bias, initial_state=past[:0], output_final_state=True, impl=impl
        )
        assert y.shape == none.shape and state.shape == past[:0].shape


@needs_native
@pytest.mark.parametrize("sizes", [(1, 1, 7, 1), (2, 3, 300, 4), (3, 130, 257, 2), (1, 70, 5, 8)])
@pytest.mark.parametrize("past", [True, False])
def test_native_matches_conv1d(isa, sizes, past):
    batch, length, channels, width = sizes
    x, weight, bias, state = make(batch, length, channels, width)
    y, _ = short_conv(x, weight, bias, initial_state=state if past else None, impl="native")
    assert relative_error(y, exact_conv(x, weight, bias, state if past else 0 * state)) < LIMIT


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_takes_documents_of_rows_and_packed_ones(isa, dtype):
    x, weight, bias, _ = (t.to(dtype) for t in make(batch=2, length=150))
    ids = torch.tensor([[0] * 63 + [1] + [2] * 86, [5] * 66 + [4] * 84], dtype=torch.int32)
    y, _ = short_conv(x, weight, bias, seq_idx=ids, impl="native")
    exact = reference.short_conv(x.double(), weight.double(), bias.double(), seq_idx=ids)[0]
    limit = LIMIT if dtype == torch.float32 else 2**-8
    assert relative_error(y, exact) < limit
    bounds = torch.tensor([0, 63, 63, 64, 150])
    packed, _ = short_conv(x[:1], weight, bias, cu_seqlens=bounds, impl="native")
    assert torch.equal(packed, y[:1])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 4])
def test_native_equals_its_steps(isa, width, dtype):
    x, weight, bias, state = (t.to(dtype) for t in make(2, 70, 300, width))
    y, final = short_conv(
        x, weight, bias, initial_state=state, output_final_state=True, impl="native"
    )
    steps = [short_conv_step(x[:, t], state, weight, bias, impl="native") for t in range(70)]
    assert torch.equal(torch.stack(steps, 1), y) and torch.equal(state, final)


@needs_native
def test_auto_is_native():
    x, weight, bias, past = make(length=70)
    auto, native_y, definition = (
        short_conv(x, weight, bias, initial_state=past, impl=impl)[0]
        for impl in ("auto", "native", "reference")
    )
    # they round differently, so that they tell which one ran
    assert torch.equal(auto, native_y) and not torch.equal(auto, definition)


def test_native_is_chosen_where_it_can_run(monkeypatch):
    x, weight, bias, past = (t.cpu() for t in make())
    wide, bounds = torch.randn(24, 9), torch.tensor([0, 4, 11])
    monkeypatch.setattr(native_conv.native, "is_available", lambda kind: True)
    none = (None, False, None)
    assert native_conv.takes(x, weight, bias, past, True, None)
    assert native_conv.takes(x[:1], weight, None, None, False, bounds)
    assert not native_conv.takes(x, wide, bias, *none)
    assert not native_conv.takes(x[:1], weight, bias, None, True, bounds)
    assert not native_conv.takes(x, weight.bfloat16(), bias, *none)
    assert not native_conv.takes(x.double(), weight.double(), bias.double(), *none)
    assert not native_conv.takes(x, weight.requires_grad_(), bias, *none)


@needs_native
def test_native_says_what_it_cannot_take():
    x, weight, bias, past = (t.cpu() for t in make(batch=1))
    for message, arguments, options in [
        ("at most 8 taps on a CPU .* got 9 taps", (x, torch.randn(24, 9)), {}),
        (
            "packed documents without states, got 4 taps on cpu and packed documents with states",
            (x, weight, bias),
            {"initial_state": past, "cu_seqlens": torch.tensor([0, 11])},
        ),
        ("takes tensors of one dtype", (x.bfloat16(), weight), {}),
        ("has no gradient", (x, weight.requires_grad_()), {}),
    ]:
        with pytest.raises(ValueError, match=message):
            short_conv(*arguments, **options, impl="native")


def test_bias_is_optional():
    x, weight, _, _ = make()
    zero = torch.zeros(24, device=DEVICE)
    assert torch.equal(short_conv(x, weight)[0], short_conv(x, weight, zero)[0])


@pytest.mark.parametrize("packed", ["rows", "documents", "states"])
def test_opcheck(packed):
    triton_module("rodimus_kernels.triton_conv")
    batch = 2 if packed == "rows" else 1
    x, weight, bias, past = (t.requires_grad_() for t in make(batch))
    ids = torch.tensor([[0] * 4 + [1] * 7, [3] * 11], dtype=torch.int32, device=DEVICE)
    options = {
        "rows": (None, None, ids),
        "documents": (None, torch.tensor([0, 4, 11], device=DEVICE), None),
        "states": (past, None, None),
    }[packed]
    torch.library.opcheck(torch.ops.rodimus.short_conv.default, (x, weight, bias, *options))


@pytest.mark.parametrize("impl", ALL)
def test_half_precision(impl):
    x, weight, bias, past = (t.bfloat16() for t in make())
    y, _ = short_conv(x, weight, bias, initial_state=past, impl=impl)
    # one rounding to 8 bits
    assert y.dtype == torch.bfloat16
    assert relative_error(y, exact_conv(x, weight, bias, past)) < 2**-8


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_packed_documents_with_states(impl):
    bounds = torch.tensor([0, 2, 2, 11], device=DEVICE)
    x, weight, bias, past = make(batch=1, sequences=3)
    tensors, seed = {"x": x, "weight": weight, "bias": bias, "past": past}, torch.randn_like(x)
    ours = lambda x, weight, bias, past: short_conv(
        x, weight, bias, initial_state=past, cu_seqlens=bounds, impl=impl
    )[0]

    def separate(x, weight, bias, past):
        pieces = (slice(0, 2), past[:1]), (slice(2, 11), past[2:])
        return torch.cat([exact_conv(x[:, part], weight, bias, h0) for part, h0 in pieces], dim=1)

    assert_close(run(ours, tensors, seed), run(separate, double(tensors), seed), LIMIT)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=TRITON_MARKS)])
@pytest.mark.parametrize("packed", [True, False])
def test_runs_of_few_tokens_join(impl, packed, monkeypatch):
    module = triton_module("rodimus_kernels.triton_conv")
    for name in ("_FORWARD_TOKENS", "_BACKWARD_TOKENS"):
        monkeypatch.setattr(module, name, module._AHEAD)
    # documents that begin at, before and after the edge of a run, shorter and longer than the taps
    bounds = torch.tensor([0, 3, 4, 5, 6, 15, 16, 23] if packed else [0, 23], device=DEVICE)
    x, weight, bias, past = make(batch=1, length=23, sequences=len(bounds) - 1)
    tensors, seed = {"x": x, "weight": weight, "bias": bias, "past": past}, torch.randn_like(x)
    options = {"cu_seqlens": bounds} if packed else {}
    ours = lambda x, weight, bias, past: short_conv(
        x, weight, bias, initial_state=past, impl=impl, **options
    )[0]

    def separate(x, weight, bias, past):
        documents = x.split(bounds.diff().tolist(), dim=1)
        pairs = zip(documents, past.split(1), strict=True)
        return torch.cat([exact_conv(x, weight, bias, h0) for x, h0 in pairs], dim=1)

    assert_close(run(ours, tensors, seed), run(separate, double(tensors), seed), LIMIT)


def test_bad_input_says_what_was_expected():
    x, weight, bias, past = make()
    bounds = torch.tensor([0, 11])
    seq_idx = torch.zeros(2, 11, dtype=torch.int32)
    for message, arguments, options in [
        (r"x must have shape \[B, T, D\]", (x[0], weight), {}),
        (r"weight must have shape \[24, W\]", (x, weight[:3]), {}),
        ("at least one tap, got W = 0", (x, weight[:, :0]), {}),
        (r"bias must have shape \[24\]", (x, weight, bias[:3]), {}),
        ("at least one token", (x[:, :0], weight), {}),
        (r"initial_state must have shape \[2, 24, 4\]", (x, weight), {"initial_state": past[:1]}),
        ("expected B = 1", (x, weight), {"cu_seqlens": bounds}),
        (r"seq_idx must have shape \[2, 11\]", (x, weight), {"seq_idx": seq_idx[:1]}),
        ("seq_idx must be integers, got torch.f", (x, weight), {"seq_idx": seq_idx.float()}),
        ("seq_idx must be integers, got torch.b", (x, weight), {"seq_idx": seq_idx.bool()}),
        ("seq_idx excludes", (x, weight), {"seq_idx": seq_idx, "initial_state": past}),
        ("unknown impl 'fast'", (x, weight), {"impl": "fast"}),
    ]:
        with pytest.raises(ValueError, match=message):
            short_conv(*arguments, **options)
    with pytest.raises(ValueError, match=r"conv_state must have shape \[2, 24, 4\]"):
        short_conv_step(x[:, 0], past[..., :3], weight)


def test_a_step_takes_a_state_of_another_dtype():
    x, weight, bias, past = make()
    x, state, expected = x[:, 0].bfloat16(), past.clone(), past.clone()
    y = short_conv_step(x, state, weight, bias)
    assert torch.equal(y, short_conv_step(x, expected, weight, bias, impl="reference"))
    assert torch.equal(state, expected) and state.dtype == torch.float32


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_bad_input_of_a_step_says_what_was_expected(impl):
    x, weight, bias, past = make()
    with pytest.raises(ValueError, match=r"bias must have shape \[24\], got \(1,\)"):
        short_conv_step(x[:, 0], past, weight, bias[:1], impl=impl)
    with pytest.raises(ValueError, match="at least one tap, got W = 0"):
        short_conv_step(x[:, 0], past[..., :0], weight[:, :0], impl=impl)
    with pytest.raises(ValueError, match="x must be floating point, got torch.int64"):
        short_conv_step(x[:, 0].long(), past, weight, bias, impl=impl)
