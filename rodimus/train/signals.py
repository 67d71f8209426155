"""Signals of a scheduler, remembered until a step or a batch of an evaluation ends.

SIGTERM asks for a checkpoint and the end of the run, as does the SIGHUP of a terminal that closes;
SIGUSR1 asks only for a checkpoint. A second SIGTERM ends the process at once. One right after the
first counts as the same, because a launcher forwards what the scheduler has already sent to every
process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# what a shell reports for a process that SIGTERM ended; schedulers requeue on it
TERMINATED = 128 + signal.SIGTERM
# signals within this many seconds belong to one request
TOGETHER_S = 2.0


class Signals:
    """Records signals while installed (a context manager; main thread only)."""

    def __init__(self) -> None:
        self.terminate = self.save = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        numbers = [signal.SIGTERM, signal.SIGUSR1]
        # under nohup the process must go on ignoring SIGHUP
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._before[number] = signal.signal(number, self._receive)
        # handlers run in the main thread, which may wait in a collective: a thread listens as well
        self._heard, written = socket.socketpair()
        written.setblocking(False)
        self._fd = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False), written
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        before, written = self._fd
        signal.set_wakeup_fd(before)
        # ends the listening thread, which reads the end of the stream
        written.close()

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        else:
            self.terminate = True

    def _listen(self) -> None:
        """Ends the process at the second request to terminate."""
        since = None
        while heard := self._heard.recv(1):
            if heard[0] != signal.SIGTERM:
                continue
            if since is None:
                since = time.monotonic()
            elif time.monotonic() - since > TOGETHER_S:
                os._exit(TERMINATED)
        self._heard.close()


@contextmanager
def spared() -> Iterator[None]:
    """Processes that this thread starts within it live through SIGUSR1, which would end them by
    default: Slurm sends a signal to every process of a job, not only to the ranks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
