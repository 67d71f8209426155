"""Interleaved timing: targets take turns, so load and clock drift hit all of them alike.

On a shared machine a time alone says little; the ratio of two times of the same round says much
more. Every call is timed by three clocks: the wall, the process's CPU time, and on a GPU the
device's own events. The device is synchronised before a call, and again after it within the timing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

NOISE_LIMIT = 0.2
"""A timing whose (p80 - p20) / median is larger is marked noisy."""

AGREEMENT = 0.02
"""Warm-up ends when the medians of two successive batches of rounds differ by less."""

FEWEST_ROUNDS = 6
"""The fewest rounds whose range encloses the median with 95 % probability."""


class Sample(NamedTuple):
    """One call, in milliseconds; ``device_ms`` is None without a GPU."""

    wall_ms: float
    cpu_ms: float
    device_ms: float | None


class Summary(NamedTuple):
    """Middle and spread of a list of numbers."""

    median: float
    p20: float
    p80: float

    def in_ms(self) -> dict[str, float]:
        """Fields of a record's row: ``median_ms``, ``p20_ms``, ``p80_ms``."""
        return {f"{name}_ms": value for name, value in self._asdict().items()}

    @property
    def noisy(self) -> bool:
        """Whether the spread exceeds ``NOISE_LIMIT``."""
        return self.p80 - self.p20 > NOISE_LIMIT * self.median


class Ratio(NamedTuple):
    """Median of per-round ratios with an interval.

    For one sitting the interval encloses the median with probability ``coverage``; for several it
    contains that share of all rounds.
    """

    median: float
    low: float
    high: float
    coverage: float


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics, ``share`` in 0 .. 1."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(values: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile."""
    return Summary(statistics.median(values), quantile(values, 0.2), quantile(values, 0.8))


