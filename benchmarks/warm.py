"""Compile what the GPU benchmarks time, in many processes, so that the timed run starts at once.

    python -m benchmarks.warm [--jobs 12] [--seconds 200] operators models

Triton and inductor keep compiled kernels on disk, so it does not matter which process made them.
Peers that try dozens of configurations of each kernel take minutes in one process: here several
processes share the configurations of the same call, and only the timed run compares them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from rodimus_kernels.testing import DdtsCase

from .peers import is_installed

TRIAL_MS = {"warmup": 5, "rep": 25}
"""Time to try one configuration for: Triton's 125 ms would add a minute to the run."""

DEVICE = torch.device("cuda")


class Job(NamedTuple):
    """One process: the call that it runs, and its share of each kernel's configurations."""

    kind: str
    arguments: str
    share: int = 0
    shares: int = 1


# ----------------------------------------------------------------------------------------------
# Triton's autotuner
# ----------------------------------------------------------------------------------------------


def shorten_trials() -> None:
    """Choose among a kernel's configurations in less time, for the rest of the process."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    Autotuner.do_bench = property(
        lambda self: self._do_bench or functools.partial(do_bench, **TRIAL_MS)
    )


def take_share(share: int, shares: int) -> None:
    """Make every autotuned kernel run each ``shares``-th of its configurations once, untimed."""
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs)
        mine = configs[share::shares]
        result, has_run = None, False
        # a configuration that does not compile is never chosen, but the caller needs some result
        for place, config in enumerate([*mine, *configs]):
            if place >= len(mine) and has_run:
                break
            try:
                result = self.fn.run(*args, **kwargs, **config.all_kwargs())
                has_run = True
            except Exception as error:
                print(f"{self.base_fn.__name__} {config}: {type(error).__name__}", file=sys.stderr)
        self.nargs = None
        return result

    Autotuner.run = run


# ----------------------------------------------------------------------------------------------
# What is compiled
# ----------------------------------------------------------------------------------------------


def operator_jobs() -> Iterator[Job]:
    """Each point of the operators' benchmarks; fla's kernels in shares."""
    from . import bench_attention, bench_ddts, bench_fused

    # training first: it compiles most
    for index in sorted(
        range(len(bench_ddts.POINTS["cuda"])),
        key=lambda i: bench_ddts.POINTS["cuda"][i][0] != "training",
    ):
        what, _, length, width = bench_ddts.POINTS["cuda"][index]
        # the surroundings have the kernels of the fused operators
        if what != "surroundings":
            yield Job("ddts", str(index))
        # longer sequences have the same kernels, and training includes those of the forward pass
        if what == "training" and length == 4096:
            for share in range(8):
                yield Job("chunk_gla", str(index), share, 8)
    for index, (what, *_) in enumerate(bench_attention.POINTS["cuda"]):
        flash = is_installed("flash_attn") or is_installed("flash_attn.cute")
        others = ("flex", *(("flash",) if flash else ())) if what != "decode" else ()
        for impl in ("triton", *others):
            yield Job("attention", f"{index},{impl}")
    for index in range(len(bench_fused.POINTS["cuda"])):
        yield Job("fused", str(index))


def model_jobs() -> Iterator[Job]:
    """Every model with few layers: prefill, decode and a training step."""
    from . import peers

    # the slowest first
    shared = {"rwkv6": 6, "qwen3_next": 6}
    for entry in sorted(peers.CATALOGUE, key=lambda entry: entry.family not in shared):
        shares = shared.get(entry.family, 1)
        for share in range(shares):
            yield Job("model", entry.name, share, shares)


def run_ddts(index: int) -> None:
    """Ours at a point, as it is timed."""
    from rodimus_kernels import ddts

    from . import bench_ddts as bench

    what, case = _ddts_case(index)
    if what == "step":
        calls = bench.step_calls(case, DEVICE)[0].values()
    else:
        inputs = bench.make_inputs(case, DEVICE)
        narrow = dataclasses.replace(case, value_dim=64, batch=1, length=512)
        bench.check(narrow, "triton_chunk", inputs.v.device)
        calls = [bench.PASSES[what](inputs, functools.partial(ddts, impl="triton_chunk"))]
    for call in calls:
        call.function()


def run_chunk_gla(index: int) -> None:
    """fla's at a point, as it is timed."""
    from . import bench_ddts as bench

    what, case = _ddts_case(index)
    bench.PASSES[what](bench.make_inputs(case, DEVICE), bench.fla_forward).function()


def _ddts_case(index: int) -> tuple[str, DdtsCase]:
    from . import bench_ddts as bench

    what, batch, length, width = bench.POINTS["cuda"][index]
    sizes = batch, length, 1, bench.KEY_DIM, width
    return what, DdtsCase(*sizes, states=False, dtype=torch.bfloat16)


