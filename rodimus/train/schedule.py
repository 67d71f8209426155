"""Learning-rate schedules: a pure function of the step, so a resumed run needs no state."""

from __future__ import annotations

import math

from .config import ScheduleSection


def lr_scale(step: int, steps: int, config: ScheduleSection) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``steps``, as a share of the peak.

    Warm-up is linear and reaches the peak at its last step; the end of the run reaches
    ``final_lr_frac``. ``wsd`` stays at the peak until the last ``decay_frac`` of the steps and then
    falls by ``1 - sqrt(progress)`` or linearly; ``cosine`` and ``linear`` fall from the warm-up on.
    """
    done = step + 1
    if done <= config.warmup_steps:
        return done / config.warmup_steps
    start = config.warmup_steps
    if config.kind == "wsd":
        start = max(start, steps - round(config.decay_frac * steps))
    progress = min(1.0, max(0.0, (done - start) / max(1, steps - start)))
    if config.kind == "cosine":
        fall = 0.5 - 0.5 * math.cos(math.pi * progress)
    elif config.kind == "wsd" and config.decay_shape == "1-sqrt":
        fall = math.sqrt(progress)
    else:
        fall = progress
    return 1.0 - (1.0 - config.final_lr_frac) * fall
