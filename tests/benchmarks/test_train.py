"""How a training step is launched, and where the device's time goes."""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks import bench_train, harness, operators, peers
from rodimus import RodimusConfig, RodimusForCausalLM
from tests.model.helpers import config_of


def test_time_that_no_kernel_covers_is_idle():
    # b overlaps a on another stream, then 3 ms of nothing
    spans = [("a", 10.0, 14.0), ("b", 12.0, 13.0), ("a", 17.0, 18.0)]
    found = operators.busy(spans, top=1)
    assert found["kernels_ms"] == 6.0 and found["idle_ms"] == 3.0
    assert found["kernels"] == [{"name": "a", "launches": 2, "ms": 5.0, "share": 5 / 6}]


def test_no_launch_was_reported():
    assert operators.busy([], top=3) == {"kernels": [], "kernels_ms": 0, "idle_ms": 0.0}


@pytest.fixture
def recorder(monkeypatch):
    """CUDA's side of a recording, which runs the step instead."""
    for name in ("Stream", "CUDAGraph", "current_stream", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())


def test_a_recorded_step_keeps_what_it_reads(recorder):
    tokens = torch.zeros(3)
    alive = weakref.ref(tokens)
    run = bench_train.recorded(lambda tokens=tokens: tokens.sum(), nn.Linear(1, 1))
    del tokens
    gc.collect()
    run()
    assert alive() is not None


def test_a_step_that_cannot_be_recorded_leaves_no_gradients(recorder):
    network, calls = nn.Linear(1, 1), []

    def step():
        calls.append(1)
        network(torch.ones(1)).backward()
        if len(calls) == 4:
            raise RuntimeError("not while recording")

    with pytest.raises(RuntimeError, match="not while recording"):
        bench_train.recorded(step, network)
    assert network.weight.grad is None
    torch.cuda.set_stream.assert_called_once_with(torch.cuda.current_stream())


def test_a_step_alone_leaves_no_other_model_in_memory():
    cpu, names = torch.device("cpu"), ("qwen2-1.5b", "rodimus-1.4b")
    bench = harness.Bench("tiny", cpu, torch.float32, names, None, rounds=1, load=0.0)
    other = weakref.ref(bench.model("qwen2-1.5b"))
    kept = bench.model("rodimus-1.4b")
    alone = bench_train.alone(bench, "rodimus-1.4b")
    gc.collect()
    assert alone.names == ("rodimus-1.4b",) and other() is None
    assert bench.models == {"rodimus-1.4b": kept}


def test_a_gpu_of_80_gb_trains_on_half_the_tokens():
    assert bench_train.points(140 * 10**9) == [(4, 4096), (1, 16384), (8, 2048), (2, 8192)]
    assert bench_train.points(80 * 10**9) == [(2, 4096), (1, 8192), (4, 2048)]


@pytest.mark.parametrize("engine", bench_train.LAUNCHES)
def test_a_launch_that_a_model_cannot_do_is_a_reason_of_ours_too(recorder, engine):
    def refuses():
        raise RuntimeError("not while recording")

    network = nn.Linear(1, 1)
    network._no_split_modules = ["Linear"]
    with pytest.raises(peers.Unavailable, match="not while recording") as found:
        bench_train.launched(engine, refuses, network)
    assert not isinstance(found.value, peers.Fault)
    assert bench_train.launched("dynamic", refuses, network) is refuses


def test_a_recorded_qwen2_attends_without_a_dense_mask(monkeypatch):
    masks, attend = [], nn.functional.scaled_dot_product_attention
    note = lambda *args, attn_mask=None, **named: masks.append(attn_mask) or attend(*args, **named)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    cpu = torch.device("cpu")
    model = peers.load("qwen2-1.5b", "tiny", torch.float32, cpu)
    bench = SimpleNamespace(device=cpu)
    bench_train.prepare(bench, model, "dynamic", 2, 16).call()
    assert masks and not any(mask is not None for mask in masks)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks_train_alike_and_are_put_back():
    ids, weights = torch.arange(24).reshape(2, 12), []
    for launch in (lambda step, network: step, bench_train.compiled):
        torch.manual_seed(0)
        network = RodimusForCausalLM(RodimusConfig.from_dict(config_of("rodimus_plus"))).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

        def step(network=network, optimizer=optimizer):
            network(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        run = launch(step, network, *(["eager"] if launch is bench_train.compiled else []))
        calls = torch._dynamo.utils.counters["frames"]["ok"]
        run()
        assert (torch._dynamo.utils.counters["frames"]["ok"] > calls) == (run is not step)
        assert not any(block._compiled_call_impl for block in network.model.layers)
        weights.append([p.detach() for p in network.parameters()])
    for expected, got in zip(*weights, strict=True):
        torch.testing.assert_close(got, expected)
