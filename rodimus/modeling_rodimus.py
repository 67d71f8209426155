"""Rodimus and Rodimus+ for transformers: cache layers, mixer, attention, MLP, block, models.

The mathematics is in the operators; this file arranges them under the released parameter names and
adds what transformers needs to generate, train, pad, pack and roll back. It imports torch,
transformers and the operators, and falls back to the reference that an exported folder carries, so
the same file runs with or without the package.

Rodimus* (arXiv 2410.06577). Dimensions: B batch, T time, S cached and new keys, D d_model.
"""

import importlib
import math
import re
from dataclasses import dataclass
from functools import wraps
from itertools import chain, starmap, zip_longest
from operator import is_
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as module_hooks
from transformers import initialization as init
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticCache,
)
from transformers.generation import GenerationMixin
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_cuda_stream_capturing, is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_rodimus import RodimusConfig

try:
    from rodimus_kernels import (
        BlockWeights,
        Int4Weight,
        Int8Weight,
        add_rms_norm,
        blocks_step,
        can_fuse_block,
        ddts,
        ddts_gates,
        ddts_step,
        decode_weight,
        gated_ddts,
        gated_rms_norm,
        input_gate,
        linear,
        linear_cross_entropy,
        multiplies_slowly,
        rms_norm,
        rope,
        rope_tables,
        shared_key_attention_step,
        short_conv,
        swiglu,
    )
    from rodimus_kernels.reference import RESET, check_cu_seqlens, document_ids, expand_heads
except ModuleNotFoundError as error:
    if error.name != "rodimus_kernels":
        raise
    from .reference_rodimus import (
        RESET,
        add_rms_norm,
        check_cu_seqlens,
        ddts_gates,
        ddts_step,
        document_ids,
        expand_heads,
        gated_ddts,
        gated_rms_norm,
        input_gate,
        linear_cross_entropy,
        rms_norm,
        rope,
        rope_tables,
        shared_key_attention_step,
        short_conv,
        swiglu,
    )
    from .reference_rodimus import ddts_chunk as ddts

    blocks_step = None
except ImportError as error:
    raise ImportError(
        f"the installed rodimus_kernels is of another version than {__name__}: {error}. Install"
        " the package rodimus of that version; or import the installed one before an exported"
        " model is loaded, which then uses its own code of the model."
    ) from error

logger = logging.get_logger(__name__)

# The first and the last minor version of transformers that this file was tested with.
TRANSFORMERS_VERSIONS = ("5.17", "5.24")


