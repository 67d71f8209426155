"""A run's status for the script that restarts it, in the file that ``RODIMUS_STATUS_FILE`` names.

A launcher reports one status for all ranks, and often a different one: torchrun turns all but 0
into 1, srun reports a rank that was killed because another ended. So rank 0 writes its own.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

VARIABLE = "RODIMUS_STATUS_FILE"
# a checkpoint was completed since this start: if nothing else is written later, the run has
# crashed, and a restart will get further
SAVED = "saved"


def leave(status: int) -> None:
    """Writes the exit status."""
    path = _path()
    if path is not None:
        path.write_text(f"{status}\n", encoding="utf-8")


def leave_saved() -> None:
    """Records that a checkpoint is complete; a failure to do so does not harm the run."""
    path = _path()
    if path is not None:
        with suppress(OSError):
            path.write_text(f"{SAVED}\n", encoding="utf-8")


def leave_crashed() -> None:
    """Writes 1, unless the run was still under way and has saved since this start."""
    path = _path()
    if path is None or (path.exists() and path.read_text(encoding="utf-8").strip() == SAVED):
        return
    leave(1)


def _path() -> Path | None:
    path = os.environ.get(VARIABLE)
    return Path(path) if path and os.environ.get("RANK", "0") == "0" else None
