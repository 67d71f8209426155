"""Sliding-window shared-key attention, the attention of Rodimus+: sequence form and ring-cache
step."""

from .api import rope, shared_key_attention, shared_key_attention_step

__all__ = ["rope", "shared_key_attention", "shared_key_attention_step"]
