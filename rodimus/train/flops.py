"""Floating-point operations of a model, counted so that MFU means what it says.

A multiply-add is two operations, backward is twice forward. Counted: every matrix product (the
tied head once), the DDTS recurrence itself (write and read of the state, 4 n D per token for any
chunk size), attention over the keys a token really sees, and the short convolution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig

# tokens per chunk in every implementation of the recurrence that is used for training
CHUNK = 64


class TokenFlops(NamedTuple):
    """Forward and backward operations of one training token, by part."""

    dense: float
    recurrence: float
    attention: float
    convolution: float

    @property
    def total(self) -> float:
        """All parts together: the numerator of MFU."""
        return sum(self)


def matmul_parameters(model: nn.Module) -> int:
    """Weights that a token is multiplied with: all linear layers, the head included."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def visible_keys(seq_len: int, window: int) -> float:
    """Keys a token sees on average: mean over positions t = 1 .. seq_len of min(t, window)."""
    ramp = min(seq_len, window)
    return (ramp * (ramp + 1) / 2 + (seq_len - ramp) * window) / seq_len


class _Layer(NamedTuple):
    """What a layer does besides products with weights; the same in every layer of a model."""

    layers: int
    state: int = 0
    """Elements of its recurrent state."""
    chunk: int = 0
    """Key and value channels of the recurrence."""
    attention: int = 0
    """Channels of the queries, all heads together."""
    window: float = math.inf
    """Keys that a token sees, its own included."""
    convolution: int = 0
    """Weights of the short convolution."""
    last: int = 0
    """Weights of the product that ends the block."""


def _layer(config: PreTrainedConfig) -> _Layer:
    if config.model_type == "qwen2":
        width = config.hidden_size
        last = config.hidden_size * config.intermediate_size
        return _Layer(config.num_hidden_layers, attention=width, last=last)
    if config.model_type == "gla":
        keys, values = config.key_dim, config.value_dim
        state = keys * values // config.num_heads
        last = config.hidden_size * config.intermediate_size
        return _Layer(config.num_hidden_layers, state=state, chunk=keys + values, last=last)
    keys, width = config.mem_size, config.d_inner
    recurrent = _Layer(
        config.n_layer,
        state=keys * width,
        chunk=keys + width,
        convolution=config.mixer_cfg["d_conv"] * width,
        last=width * config.d_model,
    )
    if config.block_type == "rodimus":
        return recurrent
    return recurrent._replace(
        attention=config.d_model,
        window=config.sliding_window or math.inf,
        last=config.intermediate_size * config.d_model,
    )


def train_flops(model: nn.Module, config: PreTrainedConfig, seq_len: int) -> TokenFlops:
    """Operations of one training token in rows of ``seq_len`` tokens.

    Args:
        model: The model, on any device (meta will do), not sharded.
        config: Its configuration: Rodimus's or that of a peer.
        seq_len: Length of an unpacked row; shorter documents need less attention.
    """
    layer = _layer(config)
    seen = visible_keys(seq_len, min(layer.window, seq_len))
    return TokenFlops(
        dense=6.0 * matmul_parameters(model),
        recurrence=3.0 * layer.layers * 4 * layer.state,
        attention=3.0 * layer.layers * 4 * layer.attention * seen,
        convolution=6.0 * layer.layers * layer.convolution,
    )


def hardware_flops(
    model: nn.Module, config: PreTrainedConfig, seq_len: int, *, recompute: bool
) -> float:
    """Operations that one training token really takes: the numerator of HFU.

    Beyond ``train_flops``: the products inside a chunk of the recurrence, and with ``recompute``
    the forward of every block once more. That recomputation ends with the last tensor that
    backward needs, so the product that ends a block is not recomputed.

    Args:
        model, config, seq_len: As in ``train_flops``.
        recompute: Whether blocks are run a second time in backward (``train.ac = full``). What
            ``selective`` recomputes is not counted: the convolution and, on a GPU, the small
            product inside the input gate, but no other product of a layer.
    """
    layer = _layer(config)
    spent = sum(train_flops(model, config, seq_len))
    spent += 3.0 * layer.layers * 2 * CHUNK * layer.chunk
    if not recompute:
        return spent
    head = model.get_output_embeddings().weight.numel()
    return spent + (spent / 3 - 2.0 * head) - 2.0 * layer.layers * layer.last
