"""Two commits of this project, timed in turn: ratios with intervals instead of two separate times.

    python -m benchmarks.compare HEAD~5 --group decode --context 1024
    python -m benchmarks.compare main . --scale tiny
    python -m benchmarks.compare --records HEAD~5

Each commit runs in its own process from an exported tree, with native operators where this checkout
has them built; ``.`` is the working tree as it is. The benchmarks themselves are always those of
this checkout. The processes take turns round by round, so a busy machine slows both alike.

With ``--records`` nothing is timed: base and head are folders of records, or commits whose
committed records are read. Their rounds were not interleaved, so the interval of a ratio covers the
ratio of any two values in both medians' intervals.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

from rodimus_kernels import native

from . import machine, peers, records, targets, timing
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
        # the folder it runs in comes first on its path, so `rodimus` is imported from there
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
        """Time one call."""
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
    add(
        "--native",
        action=argparse.BooleanOptionalAction,
        help="build csrc/ in exported trees first; by default where this checkout's is built",
    )
    add("--out", type=Path, help="folder for a record")
    add("--records", action="store_true", help="compare records of two commits or folders")
    add("--fail", type=float, metavar="PERCENT", help="with --records: status 1 if slower by more")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.worker and options.base is None:
        parser.error("name the commit to compare with, for instance HEAD~1")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    return options


def extract(commit: str, tree: Path, *paths: str) -> Path:
    """Write the files of a commit, or those of some of its paths, into a new folder.

    Raises:
        ValueError: there is no such commit or path.
    """
    command = ["git", "-C", str(machine.ROOT), "archive", commit, *paths]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise ValueError(f"no commit {commit!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(tree, filter="data")
    return tree


def export(commit: str, folder: Path, build_native: bool) -> Path:
    """The tree of a commit; the checkout itself for ``.``.

    Raises:
        ValueError: there is no such commit.
    """
    if commit == ".":
        return machine.ROOT
    tree = extract(commit, folder / "tree")
    # the benchmarks that run are those of this checkout
    shutil.rmtree(tree / "benchmarks", ignore_errors=True)
    if build_native:
        build = tree / "kernels" / "rodimus_kernels" / "build.py"
        on_gpu = {} if machine.device().type == "cuda" else {"RODIMUS_BUILD_CUDA": "0"}
        subprocess.run(
            [sys.executable, str(build)], cwd=tree, env={**os.environ, **on_gpu}, check=True
        )
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

        about = {
            "disagreement": error,
            "place": str(Path(rodimus.__file__).parent.parent),
            "native": native.is_available(device.type),
        }
        print(json.dumps(about), flush=True)
        for _ in sys.stdin:
            print(json.dumps(turns.time("call")._asdict()), flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both commits in turn, as a record.

    Raises:
        ValueError: there is no such commit.
        RuntimeError: a commit's process ends, imports another tree, decodes wrongly, or is the only
            one with native operators, which would decide the ratio.
    """
    if options.native is None:
        options.native = native.is_available(machine.device().type)
    load, others = machine.load_now(), machine.Others()
    with tempfile.TemporaryDirectory() as scratch:
        workers: dict[str, Worker] = {}
        has_native: dict[str, bool] = {}
        try:
            for label, commit in (("base", options.base), ("head", options.head)):
                tree = export(commit, Path(scratch, label), options.native)
                workers[label] = Worker(tree, options)
                told = workers[label].answer()
                place, error = told["place"], told["disagreement"]
                has_native[label] = told["native"]
                if Path(place).resolve() != tree.resolve():
                    raise RuntimeError(f"{label}: expected the package of {tree}, got {place}")
                if not error <= DISAGREEMENT_LIMITS[DTYPES[options.dtype]]:
                    raise RuntimeError(f"{label}: decoding differs from prefilling by {error:.1e}")
            if has_native["base"] != has_native["head"]:
                (without,) = (label for label, has in has_native.items() if not has)
                raise RuntimeError(
                    f"expected native operators in both or in none, got none in {without}; --native"
                    " builds those of commits, `rodimus_kernels build` those of the checkout"
                )
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


# ----------------------------------------------------------------------------------------------
# Records of two commits or folders
# ----------------------------------------------------------------------------------------------

