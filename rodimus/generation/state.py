"""The state of sequences: its size to the byte, the engine's slots, and one sequence's snapshot.

A sequence of any length is a recurrent state and the last inputs of the short convolution in every
block and, in Rodimus+, the keys and values of the window. The engine holds them for all slots in
three tensors made once; a slot's window is a ring whose row ``p % R`` holds the token at position
p, so nothing is ever shifted. The values of that ring may be kept in 8 bits, those of a snapshot
never, so that caches, files and every engine can use it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from rodimus_kernels import (
    int8_row_bytes,
    read_ring,
    ring_parts,
    shared_key_attention_step,
    write_ring,
)

from ..configuration_rodimus import RodimusConfig
from ..modeling_rodimus import RING_TILE, adopt_cache


@dataclass(frozen=True)
class StateLayout:
    """Shapes and dtypes of one sequence's state.

    Attributes:
        layers: Number of blocks.
        key_dim, value_dim: The recurrent state of a block is ``[1, key_dim, value_dim]``.
        taps: Inputs of the convolution kept per channel; there are ``value_dim`` channels.
        window: Keys that a query sees, its own included; 0 without attention.
        row: Numbers that the window keeps per token: all key heads, then all value heads.
        key_row: How many of them are keys.
        head_dim: Channels of a head.
        dtype: Dtype of the taps and the window.
        state_dtype: Dtype of the recurrent state: float32 or wider.
        window_dtype: Dtype of the values in a slot's window: None for ``dtype``, or int8.
    """

    layers: int
    key_dim: int
    value_dim: int
    taps: int
    window: int
    row: int
    key_row: int
    head_dim: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    window_dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        config: RodimusConfig,
        dtype: torch.dtype,
        *,
        max_length: int | None = None,
        window_dtype: torch.dtype | None = None,
    ) -> "StateLayout":
        """The layout for a model's configuration and the dtype of its activations.

        Args:
            max_length: Most tokens of a sequence; only a Rodimus+ without a window needs it.
            window_dtype: Dtype of a slot's window values: None for ``dtype``, or ``torch.int8``.

        Raises:
            ValueError: the model attends to all earlier tokens and ``max_length`` is None, or
                ``window_dtype`` is another dtype, or given for a model without attention.
        """
        attends = config.block_type == "rodimus_plus"
        if window_dtype not in (None, torch.int8):
            raise ValueError(f"window_dtype must be None or torch.int8, got {window_dtype!r}")
        if window_dtype and not attends:
            raise ValueError(
                "the model has no attention window whose values could be int8:"
                f" expected window_dtype None, got {window_dtype}"
            )
        window = (config.sliding_window or max_length) if attends else 0
        if window is None:
            raise ValueError(
                "the model has no attention window, so its memory grows with the text:"
                " expected max_length, got None"
            )
        key_row = config.num_key_value_heads * config.head_dim if attends else 0
        value_row = config.num_value_heads * config.head_dim if attends else 0
        return cls(
            layers=config.n_layer,
            key_dim=config.mem_size,
            value_dim=config.d_inner,
            taps=config.mixer_cfg["d_conv"],
            window=window,
            row=key_row + value_row,
            key_row=key_row,
            head_dim=config.head_dim if attends else 0,
            dtype=dtype,
            state_dtype=torch.promote_types(dtype, torch.float32),
            window_dtype=window_dtype,
        )

    @property
    def ring_rows(self) -> int:
        """Rows R of a slot's ring: the window, rounded up to whole tiles."""
        return -(-self.window // RING_TILE) * RING_TILE

    def kept_rows(self, tokens: int) -> int:
        """How many of the ``tokens`` read so far the next token still sees in its window."""
        return min(tokens, max(self.window - 1, 0))

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """Key heads, their channels, value heads, their channels."""
        keys, values = self.key_row // self.head_dim, (self.row - self.key_row) // self.head_dim
        return keys, self.head_dim, values, self.head_dim

    def parts(self, window: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and their scales in a window ``[..., row]`` of either dtype, as views."""
        return ring_parts(window, *self.heads, self.dtype)

    def slot_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a slot, by kind; int8 values make a window bytes."""
        shapes = self.shapes(self.ring_rows)
        if self.window_dtype:
            row = int8_row_bytes(*self.heads, self.dtype)
            shapes["window"] = ((self.layers, self.ring_rows, row), torch.uint8)
        return shapes

    def shapes(self, window_rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a snapshot, by kind."""
        return {
            "recurrent": ((self.layers, 1, self.key_dim, self.value_dim), self.state_dtype),
            "convolution": ((self.layers, self.value_dim, self.taps), self.dtype),
            "window": ((self.layers, window_rows, self.row), self.dtype),
        }

    def check(self, state: "SequenceState") -> None:
        """Raise unless a snapshot has this layout.

        Raises:
            ValueError: a tensor has another shape or dtype.
        """
        shapes = self.shapes(self.kept_rows(len(state.tokens)))
        for kind, (shape, dtype) in shapes.items():
            found = getattr(state, kind)
            if (tuple(found.shape), found.dtype) != (shape, dtype):
                raise ValueError(
                    f"{kind} of the state must be {dtype} of shape {shape},"
                    f" got {found.dtype} of shape {tuple(found.shape)}"
                )

    def bytes(self, tokens: int | None = None) -> dict[str, int]:
        """Bytes of one sequence by kind: those of a slot, or of a snapshot after ``tokens``."""
        shapes = self.slot_shapes() if tokens is None else self.shapes(self.kept_rows(tokens))
        return {
            kind: torch.Size(shape).numel() * dtype.itemsize
            for kind, (shape, dtype) in shapes.items()
        }


def state_bytes(
    config: RodimusConfig,
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int | None = None,
    max_length: int | None = None,
    window_dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """Bytes that one sequence takes, by what they hold: recurrent, convolution, window.

    Args:
        config: The model's configuration.
        dtype: Dtype of its activations; the recurrent state is float32 or wider in any case.
        tokens: Count a state file, or a cache of ``model.generate``, after so many tokens; None
            counts a slot of the engine, whose ring is as long as the window from the start.
        max_length: Most tokens of a sequence, for a model without a window.
        window_dtype: Dtype of the values in a slot's window, as for the engine.
    """
    layout = StateLayout.of(config, dtype, max_length=max_length, window_dtype=window_dtype)
    return layout.bytes(tokens)


# ----------------------------------------------------------------------------------------------
# One sequence
# ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SequenceState:
    """Everything that a model knows of the tokens it has read, independent of engines and caches.

    Attributes:
        tokens: int64 ``[T]`` on the CPU: the tokens read.
        recurrent: ``[layers, 1, key_dim, value_dim]``, float32 or wider.
        convolution: ``[layers, value_dim, taps]``, oldest first.
        window: ``[layers, rows, row]``: keys and values of the last tokens, oldest first.
    """

    tokens: Tensor
    recurrent: Tensor
    convolution: Tensor
    window: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the state, without the list of tokens."""
        return self.recurrent.nbytes + self.convolution.nbytes + self.window.nbytes

    @classmethod
    def from_cache(cls, cache: Cache, tokens: Tensor, row: int = 0) -> "SequenceState":
        """A copy of the state in a row of a cache; ``tokens`` are all that the row has read, except
        for padding on the left."""
        layers = cache.layers
        recurrent = torch.stack([layer.recurrent_states[0][row] for layer in layers])
        convolution = torch.stack([layer.conv_states[0][row] for layer in layers])
        window = convolution.new_zeros(len(layers), 0, 0)
        if getattr(layers[0], "keys", None) is not None:
            newest = (row, 0, slice(-len(tokens), None))
            parts = ([x.keys[newest] for x in layers], [x.values[newest] for x in layers])
            window = torch.cat([torch.stack(part) for part in parts], -1)
        return cls(tokens, recurrent, convolution, window)

    def to_cache(self, config: RodimusConfig, layout: StateLayout) -> DynamicCache:
        """A transformers cache that continues after the tokens read, and shares no memory."""
        cache = adopt_cache(DynamicCache(config=config))
        for i, layer in enumerate(cache.layers):
            layer.update_conv_state(self.convolution[i, None], conv_kernel_size=layout.taps)
            layer.update_recurrent_state(self.recurrent[i, None])
            if layout.window:
                parts = (layout.key_row, layout.row - layout.key_row)
                layer.update(*self.window[i, None, None].clone().split(parts, -1))
            layer.cumulative_length = len(self.tokens)
        return cache

    def to(self, device: torch.device | str) -> "SequenceState":
        """The same state with its tensors on a device; the tokens stay."""
        moved = (x.to(device) for x in (self.recurrent, self.convolution, self.window))
        return SequenceState(self.tokens, *moved)


# ----------------------------------------------------------------------------------------------
# Slots
# ----------------------------------------------------------------------------------------------


class SlotLayer(LinearAttentionLayer):
    """Cache of one block for the first B slots: views of the engine's tensors.

    The state and the taps are where transformers' layers have them. The layer computes attention
    itself, because the rows of a batch hold different numbers of tokens; each reads its own ring.
    """

    def __init__(
        self,
        recurrent: Tensor,
        convolution: Tensor,
        ring: Tensor,
        positions: Tensor,
        window: int,
    ):
        super().__init__()
        self.recurrent_states, self.conv_states = {0: recurrent}, {0: convolution}
        self.is_recurrent_states_initialized = self.is_conv_states_initialized = {0: True}
        self.has_previous_state = {0: True}
        self.conv_kernel_size = {0: convolution.shape[-1]}
        self.ring, self.positions, self.window = ring, positions, window

    can_step = True

    def step_position(self) -> Tensor:
        """int64 ``[B]``: tokens that each slot has read before a fused step."""
        return self.positions

    def step_states(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(taps, state, ring)`` for a fused step; the engine counts the token."""
        return self.conv_states[0], self.recurrent_states[0], self.ring if self.window else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
        """Write one token per row to the ring, then attend; q, k, v: ``[B, 1, heads, dim]``."""
        dtype = self.conv_states[0].dtype
        return shared_key_attention_step(
            q,
            k.to(dtype),
            v.to(dtype),
            self.ring,
            self.positions,
            window_size=self.window,
            scale=scale,
        )


class SlotCache(Cache):
    """Cache of the first B slots, for one token per row."""

    # A broken row ends its own sequence: the model must not give up the whole batch for it.
    isolates_rows = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: the rows have different lengths, so positions are always given to the model."""
        return 0


class SlotStates:
    """The states of all slots, made once: no tensor of a sequence is allocated while it runs.

    Attributes:
        recurrent: ``[layers, slots, 1, key_dim, value_dim]``.
        convolution: ``[layers, slots, value_dim, taps]``.
        ring: ``[layers, slots, R, row]``, uint8 where values have 8 bits; empty without attention.
        positions: int64 ``[slots]``: tokens that each slot has read.
    """

    def __init__(self, layout: StateLayout, slots: int, device: torch.device | str):
        self.layout, self.slots = layout, slots
        self.recurrent, self.convolution, self.ring = (
            torch.zeros((shape[0], slots, *shape[1:]), dtype=dtype, device=device)
            for shape, dtype in layout.slot_shapes().values()
        )
        self.positions = torch.zeros(slots, dtype=torch.long, device=device)
        self._caches: dict[int, SlotCache] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all slots: ``slots`` times what ``state_bytes`` says."""
        return self.recurrent.nbytes + self.convolution.nbytes + self.ring.nbytes

    def write(self, slot: int, state: SequenceState) -> None:
        """Put a sequence into a slot, over whatever was there."""
        read, rows = len(state.tokens), state.window.shape[1]
        self.recurrent[:, slot] = state.recurrent
        self.convolution[:, slot] = state.convolution
        if self.layout.window:
            # including masked rows, because a weight of zero times a stale NaN would be NaN
            self.ring[:, slot] = 0
            at = torch.arange(read - rows, read, device=self.ring.device) % self.layout.ring_rows
            keys, values, _ = self.layout.parts(state.window)
            write_ring(self.layout.parts(self.ring[:, slot]), (slice(None), at), keys, values)
        self.positions[slot] = read

    def read(self, slot: int, tokens: Tensor) -> SequenceState:
        """A copy of the sequence in a slot, which has read ``tokens``.

        A window with 8-bit values is dequantised, and writing it back gives the same bytes.
        """
        window = self.ring[:, slot, :0]
        if self.layout.window:
            rows = self.layout.kept_rows(len(tokens))
            at = torch.arange(len(tokens) - rows, len(tokens), device=self.ring.device)
            parts = self.layout.parts(self.ring[:, slot, at % self.layout.ring_rows])
            window = torch.cat([x.flatten(-2) for x in read_ring(parts, self.layout.dtype)], -1)
        kept = (self.recurrent[:, slot].clone(), self.convolution[:, slot].clone(), window)
        return SequenceState(tokens, *kept)

    def move(self, source: int, target: int) -> None:
        """Let the sequence of one slot go on in another."""
        for tensor in (self.recurrent, self.convolution, self.ring):
            tensor[:, target] = tensor[:, source]
        self.positions[target] = self.positions[source]

    def clear(self) -> None:
        """Empty all slots."""
        for tensor in (self.recurrent, self.convolution, self.ring, self.positions):
            tensor.zero_()

    def cache(self, batch: int) -> SlotCache:
        """The cache of slots 0 to ``batch - 1``."""
        if batch not in self._caches:
            layers = []
            for i in range(self.layout.layers):
                tensors = (self.recurrent, self.convolution, self.ring)
                views = (x[i, :batch] for x in tensors)
                layers.append(SlotLayer(*views, self.positions[:batch], self.layout.window))
            self._caches[batch] = SlotCache(layers=layers)
        return self._caches[batch]
