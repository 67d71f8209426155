"""Best-fit packing: documents are placed whole into rows, with little padding.

Documents longer than a row are first cut into full rows; their remainders and all shorter documents
are packed longest first, each into the fullest row that still has room (best-fit decreasing).
"""

from __future__ import annotations

import numpy as np

from .rows import Window
from .shards import TokenShards


class BestFitRows:
    """Plans all rows of a source at once; the plan is a function of the shards and ``seq_len``.

    Every rank computes the same plan. It takes seconds for 10^6 documents and the memory of a few
    integers per document; for larger sources use ``concat``.

    Args:
        shards: Where the tokens are.
        seq_len: Tokens in a row.
    """

    def __init__(self, shards: TokenShards, seq_len: int) -> None:
        self.shards, self.seq_len = shards, seq_len
        self.pieces = np.concatenate(
            [_pieces(i, shards, seq_len) for i in range(len(shards.tokens))]
        )
        row_of_piece = best_fit(self.pieces[:, 2], seq_len)
        # the pieces of a row become adjacent, in the order of the source
        order = np.argsort(row_of_piece, kind="stable")
        self.pieces = self.pieces[order]
        counts = np.bincount(row_of_piece)
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.ends)

    def windows(self, row: int) -> list[Window]:
        """The pieces of a row; together at most ``seq_len`` tokens."""
        first = self.ends[row - 1] if row else 0
        return [Window(*map(int, piece)) for piece in self.pieces[first : self.ends[row]]]


def _pieces(shard: int, shards: TokenShards, seq_len: int) -> np.ndarray:
    """int64 ``[pieces, 3]`` of shard, start, length: documents cut at multiples of ``seq_len``."""
    starts = shards.starts[shard].astype(np.int64)
    lengths = np.diff(starts, append=shards.manifest.shards[shard].n_tokens)
    parts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(starts)), parts)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    offset = number * seq_len
    length = np.minimum(seq_len, lengths[document] - offset)
    return np.stack([np.full_like(offset, shard), starts[document] + offset, length], 1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns pieces to rows: longest first, each to the row where it leaves the least room.

    Args:
        lengths: int64, entries in [1, ``capacity``].
        capacity: Tokens in a row.

    Returns:
        int64 row of every piece; rows are numbered from 0 without gaps.
    """
    # by_room[n]: rows with room for n more tokens; a piece goes to the smallest n that suffices
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    roomy = np.zeros(capacity + 1, bool)
    row_of_piece = np.empty(len(lengths), np.int64)
    rows = 0
    for piece in np.argsort(-lengths, kind="stable"):
        length = lengths[piece]
        room = length + int(np.argmax(roomy[length:]))
        if roomy[room]:
            row = by_room[room].pop()
            roomy[room] = bool(by_room[room])
        else:
            row, room = rows, capacity
            rows += 1
        row_of_piece[piece] = row
        by_room[room - length].append(row)
        roomy[room - length] = True
    return row_of_piece
