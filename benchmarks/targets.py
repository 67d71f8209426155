"""Targets of speed and memory that were set before anything was measured, and what the records say.

A target names records, how its figure follows from their rows, and a bound. Figure, interval,
machine and verdict are computed; a target without its records is not measured.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any, NamedTuple

from rodimus.devices import DEVICES

from . import timing
from .harness import READ
from .machine import folder_name
from .records import measured, model_of

Record = Mapping[str, Any]
Rounds = list[float]
Figure = Callable[..., Rounds]
Cases = tuple[tuple[str, ...], ...]

KINDS = ("missed", "open", "not measured", "met")
SIGNS = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}
ENOUGH_COVERAGE = 0.9


class Target(NamedTuple):
    """One bound of one figure.

    Attributes:
        machine: Folder of its records.
        name: What is timed.
        figure: Its value in every round, from the records of a case; None where no benchmark
            has it.
        goal: Sign, bound and the figure's unit: ``<= 165 us``.
        cases: Names of the records of each case; of several cases the worst counts.
    """

    machine: str
    name: str
    figure: Figure | None
    goal: str
    cases: Cases = ()

    @property
    def bound(self) -> float:
        """The number of the goal."""
        return float(self.goal.split()[1].replace(",", ""))

    @property
    def unit(self) -> str:
        """What the figure is counted in."""
        return self.goal.split(maxsplit=2)[2]

    @property
    def is_limit(self) -> bool:
        """Whether less is better."""
        return self.goal.startswith("<")

    def meets(self, value: float) -> bool:
        """Whether a value is on the right side of the bound."""
        return SIGNS[self.goal.split()[0]](value, self.bound)


class Beside(NamedTuple):
    """A figure of rounds and of medians that were timed separately, in another record.

    Attributes:
        others: The times of which the medians are taken, from the records of a case.
        rounds: The figure in every round, from the medians and the records.
    """

    others: Callable[..., Sequence[Rounds]]
    rounds: Callable[..., Rounds]

    def __call__(self, *case: Record) -> Rounds:
        return self.rounds([median(times) for times in self.others(*case)], *case)


class Counted(NamedTuple):
    """A figure that is counted, not timed: it has no interval."""

    value: Callable[..., float]

    def __call__(self, *case: Record) -> Rounds:
        return [self.value(*case)]


class Outcome(NamedTuple):
    """A target, its figure with an interval, and the records from which it follows."""

    target: Target
    figure: timing.Ratio | None = None
    records: tuple[Record, ...] = ()

    @property
    def kind(self) -> str:
        """``missed`` by the median; ``met`` by the whole interval, of enough rounds; ``open`` where
        only the median meets the goal; ``not measured``."""
        if self.figure is None:
            return "not measured"
        middle, low, high, coverage = self.figure
        if not self.target.meets(middle):
            return "missed"
        throughout = self.target.meets(low) and self.target.meets(high)
        return "met" if throughout and coverage >= ENOUGH_COVERAGE else "open"


def outcomes(found: Iterable[Record]) -> list[Outcome]:
    """What records say about every target, missed ones first."""
    found = list(found)
    return sorted((outcome(t, found) for t in TARGETS), key=lambda o: KINDS.index(o.kind))


def outcome(target: Target, found: Iterable[Record]) -> Outcome:
    """What records say about a target."""
    named = {
        f"{record['group']}-{record['case']}": record
        for record in found
        if folder_name(record["machine"]["name"]) == target.machine
    }
    try:
        if target.figure is None:
            return Outcome(target)
        cases = [tuple(named[name] for name in case) for case in target.cases]
        every = [Outcome(target, measure(target.figure, case), case) for case in cases]
    except KeyError:
        return Outcome(target)
    worst = max if target.is_limit else min
    return worst(every, key=lambda outcome: outcome.figure.median)


def interval(rounds: Rounds, case: tuple[Record, ...]) -> timing.Ratio:
    """Median and interval of a figure of some records, computed as those of its ratio to 1."""
    sittings = case[0]["settings"].get("sittings", ())
    return timing.ratio(rounds, [1.0] * len(rounds), sittings)


def measure(figure: Figure, case: tuple[Record, ...]) -> timing.Ratio:
    """Median and interval of a figure from the records of a case.

    Medians that were timed separately may lie anywhere in their own intervals. These and that of
    the rounds hold at 95 % together, and the outermost bounds count.
    """
    if isinstance(figure, Counted):
        (value,) = figure(*case)
        return timing.Ratio(value, value, value, 1.0)
    if not isinstance(figure, Beside):
        return interval(figure(*case), case)
    others = figure.others(*case)
    alone = lambda rounds: timing.median_interval(rounds, 1 - 0.05 / (1 + len(others)))
    *ends, coverages = zip(*map(alone, others), strict=True)
    every = [alone(figure.rounds(medians, *case)) for medians in product(*zip(*ends, strict=True))]
    lows, highs, reached = zip(*every, strict=True)
    coverage = 1 - sum(1 - x for x in (*coverages, min(reached)))
    return timing.Ratio(median(figure(*case)), min(lows), max(highs), coverage)


def counts(every: Iterable[Outcome]) -> str:
    """``14 of 40 are met, 20 missed, 2 open and 4 not measured``."""
    kinds = [outcome.kind for outcome in every]
    missed, undecided, unknown, met = map(kinds.count, KINDS)
    others = f"{missed} missed, {undecided} open and {unknown} not measured"
    return f"{met} of {len(kinds)} are met, {others}"


# ----------------------------------------------------------------------------------------------
# Figures: a value for every round, from the records of a case
# ----------------------------------------------------------------------------------------------


def rows(record: Record) -> dict[str, Mapping[str, Any]]:
    """Measured rows by target."""
    return {row["target"]: row for row in measured(record)}


def times(record: Record, target: str) -> Rounds:
    """Milliseconds of one run, step or token.

    Raises:
        KeyError: the target was not measured.
    """
    row = rows(record)[target]
    if "samples_ms" in row:
        return row["samples_ms"]
    # a timed call of decoding may produce several tokens
    return [wall / record["settings"].get("steps", 1) for wall in row["samples"]["wall_ms"]]


def _quotients(numerators: Rounds, denominators: Rounds) -> Rounds:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def ms(target: str) -> Figure:
    """Milliseconds."""
    return lambda record: times(record, target)


def us(target: str) -> Figure:
    """Microseconds."""
    return lambda record: [1e3 * x for x in times(record, target)]


def together_us(*targets: str) -> Figure:
    """Microseconds of several operators, one after the other."""
    return lambda record: [
        1e3 * sum(x) for x in zip(*(times(record, name) for name in targets), strict=True)
    ]


def backward_us(target: str) -> Figure:
    """Microseconds that both passes take beyond the forward, which was timed separately."""
    return Beside(
        lambda both, forward: [times(forward, target)],
        lambda alone, both, _: [1e3 * (x - alone[0]) for x in times(both, target)],
    )


def backward_speedup(ours: str, peer: str) -> Figure:
    """How many times as fast our backward is as a peer's."""

    def quotients(alone: Sequence[float], both: Record, _: Record) -> Rounds:
        mine, theirs = (
            [x - forward for x in times(both, name)]
            for name, forward in zip((ours, peer), alone, strict=True)
        )
        return _quotients(theirs, mine)

    return Beside(lambda both, forward: [times(forward, name) for name in (ours, peer)], quotients)


