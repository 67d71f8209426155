"""What a run says to the script that starts it again, in the file ``RODIMUS_STATUS_FILE`` names.

A launcher reports one status for all ranks, and often another one: torchrun makes 1 of all but 0,
srun tells of who was killed for another's end. So rank 0 writes its own.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

VARIABLE = "RODIMUS_STATUS_FILE"
# a checkpoint is complete since this start: where nothing else follows, the run has crashed, and
# started again it gets further
SAVED = "saved"


def leave(status: int) -> None:
    """Writes the exit status."""
    path = _path()
    if path is not None:
        path.write_text(f"{status}\n", encoding="utf-8")


def leave_saved() -> None:
    """Says that a checkpoint is complete; a failure to say it does no harm to the run."""
    path = _path()
    if path is not None:
        with suppress(OSError):
            path.write_text(f"{SAVED}\n", encoding="utf-8")


def leave_crashed() -> None:
    """Writes 1, unless the run was still under way and has saved since it was started."""
    path = _path()
    if path is None or (path.exists() and path.read_text(encoding="utf-8").strip() == SAVED):
        return
    leave(1)


def _path() -> Path | None:
    path = os.environ.get(VARIABLE)
    return Path(path) if path and os.environ.get("RANK", "0") == "0" else None
