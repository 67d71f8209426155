"""Chaos run: a training run is killed, terminated and damaged at random, and must end the same.

    python scripts/chaos.py --events 30

Trains a tiny Rodimus+ on two processes twice: once undisturbed, once with random events, each of
which ends the run (SIGKILL of a rank, SIGTERM of all) and may then damage the newest of several
checkpoints (a truncated file, a flipped bit). The run is restarted after every event, finds the
newest intact checkpoint by itself, and must end with bitwise the same losses.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rodimus.train import store
from rodimus.train.__main__ import main as train
from rodimus.train.pack import pack

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
EVENTS = ("kill", "terminate", "kill and truncate", "kill and flip a bit")


class Group:
    """Two forked ranks of `rodimus train`; as under torchrun, if one dies the other is killed."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        self.ranks = [
            fork.Process(target=_rank, args=(rank, port, arguments, log)) for rank in range(RANKS)
        ]
        for rank in self.ranks:
            rank.start()

    def wait(self) -> list[int]:
        """Exit statuses, once all ranks have ended."""
        while any(r.is_alive() for r in self.ranks):
            if any(r.exitcode not in (None, 0, 143) for r in self.ranks):
                self.signal(signal.SIGKILL)
            time.sleep(0.05)
        return [r.exitcode for r in self.ranks]

    def signal(self, number: int, only: int | None = None) -> None:
        """Sends a signal to one rank, or to all that are alive."""
        for index, rank in enumerate(self.ranks):
            if only in (None, index) and rank.is_alive():
                os.kill(rank.pid, number)


def _rank(rank: int, port: int, arguments: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    os._exit(train(arguments))


def lines(run: Path) -> int:
    """Records written so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(run: Path) -> dict[int, float]:
    """Loss by step; the last one of a step that was trained more than once."""
    rows = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        # a killed writer leaves half a line
        if line.endswith("}"):
            row = json.loads(line)
            if "loss" in row:
                rows[row["step"]] = row["loss"]
    return rows


def damage(run: Path, how: str, rng: random.Random) -> None:
    """Truncates a file of the newest checkpoint, or flips one of its bits. An only checkpoint is
    left intact: a run whose checkpoints are all damaged would refuse to start over by itself."""
    steps = store.complete_steps(run / "checkpoints")
    if len(steps) < 2:
        return
    folder = store.step_folder(run / "checkpoints", steps[0])
    path = rng.choice(sorted(p for p in folder.iterdir() if p.name != "COMPLETE"))
    data = bytearray(path.read_bytes())
    if how == "truncate":
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def disturb(run: Path, group: Group, event: str, rng: random.Random) -> None:
    """Waits for a random moment some steps later, then makes the event happen."""
    target = lines(run) + rng.randrange(12)
    while lines(run) < target and all(rank.is_alive() for rank in group.ranks):
        time.sleep(0.02)
    # anywhere in a step, in a save, or before the first step
    time.sleep(rng.uniform(0.0, 0.5))
    if event == "terminate":
        group.signal(signal.SIGTERM)
    else:
        group.signal(signal.SIGKILL, only=rng.randrange(RANKS))
    statuses = group.wait()
    allowed = {"terminate": {0, 143, -15}}.get(event, {0, 1, -9})
    if not set(statuses) <= allowed:
        raise SystemExit(f"{event}: exit statuses {statuses}, see {run}.log")
    if event.startswith("kill and"):
        damage(run, "truncate" if "truncate" in event else "flip", rng)


def main() -> int:
    """Runs the experiment; returns 0 if the disturbed run has the losses of the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        pack(str(ROOT / "rodimus"), base / "data", vocab_size=512, val_fraction=0.1)
        common = [str(ROOT / "configs/train/ci_tiny.toml"), "--no-export"]
        common += ["--data.train", str(base / "data/train.json"), "--data.val"]
        common += [str(base / "data/val.json"), "--train.steps", str(options.steps)]
        common += ["--checkpoint.every", "5", "--checkpoint.keep", "4", "--log.every", "50"]
        plain, run = base / "undisturbed", base / "disturbed"
        began = time.monotonic()
        if Group([*common, "--out", str(plain)], base / "undisturbed.log").wait() != [0] * RANKS:
            raise SystemExit((base / "undisturbed.log").read_text())
        print(f"undisturbed: {options.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        happened: Counter[str] = Counter()
        for number in range(options.events):
            event = rng.choice(EVENTS)
            group = Group([*common, "--out", str(run)], base / "disturbed.log")
            disturb(run, group, event, rng)
            happened[event] += 1
            steps = store.complete_steps(run / "checkpoints")
            print(f"{number + 1:3d} {event:20s} checkpoints {steps}", flush=True)
        if Group([*common, "--out", str(run)], base / "disturbed.log").wait() != [0] * RANKS:
            raise SystemExit((base / "disturbed.log").read_text()[-5000:])
        expected, got = losses(plain), losses(run)
        same = expected == got
        print(f"events: {dict(happened)}")
        print(f"final loss {got[options.steps]!r}, undisturbed {expected[options.steps]!r}")
        print(f"all {len(expected)} losses equal to the bit: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
