"""Rodimus and Rodimus+ language models (arXiv 2410.06577): model, generation and training.

Importing the package registers the model with transformers' ``Auto*`` classes, so that
``AutoModelForCausalLM.from_pretrained`` loads a checkpoint folder without any remote code.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_rodimus import RodimusConfig
    from .modeling_rodimus import (
        RodimusForCausalLM,
        RodimusForSequenceClassification,
        RodimusModel,
    )
    from .tokenization_rodimus import RodimusTokenizer

__version__ = "0.1.0"
__all__ = [
    "RodimusConfig",
    "RodimusForCausalLM",
    "RodimusForSequenceClassification",
    "RodimusModel",
    "RodimusTokenizer",
    "register",
]

_HOMES = {
    "RodimusConfig": "configuration_rodimus",
    "RodimusModel": "modeling_rodimus",
    "RodimusForCausalLM": "modeling_rodimus",
    "RodimusForSequenceClassification": "modeling_rodimus",
    "RodimusTokenizer": "tokenization_rodimus",
}
_MODULES = ("convert", "generation", "loading", "quantization")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def register() -> None:
    """Let transformers' ``Auto*`` classes load ``model_type: rodimus`` through this package.

    Done on import. Another package that registers the same model type and is imported later takes
    over; calling this again takes it back.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from .attention import register as register_attention
    from .configuration_rodimus import RodimusConfig
    from .modeling_rodimus import (
        RodimusForCausalLM,
        RodimusForSequenceClassification,
        RodimusModel,
    )
    from .tokenization_rodimus import RodimusTokenizer, TokenizerKey

    AutoConfig.register("rodimus", RodimusConfig, exist_ok=True)
    AutoModel.register(RodimusConfig, RodimusModel, exist_ok=True)
    AutoModelForCausalLM.register(RodimusConfig, RodimusForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(
        RodimusConfig, RodimusForSequenceClassification, exist_ok=True
    )
    AutoTokenizer.register(TokenizerKey, RodimusTokenizer, exist_ok=True)
    # the Trainer looks here to decide whether label smoothing shifts the labels
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rodimus"] = RodimusForCausalLM.__name__
    register_attention()


if importlib.util.find_spec("rodimus_kernels") is None:
    raise ImportError(
        "rodimus needs rodimus_kernels, which lies in kernels/ of the same repository:"
        " install both with `pip install -e .`, or put kernels/ on the path"
    )
# The command `rodimus` answers --help without waiting for torch; its commands load what they use.
# While `python -m NAME` imports NAME's package, sys.argv[0] is "-m" instead of the program.
_program = sys.orig_argv[-len(sys.argv)] if sys.argv[:1] == ["-m"] else Path(*sys.argv[:1]).stem
if _program != "rodimus":
    register()
