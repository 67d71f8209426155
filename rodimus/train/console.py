"""Console output of a run: one line that is rewritten on a terminal, a line per report elsewhere.

If rich is installed, a terminal shows a progress bar. The line is redrawn whole each time, without
a thread or a hidden cursor, so a process that is killed leaves nothing behind.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

_BAR = 20
_CLEAR = "\r\x1b[K"


def clock(seconds: float) -> str:
    """``mm:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def progress_line(step: int, steps: int, values: dict[str, float]) -> str:
    """The figures of a training step, on one line."""
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {values['loss']:.4f}",
        f"lr {values['lr']:.2e}",
        f"grad {values['grad_norm']:.2f}",
        f"{values['tokens_per_s']:,.0f} tok/s",
    ]
    if "mfu" in values:
        parts += [f"MFU {values['mfu']:.1%}", f"HFU {values['hfu']:.1%}"]
        parts += [f"{values['memory_gb']:.1f} GB"]
    return "  ".join([*parts, f"left {clock(values['left_s'])}"])


class Console:
    """Lines and progress on a stream.

    Args:
        file: Where to print; default standard output.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        self._rich = _rich_console(self.file)
        self._standing = False

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        clear = _CLEAR if self._standing else ""
        self._standing = False
        print(f"{clear}{line}", file=self.file, flush=True)

    def progress(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Shows the progress of the run, replacing the last progress line if the stream can."""
        line = progress_line(step, steps, values)
        if self._rich is None:
            return self.say(line)
        print(_CLEAR + self._drawn(step, steps, line), end="", file=self.file, flush=True)
        self._standing = True

    def close(self) -> None:
        """Ends the last progress line, so that it stays."""
        if self._standing:
            print(file=self.file, flush=True)
            self._standing = False

    def _drawn(self, step: int, steps: int, line: str) -> str:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(padding=(0, 1))
        row.add_column(width=_BAR)
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_row(ProgressBar(total=steps, completed=step, width=_BAR), Text(line))
        with self._rich.capture() as captured:
            self._rich.print(row, end="", width=self._rich.width - 1)
        return captured.get().rstrip("\n ")


def _rich_console(file: TextIO):
    """rich's console for a terminal that can rewrite a line, else None."""
    if not file.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        return None
    try:
        from rich.console import Console as RichConsole
    except ImportError:
        return None
    return RichConsole(file=file, highlight=False)
