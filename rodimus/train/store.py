"""Folders on disk, without importing torch: locks a folder for one process; completes checkpoints,
sets them aside and deletes them.

COMPLETE appears by an atomic rename after the last file of a checkpoint, so a killed run leaves
either a whole checkpoint or one that does not count; ``RUN/checkpoints/latest`` then names it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError
from ..files import write_atomic
from ..run_folder import MARKER, complete_steps, step_folder, step_number


@contextmanager
def alone(out: Path, *, is_new: bool = False) -> Iterator[None]:
    """Locks a folder against other packs and runs, if the operating system and the folder's file
    system support it; the lock ends with the process.

    Args:
        out: The folder.
        is_new: Delete it in the end if there is nothing in it.

    Raises:
        InputError: another process is at work in the folder, or it cannot be read.
    """
    with _locked(out):
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):
                    out.rmdir()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot read {out}: {error.strerror}") from error
    try:
        # not every network file system can lock a folder
        with suppress(OSError):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                told = f"another process is at work in {out}: wait for its end"
                raise InputError(told) from error
        yield
    finally:
        os.close(folder)


def mark_complete(folder: Path, checksums: Mapping[str, str]) -> None:
    """Makes a checkpoint count: writes the marker with its checksums."""
    write_atomic(folder / MARKER, json.dumps({"sha256": dict(checksums)}, indent=1))


def point_to(folder: Path) -> None:
    """Records which checkpoint is the latest, for people and scripts: no code here reads it."""
    write_atomic(folder.parent / "latest", folder.name)


def set_aside(folder: Path, why: str) -> Path:
    """Moves a checkpoint out of the way of resuming and keeps it, as ``step-N.WHY``."""
    target, number = folder.with_name(f"{folder.name}.{why}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{why}{number}")
    return folder.rename(target)


def remove(folder: Path) -> None:
    """Deletes a checkpoint, its marker first, so that a half-deleted one does not count. If it is a
    symbolic link, only the link is deleted."""
    if folder.is_symlink():
        return folder.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_incomplete(root: Path) -> None:
    """Deletes what killed runs left unfinished."""
    complete = set(complete_steps(root))
    for folder in root.glob("step-*"):
        step = step_number(folder)
        if step is not None and step not in complete:
            remove(folder)


def superseded(root: Path, keep: int, keep_every: int) -> list[Path]:
    """All checkpoints but the ``keep`` newest and those at multiples of ``keep_every``."""
    old = complete_steps(root)[keep:]
    return [step_folder(root, step) for step in old if not keep_every or step % keep_every]
