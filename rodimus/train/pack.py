"""`rodimus data pack SOURCE OUT`: text to token shards, deduplicated and split by document.

A document's sha256 decides everything about it: an exact copy is dropped, and the part (train or
val) is a function of the digest alone, so the same text always lands in the same part. Without
``--tokenizer`` one is trained, on a sample of the training part only.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from ..errors import InputError, first_line
from ..loading import find_tokenizer, vocabulary_size
from .shards import Manifest, ShardWriter
from .sources import STDLIB_LICENCE, documents
from .store import alone
from .tokenizer import DocumentEncoder, tokenizer_digest, train_tokenizer

_BATCH_BYTES = 1 << 20
# prefix of the folder within OUT where a pack is made
_UNFINISHED = ".pack-"


def split_documents(
    source: str, val_fraction: float, *, field: str = "text"
) -> Iterator[tuple[str, str, bytes]]:
    """Yields ``(part, text, digest)`` with empty documents and exact copies left out.

    The digests of all documents stay in memory: about 100 bytes each, 10 GB for 10^8 documents.
    """
    seen: set[bytes] = set()
    for text in documents(source, field=field):
        digest = hashlib.sha256(text.encode("utf-8")).digest()[:16]
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        is_val = int.from_bytes(digest[:8], "big") < val_fraction * 2**64
        yield ("val" if is_val else "train"), text, digest


def pack(
    source: str,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    tokenizer_sample: float = 0.2,
    val_fraction: float = 0.02,
    field: str = "text",
    shard_tokens: int = 1 << 28,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Writes ``OUT/train.json``, ``OUT/val.json``, their shards and ``OUT/tokenizer``.

    Args:
        source: What ``sources.documents`` accepts.
        out: Folder to write.
        tokenizer: Folder of a tokenizer, model or run, or ``owner/name`` on the hub; by default one
            is trained.
        vocab_size: Size of a trained vocabulary.
        tokenizer_sample: Share of the training documents a tokenizer is trained on; if that
            selects no document, all of them.
        val_fraction: Share of documents held out.
        field: Text field of jsonl, parquet and datasets.
        shard_tokens: Size at which a shard is closed.
        overwrite: Write into ``out`` even if it is not empty: an earlier pack is replaced, other
            files stay.

    Returns:
        The manifest of each part.

    Raises:
        InputError: the source cannot be read, a part would be empty, a number is out of range, or
            ``out`` is not empty.
    """
    _check_shares(val_fraction, tokenizer_sample)
    if shard_tokens < 1:
        raise InputError(f"--shard-tokens must be positive, got {shard_tokens}")
    out = Path(out)
    if not overwrite and out.is_dir() and any(out.iterdir()):
        what = "holds a pack already" if (out / "train.json").is_file() else "is not empty"
        if any(out.glob(f"{_UNFINISHED}*")):
            what = "holds a pack that was killed or is at work"
        raise InputError(f"{out} {what}: name another folder, or pass --overwrite")
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, is_new=is_new):
        for killed in out.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(killed, ignore_errors=True)
        # inside OUT, because its parent may be another file system or not writable
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=out) as folder:
            manifests = _write_parts(
                source,
                Path(folder),
                find_tokenizer(tokenizer)
                if tokenizer is not None
                else learn(source, vocab_size, tokenizer_sample, val_fraction, field),
                val_fraction=val_fraction,
                field=field,
                shard_tokens=shard_tokens,
            )
            _replace(Path(folder), out)
    return manifests


def learn(
    source: str, vocab_size: int, tokenizer_sample: float, val_fraction: float, field: str
) -> PreTrainedTokenizerFast:
    """The tokenizer that ``pack`` trains with these arguments.

    Raises:
        InputError: the source or an argument is wrong, or the source holds no text to train on.
    """
    _check_shares(val_fraction, tokenizer_sample)

    def sample(share: float) -> Iterator[str]:
        for part, text, digest in split_documents(source, val_fraction, field=field):
            if part == "train" and int.from_bytes(digest[8:], "big") < share * 2**64:
                yield text

    # a share of few documents may select none of them
    share = tokenizer_sample if any(sample(tokenizer_sample)) else 1.0
    if not any(sample(share)):
        raise _no_text(source)
    return train_tokenizer(sample(share), vocab_size)


def _no_text(source: str) -> InputError:
    return InputError(f"the train part of {source} is empty: no text was found for it")


