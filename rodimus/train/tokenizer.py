"""A byte-level BPE tokenizer: trained on an iterator of texts, kept as a HuggingFace folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..errors import InputError
from ..run_folder import sha256_file

BOS, EOS = "<|begin|>", "<|end|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learns byte-level BPE merges; any text round-trips exactly.

    Args:
        texts: The training part only: held-out text must not shape the vocabulary.
        vocab_size: At least 258: 256 bytes and the two document marks.

    Returns:
        A tokenizer that puts ``<|begin|>`` (id 0) before a text; ``<|end|>`` (id 1) is its end
        token, and pads batches on the left.

    Raises:
        InputError: ``vocab_size`` is too small.
    """
    if vocab_size < 258:
        raise InputError(f"vocabulary must have at least 258 entries, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    # no clean_up: decoding must give back the bytes that were encoded
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


class DocumentEncoder:
    """Turns texts into documents ``[bos] tokens [eos]``, in parallel where the machine can.

    A text that spells a special token is encoded as plain text, never as the token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.backend.encode_special_tokens = True
        # a tokenizer's folder may enable both for batches of a model; documents need neither
        self.backend.no_truncation()
        self.backend.no_padding()
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._head = [] if self.bos is None else [self.bos]
        self._tail = [] if self.eos is None else [self.eos]

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Ids of every text, with the document marks the tokenizer defines."""
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._head + e.ids + self._tail for e in encoded]


def tokenizer_digest(folder: str | Path) -> str:
    """sha256 of the folder's ``tokenizer.json``: what binds shards to their tokenizer."""
    return sha256_file(Path(folder) / "tokenizer.json")
