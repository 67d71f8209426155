"""Operators are timed in turn, and what cannot run costs no row but its own."""

import pytest
import torch

from benchmarks import harness, operators, peers, timing
from tests.benchmarks.test_suite import Fixture

CPU = torch.device("cpu")


def fails_at(run):
    """A function that raises from a certain run on."""
    runs = iter(range(1, 100))

    def function():
        if next(runs) >= run:
            raise RuntimeError("not while capturing")

    return function


@pytest.fixture
def measure(monkeypatch):
    """Rows by target and the rounds; a capture runs the function, as on a GPU."""
    monkeypatch.setattr(operators, "captured", lambda function, *_: function() or function)
    bench = harness.Bench("tiny", CPU, torch.float32, (), None, rounds=2, load=0.0)
    bench._ceilings = {"copy_GBps": 2.0}

    def run(**functions):
        calls = {f"{name}/x": operators.Call(f, floor_bytes=10**9) for name, f in functions.items()}
        rows, rounds = operators.measure(bench, Fixture(), calls)
        return {row["family"]: row for row in rows}, rounds

    return run


@pytest.mark.parametrize("run", [1, 2])
def test_a_peer_that_cannot_be_captured_does_not_cost_our_row(measure, run):
    rows, rounds = measure(ours=int, peer=fails_at(run), other=int)
    assert rounds["rounds"] == 2
    for name in ("ours", "other"):
        assert rows[name]["status"] == "measured" and rows[name]["floor_ms"] == 500.0
    assert rows["peer"]["reason"] == "RuntimeError: not while capturing"


@pytest.mark.parametrize("run", [1, 2])
def test_the_first_must_run(measure, run):
    with pytest.raises(peers.Unavailable, match="not while capturing"):
        measure(ours=fails_at(run), peer=int)


@pytest.mark.parametrize("cold", [False, True])
def test_the_cache_is_emptied_before_each_call_where_that_is_asked_for(monkeypatch, cold):
    called, captured = [], []
    flush = lambda: called.append("flush")
    monkeypatch.setattr(operators, "flushes", lambda device: flush)
    note = lambda function, device, runs: captured.append(runs) or function
    monkeypatch.setattr(operators, "captured", note)
    bench = harness.Bench("tiny", CPU, torch.float32, (), None, rounds=2, load=0.0, cold=cold)
    bench._ceilings = {"copy_GBps": 2.0, "gemm_TFLOPs": 1.0}
    calls = {f"{name}/x": operators.Call(lambda n=name: called.append(n), 1) for name in "ab"}
    operators.measure(bench, Fixture(), calls)
    # both run once before they are captured
    assert called[:2] == ["a", "b"]
    timed = called[2:]
    assert {*timed[::2]} == ({"flush"} if cold else {"b"}), "every call has one before it"
    assert timed.count("flush") == (timed.count("a") + timed.count("b")) * cold
    assert captured == [1 if cold else operators.RUNS_IN_A_GRAPH] * 2


def test_what_empties_a_cache_is_read_and_larger_than_it():
    flush = operators.flushes(CPU)
    assert flush.__self__.nbytes == operators.ROTATED_BYTES == 2**28 and flush() == 0.0


def test_the_sample_of_a_graph_of_one_run_is_its_time():
    gpu = torch.device("cuda")
    for flush, runs in ((None, operators.RUNS_IN_A_GRAPH), (int, 1)):
        turns = timing.RoundRobin({"a/x": int}, gpu, "a/x", flush=flush)
        turns.samples["a/x"] = [timing.Sample(9.0, 9.0, 10.0)] * 3
        row = operators.measured("a/x", turns, 1.0, calls=2, floor_bytes=10**6)
        assert row["median_ms"] == 10.0 / runs / 2 and row["floor_bytes"] == 10**6
