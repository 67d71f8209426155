"""States that an engine has computed, from which prompts that begin with their tokens may start."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from .state import SequenceState


@dataclass(frozen=True, eq=False)
class Prefix:
    """A state and, if known, the logits ``[1, V]`` after its last token, which a prompt of exactly
    its tokens needs."""

    state: SequenceState
    logits: Tensor | None = None

    def serves(self, prompt: Tensor) -> bool:
        """Whether an int64 ``[T]`` prompt begins with the state's tokens, and may start from it."""
        tokens = self.state.tokens
        longest = len(prompt) - (self.logits is None)
        return len(tokens) <= longest and torch.equal(prompt[: len(tokens)], tokens)


class Prefixes:
    """States that were added stay; of those that sequences left behind, the last used ones do.

    Args:
        recent: How many states left by sequences are kept.
    """

    def __init__(self, recent: int):
        self.recent = recent
        self._added: list[Prefix] = []
        self._left: list[Prefix] = []

    def __iter__(self) -> Iterator[SequenceState]:
        return (prefix.state for prefix in chain(self._added, self._left))

    @property
    def recent_bytes(self) -> int:
        """Bytes of the states that sequences left behind."""
        return sum(prefix.state.nbytes for prefix in list(self._left))

    def add(self, state: SequenceState) -> None:
        """Keep a state for good."""
        self._added.append(Prefix(state))

    def leave(self, state: SequenceState, logits: Tensor | None = None) -> None:
        """Keep a state as long as it is among the last ones used."""
        known = [x for x in self._left if torch.equal(x.state.tokens, state.tokens)]
        if logits is None and known:
            logits = known[0].logits
        self._use(Prefix(state, logits), known)

    def longest(self, prompt: Tensor) -> Prefix | None:
        """The longest prefix from which a prompt may start, or None."""
        fits = [prefix for prefix in chain(self._added, self._left) if prefix.serves(prompt)]
        found = max(fits, key=lambda prefix: len(prefix.state.tokens), default=None)
        if found in self._left:
            self._use(found, [found])
        return found

    def clear(self) -> None:
        """Forget all states, which is necessary after the model has changed."""
        self._added, self._left = [], []

    def _use(self, prefix, instead):
        others = [x for x in self._left if x not in instead]
        self._left = [*others, prefix][-self.recent :] if self.recent else []
