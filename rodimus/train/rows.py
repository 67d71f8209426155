"""Rows of tokens: cut from shards, with document boundaries as restarting positions.

A row of ``concat`` packing is ``seq_len`` neighbouring tokens and their successors as labels;
every document inside it starts again at position 0, which resets convolution, state and window in
the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..errors import InputError
from .shards import TokenShards

IGNORE = -100


class Batch(NamedTuple):
    """Rows of one rank, all int64 ``[rows, seq_len]``; ``labels`` is -100 where there is none."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor

    def is_packed(self) -> bool:
        """Whether a document begins inside a row; to be called while the batch is on the CPU."""
        return bool((self.position_ids.diff(dim=1) != 1).any())

    def to(self, device: torch.device) -> Batch:
        """Copies all three to ``device``; the host does not wait for what a GPU is doing."""
        if device.type == "cpu":
            return self
        return Batch(*(x.pin_memory().to(device, non_blocking=True) for x in self))

    def split(self, rows: int) -> list[Batch]:
        """Cuts into micro-batches of ``rows`` rows."""
        return [Batch(*parts) for parts in zip(*(x.split(rows) for x in self), strict=True)]


@dataclass(frozen=True)
class Window:
    """A run of tokens inside one shard."""

    shard: int
    start: int
    length: int


class ConcatRows:
    """Cuts the joined documents of every shard into rows of ``seq_len`` tokens.

    Args:
        shards: Where the tokens are.
        seq_len: Tokens in a row.
        keep_tail: Also yield the last, shorter row of a shard (for evaluation).

    Raises:
        InputError: no shard is long enough for one row.
    """

    def __init__(self, shards: TokenShards, seq_len: int, *, keep_tail: bool = False) -> None:
        self.shards, self.seq_len = shards, seq_len
        # a row needs one token beyond its end, for the last label
        usable = np.array([s.n_tokens - 1 for s in shards.manifest.shards])
        self.ends = np.cumsum(-(-usable // seq_len) if keep_tail else usable // seq_len)
        if self.ends[-1] == 0:
            least, longest = (1 if keep_tail else seq_len) + 1, int(usable.max()) + 1
            raise InputError(
                f"data.seq_len = {seq_len} needs a shard of {least} tokens, "
                f"got {longest} in {shards.path}"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def windows(self, row: int) -> list[Window]:
        """The one window of a row."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[shard - 1]) if shard else 0
        start = (row - first) * self.seq_len
        left = self.shards.manifest.shards[shard].n_tokens - 1 - start
        return [Window(shard, start, min(self.seq_len, left))]


class RowReader:
    """Reads rows of one source into arrays.

    Args:
        rows: ``ConcatRows``, or ``BestFitRows``, which has the same interface.
        mask_doc_start: Leave the first token of a document unpredicted.
    """

    def __init__(self, rows: ConcatRows, *, mask_doc_start: bool) -> None:
        self.rows, self.shards = rows, rows.shards
        self.mask_doc_start = mask_doc_start

    def __call__(self, row: int) -> np.ndarray:
        """int64 ``[3, seq_len]``: ids, labels, positions; an unused tail has id 0 and no label."""
        out = np.zeros((3, self.rows.seq_len), np.int64)
        out[1] = IGNORE
        at = 0
        for window in self.rows.windows(row):
            self._fill(out[:, at : at + window.length], window)
            at += window.length
        if at < self.rows.seq_len:
            # padding is a document of its own
            out[2, at:] = np.arange(self.rows.seq_len - at)
        return out

    def _fill(self, out: np.ndarray, window: Window) -> None:
        tokens = self.shards.read(window.shard, window.start, window.length + 1)
        out[0], out[1, : len(tokens) - 1] = tokens[: window.length], tokens[1:]
        starts = self.shards.starts[window.shard]
        # in the index's own dtype: otherwise numpy would convert the whole index to a common one
        ends = np.array([window.start, window.start + window.length + 1], starts.dtype)
        low, high = np.searchsorted(starts, ends)
        inside = starts[low:high].astype(np.int64) - window.start
        position = np.arange(window.length)
        begin = np.zeros(window.length, np.int64)
        begin[inside[inside < window.length]] = inside[inside < window.length]
        out[2] = position - np.maximum.accumulate(begin)
        if self.mask_doc_start:
            out[1, inside[inside > 0] - 1] = IGNORE
