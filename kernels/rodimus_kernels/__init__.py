"""Operators of Rodimus and Rodimus+: a reference in plain torch, one public function, one dispatch.

The mathematics is in :mod:`rodimus_kernels.reference`. Importing this package needs torch alone;
anything else that an implementation needs is imported when it is chosen.

Only the references support forward-mode derivatives and the transforms of ``torch.func``;
``impl="auto"`` chooses them there, and other implementations refuse a forward-mode derivative.
"""

import importlib

from ._dispatch import implementations_used
from .block import BlockWeights, blocks_step, can_fuse_block
from .cross_entropy import linear_cross_entropy
from .ddts import (
    ddts,
    ddts_gates,
    ddts_mixer_step,
    ddts_scan,
    ddts_step,
    ddts_summary,
    gated_ddts,
)
from .input_gate import input_gate
from .linear import linear, multiplies_slowly
from .norm import add_rms_norm, gated_rms_norm, rms_norm
from .quantized_weight import Int4Weight, Int8Weight, decode_weight, quantize_int4
from .reference import int8_row_bytes, read_ring, ring_parts, rope_tables, write_ring
from .shared_key_attention import rope, shared_key_attention, shared_key_attention_step
from .short_conv import short_conv, short_conv_step
from .swiglu import swiglu

# imported here because torch.compile cannot trace an import in a first call; they need torch alone
for _module in (
    *("ddts.eager", "ddts.gated", "ddts.native_mixer", "ddts.native_step"),
    *("native_block", "native_conv", "native_linear", "native_norm"),
    *("shared_key_attention.native_step", "shared_key_attention.sdpa"),
):
    importlib.import_module(f"{__name__}.{_module}")

__all__ = [
    "BlockWeights",
    "Int4Weight",
    "Int8Weight",
    "add_rms_norm",
    "blocks_step",
    "can_fuse_block",
    "ddts",
    "ddts_gates",
    "ddts_mixer_step",
    "ddts_scan",
    "ddts_step",
    "ddts_summary",
    "decode_weight",
    "gated_ddts",
    "gated_rms_norm",
    "implementations_used",
    "input_gate",
    "int8_row_bytes",
    "linear",
    "linear_cross_entropy",
    "multiplies_slowly",
    "quantize_int4",
    "read_ring",
    "ring_parts",
    "rms_norm",
    "rope",
    "rope_tables",
    "shared_key_attention",
    "shared_key_attention_step",
    "short_conv",
    "short_conv_step",
    "swiglu",
    "write_ring",
]
