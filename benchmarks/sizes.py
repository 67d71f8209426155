"""Configurations of the models that are compared, and the bytes their state must take.

Full scale is the published shape of each model (sources beside the configurations); tiny keeps the
structure and runs in milliseconds. The formulas know nothing of the implementations: the memory
benchmark checks each model's cache against them, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SCALES = ("tiny", "full")

# Qwen/Qwen2-1.5B, config.json
QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
# RWKV/rwkv-6-world-1b6, config.json; low ranks from RWKV-LM, RWKV-v5/src/model.py
RWKV6 = {
    "vocab_size": 65536,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "intermediate_size": 7168,
    "head_dim": 64,
    "mix_rank": 32,
    "decay_rank": 64,
}
# codefuse-ai/Rodimus-Plus-Coder-1.6B-Base, config.json
RODIMUS_PLUS = {
    "block_type": "rodimus_plus",
    "d_model": 2048,
    "n_layer": 24,
    "vocab_size": 126464,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 126080,
    "eos_token_id": 126081,
    "mixer_cfg": {"mem_size": 64, "expand_ratio": 2, "d_conv": 4, "normalize_epsilon": 1e-5},
    "attn_cfg": {
        "num_heads": 16,
        "num_heads_k": 1,
        "num_heads_v": 16,
        "window_size": 4096,
        "ffn_expand_ratio": 4 / 3,
    },
}
# codefuse-admin/rodimus_1B4_base_20241001, config.json
RODIMUS = {
    "block_type": "rodimus",
    "d_model": 2048,
    "n_layer": 48,
    "vocab_size": 126464,
    "tie_word_embeddings": True,
    "bos_token_id": 126080,
    "eos_token_id": 126081,
    "mixer_cfg": {"mem_size": 64, "expand_ratio": 2, "d_conv": 4},
}
# Layers of Qwen3-Next (three of gated delta rule to one of attention, Qwen3NextConfig's widths)
# with dense MLPs, cut to 20 layers so that the whole is a 1.5B model. Not a published model.
QWEN3_NEXT = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 4864,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mlp_only_layers": list(range(20)),
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
# state-spaces/mamba2-1.3b, config.json, with the vocabulary of Rodimus: 1.5B in all. Not a
# published model.
MAMBA2 = {
    "vocab_size": 126464,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "state_size": 128,
    "num_heads": 64,
    "head_dim": 64,
    "expand": 2,
    "n_groups": 1,
    "conv_kernel": 4,
    "tie_word_embeddings": True,
}

_TINY: dict[str, dict[str, Any]] = {
    "qwen2": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "rwkv6": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "mix_rank": 8,
        "decay_rank": 8,
    },
    "rodimus": {"vocab_size": 256, "d_model": 64, "n_layer": 2},
    "rodimus_plus": {
        "vocab_size": 256,
        "d_model": 64,
        "n_layer": 2,
        "attn_cfg": {
            **RODIMUS_PLUS["attn_cfg"],
            "num_heads": 4,
            "num_heads_v": 4,
            "window_size": 64,
        },
    },
    "qwen3_next": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "mlp_only_layers": [0, 1, 2, 3],
    },
    "mamba2": {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
        "num_heads": 4,
        "head_dim": 32,
    },
}

_FULL: dict[str, dict[str, Any]] = {
    "qwen2": QWEN2,
    "rwkv6": RWKV6,
    "rodimus": RODIMUS,
    "rodimus_plus": RODIMUS_PLUS,
    "qwen3_next": QWEN3_NEXT,
    "mamba2": MAMBA2,
}


class StateBytes(NamedTuple):
    """Bytes that a model keeps between two tokens.

    Attributes:
        recurrent: Rewritten by every token: states and convolution taps.
        cached: Appended to by every token and read whole: keys and values.
    """

    recurrent: int
    cached: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.recurrent + self.cached

    @property
    def traffic(self) -> int:
        """Bytes that one decoded token must move: the state both ways, keys and values once."""
        return 2 * self.recurrent + self.cached


def config_of(family: str, scale: str) -> dict[str, Any]:
    """Configuration fields of a family at a scale.

    Raises:
        ValueError: an unknown family or scale.
    """
    if family not in _FULL or scale not in SCALES:
        raise ValueError(
            f"expected a family of {sorted(_FULL)} and a scale of {SCALES}, got {family!r}"
            f" and {scale!r}"
        )
    full = _FULL[family]
    return dict(full) if scale == "full" else {**full, **_TINY[family]}


def state_bytes(
    family: str, config: Mapping[str, Any], batch: int, context: int, itemsize: int
) -> StateBytes:
    """Bytes of the state after ``context`` tokens.

    Args:
        family: One of the configurations' families.
        config: As ``config_of`` gives it.
        batch: Sequences.
        context: Tokens of each sequence, at least as many as the convolution has taps.
        itemsize: Bytes of the model's dtype; recurrent states are float32 in every model here.
    """
    recurrent, cached = _FORMULAS[family](config, context, itemsize)
    return StateBytes(batch * recurrent, batch * cached)


def _qwen2(c: Mapping[str, Any], context: int, itemsize: int) -> tuple[int, int]:
    head = c["hidden_size"] // c["num_attention_heads"]
    return 0, c["num_hidden_layers"] * 2 * c["num_key_value_heads"] * head * context * itemsize


def _rwkv6(c: Mapping[str, Any], context: int, itemsize: int) -> tuple[int, int]:
    width = c["hidden_size"]
    return c["num_hidden_layers"] * (4 * width * c["head_dim"] + 2 * width * itemsize), 0


def _rodimus(c: Mapping[str, Any], context: int, itemsize: int) -> tuple[int, int]:
    mixer = c["mixer_cfg"]
    inner = int(c["d_model"] * mixer["expand_ratio"])
    return c["n_layer"] * inner * (4 * mixer["mem_size"] + mixer["d_conv"] * itemsize), 0


def _rodimus_plus(c: Mapping[str, Any], context: int, itemsize: int) -> tuple[int, int]:
    attn = c["attn_cfg"]
    heads = attn["num_heads_k"] + attn["num_heads_v"]
    # a query sees window_size // 2 keys before its own
    seen = min(context, attn["window_size"] // 2)
    keys = c["n_layer"] * seen * heads * (c["d_model"] // attn["num_heads"]) * itemsize
    return _rodimus(c, context, itemsize)[0], keys


def _qwen3_next(c: Mapping[str, Any], context: int, itemsize: int) -> tuple[int, int]:
    full = c["num_hidden_layers"] // 4
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    values = c["linear_num_value_heads"] * c["linear_value_head_dim"]
    state = 4 * values * c["linear_key_head_dim"]
    taps = (2 * keys + values) * c["linear_conv_kernel_dim"] * itemsize
    cached = full * 2 * c["num_key_value_heads"] * c["head_dim"] * context * itemsize
    return (c["num_hidden_layers"] - full) * (state + taps), cached


def _mamba2(c: Mapping[str, Any], context: int, itemsize: int) -> tuple[int, int]:
    inner = c["num_heads"] * c["head_dim"]
    state = 4 * inner * c["state_size"]
    taps = (inner + 2 * c["n_groups"] * c["state_size"]) * c["conv_kernel"] * itemsize
    return c["num_hidden_layers"] * (state + taps), 0


_FORMULAS: dict[str, Callable[[Mapping[str, Any], int, int], tuple[int, int]]] = {
    "qwen2": _qwen2,
    "rwkv6": _rwkv6,
    "rodimus": _rodimus,
    "rodimus_plus": _rodimus_plus,
    "qwen3_next": _qwen3_next,
    "mamba2": _mamba2,
}


def sequence_flops(family: str, config: Mapping[str, Any], length: int) -> float:
    """Operations that mix tokens in a forward pass over one sequence: attention and states.

    A key that a query sees costs two products of the head's width for each query head; an entry of
    a recurrent state is written and read once per token, two operations each.
    """
    layers = width = window = 0
    if family == "qwen2":
        layers, width, window = config["num_hidden_layers"], config["hidden_size"], length
    elif family == "qwen3_next":
        layers, window = config["num_hidden_layers"] // 4, length
        width = config["num_attention_heads"] * config["head_dim"]
    elif family == "rodimus_plus":
        layers, width = config["n_layer"], config["d_model"]
        window = config["attn_cfg"]["window_size"] // 2 + 1
    # with 0 bytes per element only the float32 states are left: four bytes and four operations per
    # entry
    states, _ = _FORMULAS[family](config, 1, 0)
    return 4.0 * layers * width * visible_pairs(length, window) + length * states


def visible_pairs(length: int, window: int) -> int:
    """Pairs of query and visible key of a head in a sequence."""
    ramp = min(length, window)
    return ramp * (ramp + 1) // 2 + (length - ramp) * window
