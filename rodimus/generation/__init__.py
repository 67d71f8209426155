"""Generation for many sequences at once, at constant memory and time per token."""

from .engine import Delta, Engine, Generation, Request, TokenLogprobs
from .sampling import SamplingParams
from .state import SequenceState, StateLayout, state_bytes
from .state_file import load_state, save_state

__all__ = [
    "Delta",
    "Engine",
    "Generation",
    "Request",
    "SamplingParams",
    "SequenceState",
    "StateLayout",
    "TokenLogprobs",
    "load_state",
    "save_state",
    "state_bytes",
]
