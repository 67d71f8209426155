"""The interface of all compared models: the catalogue, ``Model`` and ``Session``.

Weights are random and never zero: a processor can be faster on zeros than on data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch

from rodimus_kernels import decode_weight

from ..sizes import StateBytes, config_of, sequence_flops, state_bytes

SEED = 0
"""Seed of all random weights and tokens."""


class Entry(NamedTuple):
    """A model of the catalogue."""

    name: str
    family: str
    source: str


# in loading order: what matters most comes first, in case memory does not suffice for all
CATALOGUE = (
    Entry("rodimus-plus-1.6b", "rodimus_plus", "rodimus"),
    Entry("rwkv6-1.6b", "rwkv6", "rwkv or fla"),
    Entry("qwen2-1.5b", "qwen2", "transformers"),
    Entry("rodimus-1.4b", "rodimus", "rodimus"),
    Entry("qwen3-next-like-1.5b", "qwen3_next", "transformers"),
    Entry("mamba2-like-1.5b", "mamba2", "transformers"),
    Entry("fla-rodimus-plus-1.6b", "rodimus_plus", "fla"),
)
OURS = ("rodimus-plus-1.6b", "rodimus-1.4b")
BASELINES = ("qwen2-1.5b", "rwkv6-1.6b")


def entry(name: str) -> Entry:
    """The catalogue's entry of a name.

    Raises:
        ValueError: the name is not in the catalogue.
    """
    for found in CATALOGUE:
        if found.name == name:
            return found
    raise ValueError(f"expected a model of {[e.name for e in CATALOGUE]}, got {name!r}")


class Session(ABC):
    """One batch of sequences in one engine.

    Attributes:
        token: Long ``[B, 1]``, the token that the next step reads and replaces.
    """

    token: torch.Tensor

    @abstractmethod
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Start over with a prompt ``[B, T]``; logits ``[B, vocab]`` of the last position."""

    @abstractmethod
    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """Append one token ``[B, 1]``; logits ``[B, vocab]`` of the next."""

    @abstractmethod
    def fill(self, context: int) -> None:
        """Set the state to one after ``context`` random tokens, without computing all of them."""

    def rewind(self, context: int) -> None:
        """Return to the state after the first ``context`` tokens; for engines for which
        ``Model.rewinds`` is true."""
        raise NotImplementedError(f"{type(self).__name__} cannot forget tokens")

    @abstractmethod
    def state_bytes(self) -> StateBytes:
        """Bytes the session keeps between two tokens, counted on its tensors."""

    def step(self) -> None:
        """One greedy token: forward, argmax, and the token becomes the next input."""
        # in float32, as transformers; torch's argmax of bfloat16 is six times as slow on a CPU
        self.token.copy_(self.decode(self.token).float().argmax(-1, keepdim=True))

    def run(self, steps: int) -> None:
        """Several greedy tokens, one after the other."""
        for _ in range(steps):
            self.step()


class Model(ABC):
    """One set of weights.

    Attributes:
        name, family: From the catalogue.
        engines: Names that ``session`` takes.
        dtype, device: Of the weights.
        weight_bytes: All weights.
        token_bytes: Weights that one token reads: all but an embedding that is not the head.
        body_parameters: Parameters of all products of a token except the one for the logits.
        weight_dtype: What the matrices of linear layers were rounded to, in our models and in
            llama.cpp: ``"int8"``, ``"int4"`` or None.
        head_parameters: Parameters of the product that gives the logits.
        vocab_size: Number of tokens.
    """

    name: str
    family: str
    scale: str
    engines: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    token_bytes: int
    body_parameters: int
    head_parameters: int
    vocab_size: int
    weight_dtype: str | None

    @abstractmethod
    def session(self, engine: str, batch: int, room: int) -> Session:
        """A session for ``batch`` sequences of at most ``room`` tokens.

        Raises:
            Unavailable: the engine cannot do that.
        """

    def rewinds(self, engine: str) -> bool:
        """Whether a step's time depends on the room of its session, not on the tokens it holds: to
        be timed at a context, the session must have no more room than that, and be rewound."""
        return False

    def forward_flops(self, batch: int, length: int, *, logits: int) -> float:
        """Operations of a forward pass over ``[batch, length]``, a multiply-add counted as two.

        Counted are the products with weights, attention over the keys that a token sees, and
        writing and reading each recurrent state once per token.

        Args:
            logits: Positions of each sequence that get logits.
        """
        body = self.body_parameters
        config = config_of(self.family, self.scale)
        mixing = sequence_flops(self.family, config, length)
        return 2.0 * batch * (length * body + logits * self.head_parameters) + batch * mixing

    def expected_state(self, batch: int, context: int) -> StateBytes:
        """What a session keeps according to the formulas."""
        config = config_of(self.family, self.scale)
        return state_bytes(self.family, config, batch, context, self.dtype.itemsize)


def random_tokens(batch: int, length: int, model: Model) -> torch.Tensor:
    """Tokens ``[B, T]`` on the model's device, the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.vocab_size, (batch, length), generator=generator)
    return ids.to(model.device)


def disagreement(session: Session, ids: torch.Tensor) -> float:
    """Relative error between one prefill and the same tokens with the last one decoded.

    Args:
        session: Its state is that after ``ids`` when this returns.
        ids: ``[B, T]``, T at least 2.
    """
    whole = session.prefill(ids).double()
    session.prefill(ids[:, :-1])
    stepped = session.decode(ids[:, -1:]).double()
    return ((stepped - whole).norm() / whole.norm()).item()


@torch.no_grad()
def randomize(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Matrices get N(0, 1 / inputs), biases and log-rates 0, norms and other vectors 1.

    The normal numbers are one pool that is repeated with a shift: a billion parameters then take a
    second, and products are no faster on them.
    """
    pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
    for i, (name, parameter) in enumerate(parameters):
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith(("bias", "A_log")) else 1.0)
            continue
        key = parameter.dtype, parameter.device
        if key not in pools:
            generator = torch.Generator().manual_seed(SEED)
            pool = torch.randn(2**22 + 3, generator=generator)
            pools[key] = pool.to(parameter.dtype).to(parameter.device)
        _tile(parameter, pools[key].roll(7919 * i) * parameter.shape[-1] ** -0.5)


def _tile(parameter: torch.Tensor, pool: torch.Tensor) -> None:
    flat = parameter.view(-1)
    whole = flat.numel() // pool.numel() * pool.numel()
    flat[:whole].view(-1, pool.numel()).copy_(pool.expand(whole // pool.numel(), -1))
    flat[whole:].copy_(pool[: flat.numel() - whole])


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the quantised weight that it stands for."""
    held = decode_weight(tensor)
    parts = (held,) if isinstance(held, torch.Tensor) else (held.values, held.scale)
    return sum(part.numel() * part.element_size() for part in parts)
