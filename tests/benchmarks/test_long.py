"""Training with long rows: what is tried, and what is timed."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_long, bench_train, harness, peers, sizes
from rodimus import RodimusConfig
from rodimus.train import parallel
from rodimus.train.plan import activation_bytes
from tests.benchmarks.test_suite import Fixture

GPU_BYTES = 139 * 2**30
NAME = "rodimus-plus-1.6b"


@pytest.fixture
def bench():
    cpu = torch.device("cpu")
    return harness.Bench("tiny", cpu, torch.float32, peers.OURS, None, rounds=2, load=0.0)


def rows_of(bench, monkeypatch):
    """The rows of the case with one long row."""
    kept, record = [], bench.record
    monkeypatch.setattr(bench, "record", lambda *args: kept.append(args[3]) or record(*args))
    point = bench_long.POINTS["tiny"][0]
    try:
        bench_long.test_long(bench, Fixture(), lambda *_: None, NAME, point)
    finally:
        (rows,) = kept
        kept.clear()
        kept.extend(rows)
    return kept


@pytest.mark.parametrize("scale", ["tiny", "cuda"])
def test_every_point_has_as_many_tokens(scale):
    tokens = {batch * length for batch, length in bench_long.POINTS[scale]}
    assert len(tokens) == 1
    assert scale == "tiny" or tokens == {65536} and bench_long.POINTS[scale][0] == (1, 65536)


@pytest.mark.parametrize("family", ["rodimus", "rodimus_plus"])
def test_a_long_row_fits_with_recomputation_alone(family):
    config = RodimusConfig(**sizes.config_of(family, "full"))
    # weights, gradients and two moments in float32, gathered weights in bfloat16; the head's
    # gradient and a chunk of logits
    rest = 1.61e9 * (4 * 4 + 2) + 126464 * 2048 * 4 + 2**30
    needed = {m: 65536 * config.n_layer * activation_bytes(config, m) for m in ("none", "full")}
    assert needed["none"] > GPU_BYTES > rest + needed["full"] + harness.MARGIN_BYTES


def test_what_fits_is_timed_alone(bench, monkeypatch):
    asked, apply = [], parallel.checkpoint_activations
    note = lambda model, mode: asked.append(mode) or apply(model, mode)
    monkeypatch.setattr(parallel, "checkpoint_activations", note)
    (row,) = rows_of(bench, monkeypatch)
    assert row["target"] == f"{NAME}/trainer-selective" and asked == ["selective"]
    assert row["status"] == "measured" and row["tokens_per_s"] > 0
    model = bench.model(NAME)
    assert row["flops"] == 3 * model.forward_flops(1, 128, logits=128)
    # weights, gradients and two moments in float32, gathered weights in bfloat16, activations
    parameters = model.model.num_parameters()
    assert 18 * parameters < row["planned_bytes"] < 18 * parameters + 2**26


def test_where_the_products_do_not_fit_all_is_computed_twice(bench, monkeypatch):
    steps = bench_train.in_trainer

    def scarce(bench, model, batch, length, recomputed):
        if recomputed == "selective":
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return steps(bench, model, batch, length, recomputed)

    monkeypatch.setattr(bench_train, "in_trainer", scarce)
    full, selective = sorted(rows_of(bench, monkeypatch), key=lambda row: row["target"])
    assert selective["reason"] == "OutOfMemoryError: tried to allocate 2 GiB"
    assert full["target"] == f"{NAME}/trainer-full" and full["status"] == "measured"


def test_a_step_that_fails_is_no_skipped_case(bench, monkeypatch):
    def fails(*_):
        raise KeyError("lost")

    monkeypatch.setattr(bench_train, "in_trainer", fails)
    with pytest.raises(peers.Fault, match="trainer-full: KeyError: 'lost'"):
        rows_of(bench, monkeypatch)


def test_the_trainer_finds_no_other_weights_in_memory(bench):
    bench.model("rodimus-1.4b"), bench.model(NAME)
    model = bench_long.without_weights(bench, NAME)
    assert not bench.models and isinstance(model.model, SimpleNamespace)
    whole = bench.model(NAME)
    assert model.model.config.to_dict() == whole.model.config.to_dict()
    assert model.forward_flops(1, 64, logits=64) == whole.forward_flops(1, 64, logits=64)
