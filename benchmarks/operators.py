"""What the benchmarks of single operators share: graphs of several runs, and rows of a record."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import records, timing

RUNS_IN_A_GRAPH = 5

PEER_LIMIT_SECONDS = 90.0
"""A peer that takes longer to compile and choose among its kernels is skipped."""


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The function as a graph of several runs; on a CPU as it is."""
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RUNS_IN_A_GRAPH):
            function()
    return graph.replay


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes a run allocates beyond what is there before; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernels(call: Callable[[], object], top: int = 10) -> list[dict[str, Any]]:
    """The kernels of one run that take longest together: name, launches, ms, share of all."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    total = sum(map(sum, times.values()))
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:top]
    return [
        {"name": name, "launches": len(found), "ms": sum(found), "share": sum(found) / total}
        for name, found in longest
    ]


def measured(
    name: str, turns: timing.RoundRobin, floor_ms: float, *, calls: int = 1, **more: Any
) -> dict:
    """One target of the record: times of a single run, and the floor's share of them.

    Args:
        name: ``family/engine``.
        turns: has timed what :func:`captured` returned.
        floor_ms: of a single run.
        calls: of the operator by the function that was captured.
        more: fields to add.
    """
    on_gpu = turns.device.type == "cuda"
    clock = "device_ms" if on_gpu else "wall_ms"
    runs = calls * (RUNS_IN_A_GRAPH if on_gpu else 1)
    samples = [sample / runs for sample in turns.column(name, clock)]
    summary = timing.summarize(samples)
    family, engine = name.split("/")
    return {
        "target": name,
        "family": family,
        "engine": engine,
        "status": "measured",
        "clock": clock,
        "median_ms": summary.median,
        "p20_ms": summary.p20,
        "p80_ms": summary.p80,
        "samples_ms": samples,
        "floor_ms": floor_ms,
        "floor_share": floor_ms / summary.median,
        **more,
    }


def skipped(calls: Mapping[str, Any]) -> list[dict]:
    """Rows of the calls that are the reason why they could not be made."""
    return [
        records.skipped(name, *name.split("/"), reason)
        for name, reason in calls.items()
        if isinstance(reason, str)
    ]
