"""`rodimus plot RUN`: loss, learning rate and throughput of a run as a PNG."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ..errors import InputError, first_line


def read_metrics(run: str | Path) -> list[dict[str, float]]:
    """Records of ``RUN/metrics.jsonl`` in order of steps, one per step.

    A run that was killed and resumed has written some steps twice: the later record wins, and
    records of an earlier start from that step on are dropped. Lines that are cut short or are not
    records are skipped.

    Raises:
        InputError: the run has no records, or they cannot be read.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise InputError(f"{what}; expected the folder of a training run") from error
    steps: dict[int, dict[str, float]] = {}
    newest = -1
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            # the record of an evaluation has no loss, and is added to that of its step
            if "loss" in row and isinstance(row["loss"], int | float | None):
                if row["step"] <= newest:
                    steps = {step: kept for step, kept in steps.items() if step < row["step"]}
                newest = row["step"]
            known = {key: value for key, value in row.items() if isinstance(value, int | float)}
            steps.setdefault(row["step"], {}).update(known)
    if not steps:
        raise InputError(f"{path} holds no records")
    return [steps[step] for step in sorted(steps)]


def plot(run: str | Path, out: str | Path | None = None) -> Path:
    """Draws a run.

    Args:
        run: Folder of the run.
        out: PNG file to write; default ``RUN/loss.png``.

    Returns:
        The file written.

    Raises:
        InputError: the run has no records, or ``out`` cannot be written.
        ImportError: matplotlib is not installed.
    """
    rows = read_metrics(run)
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, 1, figsize=(8, 8), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
    )
    _line(axes[0], rows, "loss", "training", color="0.75")
    _smooth(axes[0], rows)
    _line(axes[0], rows, "val_loss", "held out", marker="o", color="tab:red")
    axes[0].set_ylabel("loss (nats a token)")
    if axes[0].lines:
        axes[0].legend()
    _line(axes[1], rows, "lr", "learning rate")
    axes[1].set_ylabel("learning rate")
    _line(axes[2], rows, "tokens_per_s", "throughput")
    axes[2].set_ylabel("tokens/s")
    axes[2].set_xlabel("step")
    for ax in axes:
        ax.grid(alpha=0.3)
    out = Path(out) if out else Path(run) / "loss.png"
    try:
        figure.savefig(out, dpi=120)
    # matplotlib raises ValueError for a file extension it does not know
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {out}: {first_line(error)}") from error
    finally:
        pyplot.close(figure)
    return out


def _line(ax, rows: list[dict[str, float]], key: str, label: str, **style) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        ax.plot(*zip(*points, strict=True), label=label, **style)


def _smooth(ax, rows: list[dict[str, float]]) -> None:
    """The training loss as a running mean of about 2% of the run."""
    points = np.array([(row["step"], row["loss"]) for row in rows if "loss" in row])
    span = max(1, len(points) // 50)
    if len(points) > span:
        sums = np.cumsum([0.0, *points[:, 1]])
        means = (sums[span:] - sums[:-span]) / span
        label = f"training, mean of {span}"
        ax.plot(points[span - 1 :, 0], means, label=label, color="tab:blue")


def run(options: argparse.Namespace) -> None:
    """The command ``rodimus plot``.

    Raises:
        InputError: nothing can be drawn, the picture cannot be written, or matplotlib is missing.
    """
    try:
        print(f"wrote {plot(options.run, options.out)}")
    except ImportError as error:
        raise InputError(first_line(error)) from error
