"""Signals of a scheduler, remembered until a step boundary.

SIGTERM asks for a checkpoint and the end of the run, SIGUSR1 for a checkpoint alone. A second
SIGTERM ends the process at once.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

# what a shell reports for a process that SIGTERM ended; schedulers requeue on it
TERMINATED = 128 + signal.SIGTERM


class Signals:
    """Counts signals while installed (a context manager; main thread only)."""

    def __init__(self) -> None:
        self.terminate = self.save = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif self.terminate:
            os._exit(TERMINATED)
        else:
            self.terminate = True
