"""How the next token is chosen: greedy or drawn, each row of a batch by its own parameters.

Scores get their bias first, then penalties: for repetition as in transformers, for presence and
frequency as in OpenAI's API. The filters are those of transformers, in its order: temperature,
top-k, top-p, min-p. Each is a threshold on a row's scores, so a row's outcome depends on that row
alone. Random numbers are a function of a request's seed and of how many tokens it has drawn, so
neighbours, batch size and order of arrival change nothing.
"""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

# The nucleus of top-p is searched among this many top scores; rows where it is wider are sorted.
_HEAD = 1024

MAX_SEED = 2**63 - 1


def wrapped_seed(number: int) -> int:
    """The seed that any integer stands for: after ``MAX_SEED`` seeds begin again at 0."""
    return number % (MAX_SEED + 1)


def random_seed() -> int:
    """A seed drawn from the operating system's randomness."""
    return secrets.randbelow(MAX_SEED + 1)


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence chooses its tokens.

    Args:
        temperature: Scores are divided by it; 0 takes the likeliest token every time.
        top_k: Keep the k likeliest tokens and those that tie with the last; 0 keeps all.
        top_p: Keep the likeliest tokens until their probabilities reach this share; 0 keeps the
            likeliest and those that tie with it.
        min_p: Keep tokens at least this likely, relative to the likeliest.
        repetition_penalty: Divides positive scores of tokens that the prompt or the continuation
            already has, multiplies negative ones; 1 changes nothing.
        seed: Same seed, same text; None draws one.
        presence_penalty: Subtracted from the scores of tokens that the continuation already has;
            negative values make them likelier.
        frequency_penalty: The same, times the number of times that the continuation has a token.
        logit_bias: Numbers added to the scores of some tokens, by token id; kept as pairs.

    Raises:
        ValueError: a value has another type or is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()

    def __post_init__(self):
        _check("temperature", self.temperature, Real, lambda x: 0 <= x <= 100, "in [0, 100]")
        _check("top_k", self.top_k, Integral, lambda x: x >= 0, "at least 0")
        _check("top_p", self.top_p, Real, lambda x: 0 <= x <= 1, "in [0, 1]")
        _check("min_p", self.min_p, Real, lambda x: 0 <= x <= 1, "in [0, 1]")
        penalty, holds = self.repetition_penalty, lambda x: 0 < x <= 100
        _check("repetition_penalty", penalty, Real, holds, "above 0 and at most 100")
        if self.seed is not None:
            holds, what = lambda x: 0 <= x <= MAX_SEED, f"in [0, {MAX_SEED}]"
            _check("seed", self.seed, Integral, holds, what)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), Real, lambda x: -2 <= x <= 2, "in [-2, 2]")
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how often the continuation has a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0


def is_integer(value) -> bool:
    """Whether a value is an integer, of Python or of numpy; booleans are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check(name, value, kind, holds, what):
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = "an integer" if kind is Integral else "a number"
        raise ValueError(f"{name} must be {expected} {what}, got {value!r:.40}")
    if not holds(value):
        raise ValueError(f"{name} must be {what}, got {value}")


def _pairs(logit_bias):
    """The checked pairs of token and bias."""
    pairs = logit_bias.items() if isinstance(logit_bias, Mapping) else logit_bias
    try:
        pairs = tuple((token, bias) for token, bias in pairs)
    except (TypeError, ValueError) as error:
        got = f"{logit_bias!r:.40}"
        raise ValueError(f"logit_bias must map tokens to numbers, got {got}") from error
    for token, bias in pairs:
        _check("a token of logit_bias", token, Integral, lambda x: x >= 0, "at least 0")
        holds = lambda x: -100 <= x <= 100
        _check(f"logit_bias of token {token}", bias, Real, holds, "in [-100, 100]")
    return pairs


# ----------------------------------------------------------------------------------------------
# Random numbers from a counter
# ----------------------------------------------------------------------------------------------


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# SplitMix64 (Steele, Lea and Flood, 2014): increment and multipliers, as int64.
_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
_UNIFORM_BITS = 48


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64 shifts keep the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """The ``counter``-th number of the stream ``seed``, in [0, 1): float64, shaped like the int64
    inputs."""
    bits = _mix(_mix(seed) + (counter + 1) * _GAMMA)
    return _shift_right(bits, 64 - _UNIFORM_BITS).double() * 2.0**-_UNIFORM_BITS


# ----------------------------------------------------------------------------------------------
# Filters: scores [B, V], parameters [B]
# ----------------------------------------------------------------------------------------------


def penalise_repetition(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores with tokens of ``seen`` (bool ``[B, V]``) made less likely by ``penalty``."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def penalise_counts(scores: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Scores minus ``presence`` where ``counts`` (int ``[B, V]``) are above 0, and minus
    ``frequency`` times the count."""
    counts = counts.float()
    return scores - presence[:, None] * counts.clamp_max(1) - frequency[:, None] * counts