def _minor_version(version):
    """``(5, 25)`` of 5.25.0.dev0 or 5.25rc1."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


_first, _last = map(_minor_version, TRANSFORMERS_VERSIONS)
if not _first <= _minor_version(transformers.__version__) <= _last:
    logger.warning(
        f"expected transformers {' to '.join(TRANSFORMERS_VERSIONS)}, got"
        f" {transformers.__version__}: what the model generates may be wrong without an error."
    )

if blocks_step is None:
    logger.warning(
        "The model runs in plain torch, which is slow: rodimus_kernels is not installed. It comes"
        " with the package rodimus."
    )

# Rings of static caches and engine slots have a multiple of this many places: whole kernel tiles.
RING_TILE = 64

# transformers' name for a cache, both as an argument and as an output field.
CACHE_NAME = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)

# A selection-gate pre-activation at which a token neither writes to the state nor decays it.
_CLOSED = -1e30


# ----------------------------------------------------------------------------------------------
# Cache layers: transformers' own, plus a token count and rollback
# ----------------------------------------------------------------------------------------------


class _RecurrentCacheLayer:
    """Rollback and batch selection of the state: what both block types add to transformers' layers.

    While the past is recorded (speculative decoding), the layer keeps the state before the newest
    tokens and those tokens' keys, values and decays; ``crop`` reruns the recurrence over the tokens
    that stay. Rollback is exact, and costs no memory unless the past is recorded."""

    # How many of the newest tokens can be rolled back; more until the next crop, for a long draft.
    max_rollback = 128

    recorded = checkpoint = ring = window = None

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def can_step(self) -> bool:
        """Whether a fused step can advance this layer: it has read tokens and records nothing."""
        return self.has_previous_state[0] and not self.record_past

    def step_position(self):
        """int64 ``[B]``: tokens that each row has read before a fused step, the same in all layers;
        None without a ring."""
        return None

    def step_states(self):
        """``(taps, state, ring)`` that a fused step advances in place by one token; this call
        counts the token."""
        ring = self.as_ring()
        self.cumulative_length += 1
        return self.conv_states[0], self.recurrent_states[0], ring

    def as_ring(self):
        return None

    def update_conv_state(self, conv_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        seen, new = super().update_conv_state(conv_states, *args, **kwargs), conv_states.shape[-1]
        kept, most = self.conv_states[0], self.max_rollback + self.conv_kernel_size[0]
        if new > self.max_rollback and kept.shape[-1] > most:
            self.conv_states[0] = kept[..., -most:].clone()
        return seen

    def record(self, state, k, v, log_decay):
        """Append tokens to the record; an empty record starts from ``state``."""
        if self.recorded is None:
            self.checkpoint = state.clone()
            self.recorded = (k, v, log_decay)
        else:
            new = zip(self.recorded, (k, v, log_decay), strict=True)
            self.recorded = tuple(torch.cat(pair, dim=1) for pair in new)
        if self.recorded[0].shape[1] > 2 * self.max_rollback:
            self._forget_oldest()

    def _forget_oldest(self):
        """Keep the last ``max_rollback`` recorded tokens and the convolution inputs before them."""
        most = self.max_rollback
        k, v, log_decay = (x[:, :-most] for x in self.recorded)
        start = {"initial_state": self.checkpoint, "output_final_state": True}
        self.checkpoint = ddts(k, k, v, log_decay, **start)[1]
        self.recorded = tuple(x[:, -most:].clone() for x in self.recorded)
        taps = self.conv_states[0]
        self.conv_states[0] = taps[..., -most - self.conv_kernel_size[0] :].clone()

    def forget_record(self):
        self.recorded = self.checkpoint = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest ``-tokens_to_remove`` tokens; 0 only ends the current record."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the tokens to remove, got {tokens_to_remove}")
        removed = -tokens_to_remove
        if removed and not self.is_croppable:
            raise RuntimeError("a static window cannot be rolled back: use DynamicCache")
        self.leave_inference_mode()
        if self.is_recurrent_states_initialized[0]:
            if removed:
                self._rewind(removed)
            width = self.conv_kernel_size[0]
            # a text shorter than the convolution begins with zeros, as where nothing is recorded
            taps = F.pad(self.conv_states[0], (width, 0))
            kept = taps[..., : taps.shape[-1] - removed][..., -width:]
            self.conv_states[0] = kept.contiguous()
        self.forget_record()
        self.crop_keys(removed)
        self.max_rollback = type(self).max_rollback

    def _rewind(self, removed):
        held = 0 if self.recorded is None else self.recorded[0].shape[1]
        if removed > held:
            raise RuntimeError(
                f"cannot remove {removed} tokens: the state is recorded for the last {held} only."
                " Call activate_past_recording() on the cache before the tokens are added."
            )
        state = self.checkpoint
        if removed < held:
            k, v, log_decay = (x[:, : held - removed] for x in self.recorded)
            state = ddts(k, k, v, log_decay, initial_state=state, output_final_state=True)[1]
        self.recurrent_states[0].copy_(state)

    def reset(self) -> None:
        self.leave_inference_mode()
        LinearAttentionLayer.reset(self)
        self.forget_record()

    def leave_inference_mode(self) -> bool:
        """Outside ``torch.inference_mode``, clone the layer's tensors if they were made in it,
        because those cannot be written in place there. Returns whether they were cloned."""
        written = (self.conv_states.get(0), self.recurrent_states.get(0), self.ring)
        held = any(x is not None and x.is_inference() for x in written)
        leaves = held and not torch.is_inference_mode_enabled()
        if leaves:
            self.batch_select(torch.clone)
        return leaves

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.batch_select(lambda x: x[indices])

    def batch_select(self, select):
        """Apply ``select``, a function over the batch dimension, to every tensor of the layer."""
        if self.is_conv_states_initialized[0]:
            self.conv_states[0] = select(self.conv_states[0])
        if self.is_recurrent_states_initialized[0]:
            self.recurrent_states[0] = select(self.recurrent_states[0])
        if self.ring is not None:
            self.ring = select(self.ring)
        elif getattr(self, "keys", None) is not None and self.is_initialized:
            self.keys, self.values = select(self.keys), select(self.values)
        if self.recorded is not None:
            self.checkpoint = select(self.checkpoint)
            self.recorded = tuple(map(select, self.recorded))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select(lambda x: x.index_select(0, beam_idx.to(x.device)))


class RodimusStateLayer(_RecurrentCacheLayer, LinearAttentionLayer, CacheLayerMixin):
    """Cache of a Rodimus block: convolution taps, state, and how many tokens they hold.

    transformers' linear-attention layer does not count tokens, so a cache of such layers cannot
    tell ``generate`` its length. The count is a number on the host, so no step can be compiled."""

    is_sliding = is_compileable = False

    def __init__(self, number_of_states: int = 1):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.is_initialized = True
        self.cumulative_length = 0

    def update_conv_state(self, conv_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.cumulative_length += conv_states.shape[-1]
        return super().update_conv_state(conv_states, *args, **kwargs)

    def update(self, key_states, value_states, *args, **kwargs):
        raise TypeError("a Rodimus block has no keys and values to cache, it has a state")

    def crop_keys(self, removed):
        self.cumulative_length -= removed

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0


class _TokensRead:
    """How much a static cache has read: int64 counters on the device, which recorded and compiled
    steps can advance too. All layers share them; the model advances them after the last block.

    Attributes:
        places: 0-dimensional; places read per row, padding included. None before the first token.
        tokens: ``[B]``; how many of them are tokens, not padding.
        owner: The layer that reorders and crops the counters.
    """

    places = tokens = owner = None

    def start(self, batch: int, device: torch.device) -> None:
        """Create both counters at zero unless they exist."""
        if self.tokens is None:
            self.places = torch.zeros((), dtype=torch.long, device=device)
            self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.places)
                torch._dynamo.mark_static_address(self.tokens)

    def count(self, places: int, tokens: torch.Tensor | int) -> None:
        self.places += places
        self.tokens += tokens

    def reset(self) -> None:
        if self.tokens is not None:
            self.places.zero_()
            self.tokens.zero_()


class RodimusStaticLayer(_RecurrentCacheLayer, LinearAttentionLayer, CacheLayerMixin):
    """Layer of a static cache, for steps that a CUDA graph or a compiler records: nothing in a step
    depends on a number on the host, and no tensor is replaced.

    In a Rodimus+ block the window is a ring of R places; token p of a row is at ``p % R`` as
    ``[keys | values]``. Padding is not counted, so rows may hold different numbers of tokens."""

    def __init__(self, read: _TokensRead, window: int | None, number_of_states: int = 1):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.read, self.window = read, window
        if read.owner is None:
            read.owner = self
        self.is_sliding, self.is_initialized = window is not None, True

    def update_conv_state(self, conv_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.read.start(conv_states.shape[0], conv_states.device)
        return super().update_conv_state(conv_states, *args, **kwargs)

    # -- the window ----------------------------------------------------------------------------

    def _start_ring(self, new):
        """Allocate the ring in whole kernel tiles; new: ``[B, T, keys and values]``."""
        places = -(-self.window // RING_TILE) * RING_TILE
        self.ring = new.new_zeros(new.shape[0], places, new.shape[2])
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.ring)

    @property
    def can_step(self) -> bool:
        return super().can_step and (self.ring is not None or not self.is_sliding)

    def step_position(self):
        return self.read.tokens if self.is_sliding else None

    def step_states(self):
        return self.conv_states[0], self.recurrent_states[0], self.ring

    def attend(self, q, k, v, *, scale):
        """Write one token per row to the ring, then attend; q, k, v: ``[B, 1, heads, dim]``."""
        if self.ring is None:
            self._start_ring(torch.cat((k.flatten(2), v.flatten(2)), dim=-1))
        # autocast may have begun or ended since the ring was made
        dtype = v.dtype
        q, k, v = (x.to(self.ring.dtype) for x in (q, k, v))
        # blocks may be on several devices; the count is on the first block's
        read = self.read.tokens.to(q.device, non_blocking=True)
        o = shared_key_attention_step(
            q, k, v, self.ring, read, window_size=self.window, scale=scale
        )
        return o.to(dtype)

    def update(self, key_states, value_states, *args, tokens=None, **kwargs):
        """Write several tokens per row, and return the keys and values they attend to: the window
        before them, in order, and their own.

        Args:
            key_states, value_states: ``[B, 1, T, *]``.
            tokens: bool ``[B, T]``, False for padding, which precedes a row's first token; None
                if there is no padding.
        """
        if not self.is_sliding:
            raise TypeError("a Rodimus block has no keys and values to cache, it has a state")
        new = torch.cat((key_states, value_states), dim=-1)[:, 0]
        if self.ring is None:
            self._start_ring(new)
        length, room = new.shape[1], self.ring.shape[1]
        kept = self._kept()
        past = self._rows(torch.arange(-kept, 0, device=new.device))
        seen = torch.cat((self.ring.gather(1, past), new), dim=1)[:, None]
        written = min(length, room)
        places = torch.arange(length - written, length, device=new.device)
        if tokens is not None:
            # padding lands before position 0, where no query looks
            places = places - (~tokens).sum(1, keepdim=True)
        self.ring.scatter_(1, self._rows(places), new[:, -written:].to(self.ring.dtype))
        return seen.split((key_states.shape[-1], value_states.shape[-1]), dim=-1)

    def _kept(self) -> int:
        """How many of the places already read the next token can still see."""
        read = 0 if self.read.places is None else int(self.read.places)
        return min(read, self.window - 1)

    def _rows(self, places):
        """Ring index ``[B, n, row]`` of the tokens at ``places``, counted from the next token."""
        read = self.read.tokens.to(places.device, non_blocking=True)
        rows = (read[:, None] + places) % self.ring.shape[1]
        return rows[..., None].expand(*rows.shape, self.ring.shape[2])

    # -- interface of transformers -------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        return not self.is_sliding

    def crop_keys(self, removed):
        if self.read.owner is self:
            self.read.count(-removed, -removed)

    def batch_select(self, select):
        super().batch_select(select)
        if self.read.owner is self and self.read.tokens is not None:
            self.read.tokens = select(self.read.tokens)
            # one number for all rows; cloned so that it leaves inference mode with them
            self.read.places = self.read.places.clone()

    def get_seq_length(self):
        return 0 if self.read.places is None else self.read.places.clone()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        read = int(self.get_seq_length())
        kept = read if self.ring is None else self._kept()
        return kept + query_length, read - kept

    def get_max_length(self) -> int:
        return self.window if self.is_sliding else -1

    def reset(self) -> None:
        super().reset()
        self.read.reset()
        if self.ring is not None:
            self.ring.zero_()


class _HybridReset:
    """Drop the keys on reset: transformers 5.17 zeroes them and keeps their length."""

    def reset(self) -> None:
        super().reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0


class RodimusSlidingLayer(
    _HybridReset, _RecurrentCacheLayer, LinearAttentionAndSlidingWindowAttentionLayer
):
    """Cache of a Rodimus+ block: the state, and the keys and values of the window.

    A fused step keeps the window as a ring, with token p of a row at ``p % window``, so that a new
    token shifts nothing. Reading ``keys`` or ``values`` puts them back in order and drops the ring.

    Attributes:
        padding: ``[B, 1]``, padding before each row's first token; 0 if no query would see it.
    """

    _keys = _values = None
    padding = 0

    @property
    def window(self) -> int:
        """Keys that a query sees, its own included."""
        return self.sliding_window

    def lazy_initialization(self, *args, **kwargs):
        if not args:
            return super().lazy_initialization(**kwargs)
        # transformers copies the window's size to the device, and waits for all work queued there
        DynamicLayer.lazy_initialization(self, *args)
        size = self._sliding_window_tensor
        self._sliding_window_tensor = size.to(self.device, non_blocking=True)

    def update(self, key_states, value_states, *args, **kwargs):
        """As in transformers, but the first keys and values are kept without a concatenation, and
        of a long prompt only the window is kept, where transformers keeps a view of everything."""
        if self.is_initialized or self.record_past:
            seen = super().update(key_states, value_states, *args, **kwargs)
        else:
            seen = key_states, value_states
            self.lazy_initialization(*seen)
            self.cumulative_length += key_states.shape[-2]
            self.keys, self.values = seen
        most = self.sliding_window - 1 + (2 * self.max_rollback if self.record_past else 0)
        held = max(x.shape[-2] for x in (seen[0], self._keys))
        # a single token may leave a surplus row for the next to free; while recording, many rows
        few = self.max_rollback if self.record_past else 1
        if held > most + (few if key_states.shape[-2] == 1 else 0):
            self.keys, self.values = (x[:, :, -most:].clone() for x in (self._keys, self._values))
        return seen

    def skip_padding(self, padding):
        """Hide from fused steps the ``padding [B]`` places at the start of each row."""
        if not torch.is_tensor(self.padding):
            self._put_in_order()
            self.padding = padding.to(self.device)[:, None]

    def step_position(self):
        taps = self.conv_states[0]
        places = torch.full(taps.shape[:1], self.cumulative_length, device=taps.device)
        return places - self.padding[:, 0] if torch.is_tensor(self.padding) else places

    def as_ring(self):
        """``[B, window, keys and values]``."""
        read = self.cumulative_length
        if self.ring is None:
            rows = torch.cat((self._keys, self._values), dim=-1)[:, 0]
            self._key_row = self._keys.shape[-1]
            self.ring = rows.new_zeros(rows.shape[0], self.sliding_window, rows.shape[2])
            self.ring.scatter_(1, self._places(read - rows.shape[1], read), rows)
            self._keys = self._values = None
        self._end = read + 1
        return self.ring

    def _places(self, start, end):
        """Ring index ``[B, n, row]`` of the places from ``start`` up to but not including ``end``,
        which count padding."""
        batch, _, row = self.ring.shape
        places = torch.arange(start, end, device=self.ring.device) - self.padding
        places = (places % self.sliding_window).expand(batch, -1)
        return places[..., None].expand(-1, -1, row)

    def _put_in_order(self):
        if self.ring is not None:
            start = max(self._end - self.sliding_window + 1, 0)
            rows = self.ring.gather(1, self._places(start, self._end))[:, None]
            sizes = (self._key_row, rows.shape[-1] - self._key_row)
            self.ring = None
            self._keys, self._values = rows.split(sizes, dim=-1)
        self.padding = 0

    def batch_select(self, select):
        super().batch_select(select)
        if torch.is_tensor(self.padding):
            self.padding = select(self.padding)

    @property
    def keys(self):
        self._put_in_order()
        return self._keys

    @keys.setter
    def keys(self, keys):
        self._put_in_order()
        self._keys = keys

    @property
    def values(self):
        self._put_in_order()
        return self._values

    @values.setter
    def values(self, values):
        self._put_in_order()
        self._values = values

    def crop_keys(self, removed):
        DynamicSlidingWindowLayer.crop(self, -removed)


class RodimusFullLayer(_HybridReset, _RecurrentCacheLayer, LinearAttentionAndFullAttentionLayer):
    """Cache of a Rodimus+ block without a window: the state, and all keys and values."""

    can_step = False

    # The state stays on the device: it does not grow, and the mixer reads it before the attention
    # waits for the prefetched keys and values.

    def offload(self):
        DynamicLayer.offload(self)

    def prefetch(self):
        DynamicLayer.prefetch(self)

    def crop_keys(self, removed):
        DynamicLayer.crop(self, -removed)


def _recurrent_state(layer):
    """State ``[B, 1, K, V]`` of a cache layer; None before the first token or without a cache."""
    if layer is None or not layer.has_previous_state[0]:
        return None
    return layer.recurrent_states[0]


def only_cache(cache, past_key_values):
    """The cache given under either of its two names, or None.

    Raises:
        ValueError: two different caches are given.
    """
    if None not in (cache, past_key_values) and cache is not past_key_values:
        raise ValueError(
            "expected one cache, got cache and past_key_values, which are two names of the same"
            f" argument; generate() of transformers {transformers.__version__} takes {CACHE_NAME}"
        )
    return past_key_values if cache is None else cache


def adopt_cache(cache: Cache | None) -> Cache | None:
    """Replace a cache's fresh stock layers with ours, in place; layers that are in use are kept.

    Layers that do not grow are not offloaded, because transformers prefetches only layers that
    attend to every token, and fails if there are none."""
    read = _TokensRead()
    for i, layer in enumerate(cache.layers if isinstance(cache, Cache) else ()):
        if type(layer) is LinearAttentionLayer and isinstance(cache, StaticCache):
            ours = RodimusStaticLayer(read, None, layer.number_of_states)
        elif type(layer) is LinearAttentionAndStaticSlidingWindowAttentionLayer:
            if layer.is_initialized:
                continue
            # transformers' max_cache_len is the smaller of the window and the cache's capacity
            cache.layers[i] = RodimusStaticLayer(read, layer.max_cache_len, layer.number_of_states)
            continue
        elif type(layer) is LinearAttentionLayer:
            ours = RodimusStateLayer(number_of_states=layer.number_of_states)
        elif type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            ours = RodimusSlidingLayer(layer.sliding_window, layer.number_of_states)
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            ours = RodimusFullLayer(layer.number_of_states)
        else:
            continue
        for name, value in vars(layer).items():
            setattr(ours, name, value)
        cache.layers[i] = ours
    may_leave = getattr(cache, "offloading", False)
    if may_leave and not any(type(layer) is RodimusFullLayer for layer in cache.layers):
        logger.warning_once("The cache does not grow with the tokens: it stays on the device.")
        cache.offloading = False
    if not torch.compiler.is_compiling():
        _leave_inference_mode(cache)
    return cache


def _leave_inference_mode(cache):
    """All layers are written in the same mode, so only the first is checked."""
    layers = getattr(cache, "layers", ())
    if layers and isinstance(layers[0], _RecurrentCacheLayer) and layers[0].leave_inference_mode():
        for layer in layers[1:]:
            layer.leave_inference_mode()


def _record_at_least(cache, tokens):
    """Let a recording cache roll back the newest ``tokens`` until it is cropped. Not more, because
    a long prompt that is read together with a draft must not be recorded with it."""
    for layer in getattr(cache, "layers", ()):
        if getattr(layer, "record_past", False):
            layer.max_rollback = max(layer.max_rollback, tokens)


def _has_rings(cache) -> bool:
    """Whether single tokens attend to the cache's own rings, which need no mask for padding."""
    layers = getattr(cache, "layers", ())
    return any(isinstance(layer, RodimusStaticLayer) and layer.is_sliding for layer in layers)


