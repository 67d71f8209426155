"""The tokenizer of the released checkpoints: a plain fast tokenizer with the published chat format.

The released folders name a class of their own in ``auto_map``, whose code needs a package that is
not in the folder. This class is registered under the same name and takes its place.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .configuration_rodimus import RodimusConfig

CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


class RodimusTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that pads on the left with the end-of-text token and knows the chat format.

    ``apply_chat_template`` renders every turn as ``<role>NAME</role>text`` with NAME one of SYSTEM,
    HUMAN, ASSISTANT and OBSERVATION; a reply ends with the end-of-text token.
    """

    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask"]

    # no __init__: transformers rebuilds classes that have one from the vocabulary, without merges

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "RodimusTokenizer":
        """Load as every fast tokenizer loads, then fill in what the folder leaves out."""
        tokenizer = super().from_pretrained(*args, **kwargs)
        tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        # this class replaces the code that it names; a folder saved from here needs none
        tokenizer.init_kwargs.pop("auto_map", None)
        # transformers does not save attributes of a class by itself
        tokenizer.init_kwargs.setdefault("padding_side", tokenizer.padding_side)
        return tokenizer


class TokenizerKey(RodimusConfig):
    """The config class that the tokenizer is registered for: only one that no model uses takes
    precedence over a folder's own code."""
