"""Held-out loss in nats per token and in bits per byte; the latter compares across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from .config import DataSection
from .context import model_inputs
from .parallel import Ranks, sum_over_ranks
from .rows import IGNORE, Batch, ConcatRows, RowReader
from .shards import TokenShards


class Evaluation(NamedTuple):
    """Result of one pass over held-out rows."""

    loss: float
    """Mean nats per predicted token."""
    bits_per_byte: float
    """The same in bits per byte of the text of those tokens."""
    tokens: int
    """Predicted tokens."""


class Evaluator:
    """Runs the model over held-out rows, divided among the ranks.

    Rows are cut at ``seq_len`` like training rows, and none sees the row before it. Over all rows,
    every token but the first of a document (the begin mark) is predicted once, so bits per byte
    are exact; with ``tokens`` they are based on the mean bytes per token of the whole set.

    Args:
        sources: Opened manifests.
        config: Row length and masking.
        tokens: Tokens to evaluate, spread evenly; 0 means all.
        micro_batch: Rows in one forward pass of one rank.
        ranks: This process among the others.
        compiled: Whether the model's blocks are compiled; if so, all rows are passed as packed.

    Raises:
        InputError: no document has a token to predict.
    """

    def __init__(
        self,
        sources: list[TokenShards],
        config: DataSection,
        *,
        tokens: int,
        micro_batch: int,
        ranks: Ranks,
        compiled: bool = False,
    ) -> None:
        self.readers = [
            RowReader(ConcatRows(s, config.seq_len, keep_tail=True), mask_doc_start=True)
            for s in sources
        ]
        sizes = np.array([len(reader.rows) for reader in self.readers])
        # range of each source within the rows of all sources
        self.ends = sizes.cumsum()
        self.starts = self.ends - sizes
        self.rows: Sequence[int] | np.ndarray = range(int(self.ends[-1]))
        if tokens and tokens < len(self.rows) * config.seq_len:
            picks = np.linspace(0, len(self.rows) - 1, max(1, tokens // config.seq_len))
            self.rows = np.unique(picks.round().astype(int))
        self.micro_batch, self.ranks = micro_batch, ranks
        self.compiled = compiled
        predictable = sum(s.manifest.n_tokens - s.manifest.n_docs for s in sources)
        if not predictable:
            names = ", ".join(str(s.path) for s in sources)
            raise InputError(f"{names} holds no token to predict: its documents have one each")
        self.bytes_per_token = sum(s.manifest.n_bytes for s in sources) / predictable

    def __call__(self, model: nn.Module, stop: Callable[[], bool]) -> Evaluation | None:
        """Evaluates; None if ``stop()`` became true. It is called after each batch and must return
        the same on all ranks."""
        # summed on the device, so that no batch waits for the one before
        nats = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        predicted = 0.0
        mine, parts = self.ranks.share
        stride = parts * self.micro_batch
        model.eval()
        try:
            for first in range(0, len(self.rows), stride):
                batch = self._batch(first + mine * self.micro_batch)
                predicted += float((batch.labels >= 0).sum()) / self.ranks.per_row
                nats += self._nats(model, batch)
                if stop():
                    return None
        finally:
            model.train()
        total, predicted = sum_over_ranks([nats, predicted], self.ranks.device).tolist()
        count = round(predicted)
        loss = total / max(1, count)
        return Evaluation(loss, loss / math.log(2) / self.bytes_per_token, count)

    @torch.no_grad()
    def _nats(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        # as in training
        is_packed = self.compiled or batch.is_packed()
        batch = batch.to(self.ranks.device)
        return model(
            **model_inputs(batch, self.ranks.context, is_packed=is_packed),
            num_items_in_batch=1,
            use_cache=False,
            loss_only=True,
        ).loss

    def _batch(self, first: int) -> Batch:
        """Rows from ``first`` on; past the end, rows without labels keep the ranks in step."""
        chosen = np.array(self.rows[first : first + self.micro_batch], int)
        sources = np.searchsorted(self.ends, chosen, side="right")
        places = chosen - self.starts[sources]
        read = [self.readers[s](int(row)) for s, row in zip(sources, places, strict=True)]
        while len(read) < self.micro_batch:
            blank = np.zeros((3, self.readers[0].rows.seq_len), np.int64)
            blank[1] = IGNORE
            blank[2] = np.arange(blank.shape[1])
            read.append(blank)
        return Batch(*torch.from_numpy(np.stack(read, 1)))