# ----------------------------------------------------------------------------------------------
# Padding and packing: where the tokens of a batch are
# ----------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the new tokens of a batch are, as passed to the blocks.

    Attributes:
        tokens: bool ``[B, T]`` in the left-padded layout, False for padding; None without padding.
        order: ``[B, T]``, source index of each place of the layout; None for the identity.
        pads: ``[B]``, padding that would separate the new tokens from cached ones, or None.
        attention: The mask for the attention implementation in that layout; None if it needs
            none.
        documents: ``[B, T]``, document index of each token of packed rows, or None.
        context: Access to the pieces of the rows on other ranks, or None.
    """

    tokens: torch.Tensor | None = None
    order: torch.Tensor | None = None
    pads: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    context: object | None = None


NO_PADDING = Layout()


def _left_padded(attention_mask):
    """The mask of the same rows with all padding moved to the front: bool ``[B, S]``."""
    length = attention_mask.shape[1]
    padding = length - attention_mask.sum(1, keepdim=True)
    return torch.arange(length, device=attention_mask.device) >= padding


def _padding_layout(attention_mask, length, has_static_keys) -> Layout:
    """How the new tokens of a padded batch are laid out, without the attention mask.

    Blocks run on left-padded rows, where padding neither separates tokens nor follows them. Rows
    that are padded elsewhere are permuted into that layout, which the cache keeps too.
    """
    if length == 1 and is_tracing(attention_mask):
        return NO_PADDING
    given = attention_mask[:, -length:]
    if is_tracing(given):
        order = torch.argsort(given.int(), dim=1, stable=True)
        return Layout(given.gather(1, order), order)
    if given.all():
        return NO_PADDING
    tokens, order, pads = _left_padded(given), None, None
    if not torch.equal(tokens, given):
        order = torch.argsort(given.int(), dim=1, stable=True)
    cached = attention_mask[:, :-length].any(1)
    if (cached & ~tokens[:, 0]).any():
        if has_static_keys:
            raise ValueError(
                "padding after cached tokens needs a dynamic cache: a static one cannot move its"
                " keys. Use DynamicCache, or left-pad the new tokens' first chunk only."
            )
        pads = length - tokens.sum(1)
    return Layout(tokens, order, pads)


def _close_gap(x, pads, new):
    """Move the padding at the start of x's last ``new`` places to the front; x: ``[B, S, ...]``."""
    places = torch.arange(x.shape[1], device=x.device)
    cached, pads = x.shape[1] - new, pads[:, None]
    source = torch.where(places < pads, places + cached, places - pads)
    source = torch.where(places >= cached + pads, places, source)
    return x.gather(1, source.view(*source.shape, *(1,) * (x.dim() - 2)).expand_as(x))


def _documents(position_ids, cu_seqlens, length, is_packed):
    """Document index of each token in packed rows: ``[B or 1, T]``, None if nothing is packed."""
    if cu_seqlens is not None:
        return document_ids(cu_seqlens, length)[None]
    if position_ids is None or length == 1 or is_packed is False:
        return None
    jumps = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if is_packed is None and not (is_tracing(jumps) or jumps.is_meta) and not jumps.any():
        return None
    return F.pad(jumps.long(), (1, 0)).cumsum(1)


def _mask_of_documents(config, embeds, documents):
    """Attention mask of packed rows ``documents [B, T]``, from the mask interface itself: given
    positions, transformers would detect the packing again and wait for the device."""
    if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
        return None
    (batch, length), window = documents.shape, config.sliding_window
    causal = causal_mask_function
    if window is not None:
        causal = sliding_window_causal_mask_function(window)
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=batch,
        q_length=length,
        kv_length=length,
        q_offset=0,
        kv_offset=0,
        mask_function=and_masks(causal, packed_sequence_mask_function(documents)),
        attention_mask=None,
        allow_is_causal_skip=False,
        local_size=window,
        dtype=embeds.dtype,
        config=config,
        use_vmap=False,
        device=embeds.device,
    )


def _position_in_document(documents):
    """0, 1, 2, ... within each document of packed rows: ``[B, T]``."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.where(_document_starts(documents), places, 0)
    return places - starts.cummax(1).values


def _document_starts(documents):
    return documents != F.pad(documents, (1, 0), value=-1)[:, :-1]


# ----------------------------------------------------------------------------------------------
# Nothing attached: when parameters may be read instead of calling the module that holds them
# ----------------------------------------------------------------------------------------------
#
# A fused operator equals the modules only while these do what their classes say. A hook, an
# adapter, a quantiser, an offloaded weight or a patched forward must never be skipped: a wrong
# "yes" gives a wrong result. But checks take time, and a small model's token leaves little:
#
# - `_is_compiled`, `_is_step`, `_has_global_hooks` check flags of the call, before anything else.
# - `_is_plain` checks one layer, in every forward; a compiler can trace it.
# - `_is_bare` checks the call of one module, `_is_untouched` a module and everything in it: tens
#   of microseconds per block, never traced by a compiler.
# - `_is_sharded` checks whether FSDP alone wraps an untouched block and gathers its weights not
#   only for `forward` but also for `forward_unsummed`.
# - `_Inspection` remembers the blocks as they were when untouched. Checking that they are unchanged
#   takes a few microseconds per block and happens before every token.


def _is_compiled(x) -> bool:
    """Whether a compiler traces the call. Capturing a CUDA graph by hand does not count, although
    transformers calls it tracing: the graph replays all launches, fused operators too. A compiler
    cannot trace the check for a capture, so it comes last."""
    if torch.compiler.is_compiling():
        return True
    # a plain tensor needs fewer checks, and every token waits for them
    traces = torch.jit.is_tracing() if type(x) is torch.Tensor else is_tracing(x)
    return traces and not is_cuda_stream_capturing()


def _is_step(x) -> bool:
    """Whether x ``[B, T, D]`` is one token per row that operators without a gradient may take."""
    return x.shape[1] == 1 and _is_free(x)


def _is_free(x) -> bool:
    """Whether operators without a gradient may take x: no gradient, compiler, autocast or hook."""
    return (
        blocks_step is not None
        and not torch.is_grad_enabled()
        and not _is_compiled(x)
        and not torch.is_autocast_enabled(x.device.type)
        and not _has_global_hooks()
    )


def _has_global_hooks() -> bool:
    """Whether a global hook runs with every module."""
    forward = module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks
    backward = module_hooks._global_backward_hooks or module_hooks._global_backward_pre_hooks
    return bool(forward or backward)


def _is_plain(layer, kind):
    """Whether a layer is its class and parameters and nothing else: no adapter, quantiser or hook,
    and no patched forward, by which accelerate loads offloaded parameters. A layer that was
    compiled on its own passes, because it computes the same."""
    attached = (layer._forward_hooks, layer._forward_pre_hooks, "forward" in vars(layer))
    attached += (layer._backward_hooks, layer._backward_pre_hooks)
    held = (x for x in layer._parameters.values() if x is not None)
    # a tensor of another class may hold more than its values, as a quantised weight does
    whole = all(type(x) in (torch.Tensor, nn.Parameter) for x in held)
    return type(layer) is kind and whole and not any(attached)


_HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CALLS = ("_compiled_call_impl", "forward")
_NUMBERS = ("eps", "normalize_epsilon", "head_dim")


def _is_bare(module) -> bool:
    """Whether calling the module runs its class's forward and nothing else. Hooks with which
    transformers captures outputs are allowed: after one use they stay attached, but idle."""
    found = module.__dict__
    hooks = found["_forward_hooks"].values()
    return not any(found.get(name) for name in (*_HOOKS, *_CALLS)) and all(
        hook.__module__ == capture_outputs.__module__ for hook in hooks
    )


def _is_untouched(module) -> bool:
    """Whether a module and everything in it compute what their classes say."""
    parts = module.__dict__["_modules"].values()
    return type(module) in _KINDS and _is_bare(module) and all(map(_is_untouched, parts))


def _is_sharded(block) -> bool:
    """Whether torch's ``fully_shard`` alone wraps a block and also serves ``forward_unsummed``:
    ``register_fsdp_forward_method`` gives the instance a method of that name."""
    found, (*wrappers, kind) = vars(block), type(block).__bases__
    hooks = (*found["_forward_pre_hooks"].values(), *found["_forward_hooks"].values())
    attached = ("_backward_hooks", "_backward_pre_hooks", *_CALLS)
    return (
        kind is RodimusBlock
        and "forward_unsummed" in found
        and all(x.__module__.startswith("torch.distributed.fsdp") for x in (*wrappers, *hooks))
        and not any(found.get(name) for name in attached)
        and all(map(_is_untouched, block.children()))
    )


class _Inspection:
    """A snapshot of an untouched module, to see quickly whether it has changed since.

    Attributes:
        step: The blocks' arguments for a fused step, once they have been searched for."""

    step, is_searched = None, False

    def __init__(self, module: nn.Module):
        self.parts = list(module.modules())
        self.kinds = list(map(type, self.parts))
        self.names = list(map(vars, self.parts))
        self.hooks = [names[hook] for names in self.names for hook in _HOOKS]
        self.captures = [names["_forward_hooks"] for names in self.names]
        # ids of hooks, which are never reused
        self.captured = list(chain.from_iterable(self.captures))
        # patching forward or the compiled call adds a name, unless the instance had one before
        self.counts = list(map(len, self.names))
        own = ("_compiled_call_impl", *_NUMBERS)
        self.places = [(names, key) for names in self.names for key in own if key in names]
        self.values = list(starmap(dict.get, self.places))
        tables = [names[kind] for names in self.names for kind in ("_modules", "_parameters")]
        # views are read in sequence; lookups touch more memory, all uncached after each token
        self.tables = [table.values() for table in tables if table]
        self.held = list(chain.from_iterable(self.tables))
        # tensors that wrap others have no address; they are never replaced in place
        self.tensors = [held for held in self.held if type(held) in (torch.Tensor, nn.Parameter)]
        self.addresses = list(map(torch.Tensor.data_ptr, self.tensors))

    def is_unchanged(self) -> bool:
        """Whether all parts, parameters and numbers are the same, in the same memory, and nothing
        is attached."""
        return (
            not any(self.hooks)
            and list(chain.from_iterable(self.captures)) == self.captured
            and list(map(len, self.names)) == self.counts
            and list(map(type, self.parts)) == self.kinds
            and list(starmap(dict.get, self.places)) == self.values
            and all(starmap(is_, zip_longest(chain.from_iterable(self.tables), self.held)))
            and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
        )


