"""Documents to evaluate on, as token ids: from text by the model's tokenizer, or from shards."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..loading import has_tokenizer, read_tokenizer, vocabulary_size
from ..train.shards import TokenShards, verify
from ..train.sources import documents
from ..train.tokenizer import DocumentEncoder


class Document(NamedTuple):
    """One document; its first token is given, every other one is predicted."""

    ids: np.ndarray
    """int64 ``[T]``, the tokenizer's document marks included."""
    n_bytes: float
    """UTF-8 bytes of its text."""
    is_estimate: bool = False
    """``n_bytes`` is estimated from the source's mean bytes per token: shards have no text."""


def read(
    source: str,
    *,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    vocab_size: int,
    field: str = "text",
) -> Iterator[Document]:
    """Yields the documents of a source in a fixed order.

    Args:
        source: Manifest or folder of token shards; or text, as ``rodimus data pack`` takes it:
            a file (txt, md, py, jsonl, parquet), a folder of such files, ``stdlib``, ``hf:NAME``.
        tokenizer: Returns the model's tokenizer; shards can do without one.
        vocab_size: The model's; larger ids are refused.
        field: Name of the text field in jsonl, parquet and datasets.

    Raises:
        InputError: the source cannot be read, is damaged, or does not fit the model.
        ImportError: as ``rodimus.train.sources.documents``.
    """
    manifest = _manifest(source)
    if manifest is None:
        return _from_text(documents(source, field=field), tokenizer(), vocab_size)
    shards = TokenShards(manifest)
    shards.check_vocabulary(vocab_size)
    verify(shards.files())
    _check_tokens(shards, tokenizer)
    return _from_shards(shards)


def _check_tokens(shards: TokenShards, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
    """Refuses ids that mean other tokens to the model, if both sides have a tokenizer.

    Raises:
        InputError: names the first token that differs.
    """
    folder = shards.path.parent / "tokenizer"
    if not has_tokenizer(folder):
        return
    try:
        own = tokenizer().get_vocab()
    except InputError:
        return
    other = read_tokenizer(folder).get_vocab()
    differing = sorted(other.items() - own.items(), key=lambda item: item[1])
    if differing:
        token, number = differing[0]
        raise InputError(
            f"{shards.path} has other tokens than the model ({len(differing):,} differ): "
            f"{token!r} must be {own.get(token, 'no token')}, got {number}"
        )


def _manifest(source: str) -> Path | None:
    """The manifest that a source means, or None for text."""
    path = Path(source)
    if path.suffix == ".json":
        return path
    try:
        if not any(path.glob("*.idx")):
            return None
    except OSError:
        # reading it as text will say why it cannot be read
        return None
    if not (path / "val.json").is_file():
        found = ", ".join(sorted(p.name for p in path.glob("*.json")))
        raise InputError(f"{path} holds token shards but no val.json: name one of {found}")
    return path / "val.json"


def _from_text(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Iterator[Document]:
    n_ids = vocabulary_size(tokenizer)
    if n_ids > vocab_size:
        raise InputError(f"the tokenizer has {n_ids} tokens, the model {vocab_size}")
    encode = DocumentEncoder(tokenizer)
    for text in texts:
        if text:
            (ids,) = encode([text])
            yield Document(np.asarray(ids, np.int64), len(text.encode("utf-8")))


def _from_shards(shards: TokenShards) -> Iterator[Document]:
    whole = shards.manifest
    bytes_per_token = whole.n_bytes / max(1, whole.n_tokens - whole.n_docs)
    for number, starts in enumerate(shards.starts):
        for start, end in pairwise([*starts.tolist(), whole.shards[number].n_tokens]):
            ids = shards.read(number, start, end - start)
            yield Document(ids, (len(ids) - 1) * bytes_per_token, is_estimate=True)
