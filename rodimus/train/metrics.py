"""What a run records while it goes: console, metrics.jsonl, optional trackers; and its rates."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..devices import DEVICES
from ..errors import InputError
from ..files import write_atomic
from .config import LogSection
from .console import Console
from .signals import spared

logger = logging.getLogger(__name__)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a known GPU, else None: no MFU is printed rather than a guess."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # an RTX A1000 is not an A100, and MIG gives a run a part of one
    known = (
        gpu.flops for word, gpu in DEVICES.items() if re.search(rf"{word}(?!\d)(?!.* MIG )", name)
    )
    return next(known, None)


class RunLog:
    """Writes records of the main rank; on other ranks every call does nothing.

    Args:
        out: Folder of the run; ``metrics.jsonl`` grows there, one JSON object per line.
        config: Which trackers to feed as well.
        step: The last step done; tensorboard drops what it has of later, abandoned steps.
        enabled: Whether this is the main rank.

    """

    def __init__(self, out: Path, config: LogSection, step: int, *, enabled: bool) -> None:
        self.enabled = enabled
        self._failed: set[str] = set()
        self._trackers: dict[str, Callable[[int, dict[str, float]], None]] = {}
        if not enabled:
            return
        self._console = Console()
        # unbuffered: a buffer would keep what a full disk refused, and fail again when it is closed
        self._file = (out / "metrics.jsonl").open("a+b", buffering=0)
        self._file.seek(max(0, self._file.tell() - 1))
        self._is_cut = self._file.read(1) not in (b"", b"\n")
        if config.tensorboard:
            self._trackers["tensorboard"] = _tensorboard(out, step)
        if config.wandb:
            self._trackers["wandb"] = _wandb(out)

    def record(self, step: int, **values: float) -> None:
        """Appends one record; ``time`` (Unix seconds) is added."""
        if not self.enabled:
            return
        # JSON has neither infinities nor NaN
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        row = {"step": step, "time": round(time.time(), 3), **finite}
        # a killed run, or a full disk, may have left half a line
        line = b"\n" * self._is_cut + json.dumps(row).encode() + b"\n"
        try:
            self._is_cut = self._file.write(line) < len(line)
        except OSError as error:
            self._report(self._file.name, error)
        for name, track in self._trackers.items():
            try:
                track(step, values)
            except Exception as error:
                self._report(name, error)

    def say(self, line: str) -> None:
        """Prints one line."""
        if self.enabled:
            self._show(self._console.say, line)

    def progress(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Shows the figures of a step on the console."""
        if self.enabled:
            self._show(self._console.progress, step, steps, values)

    def close(self) -> None:
        """Closes the file, and ends the line on the console."""
        if self.enabled:
            self._file.close()
            self._show(self._console.close)

    def _show(self, show: Callable[..., None], *what: Any) -> None:
        try:
            show(*what)
        except OSError as error:
            self._report("console", error)

    def _report(self, name: str, error: Exception) -> None:
        """Reports once that an output fails: a full disk, a closed terminal or a dead tracker must
        not end a run that can go on."""
        if name not in self._failed:
            logger.error("%s: not written: %s", name, error)
        self._failed.add(name)


class Meter:
    """Throughput and remaining time from what happened since the last reading.

    Args:
        world_size: Ranks, for tokens per second and rank.
        useful: Operations of one token that the model needs, for MFU.
        spent: Operations of one token that are executed, for HFU.
        peak: FLOP/s of one device, or None where unknown.
    """

    def __init__(self, world_size: int, useful: float, spent: float, peak: float | None) -> None:
        self.world_size = world_size
        self.useful, self.spent, self.peak = useful, spent, peak
        self.reset(0)

    def reset(self, step: int) -> None:
        """Starts a new interval; also called after work other than training (evaluation)."""
        self._start, self._step = time.perf_counter(), step
        self._tokens = self._wait = 0.0

    def add(self, tokens: int, data_wait: float) -> None:
        """Counts one step."""
        self._tokens += tokens
        self._wait += data_wait

    def read(self, step: int, steps: int) -> dict[str, float]:
        """Figures of the interval that ends after ``step`` of ``steps``; starts a new interval."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rate = self._tokens / elapsed
        figures = {
            "tokens_per_s": rate,
            "tokens_per_s_rank": rate / self.world_size,
            "data_wait": self._wait / elapsed,
            "left_s": elapsed / max(1, step - self._step) * (steps - step),
        }
        if self.peak:
            share = rate / (self.peak * self.world_size)
            figures |= {"mfu": share * self.useful, "hfu": share * self.spent}
            figures["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.reset(step)
        return figures


def require_trackers(config: LogSection) -> None:
    """Checks that the requested trackers are installed, on every rank and before any work.

    Raises:
        InputError: one is not installed.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(config, name) and importlib.util.find_spec(name) is None:
            raise InputError(f"log.{name} needs {name}: pip install {name}")


def _tensorboard(out: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def track(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def _wandb(out: Path) -> Any:
    import wandb

    # a restarted run continues the same run of W&B
    known = out / "wandb_id"
    identity = known.read_text() if known.is_file() else None
    # it sends records from a process of its own
    with spared():
        run = wandb.init(
            project="rodimus", name=out.name, dir=str(out), id=identity, resume="allow"
        )
    write_atomic(known, run.id)
    # with its own step count, W&B would drop steps that are repeated after a rollback
    run.define_metric("*", step_metric="step")
    return lambda step, values: run.log({**values, "step": step})