def speedup(ours: str, *engines: str) -> Figure:
    """How many times as fast we are as the fastest timed engine of a peer."""

    def figure(record: Record) -> Rounds:
        timed = [times(record, name) for name in engines if name in rows(record)]
        if not timed:
            raise KeyError(engines)
        return _quotients(min(timed, key=median), times(record, ours))

    return figure


def growth(target: str) -> Figure:
    """Percent by which the first record's times exceed the median of the second's."""
    return Beside(
        lambda long, short: [times(short, target)],
        lambda before, long, _: [100 * (x / before[0] - 1) for x in times(long, target)],
    )


def over_bound(target: str) -> Figure:
    """Time over that of the bytes that are moved, at the memory rate of the same round."""

    def figure(record: Record) -> Rounds:
        read, moved = record["settings"][READ], rows(record)[target]["moved_bytes"]
        bounds = [moved / read["bytes"] * wall for wall in read["samples"]["wall_ms"]]
        return _quotients(times(record, target), bounds)

    return figure


def host_us(target: str) -> Figure:
    """Microseconds of an engine's step minus its kernels, which were profiled once."""

    def figure(record: Record) -> Rounds:
        row = rows(record)[target]
        kernels_ms = row["kernels_ms"] / record["settings"]["steps"]
        return [1e3 * (x - kernels_ms) for x in row["samples"]["step"]]

    return figure


