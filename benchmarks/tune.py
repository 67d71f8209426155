"""Compare launch configurations of the Triton kernels on this GPU.

    python -m benchmarks.tune [KERNEL ...] [--jobs 12] [--out FOLDER] [--seconds 300]

The configurations are those of ``benchmarks/candidates.py``. For another kind of GPU, run this
there and put the winners into the launchers.

Each candidate has its own process, because one that faults takes its process with it. The processes
compile side by side, compare their results with the chosen configuration's on the same inputs, and
wait; then one after the other times both in turn. One record per kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree

from rodimus_kernels._triton import INTERPRETED
from rodimus_kernels.testing import relative_error

from . import machine, operators, records, timing
from .candidates import KERNELS, Case, chosen, setting

ROUNDS, CASE_SECONDS = 30, 2.0

# configurations may differ only in the order of their sums: bfloat16 has 8 bits
ERROR_LIMIT = 1e-2

COMMAND = (sys.executable, "-m", "benchmarks.tune")


# ----------------------------------------------------------------------------------------------
# One candidate, in a process of its own
# ----------------------------------------------------------------------------------------------


def target(name: str, index: int) -> tuple[str, str, str]:
    """Target, family and engine of a row."""
    engine = "x".join(map(str, KERNELS[name].values[index]))
    return f"{name}/{engine}", name, engine


def _tensors(result: Any) -> list[torch.Tensor]:
    leaves = _pytree.tree_leaves(result)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.numel()]


def candidate(name: str, index: int, case: Case) -> Iterator[dict[str, Any] | None]:
    """Compile, compare, and yield None when done; then wait for the ceilings and yield the row."""
    kernel, value, focus = KERNELS[name], KERNELS[name].values[index], target(name, index)[0]
    torch.manual_seed(0)
    launch = kernel.make(case)

    def call() -> Any:
        with setting(kernel, value):
            return launch.call()

    is_chosen = chosen(kernel, launch.call) == value
    results, expected = _tensors(call()), _tensors(launch.call())
    floor_bytes = sum(x.nbytes for x in (*launch.reads, *expected) if x is not None)
    error = max(map(relative_error, results, expected))
    if not error <= ERROR_LIMIT:
        raise ValueError(f"results differ from the chosen ones by {error:.1e}")
    calls = {focus: call} if is_chosen else {focus: call, "chosen/chosen": launch.call}
    graphs = {key: operators.captured(each, case.device) for key, each in calls.items()}
    del results, expected
    if case.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    yield None
    ceilings = json.loads(sys.stdin.readline())
    turns = timing.RoundRobin(graphs, case.device, focus=focus)
    for _ in range(turns.settle(ROUNDS, CASE_SECONDS)[0]):
        turns.round()
    work = {"floor_bytes": floor_bytes, "flops": launch.flops}
    floor_ms = operators.floor_ms(work, ceilings)
    more = {**work, "error": error, "chosen": is_chosen}
    row = operators.measured(focus, turns, floor_ms, **more)
    if not is_chosen:
        other = operators.measured("chosen/chosen", turns, floor_ms)["samples_ms"]
        ratio = timing.ratio(row["samples_ms"], other)
        row |= {"chosen_samples_ms": other, "ratio": ratio._asdict()}
    yield row


def answer(name: str, index: int, case: Case) -> None:
    """Print what a candidate yields, a line each, or the row that says why it cannot run."""
    try:
        # output of a compiler must not be taken for an answer
        with contextlib.redirect_stdout(sys.stderr):
            for said in candidate(name, index, case):
                print(json.dumps(said), file=sys.__stdout__, flush=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        print(json.dumps(records.skipped(*target(name, index), reason)), flush=True)


# ----------------------------------------------------------------------------------------------
# All candidates
# ----------------------------------------------------------------------------------------------


def run_together(
    jobs: list[tuple[str, int]], case: Case, ceilings: dict[str, float], deadline: float
) -> list[dict[str, Any]]:
    """A row for each job; jobs compile side by side and are timed one after the other."""
    if time.monotonic() > deadline:
        return [records.skipped(*target(*job), "no time was left") for job in jobs]
    environment, running = {**os.environ, "OMP_NUM_THREADS": "1"}, []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    for name, index in jobs:
        command = (*COMMAND, "--one", name, str(index), "--batch", str(case.batch))
        command += ("--length", str(case.length))
        said = tempfile.TemporaryFile("w+")
        running.append((subprocess.Popen(command, env=environment, stderr=said, **pipes), said))
    kill = lambda: [process.kill() for process, _ in running]
    late = threading.Timer(max(deadline - time.monotonic(), 0.0), kill)
    late.start()
    rows = []
    first = [process.stdout.readline() for process, _ in running]
    for job, line, (process, said) in zip(jobs, first, running, strict=True):
        if line == "null\n":
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(ceilings) + "\n")
            line = process.stdout.readline()
        said.seek(0)
        last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
        reason = "no time was left" if time.monotonic() > deadline else f"the process ended: {last}"
        rows.append(
            json.loads(line) if line.endswith("\n") else records.skipped(*target(*job), reason)
        )
    late.cancel()
    kill()
    for process, said in running:
        process.communicate()
        said.close()
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The chosen configuration, then the others by time, then what could not run."""
    rows = [{"chosen": False, "median_ms": math.inf, **row} for row in rows]
    for row in sorted(rows, key=lambda row: (not row["chosen"], row["median_ms"])):
        if row["status"] == "skipped":
            yield f"  {row['target']:<36} {row['reason'][:100]}"
            continue
        ratio = "chosen"
        if not row["chosen"]:
            ratio = "{median:.3f} of the chosen [{low:.3f}, {high:.3f}]".format(**row["ratio"])
        yield (
            f"  {row['target']:<36} {1e3 * row['median_ms']:8.1f} us"
            f"  {100 * row['floor_share']:3.0f} % of the rate  error {row['error']:.0e}  {ratio}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Measure the candidates of the kernels; those that cannot run are listed with the reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(KERNELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", type=Path, help="folder for a record of each kernel")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop in time")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--one", nargs=2, metavar=("KERNEL", "INDEX"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    deadline, device = time.monotonic() + options.seconds, machine.device()
    if unknown := set(options.kernels) - set(KERNELS):
        parser.error(f"expected kernels of {', '.join(KERNELS)}, got {', '.join(unknown)}")
    if device.type == "cpu" and not INTERPRETED:
        print("error: there is no GPU to measure on", file=sys.stderr)
        return 2
    case = Case(options.batch, options.length, device)
    if options.one:
        with torch.no_grad():
            answer(options.one[0], int(options.one[1]), case)
        return 0
    names = options.kernels or list(KERNELS)
    load, others = machine.load_now(), machine.Others()
    ceilings = machine.ceilings(device, torch.bfloat16, quick=device.type == "cpu")
    about, found = machine.describe(device), {name: [] for name in names}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    waiting = [(name, index) for name in names for index in range(len(KERNELS[name].values))]
    while waiting:
        jobs, waiting = waiting[: options.jobs], waiting[options.jobs :]
        for row in run_together(jobs, case, ceilings, deadline):
            found[row["family"]].append(row)
        for name in {name: None for name, _ in jobs}:
            rows, kernel = found[name], KERNELS[name]
            if len(rows) < len(kernel.values):
                continue
            print(f"{name}: {', '.join(kernel.names)}", *table(rows), sep="\n", flush=True)
            settings = {"dtype": "bfloat16", "batch": case.batch, "context": case.length}
            record = records.make(
                "tune",
                name,
                settings={**settings, "rounds": ROUNDS, "names": kernel.names},
                machine=about,
                rows=rows,
                ceilings=ceilings,
                load=(load, others.cores()),
                warnings=machine.disturbances(load, others.cores()),
            )
            if options.out:
                records.write(record, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