Key = tuple[str, str]


def read_set(name: str) -> dict[Key, dict[str, Any]]:
    """Records by machine and case.

    Args:
        name: A folder, ``.`` for that of this checkout, or a commit.

    Raises:
        ValueError: it is none of them, or has no records.
    """
    with tempfile.TemporaryDirectory() as scratch:
        place = machine.RESULTS if name == "." else Path(name)
        if not place.is_dir():
            try:
                place = extract(name, Path(scratch), "benchmarks/results")
            except ValueError as error:
                raise ValueError(
                    f"neither a folder nor a commit with records: {name!r} ({error})"
                ) from error
        found = records.read(place)
    if not found:
        raise ValueError(f"no records in {name!r}")
    return {(r["machine"]["name"], f"{r['group']}-{r['case']}"): r for r in found}


def ratio_of_medians(base: dict[str, Any], head: dict[str, Any], target: str) -> timing.Ratio:
    """How many times as fast head is; the interval covers any ratio of both medians' intervals."""
    before, after = (targets.interval(targets.times(r, target), (r,)) for r in (base, head))
    bounds = before.low / after.high, before.high / after.low
    return timing.Ratio(before.median / after.median, *bounds, before.coverage * after.coverage)


def compare_records(base: str, head: str, allowed: float | None) -> int:
    """Print the ratio of every target that both sets have timed, slower ones of a case first.

    Args:
        allowed: Percent by which head may be slower.

    Returns:
        1 if a target is slower by more than allowed, throughout its interval, else 0.
    """
    before, after = map(read_set, (base, head))
    alone: set[str] = set()
    same, status = 0, 0
    for key in sorted(before.keys() | after.keys()):
        pair = [found.get(key) for found in (before, after)]
        if pair[0] == pair[1]:
            same += 1
            continue
        timed = [_timed(record) if record else set() for record in pair]
        alone |= {f"{key[1]} {target}" for target in timed[0] ^ timed[1]}
        ratios = {t: ratio_of_medians(*pair, t) for t in sorted(timed[0] & timed[1])}
        if ratios:
            print(f"{key[0]}: {key[1]}, {_told(*pair)}")
        for target, ratio in sorted(ratios.items(), key=lambda item: item[1]):
            print(f"  {target:<34} {_line(ratio, *pair, target)}")
            if allowed is not None and _kind(ratio) == "slower":
                status |= ratio.high < 1 / (1 + allowed / 100)
    if alone:
        print(f"in one set only: {', '.join(sorted(alone))}")
    print(f"the same in both: {same} record{'s' * (same != 1)}")
    return int(status)


def _timed(record: dict[str, Any]) -> set[str]:
    return {
        row["target"]
        for row in records.measured(record)
        if "samples_ms" in row or "wall_ms" in row.get("samples", ())
    }


def _line(ratio: timing.Ratio, base: dict[str, Any], head: dict[str, Any], target: str) -> str:
    times = (f"{statistics.median(targets.times(r, target)):9.4g} ms" for r in (base, head))
    told = f"{ratio.median:.3f}x as fast ({ratio.low:.3f} .. {ratio.high:.3f}) {_kind(ratio)}"
    return "  ".join((*times, told))


def _kind(ratio: timing.Ratio) -> str:
    """``open`` if the interval encloses 1 or rests on few rounds."""
    if ratio.coverage < targets.ENOUGH_COVERAGE or ratio.low <= 1 <= ratio.high:
        return "open"
    return "slower" if ratio.high < 1 else "faster"


def _told(base: dict[str, Any], head: dict[str, Any]) -> str:
    """Commits, and the versions that differ."""
    commits = (record["machine"].get("commit", "unknown")[:12] for record in (base, head))
    told = ["commit " + ", then ".join(commits)]
    old, new = (record["machine"].get("versions", {}) for record in (base, head))
    told += [
        f"{name} {old.get(name)}, then {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    return "; ".join(told)


def main(arguments: list[str] | None = None) -> int:
    """Print both commits and the ratio of the second to the first."""
    options = parse(arguments)
    if options.worker:
        serve(options)
        return 0
    if options.records:
        try:
            return compare_records(options.base, options.head, options.fail)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
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
