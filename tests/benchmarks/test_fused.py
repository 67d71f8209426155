"""What the benchmark of fused operators counts, and what it refuses to time."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_ddts, bench_fused, harness, operators, peers, work
from benchmarks.bench_fused import Shape
from tests.benchmarks.test_suite import Fixture

CPU = torch.device("cpu")

# bytes a token in bfloat16 at the 1.6B model's widths: a row of 2048 has 4 KB, its float32 stream 8
# KB, a row of the mixer 8 KB; bytes of weights and tables
FORWARD = {
    "rms_norm": (8192 + 4096, 4096),
    "add_rms_norm": (4096 + 8192 + 4096 + 8192, 4096),
    "gated_rms_norm": (4 * 8192, 2 * 8192),
    # one table for all sequences: 4096 positions, cosine and sine of 64 angles
    "rope": (2 * 4096, 4096 * 2 * 64 * 2),
    "swiglu": (3 * 2736 * 2, 0),
    "short_conv": (2 * 8192, 4096 * 5 * 2),
    "input_gate": (2 * 8192 + 64, 4096 * 33 * 2),
    # three parts of 64 in, two in float32 out
    "ddts_gates": (3 * 128 + 2 * 256, 0),
}
# backward: what is read again, the gradients of outputs and of inputs
BACKWARD = {
    "rms_norm": (8192 + 4096 + 8192, 2 * 4096),
    "add_rms_norm": (8192 + (4096 + 8192) + (4096 + 8192), 2 * 4096),
    "gated_rms_norm": (3 * 8192 + 8192 + 3 * 8192, 4 * 8192),
    "rope": (2 * 4096, 4096 * 2 * 64 * 2),
    "swiglu": (5 * 2736 * 2, 0),
    "short_conv": (3 * 8192, 2 * 4096 * 5 * 2),
    "input_gate": (3 * 8192 + 2 * 64, 2 * 4096 * 33 * 2),
    "ddts_gates": (2 * 3 * 128 + 2 * 256, 0),
}


def full(name, batch, length):
    """An operator at full scale, without memory."""
    shape = Shape.of("full", batch, length)
    return bench_fused.make(name, shape, torch.device("meta"), torch.bfloat16)


def tiny(name, dtype=torch.float32):
    torch.manual_seed(0)
    return bench_fused.make(name, Shape.of("tiny", 2, 20), CPU, dtype)


def test_every_operator_is_timed_in_both_passes():
    for points in (bench_fused.POINTS["tiny"], bench_fused.POINTS["cuda"]):
        found = {(name, what) for what, name, *_ in points}
        assert found == {(n, w) for n in bench_fused.OPERATORS for w in bench_fused.PASSES}
    assert {*FORWARD} == {*BACKWARD} == {*bench_fused.OPERATORS} - {"loss"}


@pytest.mark.parametrize("name", FORWARD)
def test_bytes_are_those_of_the_published_widths(name):
    operator, tokens = full(name, 8, 4096), 8 * 4096
    forward, _ = operator.work("forward", "reference")
    assert forward == tokens * FORWARD[name][0] + FORWARD[name][1]
    training, _ = operator.work("training", "reference")
    assert training - forward == tokens * BACKWARD[name][0] + BACKWARD[name][1]


def test_the_loss_is_bound_by_three_products_with_the_head():
    operator = full("loss", 1, 8192)
    assert operator.inputs[1].shape == (126464, 2048)
    products = 2 * 8192 * 2048 * 126464
    half = (8192 + 126464) * 2048 * 2 + 8192 * 8
    assert operator.work("forward", "reference") == (half + 4, products)
    both = half + 4 + 4 + (8192 + 126464) * 2048 * 2
    assert operator.work("training", "reference") == (both, 3 * products)
    # 4.2 TFLOP against 0.6 GB: the GEMM bound is the later one on any GPU
    work = operators.Call(int, *operator.work("forward", "reference")[:1], flops=products).work
    ceilings = {"copy_GBps": 4000.0, "gemm_TFLOPs": 800.0}
    assert operators.floor_ms(work, ceilings) == pytest.approx(products / 800e9)


@pytest.mark.parametrize("name", bench_fused.OPERATORS)
def test_operations_are_those_that_torch_counts(name):
    operator = tiny(name)
    do = tuple(map(torch.randn_like, bench_fused.results(operator.plain, operator)))
    for what in bench_fused.PASSES:
        call = bench_fused.pass_of(what, operator.plain, operator, do)
        with FlopCounterMode(display=False) as counter:
            call()
        counts = counter.get_flop_counts().get("Global", {})
        # the taps of a depthwise convolution are no GEMM
        products = sum(n for op, n in counts.items() if "convolution" not in str(op))
        assert (operator.work(what, "reference")[1] or 0) == products


def broken(operator, factor=1.001):
    """The operator with a first output that is off in every form but the reference."""

    def function(*tensors, impl="auto"):
        found = operator.function(*tensors, impl=impl)
        if impl == "reference":
            return found
        several = found if isinstance(found, tuple) else (found,)
        return several[0] * factor, *several[1:]

    return operator._replace(function=function)


@pytest.mark.parametrize("name", bench_fused.OPERATORS)
@pytest.mark.parametrize("what", bench_fused.PASSES)
def test_a_wrong_operator_is_not_timed_and_a_wrong_peer_has_a_reason(name, what):
    operator = tiny(name)
    wrong = broken(operator)
    others = {"torch": operator.plain, "wrong": wrong.function}
    calls, error = bench_fused.calls_of(what, name, operator, "auto", others)
    assert list(calls) == [f"{name}/{engine}" for engine in ("auto", "torch", "wrong")]
    assert calls[f"{name}/wrong"].startswith("wrong: relative error 1.0e-03, limit 1e-05")
    assert error < 1e-5 and not isinstance(calls[f"{name}/torch"], str)
    with pytest.raises(peers.Fault, match="wrong: relative error 1.0e-03"):
        bench_fused.calls_of(what, name, wrong, "auto", {})


def test_a_result_that_is_no_number_is_wrong():
    wrong = broken(tiny("swiglu"), float("nan"))
    with pytest.raises(peers.Fault, match="relative error nan"):
        bench_fused.calls_of("forward", "swiglu", wrong, "auto", {})


@pytest.mark.parametrize(("name", "factor"), [("ddts_gates", 1.001), ("loss", 1.002)])
def test_what_is_float32_is_held_to_a_limit_of_its_own(name, factor):
    operator = tiny(name, torch.bfloat16)
    bench_fused.calls_of("forward", name, operator, "auto", {})
    with pytest.raises(peers.Fault, match="relative error .*e-03, limit 1e-0[35]"):
        bench_fused.calls_of("forward", name, broken(operator, factor), "auto", {})


@pytest.mark.parametrize("seed", range(20))
def test_the_loss_of_few_tokens_is_as_near_as_rounded_logits_allow(seed):
    torch.manual_seed(seed)
    operator = bench_fused.make("loss", Shape.of("tiny", 2, 20), CPU, torch.bfloat16)
    _, error = bench_fused.calls_of("forward", "loss", operator, "auto", {"t": operator.plain})
    assert error < operator.limit / 5


@pytest.mark.parametrize("name", bench_ddts.SURROUNDINGS)
def test_surroundings_of_ddts_are_compared_before_they_are_timed(monkeypatch, name):
    make = bench_fused.OPERATORS[name]
    bench = harness.Bench("tiny", CPU, torch.float32, (), None, rounds=2, load=0.0)
    calls, error = bench_ddts.surroundings(bench, 1, 20, 32, ("auto", "reference"))
    assert {label.partition("/")[0] for label in calls} == {*bench_ddts.SURROUNDINGS}
    assert 0 < error < 1e-5
    monkeypatch.setitem(bench_fused.OPERATORS, name, lambda *given: broken(make(*given)))
    with pytest.raises(peers.Fault, match="wrong: relative error 1.0e-03"):
        bench_ddts.surroundings(bench, 1, 20, 32, ("auto", "reference"))


def test_a_record_holds_times_what_rates_follow_from_and_the_error(monkeypatch):
    bench = harness.Bench("tiny", CPU, torch.float32, (), None, rounds=2, load=0.0)
    bench._ceilings = {"copy_GBps": 10.0, "gemm_TFLOPs": 0.1}
    kept = []
    record = bench.record
    monkeypatch.setattr(bench, "record", lambda *args: kept.append(record(*args)) or kept[-1])
    bench_fused.test_fused(bench, Fixture(), lambda *_: None, ("training", "loss", 2, 20))
    assert 0 < kept[0]["settings"]["largest_error"] < 1e-5
    for row in kept[0]["rows"]:
        rates = work.rates(kept[0], row)
        assert rates["GBps"] == pytest.approx(row["floor_bytes"] / row["median_ms"] / 1e6)
        assert rates["TFLOPs"] == pytest.approx(row["flops"] / row["median_ms"] / 1e9)
        assert row["floor_ms"] == max(row["floor_bytes"] / 1e7, row["flops"] / 1e8)
