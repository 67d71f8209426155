"""DDTS: every implementation against the token loop in float64, values and gradients."""

import os
import runpy
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rodimus_kernels import (
    _dispatch,
    ddts,
    ddts_gates,
    ddts_scan,
    ddts_step,
    ddts_summary,
    reference,
    rms_norm,
    shared_key_attention,
    short_conv,
)
from rodimus_kernels.ddts import api
from rodimus_kernels.testing import (
    REGIMES,
    DdtsCase,
    assert_close,
    ddts_inputs,
    gate_preactivations,
    relative_error,
    run_ddts,
)
from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module

# float32 against float64 over 150 tokens: measured at most 7e-7 (log_decay at -20 a token), with a
# product made of three in tf32, each term known to 2^-21; a GPU approximates exponentials, too
LIMIT = 2e-6 if DEVICE == "cpu" else 5e-6
TABLE = "DDTS: values and gradients against float64 (relative error in the Frobenius norm)"
TRITON = pytest.param("triton_chunk", marks=TRITON_MARKS)
RECURRENT = pytest.param("triton_recurrent", marks=TRITON_MARKS)
STEP = pytest.param("triton", marks=TRITON_MARKS)
CHUNKED = ["eager", TRITON]
ALL = ["reference", *CHUNKED]
PACKED = {
    "inside a chunk": (37, 63, 50),
    "on a chunk edge": (64, 64, 22),
    "empty ones": (0, 40, 0, 0, 100, 10, 0),
    "single tokens": (1, 1, 1, 1, 70),
}


def make(case):
    return ddts_inputs(case, device=DEVICE)


def truth(inputs):
    return run_ddts(reference.ddts, inputs, dtype=torch.float64)


def check(case, impl, limit=LIMIT, **options):
    inputs = make(case)
    return assert_close(run_ddts(ddts, inputs, impl=impl, **options), truth(inputs), limit)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("impl", ALL)
def test_matches_the_float64_recurrence(impl, regime, measure):
    error = check(DdtsCase(1, 150, 1, 16, 32, regime), impl)
    measure(TABLE, f"float32, gates {regime}", impl, error, LIMIT)


@pytest.mark.parametrize("impl", CHUNKED)
def test_a_float16_nan_of_all_ones_stays_nan(impl):
    """What NVIDIA GPUs make of 0/0: the nearest number of fewer digits would be -0."""
    inputs = [x.half() for x in make(DdtsCase(1, 3, 1, 16, 16))[:4]]
    state = torch.zeros(1, 1, 16, 16, device=DEVICE)
    state[..., 5] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    o, _ = ddts(*inputs, initial_state=state, impl=impl)
    assert o[..., 5].isnan().all() and not o[..., :5].isnan().any()


SLOW_TRITON = pytest.param("triton_chunk", marks=[*TRITON_MARKS, pytest.mark.slow])
LENGTHS = [1, 15, 63, 64, 65, 150]


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("impl", ["eager", SLOW_TRITON])
def test_every_regime_at_any_length(impl, regime, states):
    for length in LENGTHS:
        check(DdtsCase(1, length, 1, 16, 16, regime, states=states), impl)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("impl", CHUNKED)
def test_any_length_and_several_heads(impl, length):
    check(DdtsCase(2, length, 2, 16, 16), impl)


@pytest.mark.parametrize("length", [1, 64, 100])
@pytest.mark.parametrize("impl", CHUNKED)
def test_without_states(impl, length):
    check(DdtsCase(2, length, 1, 16, 16, states=False), impl)


@pytest.mark.parametrize(
    "key_dim", [32, *(pytest.param(k, marks=pytest.mark.slow) for k in (64, 128, 256))]
)
@pytest.mark.parametrize("impl", CHUNKED)
def test_any_key_dim(impl, key_dim):
    check(DdtsCase(1, 70, 1, key_dim, 32, "mixed"), impl)


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("documents", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("impl", ALL)
def test_packed_documents(impl, documents, states):
    case = DdtsCase(1, sum(documents), 1, 16, 16, states=states, documents=documents)
    inputs = make(case)
    pieces = []
    bounds = inputs.cu_seqlens.tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        if start < stop:
            one = (x[:, start:stop].double() for x in inputs[:4])
            n = bounds.index(stop) - 1
            h0 = inputs.initial_state[n : n + 1] if states else None
            pieces.append(reference.ddts(*one, initial_state=h0)[0])
    actual = run_ddts(ddts, inputs, impl=impl)
    assert relative_error(actual["o"], torch.cat(pieces, dim=1)) <= LIMIT
    assert_close(actual, truth(inputs), LIMIT)


@pytest.mark.parametrize("documents", PACKED.values(), ids=PACKED)
def test_nothing_is_read_that_was_not_written(documents):
    """Packed documents have columns that no token fills."""
    triton_module("rodimus_kernels.ddts.triton_chunk")
    inputs = make(DdtsCase(1, sum(documents), 1, 16, 16, documents=documents))
    expected = run_ddts(ddts, inputs, impl="triton_chunk")
    deterministic = torch.are_deterministic_algorithms_enabled()
    # fills new memory with NaN
    torch.use_deterministic_algorithms(True)
    try:
        assert inputs.q.new_empty(1).isnan()
        actual = run_ddts(ddts, inputs, impl="triton_chunk")
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert all(torch.equal(x, expected[name]) for name, x in actual.items())


@pytest.mark.parametrize("impl", ALL)
def test_an_empty_document_keeps_its_state(impl):
    inputs = make(DdtsCase(1, 10, 1, 16, 16, documents=(0, 10, 0)))
    final = run_ddts(ddts, inputs, impl=impl)["final_state"]
    assert torch.equal(final[0], inputs.initial_state[0])
    assert torch.equal(final[2], inputs.initial_state[2])


@pytest.mark.parametrize("split", [1, 40, 64, 99])
@pytest.mark.parametrize("impl", CHUNKED)
def test_split_run_equals_whole_run(impl, split):
    inputs = make(DdtsCase(2, 100, 2, 16, 16, "mixed"))
    h0, x, options = inputs.initial_state, inputs[:4], {"output_final_state": True, "impl": impl}
    whole, final = ddts(*x, initial_state=h0, **options)
    first, h1 = ddts(*(t[:, :split] for t in x), initial_state=h0, **options)
    second, h2 = ddts(*(t[:, split:] for t in x), initial_state=h1, **options)
    assert relative_error(torch.cat((first, second), 1), whole) < 1e-6
    assert relative_error(h2, final) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "eager", STEP])
