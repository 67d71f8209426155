"""Statistics of interleaved timings, on numbers whose answers are known."""

import time

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_quantiles_interpolate_between_samples():
    assert timing.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert timing.quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    assert timing.quantile([7.0], 0.9) == 7.0


def test_interval_of_the_median_is_the_binomial_one():
    # tables of the sign test: for n = 9, the 2nd and 8th values enclose it with 96.09 %
    low, high, coverage = timing.median_interval([float(i) for i in range(1, 10)])
    assert (low, high) == (2.0, 8.0)
    assert coverage == pytest.approx(0.9609, abs=1e-4)


def test_few_rounds_give_the_whole_range_and_say_how_little_it_covers():
    low, high, coverage = timing.median_interval([1.0, 2.0, 3.0])
    assert (low, high) == (1.0, 3.0)
    assert coverage == pytest.approx(0.75)


def test_interval_covers_the_median_as_often_as_it_says():
    torch.manual_seed(0)
    draws = torch.randn(2000, 15).tolist()
    intervals = [timing.median_interval(draw) for draw in draws]
    covered = sum(low <= 0.0 <= high for low, high, _ in intervals) / len(draws)
    assert covered == pytest.approx(intervals[0][2], abs=0.015)


def test_ratio_of_rounds_is_untouched_by_a_common_slowdown():
    load = [1.0, 5.0, 2.0, 9.0, 1.5, 4.0, 3.0]
    found = timing.ratio([3 * x for x in load], [2 * x for x in load])
    assert found.median == found.low == found.high == 1.5


def test_interval_of_several_sittings_holds_their_rounds():
    # a machine that was in two states: three sittings of 20 rounds, one round in each astray
    sittings = [[2.0] * 19 + [9.0], [1.4] * 19 + [0.1], [2.1] * 20]
    rounds = [ratio for sitting in sittings for ratio in sitting]
    found = timing.ratio(rounds, [1.0] * 60, [20, 20, 20])
    assert (found.low, found.median, found.high, found.coverage) == (1.4, 2.0, 2.1, 0.95)


def test_rounds_must_be_those_of_the_sittings():
    with pytest.raises(ValueError, match="expected 4 rounds of the sittings, got 3"):
        timing.ratio([1.0] * 3, [1.0] * 3, [2, 2])


def test_ratio_refuses_targets_of_different_rounds():
    with pytest.raises(ValueError, match="as many rounds of both targets, got 1 and 2"):
        timing.ratio([1.0], [1.0, 2.0])


def test_wide_spread_is_marked_noisy():
    assert not timing.summarize([1.0, 1.01, 0.99, 1.0, 1.02]).noisy
    assert timing.summarize([1.0, 2.0, 1.0, 3.0, 1.0]).noisy


def test_each_round_calls_every_target_once_and_the_focus_last():
    calls = []
    targets = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    turns = timing.RoundRobin(targets, CPU, focus="b")
    for _ in range(2):
        turns.round()
    assert calls == ["a", "c", "b", "c", "a", "b"]
    assert all(len(turns.column(name)) == 2 for name in "abc")


def test_what_comes_before_a_call_is_not_timed():
    calls = []
    turns = timing.RoundRobin(
        {"a": lambda: calls.append("call")},
        CPU,
        focus="a",
        before={"a": lambda: (time.sleep(0.05), calls.append("before"))},
    )
    turns.round()
    turns.round()
    assert calls == ["before", "call"] * 2
    assert max(turns.column("a")) < 50


def test_a_flush_comes_after_what_comes_before_and_is_not_timed():
    calls = []
    turns = timing.RoundRobin(
        {name: (lambda name=name: calls.append(name)) for name in "ab"},
        CPU,
        focus="a",
        before={"a": lambda: calls.append("before")},
        flush=lambda: (time.sleep(0.05), calls.append("flush")),
    )
    turns.round()
    assert calls == ["flush", "b", "before", "flush", "a"]
    assert max(turns.column("a") + turns.column("b")) < 50


def test_a_gpu_empties_its_cache_while_the_call_is_launched(monkeypatch):
    """Between the two waits: the device's clock starts when the flush is done."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def elapsed_time(self, end):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    note = lambda name: lambda: calls.append(name)
    gpu = torch.device("cuda")
    turns = timing.RoundRobin({"a": note("call")}, gpu, focus="a", flush=note("flush"))
    assert turns.time("a").device_ms == 3.0
    assert calls == ["wait", "flush", "event", "call", "event", "wait"]


def test_warm_up_leaves_no_samples():
    turns = timing.RoundRobin({"a": lambda: None}, CPU, focus="a")
    assert turns.warm_up(batch=2, most=5) <= 5
    assert turns.samples == {"a": []}


def test_unknown_focus_is_refused():
    with pytest.raises(ValueError, match="focus must be one of"):
        timing.RoundRobin({"a": lambda: None}, CPU, focus="b")


def test_slow_targets_get_fewer_rounds_but_enough_for_an_interval():
    calls = {"one": lambda: time.sleep(0.01), "two": int}
    turns = timing.RoundRobin(calls, CPU, focus="one")
    assert turns.settle(15, 0.01) == (timing.FEWEST_ROUNDS, 1)
    # fewer are not made more, and plenty of time changes nothing
    assert turns.settle(3, 0.01)[0] == 3
    assert turns.settle(15, 60.0)[0] == turns.settle(15)[0] == 15
    assert turns.settle(3)[1] <= 3
    assert not turns.samples["one"]
    assert timing.median_interval([0.0] * timing.FEWEST_ROUNDS)[2] > 0.95
    assert timing.median_interval([0.0] * (timing.FEWEST_ROUNDS - 1))[2] < 0.95
