"""Operators are timed in turn, and what cannot run costs no row but its own."""

import pytest
import torch

from benchmarks import harness, operators, peers
from tests.benchmarks.test_suite import Fixture


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
    monkeypatch.setattr(operators, "captured", lambda function, device: function() or function)
    cpu = torch.device("cpu")
    bench = harness.Bench("tiny", cpu, torch.float32, (), None, rounds=2, load=0.0)
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