def test_steps_equal_the_sequence(impl):
    inputs = make(DdtsCase(2, 70, 2, 16, 32, "mixed"))
    o, final = ddts(*inputs[:4], initial_state=inputs.initial_state, output_final_state=True)
    state = inputs.initial_state.clone()
    steps = [ddts_step(*(x[:, t] for x in inputs[:4]), state, impl=impl) for t in range(70)]
    assert relative_error(torch.stack(steps, dim=1), o) < 1e-6
    assert relative_error(state, final) < 1e-6


def test_step_writes_in_place_and_keeps_no_graph():
    inputs = ddts_inputs(DdtsCase(2, 1))
    state = inputs.initial_state.clone()
    pointer = state.data_ptr()
    o = ddts_step(inputs.q[:, 0].requires_grad_(), *(x[:, 0] for x in inputs[1:4]), state)
    assert state.data_ptr() == pointer and not torch.equal(state, inputs.initial_state)
    assert not o.requires_grad


@pytest.mark.parametrize("impl", CHUNKED)
def test_rows_of_a_batch_do_not_depend_on_each_other(impl):
    inputs = make(DdtsCase(3, 70))
    h0 = inputs.initial_state
    whole, _ = ddts(*inputs[:4], initial_state=h0, impl=impl)
    alone, _ = ddts(*(x[1:2] for x in inputs[:4]), initial_state=h0[1:2], impl=impl)
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("impl", ALL)
def test_strided_inputs(impl):
    inputs = make(DdtsCase(2, 70, 2, 16, 32))
    wide = torch.cat((inputs.v, inputs.v + 1), dim=-1)
    strided = inputs._replace(
        v=wide[..., :32],
        q=inputs.q.transpose(1, 2).contiguous().transpose(1, 2),
        k=inputs.k.transpose(2, 3).contiguous().transpose(2, 3),
        do=inputs.do[:, :1, :, :1].expand_as(inputs.do),
    )
    assert not any(x.is_contiguous() for x in (strided.v, strided.q, strided.k, strided.do))
    assert_close(run_ddts(ddts, strided, impl=impl), truth(strided), LIMIT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("impl", CHUNKED)
def test_half_precision_inputs(impl, dtype, measure):
    inputs = make(DdtsCase(2, 100, 1, 16, 32, "mixed", dtype=dtype))
    actual = run_ddts(ddts, inputs, impl=impl)
    assert actual["o"].dtype == actual["dq"].dtype == dtype
    assert actual["final_state"].dtype == actual["dlog_decay"].dtype == torch.float32
    # one or two roundings to 8 or 11 bits, each of half a unit at most
    limit = torch.finfo(dtype).eps / 2
    error = assert_close(actual, truth(inputs), limit)
    measure(TABLE, f"{str(dtype).removeprefix('torch.')}, gates mixed", impl, error, limit)


@pytest.mark.parametrize("function", [partial(ddts, impl="eager"), reference.ddts_chunk])
def test_the_scale_is_not_rounded_to_the_queries_dtype(function):
    inputs = make(DdtsCase(1, 70, 1, 32, 16))
    # 32 ** -0.5 has more bits than bfloat16
    inputs = inputs._replace(q=inputs.q.bfloat16(), k=inputs.k.bfloat16())
    actual, exact = run_ddts(function, inputs), truth(inputs)
    wide = ("o", "final_state", "dv", "dlog_decay", "dinitial_state")
    assert_close(actual, {name: exact[name] for name in wide}, LIMIT)


def test_eager_keeps_the_state_of_half_precision_inputs_exact():
    inputs = ddts_inputs(DdtsCase(2, 70, dtype=torch.bfloat16))
    assert (
        relative_error(run_ddts(ddts, inputs)["final_state"], truth(inputs)["final_state"]) < 1e-6
    )


@pytest.mark.parametrize("documents", [None, (9, 0, 21)], ids=["dense", "packed"])
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_recurrent_matches_the_float64_recurrence(regime, states, documents):
    triton_module("rodimus_kernels.ddts.triton_recurrent")
    batch, length = (2, 50) if documents is None else (1, sum(documents))
    inputs = make(DdtsCase(batch, length, 2, 12, 20, regime, states, documents))
    options = {"initial_state": inputs.initial_state, "output_final_state": states}
    o, final = ddts(*inputs[:4], **options, cu_seqlens=inputs.cu_seqlens, impl="triton_recurrent")
    exact = truth(inputs)
    assert relative_error(o, exact["o"]) < LIMIT
    assert (final is not None) == states
    if states:
        assert relative_error(final, exact["final_state"]) < LIMIT


def test_recurrent_refuses_gradients():
    triton_module("rodimus_kernels.ddts.triton_recurrent")
    inputs = make(DdtsCase(1, 3))
    with pytest.raises(ValueError, match="has no gradient"):
        ddts(inputs.q.requires_grad_(), *inputs[1:4], impl="triton_recurrent")
    with torch.no_grad():
        ddts(*inputs[:4], impl="triton_recurrent")


@pytest.mark.parametrize("documents", [None, (70, 0, 90)], ids=["dense", "packed"])
def test_segments_equal_the_whole_walk(documents, monkeypatch):
    chunk = triton_module("rodimus_kernels.ddts.triton_chunk")
    inputs = make(DdtsCase(1, 160, 2, 16, 16, "mixed", documents=documents))
    asked = []
    number = 2 if documents is None else 1
    count = lambda x, programs, columns, _: asked.append(columns) or number
    monkeypatch.setattr(chunk, "_segments", count)
    assert_close(run_ddts(ddts, inputs, impl="triton_chunk"), truth(inputs), LIMIT)
    assert len(asked) == 2


def test_a_segment_fades_by_all_its_chunks(monkeypatch):
    """Of two chunks here, with decays that leave something of the state before them."""
    chunk = triton_module("rodimus_kernels.ddts.triton_chunk")
    monkeypatch.setattr(chunk, "_segments", lambda *_: 2)
    inputs = make(DdtsCase(1, 160, 1, 16, 16))
    inputs = inputs._replace(log_decay=-0.02 * torch.rand_like(inputs.log_decay))
    h0 = inputs.initial_state
    with torch.no_grad():
        o, _ = ddts(*inputs[:4], initial_state=h0, impl="triton_chunk")
        exact, _ = reference.ddts(*(x.double() for x in inputs[:4]), initial_state=h0.double())
    assert relative_error(o, exact) < LIMIT


def test_the_last_segment_is_walked_once(monkeypatch):
    """Nobody starts from the state it leaves, so its values are not read for one."""
    chunk = triton_module("rodimus_kernels.ddts.triton_chunk")
    monkeypatch.setattr(chunk, "_segments", lambda *_: 2)
    scan, own = chunk._scan, []
    monkeypatch.setattr(chunk, "_scan", lambda *x: own.append(x[0].clone()) or scan(*x))
    inputs = make(DdtsCase(2, 160, 2, 16, 16, "mixed"))
    call = lambda v: ddts(*inputs[:2], v, inputs.log_decay, impl="triton_chunk")[0]
    expected = call(inputs.v)
    inputs.v[:, 128:] = torch.nan
    o = call(inputs.v)
    assert len(own) == 2 and all(x.isfinite().all() for x in own)
    assert torch.equal(o[:, :128], expected[:, :128]) and o[:, 128:].isnan().all()


@pytest.mark.parametrize(
    "heads, states, documents", [(1, True, None), (2, False, None), (1, True, (9, 11))]
)
def test_descriptors_equal_pointers(heads, states, documents, monkeypatch):
    """Documents with states of their own, at whose ends a descriptor would not clip, have none."""
    triton_helpers = triton_module("rodimus_kernels._triton")
    batch, length = (2, 70) if documents is None else (1, sum(documents))
    inputs = make(DdtsCase(batch, length, heads, 16, 32, "mixed", states, documents))
    plain = run_ddts(ddts, inputs, impl="triton_chunk")
    if DEVICE == "cuda":
        chunk = triton_module("rodimus_kernels.ddts.triton_chunk")
        monkeypatch.setattr(chunk, "use_tma", lambda *_: False)
    with triton_helpers.assume_capability(90):
        other = run_ddts(ddts, inputs, impl="triton_chunk")
    assert_close(other, plain, 1e-6)


@pytest.mark.parametrize("regime", REGIMES)
def test_summaries_join_segments_into_the_whole(regime):
    """Each segment by itself, their summaries scanned, then each from the state it starts from."""
    inputs = make(DdtsCase(2, 150, 2, 16, 32, regime, states=False))
    leaves = [x.detach().double().requires_grad_() for x in inputs[:4]]
    whole, _ = reference.ddts(*leaves)
    exact = torch.autograd.grad(whole.sum(), leaves)

    pieces = list(zip(*(x.float().split(50, dim=1) for x in leaves), strict=True))
    summaries = [ddts_summary(k, v, g) for _, k, v, g in pieces]
    before = [torch.zeros_like(summaries[0][0])]
    for state, total in summaries:
        before.append(total.exp()[..., None] * before[-1] + state)
    scanned = ddts_scan(*(torch.stack(x) for x in zip(*summaries, strict=True)))
    assert_close({"before": scanned}, {"before": torch.stack(before[:3]).detach()}, LIMIT)
    parts = [ddts(*x, initial_state=h)[0] for x, h in zip(pieces, before, strict=False)]
    joined = torch.cat(parts, dim=1)
    actual = (joined, *torch.autograd.grad(joined.sum(), leaves))
    assert_close(dict(enumerate(actual)), dict(enumerate((whole, *exact))), LIMIT)


def test_summary_gradcheck():
    inputs = make(DdtsCase(1, 7, 2, 4, 3, states=False))
    leaves = [x.detach().double().requires_grad_() for x in inputs[1:4]]
    assert torch.autograd.gradcheck(ddts_summary, leaves)


def test_reverse_scan_is_the_gradient_of_the_scan():
    torch.manual_seed(0)
    states = torch.randn(4, 2, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    decays = -torch.rand(4, 2, 1, 3, dtype=torch.float64)
    dbefore = torch.randn_like(states)
    (expected,) = torch.autograd.grad(reference.ddts_scan(states, decays), states, dbefore)
    assert_close({"d": ddts_scan(dbefore, decays, reverse=True)}, {"d": expected}, 1e-14)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("impl", ["reference", STEP])
def test_scan_matches_its_definition(impl, reverse, rows):
    torch.manual_seed(0)
    states = torch.randn(3, rows, 1, 16, 32, device=DEVICE)
    decays = -torch.rand(3, rows, 1, 16, device=DEVICE)
    given = states.clone()
    actual = ddts_scan(states, decays, reverse=reverse, impl=impl)
    exact = reference.ddts_scan(states.double(), decays.double(), reverse=reverse)
    assert_close({"before": actual}, {"before": exact}, LIMIT)
    assert torch.equal(states, given)


@pytest.mark.parametrize("impl", [*ALL, RECURRENT])
def test_a_state_of_any_dtype_and_boundaries_with_strides(impl):
    inputs = make(DdtsCase(1, 6, 1, 16, 32, documents=(2, 4)))
    bounds = inputs.cu_seqlens.repeat_interleave(2)[::2]
    state = inputs.initial_state.bfloat16()
    apart = state.mT.contiguous().mT
    options = {"output_final_state": True, "impl": impl}
    given = {"initial_state": state.float(), "cu_seqlens": inputs.cu_seqlens}
    expected = ddts(*inputs[:4], **given, **options)
    found = ddts(*inputs[:4], initial_state=apart, cu_seqlens=bounds, **options)
    assert not bounds.is_contiguous() and not apart.is_contiguous()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("decay_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scan_of_half_precision_states_is_rounded_once(decay_dtype):
    states = torch.randn(5, 2, 1, 16, 32, device=DEVICE).bfloat16()
    decays = -torch.rand(5, 2, 1, 16, device=DEVICE).to(decay_dtype)
    actual = ddts_scan(states, decays)
    exact = reference.ddts_scan(states.double(), decays.double())
    assert actual.dtype == torch.bfloat16
    assert_close({"before": actual}, {"before": exact}, torch.finfo(torch.bfloat16).eps / 2)
    # to the bit but where float32 lies beside the middle of two bfloat16 numbers
    assert (actual == exact.bfloat16()).double().mean() > 0.999


def test_bad_summaries_say_what_was_expected():
    x = torch.zeros(1, 4, 1, 16)
    with pytest.raises(ValueError, match="at least one token, got T = 0"):
        ddts_summary(x[:, :0], x[:, :0], x[:, :0])
    with pytest.raises(ValueError, match=r"v must have shape \[1, 4, 1, V\], got"):
        ddts_summary(x, x[:, :3], x)
    with pytest.raises(ValueError, match=r"log_decays must have shape \[2, 1, 1, 16\], got"):
        ddts_scan(torch.zeros(2, 1, 1, 16, 16), torch.zeros(3, 1, 1, 16))


def test_segments_fill_the_machine_and_no_more():
    segments = triton_module("rodimus_kernels.ddts.triton_chunk").segments
    table = {
        # programs, chunks: V = 4096 in blocks of 128 is 32 programs a sequence
        (256, 64): 1,
        (32, 512): 8,
        (64, 512): 4,
        (128, 512): 2,
        (32, 64): 8,
        (32, 7): 1,
        # two launches more are not worth less than eight chunks
        (32, 8): 1,
        (32, 16): 4,
        (384, 64): 1,
        (32, 1): 1,
    }
    assert {case: segments(*case, 264) for case in table} == table


def test_programs_that_share_a_multiprocessor():
    """As registers and shared memory of `python -m benchmarks.aot` for sm_90 allow."""
    chunk = triton_module("rodimus_kernels.ddts.triton_chunk")
    for tile, key_dim, dtype, saves, expected in [
        ((64, 4, 3), 64, torch.bfloat16, True, 2),  # 112.6 KiB
        ((128, 4, 4), 64, torch.bfloat16, False, 1),  # 176.8 KiB
        ((128, 4, 3), 64, torch.bfloat16, False, 1),  # 136.6 KiB
        ((128, 4, 2), 64, torch.bfloat16, False, 2),  # 96.3 KiB
        ((64, 4, 2), 128, torch.bfloat16, False, 2),  # 104.5 KiB
        ((64, 4, 2), 128, torch.bfloat16, True, 1),  # 120.5 KiB
        ((256, 8, 2), 64, torch.bfloat16, False, 1),  # 144.3 KiB, 197 registers
        ((32, 8, 2), 64, torch.float32, False, 1),  # 255 registers
    ]:
        found = chunk.programs_per_multiprocessor(chunk.Tile(*tile), key_dim, dtype, saves)
        assert found == expected, (tile, key_dim, dtype, saves)


@pytest.mark.parametrize("value_dim", [64, 128, 192, 4096])
def test_products_of_16_channels_are_no_narrow_wgmma(value_dim):
    """Sixteen columns on eight warps would be 8 for each warpgroup (see ``gate_tile``), and so
    would 64 rows of a walk."""
    chunk = triton_module("rodimus_kernels.ddts.triton_chunk")
    assert chunk.prepare_tile(16, torch.float32, 90).num_warps == 4
    assert chunk.products_tile(16, value_dim, torch.float32, 90).num_warps == 4
    for tma in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            walk = chunk.walk_tile(16, value_dim, dtype, tma, 90, True)
            assert walk.num_warps <= 4 * walk.width // 64, (tma, dtype)


@pytest.mark.parametrize("impl", CHUNKED)
def test_log_decay_of_minus_infinity_erases_the_state(impl):
    inputs = make(DdtsCase(1, 70, 1, 16, 16))
    inputs.log_decay[:, 40] = -torch.inf
    o, final = ddts(*inputs[:4], output_final_state=True, impl=impl)
    alone = ddts(*(x[:, 40:] for x in inputs[:4]), output_final_state=True, impl=impl)
    assert relative_error(o[:, 40:], alone[0]) < LIMIT and relative_error(final, alone[1]) < LIMIT


@pytest.mark.parametrize("impl", ALL)
def test_a_nan_log_decay_does_not_reach_earlier_tokens(impl):
    inputs = make(DdtsCase(1, 70, 1, 16, 16))
    expected, _ = ddts(*inputs[:4], impl=impl)
    inputs.log_decay[:, 40, :, 3] = torch.nan
    o, _ = ddts(*inputs[:4], impl=impl)
    assert torch.equal(o[:, :40], expected[:, :40]) and o[:, 40:].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", CHUNKED)
def test_a_value_that_is_not_finite_reaches_its_chunk_and_what_follows(impl, value):
    """And nothing else: no earlier chunk, no other channel of V."""
    inputs = make(DdtsCase(1, 150, states=False, documents=(100, 50)))
    options = {"cu_seqlens": inputs.cu_seqlens, "impl": impl}
    expected, _ = ddts(*inputs[:4], **options)
    inputs.v[:, 70, :, 3] = value
    o, _ = ddts(*inputs[:4], **options)
    reached = torch.zeros_like(o, dtype=torch.bool)
    reached[:, 64:, :, 3] = True
    assert torch.equal(~o.isfinite(), reached)
    assert torch.equal(o[~reached], expected[~reached])


def test_gradcheck():
    inputs = ddts_inputs(DdtsCase(1, 9, 2, 4, 3, dtype=torch.float64))
    leaves = [x.requires_grad_() for x in inputs[:5]]

    def function(*x):
        return ddts(*x[:4], initial_state=x[4], output_final_state=True, impl="eager")

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("index", [0, 1], ids=["o", "final_state"])
@pytest.mark.parametrize("impl", CHUNKED)
def test_gradient_of_one_output_alone(impl, index):
    inputs = make(DdtsCase(1, 70))
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:4]]
    exact = [x.detach().double().requires_grad_() for x in inputs[:4]]
    ddts(*leaves, output_final_state=True, impl=impl)[index].sum().backward()
    reference.ddts(*exact, output_final_state=True)[index].sum().backward()
    for a, b in zip(leaves, exact, strict=True):
        grads = (torch.zeros_like(x) if x.grad is None else x.grad for x in (a, b))
        assert relative_error(*grads) < LIMIT


# ------------------------------------------------------------------------------------------ gates


def exact_gates(k, select, temper, eps):
    """The definition, with the logarithm taken before anything underflows."""
    norm = k.norm(dim=-1, keepdim=True).clamp_min(eps)
    soft = torch.logaddexp(select, torch.zeros_like(select))
    return k / norm * soft ** temper.sigmoid(), -soft * temper.sigmoid()


GATES = ["reference", pytest.param("triton", marks=TRITON_MARKS)]


def test_gates_match_their_definition_in_float64():
    x = [torch.randn(3, 5, 2, 16, dtype=torch.float64) for _ in range(3)]
    for actual, exact in zip(ddts_gates(*x), exact_gates(*x, 1e-12), strict=True):
        assert relative_error(actual, exact) < 1e-14


@pytest.mark.parametrize("shape", [(3, 5, 2, 16), (7, 12), (40,)], ids=str)
@pytest.mark.parametrize("impl", GATES)
def test_gates_match_their_definition(impl, shape):
    x = [torch.randn(shape, dtype=torch.float64).to(DEVICE) for _ in range(3)]
    single = ddts_gates(*(t.float() for t in x), impl=impl)
    for actual, exact in zip(single, exact_gates(*x, 1e-12), strict=True):
        assert actual.dtype == torch.float32 and relative_error(actual, exact) < 1e-6


@pytest.mark.parametrize("impl", GATES)
def test_gradients_of_the_gates(impl):
    raw = [torch.randn(2, 9, 1, 64).to(DEVICE) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    select, temper = (x.to(DEVICE) for x in gate_preactivations("random", (2, 9, 1, 16), generator))
    # slices of one projection, a key shorter than eps, one zero
    k, seed = raw[0][..., 16:32], raw[1][..., :16]
    k[0, 0] *= 1e-8
    k[0, 1] = 0
    results = []
    for dtype, function in ((torch.float32, ddts_gates), (torch.float64, reference.ddts_gates)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (k, select, temper)]
        options = {"impl": impl} if function is ddts_gates else {}
        outputs = function(*leaves, eps=1e-5, **options)
        torch.autograd.backward(outputs, [seed.to(dtype), seed.flip(0).to(dtype)])
        names = ("dk", "dselect", "dtemper")
        results.append({n: x.grad for n, x in zip(names, leaves, strict=True)})
    # the zero key has a gradient of 1 / eps: rows of ordinary size are compared by themselves
    for rows in (slice(0, 2), slice(2, 18)):
        actual, exact = ({n: x.flatten(0, 1)[rows] for n, x in r.items()} for r in results)
        assert_close(actual, exact, 2e-6)


def test_opcheck_gates_and_recurrence():
    triton_module("rodimus_kernels.ddts.triton_gates")
    triton_module("rodimus_kernels.ddts.triton_recurrent")
    raw = [torch.randn(2, 3, 1, 16).to(DEVICE).requires_grad_() for _ in range(3)]
    torch.library.opcheck(torch.ops.rodimus.ddts_gates.default, (*raw, 1e-5))
    inputs = make(DdtsCase(2, 3))
    arguments = (*inputs[:4], 0.25, inputs.initial_state, None)
    torch.library.opcheck(torch.ops.rodimus.ddts_recurrent.default, arguments)
    row = [x[:, 0].contiguous() for x in inputs[:4]]
    arguments = (*row, inputs.initial_state, 0.25)
    torch.library.opcheck(torch.ops.rodimus.ddts_recurrent_step.default, arguments)


@pytest.mark.parametrize("size", [100.0, 1e4, 1e30, 1e36, 1e38])
@pytest.mark.parametrize("impl", GATES)
def test_gates_stay_finite_for_any_preactivation(impl, size):
    edges = torch.tensor([-size, -20.0, -5.0, -1.0, 0.0, 1.0, 5.0, 20.0, size], device=DEVICE)
    select, temper = (x.reshape(-1, 1) for x in torch.meshgrid(edges, edges, indexing="ij"))
    # a key of one channel: nothing of its gate is lost to the norm
    leaves = [x.clone().requires_grad_() for x in (torch.ones_like(select), select, temper)]
    k, log_decay = ddts_gates(*leaves, impl=impl)
    assert torch.isfinite(k).all() and torch.isfinite(log_decay).all() and (log_decay <= 0).all()
    # one by one: the largest would hide a decay that has to be 1
    exact = reference.ddts_gates(*(x.detach().double() for x in leaves))
    for actual, expected in zip((k, log_decay), exact, strict=True):
        assert torch.allclose(actual.double(), expected, rtol=2e-5, atol=1e-6)
    # beyond, the product of softplus and its logarithm overflows
    for result in (k, log_decay) if size <= 1e36 else ():
        gradients = torch.autograd.grad(
            result.sum(), leaves, retain_graph=True, materialize_grads=True
        )
        assert all(torch.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("impl", GATES)
def test_gate_gradients_at_plus_minus_100(impl):
    edges = torch.tensor([-100.0, -30.0, -20.5, -19.5, -5.0, 0.3, 5.0, 25.0, 100.0], device=DEVICE)
    select, temper = (x.reshape(-1, 1) for x in torch.meshgrid(edges, edges, indexing="ij"))
    leaves = [x.clone().requires_grad_() for x in (torch.ones_like(select), select, temper)]
    k, log_decay = ddts_gates(*leaves, impl=impl)
    (k.sum() + log_decay.sum()).backward()
    # closed form in float64: s^tau = exp(tau ln s), ln s = a - e^a / 2 for a << 0
    a, b = select.double(), temper.double()
    tau = b.sigmoid()
    s = torch.where(a < -30, a.exp(), F.softplus(a.clamp_min(-40), threshold=50))
    log_s = torch.where(a < -30, a, s.log())
    written = (tau * log_s).exp()
    ratio = torch.where(a < -30, torch.ones_like(a), a.sigmoid() / s)
    dselect = written * tau * ratio - tau * a.sigmoid()
    dtemper = (written * log_s - s) * tau * (1 - tau)
    # row by row: those of far negative pre-activations would drown beside the others; near zero
    # the gradients through k and log_decay all but cancel
    for row, exact in zip(leaves[1].grad.view(9, 9), dselect.view(9, 9), strict=True):
        assert relative_error(row, exact) < 5e-6
    assert relative_error(leaves[2].grad, dtemper) < 1e-6


def test_gates_gradcheck():
    leaves = [torch.randn(2, 3, 1, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(ddts_gates, leaves)


# ------------------------------------------------------------------- torch: compile, autocast, ops


def test_opcheck_eager():
    inputs = ddts_inputs(DdtsCase(1, 70, 2, 16, 16))
    leaves = [x.requires_grad_() for x in inputs[:4]]
    arguments = (*leaves, 0.25, inputs.initial_state.requires_grad_(), True)
    torch.library.opcheck(torch.ops.rodimus.ddts_eager.default, arguments)


@pytest.mark.parametrize("documents", [None, (9, 0, 11)], ids=["dense", "packed"])
def test_opcheck_triton(documents):
    triton_module("rodimus_kernels.ddts.triton_chunk")
    inputs = make(DdtsCase(1, 20, 2, 16, 16, documents=documents))
    leaves = [x.requires_grad_() for x in inputs[:4]]
    h0 = inputs.initial_state.requires_grad_()
    arguments = (*leaves, None, 0.0, 0.25, h0, None, inputs.cu_seqlens, True)
    torch.library.opcheck(torch.ops.rodimus.ddts_chunk.default, arguments)


@pytest.mark.parametrize("impl", CHUNKED)
def test_compiles_without_a_break_for_any_length(impl):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(q, k, v, g):
        return ddts(q, k, v, g, impl=impl)[0] * 2

    for length in (65, 70, 130):
        x = make(DdtsCase(1, length, states=False))[:4]
        leaves = [t.requires_grad_() for t in x]
        compiled = torch.autograd.grad(function(*leaves).sum(), leaves)
        plain = torch.autograd.grad((ddts(*leaves, impl=impl)[0] * 2).sum(), leaves)
        for a, b in zip(compiled, plain, strict=True):
            assert relative_error(a, b) < 1e-6


def test_compiles_with_the_automatic_choice():
    torch.compiler.reset()
    x = make(DdtsCase(1, 70, states=False))[:4]
    compiled = torch.compile(lambda *a: ddts(*a)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*x), ddts(*x)[0])


@pytest.mark.parametrize("impl", ALL)
def test_autocast_changes_nothing(impl):
    inputs = make(DdtsCase(1, 70))
    plain = run_ddts(ddts, inputs, impl=impl)
    with_autocast = torch.autocast(DEVICE, dtype=torch.bfloat16)(ddts)
    cast = run_ddts(with_autocast, inputs, impl=impl)
    for name, x in plain.items():
        assert torch.equal(x, cast[name]), name


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_tensors_without_values_have_shapes(impl):
    inputs = [x.to("meta") for x in make(DdtsCase(1, 70, 1, 16, 32))[:4]]
    o, final_state = ddts(*inputs, output_final_state=True, impl=impl)
    assert (o.shape, final_state.shape) == ((1, 70, 1, 32), (1, 1, 16, 32))


@pytest.mark.parametrize("impl", CHUNKED)
def test_activation_checkpointing_changes_nothing(impl):
    inputs = make(DdtsCase(1, 70))
    checkpointed = lambda *a, **k: torch.utils.checkpoint.checkpoint(
        ddts, *a, use_reentrant=False, **k
    )
    plain, again = (run_ddts(f, inputs, impl=impl) for f in (ddts, checkpointed))
    assert all(torch.equal(x, again[name]) for name, x in plain.items())


# ------------------------------------------------------------------------------ dispatch and errors


@pytest.mark.parametrize(
    "triton, needs_grad, rows, length, key_dim, value_dim, expected",
    [
        (True, True, 8, 4096, 64, 4096, "triton_chunk"),
        (True, False, 8, 4096, 64, 4096, "triton_chunk"),
        (True, True, 1, 1, 64, 4096, "triton_chunk"),
        (True, False, 1, 32, 64, 4096, "triton_recurrent"),
        (True, False, 1, 33, 64, 4096, "triton_chunk"),
        (True, False, 4, 32, 64, 4096, "triton_recurrent"),
        (True, False, 8, 16, 64, 4096, "triton_recurrent"),
        (True, False, 8, 17, 64, 4096, "triton_chunk"),
        (True, False, 256, 64, 64, 4096, "triton_chunk"),
        (True, False, 1, 64, 48, 4001, "triton_recurrent"),
        (True, False, 256, 64, 48, 4001, "triton_recurrent"),
        (True, False, 1, 65, 48, 4001, "eager"),
        (True, True, 8, 4096, 48, 4096, "eager"),
        (True, True, 8, 4096, 64, 4001, "eager"),
        (False, True, 8, 4096, 64, 4096, "eager"),
        (False, False, 1, 8, 64, 4096, "reference"),
    ],
)
def test_automatic_choice(triton, needs_grad, rows, length, key_dim, value_dim, expected):
    case = (triton, needs_grad, rows, length)
    assert api._choose(*case, key_dim, value_dim, torch.bfloat16) == expected
    if expected == "triton_chunk":
        assert api._choose(*case, 256, value_dim, torch.bfloat16) == "triton_chunk"
        assert api._choose(*case, 256, value_dim, torch.float32) != "triton_chunk"


def test_automatic_choice_counts_rows_and_heads(monkeypatch):
    monkeypatch.setattr(api, "runs_triton", lambda device: True)
    for shape, expected in [
        ((1, 16, 4, 64), "triton_recurrent"),
        ((1, 16, 16, 64), "triton_chunk"),
        ((16, 16, 1, 64), "triton_chunk"),
    ]:
        assert api.choose_sequence(*(torch.empty(shape) for _ in "qkv")) == expected


@pytest.mark.parametrize("which", range(5))
def test_automatic_choice_sees_whichever_input_wants_a_gradient(monkeypatch, which):
    """The recurrent form has none."""
    monkeypatch.setattr(api, "runs_triton", lambda device: True)
    given = [torch.zeros(1, 16, 1, 64) for _ in range(4)] + [torch.zeros(1, 1, 64, 64)]
    given[which].requires_grad_()
    assert api.choose_sequence(*given) == "triton_chunk"
    with torch.no_grad():
        assert api.choose_sequence(*given) == "triton_recurrent"


def test_implementations_are_loaded_while_compiling(monkeypatch, tmp_path):
    """Several in one graph, each by its first use in the process."""
    for name in ("first", "second"):
        (tmp_path / f"rodimus_{name}.py").write_text("def double(x): return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    implementations = {name: f"rodimus_{name}:double" for name in ("first", "second")}
    load = lambda name: _dispatch.load("double", name, implementations)
    x = torch.ones(2, device=DEVICE)
    twice = torch.compile(lambda: load("first")(load("second")(x)), backend="eager", fullgraph=True)
    assert torch.equal(twice(), 4 * x)


def test_what_two_threads_observe_is_each_ones_own():
    """The first begins and ends first, while neither has seen an operator."""
    x = torch.randn(2, 8)
    began, second_began, ended = (threading.Event() for _ in range(3))

    def first():
        began.set()
        assert second_began.wait(60)

    def second():
        second_began.set()
        assert ended.wait(60)
        rms_norm(x, x[0], impl="reference")

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(_dispatch.implementations_used, first)
        assert began.wait(60)
        two = pool.submit(_dispatch.implementations_used, second)
        assert one.result(60) == []
        ended.set()
        assert two.result(60) == ["rodimus_kernels.reference:rms_norm"]
    assert one.result() == [] and not _dispatch._observers


def test_a_gpu_without_triton_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(_dispatch, "_import", lambda module: "No module named 'triton'")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _dispatch._gpu_runs_triton.cache_clear()
    assert not any(_dispatch.runs_triton(torch.device("cuda", 7)) for _ in range(2))
    assert [r.getMessage() for r in caplog.records] == [
        "torch operations instead of Triton kernels on cuda:7: No module named 'triton'"
    ]


def bad_inputs():
    q = torch.zeros(2, 5, 1, 4)
    v = torch.zeros(2, 5, 1, 8)
    ok = {"q": q, "k": q, "v": v, "log_decay": q}
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    one = {name: x[:1] for name, x in ok.items()}
    yield "q must have shape", ok | {"q": q[0]}
    yield r"k must have shape \[2, 5, 1, 4\], got \(2, 4, 1, 4\)", ok | {"k": q[:, :4]}
    yield r"v must have shape \[2, 5, 1, V\]", ok | {"v": v[:, :4]}
    yield "log_decay must have shape", ok | {"log_decay": q[..., :3]}
    yield "v must be floating point, got torch.int64", ok | {"v": v.long()}
    yield "initial_state must have shape", ok | {"initial_state": torch.zeros(1, 1, 4, 8)}
    yield "k must be a tensor, got NoneType", ok | {"k": None}
    yield "initial_state must be a tensor, got ndarray", ok | {"initial_state": v.numpy()}
    yield "cu_seqlens must be a tensor, got list", one | {"cu_seqlens": [0, 5]}
    yield "expected B = 1, got B = 2", ok | {"cu_seqlens": bounds}
    yield "integers", one | {"cu_seqlens": bounds.float()}
    yield r"rise from 0 to T = 5, got \[0, 4\]", one | {"cu_seqlens": bounds.clamp(max=4)}
    yield "at least one token", {name: x[:, :0] for name, x in ok.items()}
    yield "at least one channel, got K = 0", {n: x[..., :0] for n, x in ok.items()}
    # it would get no gradient
    yield "scale must be a number, got a tensor", ok | {"scale": torch.tensor(0.5)}
    yield "unknown impl 'fast'", ok | {"impl": "fast"}
    yield "device of q", ok | {"v": v.to("meta")}


@pytest.mark.parametrize("message, arguments", list(bad_inputs()))
def test_bad_input_says_what_was_expected(message, arguments):
    with pytest.raises(ValueError, match=message):
        ddts(**arguments)


def test_triton_says_which_shapes_and_dtypes_it_takes():
    triton_module("rodimus_kernels.ddts.triton_chunk")
    q, v = (torch.zeros(1, 5, 1, n, device=DEVICE) for n in (16, 32))
    with pytest.raises(ValueError, match="expected K in .* and V a multiple of 16, got K = 12"):
        ddts(*(q[..., :12],) * 2, v, q[..., :12], impl="triton_chunk")
    with pytest.raises(ValueError, match="got K = 16, V = 24"):
        ddts(q, q, v[..., :24], q, impl="triton_chunk")
    with pytest.raises(ValueError, match="takes float32, bfloat16 and float16, got torch.float64"):
        ddts(q, q, v.double(), q, impl="triton_chunk")


def test_bad_step_input_says_what_was_expected():
    q, state = torch.zeros(2, 1, 4), torch.zeros(2, 1, 4, 8)
    v = torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match=r"state must have shape \[2, 1, 4, 8\]"):
        ddts_step(q, q, v, q, state[..., :7])
    with pytest.raises(ValueError, match="state must be contiguous torch.float32, got strides"):
        ddts_step(q, q, v, q, state.transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match=r"got contiguous torch.bfloat16"):
        ddts_step(q, q, v, q, state.bfloat16())
    with pytest.raises(ValueError, match="at least one channel, got K = 0"):
        ddts_step(*(q[..., :0],) * 2, v, q[..., :0], state[:, :, :0].contiguous())
    with pytest.raises(ValueError, match="temper must have shape"):
        ddts_gates(q, q, q[..., :3])
    with pytest.raises(ValueError, match=r"k must have shape \[..., K\], got \(\)"):
        ddts_gates(*[torch.tensor(1.0)] * 3)


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, rodimus_kernels as r\n"
        "x = torch.zeros(1, 70, 1, 16)\n"
        "r.ddts(x, x, x, x)\n"
        "assert not any(m.startswith('triton.') for m in sys.modules)\n"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=path)


@pytest.mark.timing
def test_chunks_are_twenty_times_faster_than_the_loop():
    inputs = ddts_inputs(DdtsCase(1, 2048, 1, 64, 512, states=False))

    def seconds(impl):
        start = time.perf_counter()
        run_ddts(ddts, inputs, impl=impl)
        return time.perf_counter() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    try:
        for impl in ("reference", "eager"):
            run_ddts(ddts, inputs, impl=impl)
        loop, chunks = zip(
            *((seconds("reference"), seconds("eager")) for _ in range(5)), strict=True
        )
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(loop) > 20 * statistics.median(chunks)


def test_the_figure_of_the_documentation_is_what_the_code_does():
    folder = Path(__file__).parents[2] / "docs" / "kernels"
    figure = runpy.run_path(str(folder / "ddts_levels.py"))["figure"](16)
    assert f"```\n{figure}\n```" in (folder / "ddts.md").read_text(encoding="utf-8")


def test_boundaries_elsewhere_are_refused():
    """On a GPU a kernel would read them as an address of its own."""
    x = torch.randn(1, 4, 1, 16)
    named = {"cu_seqlens": torch.tensor([0, 4], device="meta")}
    for call in (
        lambda: ddts(x, x, x, x, **named),
        lambda: short_conv(x[:, :, 0], torch.randn(16, 4), **named),
        lambda: shared_key_attention(x, x, x, **named),
    ):
        with pytest.raises(ValueError, match=r"cu_seqlens must be on the device of . \(cpu\)"):
            call()


@pytest.mark.parametrize("impl", ["auto", "reference", "eager"])
def test_an_empty_batch_is_empty(impl, monkeypatch):
    # no kernel is launched for it on a GPU either
    monkeypatch.setattr(api, "runs_triton", lambda device: True)
    given = [torch.randn(0, 200, 1, 16) for _ in "qkvg"]
    assert api.choose_sequence(*given) == "eager"
    o, state = ddts(*given, output_final_state=True, impl=impl)
    assert o.shape == (0, 200, 1, 16) and state.shape == (0, 1, 16, 16)


@pytest.mark.parametrize("shape", [(0, 70, 1, 16, 16), (2, 70, 0, 16, 16), (2, 70, 1, 16, 0)])
@pytest.mark.parametrize("engine", [0, 90])
@pytest.mark.parametrize("impl", ALL)
def test_without_rows_heads_or_values_nothing_is_read_or_written(impl, engine, shape):
    """Queries, keys and decays of values without channels have gradients of zero."""
    inputs = make(DdtsCase(*shape))
    if impl != "triton_chunk":
        found = run_ddts(ddts, inputs, impl=impl)
    else:
        triton_helpers = triton_module("rodimus_kernels._triton")
        with triton_helpers.assume_capability(engine):
            found = run_ddts(ddts, inputs, impl=impl)
    exact = truth(inputs)
    assert all(torch.equal(x, exact[name].to(x)) for name, x in found.items())


@pytest.mark.parametrize("shape", [(0, 1, 16, 16), (2, 0, 16, 16), (2, 1, 16, 0)])
@pytest.mark.parametrize("impl", ["reference", "eager", STEP])
def test_a_step_without_rows_heads_or_values_is_empty(impl, shape):
    inputs = make(DdtsCase(shape[0], 1, *shape[1:], states=False))
    state = torch.zeros(shape, device=DEVICE)
    o = ddts_step(*(x[:, 0] for x in inputs[:4]), state, impl=impl)
    assert o.shape == (*shape[:2], shape[3])


@pytest.mark.parametrize("shape", [(0, 2, 1, 16, 16), (3, 2, 1, 16, 0), (3, 2, 1, 0, 16)])
@pytest.mark.parametrize("impl", ["auto", "reference", STEP])
def test_a_scan_of_nothing_is_empty(impl, shape):
    states, decays = torch.ones(shape, device=DEVICE), torch.zeros(shape[:4], device=DEVICE)
    assert ddts_scan(states, decays, impl=impl).shape == shape


def test_a_module_is_used_when_its_import_has_ended(monkeypatch, tmp_path):
    """Another thread finds it in sys.modules before."""
    text = "import time\ntime.sleep(0.5)\ndef double(x): return 2 * x\n"
    (tmp_path / "rodimus_slow.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def first_use(delay):
        time.sleep(delay)
        return _dispatch.load("double", "slow", {"slow": "rodimus_slow:double"})(2)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(first_use, (0.0, 0.2))) == [4, 4]


@pytest.mark.parametrize("kind", [pytest.param(DEVICE, marks=TRITON_MARKS)])
def test_what_stays_for_all_calls_has_nothing_of_the_first_callers_thread(kind):
    """Not its default device, and on a GPU not its memory: that may be of a recording."""
    triton_chunk = triton_module("rodimus_kernels.ddts.triton_chunk")
    triton_chunk._summed.cache_clear()
    with torch.device("meta"):
        found = triton_chunk._summed(torch.device(kind))
    assert found.device.type == kind and found.dtype == torch.bfloat16


@pytest.mark.gpu
def test_the_first_call_may_be_one_that_is_recorded():
    """By torch.compile, which refuses tensors that stay in the memory of a recording."""
    triton_chunk = triton_module("rodimus_kernels.ddts.triton_chunk")
    triton_chunk._summed.cache_clear()
    torch._dynamo.reset()
    x = make(DdtsCase(1, 200, 1, 64, 64, states=False, dtype=torch.bfloat16))[:4]
    call = lambda *x: ddts(*x, impl="triton_chunk")[0]
    recorded = torch.compile(call, mode="reduce-overhead")
    with torch.no_grad():
        found = [recorded(*x).clone() for _ in range(3)]
        assert all(torch.equal(o, call(*x)) for o in found)


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends to be on GPUs")
@pytest.mark.parametrize(
    "given, expected",
    [((8, 0), 80), ((8, 6), 86), ((8, 7), 80), ((8, 9), 86), ((9, 0), 90), ((10, 3), 103)]
    + [((12, 0), 86)],
)
def test_gpus_with_little_shared_memory_are_known(given, expected, monkeypatch):
    triton_helpers = triton_module("rodimus_kernels._triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: given)

    class OnGpu:
        is_cuda, device = True, "cuda:0"

    assert triton_helpers.capability(OnGpu) == expected
    # its kernels are compiled for it, whatever is assumed
    with triton_helpers.assume_capability(0):
        assert triton_helpers.capability(OnGpu) == expected
