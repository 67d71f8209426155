"""Steps of a full engine beside those of its model alone."""

import statistics

import pytest
import torch

from benchmarks import bench_engine, harness, operators, peers, timing

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    names = peers.OURS
    return harness.Bench("tiny", CPU, torch.float32, names, folder=None, rounds=3, load=0.0)


@pytest.mark.parametrize("name", peers.OURS)
@pytest.mark.parametrize("mode", bench_engine.SAMPLING)
def test_a_step_is_the_model_and_what_is_beside_it(bench, name, mode):
    row = bench_engine.measure_steps(bench, name, 2, 16, mode)
    step, model = row["samples"]["step"], row["samples"]["model"]
    assert len(step) == len(model) == 3
    assert row["median_ms"] == statistics.median(step)
    assert row["model_ms"] == statistics.median(model)
    differences = [a - b for a, b in zip(step, model, strict=True)]
    assert row["beside_model_ms"] == statistics.median(differences)
    assert row["tokens_per_s"] == pytest.approx(2e3 / row["median_ms"])


def test_every_step_that_is_timed_gives_every_sequence_a_token(bench, monkeypatch):
    made, make = [], bench_engine.full_engine
    monkeypatch.setattr(bench_engine, "full_engine", lambda *x: made.append(make(*x)) or made[-1])
    bench_engine.measure_steps(bench, "rodimus-1.4b", 2, 16, "greedy")
    (engine,) = made
    # one prompt a step is read while the first sequence runs on
    ahead, behind = (len(generation.tokens) for generation in engine.running)
    assert ahead >= behind >= bench_engine.STEPS * 3
    assert engine.stats.generated_tokens == ahead + behind


def test_a_sequence_that_ends_is_no_full_engine(bench, monkeypatch):
    make = bench_engine.full_engine

    def short(*given):
        engine = make(*given)
        engine.cancel(engine.running[0])
        return engine

    monkeypatch.setattr(bench_engine, "full_engine", short)
    with pytest.raises((AssertionError, peers.Fault), match="ended while steps were timed"):
        bench_engine.measure_steps(bench, "rodimus-1.4b", 2, 16, "greedy")


def test_the_host_takes_what_no_kernel_does():
    """A step of 2 ms in which the model takes 1.25 and all kernels 1.5."""
    gpu = torch.device("cuda")
    turns = timing.RoundRobin({"step": int, "model": int}, gpu, "step")
    for name, wall, device in (("step", 16.0, 15.0), ("model", 12.0, 10.0)):
        turns.samples[name] = [timing.Sample(wall, wall, device)] * 3
    profile = {"kernels": [{"name": "k"}], "kernels_ms": 12.0, "idle_ms": 0.0}
    found = bench_engine.step_times(turns, 64, profile)
    assert (found["median_ms"], found["model_ms"]) == (2.0, 1.25)
    assert (found["beside_model_ms"], found["host_ms"]) == (0.75, 0.5)
    assert found["tokens_per_s"] == 32000
    # a profiler without access to the device's counters reports no launch
    assert "host_ms" not in bench_engine.step_times(turns, 64, operators.busy([], top=3))