# ----------------------------------------------------------------------------------------------
# Norms
# ----------------------------------------------------------------------------------------------


class RodimusRMSNorm(nn.Module):
    """RMSNorm, computed in float32 or wider and returned in the dtype of its weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, eps=self.eps)


class RodimusAddRMSNorm(RodimusRMSNorm):
    """Adds a branch to the residual stream; returns the normalised sum and the sum."""

    def forward(self, branch, stream):
        return add_rms_norm(branch, stream, self.weight, eps=self.eps)


class RodimusGatedRMSNorm(RodimusRMSNorm):
    """Norm of ``(x + residual * residual_weight) * silu(gate)``."""

    def forward(self, x, gate, residual, residual_weight):
        return gated_rms_norm(
            x,
            gate,
            self.weight,
            eps=self.eps,
            residual=residual,
            residual_weight=residual_weight,
        )


# ----------------------------------------------------------------------------------------------
# The mixer: short convolution, tempered gates, recurrence
# ----------------------------------------------------------------------------------------------


class RodimusShortConv(nn.Conv1d):
    """Causal depthwise convolution with silu over ``[B, T, channels]``."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, channels, width, groups=channels)

    def forward(self, x, past=None, documents=None):
        weight = self.weight.squeeze(1)
        return short_conv(x, weight, self.bias, initial_state=past, seq_idx=documents)[0]


class RodimusGateLinear(nn.Linear):
    """Linear layer whose bias is added in float32: decays near 1 do not survive bfloat16."""

    def forward(self, x):
        product = _product if _multiplies_slowly(x) else F.linear
        return self.add_bias(product(x, self.weight))

    def add_bias(self, y):
        return y.to(torch.promote_types(y.dtype, torch.float32)) + self.bias


class _Products(torch.autograd.Function):
    """Products of one input with several weights. The input's gradients are summed inside the
    products, in their float32, instead of in passes over memory."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        dys, rows, dx = [dy.flatten(0, -2) for dy in dys], x.flatten(0, -2), None
        if needs_x:
            dx = dys[0] @ weights[0]
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                torch.addmm(dx, dy, weight, out=dx)
            dx = dx.view_as(x)
        return dx, *(dy.t() @ rows if need else None for dy, need in zip(dys, needs, strict=True))


def _project(x, *layers):
    """The output of each layer for x."""
    if _sums_in_products(x, *layers):
        return _Products.apply(x, *(layer.weight for layer in layers))
    return tuple(_apply(layer, x) for layer in layers)


def _project_to_halves(x, layer):
    """The two halves of a layer's output for x: where possible two products, so that the gradients
    of the halves need not be concatenated."""
    if _sums_in_products(x, layer):
        return _Products.apply(x, *layer.weight.chunk(2))
    return _apply(layer, x).chunk(2, dim=-1)


def _apply(layer, x, is_step=False):
    """The output of a linear layer for x: by our operator where torch's product is slow, as it is
    for a step and for half precision on a CPU without instructions for it."""
    by_operator = (is_step or _multiplies_slowly(x)) and _is_untouched(layer)
    return _product(x, layer.weight, layer.bias) if by_operator else layer(x)


def _product(x, weight, bias=None):
    """``F.linear`` without a gradient, by our operator if it supports the weight."""
    matrix = decode_weight(weight)
    plain = type(matrix) is nn.Parameter and matrix.dtype == x.dtype
    is_quantized = type(matrix) in (Int4Weight, Int8Weight)
    if plain or (is_quantized and x.device.type == "cpu"):
        return linear(x.flatten(0, -2), matrix, bias).unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


def _multiplies_slowly(x):
    """Whether torch's products are slow for x, and an operator without a gradient may be used."""
    half = not x.is_cuda and x.dtype.itemsize == 2
    return half and _is_free(x) and multiplies_slowly(x.device, x.dtype)


def _sums_in_products(x, *layers):
    """Whether :class:`_Products`, which ``torch.func`` transforms do not support, should sum the
    gradients of x through the layers. On a CPU the sum is cheap beside the products."""
    differentiated = x.is_cuda and torch.is_grad_enabled() and not _is_compiled(x)
    plain = differentiated and not torch._C._are_functorch_transforms_active()
    return plain and _are_products(x, *layers)


def _are_products(x, *layers):
    """Whether the layers are nothing but products with x, in its dtype."""
    if not all(_is_plain(layer, nn.Linear) and layer.bias is None for layer in layers):
        return False
    same_dtype = all(layer.weight.dtype == x.dtype for layer in layers)
    return same_dtype and not torch.is_autocast_enabled(x.device.type)


def _out_linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection back to the stream: the more branches add to the stream, the smaller its init.

    It has no class of its own because quantisers replace ``nn.Linear`` alone. transformers
    initialises the modules that own parameters, so an attribute marks the layer."""
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.ends_branch = True
    return layer


class RodimusInnerMixer(nn.Module):
    """Gates and recurrence on the expanded channels (paper section 3.1)."""

    def __init__(self, config: RodimusConfig, layer_idx: int):
        super().__init__()
        width, keys, rank = config.d_inner, config.mem_size, config.input_gate_rank
        self.layer_idx = layer_idx
        self.normalize_epsilon = config.normalize_epsilon
        conv = RodimusShortConv(width, config.mixer_cfg["d_conv"])
        self.short_conv = nn.ModuleDict({"conv1d": conv})
        self.residual_weight = nn.Parameter(torch.ones(width))
        self.in_proj = nn.Linear(width, 2 * keys, bias=False)
        self.ch_gate_proj = nn.Sequential(
            nn.Linear(width, rank, bias=False), nn.Linear(rank, width), nn.Sigmoid()
        )
        self.mem_gate_proj = RodimusGateLinear(width, 2 * keys)

    def forward(self, x, layout, cache=None):
        """From x ``[B, T, d_inner]`` the recurrence's output and the convolved x, shaped alike, and
        the latter's weight ``[d_inner]``, which if offloaded is loaded during this call only."""
        tokens, documents = layout.tokens, layout.documents
        if tokens is not None:
            x = x * tokens[..., None]
        layer = None if cache is None else cache.layers[self.layer_idx]
        # The state is read first: updating the taps marks the layer as started.
        state = _recurrent_state(layer)
        shifted = self._convolve(x, layout, cache)

        q, k, select, temper = self._project(shifted)
        v = self._gate_input(x)
        if tokens is not None:
            # Padding neither writes to the state nor decays it; v is zero because x is.
            closed = max(_CLOSED, torch.finfo(select.dtype).min)
            select = select.masked_fill(~tokens[..., None], closed)
        starts = None if documents is None else _document_starts(documents)

        one_head = (y.unsqueeze(2) for y in (q, k, v, select, temper))
        o = self._recur(*one_head, starts, layout.context, state, layer, cache)
        return o.squeeze(2), shifted, self.residual_weight

    def _project(self, x):
        """Raw q and k, and the pre-activations of both gates, each ``[B, T, K]``."""
        if self._joins_weights(x):
            weight = torch.cat((self.in_proj.weight, self.mem_gate_proj.weight))
            keys, gates = F.linear(x, weight).chunk(2, dim=-1)
            gates = self.mem_gate_proj.add_bias(gates)
        else:
            keys, gates = _apply(self.in_proj, x), self.mem_gate_proj(x)
        return *keys.chunk(2, dim=-1), *gates.chunk(2, dim=-1)

    def _joins_weights(self, x):
        """Whether one product, which reads x only once, saves more than joining the weights costs:
        reading and writing twice in_proj's size. On a CPU it was measured to gain nothing."""
        plain = x.is_cuda and self._projections_are_plain()
        return plain and x.numel() > 4 * self.in_proj.weight.numel()

    def _projections_are_plain(self):
        plain = _is_plain(self.in_proj, nn.Linear)
        return plain and _is_plain(self.mem_gate_proj, RodimusGateLinear)

    def _gate_input(self, x):
        """The value: x times its low-rank gate."""
        gate = self.ch_gate_proj
        plain = _is_plain(gate, nn.Sequential) and _is_plain(gate[1], nn.Linear)
        if plain and _is_plain(gate[2], nn.Sigmoid):
            return input_gate(x, _apply(gate[0], x), gate[1].weight, gate[1].bias)
        return gate(x) * x

    def _convolve(self, x, layout, cache):
        conv = self.short_conv["conv1d"]
        if layout.context is not None:
            return layout.context.convolve(conv, x)
        if cache is None:
            return conv(x, documents=layout.documents)
        layer, length, width = (
            cache.layers[self.layer_idx],
            x.shape[1],
            conv.kernel_size[0],
        )
        started = layer.has_previous_state[0]
        taps = cache.update_conv_state(x.transpose(1, 2), self.layer_idx, conv_kernel_size=width)
        if not started:
            return conv(x)
        if layout.pads is not None:
            taps = _close_gap(taps.transpose(1, 2), layout.pads, length).transpose(1, 2)
            kept = layer.conv_states[0]
            kept.copy_(taps[..., -kept.shape[-1] :])
        past, new = taps[..., :-length], taps[..., -length:]
        return conv(new.transpose(1, 2), past=F.pad(past, (width, 0))[..., -width:])

    def _recur(self, q, k, v, select, temper, starts, context, state, layer, cache):
        """The recurrence from raw projections ``[B, T, 1, K]``; where keys and decays are needed
        separately, their gates are applied first."""
        eps, record = self.normalize_epsilon, layer is not None and layer.record_past
        step = q.shape[1] == 1 and state is not None and not torch.is_grad_enabled()
        if context is None and not record and not step:
            options = {"initial_state": state, "output_final_state": layer is not None}
            o, state = gated_ddts(q, k, v, select, temper, eps=eps, starts=starts, **options)
            if layer is not None:
                cache.update_recurrent_state(state, self.layer_idx)
            return o
        k, log_decay = ddts_gates(k, select, temper, eps=eps)
        if starts is not None:
            log_decay = log_decay.masked_fill(starts[..., None, None], RESET)
        if context is not None:
            return context.recur(q, k, v, log_decay)
        if record:
            return self._recur_recorded(q, k, v, log_decay, state, layer, cache)
        one_token = (x.squeeze(1) for x in (q, k, v, log_decay))
        return ddts_step(*one_token, state).unsqueeze(1)

    def _recur_recorded(self, q, k, v, log_decay, state, layer, cache):
        """The recurrence in two parts, so that the newest tokens can be rolled back."""
        split = max(q.shape[1] - layer.max_rollback, 0)
        outputs = []
        if split:
            head = (x[:, :split] for x in (q, k, v, log_decay))
            o, state = ddts(*head, initial_state=state, output_final_state=True)
            outputs.append(o)
            layer.forget_record()
            # recorded tensors must not be views that keep a long prompt alive
            q, k, v, log_decay = (x[:, split:].clone() for x in (q, k, v, log_decay))
        if state is None:
            dtype = torch.promote_types(v.dtype, torch.float32)
            state = v.new_zeros(v.shape[0], 1, k.shape[-1], v.shape[-1], dtype=dtype)
        layer.record(state, k, v, log_decay)
        o, state = ddts(q, k, v, log_decay, initial_state=state, output_final_state=True)
        cache.update_recurrent_state(state, self.layer_idx)
        return torch.cat((*outputs, o), dim=1)


