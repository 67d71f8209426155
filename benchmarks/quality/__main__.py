"""Run the quality experiments: ``python -m benchmarks.quality mqar --size cpu``.

Every variant of a case gets the same data, steps, learning rates and seeds. A variant that its
record holds for this commit and machine is not trained again, so a run that ends early is continued
by the same command. The size ``gpu`` is the protocol for one large GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import machine, records
from . import learn, protocols


def kept_rows(
    folder: Path, case: str, about: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows that an earlier run of this commit has measured here, with the same settings."""
    settings = json.loads(json.dumps(settings))
    for record in records.read(folder) if folder.is_dir() else []:
        same = (record["group"], record["case"]) == ("quality", case)
        if same and record["settings"] == settings and machine.are_alike(record["machine"], about):
            return [row for row in record["rows"] if row["status"] == "measured"]
    return []


def run_case(case: protocols.Case, folder: Path, device: torch.device, deadline: float) -> bool:
    """Train the variants of a case that are missing; False if the time ran out."""
    about, load = machine.describe(device), machine.load_before()
    settings = {
        "note": case.note,
        "score": case.task.score,
        "shape": case.shape._asdict(),
        "budget": case.budget._asdict(),
    }
    rows = kept_rows(folder, case.name, about, settings)
    for variant in case.variants:
        if any(row["target"] == variant for row in rows):
            continue
        if time.monotonic() > deadline:
            return False
        row = learn.sweep(variant, case.shape, case.task, case.budget, device)
        rows.append(row)
        scores = ", ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in row["scores"].items())
        print(f"{case.name} {variant}: {scores} (learning rate {row['lr']:g})", flush=True)
        record = records.make(
            "quality",
            case.name,
            settings=settings,
            machine=about,
            rows=rows,
            load=(load, machine.load_before()),
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
