"""Sizes of the quality experiments: ``cpu`` takes some hours of a core, ``gpu`` repeats the paper's
figure, and ``tiny`` runs the code of ``gpu`` in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from .learn import Budget, Task, language_task, mqar_task, passkey_task
from .networks import GATES, VARIANTS, Shape

EXPERIMENTS = ("mqar", "passkey", "language")
SIZES = ("cpu", "gpu", "tiny")

HARDEST_RECALL = "1024/256"

# Rodimus* (arXiv 2410.06577), figure 1b, length 1024 with 256 pairs: accuracy by state expansion,
# read off the picture to about 0.01
PAPER_MQAR = {
    "Rodimus+": {16: 0.37, 32: 0.72, 64: 0.91, 128: 0.97, 256: 0.97},
    "Rodimus": {16: 0.25, 32: 0.37, 64: 0.65, 128: 0.74, 256: 0.82},
    "Mamba2": {16: 0.11, 32: 0.26, 64: 0.31, 128: 0.41, 256: 0.61},
    "Mamba": {16: 0.16, 32: 0.17, 64: 0.25, 128: 0.23},
}


class Case(NamedTuple):
    """One record of quality: the same task and budget for every variant."""

    name: str
    shape: Shape
    task: Task
    budget: Budget
    variants: tuple[str, ...]
    note: str


def cases(experiment: str, size: str) -> Iterator[Case]:
    """The cases of an experiment at a size, in the order in which they should be run.

    Raises:
        ValueError: an unknown experiment or size.
    """
    if experiment not in EXPERIMENTS or size not in SIZES:
        raise ValueError(
            f"expected an experiment of {EXPERIMENTS} and a size of {SIZES}, got {experiment!r}"
            f" and {size!r}"
        )
    yield from {"mqar": _mqar, "passkey": _passkey, "language": _language}[experiment](size)


def _mqar(size: str) -> Iterator[Case]:
    if size == "cpu":
        task = mqar_task(
            64, ((32, 4), (48, 6), (64, 8)), ((64, 8), (128, 8)), batch=64, random_fill=False
        )
        budget = Budget(900, (3e-3, 1e-2, 3e-2), seeds=(0, 1, 2))
        note = (
            "One network, other gates: same parameters, same state, fill is token 0."
            " Columns: length/pairs."
        )
        yield Case("mqar-cpu-n16", Shape(64, 64, 16), task, budget, GATES, note)
        return
    # Zoology's figures (its repository, arxiv24_based_figure2): 100,000 + 4 * 20,000 examples 32
    # times, batch 256, learning rates, tests; benchmarks/README.md says what differs
    train = ((64, 4),) * 5 + ((128, 8), (256, 16), (256, 32), (256, 64))
    tests = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
    rates, seeds = (1e-3, 10**-2.5, 1e-2, 10**-1.5), (0, 1, 2)
    budget = Budget(180_000 * 32 // 256, rates, seeds, sweep_seeds=1)
    vocab, width, batch, test_batch = 8192, 128, 256, 1000
    if size == "tiny":
        budget, (vocab, width, batch, test_batch) = budget._replace(steps=2), (1024, 32, 2, 2)
    task = mqar_task(vocab, train, tests, batch=batch, test_batch=test_batch)
    note = "Trained on lengths 64 to 256 with up to 64 pairs. Columns: length/pairs."
    case = partial(Case, task=task, budget=budget)
    # the paper's claim first: Rodimus at 64 recalls as much as Mamba2 at 256
    for mem_size in (64, 256, 16, 128, 32):
        told = [f"{name} {line[mem_size]}" for name, line in PAPER_MQAR.items() if mem_size in line]
        told = f" The paper reports, for 1024/256 at this state expansion: {', '.join(told)}."
        yield case(
            f"mqar-{size}-n{mem_size}",
            Shape(vocab, width, mem_size),
            variants=(*GATES, "rodimus_plus"),
            note=note + told,
        )
        if mem_size == 64:
            # once, because attention has no state to expand
            shape = Shape(vocab, width, mem_size)
            yield case(f"mqar-{size}-attention", shape, variants=("attention",), note=note)


def _passkey(size: str) -> Iterator[Case]:
    if size == "cpu":
        task = passkey_task(64, (16, 24, 32), (32, 64, 128), batch=32)
        budget = Budget(600, (1e-4, 3e-4, 1e-3, 3e-3), seeds=(0, 1, 2))
        shape = Shape(64, 64, 16, window=17)
    else:
        lengths, batch, steps = ((256, 512, 1024), (1024, 4096, 16384)), 32, 4000
        if size == "tiny":
            lengths, batch, steps = ((16, 24), (24, 48)), 2, 2
        task = passkey_task(256, *lengths, batch=batch)
        budget = Budget(steps, (3e-4, 1e-3, 3e-3), seeds=(0, 1, 2))
        shape = Shape(256, 128, 64)
    note = "One key among filler at even depths. Columns: length; the first is the longest trained."
    yield Case(f"passkey-{size}", shape, task, budget, VARIANTS, note)


def _language(size: str) -> Iterator[Case]:
    if size == "cpu":
        task = language_task(128, 16, (128, 512))
        budget = Budget(300, (3e-3, 1e-2, 3e-2), seeds=(0, 1, 2))
        shape = Shape(256, 96, 16, window=65)
    else:
        length, batch, steps, width, layers = (1024, 32, 3000, 384, 6)
        if size == "tiny":
            length, batch, steps, width, layers = (32, 2, 2, 32, 1)
        task = language_task(length, batch, (length, 4 * length))
        budget = Budget(steps, (1e-3, 2e-3, 4e-3), seeds=(0, 1, 2))
        shape = Shape(256, width, 64, layers=layers, window=257)
    note = (
        "Bits a byte of held-out Python sources after the same number of bytes; less is better."
        " Every column reads the same text, in rows of that length."
        " The gates have equal parameters; Rodimus+ and attention have more, as the table says."
    )
    yield Case(f"language-{size}", shape, task, budget, VARIANTS, note)