class RodimusMixer(nn.Module):
    """Expansion into a branch and a gate, inner mixer, gated norm, projection back."""

    def __init__(self, config: RodimusConfig, layer_idx: int):
        super().__init__()
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.fc = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        self.inner_mixer = RodimusInnerMixer(config, layer_idx)
        self.act_norm = RodimusGatedRMSNorm(config.d_inner, config.norm_epsilon)
        self.out_proj = _out_linear(config.d_inner, config.d_model)

    def forward(self, hidden_states, layout, cache=None):
        x, gate = _project_to_halves(hidden_states, self.fc)
        o, shifted, residual_weight = self.inner_mixer(x, layout, cache)
        y = self.act_norm(o, gate, shifted, residual_weight)
        y = F.dropout(y, self.activation_dropout, self.training)
        return F.dropout(_apply(self.out_proj, y), self.dropout, self.training)


# ----------------------------------------------------------------------------------------------
# Attention and MLP of Rodimus+
# ----------------------------------------------------------------------------------------------


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs
):
    """Attention written out for ``attn_implementation="eager"``, which can return its weights."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    dtype = torch.promote_types(weights.dtype, torch.float32)
    weights = F.softmax(weights, dim=-1, dtype=dtype).to(query.dtype)
    o = F.dropout(weights, dropout, module.training) @ value
    return o.transpose(1, 2).contiguous(), weights


def _as_given(weights, order):
    """Attention weights ``[B, H, T, T]`` of the left-padded layout in the order of the input."""
    place = order.argsort(1)
    weights = weights.gather(2, place[:, None, :, None].expand_as(weights))
    return weights.gather(3, place[:, None, None, :].expand_as(weights))


class RodimusAttention(nn.Module):
    """Sliding-window attention with shared keys and a value head per query head (section 3.2).

    Keys and values are cached with their heads folded into the last dimension, ``[B, 1, S, Hx *
    dim]``, so that transformers' cache layers can keep one key head beside many value heads."""

    is_causal = True
    # Heads are expanded before the attention interface is called.
    num_key_value_groups = 1

    def __init__(self, config: RodimusConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.sliding_window = config.sliding_window
        self.scaling = self.head_dim**-0.5
        self.attention_dropout, self.dropout = config.attention_dropout, config.dropout
        width = config.d_model
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_value_heads * self.head_dim, bias=False)
        self.out_proj = _out_linear(width, width)

    def forward(self, hidden_states, rotary, layout, cache=None, **kwargs):
        length = hidden_states.shape[1]
        projected = _project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        if rotary is not None:
            q, k = rope(q, *rotary), rope(k, *rotary)
        layer = None if cache is None else cache.layers[self.layer_idx]
        if hasattr(layer, "attend") and length == 1 and layout.attention is None:
            # rings attend by themselves, because their rows hold different numbers of tokens
            o, weights = layer.attend(q, k, v, scale=self.scaling), None
        elif layout.context is not None:
            window = self.sliding_window
            o = layout.context.attend(q, k, v, window_size=window, scale=self.scaling)
            weights = None
        else:
            o, weights = self._attend(q, k, v, layout, cache, **kwargs)
            if weights is not None and layout.order is not None and weights.shape[-1] == length:
                weights = _as_given(weights, layout.order)
        o = _apply(self.out_proj, o.flatten(2))
        return F.dropout(o, self.dropout, self.training), weights

    def _attend(self, q, k, v, layout, cache, **kwargs):
        if cache is not None:
            k, v = self._cache(k, v, layout, cache)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attend(
            self,
            q.transpose(1, 2),
            expand_heads(k, self.num_heads),
            expand_heads(v, self.num_heads),
            layout.attention,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )

    def _cache(self, k, v, layout, cache):
        length, pads = k.shape[1], layout.pads
        new = (x.flatten(2)[:, None] for x in (k, v))
        keys, values = cache.update(*new, self.layer_idx, tokens=layout.tokens)
        if self.sliding_window is not None and cache.layers[self.layer_idx].record_past:
            # transformers 5.17 returns everything recorded, more than its own mask covers
            visible = self.sliding_window - 1 + length
            keys, values = keys[:, :, -visible:], values[:, :, -visible:]
        if pads is not None:
            keys, values = (_close_gap(x[:, 0], pads, length)[:, None] for x in (keys, values))
            layer = cache.layers[self.layer_idx]
            held = layer.keys.shape[2]
            layer.keys, layer.values = keys[:, :, -held:], values[:, :, -held:]
        return (x[:, 0].unflatten(-1, (-1, self.head_dim)) for x in (keys, values))


class RodimusMLP(nn.Module):
    """Gated MLP: ``out(silu(g) * x)`` with x and g the halves of one projection, in that order."""

    def __init__(self, config: RodimusConfig):
        super().__init__()
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.fc = nn.Linear(config.d_model, 2 * config.intermediate_size, bias=False)
        self.out_proj = _out_linear(config.intermediate_size, config.d_model)

    def forward(self, hidden_states):
        y = swiglu(_apply(self.fc, hidden_states))
        y = F.dropout(y, self.activation_dropout, self.training)
        return F.dropout(_apply(self.out_proj, y), self.dropout, self.training)


# ----------------------------------------------------------------------------------------------
# Block and models
# ----------------------------------------------------------------------------------------------


