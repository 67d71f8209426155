"""Reads the folder of a training run: which checkpoints it has, whether they are intact, the model.

    RUN/model.json                    configuration of the model
    RUN/tokenizer/                    tokenizer of the data, where the data had one
    RUN/checkpoints/step-00000020/    files of one checkpoint, and COMPLETE once all are written

COMPLETE lists the sha256 of every file. ``rodimus.train.store`` writes it last.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from .errors import InputError

MARKER = "COMPLETE"


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / "model.json").is_file() and not (folder / "config.json").is_file()


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps."""
    return root / f"step-{step:08d}"


def step_number(folder: Path) -> int | None:
    """The step of a checkpoint's folder, by its name; None for another folder."""
    prefix, number = folder.name[:5], folder.name[5:]
    return int(number) if prefix == "step-" and number.isdecimal() else None


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, newest first."""
    found = (step_number(marker.parent) for marker in root.glob(f"step-*/{MARKER}"))
    return sorted((step for step in found if step is not None), reverse=True)


def recorded_checksums(folder: Path) -> dict[str, str]:
    """File name to sha256 as COMPLETE lists them; empty where the marker itself is unreadable."""
    try:
        return json.loads((folder / MARKER).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def damaged_files(folder: Path, checksums: Mapping[str, str]) -> list[str]:
    """Names of the files that are missing, cannot be read, or differ from ``checksums``."""
    return [name for name, expected in checksums.items() if not _is_sound(folder / name, expected)]


def _is_sound(path: Path, expected: str) -> bool:
    try:
        return sha256_file(path) == expected
    except OSError:
        return False


def sound_checkpoint(run: Path, step: int | None = None) -> Path:
    """The folder of a run's checkpoint, after checking every file in it.

    Args:
        run: Folder of the run.
        step: Which checkpoint; default the newest complete one.

    Raises:
        InputError: there is no such checkpoint, or it is damaged.
    """
    steps = complete_steps(run / "checkpoints")
    if not steps:
        raise InputError(f"{run} has no complete checkpoint yet")
    if step is not None and step not in steps:
        have = ", ".join(map(str, steps))
        raise InputError(f"{run} has no complete checkpoint of step {step}; it has {have}")
    folder = step_folder(run / "checkpoints", steps[0] if step is None else step)
    checksums = recorded_checksums(folder)
    damaged = damaged_files(folder, checksums) if checksums else [MARKER]
    if damaged:
        others = ", ".join(str(s) for s in steps if step_folder(folder.parent, s) != folder)
        hint = f"; other steps: {others}" if others else ""
        raise InputError(f"{folder} is damaged: {', '.join(damaged)}{hint}")
    return folder


def read_weights(checkpoint: Path, into: dict) -> None:
    """Fills tensors by name from a checkpoint, in one process, however many ranks wrote it.

    Args:
        checkpoint: A folder that ``sound_checkpoint`` returned.
        into: float32 tensors of the full shapes, keyed by their names in the model.
    """
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        # torch warns that there is no process group, but none is needed
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({"model": into}, checkpoint_id=checkpoint, no_dist=True)
