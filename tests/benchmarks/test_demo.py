"""The demo model in the engine beside its modules."""

import pytest
import torch

from benchmarks import bench_demo, harness, work
from rodimus.modeling_rodimus import RodimusBlock
from tests.benchmarks.test_suite import Fixture

PROMPT = torch.arange(16)[None]


def test_a_record_holds_both_ways(monkeypatch):
    bench = harness.Bench("tiny", torch.device("cpu"), torch.bfloat16, (), None, rounds=2, load=0.0)
    kept, record = [], bench.record
    monkeypatch.setattr(bench, "record", lambda *args: kept.append(record(*args)) or kept[-1])
    bench_demo.test_demo(bench, Fixture(), lambda *_: None, (1, 16))
    (found,) = kept
    assert [row["target"] for row in found["rows"]] == ["demo/engine", "demo/modules"]
    assert found["settings"]["dtype"] == "float32"
    for row in found["rows"]:
        assert row["clock"] == "wall_ms" and len(row["samples_ms"]) == 2
        assert work.rates(found, row) == {}


def test_the_modules_run_where_the_engine_calls_all_blocks_at_once(monkeypatch):
    calls = bench_demo.calls_of(PROMPT, room=1000)
    ran, forward = [], RodimusBlock.forward
    monkeypatch.setattr(RodimusBlock, "forward", lambda *a, **k: ran.append(1) or forward(*a, **k))
    calls["demo/engine"].function()
    assert not ran
    calls["demo/modules"].function()
    assert len(ran) == 2 * bench_demo.STEPS


def test_ways_that_find_different_tokens_are_not_timed(monkeypatch):
    step = bench_demo.Modules.step

    def wrong(self):
        step(self)
        self.token = (self.token + 1) % 4096

    monkeypatch.setattr(bench_demo.Modules, "step", wrong)
    with pytest.raises(AssertionError, match="different tokens"):
        bench_demo.calls_of(PROMPT, room=1000)