class RodimusBlock(GradientCheckpointingLayer):
    """One block; takes and returns the residual stream ``[B, T, D]``.

        rodimus:       h + mixer(norm(h))
        rodimus_plus:  h' = h + mixer(norm(h));  a = attention(norm(h'));  h' + mlp(norm(h' + a))

    The attention output reaches the stream through the MLP alone, as in the released models.
    """

    def __init__(self, config: RodimusConfig, layer_idx: int):
        super().__init__()
        self.mixer_norm = RodimusRMSNorm(config.d_model, config.norm_epsilon)
        self.mixer = RodimusMixer(config, layer_idx)
        self.is_plus = config.block_type == "rodimus_plus"
        if self.is_plus:
            self.attn_norm = RodimusAddRMSNorm(config.d_model, config.norm_epsilon)
            self.attn = RodimusAttention(config, layer_idx)
            self.ffn_norm = RodimusAddRMSNorm(config.d_model, config.norm_epsilon)
            self.ffn = RodimusMLP(config)

    def forward(self, stream, rotary, layout, cache=None, **kwargs):
        order = layout.order
        if order is not None:
            order = order[..., None].expand_as(stream)
            stream = stream.gather(1, order)
        # the class's method: what wraps the instance's has already wrapped this call
        stream, branch = RodimusBlock.forward_unsummed(
            self, stream, None, rotary, layout, cache, **kwargs
        )
        stream = stream + branch
        return stream if order is None else torch.zeros_like(stream).scatter(1, order, stream)

    def forward_unsummed(self, stream, branch, rotary, layout, cache=None, **kwargs):
        """The stream and a branch still to be added to it, from those of the previous block."""
        normed, stream = _add_then_norm(self.mixer_norm, stream, branch)
        branch = self.mixer(normed, layout, cache)
        if self.is_plus:
            normed, stream = self.attn_norm(branch, stream)
            attended, _ = self.attn(normed, rotary, layout, cache, **kwargs)
            branch = self.ffn(self.ffn_norm(attended, stream)[0])
        return stream, branch

    def step_weights(self):
        """The block's weights for a fused step; None if a projection has an unexpected bias."""
        inner = self.mixer.inner_mixer
        conv, (gate_in, gate_out, _) = inner.short_conv["conv1d"], inner.ch_gate_proj
        mixer = (self.mixer.fc, inner.in_proj, gate_in, self.mixer.out_proj)
        attn = ffn = ()
        if self.is_plus:
            attn = (self.attn.q_proj, self.attn.k_proj, self.attn.v_proj, self.attn.out_proj)
            ffn = (self.ffn.fc, self.ffn.out_proj)
        if any(linear.bias is not None for linear in (*mixer, *attn, *ffn)):
            return None
        fc, query_key, gate_in, mixer_out = (decode_weight(linear.weight) for linear in mixer)
        weights = BlockWeights(
            mixer_norm=self.mixer_norm.weight,
            fc=fc,
            conv=conv.weight.squeeze(1),
            conv_bias=conv.bias,
            query_key=query_key,
            gate_in=gate_in,
            gate_out=decode_weight(gate_out.weight),
            gate_bias=gate_out.bias,
            mem_gate=decode_weight(inner.mem_gate_proj.weight),
            mem_gate_bias=inner.mem_gate_proj.bias,
            residual_weight=inner.residual_weight,
            act_norm=self.mixer.act_norm.weight,
            mixer_out=mixer_out,
        )
        if not self.is_plus:
            return weights
        query, key, value, attn_out = (decode_weight(linear.weight) for linear in attn)
        return weights._replace(
            attn_norm=self.attn_norm.weight,
            query=query,
            key=key,
            value=value,
            attn_out=attn_out,
            ffn_norm=self.ffn_norm.weight,
            ffn_in=decode_weight(ffn[0].weight),
            ffn_out=decode_weight(ffn[1].weight),
        )


def _add_then_norm(norm, stream, branch):
    """``(norm(stream + branch), stream + branch)``; a branch of None adds nothing."""
    if branch is None:
        return norm(stream), stream
    return add_rms_norm(branch, stream, norm.weight, eps=norm.eps)


# The classes that a block is made of; any other class may compute anything.
_KINDS = {nn.Linear, nn.ModuleDict, nn.Sequential, nn.Sigmoid, RodimusGateLinear}
_KINDS |= {RodimusShortConv, RodimusRMSNorm, RodimusAddRMSNorm, RodimusGatedRMSNorm, RodimusMLP}
_KINDS |= {RodimusInnerMixer, RodimusMixer, RodimusAttention, RodimusBlock, nn.ModuleList}