def tokens_per_s(target: str) -> Figure:
    """Tokens of a step over its time."""

    def figure(record: Record) -> Rounds:
        tokens = record["settings"]["batch"] * record["settings"]["context"]
        return [1e3 * tokens / x for x in times(record, target)]

    return figure


def mfu(target: str) -> Figure:
    """Percent of the data sheet's FLOP/s, counting only the operations that the model needs."""

    def figure(record: Record) -> Rounds:
        least_ms = 1e3 * rows(record)[target]["flops"] / DEVICES["H200"].flops
        return [100 * least_ms / x for x in times(record, target)]

    return figure


def over_formula(name: str) -> Figure:
    """Bytes that a model keeps over those of the formula, or the inverse if they are fewer."""

    def value(record: Record) -> float:
        row = _of_model(record, name)
        quotient = row["state_bytes"] / row["expected_bytes"]
        return max(quotient, 1 / quotient)

    return Counted(value)


def state_growth(name: str) -> Figure:
    """Percent by which a model keeps more after the first record's context than after the
    second's."""
    kept = lambda record: _of_model(record, name)["state_bytes"]
    return Counted(lambda long, short: 100 * (kept(long) / kept(short) - 1))


def over_plan(name: str) -> Figure:
    """Peak memory of a model's training step over what `rodimus plan` says, or the inverse if it
    is less."""

    def value(record: Record) -> float:
        quotient = _of_model(record, name)["of_plan"]
        return max(quotient, 1 / quotient)

    return Counted(value)


def _of_model(record: Record, name: str) -> Mapping[str, Any]:
    """The only row of a model.

    Raises:
        KeyError: it was not measured.
    """
    found = [row for row in measured(record) if model_of(row["target"]) == name]
    if len(found) != 1:
        raise KeyError(name)
    return found[0]


# ----------------------------------------------------------------------------------------------
# The targets
# ----------------------------------------------------------------------------------------------

DDTS, FLA = "ddts/triton_chunk", "chunk_gla/fla"
ATTENTION, FLEX = "triton/expanded", "flex/expanded"
PLUS_MODEL = "rodimus-plus-1.6b"
PLUS, TRAINED = "rodimus-plus-1.6b/engine", "rodimus-plus-1.6b/dynamic"
GREEDY = "rodimus-plus-1.6b/greedy"
TORCH, PACKAGE = ("qwen2-1.5b/dynamic", "qwen2-1.5b/static"), "rwkv6-1.6b/package"
QWEN2, RWKV6 = (*TORCH, "qwen2-1.5b/llama.cpp"), (PACKAGE, "rwkv6-1.6b/llama.cpp")
AROUND = ("short_conv/triton", "input_gate/triton", "ddts_gates/triton", "gated_rms_norm/triton")
SHORT, LONG = "b8-t4096", "b1-t32768"
OVER_BOUND = "token over its bandwidth bound"


