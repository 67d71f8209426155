"""Signals of a scheduler, remembered until a step boundary.

SIGTERM asks for a checkpoint and the end of the run, SIGUSR1 for a checkpoint alone. A second
SIGTERM ends the process at once; one right after the first is taken for the same, since a launcher
passes on what the scheduler has sent to every process already.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

# what a shell reports for a process that SIGTERM ended; schedulers requeue on it
TERMINATED = 128 + signal.SIGTERM
# seconds in which signals of one request arrive
TOGETHER_S = 2.0


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
        elif not self.terminate:
            self.terminate, self._since = True, time.monotonic()
        elif time.monotonic() - self._since > TOGETHER_S:
            os._exit(TERMINATED)
