"""Run the quality experiments: ``python -m benchmarks.quality mqar --size cpu``.

Every variant of a case gets the same data, steps, learning rates and seeds. Training runs that are
recorded for this commit and machine are not repeated, so a command that ends early is continued by
the same command. The size ``gpu`` is the protocol for one large GPU, ``tiny`` a short version of it
for tests, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import machine, records
from . import learn, protocols


def kept_runs(
    folders: Iterable[Path], case: str, about: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs by variant and learning rate that are recorded for this commit, machine and settings; of
    several records, those of the one with the most runs."""
    settings = json.loads(json.dumps(settings))
    found = [
        {row["target"]: row["sweep"] for row in record["rows"]}
        for folder in folders
        for record in (records.read(folder) if folder.is_dir() else ())
        if (record["group"], record["case"]) == ("quality", case)
        and record["settings"] == settings
        and machine.are_alike(record["machine"], about)
    ]
    count = lambda kept: sum(len(runs) for sweep in kept.values() for runs in sweep.values())
    return max(found, key=count, default={})


def run_case(
    case: protocols.Case,
    folder: Path,
    device: torch.device,
    deadline: float,
    earlier: Path | None = None,
) -> bool:
    """Train the runs of a case that are missing; False if there was no time for all.

    Args:
        folder: Where the record goes; runs that are in it are not trained again.
        deadline: Time of the monotonic clock; no run starts that would end later, judging by the
            longest run of its variant so far.
        earlier: Another folder whose records count as well.
    """
    about, load, others = machine.describe(device), machine.load_now(), machine.Others()
    settings = {
        "note": case.note,
        "score": case.task.score,
        "shape": case.shape._asdict(),
        "budget": case.budget._asdict(),
    }
    folders = [folder] if earlier in (None, folder) else [folder, earlier]
    kept = kept_runs(folders, case.name, about, settings)
    for variant in case.variants:
        sweep = kept.setdefault(variant, {})
        while left := case.budget.left(case.task, sweep):
            longest = max((run["seconds"] for runs in sweep.values() for run in runs), default=0)
            if time.monotonic() + longest > deadline:
                return False
            rate, seed = left[0]
            runs = sweep.setdefault(f"{rate:g}", [])
            runs.append(learn.run(variant, case.shape, case.task, case.budget, rate, seed, device))
            scores = ", ".join(f"{name} {score:.3f}" for name, score in runs[-1]["scores"].items())
            print(f"{case.name} {variant}, rate {rate:g}, seed {seed}: {scores}", flush=True)
            write(case, folder, about, settings, kept, (load, others.cores()))
    return True


def write(case: protocols.Case, folder: Path, about, settings, kept, load) -> None:
    """The record of all runs so far."""
    rows = [
        learn.row(name, case.shape, case.task, case.budget, runs) for name, runs in kept.items()
    ]
    records.write(
        records.make("quality", case.name, settings=settings, machine=about, rows=rows, load=load),
        folder,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 3 if the time ran out before the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+", choices=protocols.EXPERIMENTS)
    parser.add_argument("--size", choices=protocols.SIZES, default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the records")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end by then")
    parser.add_argument("--cases", help="of these names alone, after commas: mqar-gpu-n64")
    options = parser.parse_args(arguments)
    cases = [
        case
        for experiment in options.experiments
        for case in protocols.cases(experiment, options.size)
    ]
    if options.cases is not None:
        known, asked = {case.name: case for case in cases}, options.cases.split(",")
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"--cases knows {', '.join(known)}, not {', '.join(unknown)}")
        cases = [known[name] for name in asked]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.size == "gpu" and device.type == "cpu":
        parser.error("size gpu takes hours without a GPU, and torch sees none")
    if options.size == "tiny" and options.out is None:
        parser.error("the numbers of size tiny mean nothing: --out names a folder for them")
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = machine.folder_name(machine.describe(device)["name"])
    results = machine.RESULTS / name
    folder = options.out or results
    deadline = time.monotonic() + options.seconds
    for case in cases:
        if not run_case(case, folder, device, deadline, results):
            print("the seconds are spent; run the same command again to continue")
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
