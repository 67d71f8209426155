"""Floating-point operations of Rodimus, counted so that MFU means what it says.

A multiply-add is two operations, backward is twice forward. Counted: every matrix product (the
tied head once), the DDTS recurrence itself (write and read of the state, 4 n D a token, whatever
the chunk size), attention over the keys a token really sees, and the short convolution.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ..configuration_rodimus import RodimusConfig

# dense bf16 FLOP/s from the makers' data sheets, by a word of the device's name
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


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


def train_flops(model: nn.Module, config: RodimusConfig, seq_len: int) -> TokenFlops:
    """Operations of one training token in rows of ``seq_len`` tokens.

    Args:
        model: The model, on any device (meta will do), not sharded.
        config: Its configuration.
        seq_len: Length of an unpacked row; documents shorter than it need less attention.
    """
    inner = model.model.layers[0].mixer.inner_mixer
    width, mem = inner.residual_weight.numel(), config.mixer_cfg["mem_size"]
    attention = 0.0
    if config.block_type == "rodimus_plus":
        seen = visible_keys(seq_len, config.attn_cfg["window_size"] // 2 + 1)
        attention = 3 * config.n_layer * 4 * config.d_model * seen
    return TokenFlops(
        dense=6.0 * matmul_parameters(model),
        recurrence=3.0 * config.n_layer * 4 * mem * width,
        attention=attention,
        convolution=6.0 * config.n_layer * config.mixer_cfg["d_conv"] * width,
    )


def hardware_flops(
    model: nn.Module, config: RodimusConfig, *, chunk: int, recompute: bool
) -> float:
    """Operations a token costs beyond ``train_flops``: the numerator of HFU minus that of MFU.

    Args:
        model: As in ``train_flops``.
        config: Its configuration.
        chunk: Chunk length of the DDTS form in use; it does 2 C n + 2 C D more a token and layer.
        recompute: Whether blocks are run a second time in backward (``train.ac = full``).
    """
    inner = model.model.layers[0].mixer.inner_mixer
    width, mem = inner.residual_weight.numel(), config.mixer_cfg["mem_size"]
    chunk_work = 3.0 * config.n_layer * 2 * chunk * (mem + width)
    if not recompute:
        return chunk_work
    head = model.lm_head.weight.numel()
    return chunk_work + 2.0 * (matmul_parameters(model) - head)