def ddts(what: str, shape: str) -> Cases:
    """A record of DDTS."""
    return ((f"ddts-{what}-{shape}-bfloat16-v4096",),)


def attention(shape: str, *passes: str) -> Cases:
    """Records of attention, all of one case."""
    return (tuple(f"attention-{what}-{shape}-bfloat16" for what in passes),)


def decode(*contexts: int, batch: int = 1) -> Cases:
    """Records of decoding, each a case."""
    return tuple((f"decode-b{batch}-t{context}-bfloat16",) for context in contexts)


def memory(*contexts: int) -> Cases:
    """Records of memory, each a case."""
    return tuple((f"memory-b1-t{context}-bfloat16",) for context in contexts)


def long(*shapes: str) -> Cases:
    """Records of training with long rows, each a case."""
    return tuple((f"long-{shape}-bfloat16-rodimus-plus-1.6b",) for shape in shapes)


def both(shape: str) -> Cases:
    """Records of attention from which its backward follows."""
    return attention(shape, "training", "forward")


over_fla, over_flex = speedup(DDTS, FLA), speedup(ATTENTION, FLEX)
backward, backward_over_flex = backward_us(ATTENTION), backward_speedup(ATTENTION, FLEX)
around, attend, decoded = together_us(*AROUND), us(ATTENTION), ms(PLUS)
# `auto` runs the step of DDTS in Triton and that of attention in CUDA
ddts_step, attention_step = us("ddts_step/triton"), us("step/native")
on_gpu, on_cpu = decode(1024, 4096, 32768, 131072), decode(128, 1024, 4096, 16384)
grown = (("decode-b1-t131072-bfloat16", "decode-b1-t4096-bfloat16"),)
step, engine_step = (("train-b4-t4096-bfloat16",),), (("engine-step-b64-t1024-bfloat16",),)

