"""The largest batch is one that was tried."""

import pytest
import torch

from benchmarks import bench_memory, harness, machine, peers

CPU = torch.device("cpu")


@pytest.fixture
def bench():
    return harness.Bench("tiny", CPU, torch.float32, peers.OURS, None, rounds=2, load=0.0)


@pytest.mark.parametrize(
    ("room", "found"),
    [
        (100, {"largest_batch": 100}),
        (96, {"batch_without_room": 97, "largest_batch": 94}),
        (50, {"batch_without_room": 60, "largest_batch": 50}),
    ],
)
def test_the_first_batch_with_room_is_the_largest(room, found):
    tried = []
    assert bench_memory.largest_batch(100, lambda n: tried.append(n) or n <= room) == found
    assert tried == sorted(set(tried), reverse=True)


def test_no_batch_is_tried_twice_and_none_is_a_reason():
    tried = []
    with pytest.raises(peers.Unavailable, match="no room for 1 sequences either"):
        bench_memory.largest_batch(1, lambda n: tried.append(n))
    assert tried == [1]


@pytest.mark.parametrize("name", peers.OURS)
def test_a_model_is_tried_from_the_batch_that_would_fill_the_memory(bench, monkeypatch, name):
    state = bench.model(name).expected_state(1, 48).total
    free = harness.MARGIN_BYTES + 10 * state + state // 2
    monkeypatch.setattr(machine, "memory_bytes", lambda _: free)
    tried, decodes = [], bench_memory.decodes
    note = lambda *given: tried.append(given[-1]) or (given[-1] < 10 and decodes(*given))
    monkeypatch.setattr(bench_memory, "decodes", note)
    row = bench_memory.measure_largest(bench, name, 48)
    assert tried == [10, 9] and row["batch_without_room"] == 10 and row["largest_batch"] == 9
    assert (row["state_bytes"], row["free_bytes"]) == (state, free)


def test_a_recording_that_fails_for_memory_has_no_room(bench, monkeypatch):
    model = bench.model("rodimus-1.4b")

    def records(*_):
        try:
            raise torch.OutOfMemoryError("20 MiB")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(model, "session", records)
    assert not bench_memory.decodes(bench, model, 48, 2)
    monkeypatch.setattr(model, "session", lambda *_: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        bench_memory.decodes(bench, model, 48, 2)


def test_another_error_is_no_lack_of_memory(bench, monkeypatch):
    model = bench.model("rodimus-1.4b")

    def fails(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(model, "session", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        bench_memory.decodes(bench, model, 48, 2)