def keep_top_k(scores: Tensor, top_k: Tensor, most: int) -> Tensor:
    """Scores below each row's k-th largest become -inf, 1 <= k <= ``most``; k = 0 keeps all."""
    largest = scores.topk(most).values
    threshold = largest.gather(-1, top_k.clamp_min(1)[:, None] - 1)
    threshold = threshold.masked_fill(top_k[:, None] == 0, float("-inf"))
    return scores.masked_fill(scores < threshold, float("-inf"))


def keep_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """Scores outside the smallest set of likeliest tokens that reaches ``top_p`` become -inf. All
    tokens that tie with the last of the set stay; transformers keeps some, by their order."""
    total = scores.logsumexp(-1, keepdim=True)
    head = scores.topk(min(_HEAD, scores.shape[-1])).values
    threshold, mass = _nucleus(head, total, top_p)
    if head.shape[-1] < scores.shape[-1]:
        wide = (mass < top_p).nonzero().squeeze(-1)
        if wide.numel():
            ordered = scores[wide].sort(-1, descending=True).values
            threshold[wide] = _nucleus(ordered, total[wide], top_p[wide])[0]
    return scores.masked_fill(scores < threshold, float("-inf"))


def _nucleus(ordered, total, top_p):
    """Lowest score of the nucleus ``[B, 1]`` in descending scores, and the total probability of
    these scores ``[B]``."""
    probability = (ordered - total).exp().double()
    reached = probability.cumsum(-1)
    # at least the first, even if rounding or NaN leaves none
    kept = (reached - probability < top_p[:, None]).sum(-1, keepdim=True).clamp_min(1)
    return ordered.gather(-1, kept - 1), reached[:, -1]


def keep_min_p(scores: Tensor, min_p: Tensor) -> Tensor:
    """Scores of tokens less likely than ``min_p`` times the likeliest one become -inf."""
    threshold = scores.amax(-1, keepdim=True) + min_p.log()[:, None]
    return scores.masked_fill(scores < threshold, float("-inf"))


def draw(scores: Tensor, numbers: Tensor) -> Tensor:
    """Tokens ``[B]`` drawn with the probabilities of ``softmax(scores)``: their cumulative sum is
    inverted at ``numbers`` (float64 ``[B]`` in [0, 1)). Tokens of probability 0 are never drawn."""
    reached = scores.softmax(-1).double().cumsum(-1)
    at = numbers[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, at, right=True).squeeze(-1).clamp_max(scores.shape[-1] - 1)


