"""Training and evaluation of one network on one task, and the choice among learning rates.

Every variant gets the same learning rates, seeds, steps and batches; the best learning rate is
chosen for each by the same score, on draws that are not reported, and every run is in the record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import records
from . import tasks
from .networks import Shape, build, state_bytes
from .tasks import Batch

Draw = Callable[[int, torch.Generator], Batch]
Runs = Mapping[str, list[dict[str, Any]]]
"""Results of ``run`` by learning rate as text, one per seed."""

# two draws of every test, the same for every network: one chooses the learning rate
REPORTED, CHOOSING = 12345, 54321


class Task(NamedTuple):
    """What is learned and what is tested afterwards.

    Attributes:
        train: Batch of a step, from the step's number and a generator.
        tests: Name and batch of each evaluation.
        score: ``accuracy`` (more is better) or ``bits`` per target (less is better).
        length: Longest training row, for the state of attention.
    """

    train: Draw
    tests: Mapping[str, Callable[[torch.Generator], Batch]]
    score: str
    length: int

    def better(self, a: float, b: float) -> bool:
        """Whether score ``a`` beats ``b``."""
        return a > b if self.score == "accuracy" else a < b


class Budget(NamedTuple):
    """Training runs of a case, the same for every variant.

    Attributes:
        steps: Optimizer steps of a run.
        rates: Learning rates of the sweep.
        seeds: Seeds of initialisation and data.
        sweep_seeds: How many of the seeds are trained at every rate, the others only at the best
            one. None: all of them.
    """

    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    sweep_seeds: int | None = None

    @property
    def sweep(self) -> list[tuple[float, int]]:
        """Rates and seeds that choose the best rate."""
        return list(product(self.rates, self.seeds[: self.sweep_seeds]))

    def left(self, task: Task, runs: Runs) -> list[tuple[float, int]]:
        """Rates and seeds that are still to be trained: of the sweep, or else of its best rate."""
        missing = lambda pairs: [
            (rate, seed)
            for rate, seed in pairs
            if all(run["seed"] != seed for run in runs.get(f"{rate:g}", ()))
        ]
        return missing(self.sweep) or missing(product([best_rate(task, self, runs)], self.seeds))


def best_rate(task: Task, budget: Budget, runs: Runs) -> float:
    """The rate of a complete sweep with the best mean over its seeds and all tests, on the draws
    for choosing; of equal ones the first."""

    def mean(rate: float) -> float:
        seeds = budget.seeds[: budget.sweep_seeds]
        scores = [
            score
            for run in runs[f"{rate:g}"]
            if run["seed"] in seeds
            for score in run["choosing"].values()
        ]
        return sum(scores) / len(scores)

    best = budget.rates[0]
    for rate in budget.rates[1:]:
        best = rate if task.better(mean(rate), mean(best)) else best
    return best


def mqar_task(
    vocab: int,
    train: tuple[tuple[int, int], ...],
    test: tuple[tuple[int, int], ...],
    batch: int,
    test_batch: int = 256,
    random_fill: bool = True,
) -> Task:
    """Recall on a mix of (length, pairs), tested on others."""

    def draw(step: int, generator: torch.Generator) -> Batch:
        shape = train[step % len(train)]
        return tasks.mqar(batch, *shape, vocab, generator, random_fill=random_fill)

    def asked(length: int, pairs: int):
        return lambda generator: tasks.mqar(
            test_batch, length, pairs, vocab, generator, random_fill=random_fill
        )

    tests = {f"{length}/{pairs}": asked(length, pairs) for length, pairs in test}
    return Task(draw, tests, "accuracy", max(length for length, _ in train))


def passkey_task(
    vocab: int, train: tuple[int, ...], test: tuple[int, ...], batch: int, depths: int = 5
) -> Task:
    """Retrieval at random depths in some lengths, tested at even depths in others."""

    def draw(step: int, generator: torch.Generator) -> Batch:
        depth = torch.rand((), generator=generator, device=generator.device).item()
        return tasks.passkey(batch, train[step % len(train)], depth, vocab, generator)

    def asked(length: int):
        def gather(generator: torch.Generator) -> Batch:
            places = [i / max(depths - 1, 1) for i in range(depths)]
            parts = [tasks.passkey(64, length, depth, vocab, generator) for depth in places]
            return Batch(*(torch.cat(x) for x in zip(*parts, strict=True)))

        return gather

    return Task(draw, {str(length): asked(length) for length in test}, "accuracy", max(train))


def language_task(
    length: int, batch: int, test_lengths: tuple[int, ...], windows: int = 64
) -> Task:
    """Next byte of Python sources, tested on held-out files, at longer rows too.

    Every test reads the same ``windows`` of the longest length; shorter rows are parts of them.
    """
    train, val = tasks.python_sources("train"), tasks.python_sources("val")

    def asked(rows: int):
        def cut(generator: torch.Generator) -> Batch:
            whole = tasks.language(val, windows, max(test_lengths), generator)
            return Batch(*(x.reshape(-1, rows) for x in whole))

        return cut

    tests = {f"val at {rows}": asked(rows) for rows in test_lengths}
    draw = lambda step, generator: tasks.language(train, batch, length, generator)
    return Task(draw, tests, "bits", length)


def _to(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(x.to(device) for x in batch))


def _loss(network: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, logits and targets at the asked positions only."""
    asked = batch.targets != tasks.IGNORED
    logits = (network(batch.ids)[asked] @ network.head.T).float()
    targets = batch.targets[asked]
    return F.cross_entropy(logits, targets), logits, targets