def _check_shares(val_fraction: float, tokenizer_sample: float) -> None:
    if not 0 <= val_fraction < 1:
        raise InputError(f"--val-fraction must lie in [0, 1), got {val_fraction}")
    if not 0 <= tokenizer_sample <= 1:
        raise InputError(f"--tokenizer-sample must lie in [0, 1], got {tokenizer_sample}")


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the Rust writer raises bare exceptions
        raise InputError(f"the tokenizer cannot be written: {first_line(error)}") from error


def _write_parts(
    source, folder, learned, *, val_fraction, field, shard_tokens
) -> dict[str, Manifest]:
    _save_tokenizer(learned, folder / "tokenizer")
    encode = DocumentEncoder(learned)
    parts = ("train", "val") if val_fraction > 0 else ("train",)
    n_ids = vocabulary_size(learned)
    writers = {p: ShardWriter(folder, p, n_ids, shard_tokens=shard_tokens) for p in parts}
    n_docs = 0
    for batch in _batches(split_documents(source, val_fraction, field=field)):
        n_docs += len(batch)
        texts = [text for _, text in batch]
        for (part, text), ids in zip(batch, encode(texts), strict=True):
            writers[part].add(ids, len(text.encode("utf-8")))
    if writers["train"].n_bytes == 0:
        raise _no_text(source)
    if "val" in writers and writers["val"].n_bytes == 0:
        raise InputError(
            f"the val part of {source} is empty: a document is held out whole, and of"
            f" {n_docs} document{'s' if n_docs > 1 else ''} none was; pass a larger"
            " --val-fraction, or --val-fraction 0 to hold out nothing"
        )
    return {
        part: writer.close(
            bos_token_id=encode.bos,
            eos_token_id=encode.eos,
            tokenizer_sha256=tokenizer_digest(folder / "tokenizer"),
            source=source,
            licence=STDLIB_LICENCE if source == "stdlib" else "",
        )
        for part, writer in writers.items()
    }


def _replace(made: Path, out: Path) -> None:
    """Moves a finished pack into ``out``, over an earlier one. Manifests are deleted first and
    written last, so that none is ever beside the shards of another pack."""
    manifests = [out / f"{part}.json" for part in ("train", "val")]
    # also those of a pack that was killed here and has no manifest
    shards = [
        path
        for manifest in manifests
        for path in out.glob(f"{manifest.stem}-[0-9][0-9][0-9][0-9][0-9].*")
        if path.suffix in (".bin", ".idx")
    ]
    if any(path.is_file() for path in manifests + shards):
        # leftover files of the old tokenizer would be read as part of the new one
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
    for path in manifests + shards:
        path.unlink(missing_ok=True)
    files = [path.relative_to(made) for path in made.rglob("*") if path.is_file()]
    # shards first: if this is interrupted, they tell the next pack that the rest is a pack's too
    for path in sorted(files, key=lambda path: (out / path in manifests, len(path.parts))):
        # a tokenizer keeps additional chat templates in a subfolder
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / path, out / path)


def _batches(items: Iterator[tuple[str, str, bytes]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for part, text, _ in items:
        batch.append((part, text))
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def run(options: argparse.Namespace) -> None:
    """The command ``rodimus data pack``: every option is an argument of ``pack``.

    Raises:
        InputError: a source or an option is wrong, a package is missing, or nothing can be written.
    """
    start = time.perf_counter()
    names = inspect.signature(pack).parameters
    try:
        manifests = pack(**{name: getattr(options, name) for name in names})
    except (ImportError, OSError) as error:
        raise InputError(str(error)) from error
    for part, m in manifests.items():
        print(
            f"{part:5s} {m.n_docs:>9,} documents {m.n_bytes / 1e6:>9.2f} MB "
            f"{m.n_tokens:>13,} tokens  {m.n_bytes / m.n_tokens:.2f} bytes/token"
        )
    print(f"wrote {options.out} in {time.perf_counter() - start:.1f} s")


def run_tokenizer(options: argparse.Namespace) -> None:
    """The command ``rodimus tokenizer train``.

    Raises:
        InputError: a source or an option is wrong, a package is missing, or ``OUT`` is not empty or
            cannot be written.
    """
    out = Path(options.out)
    names = inspect.signature(learn).parameters
    try:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} is not empty: name another folder")
        tokenizer = learn(**{name: getattr(options, name) for name in names})
        is_new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory
        with alone(out, is_new=is_new), made(prefix=_UNFINISHED, dir=out) as folder:
            _save_tokenizer(tokenizer, Path(folder))
            _replace(Path(folder), out)
    except (ImportError, OSError) as error:
        raise InputError(str(error)) from error
    print(f"wrote {out}, {len(tokenizer):,} tokens")
