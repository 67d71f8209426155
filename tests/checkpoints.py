"""Small checkpoint folders for the tests of the command line, of exports and of loading."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rodimus import RodimusConfig, RodimusForCausalLM

TEXT = ["hello world, hello again", "def f(x):\n    return x + 1\n", "the quick brown fox"] * 4
# The special tokens of the released tokenizer.
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<role>", "</role>")


def tiny_config(block_type: str = "rodimus_plus", **fields) -> RodimusConfig:
    """Two narrow layers with a window of 9 keys."""
    attn = {"num_heads": 4, "window_size": 16} if block_type == "rodimus_plus" else {}
    return RodimusConfig(
        **{
            "block_type": block_type,
            "d_model": 32,
            "n_layer": 2,
            "vocab_size": 300,
            "mixer_cfg": {"mem_size": 8},
            "attn_cfg": attn,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "tie_word_embeddings": True,
            **fields,
        }
    )


def save_model(folder: Path, block_type: str = "rodimus_plus", **fields) -> RodimusForCausalLM:
    """A model with lively random weights, saved in a folder."""
    torch.manual_seed(0)
    model = RodimusForCausalLM(tiny_config(block_type, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # wide, so that logits tell tokens apart
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def save_released_tokenizer(folder: Path) -> None:
    """The layout of a released folder: a class of its own, whose code cannot be imported."""
    train_tokenizer().save(str(folder / "tokenizer.json"))
    name = "tokenization_rodimus_fast.RodimusTokenizer"
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": [name, name]},
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "cls_token": "[CLS]",
        "gmask_token": "[gMASK]",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "RodimusTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    code = "from modules.chat_format import Chat\n\n\nclass RodimusTokenizer: ...\n"
    (folder / "tokenization_rodimus_fast.py").write_text(code)


def save_plain_tokenizer(folder: Path) -> None:
    """What a training run saves: a fast tokenizer of transformers' own, without a chat template."""
    PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(), eos_token="<|endoftext|>"
    ).save_pretrained(folder)
