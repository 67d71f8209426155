"""Two commits of this project, timed in turn: ratios with intervals instead of two lonely times.

    python -m benchmarks.compare HEAD~5 --group decode --context 1024
    python -m benchmarks.compare main . --scale tiny

Each commit runs in its own process from an exported tree; ``.`` is the working tree as it is. The
benchmarks themselves are always those of this checkout. The processes take turns round by round, so
a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import machine, peers, records, timing
from .harness import DISAGREEMENT_LIMITS, DTYPES
from .sizes import SCALES

GROUPS = ("decode", "prefill")
CLOCKS = ("wall_ms", "cpu_ms")


class Worker:
    """A process that holds one model of one tree and times a call whenever it is told to."""

    def __init__(self, tree: Path, options: argparse.Namespace):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (tree / "kernels", machine.ROOT))),
        }
        arguments = [f"--{name}={getattr(options, name)}" for name in _SHARED]
        # the folder it runs in comes first on its path: that is where `rodimus` is found
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compare", "--worker", *arguments],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.samples: list[timing.Sample] = []

    def answer(self) -> Any:
        """The next line of the process that is JSON.

        Raises:
            RuntimeError: the process ended instead.
        """
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the process of a commit ended with status {self.process.wait()}")

    def time(self) -> timing.Sample:
        """One call."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return timing.Sample(**self.answer())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


_SHARED = ("group", "model", "engine", "scale", "dtype", "batch", "context", "rounds", "threads")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("base", nargs="?", help="commit that is divided by; . is the working tree")
    add("head", nargs="?", default=".", help="commit of interest, by default the working tree")
    add("--group", choices=GROUPS, default="decode")
    add("--model", choices=peers.OURS, default=peers.OURS[0])
    add("--engine", default="dynamic", help="as in benchmarks/peers/huggingface.py")
    add("--scale", choices=SCALES, default="full")
    add("--dtype", choices=sorted(DTYPES), default="bf16")
    add("--batch", type=int, default=1)
    add("--context", type=int, default=1024)
    add("--rounds", type=int, default=15)
    add("--threads", type=int, default=1)
    add("--native", action="store_true", help="build csrc/ in exported trees first")
    add("--out", type=Path, help="folder for a record")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.worker and options.base is None:
        parser.error("name the commit to compare with, for instance HEAD~1")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    return options


def export(commit: str, folder: Path, native: bool) -> Path:
    """The tree of a commit; the checkout itself for ``.``.

    Raises:
        ValueError: there is no such commit.
    """
    if commit == ".":
        return machine.ROOT
    command = ["git", "-C", str(machine.ROOT), "archive", commit]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise ValueError(f"no commit {commit!r}: {done.stderr.decode().strip()}")
    tree = folder / "tree"
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(tree, filter="data")
    # the benchmarks that run are those of this checkout
    shutil.rmtree(tree / "benchmarks", ignore_errors=True)
    if native:
        build = tree / "kernels" / "rodimus_kernels" / "build.py"
        subprocess.run([sys.executable, str(build)], cwd=tree, check=True)
    return tree


def serve(options: argparse.Namespace) -> None:
    """The worker: build, warm up, then time one call for each line that arrives."""
    torch.set_num_threads(options.threads)
    device = machine.device()
    model = peers.load(options.model, options.scale, DTYPES[options.dtype], device)
    steps = 3 * options.rounds + 16
    with torch.inference_mode():
        session = model.session(options.engine, options.batch, options.context + steps)
        error = peers.disagreement(session, peers.random_tokens(options.batch, 20, model))
        if options.group == "decode":
            session.fill(options.context)
            call = session.step
        else:
            ids = peers.random_tokens(options.batch, options.context, model)
            call = lambda: session.prefill(ids)
        turns = timing.RoundRobin({"call": call}, device, focus="call")
        turns.warm_up(batch=3, most=options.rounds)
        import rodimus

        place = str(Path(rodimus.__file__).parent.parent)
        print(json.dumps({"disagreement": error, "place": place}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(turns.time("call")._asdict()), flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both commits in turn, as a record."""
    load, others = machine.load_now(), machine.Others()
    with tempfile.TemporaryDirectory() as scratch:
        workers: dict[str, Worker] = {}
        try:
            for label, commit in (("base", options.base), ("head", options.head)):
                tree = export(commit, Path(scratch, label), options.native)
                workers[label] = Worker(tree, options)
                told = workers[label].answer()
                place, error = told["place"], told["disagreement"]
                if Path(place).resolve() != tree.resolve():
                    raise RuntimeError(f"{label}: expected the package of {tree}, got {place}")
                if not error <= DISAGREEMENT_LIMITS[DTYPES[options.dtype]]:
                    raise RuntimeError(f"{label}: decoding differs from prefilling by {error:.1e}")
            for index in range(options.rounds):
                names = ("base", "head") if index % 2 else ("head", "base")
                for name in names:
                    workers[name].samples.append(workers[name].time())
        finally:
            for worker in workers.values():
                worker.close()
    rows = [_row(label, workers, options) for label in workers]
    settings = {name: getattr(options, name) for name in (*_SHARED, "base", "head", "native")}
    return records.make(
        "compare",
        f"{options.group}-b{options.batch}-t{options.context}-{options.dtype}",
        settings=settings,
        machine=machine.describe(machine.device()),
        rows=rows,
        load=(load, others.cores()),
        warnings=machine.disturbances(load, others.cores()),
    )


def _row(label: str, workers: dict[str, Worker], options: argparse.Namespace) -> dict[str, Any]:
    base, own = (
        {clock: [getattr(sample, clock) for sample in workers[name].samples] for clock in CLOCKS}
        for name in ("base", label)
    )
    wall = timing.summarize(own["wall_ms"])
    ratios = {clock: list(timing.ratio(base[clock], own[clock])) for clock in CLOCKS}
    return records.row(
        f"{label} {getattr(options, label)}",
        peers.entry(options.model).family,
        options.engine,
        samples=own,
        **wall.in_ms(),
        noisy=wall.noisy,
        faster_than_base=ratios["wall_ms"],
        faster_than_base_cpu=ratios["cpu_ms"],
    )


def main(arguments: list[str] | None = None) -> int:
    """Print both commits and the ratio of the second to the first."""
    options = parse(arguments)
    if options.worker:
        serve(options)
        return 0
    try:
        record = measure(options)
    except (ValueError, RuntimeError, peers.Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for warning in record["warnings"]:
        print(f"warning: {warning}")
    for row in record["rows"]:
        spread = f"{row['p20_ms']:.4g} .. {row['p80_ms']:.4g}"
        noisy = " noisy" if row["noisy"] else ""
        print(f"{row['target']:<40} {row['median_ms']:10.4g} ms  ({spread}){noisy}")
    head = record["rows"][1]
    for name, clock in (("faster_than_base", "wall"), ("faster_than_base_cpu", "CPU time")):
        median, low, high, coverage = head[name]
        print(f"head is {median:.3f}x as fast by {clock} ({low:.3f} .. {high:.3f}, {coverage:.0%})")
    if options.out:
        print(f"wrote {records.write(record, options.out).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
