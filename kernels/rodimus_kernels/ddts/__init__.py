"""DDTS, the recurrence of Rodimus: gates, sequence form, one-token step, segments."""

from .api import ddts, ddts_gates, ddts_step
from .gated import gated_ddts
from .mixer import ddts_mixer_step
from .segments import ddts_scan, ddts_summary

__all__ = [
    "ddts",
    "ddts_gates",
    "ddts_mixer_step",
    "ddts_scan",
    "ddts_step",
    "ddts_summary",
    "gated_ddts",
]
