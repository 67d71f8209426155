"""Long rows in training: the trainer's step over rows of 65,536 tokens, and over as many tokens in
rows of 4,096 and of 16,384.

Without recomputation the activations of so many tokens fit on no GPU. Results of products,
recurrence and attention are kept if they fit, otherwise everything is recomputed; a row tells which
mode did not fit. The trainer has the memory for itself: no other model, nor another copy of this
one, is loaded.
"""

import contextlib
import copy
import functools
from types import SimpleNamespace

import pytest

from . import bench_train, peers
from .harness import Bench, Target, skipped_row

# (batch, length)
POINTS = {
    "tiny": [(1, 128), (2, 64)],
    # a step of a 1.5B model takes minutes on a CPU
    "cpu": [],
    "cuda": [(1, 65536), (16, 4096), (4, 16384)],
}
LAST = POINTS["cuda"]
RECOMPUTED = ("selective", "full")
"""Modes of ``train.ac`` in the order in which they are tried; the first that fits is timed."""


def without_weights(bench: Bench, name: str) -> peers.Model:
    """The parts of a model that the trainer uses; its weights and all other models are freed."""
    one = bench_train.alone(bench, name)
    model = copy.copy(one.model(name))
    model.model = SimpleNamespace(config=model.model.config)
    del bench.models[name]
    bench_train.clear(bench)
    return model


def started(
    bench: Bench,
    model: peers.Model,
    batch: int,
    length: int,
    recomputed: str,
    opened: contextlib.ExitStack,
) -> Target:
    """The trainer after two steps; in the second the optimizer's state exists from the start."""
    trainer = bench_train.in_trainer(bench, model, batch, length, recomputed)
    target = opened.enter_context(trainer)
    for _ in range(2):
        target.call()
    return target


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", peers.OURS)
def test_long(bench, benchmark, start, name, point):
    if name not in bench.names:
        pytest.skip("not asked for")
    batch, length = point
    case = f"{bench.case(batch, length)}-{name}"
    start("long", case)
    model, skipped = without_weights(bench, name), []
    for recomputed in RECOMPUTED:
        with contextlib.ExitStack() as opened:
            begin = functools.partial(started, bench, model, *point, recomputed, opened)
            try:
                target = peers.guarded(begin)
            except peers.Unavailable as reason:
                engine = f"{bench_train.TRAINER}-{recomputed}"
                skipped.append(skipped_row(f"{name}/{engine}", engine, reason))
            else:
                found = [target], skipped
                where = batch, length, "long", case
                bench_train.measure(bench, benchmark, found, *where, by_itself=True)
                return
        bench_train.clear(bench)
    bench.record("long", case, {"batch": batch, "context": length}, skipped)
    pytest.fail("no step was measured: " + "; ".join(row["reason"] for row in skipped))
