"""Candidates are what the launchers read and change what they launch; a failing one is told."""

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import candidates, records, tune
from rodimus_kernels._triton import INTERPRETED, assume_capability
from tests import warm_python

CASE = candidates.Case(1, 1024, torch.device("cpu"))

WORKER = """
import os
from benchmarks import tune
kernel = tune.KERNELS["swiglu"]
kernel.values = [(kernel.module._CHANNELS,), (512,), (3,), (5,)]
make = kernel.make
def fatal(case):
    launch = make(case)
    def call():
        if kernel.module._CHANNELS == 5:
            os.write(2, b"an illegal access\\n")
            os._exit(1)
        return launch.call()
    return launch._replace(call=call)
kernel.make = fatal
tune.main()
"""


@pytest.fixture
def launches(monkeypatch):
    """What each launch passes apart from tensors; nothing runs."""
    if not INTERPRETED:
        pytest.skip("the launch of a GPU is not replaced")
    from triton.runtime.interpreter import InterpretedFunction

    seen = []

    def run(self, *args, grid, warmup, **options):
        seen.append((self.fn.__name__, grid, *sorted(options.items())))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    # keeps memory small, and exceeds every tile
    monkeypatch.setattr(candidates, "VOCABULARY", 20000)
    return seen


@pytest.mark.parametrize("name", candidates.KERNELS)
def test_the_chosen_values_are_listed_and_each_value_changes_the_launch(name, launches):
    kernel = candidates.KERNELS[name]
    assert len(set(kernel.values)) == len(kernel.values)
    # the copy engine is what Hopper has and Ampere has not
    for capability in (80, 90):
        with assume_capability(capability), torch.no_grad():
            launch = kernel.make(CASE)
            assert candidates.chosen(kernel, launch.call) in kernel.values
            launches.clear()
            launch.call()
            as_it_stands, found = list(launches), {}
            for value in kernel.values:
                launches.clear()
                with candidates.setting(kernel, value):
                    assert candidates.chosen(kernel, launch.call) == value
                    launches.clear()
                    launch.call()
                found[value] = str(launches)
            assert len(set(found.values())) == len(kernel.values)
            assert found[candidates.chosen(kernel, launch.call)] == str(as_it_stands)


def test_a_candidate_that_fails_is_skipped_with_its_reason(monkeypatch, tmp_path, capsys):
    if not INTERPRETED:
        pytest.skip("the sizes are those of the interpreter")
    values = [(candidates.triton_swiglu._CHANNELS,), (512,), (3,), (5,)]
    monkeypatch.setattr(tune.KERNELS["swiglu"], "values", values)
    monkeypatch.setattr(tune, "COMMAND", (warm_python.executable(), "-c", WORKER))
    size = ["--batch", "1", "--length", "2"]
    assert tune.main(["swiglu", *size, "--jobs", "4", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "tune-swiglu.json").read_text())
    records.check(record)
    chosen, other, wrong, fatal = record["rows"]
    assert chosen["chosen"] and "ratio" not in chosen
    assert not other["chosen"] and other["error"] == 0.0 and other["ratio"]["median"] > 0
    assert len(other["samples_ms"]) == len(other["chosen_samples_ms"]) >= 6
    assert wrong["status"] == "skipped" and "power of 2" in wrong["reason"]
    assert fatal["status"] == "skipped" and fatal["reason"].endswith("an illegal access")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "swiglu: _CHANNELS" and "chosen" in printed[1] and len(printed) == 5


def test_without_time_no_candidate_is_measured(monkeypatch, tmp_path):
    if not INTERPRETED:
        pytest.skip("the sizes are those of the interpreter")
    size = ["--batch", "1", "--length", "2"]
    assert tune.main(["gate", *size, "--seconds", "0", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "tune-gate.json").read_text())["rows"]
    assert {row["reason"] for row in rows} == {"no time was left"}
    assert len(rows) == len(tune.KERNELS["gate"].values)


def test_an_unknown_kernel_is_an_error(capsys):
    with pytest.raises(SystemExit):
        tune.main(["gait"])
    assert "got gait" in capsys.readouterr().err
