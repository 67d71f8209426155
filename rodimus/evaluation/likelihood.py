"""Loss of every token of whole documents, in memory that does not grow with their length.

Short documents are packed into one row, where nothing crosses from one into the next. A long one is
read in pieces with the state carried over. Both give what one pass over the document alone gives.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..modeling_rodimus import CACHE_NAME
from .documents import Document

# buckets of positions and lengths: below 128, below 256, and so on, each limit twice the last
EDGES = 128 << np.arange(40)
# logits held at once, in elements
_LOGITS = 1 << 24


class Tally:
    """Sums over the predicted tokens: in total, by position in the document, by document length.

    Attributes:
        documents, tokens, n_bytes: What was evaluated; ``tokens`` counts predictions.
        nats: Sum of the losses.
        has_estimates: Bytes of single documents are estimates; the sum over a source is exact.
        is_cut: Some documents of the source were left out.
    """

    def __init__(self) -> None:
        self.documents, self.tokens, self.n_bytes, self.nats = 0, 0, 0.0, 0.0
        self.has_estimates = self.is_cut = False
        # of each bucket: nats, tokens, and by length also documents and bytes
        self._position = np.zeros((len(EDGES) + 1, 2))
        self._length = np.zeros((len(EDGES) + 1, 4))

    def add(self, document: Document, nats: np.ndarray, first: int = 1) -> None:
        """Counts the losses of a document's tokens from ``first`` on, float64 ``[T]``.

        A document may come in pieces; its first piece has ``first = 1``.
        """
        new = int(first == 1)
        self.documents += new
        self.has_estimates |= document.is_estimate
        self.n_bytes += new * document.n_bytes
        self.tokens += len(nats)
        self.nats += float(nats.sum())
        length = np.searchsorted(EDGES, len(document.ids), side="right")
        self._length[length] += nats.sum(), len(nats), new, new * document.n_bytes
        bucket = np.searchsorted(EDGES, np.arange(first, first + len(nats)), side="right")
        np.add.at(self._position[:, 0], bucket, nats)
        np.add.at(self._position[:, 1], bucket, 1)

    def summary(self) -> dict[str, Any]:
        """Plain numbers: nats per token, perplexity, bits per byte; the loss in each bucket."""
        loss = self.nats / max(1, self.tokens)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": round(self.n_bytes),
            "bytes_estimated": self.has_estimates and self.is_cut,
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "bits_per_byte": _bits_per_byte(self.nats, self.n_bytes),
            "by_position": _buckets(self._position),
            "by_length": _buckets(self._length, with_bits=not self.has_estimates),
        }


def _bits_per_byte(nats: float, n_bytes: float) -> float:
    return nats / math.log(2) / max(1.0, n_bytes)


def _buckets(sums: np.ndarray, *, with_bits: bool = False) -> list[dict[str, float]]:
    edges = [0, *EDGES.tolist()]
    rows = []
    for i, (nats, tokens, *more) in enumerate(sums.tolist()):
        if tokens:
            row = {"from": edges[i], "below": edges[i + 1]}
            row |= {"tokens": int(tokens), "loss": nats / tokens}
            if more:
                documents, n_bytes = more
                row["documents"] = int(documents)
                if with_bits:
                    row["bits_per_byte"] = _bits_per_byte(nats, n_bytes)
            rows.append(row)
    return rows


def evaluate(
    model: PreTrainedModel,
    documents: Iterable[Document],
    *,
    tokens_at_once: int = 4096,
    max_tokens: int = 0,
    report: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Loss of every token of every document, except each document's first token.

    Args:
        model: A causal language model, in evaluation mode, on its device.
        documents: Any number, of any length.
        tokens_at_once: Longest forward pass.
        max_tokens: No document is begun after so many tokens; 0 means all are read.
        report: Called now and then with the tally so far.
    """
    tally = Tally()
    row: list[Document] = []
    waiting = 0
    for document in documents:
        if max_tokens and tally.tokens + waiting >= max_tokens:
            tally.is_cut = True
            break
        size = len(document.ids)
        if waiting + size > tokens_at_once and row:
            _add_row(tally, model, row)
            report(tally)
            row, waiting = [], 0
        if size > tokens_at_once:
            for first, nats in _in_pieces(model, document.ids, tokens_at_once):
                tally.add(document, nats, first)
                report(tally)
        else:
            row.append(document)
            waiting += size
    if row:
        _add_row(tally, model, row)
        report(tally)
    return tally


@torch.inference_mode()
def _add_row(tally: Tally, model: PreTrainedModel, row: list[Document]) -> None:
    """Short documents in one row; positions that start again keep them apart."""
    ids = np.concatenate([document.ids for document in row])
    positions = np.concatenate([np.arange(len(document.ids)) for document in row])
    states = model.base_model(
        input_ids=_tensor(ids, model), position_ids=_tensor(positions, model), use_cache=False
    ).last_hidden_state[0]
    nats = _nats(model, states[:-1], ids[1:])
    start = 0
    for document in row:
        end = start + len(document.ids)
        tally.add(document, nats[start : end - 1])
        start = end


@torch.inference_mode()
def _in_pieces(model: PreTrainedModel, ids: np.ndarray, size: int) -> Iterable:
    """Yields ``(first, nats)``: the losses of the tokens from ``first`` on, piece by piece."""
    cache = None
    for start in range(0, len(ids) - 1, size):
        labels = ids[start + 1 : start + 1 + size]
        out = model.base_model(
            input_ids=_tensor(ids[start : start + len(labels)], model),
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        cache = out[CACHE_NAME]
        yield start + 1, _nats(model, out.last_hidden_state[0], labels)


def _tensor(values: np.ndarray, model: PreTrainedModel) -> torch.Tensor:
    return torch.from_numpy(values)[None].to(model.device)


def _nats(model: PreTrainedModel, states: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Loss of each label, float64 ``[T]``, from float32 logits of a few rows at a time."""
    head, targets = model.get_output_embeddings(), torch.from_numpy(labels).to(states.device)
    rows = max(1, _LOGITS // head.weight.shape[0])
    parts = [
        F.cross_entropy(head(some).float(), wanted, reduction="none")
        for some, wanted in zip(states.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts).double().cpu().numpy() if parts else np.zeros(0)
