"""DDTS, the recurrence of Rodimus: gates, sequence form, one-token step."""

from .api import ddts, ddts_gates, ddts_step
from .mixer import ddts_mixer_step

__all__ = ["ddts", "ddts_gates", "ddts_mixer_step", "ddts_step"]
