"""Token shards, format 1: what `rodimus data pack` writes and training reads.

    NAME-00000.bin   token ids, raw little-endian uint16 (vocabulary <= 65536) or uint32
    NAME-00000.idx   uint64 start of every document in the .bin, in tokens
    NAME.json        the manifest: counts, vocabulary, tokenizer and file checksums, origin

A document is stored as ``[bos] tokens [eos]``, with the ids the tokenizer defines.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..run_folder import sha256_file

FORMAT_VERSION = 1
# dtypes of the ids, for vocabularies up to 65536 and for larger ones
_DTYPES = ("<u2", "<u4")


@dataclass(frozen=True)
class ShardFile:
    """One .bin with its .idx, as recorded in the manifest."""

    name: str
    n_tokens: int
    n_docs: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of NAME.json; ``n_bytes`` counts the UTF-8 text, for bits per byte."""

    version: int
    dtype: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    n_tokens: int
    n_docs: int
    n_bytes: int
    tokenizer_sha256: str
    source: str
    licence: str
    shards: tuple[ShardFile, ...]


class ShardWriter:
    """Appends documents and cuts a new shard every ``shard_tokens``; ``close`` writes the manifest.

    Args:
        folder: Where the files go; created if missing.
        name: NAME of the files, for example ``train``.
        vocab_size: Every id is below it; it decides the dtype on disk.
        shard_tokens: A shard is closed by the document that reaches this size.
    """

    def __init__(
        self, folder: Path, name: str, vocab_size: int, *, shard_tokens: int = 1 << 28
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.vocab_size, self.shard_tokens = vocab_size, shard_tokens
        self.dtype = np.dtype(_DTYPES[vocab_size > 1 << 16])
        self.shards: list[ShardFile] = []
        self.n_bytes = 0
        self._bin = None
        self._starts: list[int] = []
        self._tokens = 0

    def add(self, ids: Sequence[int], n_bytes: int) -> None:
        """Appends one document of ``ids`` that came from ``n_bytes`` bytes of text."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size == 0:
            return
        if array.min() < 0 or array.max() >= self.vocab_size:
            raise ValueError(
                f"token ids must lie in [0, {self.vocab_size}), "
                f"got {array.min()} to {array.max()} in document {len(self._starts)}"
            )
        if self._bin is None:
            self._bin = self._path(".bin").open("wb")
        self._starts.append(self._tokens)
        self._bin.write(array.astype(self.dtype).tobytes())
        self._tokens += array.size
        self.n_bytes += n_bytes
        if self._tokens >= self.shard_tokens:
            self._finish_shard()

    def close(
        self,
        *,
        bos_token_id: int | None,
        eos_token_id: int | None,
        tokenizer_sha256: str,
        source: str,
        licence: str = "",
    ) -> Manifest:
        """Finishes the last shard and writes the manifest, which makes the shards readable."""
        if self._bin is not None:
            self._finish_shard()
        manifest = Manifest(
            version=FORMAT_VERSION,
            dtype=self.dtype.str,
            vocab_size=self.vocab_size,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            n_tokens=sum(s.n_tokens for s in self.shards),
            n_docs=sum(s.n_docs for s in self.shards),
            n_bytes=self.n_bytes,
            tokenizer_sha256=tokenizer_sha256,
            source=source,
            licence=licence,
            shards=tuple(self.shards),
        )
        text = json.dumps(dataclasses.asdict(manifest), indent=1)
        (self.folder / f"{self.name}.json").write_text(text + "\n")
        return manifest

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}-{len(self.shards):05d}{suffix}"

    def _finish_shard(self) -> None:
        self._bin.close()
        binary, index = self._path(".bin"), self._path(".idx")
        np.asarray(self._starts, dtype="<u8").tofile(index)
        self.shards.append(
            ShardFile(
                binary.stem,
                self._tokens,
                len(self._starts),
                sha256_file(binary),
                sha256_file(index),
            )
        )
        self._bin, self._starts, self._tokens = None, [], 0


class TokenShards:
    """The shards behind one manifest, memory-mapped.

    Args:
        manifest: Path of NAME.json; the shards lie beside it.

    Raises:
        InputError: the manifest is missing or of another format, or a file has the wrong size or
            cannot be opened.
    """

    def __init__(self, manifest: str | Path) -> None:
        self.path = Path(manifest)
        self.manifest = _read_manifest(self.path)
        if not self.manifest.n_tokens:
            raise InputError(f"{self.path} holds no tokens")
        self.dtype = np.dtype(self.manifest.dtype)
        allow_open_files()
        self.tokens = [
            self._map(s.name + ".bin", self.dtype, s.n_tokens) for s in self.manifest.shards
        ]
        self.starts = [
            self._map(s.name + ".idx", np.dtype("<u8"), s.n_docs) for s in self.manifest.shards
        ]

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path = self.path.parent / name
        size = path.stat().st_size if path.exists() else -1
        if size != count * dtype.itemsize:
            got = "a missing file" if size < 0 else f"{size} bytes"
            raise InputError(f"{path} must have {count * dtype.itemsize} bytes, got {got}")
        try:
            return np.memmap(path, dtype, mode="r")
        except OSError as error:
            raise InputError(f"cannot open {path}: {error.strerror}") from error

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses ids that a model of ``vocab_size`` has no rows for.

        Raises:
            InputError: names the shards and both sizes.
        """
        if self.manifest.vocab_size > vocab_size:
            raise InputError(
                f"{self.path} has a vocabulary of {self.manifest.vocab_size}, "
                f"the model one of {vocab_size}"
            )

    def files(self) -> list[tuple[Path, str]]:
        """Every data file with the sha256 its manifest records."""
        names = [(s.name + ".bin", s.bin_sha256) for s in self.manifest.shards]
        names += [(s.name + ".idx", s.idx_sha256) for s in self.manifest.shards]
        return [(self.path.parent / name, digest) for name, digest in names]

    def read(self, shard: int, start: int, count: int) -> np.ndarray:
        """``count`` ids from ``start`` of one shard, as int64.

        Raises:
            InputError: an id outside the vocabulary; names the file and its byte offset.
        """
        ids = self.tokens[shard][start : start + count].astype(np.int64)
        if ids.max(initial=0) >= self.manifest.vocab_size:
            bad = int(np.argmax(ids >= self.manifest.vocab_size))
            file = self.path.parent / (self.manifest.shards[shard].name + ".bin")
            raise InputError(
                f"{file}: id {ids[bad]} at byte {(start + bad) * self.dtype.itemsize} "
                f"is outside the vocabulary of {self.manifest.vocab_size}"
            )
        return ids


def allow_open_files() -> None:
    """Raises this process's limit on open files from what most systems begin with, 1,024, to the
    most it may have. Every mapped file stays open (a trillion tokens are some 7,500 files), and so
    does a connection to every other rank in every group."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read token shards {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not a shard manifest: {error}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{path} must be shard format {FORMAT_VERSION}, got {version!r}")
    try:
        values["shards"] = tuple(ShardFile(**s) for s in values["shards"])
        manifest = Manifest(**values)
        counted = [sum(s.n_tokens for s in manifest.shards), sum(s.n_docs for s in manifest.shards)]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a whole shard manifest: {error}") from error
    if manifest.dtype not in _DTYPES:
        raise InputError(f"{path}: dtype must be {' or '.join(_DTYPES)}, got {manifest.dtype!r}")
    if counted != [manifest.n_tokens, manifest.n_docs]:
        raise InputError(
            f"{path} is damaged: its shards have {counted[0]} tokens in {counted[1]} documents, it "
            f"says {manifest.n_tokens} in {manifest.n_docs}"
        )
    return manifest


def verify(files: Sequence[tuple[Path, str]]) -> None:
    """Hashes files and compares with what their manifest records.

    Raises:
        InputError: the first file that cannot be read or whose contents changed.
    """
    for path, expected in files:
        try:
            got = sha256_file(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        if got != expected:
            raise InputError(f"{path} is damaged: sha256 must be {expected}, got {got}")
