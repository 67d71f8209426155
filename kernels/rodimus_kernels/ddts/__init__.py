"""DDTS, the recurrence of Rodimus: gates, sequence form, one-token step."""

from .api import ddts, ddts_gates, ddts_step

__all__ = ["ddts", "ddts_gates", "ddts_step"]