class RodimusPreTrainedModel(PreTrainedModel):
    """Weights, initialisation and what transformers may do with the model."""

    config_class = RodimusConfig
    config: RodimusConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RodimusBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The state can be rolled back, so assisted generation is allowed.
    _is_stateful = False
    _keep_in_fp32_modules_strict = ["residual_weight"]
    _can_record_outputs = {"hidden_states": RodimusBlock, "attentions": RodimusAttention}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RodimusConfig, *args, **kwargs):
        config.check()
        super().__init__(config, *args, **kwargs)

    @property
    def init_continuous_batching(self):
        # transformers' allocator knows attention layers only; servers check hasattr and fall back
        raise AttributeError

    def get_correct_attn_implementation(self, requested_attention, is_init_check=False):
        """The shared-key operator if no implementation is requested, the package has registered it
        and the config has no attention dropout, which it lacks; else transformers' own choice."""
        chosen = super().get_correct_attn_implementation(requested_attention, is_init_check)
        ours = "rodimus_ska"
        can_be_ours = requested_attention is None and not self.config.attention_dropout
        return ours if can_be_ours and ours in ALL_ATTENTION_FUNCTIONS.valid_keys() else chosen

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """As in transformers. If the config names the model's code, as that of an exported model
        does, the code is saved too, and the config names all its classes; for a model loaded with
        ``trust_remote_code``, transformers copies the code."""
        if self._takes_code_along():
            code = importlib.import_module(f"{__package__}.export")
            self.config.auto_map = code.AUTO_MAP | self.config.auto_map
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            self._take_code_along(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # save_pretrained(push_to_hub=True) uploads before it returns
        self._take_code_along(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _takes_code_along(self):
        return self._auto_class is None and bool(getattr(self.config, "auto_map", None))

    def _take_code_along(self, folder):
        if self._takes_code_along():
            importlib.import_module(f"{__package__}.export").copy_code(folder)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RodimusShortConv):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, RodimusInnerMixer):
            self._init_inner_mixer(module)
        elif getattr(module, "ends_branch", False) and self.config.rescale_prenorm_residual:
            branches = 3 if self.config.block_type == "rodimus_plus" else 1
            std = self.config.initializer_range / math.sqrt(branches * self.config.n_layer)
            init.normal_(module.weight, std=std)

    def _init_inner_mixer(self, module):
        """Decays start between 0.9 and 0.999 per step at temperature 1, temperatures in (1/16,
        0.9)."""
        gate = module.mem_gate_proj
        for linear in (module.in_proj, *module.ch_gate_proj[:2], gate):
            init.xavier_uniform_(linear.weight, gain=2**-2.5)
        init.zeros_(module.ch_gate_proj[1].bias)
        init.ones_(module.residual_weight)
        uniform = torch.rand(2, gate.out_features // 2, device=gate.bias.device)
        rate = torch.exp(uniform[0] * math.log(0.1 / 0.001) + math.log(0.001)).clamp_min(1e-4)
        select = rate + torch.log(-torch.expm1(-rate))
        temper = torch.logit(1 / 16 + uniform[1] * (0.9 - 1 / 16))
        init.copy_(gate.bias, torch.cat((select, temper)))


class RodimusModel(RodimusPreTrainedModel):
    """Embedding, blocks and final norm."""

    _inspected = None

    def __init__(self, config: RodimusConfig):
        super().__init__(config)
        # no padding_idx: the end-of-text token often serves as padding, and has to be learned
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        # reading a field of a transformers config takes as long as a small operator
        self.embed_scale = math.sqrt(config.mem_size) if config.use_scale_embedding else None
        self.residual_in_fp32 = config.residual_in_fp32
        self.embed_norm = None
        if config.use_norm_embedding:
            self.embed_norm = RodimusRMSNorm(config.d_model, config.norm_epsilon)
        self.layers = nn.ModuleList(RodimusBlock(config, i) for i in range(config.n_layer))
        self.norm_f = RodimusRMSNorm(config.d_model, config.norm_epsilon)
        self.rotary_dim = config.rotary_dim if config.block_type == "rodimus_plus" else 0
        self.rotary_base = config.attn_cfg["rotary_emb_base"]
        self.gradient_checkpointing = False
        self.post_init()

    def __getstate__(self):
        """Without the inspection, which is of this object: a copy makes its own."""
        return {name: value for name, value in vars(self).items() if name != "_inspected"}

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, value):
        self.embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | Layout | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        is_packed: bool | None = None,
        context: object | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last block, normalised.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: 0/1 ``[B, cached + T]``; padding may be anywhere, but a compiled
                step of one token treats that token as real in every row.
            position_ids: ``[B, T]`` rotary positions. Without mask and cache, a position that
                does not follow its predecessor starts a packed document: nothing crosses into it.
            cache: A transformers cache, continued by any number of tokens. ``past_key_values``, the
                name before transformers 5.24, works in every version.
            inputs_embeds: ``[B, T, D]`` in place of input_ids.
            use_cache: Return a cache to continue from.
            cu_seqlens: ``[N + 1]`` boundaries of documents packed into one row, rising from 0 to T,
                which is checked only on a CPU and outside ``torch.compile``. ``cu_seq_lens_q``,
                transformers' name for it, works too.
            is_packed: Whether some position does not follow its predecessor, if the caller knows
                it. With None the positions are checked, and the host waits for the device.
            context: A ``rodimus.train.context.Context`` if the tokens are one piece of rows whose
                other pieces are on other ranks. It provides the positions, and excludes mask,
                cache and packing by other arguments.

        Raises:
            ValueError: an argument's shape is wrong, or arguments exclude each other.
        """
        cache = only_cache(cache, kwargs.pop("past_key_values", None))
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        is_wide = inputs_embeds is None or embeds.shape[-1:] == (self.config.d_model,)
        if embeds.dim() != 3 or not is_wide:
            raise _wrong_shape(input_ids, inputs_embeds, self.config.d_model)
        if isinstance(attention_mask, dict):
            attention_mask = Layout(**attention_mask)
        if context is not None:
            others = (attention_mask, position_ids, cache, cu_seqlens)
            _check_context_alone(others, self.config)
            position_ids, use_cache, attention_mask = context.position_ids, False, NO_PADDING
        if cache is not None and self._checkpoints() and torch.is_grad_enabled():
            raise ValueError(
                "expected no cache with gradient checkpointing: the backward pass would run the"
                " blocks, and move the cache on, a second time"
            )
        cache = adopt_cache(cache)
        _check_inputs(embeds, attention_mask, position_ids, cache, self.config)
        cu_seqlens = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
        if kwargs.get("seq_idx") is not None and position_ids is None and cu_seqlens is None:
            raise ValueError("packed rows (seq_idx) need position_ids or cu_seqlens, too")
        documents = self._packed_documents(
            embeds, attention_mask, position_ids, cache, cu_seqlens, is_packed
        )
        use_cache = use_cache and documents is None
        if use_cache and cache is None:
            cache = adopt_cache(DynamicCache(config=self.config))
        position_ids = self._positions(embeds, attention_mask, position_ids, cache, documents)

        captured = self._is_captured(kwargs)
        stream = branch = tokens = None
        if not captured:
            stream = self._step(embeds, attention_mask, position_ids, cache)
        if stream is None:
            layout = self._layout(embeds, attention_mask, position_ids, cache, documents, context)
            tokens = layout.tokens
            stream, branch = self._run_blocks(
                embeds, position_ids, layout, captured, cache=cache, **kwargs
            )
        _count_read(cache, embeds.shape[1], tokens)
        hidden_states, _ = _add_then_norm(self.norm_f, stream, branch)
        self._report_broken_state(hidden_states, cache)
        returned = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **returned)

    def step(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache
    ) -> torch.Tensor | None:
        """What ``forward`` returns for one token per row, ``[B, 1, D]``, by fused blocks, without
        transformers' wrappers around ``forward``, which take nearly a quarter of a small model's
        time. None, with nothing changed, where the modules have to run.

        Args:
            input_ids, position_ids: ``[B, 1]``; no row is padding.
            cache: A cache that has read something; the token is added to it.
        """
        embeds = self.embeddings(input_ids)
        stream = self._step(embeds, None, position_ids, cache)
        if stream is None:
            return None
        _count_read(cache, 1)
        hidden_states = self.norm_f(stream)
        self._report_broken_state(hidden_states, cache)
        return hidden_states

    def _is_captured(self, kwargs) -> bool:
        """Whether the blocks' outputs are requested, by the arguments and config fields that
        transformers reads."""
        asked = (f"output_{name}" for name in self._can_record_outputs)
        return any(kwargs.get(name, getattr(self.config, name, False)) for name in asked)

    def _step(self, embeds, attention_mask, position_ids, cache):
        """The stream after one token per row through fused blocks, ``[B, 1, D]``; None where the
        modules have to run: more tokens, a gradient, a row whose token is padding, a cache that
        has read nothing, anything attached to a block, no native operators."""
        if not _is_step(embeds) or self.training or cache is None:
            return None
        layers = cache.layers
        if not all(getattr(layer, "can_step", False) for layer in layers):
            return None
        if not self._sees_no_padding(attention_mask, cache):
            return None
        stream = self._embed(embeds).squeeze(1)
        # before the search, whose result is kept: a forward-mode derivative concerns this call only
        if not can_fuse_block(stream.shape[0], stream, embeds):
            return None
        found = self._step_arguments()
        if found is None:
            return None
        rotary = self._rotary(embeds, position_ids.expand(stream.shape[0], 1)[:, 0], None)
        weights, numbers = found
        # modules that ran under autocast leave taps of another dtype
        if any(layer.conv_states[0].dtype != weights[0].conv.dtype for layer in layers):
            return None
        first = layers[0]
        shared = (first.step_position(), rotary)
        # taps, states and rings
        states = zip(*(layer.step_states() for layer in layers), strict=True)
        numbers = {"window_size": first.window, **numbers}
        stream = blocks_step(stream, weights, *states, *shared, **numbers, impl="native")
        return stream.unsqueeze(1)

    def _inspect(self) -> _Inspection | None:
        """The inspection of the blocks if they and everything in them compute what their classes
        say: no hook, adapter, quantiser or patched forward. Else None."""
        # threads may share the model: another one may replace self._inspected at any time
        found, layers = self._inspected, self.layers
        if found is None or found.parts[0] is not layers or not found.is_unchanged():
            found = self._inspected = _Inspection(layers) if _is_untouched(layers) else None
        return found

    def _step_arguments(self):
        """``(weights, numbers)`` of the blocks for a fused step; None where the blocks compute more
        than that, or the operator does not take their weights."""
        found = self._inspect()
        if found is None:
            return None
        if not found.is_searched:
            with torch.no_grad():
                found.step = self._find_step_arguments()
            found.is_searched = True
        return found.step

    def _find_step_arguments(self):
        weights = [block.step_weights() for block in self.layers]
        norms = [part for part in self.layers.modules() if isinstance(part, RodimusRMSNorm)]
        numbers = {
            "head_dim": {block.attn.head_dim for block in self.layers if block.is_plus},
            "key_eps": {block.mixer.inner_mixer.normalize_epsilon for block in self.layers},
            "norm_eps": {norm.eps for norm in norms},
        }
        fits = (found and found.is_uniform and can_fuse_block(1, *found) for found in weights)
        if not all(fits) or any(len(values) > 1 for values in numbers.values()):
            return None
        return weights, {name: next(iter(values), None) for name, values in numbers.items()}

    def _layout(self, embeds, attention_mask, position_ids, cache, documents, context) -> Layout:
        layout = attention_mask
        if not isinstance(layout, Layout):
            layout = _layout_of(self.config, embeds, attention_mask, cache, position_ids, documents)
        return layout._replace(documents=documents, context=context)

    def _run_blocks(self, embeds, position_ids, layout, captured, **kwargs):
        """The stream after the last block ``[B, T, D]``, and a branch still to be added to it or
        None; captured: whether the blocks' outputs are requested."""
        if layout.documents is not None:
            kwargs["position_ids"] = position_ids
        stream, branch = self._embed(embeds), None
        rotary = self._rotary(embeds, position_ids, layout.order)
        sums_in_norms = not captured and self._sums_in_norms(stream, layout)
        for block in self.layers:
            if sums_in_norms:
                stream, branch = block.forward_unsummed(stream, branch, rotary, layout, **kwargs)
            else:
                stream = block(stream, rotary, layout, **kwargs)
        return stream, branch

    def _sums_in_norms(self, stream, layout) -> bool:
        """Whether a block's sum may wait for the next norm, which adds as it reads, because nothing
        else reads the stream between blocks. On a CPU the sum is a small part of the time."""
        return stream.is_cuda and layout.order is None and self._blocks_are_plain(stream)

    def _checkpoints(self) -> bool:
        return self.training and any(
            getattr(block, "gradient_checkpointing", False) for block in self.layers
        )

    def _blocks_are_plain(self, stream) -> bool:
        if self._checkpoints() or _is_compiled(stream) or _has_global_hooks():
            return False
        # weights of a transform of torch.func have no address by which to inspect them
        if torch._C._are_functorch_transforms_active():
            return False
        norms = (*(block.mixer_norm for block in self.layers), self.norm_f)
        same = all(type(norm) is RodimusRMSNorm for norm in norms)
        if not (same and _is_untouched(self.norm_f)):
            return False
        # all blocks of a model are sharded alike
        sharded = bool(self.layers) and _is_sharded(self.layers[0])
        return all(map(_is_sharded, self.layers)) if sharded else self._inspect() is not None

    def _sees_no_padding(self, attention_mask, cache) -> bool:
        """Whether no row's new token is padding, and a fused step can ignore the mask because it
        attends to tokens alone; a cache that holds padding is told to skip it."""
        if attention_mask is None:
            return True
        if isinstance(attention_mask, Layout):
            return attention_mask.attention is None and attention_mask.tokens is None
        has_keys = self.config.block_type == "rodimus_plus"
        in_keys = has_keys and not _has_rings(cache)
        if is_tracing(attention_mask):
            # tracing cannot read the mask: a single token is treated as real, as when compiled
            return not in_keys
        seen = self.config.sliding_window if in_keys else 1
        if attention_mask[:, -seen:].all():
            return True
        if seen == 1 or not attention_mask[:, -1].all():
            return False
        padding = (attention_mask == 0).sum(1)
        for layer in cache.layers:
            layer.skip_padding(padding)
        return True

    @staticmethod
    def create_masks_for_generate(
        config,
        inputs_embeds,
        attention_mask,
        cache=None,
        position_ids=None,
        past_key_values=None,
        **kwargs,
    ) -> dict:
        """The fields of a layout, under transformers' name for the function: generation with a
        compileable cache calls it outside the compiled step, makes each value of the dict
        contiguous, and passes the dict as ``attention_mask``."""
        cache = only_cache(cache, past_key_values)
        layout = _layout_of(config, inputs_embeds, attention_mask, cache, position_ids)
        return layout._asdict()

    def _packed_documents(self, embeds, attention_mask, position_ids, cache, cu_seqlens, is_packed):
        if is_packed and position_ids is None and cu_seqlens is None:
            raise ValueError("packed rows (is_packed) need position_ids, which say where")
        if cu_seqlens is not None:
            if not is_tracing(cu_seqlens):
                check_cu_seqlens(cu_seqlens, *embeds.shape[:2])
        if cu_seqlens is not None or is_packed:
            if cache is not None or attention_mask is not None:
                given = "is_packed" if cu_seqlens is None else "cu_seqlens"
                raise ValueError(f"packed rows ({given}) take neither a cache nor a mask")
        elif attention_mask is not None or cache is not None:
            return None
        documents = _documents(position_ids, cu_seqlens, embeds.shape[1], is_packed)
        return None if documents is None else documents.expand(embeds.shape[0], -1)

    def _positions(self, embeds, attention_mask, position_ids, cache, documents):
        if position_ids is not None:
            return position_ids
        if documents is not None:
            return _position_in_document(documents)
        past = 0 if cache is None else cache.get_seq_length()
        places = torch.arange(embeds.shape[1], device=embeds.device)[None] + past
        if isinstance(attention_mask, torch.Tensor):
            # Count tokens, not padding, in the caller's order, before any permutation.
            counted = attention_mask.long().cumsum(1)[:, -embeds.shape[1] :] - 1
            places = counted.clamp_min(0)
        return places

    def _embed(self, embeds):
        if self.embed_scale is not None:
            embeds = embeds * self.embed_scale
        if self.embed_norm is not None:
            embeds = self.embed_norm(embeds)
        if self.residual_in_fp32:
            embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
        return embeds

    def _rotary(self, embeds, position_ids, order):
        if self.rotary_dim == 0:
            return None
        if order is not None:
            position_ids = position_ids.expand(order.shape[0], -1).gather(1, order)
        return rope_tables(position_ids, self.rotary_dim, base=self.rotary_base, dtype=embeds.dtype)

    def _report_broken_state(self, hidden_states, cache):
        """Raise an error naming the layer whose state is not finite, instead of generating from it.

        Checked where it costs nothing: on the CPU, or when several tokens are added at once.
        """
        if cache is None or getattr(cache, "isolates_rows", False):
            return
        # in training the loss scaler handles it; on a GPU the check would wait for the device
        if self.training or is_tracing(hidden_states) or hidden_states.is_meta:
            return
        if hidden_states.device.type != "cpu" and hidden_states.shape[1] == 1:
            return
        if hidden_states[:, -1].isfinite().all():
            return
        for i, layer in enumerate(cache.layers):
            state = getattr(layer, "recurrent_states", {}).get(0)
            if state is not None and not state.isfinite().all():
                raise FloatingPointError(
                    f"the recurrent state of layer {i} holds NaN or infinity; the cache cannot be"
                    " continued. Start a new one, and check the weights and the inputs."
                )