def token_logprobs(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural-log probabilities under the model itself, before any parameter is applied.

    Args:
        logits: ``[B, V]``. tokens: int64 ``[B]``. top: how many of the likeliest to report.

    Returns:
        Log-probabilities of ``tokens`` ``[B]``, and values and ids of the likeliest ``[B, top]``;
        float32.
    """
    log_probabilities = logits.float().log_softmax(-1)
    chosen = log_probabilities.gather(-1, tokens[:, None]).squeeze(-1)
    values, ids = log_probabilities.topk(min(top, logits.shape[-1]))
    return chosen, values, ids


# ----------------------------------------------------------------------------------------------
# Rows of a batch
# ----------------------------------------------------------------------------------------------


class _Filters:
    """The rows' filters, on the device: made when rows change, so that a token copies nothing.

    Args:
        params: One for each row that draws.
        vocab_size: V.
    """

    def __init__(self, params: list[SamplingParams], vocab_size: int, device: torch.device):
        self._params, self._device = params, device
        # a tiny one cannot overflow, because the largest score is subtracted; it prevents 0 / 0
        self._temperature = _float32([max(p.temperature, 1e-30) for p in params], device)
        ranks = [int(p.top_k) if p.top_k < vocab_size else 0 for p in params]
        self._most, self._ranks = max(ranks), torch.tensor(ranks, device=device)
        self._masses = [
            (keep, *self._used(name, neutral))
            for name, neutral, keep in (("top_p", 1.0, keep_top_p), ("min_p", 0.0, keep_min_p))
            if any(getattr(p, name) != neutral for p in params)
        ]

    def _used(self, name, neutral):
        """Rows that use a parameter, None for all of them, and its values there."""
        chosen = [getattr(p, name) for p in self._params]
        rows = [i for i, value in enumerate(chosen) if value != neutral]
        used = [chosen[i] for i in rows]
        used = torch.tensor(used, dtype=torch.float64, device=self._device)
        every = len(rows) == len(chosen)
        return None if every else torch.tensor(rows, device=self._device), used

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores ``[B, V]`` divided by the temperature, -inf for tokens that must not be drawn."""
        scores = (scores - scores.amax(-1, keepdim=True)) / self._temperature[:, None]
        if self._most:
            scores = keep_top_k(scores, self._ranks, self._most)
        for keep, rows, used in self._masses:
            if rows is None:
                scores = keep(scores, used)
            else:
                scores = scores.index_copy(0, rows, keep(scores[rows], used))
        return scores


def not_finite(peak: Tensor) -> Tensor:
    """Where the largest logit of a row is NaN or infinite; others may be -inf."""
    # such a value minus itself is NaN
    return peak - peak != 0


def _float32(numbers, device):
    # explicit, because torch's default dtype may be another, and integers would stay integers
    return torch.tensor(numbers, dtype=torch.float32, device=device)


class _Plan(NamedTuple):
    """How tokens of some rows are chosen; None for what none of the rows uses.

    Attributes:
        bias: Row, token and number of each bias.
        penalty: Repetition penalties, by row.
        counting: Presence and frequency penalties, by row.
        drawing, filters: Rows that draw, and their filters.
    """

    bias: tuple[Tensor, Tensor, Tensor] | None
    penalty: Tensor | None
    counting: tuple[Tensor, Tensor] | None
    drawing: Tensor | None
    filters: _Filters | None


class Sampler:
    """Chooses one token for every row; rows have their own parameters, seed and history.

    Rows pay little for what only others use: filters run over the rows that use them, and the
    tables of seen tokens, ``[rows, V]`` bytes, and of how often a continuation has them, four
    times that, are made when a penalty first needs them.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str = "cpu"):
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.params: list[SamplingParams] = [SamplingParams()] * rows
        # by first row and number of rows
        self._plans: dict[tuple[int, int], _Plan] = {}
        self.seeds = torch.zeros(rows, dtype=torch.long, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.long, device=device)
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None

    def place(self, row: int, params: SamplingParams, prompt: Tensor) -> None:
        """Give a row to a new sequence; ``prompt`` int64 ``[T]`` counts as seen."""
        self.params[row] = params
        self._plans.clear()
        self.seeds[row] = random_seed() if params.seed is None else params.seed
        self.drawn[row] = 0
        if params.repetition_penalty != 1:
            if self.seen is None:
                self.seen = self._table(torch.bool)
            self.seen[row] = False
            self.seen[row, prompt.to(self.device)] = True
        if params.counts_tokens:
            if self.counts is None:
                self.counts = self._table(torch.int32)
            self.counts[row] = 0

    # the tables are written in any mode of torch
    @torch.inference_mode(False)
    def _table(self, dtype):
        shape = (len(self.params), self.vocab_size)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def move(self, source: int, target: int) -> None:
        """Let the sequence of one row go on in another."""
        for rows in (self.params, self.seeds, self.drawn, self.seen, self.counts):
            if rows is not None:
                rows[target] = rows[source]
        self._plans.clear()

    def __call__(self, logits: Tensor, first_row: int = 0) -> Tensor:
        """Choose a token for each row from ``first_row`` on.

        Args:
            logits: ``[B, V]``, of any float dtype.

        Returns:
            int64 ``[B]``; -1 where a row's logits hold NaN or infinity.
        """
        rows = slice(first_row, first_row + logits.shape[0])
        scores, plan = logits.float(), self.plan(first_row, logits.shape[0])
        if plan.bias is not None:
            *places, numbers = plan.bias
            scores = scores.index_put(places, numbers, accumulate=True)
        # a row without a penalty may have stale table entries: by 1, or times 0, they do nothing
        if plan.penalty is not None:
            scores = penalise_repetition(scores, self.seen[rows], plan.penalty)
        if plan.counting is not None:
            scores = penalise_counts(scores, self.counts[rows], *plan.counting)
        peak, tokens = scores.max(-1)
        if plan.drawing is not None:
            at = plan.drawing + first_row
            numbers = uniform(self.seeds[at], self.drawn[at])
            tokens[plan.drawing] = draw(plan.filters(scores[plan.drawing]), numbers)
            self.drawn[at] += 1
        if plan.penalty is not None:
            self.seen[rows].scatter_(1, tokens[:, None], True)
        if plan.counting is not None:
            counts, chosen = self.counts[rows], tokens[:, None]
            counts.scatter_(1, chosen, counts.gather(1, chosen) + 1)
        return tokens.masked_fill(not_finite(peak), -1)

    def plan(self, first_row: int, count: int) -> _Plan:
        """How tokens of ``count`` rows are chosen, until a row is placed or moved."""
        key = first_row, count
        if key not in self._plans:
            params = self.params[first_row : first_row + count]
            bias = penalty = counting = drawing = filters = None
            biased = [(i, *pair) for i, p in enumerate(params) for pair in p.logit_bias]
            if biased:
                row, token, number = zip(*biased, strict=True)
                places = (torch.tensor(x, device=self.device) for x in (row, token))
                bias = (*places, _float32(number, self.device))
            if any(p.repetition_penalty != 1 for p in params):
                penalty = _float32([p.repetition_penalty for p in params], self.device)
            if any(p.counts_tokens for p in params):
                presence = _float32([p.presence_penalty for p in params], self.device)
                counting = presence, _float32([p.frequency_penalty for p in params], self.device)
            drawn = [i for i, p in enumerate(params) if not p.is_greedy]
            if drawn:
                drawing = torch.tensor(drawn, device=self.device)
                filters = _Filters([params[i] for i in drawn], self.vocab_size, self.device)
            self._plans[key] = _Plan(bias, penalty, counting, drawing, filters)
        return self._plans[key]
