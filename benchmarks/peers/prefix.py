"""A cache of transformers in buffers of a fixed size, of which attention gets what is written.

A static cache hands out every place it has, and so needs a mask. Without one ``sdpa`` has torch's
flash kernel, which divides long keys among programs and takes grouped heads as they are. Where a
token is written is known to the host alone: a CUDA graph of steps is one of their places, and
replays decode there again.
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
        """Write behind what is there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = new
        self.cut(end)
        return self.keys, self.values

    def cut(self, tokens: int) -> None:
        """Hold the first tokens and no others."""
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)


def prefix_cache(layers: int, room: int) -> Cache:
    """An empty cache of so many layers."""
    return Cache(layers=[PrefixLayer(room) for _ in range(layers)])