def _layout_of(
    config, inputs_embeds, attention_mask, cache, position_ids=None, documents=None
) -> Layout:
    """The layout of the padding, and the attention mask in it, for all blocks."""
    layout = NO_PADDING
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        length = inputs_embeds.shape[1]
        has_static_keys = isinstance(cache, StaticCache) and config.block_type == "rodimus_plus"
        layout = _padding_layout(attention_mask, length, has_static_keys)
        attention_mask = _left_padded(attention_mask)
    # eager attention is chosen for its weights, which rings do not return
    looked_at = config._attn_implementation == "eager" and not is_tracing(inputs_embeds)
    one_token = inputs_embeds.shape[1] == 1
    by_ring = one_token and _has_rings(cache) and not looked_at
    if config.block_type != "rodimus_plus" or by_ring:
        return layout
    if documents is not None:
        return layout._replace(attention=_mask_of_documents(config, inputs_embeds, documents))
    windowed = config.sliding_window is not None
    create = create_sliding_window_causal_mask if windowed else create_causal_mask
    mask = create(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **{CACHE_NAME: cache},
    )
    return layout._replace(attention=mask)


def _count_read(cache, length, tokens=None):
    """Advance the count that a static cache's layers share by ``length`` places; tokens: bool
    ``[B, length]``, False for padding, None if there is none."""
    if cache is not None and hasattr(cache.layers[0], "read"):
        cache.layers[0].read.count(length, length if tokens is None else tokens.sum(1))


def _check_context_alone(others, config):
    if any(x is not None for x in others) or config.attention_dropout:
        raise ValueError(
            "context excludes attention_mask, position_ids, cache, cu_seqlens and"
            " dropout of attention weights"
        )


def _wrong_shape(input_ids, inputs_embeds, width):
    if inputs_embeds is None:
        return ValueError(f"input_ids must have shape [B, T], got {list(input_ids.shape)}")
    got = list(inputs_embeds.shape)
    return ValueError(f"inputs_embeds must have shape [B, T, {width}], got {got}")


def _check_inputs(embeds, attention_mask, position_ids, cache, config):
    batch, length = embeds.shape[:2]
    if length == 0:
        raise ValueError("expected at least one token, got a sequence of length 0")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must have shape [B, cached + T], got"
            f" {list(attention_mask.shape)}: no mask of queries by keys reaches the recurrence."
            " position_ids or cu_seqlens tell packed documents apart"
        )
    if is_tracing(embeds):
        return
    if cache is not None:
        _check_cache(cache, batch, length, config)
    # before the positions, because generate() derives them from the mask
    if attention_mask is not None and not isinstance(attention_mask, Layout):
        _check_mask(attention_mask, batch, length, cache)
    if position_ids is not None and position_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"position_ids must have shape ({batch}, {length}), got {tuple(position_ids.shape)}"
        )


def _check_mask(attention_mask, batch, length, cache):
    past = 0 if cache is None else int(cache.get_seq_length())
    if tuple(attention_mask.shape) != (batch, past + length):
        raise ValueError(
            f"attention_mask must have shape ({batch}, {past + length}): {past} cached and {length}"
            f" new tokens; got {tuple(attention_mask.shape)}"
        )
    # for several tokens with a mask, the host waits for the device anyway
    if length > 1 and not torch.equal(attention_mask, attention_mask.bool().to(attention_mask)):
        lowest, highest = attention_mask.min().item(), attention_mask.max().item()
        raise ValueError(
            f"attention_mask must hold 0 and 1, got values from {lowest} to {highest}; position_ids"
            " or cu_seqlens tell packed documents apart"
        )


def _check_cache(cache, batch, length, config):
    if not isinstance(cache, Cache):
        raise ValueError(
            f"cache must be one of transformers, got {type(cache).__name__};"
            " make one with DynamicCache(config=model.config)"
        )
    layers, n_layer = cache.layers, config.n_layer
    if len(layers) != n_layer or not all(hasattr(layer, "recurrent_states") for layer in layers):
        raise ValueError(
            f"the cache must hold {n_layer} recurrent layers, got {len(layers)} layers of"
            f" {sorted({type(layer).__name__ for layer in layers})};"
            " make one with DynamicCache(config=model.config)"
        )
    # also after a reset, because that keeps the tensors
    state = layers[0].recurrent_states.get(0)
    if state is not None and state.shape[0] != batch:
        raise ValueError(f"the cache holds a batch of {state.shape[0]}, got a batch of {batch}")
    if _has_rings(cache) and layers[0].window < config.sliding_window:
        room, tokens = layers[0].window, int(cache.get_seq_length()) + length
        if tokens > room:
            raise ValueError(
                f"the static cache has room for {room} tokens, less than the window of"
                f" {config.sliding_window}, and is to read {tokens}: make it with a larger"
                " max_cache_len"
            )


@dataclass
class RodimusCausalLMOutput(CausalLMOutputWithPast):
    """Output of the language model; ``cross_entropy`` is the loss without the z term, detached."""

    cross_entropy: torch.FloatTensor | None = None


class RodimusForCausalLM(RodimusPreTrainedModel, GenerationMixin):
    """Language model: :class:`RodimusModel` with a head, tied to the embedding on request."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: RodimusConfig):
        super().__init__(config)
        self.model = RodimusModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    create_masks_for_generate = staticmethod(RodimusModel.create_masks_for_generate)

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError(
            "a recurrent state has no pages for transformers' continuous batching:"
            " rodimus.generation.Engine runs many requests at once"
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = adopt_cache(model_kwargs.get(CACHE_NAME))
        if generation_config.is_assistant:
            _record_at_least(cache, generation_config.max_new_tokens)

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        cache, places = kwargs.get(CACHE_NAME), kwargs.get("position_ids")
        given = cache is not None and places is not None
        if given and places.shape[-1] == input_ids.shape[1]:
            # transformers reads all of input_ids, including what the cache has already read
            cache.reset()
        layers = getattr(cache, "layers", ())
        recorded = [getattr(layer, "record_past", False) for layer in layers]
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            # a recording cache takes no fused steps, and transformers leaves it recording
            for layer, before in zip(layers, recorded, strict=True):
                layer.record_past = before

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if CACHE_NAME in inputs:
            # PEFT 0.21 checks under the old name whether the virtual tokens were read
            inputs["past_key_values"] = inputs[CACHE_NAME]
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | Layout | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_only: bool = False,
        z_loss: float = 0.0,
        **kwargs,
    ) -> RodimusCausalLMOutput:
        """Logits and, with labels, the loss; the other arguments are those of the base model.

        Args:
            labels: ``[B, T]``, shifted here; -100 is ignored. ``shift_labels`` are taken as they
                are. With ``num_items_in_batch`` the loss is the sum divided by it, else the mean.
            logits_to_keep: Compute the last n logits, or those at the given positions; 0 for all.
            loss_only: Compute the loss without ever holding all logits; ``logits`` is None.
            z_loss: Weight of the mean squared log-partition function, added to the loss.

        Raises:
            ValueError: the labels do not have the shape of the logits' rows.
        """
        cache = only_cache(cache, kwargs.pop("past_key_values", None))
        if isinstance(logits_to_keep, int) and logits_to_keep > 1:
            # several logits are requested to verify a draft
            _record_at_least(adopt_cache(cache), logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = loss = cross_entropy = None
        if loss_only and labels is None and kwargs.get("shift_labels") is None:
            raise ValueError("loss_only needs labels or shift_labels")
        if labels is not None and kwargs.get("context") is not None:
            raise ValueError("context needs shift_labels: the label of the last token is elsewhere")
        if loss_only and _is_plain(self.lm_head, nn.Linear):
            loss, cross_entropy = self._chunked_loss(hidden_states, labels, z_loss, **kwargs)
        else:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self._logits(hidden_states[:, kept])
            if labels is not None or kwargs.get("shift_labels") is not None:
                loss, cross_entropy = self._loss(logits, labels, z_loss, **kwargs)
            if loss_only:
                logits = None
        return RodimusCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_entropy=cross_entropy,
        )

    def step(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache
    ) -> torch.Tensor | None:
        """Logits ``[B, 1, V]`` after one token of each row, or None: see
        :meth:`RodimusModel.step`."""
        if not (_is_bare(self) and _is_bare(self.model)):
            return None
        hidden_states = self.model.step(input_ids, position_ids, cache)
        return None if hidden_states is None else self._logits(hidden_states, is_step=True)

    def _logits(self, hidden_states, is_step=None):
        is_step = _is_step(hidden_states) if is_step is None else is_step
        return _apply(self.lm_head, hidden_states, is_step)

    def _loss(self, logits, labels, z_loss, **kwargs):
        """``(loss, cross-entropy)`` of logits, by the model's own loss function."""
        targets = _shifted_labels(logits, labels, kwargs.get("shift_labels"))
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs
        )
        cross_entropy = loss.detach()
        if z_loss:
            penalty = logits.float().logsumexp(-1).square()[targets != -100]
            items = kwargs.get("num_items_in_batch")
            loss = loss + z_loss * (penalty.mean() if items is None else penalty.sum() / items)
        return loss, cross_entropy

    def _chunked_loss(
        self, hidden_states, labels, z_loss, shift_labels=None, num_items_in_batch=None, **_
    ):
        shift_labels = _shifted_labels(hidden_states, labels, shift_labels)
        weight = self.lm_head.weight
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        loss, cross_entropy = linear_cross_entropy(
            hidden_states.flatten(0, -2),
            weight,
            shift_labels.flatten(),
            z_loss=z_loss,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is not None:
            loss, cross_entropy = loss / num_items_in_batch, cross_entropy / num_items_in_batch
        return loss, cross_entropy


def _shifted_labels(rows, labels, shift_labels):
    """The label of each row of ``[B, T, ...]``: the next label, or that of ``shift_labels``."""
    given = labels if shift_labels is None else shift_labels
    if given.shape != rows.shape[:2]:
        raise ValueError(
            f"labels must have shape {tuple(rows.shape[:2])}, got {tuple(given.shape)}"
        )
    return F.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels


class RodimusForSequenceClassification(GenericForSequenceClassification, RodimusPreTrainedModel):
    """Sequence classification from the last token that is not padding."""

    def __init__(self, config: RodimusConfig):
        # transformers' __init__ calls AutoModel, which does not trust a folder's code by default
        RodimusPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = RodimusModel(config)
        self.score = nn.Linear(config.d_model, self.num_labels, bias=False)
        self.post_init()


__all__ = [
    "RodimusForCausalLM",
    "RodimusForSequenceClassification",
    "RodimusModel",
    "RodimusPreTrainedModel",
]
