"""How a training step is launched, and where the device's time goes."""

import pytest
import torch

from benchmarks import bench_train, operators
from rodimus import RodimusConfig, RodimusForCausalLM
from tests.model.helpers import config_of


def test_time_that_no_kernel_covers_is_idle():
    # b overlaps a on another stream, then 3 ms of nothing
    spans = [("a", 10.0, 14.0), ("b", 12.0, 13.0), ("a", 17.0, 18.0)]
    found = operators.busy(spans, top=1)
    assert found["kernels_ms"] == 6.0 and found["idle_ms"] == 3.0
    assert found["kernels"] == [{"name": "a", "launches": 2, "ms": 5.0, "share": 5 / 6}]


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
