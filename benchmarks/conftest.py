"""Options and fixtures of every benchmark, for pytest.

    pytest benchmarks --bench-scale full --bench-seconds 540

Without a GPU the default is the tiny scale: everything runs in seconds, no number means anything,
and records are written only where ``--bench-out`` says. At full scale they go to
``benchmarks/results/<machine>/`` unless ``--bench-out`` says otherwise. A case that has a record of
this commit in either place, with every model asked for, is not measured again, so a run can be
continued.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from . import machine, peers, warm
from .harness import DTYPES, Bench
from .sizes import SCALES

# most important first, in case the seconds do not suffice for all
OPERATORS = ("ddts", "attention", "blocks", "fused")
MODULES = (*OPERATORS, "decode", "train", "prefill", "memory", "engine", "demo", "serve", "long")
GPU_CASE_SECONDS = 20.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """The run's settings."""
    group = parser.getgroup("rodimus benchmarks")
    add = group.addoption
    add("--bench-scale", choices=SCALES, help="tiny models, or those of 1.5B (default on a GPU)")
    add("--bench-out", type=Path, help="folder for the records")
    add("--bench-dtype", choices=sorted(DTYPES), default="bf16", help="of every model")
    add(
        "--bench-weights",
        choices=["int8", "int4"],
        help="round linear layers: ours as --weight-dtype does, peers to Q8_0 or Q4_0 in"
        " llama.cpp; decoding on a CPU only",
    )
    add("--bench-models", default="", help="comma-separated names; all of the catalogue if empty")
    add("--bench-rounds", type=int, default=0, help="timed rounds a case; 0: 3 tiny, 15 full")
    seconds = float(os.environ.get("RODIMUS_BENCH_SECONDS") or 0)
    add("--bench-seconds", type=float, default=seconds, help="start no case after this time")
    add(
        "--bench-case-seconds",
        type=float,
        default=0.0,
        help="fewer rounds where a case would be timed for longer; 0: 20 on a GPU, else no limit",
    )
    add("--bench-threads", type=int, default=0, help="of torch; 0: one tiny, every core full")
    add(
        "--bench-sittings",
        type=int,
        default=1,
        help="time a case in so many runs of the same command, and say how far they lie apart",
    )
    add("--bench-cold", action="store_true", help="empty the cache before each call of an operator")
    add("--bench-again", action="store_true", help="measure cases that have a record, too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per point; a module's ``POINTS`` are its cases by scale, and by device at full."""
    if "point" not in metafunc.fixturenames:
        return
    scale = _scale(metafunc.config)
    kind = "tiny" if scale == "tiny" else machine.device().type
    points = metafunc.module.POINTS[kind]
    metafunc.parametrize("point", points, ids=["-".join(map(str, p)) for p in points])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the most important first; a module's ``LAST`` points run after all other modules."""

    def rank(item: pytest.Item) -> tuple[bool, int]:
        module, call = item.module, getattr(item, "callspec", None)
        point = call.params.get("point") if call else None
        name = module.__name__.rpartition("bench_")[2]
        place = MODULES.index(name) if name in MODULES else len(MODULES)
        return point in getattr(module, "LAST", ()), place

    items.sort(key=rank)


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest):
    """The run: models are loaded once and stay loaded, without gradients."""
    option = request.config.getoption
    load, device, scale = machine.load_now(), machine.device(), _scale(request.config)
    models = tuple(model for model in option("--bench-models").split(",") if model)
    for model in models:
        peers.entry(model)
    name = machine.folder_name(machine.describe(device)["name"])
    kept = machine.RESULTS / name if scale == "full" else None
    folder = option("--bench-out") or kept
    seconds = option("--bench-seconds")
    threads = torch.get_num_threads()
    every = os.cpu_count() or 1
    torch.set_num_threads(option("--bench-threads") or (1 if scale == "tiny" else every))
    if device.type == "cuda" and scale == "full":
        warm.shorten_trials()
    for message in machine.disturbances(load) if scale == "full" else ():
        warnings.warn(message, stacklevel=1)
    limit = GPU_CASE_SECONDS if device.type == "cuda" and scale == "full" else float("inf")
    yield Bench(
        scale=scale,
        device=device,
        dtype=DTYPES[option("--bench-dtype")],
        names=models or tuple(entry.name for entry in peers.CATALOGUE),
        folder=folder,
        rounds=option("--bench-rounds") or (3 if scale == "tiny" else 15),
        load=load,
        kept=kept,
        deadline=time.monotonic() + seconds if seconds else float("inf"),
        case_seconds=option("--bench-case-seconds") or limit,
        again=option("--bench-again"),
        sittings=option("--bench-sittings"),
        weight_dtype=option("--bench-weights"),
        cold=option("--bench-cold"),
    )
    torch.set_num_threads(threads)


@pytest.fixture
def start(bench: Bench, request: pytest.FixtureRequest):
    """A function to call with group, case and models before a case is measured: it skips the case
    if that is already recorded or the run's time is spent.

    At full scale the seconds of each case are printed when it is done.
    """
    begun: list[tuple[str, float]] = []

    def ask(group: str, case: str, names: Iterable[str] = ()) -> None:
        if bench.weight_dtype and (group, bench.device.type) != ("decode", "cpu"):
            pytest.skip("quantised weights are timed in decoding on a CPU alone")
        if bench.cold and group.partition("-")[0] not in OPERATORS:
            pytest.skip("the cache is emptied before operators alone")
        if bench.done(group, case, names):
            pytest.skip(f"{group} {case}: recorded for this commit")
        if bench.out_of_time():
            pytest.skip(f"{group} {case}: the run's seconds are spent; run again to continue")
        begun.append((f"{group} {case}", time.monotonic()))

    yield ask
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    for name, before in begun if terminal and bench.scale == "full" else ():
        terminal.write_line(f" {name}: {time.monotonic() - before:.1f} s")


def _scale(config: pytest.Config) -> str:
    return config.getoption("--bench-scale") or ("full" if torch.cuda.is_available() else "tiny")


@pytest.fixture(autouse=True)
def _no_kept_memory():
    """A point's tensors are gigabytes; the next one starts without them."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