# operators are those of a layer of the 1.6B; tokens and training steps are of Rodimus+ 1.6B
ON_H200 = {
    "DDTS, 8 x 4,096": (us(DDTS), "<= 165 us", ddts("forward", SHORT)),
    "DDTS, 1 x 32,768": (us(DDTS), "<= 215 us", ddts("forward", LONG)),
    "DDTS and backward, 8 x 4,096": (us(DDTS), "<= 700 us", ddts("training", SHORT)),
    "DDTS, speedup over fla, 8 x 4,096": (over_fla, ">= 3 times", ddts("forward", SHORT)),
    "DDTS, speedup over fla, 1 x 32,768": (over_fla, ">= 3 times", ddts("forward", LONG)),
    "DDTS and backward, speedup over fla, 8 x 4,096": (
        over_fla,
        ">= 2 times",
        ddts("training", SHORT),
    ),
    "DDTS and backward, speedup over fla, 1 x 32,768": (
        over_fla,
        ">= 2 times",
        ddts("training", LONG),
    ),
    "convolution, gates and norm of DDTS": (around, "<= 640 us", ddts("surroundings", SHORT)),
    "convolution, gates and norm of DDTS, second goal": (
        around,
        "<= 330 us",
        ddts("surroundings", SHORT),
    ),
    "DDTS step, 1 sequence": (ddts_step, "<= 2.5 us", ddts("step", "b1-t1")),
    "DDTS step, 256 sequences": (ddts_step, "<= 150 us", ddts("step", "b256-t1")),
    "attention, 8 x 4,096": (attend, "<= 1,000 us", attention(SHORT, "forward")),
    "attention, 8 x 4,096, second goal": (attend, "<= 800 us", attention(SHORT, "forward")),
    "attention, 1 x 32,768": (attend, "<= 1,000 us", attention(LONG, "forward")),
    "backward of attention, 8 x 4,096": (backward, "<= 3,200 us", both(SHORT)),
    "backward of attention, 8 x 4,096, second goal": (backward, "<= 2,600 us", both(SHORT)),
    "backward of attention, 1 x 32,768": (backward, "<= 3,200 us", both(LONG)),
    "attention, speedup over Flex, 8 x 4,096": (
        over_flex,
        ">= 1 times",
        attention(SHORT, "forward"),
    ),
    "attention, speedup over Flex, 1 x 32,768": (
        over_flex,
        ">= 1 times",
        attention(LONG, "forward"),
    ),
    "backward of attention, speedup over Flex, 8 x 4,096": (
        backward_over_flex,
        ">= 1 times",
        both(SHORT),
    ),
    "backward of attention, speedup over Flex, 1 x 32,768": (
        backward_over_flex,
        ">= 1 times",
        both(LONG),
    ),
    "attention step, 1 sequence": (attention_step, "<= 5 us", attention("b1-t2112", "decode")),
    "attention step, 256 sequences": (
        attention_step,
        "<= 620 us",
        attention("b256-t2112", "decode"),
    ),
    "token, batch 1, any context": (decoded, "<= 1.1 ms", on_gpu),
    "token, batch 1, any context, second goal": (decoded, "<= 0.9 ms", on_gpu),
    "token after 131,072 tokens, beyond one after 4,096": (growth(PLUS), "<= 3 %", grown),
    "a token each, batch 256, full window": (decoded, "<= 19.5 ms", decode(4096, batch=256)),
    "engine, host time of a step at batch 64": (host_us(GREEDY), "<= 50 us", engine_step),
    "training step, rows of 4,096": (tokens_per_s(TRAINED), ">= 46,000 tokens/s", step),
    "training step, rows of 4,096, MFU": (mfu(TRAINED), ">= 50 %", step),
    "training, peak memory and its plan, the larger over the smaller": (
        over_plan(PLUS_MODEL),
        "<= 1.1 times",
        long("b1-t65536", "b16-t4096"),
    ),
    "state and cache after 131,072 tokens, beyond those after 4,096": (
        state_growth(PLUS_MODEL),
        "<= 0 %",
        (tuple(name for case in memory(131072, 4096) for name in case),),
    ),
}
ON_CPU = {
    **{
        f"{OVER_BOUND}, after {n:,}": (over_bound(PLUS), "<= 1.15 times", decode(n))
        for n in (128, 1024, 4096, 16384)
    },
    "token, speedup over Qwen2 in transformers, any context": (
        speedup(PLUS, *TORCH),
        "> 1 times",
        on_cpu,
    ),
    "token, speedup over RWKV6 of `rwkv`, any context": (
        speedup(PLUS, PACKAGE),
        "> 1 times",
        on_cpu,
    ),
    "token, speedup over Qwen2 in any engine, any context": (
        speedup(PLUS, *QWEN2),
        "> 1 times",
        on_cpu,
    ),
    "token, speedup over RWKV6 in any engine, any context": (
        speedup(PLUS, *RWKV6),
        "> 1 times",
        on_cpu,
    ),
    "demo model, tokens/s of the engine over modules": (
        speedup("demo/engine", "demo/modules"),
        ">= 5 times",
        (("demo-b1-t128-float32",),),
    ),
    # the first loop, before this project, trained four layers of Rodimus, the demo trains two of
    # Rodimus+: all that is left of the first is a rate, which cannot be compared
    "demo training over its first loop, tokens per core-second": (None, ">= 1.5 times", ()),
    "state and cache, bytes and their formula, the larger over the smaller": (
        over_formula(PLUS_MODEL),
        "<= 1 times",
        memory(1024, 4096, 32768),
    ),
    "state and cache after 32,768 tokens, beyond those after 4,096": (
        state_growth(PLUS_MODEL),
        "<= 0 %",
        (tuple(name for case in memory(32768, 4096) for name in case),),
    ),
}
TARGETS = tuple(
    Target(machine, name, *rest)
    for machine, targets in (("NVIDIA_H200", ON_H200), ("AMD_EPYC", ON_CPU))
    for name, rest in targets.items()
)
