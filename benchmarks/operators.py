"""What the benchmarks of single operators share: graphs of several runs, and rows of a record."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import records, timing

RUNS_IN_A_GRAPH = 5


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