@torch.no_grad()
def evaluate(network: nn.Module, task: Task, device: torch.device, seed: int) -> dict[str, float]:
    """Score of each test, on a draw that is the same for every network."""
    scores = {}
    for name, draw in task.tests.items():
        batch = _to(draw(torch.Generator(_home(task, device)).manual_seed(seed)), device)
        with _precision(device):
            loss, logits, targets = _loss(network, batch)
        hit = (logits.argmax(-1) == targets).float().mean().item()
        scores[name] = hit if task.score == "accuracy" else loss.item() / math.log(2)
    return scores


def _home(task: Task, device: torch.device) -> torch.device:
    """Where batches are made: sources are in host memory, random tasks are drawn on the device."""
    return torch.device("cpu") if task.score == "bits" else device


def _precision(device: torch.device) -> torch.autocast:
    """bfloat16 products on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def run(
    variant: str,
    shape: Shape,
    task: Task,
    budget: Budget,
    rate: float,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train one network and score it; AdamW, a tenth of warm-up, then a cosine to zero.

    Returns:
        ``seed``, ``scores`` by test, ``choosing`` (the same on the draws that choose the learning
        rate), ``seconds`` and ``parameters``.
    """
    torch.manual_seed(seed)
    network = build(variant, shape).to(device).train()
    generator = torch.Generator(_home(task, device)).manual_seed(1 + seed)
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    # with cycle_momentum it would also move beta1, from 0.95 to 0.85 and back
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=budget.steps, pct_start=0.1, cycle_momentum=False
    )
    start = time.perf_counter()
    for step in range(budget.steps):
        batch = _to(task.train(step, generator), device)
        with _precision(device):
            loss, _, _ = _loss(network, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    network.eval()
    return {
        "seed": seed,
        "scores": evaluate(network, task, device, REPORTED),
        "choosing": evaluate(network, task, device, CHOOSING),
        "seconds": round(time.perf_counter() - start, 2),
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def row(variant: str, shape: Shape, task: Task, budget: Budget, runs: Runs) -> dict[str, Any]:
    """The row of a variant: its best learning rate's scores by seed, and every run.

    Until all runs are there, the row says how many are missing.
    """
    count = sum(map(len, runs.values()))
    wanted = len(budget.sweep) + len(budget.seeds[len(budget.seeds[: budget.sweep_seeds]) :])
    if count < wanted:
        reason = f"{count} of {wanted} runs trained"
        return {**records.skipped(variant, variant, "train", reason), "sweep": dict(runs)}
    best = best_rate(task, budget, runs)
    chosen = runs[f"{best:g}"]
    return records.row(
        *(variant, variant, "train"),
        parameters=chosen[0]["parameters"],
        state_bytes=state_bytes(variant, shape, task.length),
        lr=best,
        seeds=len(budget.seeds),
        scores={name: [r["scores"][name] for r in chosen] for name in task.tests},
        sweep=dict(runs),
    )
