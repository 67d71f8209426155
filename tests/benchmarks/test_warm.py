"""Processes that share a kernel's configurations compile all of them, and a failing one is told."""

import sys

import pytest
import torch

from benchmarks import warm
from tests import warm_python

autotuner = pytest.importorskip("triton.runtime.autotuner")


class Config(int):
    def all_kwargs(self):
        return {"size": int(self)}


class Kernel:
    """An autotuned kernel of ten configurations; the odd ones cannot be compiled."""

    arg_names, base_fn = ("x",), len

    def __init__(self, failing=()):
        self.seen, self.failing, self.fn = [], failing, self

    def prune_configs(self, kwargs):
        return [Config(i) for i in range(10)]

    def run(self, x, *, size, **kwargs):
        self.seen.append(size)
        if size in self.failing:
            raise RuntimeError("out of shared memory")
        return size


@pytest.fixture(autouse=True)
def _autotuner_as_it_was(monkeypatch):
    for name in ("run", "do_bench"):
        monkeypatch.setattr(autotuner.Autotuner, name, getattr(autotuner.Autotuner, name))


def run(kernel, share, shares):
    warm.take_share(share, shares)
    return autotuner.Autotuner.run(kernel, None)


@pytest.mark.parametrize("shares", [1, 3, 8, 16])
def test_shares_together_run_every_configuration(shares):
    seen = set()
    for share in range(shares):
        kernel = Kernel()
        assert run(kernel, share, shares) in kernel.seen
        assert len(kernel.seen) <= -(-10 // shares)
        seen |= set(kernel.seen)
    assert seen == set(range(10))


def test_a_share_of_failures_still_gives_a_result():
    kernel = Kernel(failing={1, 3, 5, 7, 9, 0})
    assert run(kernel, 1, 2) == 2
    assert kernel.seen == [1, 3, 5, 7, 9, 0, 1, 2]


def test_every_job_can_be_run():
    jobs = [job for listed in warm.JOBS.values() for job in listed()]
    assert len(set(jobs)) == len(jobs)
    assert {job.kind for job in jobs} == set(warm.RUN)
    for kind, arguments in {(job.kind, job.arguments) for job in jobs}:
        shares = [(j.share, j.shares) for j in jobs if (j.kind, j.arguments) == (kind, arguments)]
        assert sorted(shares) == [(i, len(shares)) for i in range(len(shares))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the job would succeed")
def test_a_job_that_fails_is_told_and_one_without_time_is_not_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_python.executable())
    jobs = [warm.Job("ddts", "0"), warm.Job("ddts", "1")]
    became = warm.run_all(jobs[:1], 1, 100.0)
    assert became[jobs[0]].endswith("failed: error: there is no GPU to compile for")
    became = warm.run_all(jobs, 1, 0.0)
    assert became[jobs[0]].endswith("late") and became[jobs[1]] == "not started"
