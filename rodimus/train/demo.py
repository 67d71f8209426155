"""`make demo`: a small Rodimus+ learns Python from the standard library's own sources.

Packs the sources, trains on as many processes as there are cores (two at most), evaluates, exports
and writes code, with the commands that a long run uses: a few minutes on two cores, no download.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from ..errors import InputError
from ..options import parse
from . import pack
from .plot import plot, read_metrics

CONFIG = Path("configs/train/demo_cpu.toml")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def demo(out: Path, processes: int) -> None:
    """Runs the whole demonstration; existing shards and checkpoints are reused.

    Args:
        out: Folder for data, run, plot and exported model.
        processes: Training processes.

    Raises:
        InputError: not run from the checkout, or a step failed.
    """
    if not CONFIG.is_file():
        raise InputError(f"{CONFIG} not found: run from the root of the repository")
    began = time.perf_counter()
    data = out / "data"
    if not (data / "val.json").is_file():
        print("packing the Python standard library", flush=True)
        # --overwrite: without val.json, an earlier pack was interrupted
        options = ["stdlib", str(data), "--val-fraction", "0.05", "--overwrite"]
        pack.run(parse(["data", "pack", *options]))
    print(f"training on {processes} process{'es' if processes > 1 else ''}", flush=True)
    train(out, data, processes)
    picture = plot(out)
    last = next(r for r in reversed(read_metrics(out)) if "val_bits_per_byte" in r)
    print(
        f"\nreached {last['val_bits_per_byte']:.3f} bits/byte on held-out files "
        f"after {last['step']} steps\n"
        f"took {time.perf_counter() - began:.0f} s in all\n"
        f"loss curve      {picture}\n"
        f"exported model  {out / 'export'}\n"
        f'try it          rodimus generate {out / "export"} --prompt "class Stack:"'
    )


def train(out: Path, data: Path, processes: int) -> None:
    """Starts the training processes and waits for them.

    Raises:
        InputError: training failed; its own messages are above.
    """
    command = [sys.executable, "-m", "rodimus.train"]
    if processes > 1:
        command[2:] = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(processes), "-m", "rodimus.train"]
    command += [str(CONFIG), "--out", str(out)]
    command += ["--data.train", str(data / "train.json"), "--data.val", str(data / "val.json")]
    threads = str(max(1, cores() // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    status = subprocess.run(command, env=environment).returncode
    if status:
        raise InputError(f"training ended with status {status}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rodimus.train.demo",
        description="Train a small Rodimus+ on Python's standard library and let it write code.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the run")
    parser.add_argument("--processes", type=int, default=min(2, cores()), help="training processes")
    options = parser.parse_args(argv)
    try:
        demo(options.out, options.processes)
    except InputError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
