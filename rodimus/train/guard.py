"""When loss or gradient goes wrong: skip the update, roll back, or stop, on all ranks together.

Every rank judges the same reduced numbers, so all reach the same verdict without communicating.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from .config import GuardSection

logger = logging.getLogger(__name__)

OK, SKIP, ROLLBACK = "ok", "skip", "rollback"
# good steps before spikes are looked for: at the start of a run the loss still falls steeply
_WARMUP = 50
# weight of the newest loss in the running mean and variance: a memory of about 20 steps
_NEWEST = 0.05


class RunStopped(RuntimeError):
    """The guard ended the run; the message says at which step and why."""


@dataclass
class _Statistics:
    mean: float = 0.0
    variance: float = 0.0
    good: int = 0
    bad_in_a_row: int = 0


class Guard:
    """Judges every step by its loss and gradient norm.

    Args:
        config: What counts as a spike and what happens then.
        state: What ``state()`` returned, from a checkpoint; empty at the start of a run.
    """

    def __init__(self, config: GuardSection, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self.seen = _Statistics(**(state or {}))

    def state(self) -> dict[str, Any]:
        """Plain numbers for the checkpoint."""
        return asdict(self.seen)

    def judge(self, step: int, loss: float, grad_norm: float) -> str:
        """Returns ``ok``, ``skip`` (drop this update) or ``rollback`` (to the last checkpoint).

        Raises:
            RunStopped: too many bad steps in a row, or a spike where ``on_spike = stop``.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            limit = self._limit()
            if loss <= limit:
                self._learn(loss)
                return OK
            reason, action = f"loss {loss:.4f} is above {limit:.4f}", self.config.on_spike
        else:
            reason, action = f"loss {loss}, gradient norm {grad_norm}", SKIP
        self.seen.bad_in_a_row += 1
        count, most = self.seen.bad_in_a_row, self.config.max_bad_steps
        if action == "stop" or count >= most:
            raise RunStopped(f"stopped at step {step}: {reason} ({count} bad steps in a row)")
        logger.warning("step %d: %s: %s (%d of %d)", step, reason, action, count, most)
        return action

    def _limit(self) -> float:
        if self.config.spike_sigma == 0 or self.seen.good < _WARMUP:
            return math.inf
        # a flat loss has almost no deviation, so at least 1% of the mean is used
        deviation = max(math.sqrt(self.seen.variance), 0.01 * abs(self.seen.mean))
        return self.seen.mean + self.config.spike_sigma * deviation

    def _learn(self, loss: float) -> None:
        seen = self.seen
        share = max(_NEWEST, 1.0 / (seen.good + 1))
        delta = loss - seen.mean
        seen.mean += share * delta
        seen.variance = (1 - share) * (seen.variance + share * delta * delta)
        seen.good += 1
        seen.bad_in_a_row = 0
