"""Every model behind one interface: random weights, one dtype, the same tokens.

A ``Model`` holds one set of weights. A ``Session`` is one batch of sequences in one engine of that
model: it prefills, decodes greedily with the argmax inside the timed step, and reports the bytes it
keeps.
"""

from __future__ import annotations

import torch

from .. import machine
from .guard import Fault, Unavailable, guarded, is_installed, require_package
from .huggingface import RECORDED, WARM_UP_STEPS, HuggingFaceModel, build, require_replay
from .interface import (
    BASELINES,
    CATALOGUE,
    OURS,
    SEED,
    Entry,
    Model,
    Session,
    disagreement,
    entry,
    random_tokens,
)
from .llama import LLAMA_CPP, require_same_logits
from .rwkv import RwkvModel

__all__ = [
    "BASELINES",
    "CATALOGUE",
    "LLAMA_CPP",
    "OURS",
    "RECORDED",
    "SEED",
    "WARM_UP_STEPS",
    "Entry",
    "Fault",
    "HuggingFaceModel",
    "Model",
    "Session",
    "Unavailable",
    "disagreement",
    "entry",
    "guarded",
    "is_installed",
    "load",
    "random_tokens",
    "require_replay",
    "require_same_logits",
]


def load(
    name: str,
    scale: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weight_dtype: str | None = None,
) -> Model:
    """A model of the catalogue with random weights.

    Args:
        weight_dtype: What the matrices of linear layers are rounded to: ``"int8"`` (in our models
            one scale per output, in llama.cpp Q8_0) or ``"int4"`` (one scale per 32 inputs, and
            Q4_0), with heads in more bits; other engines keep their weights as they are.

    Raises:
        Unavailable: a package, a GPU or the memory is missing; the message says which.
        ValueError: an unknown name or scale.
    """
    found = entry(name)
    _require(found, device)
    if scale == "full":
        # 1.6 billion parameters; the package rwkv holds them twice while it reads its file
        needed = 1.7e9 * dtype.itemsize * (2.2 if found.family == "rwkv6" else 1.0)
        free = machine.memory_bytes(device)
        if free < needed:
            raise Unavailable(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    if found.family == "rwkv6" and device.type == "cpu":
        return RwkvModel(scale, dtype, weight_dtype)
    return build(found, scale, dtype, device, weight_dtype)


def _require(found: Entry, device: torch.device) -> None:
    """Raise Unavailable unless the packages that the model needs are there and run here."""
    on_cpu = device.type == "cpu"
    if found.family == "rwkv6" and on_cpu:
        require_package("rwkv", "rwkv")
    elif "fla" in found.source:
        if on_cpu:
            raise Unavailable("flash-linear-attention runs on a GPU only")
        require_package("fla", "flash-linear-attention")
        if found.family == "rodimus_plus":
            require_package("flash_attn", "flash-attn")
