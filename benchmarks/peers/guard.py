"""Runs third-party code that may not support this machine: any failure becomes a reason."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Unavailable(Exception):
    """A model or engine that cannot run here; the message is the reason for the record."""

    def copy(self) -> Unavailable:
        """A copy to keep: a raised one refers to its stack frames, and so to a model's memory."""
        return type(self)(*self.args)


class Fault(Unavailable):
    """It is here but fails or gives wrong numbers; a model of ours must not be skipped for that."""


def require_package(module: str, distribution: str) -> None:
    """Raise Unavailable unless there is such a package."""
    if not is_installed(module):
        raise Unavailable(f"{distribution} is not installed")


def is_installed(module: str) -> bool:
    """Whether there is a package of that name, and not just a namespace folder, as flash-attn 4
    alone leaves ``flash_attn``."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        # the parent is missing
        return False
    return found is not None and found.origin is not None


class _Late(BaseException):
    """Raised by the alarm; no ``except Exception`` of a peer may swallow it."""


def guarded(call: Callable[[], Any], limit: float | None = None) -> Any:
    """Run a peer's code; what it raises becomes the reason why it was skipped.

    A peer is third-party code that may not support this machine: any failure in it is part of the
    result, and must not cost the other peers' results.

    Args:
        call: What to run.
        limit: Seconds after which it is interrupted, between two Python instructions; needs the
            main thread.

    Raises:
        Unavailable: raised by the call, or it was too slow or ran out of memory.
        Fault: anything else went wrong.
    """
    try:
        with _alarm(limit):
            return call()
    except Unavailable:
        raise
    except _Late:
        if limit is None:
            raise
        raise Unavailable(f"too slow: not done after {limit:g} s") from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        no_room = isinstance(error, MemoryError | torch.OutOfMemoryError)
        kind = Unavailable if no_room else Fault
        raise kind(f"{type(error).__name__}: {lines[0]}") from error


@contextlib.contextmanager
def _alarm(limit: float | None) -> Iterator[None]:
    if limit is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
