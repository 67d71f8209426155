"""What the benchmarks of single operators share: graphs of several runs, and rows of a record."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from . import peers, records, timing
from .harness import Bench

RUNS_IN_A_GRAPH = 5
"""Runs in one graph, but a single one if the cache is emptied before each run."""

ROTATED_BYTES = 2**28
"""Bytes of the states that take turns, and of the read that empties a cache: several times the
size of a last-level cache."""

PEER_LIMIT_SECONDS = 90.0
"""A peer that takes longer to compile and choose among its kernels is skipped."""

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Limits of relative errors: bf16 rounds inputs, states and outputs to 8 bits; an fp32 product is
three tf32 ones."""


class Call(NamedTuple):
    """An operator to time.

    Attributes:
        function: Runs it.
        floor_bytes: Bytes that one run cannot avoid.
        runs: Runs of the operator in one call of the function.
        flops: Operations of the products that one run cannot avoid.
    """

    function: Callable[[], object]
    floor_bytes: int | None = None
    runs: int = 1
    flops: int | None = None

    @property
    def work(self) -> dict[str, int]:
        """Bytes and operations, whichever of the two are counted."""
        found = {"floor_bytes": self.floor_bytes, "flops": self.flops}
        return {name: count for name, count in found.items() if count is not None}


def floor_ms(work: Mapping[str, int], ceilings: Mapping[str, float]) -> float:
    """The longer of bytes over the measured copy rate and operations over that of a large GEMM."""
    bytes_ms = work.get("floor_bytes", 0) / ceilings["copy_GBps"] / 1e6
    return max(bytes_ms, work["flops"] / ceilings["gemm_TFLOPs"] / 1e9 if "flops" in work else 0.0)


def rotated(nbytes: int) -> int:
    """How many states or caches of ``nbytes`` take turns, so that no last-level cache holds one."""
    return max(1, min(ROTATED_BYTES // nbytes, 64))


def flushes(device: torch.device) -> Callable[[], object]:
    """A function that reads so much that a cache holds nothing else. It does not write, because the
    next call would have to write that back."""
    buffer = torch.zeros(ROTATED_BYTES // 4, device=device)
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        assert buffer.nbytes > 2 * cache, f"a cache of {cache} bytes is not emptied"
    return buffer.sum


def captured(
    function: Callable[[], object], device: torch.device, runs: int = RUNS_IN_A_GRAPH
) -> Callable[[], object]:
    """The function as a graph of several runs; on a CPU the function itself."""
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
        for _ in range(runs):
            function()
    return graph.replay


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most bytes a run allocates beyond what is allocated before it; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernels(call: Callable[[], object], top: int = 10) -> dict[str, Any]:
    """Where the device's time goes in one run.

    Returns:
        ``kernels``: those with the longest total time (name, launches, ms, share of all);
        ``kernels_ms``: the time of all kernels; ``idle_ms``: the time between the first and the
        last of them that no kernel covers.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = [
        (event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return busy(spans, top)


def busy(spans: list[tuple[str, float, float]], top: int) -> dict[str, Any]:
    """What :func:`kernels` returns, from ``(name, start, end)`` of each launch in ms."""
    times: dict[str, list[float]] = {}
    # a profiler without access to the device's counters reports no launch
    idle, reached = 0.0, min((start for _, start, _ in spans), default=0.0)
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        times.setdefault(name, []).append(end - start)
        idle += max(start - reached, 0.0)
        reached = max(reached, end)
    total = sum(map(sum, times.values()))
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:top]
    rows = [
        {"name": name, "launches": len(found), "ms": sum(found), "share": sum(found) / total}
        for name, found in longest
    ]
    return {"kernels": rows, "kernels_ms": total, "idle_ms": idle}


def measure(
    bench: Bench, benchmark: Any, calls: Mapping[str, Call | str]
) -> tuple[list[dict], dict[str, int]]:
    """Time what :func:`captured` returns in turn; a row for each call, and the rounds that were
    run.

    Args:
        bench: The run.
        benchmark: The fixture of pytest-benchmark.
        calls: Calls by target, or the reason why a target cannot run. The first is the focus and
            must run; others that fail, in a first run or while they are captured, are skipped.
    """
    graphs, peaks, rows = {}, {}, []
    flush = flushes(bench.device) if bench.cold else None
    runs = 1 if bench.cold else RUNS_IN_A_GRAPH
    for name, call in calls.items():
        try:
            if isinstance(call, str):
                raise peers.Unavailable(call)
            peers.guarded(call.function, PEER_LIMIT_SECONDS if graphs else None)
            peaks[name] = peers.guarded(lambda f=call.function: peak_bytes(f, bench.device))
            graphs[name] = peers.guarded(lambda f=call.function: captured(f, bench.device, runs))
        except peers.Unavailable as reason:
            if not graphs:
                raise
            rows.append(records.skipped(name, *name.split("/"), str(reason)))
    turns = timing.RoundRobin(graphs, bench.device, focus=next(iter(graphs)), flush=flush)
    rounds, warm_up = turns.settle(bench.rounds, bench.case_seconds)
    benchmark.pedantic(turns.time_focus, setup=turns.time_others, rounds=rounds)
    for name in graphs:
        work, facts = calls[name].work, {"calls": calls[name].runs, "peak_bytes": peaks[name]}
        rows.append(measured(name, turns, floor_ms(work, bench.ceilings), **facts, **work))
    return rows, {"rounds": rounds, "warm_up_rounds": warm_up}


def measured(
    name: str, turns: timing.RoundRobin, floor_ms: float, *, calls: int = 1, **more: Any
) -> dict:
    """One target of the record: times of a single run, and the floor's share of them.

    Args:
        name: ``family/engine``.
        turns: Has timed what :func:`captured` returned.
        floor_ms: Floor of a single run.
        calls: Calls of the operator by the function that was captured.
        more: Fields to add; :mod:`benchmarks.work` computes rates from ``floor_bytes``, ``flops``.
    """
    on_gpu = turns.device.type == "cuda"
    clock = "device_ms" if on_gpu else "wall_ms"
    runs = calls * (RUNS_IN_A_GRAPH if on_gpu and turns.flush is None else 1)
    samples = [sample / runs for sample in turns.column(name, clock)]
    summary = timing.summarize(samples)
    return records.row(
        *(name, *name.split("/")),
        clock=clock,
        **summary.in_ms(),
        samples_ms=samples,
        floor_ms=floor_ms,
        floor_share=floor_ms / summary.median,
        **more,
    )