def run_attention(index: int, impl: str) -> None:
    """One implementation at a point, with the key expanded and copied; decoding as it is timed."""
    from rodimus_kernels import shared_key_attention

    from . import bench_attention as bench

    what, batch, length, dim, window = bench.POINTS["cuda"][index]
    dtype = torch.bfloat16
    if what == "decode":
        calls = bench.decode_calls(batch, length, dim, window, impl, DEVICE, dtype)
        for call in calls.values():
            call.function()
        return
    tensors = bench.make_inputs(batch, length, dim, DEVICE, dtype)
    attend = functools.partial(shared_key_attention, window_size=window, impl=impl)
    bench.sequence_call(what, attend, tensors).function()
    if impl != "triton":
        bench.sequence_call(what, bench.repeated(attend), tensors).function()


def run_fused(index: int) -> None:
    """Ours and the peers at a point, as they are timed."""
    from . import bench_fused as bench

    what, name, batch, length = bench.POINTS["cuda"][index]
    operator = bench.make(name, bench.Shape.of("full", batch, length), DEVICE, torch.bfloat16)
    functions = {"triton": operator.ours("triton"), **bench.peers_of(operator, DEVICE)}
    do = tuple(map(torch.randn_like, bench.results(functions["triton"], operator)))
    for function in functions.values():
        bench.pass_of(what, function, operator, do)()


def run_model(name: str) -> None:
    """Prefill, decode and a step of training of a model that has every kind of layer once."""
    from . import bench_decode, bench_train, peers, sizes
    from .harness import Bench

    family = peers.entry(name).family
    layers = {"rodimus": "n_layer", "rodimus_plus": "n_layer"}.get(family, "num_hidden_layers")
    # three layers of Qwen3-Next have a state, the fourth has attention
    count = 4 if family == "qwen3_next" else 1
    sizes._FULL[family] = {**sizes._FULL[family], layers: count}
    if family == "qwen3_next":
        sizes._FULL[family]["mlp_only_layers"] = list(range(count))
    bench = Bench("full", DEVICE, torch.bfloat16, (name,), None, rounds=1, load=0.0)
    model = bench.model(name)
    with torch.inference_mode():
        for engine in dict.fromkeys((model.engines[0], model.engines[-1])):
            # no check: the results of a share's configurations do not matter
            bench.checked[f"{name}/{engine}"] = 0.0
            bench_decode.prepare(bench, model, engine, 1, 1024).call()
        session = model.session(model.engines[0], 1, 2049)
        session.prefill(peers.random_tokens(1, 2048, model))
    if family in ("rodimus", "rodimus_plus", "rwkv6", "qwen2", "qwen3_next"):
        batch, length = bench_train.POINTS["cuda"][0]
        # peers without a chunked loss hold all logits, and several processes do this at once
        length = length if name in peers.OURS else 1024
        bench_train.prepare(bench, model, model.engines[0], batch, length).call()


RUN: dict[str, Callable[..., None]] = {
    "ddts": lambda index: run_ddts(int(index)),
    "chunk_gla": lambda index: run_chunk_gla(int(index)),
    "attention": lambda pair: run_attention(int(pair.split(",")[0]), pair.split(",")[1]),
    "fused": lambda index: run_fused(int(index)),
    "model": run_model,
}
JOBS = {"operators": operator_jobs, "models": model_jobs}


# ----------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------


def run_all(jobs: list[Job], count: int, seconds: float) -> dict[Job, str]:
    """Run jobs, ``count`` at a time, and stop after ``seconds``; what became of each job."""
    deadline, became = time.monotonic() + seconds, {}
    waiting, running = list(jobs), {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    while waiting or running:
        while waiting and len(running) < count:
            job = waiting.pop(0)
            command = [sys.executable, "-m", __spec__.name, "--one", *map(str, job)]
            said = tempfile.TemporaryFile("w+")
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
            running[job] = process, said, time.monotonic()
        for job, (process, said, begun) in list(running.items()):
            late = time.monotonic() > deadline
            if process.poll() is None and not late:
                continue
            if process.poll() is None:
                process.kill()
            process.wait()
            said.seek(0)
            last = (said.read().strip().splitlines() or [""])[-1]
            said.close()
            word = "late" if late else "done" if process.returncode == 0 else f"failed: {last}"
            became[job] = f"{time.monotonic() - begun:.0f} s, {word}"
            del running[job]
        if time.monotonic() > deadline:
            became |= dict.fromkeys(waiting, "not started")
            waiting = []
        time.sleep(0.1)
    return became


def main(arguments: list[str] | None = None) -> int:
    """Run the jobs; a failed one is listed but is no error: the timed run will say why."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", help=f"which of {', '.join(JOBS)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seconds", type=float, default=200.0, help="wait no longer")
    parser.add_argument("--one", nargs=4, metavar=("KIND", "ARGUMENTS", "SHARE", "SHARES"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: there is no GPU to compile for", file=sys.stderr)
        return 2
    if options.one:
        kind, given, share, shares = options.one
        if int(shares) > 1:
            take_share(int(share), int(shares))
        RUN[kind](given)
        torch.cuda.synchronize()
        return 0
    jobs = [job for group in options.groups for job in JOBS[group]()]
    begun = time.monotonic()
    for job, what in run_all(jobs, options.jobs, options.seconds).items():
        print(f"  {job.kind} {job.arguments} {job.share + 1}/{job.shares}: {what}", flush=True)
    print(f"{len(jobs)} jobs in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
