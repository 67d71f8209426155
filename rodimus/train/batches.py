"""Batches by step: opens and checks the sources, orders their rows and reads them ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .bestfit import BestFitRows
from .config import DataSection
from .order import SampleOrder
from .rows import Batch, ConcatRows, RowReader
from .shards import TokenShards, verify

# batches held ready
_AHEAD = 2


def open_sources(patterns: tuple[str, ...], *, weighted: bool = False) -> list[TokenShards]:
    """Opens every manifest that the patterns name; one pattern may name several.

    Args:
        patterns: Paths of manifests, or globs.
        weighted: Every pattern has a weight, so it must name exactly one manifest.

    Raises:
        InputError: a pattern matches nothing, a manifest is named twice, or the parts disagree on
            vocabulary or tokenizer.
    """
    sources: list[TokenShards] = []
    for pattern in patterns:
        # an existing file comes before a glob: brackets are common in folder names
        found = [pattern] if Path(pattern).is_file() else sorted(glob(pattern, recursive=True))
        if not found:
            path = Path(pattern).absolute()
            raise InputError(f"no token shards at {path}: run `rodimus data pack` first")
        if weighted and len(found) > 1:
            raise InputError(
                f"data.weights needs one manifest an entry, got {len(found)} for {pattern}"
            )
        sources += [TokenShards(path) for path in found]
    _check_once(sources)
    _check_tokens(sources)
    return sources


def _check_tokens(sources: Sequence[TokenShards]) -> None:
    first = sources[0]
    for other in sources[1:]:
        for name in ("vocab_size", "tokenizer_sha256"):
            a, b = getattr(first.manifest, name), getattr(other.manifest, name)
            if a != b:
                raise InputError(f"{other.path} must have {name} {a} as {first.path}, got {b}")


def _check_once(sources: Sequence[TokenShards]) -> None:
    seen: set[Path] = set()
    for source in sources:
        path = source.path.resolve()
        if path in seen:
            raise InputError(f"{source.path} is named twice: data.weights says how often it comes")
        seen.add(path)


def check_held_out(train: Sequence[TokenShards], held_out: Sequence[TokenShards]) -> None:
    """Refuses held-out data that is also trained on, or that has another tokenizer.

    Raises:
        InputError: a manifest is in both, or the vocabulary or tokenizer differs.
    """
    trained = {source.path.resolve() for source in train}
    for source in held_out:
        if source.path.resolve() in trained:
            raise InputError(f"{source.path} is named by data.train and by data.val")
    _check_tokens([*train, *held_out])


def verify_share(sources: list[TokenShards], rank: int, world_size: int) -> None:
    """Checks this rank's share of all shard files against their checksums."""
    files = [file for source in sources for file in source.files()]
    verify(files[rank::world_size])


class TrainData:
    """Batches of training rows by step; the global batch is the same for any number of ranks.

    Args:
        sources: Opened manifests, in the order of ``config.train``.
        config: Row length, packing, weights.
        rows: Rows of a global batch.
        seed: Decides the order.
        rank: This process; it gets rows ``[rank, rank + 1) * rows / world_size`` of a batch.
        world_size: Number of processes.
    """

    def __init__(
        self,
        sources: list[TokenShards],
        config: DataSection,
        *,
        rows: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        kind = {"concat": ConcatRows, "bestfit": BestFitRows}[config.packing]
        cut = [kind(s, config.seq_len) for s in sources]
        self.readers = [RowReader(c, mask_doc_start=config.mask_doc_start) for c in cut]
        self.order = SampleOrder([len(c) for c in cut], config.weights or None, seed)
        share = rows // world_size
        self.mine = np.arange(rank * share, (rank + 1) * share)

    def batch(self, first: int) -> Batch:
        """This rank's rows of the global batch that begins with sample ``first``, on the CPU."""
        sources, rows = self.order(first + self.mine)
        read = [self.readers[s](int(r)) for s, r in zip(sources, rows, strict=True)]
        return Batch(*torch.from_numpy(np.stack(read, 1)))


class Prefetcher:
    """Runs ``load`` ahead in a thread, so that training never waits for the disk.

    Args:
        load: Called with the first sample of each batch in turn; if it raises, ``get`` of that
            batch raises the exception.
        stride: Samples from one batch to the next.
    """

    def __init__(self, load: Callable[[int], Batch], *, stride: int) -> None:
        self.load, self.stride = load, stride
        self._thread: threading.Thread | None = None

    def get(self, first: int) -> Batch:
        """The batch at sample ``first``; if that is not the next one, reading restarts there."""
        if self._thread is None or first != self._next:
            self.close()
            self._start(first)
        self._next = first + self.stride
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _start(self, first: int) -> None:
        self._queue: queue.Queue = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(first, self._queue, self._stop), name="prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, first: int, out: queue.Queue, stop: threading.Event) -> None:
        failed = False
        while not (failed or stop.is_set()):
            try:
                item = self.load(first)
            except Exception as error:
                # handed to the training thread, which raises it at this batch
                item, failed = error, True
            _put(out, item, stop)
            first += self.stride

    def close(self) -> None:
        """Stops the thread and drops the batches it has loaded."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None


def _put(out: queue.Queue, item: object, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            return out.put(item, timeout=0.1)
        except queue.Full:
            continue
