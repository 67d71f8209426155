"""Run the quality experiments: ``python -m benchmarks.quality mqar --size cpu``.

Every variant of a case gets the same data, steps, learning rates and seeds. Training that the
record holds for this commit and machine is not repeated, so a command that ends early is continued
by the same command. The size ``gpu`` is the protocol for one large GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .. import machine, records
from . import learn, protocols


def kept_runs(
    folder: Path, case: str, about: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Runs by variant and learning rate that are recorded for this commit, machine and settings."""
    settings = json.loads(json.dumps(settings))
    for record in records.read(folder) if folder.is_dir() else []:
        same = (record["group"], record["case"]) == ("quality", case)
        if same and record["settings"] == settings and machine.are_alike(record["machine"], about):
            return {row["target"]: row["sweep"] for row in record["rows"]}
    return {}


def run_case(case: protocols.Case, folder: Path, device: torch.device, deadline: float) -> bool:
    """Train the runs of a case that are missing; False if the time ran out."""
    about, load, others = machine.describe(device), machine.load_now(), machine.Others()
    settings = {
        "note": case.note,
        "score": case.task.score,
        "shape": case.shape._asdict(),
        "budget": case.budget._asdict(),
    }
    kept = kept_runs(folder, case.name, about, settings)
    for variant, rate, seed in product(case.variants, case.budget.rates, case.budget.seeds):
        runs = kept.setdefault(variant, {}).setdefault(f"{rate:g}", [])
        if any(run["seed"] == seed for run in runs):
            continue
        if time.monotonic() > deadline:
            return False
        runs.append(learn.run(variant, case.shape, case.task, case.budget, rate, seed, device))
        scores = ", ".join(f"{name} {score:.3f}" for name, score in runs[-1]["scores"].items())
        print(f"{case.name} {variant}, rate {rate:g}, seed {seed}: {scores}", flush=True)
        record = records.make(
            "quality",
            case.name,
            settings=settings,
            machine=about,
            rows=[
                learn.row(name, case.shape, case.task, case.budget, runs)
                for name, runs in kept.items()
            ],
            load=(load, others.cores()),
        )
        records.write(record, folder)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 3 if the time ran out before the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+", choices=protocols.EXPERIMENTS)
    parser.add_argument("--size", choices=protocols.SIZES, default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the records")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.size == "gpu" and device.type == "cpu":
        parser.error("size gpu takes hours without a GPU, and torch sees none")
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = machine.folder_name(machine.describe(device)["name"])
    folder = options.out or machine.ROOT / "benchmarks" / "results" / name
    deadline = time.monotonic() + options.seconds
    for experiment in options.experiments:
        for case in protocols.cases(experiment, options.size):
            if not run_case(case, folder, device, deadline):
                print("the seconds are spent; run the same command again to continue")
                return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
