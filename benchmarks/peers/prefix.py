"""A cache of transformers in buffers of a fixed size, which gives attention only what is written.

A static cache returns all of its places, and so needs a mask. Without one ``sdpa`` uses torch's
flash kernel, which divides long keys among programs and takes grouped heads as they are. Only the
host knows where a token is written: a CUDA graph of steps is bound to the places it was recorded
at, and replays decode there again.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer


class PrefixLayer(DynamicLayer):
    """Keys and values ``[B, H, written, D]``: the front of buffers that have room for more."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = [
            x.new_empty(*x.shape[:2], self.room, x.shape[-1]) for x in (key_states, value_states)
        ]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to what is written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        self.cut(end)
        return self.keys, self.values

    def cut(self, tokens: int) -> None:
        """Keep only the first ``tokens`` tokens."""
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)


def prefix_cache(layers: int, room: int) -> Cache:
    """An empty cache of ``layers`` layers."""
    return Cache(layers=[PrefixLayer(room) for _ in range(layers)])
