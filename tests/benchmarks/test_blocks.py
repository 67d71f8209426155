"""The benchmark of whole blocks measures what runs here and says why the rest does not."""

import pytest
import torch

from benchmarks import bench_blocks, harness
from rodimus_kernels import native
from tests.benchmarks.test_suite import Fixture

CPU = torch.device("cpu")


@pytest.fixture
def refusing(monkeypatch):
    """A GPU too small for the persistent kernel."""
    step = bench_blocks.blocks_step

    def refused(*args, impl, **named):
        if impl == "persistent":
            raise RuntimeError("needs a GPU with more shared memory")
        return step(*args, impl=impl, **named)

    monkeypatch.setattr(bench_blocks, "blocks_step", refused)


def measure(monkeypatch, *impls):
    """The rows of a case."""
    monkeypatch.setattr(bench_blocks, "impls_of", lambda device: impls)
    bench = harness.Bench("tiny", CPU, torch.float32, (), None, rounds=2, load=0.0)
    kept = []
    monkeypatch.setattr(bench, "record", lambda *args: kept.extend(args[-1]))
    bench_blocks.test_blocks(bench, Fixture(), lambda *_: None, (1, 64))
    return {row["target"]: row for row in kept}


def test_a_kernel_that_does_not_fit_is_skipped_with_its_reason(monkeypatch, refusing):
    rows = measure(monkeypatch, "reference", "persistent")
    assert rows["blocks/reference"]["status"] == "measured"
    assert rows["blocks/persistent"]["reason"] == "needs a GPU with more shared memory"


def test_what_is_chosen_by_itself_is_not_skipped(monkeypatch, refusing):
    with pytest.raises(RuntimeError, match="more shared memory"):
        measure(monkeypatch, "persistent", "reference")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_without_native_operators_the_reference_is_timed(monkeypatch, kind):
    monkeypatch.setattr(native, "is_available", lambda _: False)
    assert bench_blocks.impls_of(torch.device(kind)) == ("reference",)
