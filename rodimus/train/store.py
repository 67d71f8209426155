"""Checkpoint folders on disk, without any torch: what is complete, what is damaged, what may go.

    RUN/checkpoints/step-00000020/    files of one checkpoint, and COMPLETE once all are written
    RUN/checkpoints/latest            name of the newest complete one

COMPLETE lists the sha256 of every file and appears by an atomic rename after the last of them, so a
killed run leaves either a whole checkpoint or one that does not count.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from .shards import sha256_file

_MARKER = "COMPLETE"


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after ``step`` optimizer steps."""
    return root / f"step-{step:08d}"


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, newest first."""
    found = (p.parent.name.removeprefix("step-") for p in root.glob(f"step-*/{_MARKER}"))
    return sorted((int(name) for name in found if name.isdigit()), reverse=True)


def write_atomic(path: Path, text: str) -> None:
    """Replaces ``path``; a reader sees the old or the new contents, also after a power cut."""
    part = path.with_name(path.name + ".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def mark_complete(folder: Path, checksums: Mapping[str, str]) -> None:
    """Makes a checkpoint count: the marker with its checksums, then the pointer to it."""
    write_atomic(folder / _MARKER, json.dumps({"sha256": dict(checksums)}, indent=1))
    write_atomic(folder.parent / "latest", folder.name)


def latest_folder(root: Path) -> Path | None:
    """The checkpoint that the ``latest`` pointer names, or None."""
    pointer = root / "latest"
    return root / pointer.read_text().strip() if pointer.exists() else None


def recorded_checksums(folder: Path) -> dict[str, str]:
    """File name to sha256 as COMPLETE lists them; empty where the marker itself is unreadable."""
    try:
        return json.loads((folder / _MARKER).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def damaged_files(folder: Path, checksums: Mapping[str, str]) -> list[str]:
    """Names of the files whose contents are missing or differ from ``checksums``."""
    return [
        name
        for name, expected in checksums.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != expected
    ]


def quarantine(folder: Path) -> Path:
    """Moves a damaged checkpoint out of the way of resuming and keeps it for a look."""
    target, number = folder.with_name(folder.name + ".damaged"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.damaged{number}")
    return folder.rename(target)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, its marker first, so that a half-deleted one does not count."""
    (folder / _MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_incomplete(root: Path) -> None:
    """Deletes what killed runs left unfinished."""
    complete = set(complete_steps(root))
    for folder in root.glob("step-*"):
        name = folder.name.removeprefix("step-")
        if name.isdigit() and int(name) not in complete:
            remove(folder)


def prune(root: Path, keep: int, keep_every: int) -> None:
    """Deletes all but the ``keep`` newest checkpoints and those at multiples of ``keep_every``."""
    for step in complete_steps(root)[keep:]:
        if not (keep_every and step % keep_every == 0):
            remove(step_folder(root, step))
