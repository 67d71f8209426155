"""Converts flash-linear-attention's Rodimus checkpoints to ours and back: one model, two namings.

Both implement arXiv 2410.06577. flash-linear-attention (fla) splits what the released checkpoints
fuse, names the parts differently, and counts the window otherwise: its ``window_size`` is the
number of visible keys, ours (the released one) is twice the number of keys before the query.

    config = config_from_fla(json.loads(path.read_text()))
    weights = weights_from_fla(load_file(folder / "model.safetensors"))
"""

from typing import Any

import torch
from torch import Tensor

from .configuration_rodimus import RodimusConfig

# Our name: the names in fla. Where there are two, our rows are theirs stacked in this order.
MODEL_KEYS: dict[str, tuple[str, ...]] = {
    "model.embeddings.weight": ("model.embeddings.weight",),
    "model.norm_f.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
# The same, after "model.layers.N.".
LAYER_KEYS: dict[str, tuple[str, ...]] = {
    "mixer_norm.weight": ("mixer_norm.weight",),
    "mixer.fc.weight": ("mixer.up_proj.weight", "mixer.gate_proj.weight"),
    "mixer.act_norm.weight": ("mixer.activation_norm.weight",),
    "mixer.out_proj.weight": ("mixer.down_proj.weight",),
    "mixer.inner_mixer.residual_weight": ("mixer.residual_weight",),
    "mixer.inner_mixer.short_conv.conv1d.weight": ("mixer.short_conv.weight",),
    "mixer.inner_mixer.short_conv.conv1d.bias": ("mixer.short_conv.bias",),
    "mixer.inner_mixer.in_proj.weight": ("mixer.q_proj.weight", "mixer.k_proj.weight"),
    "mixer.inner_mixer.ch_gate_proj.0.weight": ("mixer.i_gate_proj.0.weight",),
    "mixer.inner_mixer.ch_gate_proj.1.weight": ("mixer.i_gate_proj.1.weight",),
    "mixer.inner_mixer.ch_gate_proj.1.bias": ("mixer.i_gate_proj.1.bias",),
    "mixer.inner_mixer.mem_gate_proj.weight": (
        "mixer.g_gate_proj.weight",
        "mixer.tau_gate_proj.weight",
    ),
    "mixer.inner_mixer.mem_gate_proj.bias": ("mixer.g_gate_proj.bias", "mixer.tau_gate_proj.bias"),
    "attn_norm.weight": ("ska_attn_norm.weight",),
    "attn.q_proj.weight": ("ska_attn.q_proj.weight",),
    "attn.k_proj.weight": ("ska_attn.k_proj.weight",),
    "attn.v_proj.weight": ("ska_attn.v_proj.weight",),
    "attn.out_proj.weight": ("ska_attn.o_proj.weight",),
    "ffn_norm.weight": ("mlp_norm.weight",),
    "ffn.fc.weight": ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    "ffn.out_proj.weight": ("mlp.down_proj.weight",),
}
_KEYS = MODEL_KEYS | LAYER_KEYS
_LAYERS = "model.layers."
# Fields that mean the same in both, under two names: ours, theirs.
_SAME_FIELDS = {
    "block_type": "block_type",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "norm_eps",
    "residual_in_fp32": "residual_in_fp32",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "use_cache": "use_cache",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
# fla's defaults for fields that config.json leaves out, where ours differ.
_FLA_DEFAULTS = {
    "block_type": "rodimus_plus",
    "vocab_size": 126464,
    "tie_word_embeddings": True,
    "bos_token_id": 126080,
    "eos_token_id": 126081,
}
# Options of fla that Rodimus as published does not have: field, the value we need.
_FLA_REQUIRED = {"attn": None, "use_short_conv": True, "hidden_act": "swish"}
_SKA_REQUIRED = {"qkv_bias": False, "qk_norm": False}


def is_fla_config(config: dict[str, Any]) -> bool:
    """True for fla's ``config.json``: its sizes have other names, and there is no ``mixer_cfg``."""
    return "hidden_size" in config and "d_model" not in config and "mixer_cfg" not in config


def config_from_fla(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``RodimusConfig`` for fla's ``config.json``; absent ones get fla's defaults.

    Raises:
        ValueError: the configuration uses something that the published architecture lacks.
    """
    config = _FLA_DEFAULTS | config
    _require(config, _FLA_REQUIRED, "")
    ours = {name: config[theirs] for name, theirs in _SAME_FIELDS.items() if theirs in config}
    ours["mixer_cfg"] = {
        "expand_ratio": 2.0,
        "mem_size": config.get("expand_ratio", 64),
        "input_gate_low_rank": config.get("input_gate_low_rank", "auto"),
        "d_conv": config.get("conv_size", 4),
        "normalize_epsilon": config.get("k_norm_eps") or 1e-12,
    }
    if config["block_type"] == "rodimus_plus":
        ours["attn_cfg"] = _attention_from_fla(config)
    return ours


def _attention_from_fla(config: dict[str, Any]) -> dict[str, Any]:
    ska = config.get("ska_attn") or {}
    _require(ska, _SKA_REQUIRED, "ska_attn.")
    if "num_heads" not in ska:
        raise ValueError("ska_attn.num_heads must be given for block_type 'rodimus_plus'")
    window = ska.get("window_size", 1024)
    if window is not None and window < 2:
        raise ValueError(
            f"ska_attn.window_size must be None or at least 2 to be converted, got {window}"
        )
    ratio = config.get("hidden_ratio", 4 / 3)
    if config.get("intermediate_size") is not None:
        if config["intermediate_size"] % 8:
            got = config["intermediate_size"]
            raise ValueError(
                f"intermediate_size must be a multiple of 8 to be converted, got {got}"
            )
        ratio = config["intermediate_size"] / config["hidden_size"]
    return {
        "num_heads": ska["num_heads"],
        "num_heads_k": 1,
        "num_heads_v": ska["num_heads"],
        "window_size": None if window is None else 2 * (window - 1),
        "rotary_emb_dim": -1,
        "rotary_emb_base": ska.get("rope_theta", 10000.0),
        "ffn_expand_ratio": ratio,
    }


def config_to_fla(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of fla's ``config.json`` for ours; absent ones get our defaults.

    Raises:
        ValueError: the configuration differs from what fla fixes (one key head, full rotary
            embedding, expansion by 2, no embedding scale or norm), or is no ``RodimusConfig``.
    """
    ours = RodimusConfig.from_dict(config)
    config = ours.to_dict()
    mixer = config["mixer_cfg"]
    required = {"use_scale_embedding": False, "use_norm_embedding": False}
    _require(config, required, "")
    _require(mixer, {"expand_ratio": 2}, "mixer_cfg.")
    fla = {theirs: config[name] for name, theirs in _SAME_FIELDS.items()}
    fla |= {
        "model_type": "rodimus",
        "architectures": ["RodimusForCausalLM"],
        "expand_ratio": mixer["mem_size"],
        "input_gate_low_rank": mixer["input_gate_low_rank"],
        "conv_size": mixer["d_conv"],
        "k_norm_eps": mixer["normalize_epsilon"],
        # fla needs both or neither: its blocks read this field, its model residual_in_fp32
        "block_residual_in_fp32": config["residual_in_fp32"],
    }
    if config["block_type"] == "rodimus_plus":
        attn = config["attn_cfg"]
        _require(
            attn,
            {"num_heads_k": 1, "num_heads_v": ours.num_attention_heads, "rotary_emb_dim": -1},
            "attn_cfg.",
        )
        fla["ska_attn"] = {
            "num_heads": ours.num_attention_heads,
            "qkv_bias": False,
            "qk_norm": False,
            "window_size": ours.sliding_window,
            "rope_theta": attn["rotary_emb_base"],
        }
        fla["hidden_ratio"] = attn["ffn_expand_ratio"]
    return fla


def _require(fields: dict[str, Any], required: dict[str, Any], where: str) -> None:
    for name, value in required.items():
        if fields.get(name, value) not in (value, None):
            raise ValueError(
                f"{where}{name} must be {value!r} to be converted, got {fields[name]!r}"
            )


def weights_from_fla(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict for fla's. Every tensor is used exactly once.

    Raises:
        ValueError: a tensor has no counterpart, or one half of a fused pair is missing.
    """
    owners = {
        name: (ours, part) for ours, theirs in _KEYS.items() for part, name in enumerate(theirs)
    }
    fused: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        prefix, local = _split(name)
        if local not in owners:
            raise ValueError(f"no counterpart of fla's {name!r}")
        ours, part = owners[local]
        fused.setdefault(prefix + ours, {})[part] = tensor
    result = {}
    for name, parts in fused.items():
        theirs = _KEYS[_split(name)[1]]
        if len(parts) != len(theirs):
            missing = [theirs[i] for i in range(len(theirs)) if i not in parts]
            raise ValueError(f"{name!r} needs fla's {', '.join(theirs)}; missing {missing[0]!r}")
        result[name] = torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
    return result


def weights_to_fla(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """fla's state dict for ours: the exact inverse of :func:`weights_from_fla`.

    Raises:
        ValueError: a tensor has no counterpart (an embedding norm, say).
    """
    result = {}
    for name, tensor in weights.items():
        prefix, local = _split(name)
        theirs = _KEYS.get(local)
        if theirs is None:
            raise ValueError(f"fla has no counterpart of {name!r}")
        for part, piece in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            result[prefix + part] = piece
    return result


def _split(name: str) -> tuple[str, str]:
    """``("model.layers.3.", "mixer_norm.weight")``; the prefix is empty outside the layers."""
    if not name.startswith(_LAYERS):
        return "", name
    number, _, local = name.removeprefix(_LAYERS).partition(".")
    return f"{_LAYERS}{number}.", local
