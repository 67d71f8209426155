"""The order of training data: a pure function of (seed, sample number), in O(1) memory.

Nothing is stored and nothing is shuffled in advance: sample ``i`` of a run is found by permuting
its number, so a run resumes anywhere, on any number of ranks, with the same global batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError

# samples of one mixture block; weights of sources are exact to 1 / _BLOCK
_BLOCK = 4096
_ROUNDS = 6


def permute(indices: np.ndarray, n: int, key: Sequence[int]) -> np.ndarray:
    """A keyed bijection of [0, n): a Feistel network on the next power of four, cycle-walked.

    Args:
        indices: int64, entries in [0, n).
        n: Size of the permuted range.
        key: Non-negative integers; every key gives another permutation.

    Returns:
        int64 shaped like ``indices``.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    round_keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)
    values = np.asarray(indices).astype(np.uint64)
    # the network permutes [0, 4^half); walk on until a value falls back into [0, n)
    todo = np.ones(values.shape, bool)
    while todo.any():
        left, right = values[todo] >> shift, values[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        values[todo] = (left << shift) | right
        todo &= values >= n
    return values.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    # multiply-xorshift finaliser of splitmix64; wraps modulo 2^64 by intent
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = x ^ (x >> np.uint64(29))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(32))


class SampleOrder:
    """Which row of which source is sample ``i``.

    Args:
        sizes: Rows of each source.
        weights: Share of samples drawn from each source. Without weights, every row of all sources
            comes once before any comes again.
        seed: Decides every permutation.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        if min(sizes) < 1:
            raise ValueError(f"every source needs at least one row, got sizes {tuple(sizes)}")
        self.sizes, self.seed = np.asarray(sizes, np.int64), seed
        self.quota = _quotas(weights) if weights else None

    def __call__(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps sample numbers (int64, >= 0) to ``(source, row)``, both int64.

        With weights, each source has a fixed number of slots within a block of samples, in permuted
        places; the rows of a source come in permuted order, each once before any comes again.
        """
        samples = np.asarray(samples, np.int64)
        if self.quota is None:
            ends = self.sizes.cumsum()
            place = self._permuted(samples, ends[-1], 0)
            source = np.searchsorted(ends, place, side="right")
            return source, place - (ends - self.sizes)[source]
        blocks, places = np.divmod(samples, _BLOCK)
        source, drawn = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks):
            here = blocks == block
            of_place, count = self._block(int(block))
            source[here], drawn[here] = of_place[places[here]], count[places[here]]
        drawn += blocks * self.quota[source]
        row = np.empty_like(samples)
        for s, size in enumerate(self.sizes):
            row[source == s] = self._permuted(drawn[source == s], size, s)
        return source, row

    def _permuted(self, drawn: np.ndarray, size: int, stream: int) -> np.ndarray:
        """The number in [0, size) that each draw gives; every epoch has its own permutation."""
        epochs, numbers = np.divmod(drawn, size)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = permute(numbers[here], int(size), (self.seed, 1, stream, int(epoch)))
        return numbers

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source at every place of a block, and how often it occurs before in that block."""
        slots = permute(np.arange(_BLOCK), _BLOCK, (self.seed, 0, block))
        source = np.searchsorted(np.cumsum(self.quota), slots, side="right")
        count = np.empty_like(source)
        for s, quota in enumerate(self.quota):
            count[source == s] = np.arange(quota)
        return source, count


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Slots of each source in a block: proportional, at least one each, ``_BLOCK`` in total.

    Raises:
        InputError: there are more sources than slots.
    """
    if len(weights) > _BLOCK:
        raise InputError(f"data.train takes at most {_BLOCK:,} sources, got {len(weights):,}")
    exact = np.asarray(weights, float) / sum(weights) * _BLOCK
    quota = np.maximum(1, np.floor(exact)).astype(np.int64)
    rest = _BLOCK - int(quota.sum())
    # the largest remainders take what rounding left over
    quota[np.argsort(quota - exact, kind="stable")[: max(rest, 0)]] += 1
    # the largest sources give up the slots by which the smallest were rounded up
    for _ in range(-rest):
        quota[quota.argmax()] -= 1
    return quota
