"""Names the rank that hangs: a thread on every rank tells the others how far it is.

A rank that hangs makes all others wait in a collective, where each of them can only report that it
waits. Here the ranks compare how many beats they have made, and the one behind is reported.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist


class Watchdog:
    """Ends the process, with a report, when this rank has made no progress for ``timeout_s``.

    Args:
        rank: This process.
        world_size: Number of processes; a single one is not watched.
        timeout_s: Seconds without a beat that count as a hang.
        save_s: The same during a save or a restore.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float, save_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.timeout_s, self.save_s = timeout_s, save_s
        self._limit = timeout_s
        self._count, self._where, self._since = 0, "starting", time.monotonic()
        self._stop = threading.Event()
        self._name = f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to watch."""
        self.beat("starting")
        if self.world_size > 1:
            # a connection of its own: the main thread holds the default one's lock while it waits
            self._store = dist.distributed_c10d._get_default_store().clone()
            # rank 0 may host the store and end at its first error: first let all ranks connect
            dist.barrier()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, where: str) -> None:
        """Records that this rank moves on, and what it does next; cheap enough for any loop."""
        self._count, self._where, self._since = self._count + 1, where, time.monotonic()

    @contextmanager
    def paused(self, where: str) -> Iterator[None]:
        """Allows this rank to make no progress for as long as a save or a restore may take. A rank
        that does not reach this call is still found by its own beats."""
        self.beat(where)
        self._limit = self.save_s
        try:
            yield
        finally:
            self.beat(f"after {where}")
            self._limit = self.timeout_s

    def close(self) -> None:
        """Stops watching."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        period = min(5.0, self.timeout_s / 4)
        while not self._stop.wait(period):
            # rank 0 stores the beats, and may have ended before this rank reports
            with suppress(dist.DistError):
                self._store.set(f"beat/{self.rank}", f"{self._count}\n{self._name}\n{self._where}")
            silent = time.monotonic() - self._since
            if silent > self._limit:
                # let the others' last beats arrive
                time.sleep(period)
                blame = f"at: {self._where}; the beats of the others are gone with rank 0"
                with suppress(dist.DistError):
                    blame = self._blame()
                sys.stderr.write(f"{self._name}: no progress for {silent:.0f} s; {blame}\n")
                sys.stderr.flush()
                # the main thread waits in a collective and cannot be interrupted
                os._exit(1)

    def _blame(self) -> str:
        """Names the ranks with the fewest beats: all of them if none is behind."""
        seen = {}
        for rank in range(self.world_size):
            key = f"beat/{rank}"
            known = self._store.check([key])
            count, name, where = (
                self._store.get(key).decode().split("\n") if known else (0, f"rank {rank}", "start")
            )
            seen[rank] = (int(count), name, where)
        last = min(count for count, _, _ in seen.values())
        behind = [f"{name} at: {where}" for count, name, where in seen.values() if count == last]
        verdict = "none is behind" if len(behind) == self.world_size else "behind the others"
        return f"{verdict}: {'; '.join(behind)}"