def median_interval(values: Sequence[float], coverage: float = 0.95) -> tuple[float, float, float]:
    """Interval of the median that assumes nothing about the distribution.

    The k-th smallest and k-th largest of n values enclose the median with probability
    1 - 2 P(Binomial(n, 1/2) < k). The narrowest pair that reaches ``coverage`` is taken; with
    fewer than six values none does, and the whole range is returned.

    Returns:
        ``(low, high, probability)``.
    """
    ordered, count = sorted(values), len(values)
    outside, best = 0.0, 1
    for k in range(1, count // 2 + 1):
        outside += math.comb(count, k - 1) / 2**count
        if 1 - 2 * outside >= coverage:
            best = k
    reached = 1 - 2 * sum(math.comb(count, j) for j in range(best)) / 2**count
    return ordered[best - 1], ordered[count - best], max(reached, 0.0)


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], sittings: Sequence[int] = ()
) -> Ratio:
    """Ratio of two targets that were timed in the same rounds.

    Args:
        numerators, denominators: Times in order of rounds.
        sittings: Rounds of each sitting, if there were several.

    Raises:
        ValueError: the two were not timed in the same rounds.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(
            f"expected as many rounds of both targets, got {len(numerators)} and"
            f" {len(denominators)}"
        )
    rounds = [a / b for a, b in zip(numerators, denominators, strict=True)]
    middle = statistics.median(rounds)
    if len(sittings) > 1:
        # a shared machine changes much more between sittings than within one: an interval of the
        # median of these sittings says nothing about the next
        if sum(sittings) != len(rounds):
            raise ValueError(f"expected {sum(sittings)} rounds of the sittings, got {len(rounds)}")
        return Ratio(middle, quantile(rounds, 0.025), quantile(rounds, 0.975), 0.95)
    return Ratio(middle, *median_interval(rounds))


class RoundRobin:
    """Targets that are called in turn, one call of each a round.

    Args:
        targets: Name and call of each; a call's result is dropped before the next one runs.
        device: Where they run.
        focus: The target that is timed last in each round; the others rotate.
        before: By name of a target, a function called before each of its calls, untimed.
        flush: Called before each call of any target, untimed, to leave nothing of the last ones in
            a cache. A GPU may still be flushing when the call is launched: wall time then includes
            the rest of the flush, device time does not, nor does it include waiting for the launch.
    """

    def __init__(
        self,
        targets: Mapping[str, Callable[[], object]],
        device: torch.device,
        focus: str,
        before: Mapping[str, Callable[[], object]] | None = None,
        flush: Callable[[], object] | None = None,
    ):
        if focus not in targets:
            raise ValueError(f"focus must be one of {sorted(targets)}, got {focus!r}")
        self.targets, self.device, self.focus = dict(targets), device, focus
        self.before, self.flush = dict(before or {}), flush
        self.samples: dict[str, list[Sample]] = {}
        self.clear()
        self._turn = 0

    def time(self, name: str) -> Sample:
        """Call one target and keep its sample."""
        call = self.targets[name]
        if name in self.before:
            self.before[name]()
        if self.device.type == "cuda":
            sample = self._time_on_gpu(call)
        else:
            if self.flush is not None:
                self.flush()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            sample = Sample(_ms_since(wall, time.perf_counter), _ms_since(cpu), None)
        self.samples[name].append(sample)
        return sample

    def _time_on_gpu(self, call: Callable[[], object]) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if self.flush is not None:
            self.flush()
        wall, cpu = time.perf_counter(), time.process_time()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return Sample(_ms_since(wall, time.perf_counter), _ms_since(cpu), start.elapsed_time(end))

    def time_others(self) -> None:
        """One call of every target but the focus, starting one further each round."""
        names = [name for name in self.targets if name != self.focus]
        shift = self._turn % len(names) if names else 0
        self._turn += 1
        for name in names[shift:] + names[:shift]:
            self.time(name)

    def time_focus(self) -> None:
        """One call of the focus: the part that pytest-benchmark times as well."""
        self.time(self.focus)

    def round(self) -> None:
        """One call of every target."""
        self.time_others()
        self.time_focus()

    def warm_up(self, *, batch: int, most: int) -> int:
        """Run rounds that are not kept, until two successive batches agree within ``AGREEMENT``.

        Args:
            batch: Rounds of one batch.
            most: Stop after this many rounds, agreed or not.

        Returns:
            The number of rounds that were run.
        """
        before: dict[str, float] = {}
        done = 0
        while done < most:
            self.clear()
            for _ in range(min(batch, most - done)):
                self.round()
                done += 1
            medians = {name: self.summary(name).median for name in self.targets}
            if before and all(abs(medians[n] / before[n] - 1) < AGREEMENT for n in medians):
                break
            before = medians
        self.clear()
        return done

    def settle(self, rounds: int, seconds: float = math.inf) -> tuple[int, int]:
        """Warm up for timed rounds.

        Args:
            rounds: Rounds that are wanted.
            seconds: If warm-up and all rounds would take longer than this, there are fewer, but no
                fewer than ``FEWEST_ROUNDS``.

        Returns:
            The rounds to time, and the rounds of warm-up that were run.
        """
        # clocks and caches of a GPU settle slowly, and its rounds are short
        most, done = (2 if self.device.type == "cuda" else 1) * rounds, 0
        if seconds < math.inf:
            before, done = time.monotonic(), 1
            self.round()
            affordable = int(seconds / (time.monotonic() - before))
            most = min(most, affordable // 3)
            rounds = max(min(rounds, 2 * affordable // 3), min(rounds, FEWEST_ROUNDS))
        return rounds, done + self.warm_up(batch=max(rounds // 3, 1), most=most)

    def clear(self) -> None:
        """Forget the samples."""
        self.samples = {name: [] for name in self.targets}
        self.sittings: list[int] = []

    def add_earlier(self, sittings: list[int], samples: Mapping[str, list[Sample]]) -> None:
        """Put earlier sittings' samples of the same targets before those of this one.

        Args:
            sittings: Rounds of each earlier sitting.
            samples: Samples of every target, in order of rounds.
        """
        self.sittings = [*sittings, len(self.samples[self.focus])]
        self.samples = {name: [*samples[name], *new] for name, new in self.samples.items()}

    def column(self, name: str, clock: str = "wall_ms") -> list[float]:
        """The samples of one target by one clock, in order of rounds."""
        return [getattr(sample, clock) for sample in self.samples[name]]

    def summary(self, name: str, clock: str = "wall_ms") -> Summary:
        """Middle and spread of one target by one clock."""
        return summarize(self.column(name, clock))


def _ms_since(start: float, clock: Callable[[], float] = time.process_time) -> float:
    return 1e3 * (clock() - start)
