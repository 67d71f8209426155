"""The engine: many sequences at once over preallocated slots, joining and leaving at any step.

A step reads at most one chunk of prompts, then gives every running sequence its next token. Slots
in use are always the first ones: when a sequence ends, the last one moves into its place at once.
Prompts are read by the model's own cached forward, short ones together; decoding runs the same
modules over the slots.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import compress, islice, pairwise
from numbers import Integral

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import first_line
from ..loading import end_tokens
from .decode import Decoder
from .prefixes import Prefix, Prefixes
from .sampling import Sampler, SamplingParams, is_integer, not_finite, token_logprobs
from .state import SequenceState, SlotStates, StateLayout
from .text import TextStream, encode, skipped_tokens

MAX_LOGPROBS = 20
# most prompts read in one forward: their states take memory in addition to the slots
MOST_TOGETHER = 16
# the least share of tokens in such a forward on a CPU, where padding costs as much as tokens; on a
# GPU padding costs little compared with the launches of another forward
_LEAST_FULL_ON_CPU = 0.75
# positions of a prompt whose log-probabilities are computed at once: each takes a few copies of its
# logits in float32
_SCORED_AT_ONCE = 64
# the error of generations that were under way in such a step
STEP_FAILED = "a step of the engine failed or was interrupted"


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Args:
        prompt: Token ids, at least one; or text, which needs a tokenizer and gets the special
            tokens that the tokenizer adds.
        max_new_tokens: Most tokens to generate, the one that ends the text included. At least 1;
            with ``prompt_logprobs`` it may be 0, which scores the prompt alone.
        sampling: How tokens are chosen; greedy by default.
        stop: Strings that end the text; the text does not contain them. Needs a tokenizer.
        stop_tokens: Tokens that end the text; None for the model's end-of-text tokens.
        logprobs: Report log-probabilities of each token and of this many likeliest; None for none.
        prompt_logprobs: The same for the tokens of the prompt, which is then read from its
            beginning even if a state of that is stored.
        keep_state: Return the state at the end, to continue from it later.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int = 128
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    keep_state: bool = False


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities under the model, before any sampling parameter.

    Attributes:
        token, logprob: The token chosen, and its log-probability.
        top: Tokens and log-probabilities of the likeliest, in order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """What is new since the last call of ``drain``: tokens, text, log-probabilities, and the finish
    reason if it ended."""

    tokens: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    finish_reason: str | None

    def then(self, later: "Delta") -> "Delta":
        """Both, as one call of ``drain`` would have returned them."""
        return Delta(
            tokens=self.tokens + later.tokens,
            text=self.text + later.text,
            logprobs=self.logprobs + later.logprobs,
            finish_reason=later.finish_reason,
        )


class Generation:
    """A request inside an engine, and what it has produced.

    Attributes:
        tokens: Generated so far, with the token that ended the text.
        text: Text of those tokens, as a continuation of the prompt's, if the engine has a
            tokenizer; without what stopped it.
        logprobs: One entry per token, if requested.
        prompt_logprobs: One entry per token of the prompt except the first, if requested; complete
            when the first token is generated.
        finish_reason: None while it runs; then "stop" (an end-of-text token or a stop string),
            "length", "cancelled" or "error".
        error: What went wrong, for "error": with the model, the step, or the text of the tokens.
        prefix_tokens: Tokens of the prompt that were not read because a kept state covers them.
        state: After the end, if requested; it has read all tokens but the last one generated.
        submitted, started, finished: Seconds of ``time.perf_counter``: request, first token, end.
    """

    def __init__(self, request: Request, prompt: Tensor, stop_tokens: frozenset[int]):
        self.request, self.prompt, self.stop_tokens = request, prompt, stop_tokens
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.prefix_tokens = 0
        self.state: SequenceState | None = None
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.finished: float | None = None
        self.stream: TextStream | None = None
        # set after a forward of several prompts failed: the one at fault is not known
        self.is_read_alone = False
        self._taken = (0, 0)

    def __repr__(self) -> str:
        shown = f"{self.text!r}, {len(self.tokens)} tokens"
        return f"<Generation {shown}, finish_reason={self.finish_reason!r}>"

    @property
    def text(self) -> str:
        """Text generated so far."""
        return "" if self.stream is None else self.stream.text

    def read_tokens(self) -> Tensor:
        """int64 ``[T]``: what the model has read, all but the newest token."""
        return torch.cat((self.prompt, self.prompt.new_tensor(self.tokens[:-1])))

    def drain(self) -> Delta:
        """What is new since the last call."""
        tokens, characters = self._taken
        self._taken = (len(self.tokens), len(self.text))
        return Delta(
            tokens=self.tokens[tokens:],
            text=self.text[characters:],
            logprobs=self.logprobs[tokens:],
            finish_reason=self.finish_reason,
        )


@dataclass
class EngineStats:
    """What an engine has done since it was made."""

    steps: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


@dataclass
class _Reading:
    """Prompts that the model is reading, one in chunks or several whole: a cache that has read
    ``read`` tokens of each, or in ``whole`` what the same prompt left behind earlier."""

    generations: list[Generation]
    cache: Cache | None
    read: int
    whole: Prefix | None = None


class Engine:
    """Generates for many requests at once.

    Greedy tokens equal those of ``model.generate`` (without ``window_dtype``), and no sequence's
    tokens depend on its neighbours: both exactly in float32, up to the rounding that changes with
    the batch size. Not thread-safe: one thread calls it.

    Args:
        model: A Rodimus or Rodimus+ language model; may have adapters, hooks, quantised weights. It
            is put into evaluation mode and stays there: before training goes on, call ``train()``.
        tokenizer: For prompts, answers and stop strings as text; without one the engine knows
            tokens only.
        slots: Sequences that run at once; their memory is ``slots * state_bytes(...)``, made here.
        prefill_chunk: Most tokens of prompts read between two tokens of the running sequences.
        max_length: Most tokens of prompt and continuation; None for no limit, which all models
            allow but a Rodimus+ without a window.
        window_dtype: Dtype of the values in the slots' windows: None for the model's dtype, or
            ``torch.int8``, which takes about half the memory and rounds them
            (:func:`rodimus_kernels.reference.quantize_values`) after the prompt has been read.
        recent_states: How many of the states that sequences leave behind, after the prompt and at
            the end, are kept: prompts that begin with the same tokens, such as the next turn of a
            conversation, start from them. Each takes as much memory as a state file. After a
            change of the model, ``prefixes.clear()`` drops the states that it had computed before.
        cuda_graphs: On a GPU, capture the decode step once per batch size. Later changes to the
            model take effect from the next request on.

    Raises:
        ValueError: the model is no language model of this package, on several devices or on the
            meta device, the tokenizer is a name, a number is not an integer of at least 1
            (``recent_states``: 0), ``max_length`` is missing, or ``window_dtype`` is neither of the
            two, or given for a model without attention.
    """

    # tensors made here are written in any mode of torch, and in other threads
    @torch.inference_mode(False)
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        slots: int = 8,
        prefill_chunk: int = 512,
        max_length: int | None = None,
        window_dtype: torch.dtype | None = None,
        recent_states: int = 0,
        cuda_graphs: bool = True,
    ):
        _check_model(model)
        _check_devices(model)
        if isinstance(tokenizer, str):
            raise ValueError(
                f"tokenizer must be one of transformers, got the name {tokenizer!r}:"
                " rodimus.loading.load_tokenizer loads it"
            )
        slots = _at_least("slots", 1, slots)
        prefill_chunk = _at_least("prefill_chunk", 1, prefill_chunk)
        if max_length is not None:
            max_length = _at_least("max_length", 1, max_length)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.slots, self.prefill_chunk, self.max_length = slots, prefill_chunk, max_length
        self._place = dtype, self.device = _place_of(model)
        self.layout = StateLayout.of(
            model.config, dtype, max_length=max_length, window_dtype=window_dtype
        )
        self.states = SlotStates(self.layout, slots, self.device)
        self.decoder = Decoder(model, self.states, cuda_graphs=cuda_graphs)
        self.sampler = Sampler(slots, model.config.vocab_size, self.device)
        # a tokenizer's end tokens may be outside the model's vocabulary
        size = model.config.vocab_size
        self.end_tokens = [x for x in end_tokens(model, tokenizer) if 0 <= x < size]
        self.skipped_tokens = frozenset() if tokenizer is None else skipped_tokens(tokenizer, size)
        self.prefixes = Prefixes(_at_least("recent_states", 0, recent_states))
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.stats = EngineStats()
        # a step is only launched, and the host is free until it reads the tokens
        self._computes_apart = self.device.type != "cpu"
        self._reading: _Reading | None = None
        # the state of the prompt read last and the generation it was read for, if the first waiting
        # request has the same prompt
        self._shared: tuple[Prefix, Generation] | None = None
        self._news: list[Generation] = []

    # -- requests ------------------------------------------------------------------------------

    def submit(self, request: Request | str) -> Generation:
        """Queue a request, or a text to continue with a request's defaults; ``step`` does the work.

        Raises:
            ValueError: the request cannot be served; the message says what was expected.
        """
        generation = self.prepare(request)
        self.enqueue(generation)
        return generation

    def enqueue(self, generation: Generation) -> None:
        """Queue a generation that ``prepare`` made."""
        self.waiting.append(generation)

    def prepare(self, request: Request | str, like: Generation | None = None) -> Generation:
        """Check a request without queueing it. Any thread may call this; for a prompt of text, only
        the thread that steps, because the engine's tokenizer is used.

        Args:
            like: The result for a request with the same prompt, which is then not checked again.

        Raises:
            ValueError: the request cannot be served; the message says what was expected.
        """
        if isinstance(request, str):
            request = Request(request)
        if not isinstance(request, Request):
            raise ValueError(
                f"expected a Request or text, got {type(request).__name__}: the token ids of one"
                " prompt are given as Request(ids)"
            )
        self._check_place()
        prompt = self._check_prompt(request.prompt) if like is None else like.prompt
        for name in ("logprobs", "prompt_logprobs"):
            most = getattr(request, name)
            if most is not None and not (is_integer(most) and 0 <= most <= MAX_LOGPROBS):
                raise ValueError(f"{name} must be an integer in [0, {MAX_LOGPROBS}], got {most!r}")
        least = 1 if request.prompt_logprobs is None else 0
        total = len(prompt) + _at_least("max_new_tokens", least, request.max_new_tokens)
        if self.max_length is not None and total > self.max_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and max_new_tokens is"
                f" {request.max_new_tokens}: {total} together, expected at most {self.max_length}"
            )
        if not isinstance(request.sampling, SamplingParams):
            got = type(request.sampling).__name__
            raise ValueError(f"sampling must be SamplingParams, got {got}")
        self._check_tokens("logit_bias", [token for token, _ in request.sampling.logit_bias])
        self._check_stop(request.stop)
        ends = self.end_tokens
        if request.stop_tokens is not None:
            ends = self._check_tokens("stop_tokens", request.stop_tokens)
        return Generation(request, prompt, frozenset(ends))

    def _check_place(self):
        place, made_for = _place_of(self.model), self._place
        if place != made_for:
            raise ValueError(
                f"the model is {place[0]} on {place[1]} now, and the engine was made for"
                f" {made_for[0]} on {made_for[1]}: make another Engine"
            )

    def cancel(self, generation: Generation) -> None:
        """End a request now, wherever it is; one that has ended is left as it is.

        If this raises, for example because memory for a state that is left behind runs out, it ends
        everything under way, as a failed step does.
        """
        if generation.finish_reason is not None:
            return
        if generation in self.running:
            self._finish(generation, "cancelled")
            try:
                self._leave(self.running.index(generation))
            except BaseException:
                self._break_off()
                raise
            return
        if self._reading is not None and generation in self._reading.generations:
            self._reading = None
        # after an interrupted step it may be in none of these places
        elif generation in self.waiting:
            self.waiting.remove(generation)
            self._let_go()
        self._finish(generation, "cancelled")

    def read(self, prompt: str | Sequence[int]) -> SequenceState:
        """The state after reading a prompt, tokens or text: for ``add_prefix``, or for a file."""
        prompt = self._check_prompt(prompt)
        cache = DynamicCache(config=self.model.config)
        for chunk in prompt.split(self.prefill_chunk):
            self._read_chunk([chunk], cache)
        return SequenceState.from_cache(cache, prompt)

    def add_prefix(self, state: SequenceState) -> None:
        """Let every later prompt that begins with the state's tokens, and is longer, start from it.

        The state must come from this model: ``load_state`` checks that.

        Raises:
            ValueError: the state has other shapes or another dtype than this model's.
        """
        self.layout.check(state)
        self.prefixes.add(state.to(self.device))

    def _check_prompt(self, prompt):
        """The prompt as int64 ``[T]`` on the CPU."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    "the prompt must be a list of token ids, got str: the engine has no tokenizer"
                )
            prompt = encode(self.tokenizer, prompt, self.model.config.vocab_size)
        ids = self._check_tokens("the prompt", prompt)
        if not ids:
            raise ValueError("the prompt must have at least one token")
        return torch.tensor(ids, dtype=torch.long, device="cpu")

    def _check_tokens(self, name, tokens) -> list[int]:
        # a tensor or an array is taken as well as a list
        ids = tokens.tolist() if hasattr(tokens, "tolist") else tokens
        if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
            raise ValueError(f"{name} must be a list of token ids, got {type(tokens).__name__}")
        ids = list(ids)
        for kind in set(map(type, ids)):
            if not issubclass(kind, Integral) or kind is bool:
                hint = ": give one row of a batch, as in input_ids[0]" if kind is list else ""
                raise ValueError(
                    f"{name} must be a list of token ids, got {kind.__name__} in it{hint}"
                )
        size = self.model.config.vocab_size
        for token in (min(ids), max(ids)) if ids else ():
            if not 0 <= token < size:
                raise ValueError(f"tokens of {name} must be in [0, {size}), got {token}")
        return ids

    def _check_stop(self, stop):
        if not isinstance(stop, tuple | list) or not all(isinstance(text, str) for text in stop):
            got = f"the string {stop!r}" if isinstance(stop, str) else repr(stop)
            raise ValueError(f"stop must be a tuple of strings, got {got}")
        if stop and (self.tokenizer is None or "" in stop):
            problem = "an empty string" if self.tokenizer else "no tokenizer in the engine"
            raise ValueError(
                f"stop needs a tokenizer and strings that are not empty, got {problem}"
            )

    # -- work ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self.running or self.waiting or self._reading)

    @torch.no_grad()
    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Generation]:
        """Read at most one chunk of prompts, then give each running sequence one token.

        A step that raises, or is interrupted, ends everything under way with an error, because
        states may have advanced without a token. What waits goes on waiting.

        Args:
            meanwhile: Work for the host that needs nothing from this step, such as delivering the
                news of the previous one. Called once: while a GPU computes the step's tokens, where
                that is possible, else first.

        Returns:
            The generations with news, those cancelled since the last step included.
        """
        try:
            reads = self._reading or (self.waiting and len(self.running) < self.slots)
            if reads or not (self.running and self._computes_apart):
                meanwhile()
                meanwhile = lambda: None
            self._read_prompts()
            if self.running:
                self._decode(meanwhile)
        except BaseException:
            self._break_off()
            raise
        self.stats.steps += 1
        news, self._news = list(dict.fromkeys(self._news)), []
        return news

    def stream(self, request: Request | str) -> Iterator[Delta]:
        """Submit a request or a text and yield what it produces; other requests go on in between.

        Leaving the loop early cancels the request.

        Raises:
            ValueError: the request cannot be served; raised at once, not in the loop.
        """
        return self._stream(self.prepare(request))

    def _stream(self, generation):
        self.enqueue(generation)
        try:
            while generation.finish_reason is None:
                self.step()
                delta = generation.drain()
                if delta.tokens or delta.finish_reason:
                    yield delta
        finally:
            self.cancel(generation)

    def generate(self, requests: Request | str | Iterable[Request | str]) -> list[Generation]:
        """Run requests to their ends, as many at once as there are slots; results in order.

        An interrupt cancels them all.

        Args:
            requests: Requests or texts, as ``submit`` takes them, or one of either.

        Raises:
            ValueError: one of them cannot be served; none is begun.
        """
        # what a tokenizer returns would be the texts "input_ids" and "attention_mask"
        if isinstance(requests, str | Request | Mapping):
            requests = [requests]
        generations = [self.prepare(request) for request in requests]
        for generation, after in pairwise(generations):
            if torch.equal(generation.prompt, after.prompt):
                after.prompt = generation.prompt
        with ExitStack() as ends:
            # each is cancelled, even if cancelling another one raises
            for generation in reversed(generations):
                ends.callback(self.cancel, generation)
            for generation in generations:
                self.enqueue(generation)
            for generation in generations:
                while generation.finish_reason is None:
                    self.step()
        return generations

    def _break_off(self):
        under_way = self.running + (self._reading.generations if self._reading else [])
        self.running, self._reading = [], None
        for generation in under_way:
            if generation.finish_reason is None:
                self._fail(generation, STEP_FAILED)

    def _read_prompts(self):
        room = self.prefill_chunk
        if self.waiting and self._reading is None and len(self.running) < self.slots:
            self.decoder.follow_model(is_idle=not self.running)
        while True:
            if self._reading is None:
                if not self.waiting or len(self.running) == self.slots:
                    return
                self._reading = self._start_reading(room)
                if self._reading is None:
                    return
                for _ in self._reading.generations:
                    self.waiting.popleft()
                self._let_go()
            reading = self._reading
            if reading.whole is not None:
                self._enter(*reading.generations, reading.whole.state, reading.whole.logits)
                self._reading = None
                continue
            # chunks are counted from each prompt's start, whatever else is read in the same step
            chunks = [x.prompt[reading.read :][: self.prefill_chunk] for x in reading.generations]
            room -= _places(chunks)
            if room < 0:
                return
            self._read_on(reading, chunks)

    def _read_on(self, reading, chunks):
        generations = reading.generations
        scored = [x.request.prompt_logprobs is not None for x in generations]
        try:
            logits = self._read_chunk(chunks, reading.cache, every_token=any(scored))
        except FloatingPointError as error:
            self._reading = None
            if len(generations) == 1:
                self._fail(generations[0], str(error))
                return
            for generation in generations:
                generation.is_read_alone = True
            self.waiting.extendleft(reversed(generations))
            return
        self.stats.prompt_tokens += sum(map(len, chunks))
        for row in compress(range(len(chunks)), scored):
            self._score(generations[row], reading.read, logits[row, -len(chunks[row]) :])
        reading.read += max(map(len, chunks))
        if reading.read < len(generations[0].prompt):
            return
        for row, generation in enumerate(generations):
            state = SequenceState.from_cache(reading.cache, generation.prompt, row)
            self._enter(generation, state, logits[row : row + 1, -1].clone())
        self._reading = None

    def _score(self, generation, read, logits):
        """Report log-probabilities of a prompt from the logits ``[T, V]`` after its tokens
        ``read .. read + T - 1``, each of which predicts the token that follows."""
        targets = generation.prompt[read + 1 :][: len(logits)].to(self.device)
        pairs = (x.split(_SCORED_AT_ONCE) for x in (logits[: len(targets)], targets))
        for some, tokens in zip(*pairs, strict=True):
            most = generation.request.prompt_logprobs
            generation.prompt_logprobs += _entries(some, tokens, most)

    def _start_reading(self, room):
        """The first waiting prompts; None if they exceed what the step may still read."""
        generation = self.waiting[0]
        prefix = self._known(generation)
        read = 0 if prefix is None else len(prefix.state.tokens)
        if min(len(generation.prompt) - read, self.prefill_chunk) > room:
            return None
        if prefix is None:
            cache = DynamicCache(config=self.model.config)
            return _Reading(self._first_together(room), cache, 0)
        generation.prefix_tokens = read
        self.stats.prefix_tokens += read
        if read == len(generation.prompt):
            if generation.request.prompt_logprobs is not None:
                # only a shared state has read a prompt that is to be scored
                generation.prompt_logprobs = list(self._shared[1].prompt_logprobs)
            return _Reading([generation], None, read, prefix)
        return _Reading([generation], prefix.state.to_cache(self.model.config, self.layout), read)

    def _first_together(self, room):
        """The first waiting generation, and those behind it that are read in the same forward: each
        whole, from its beginning, as long as little of the forward is padding."""
        together: list[Generation] = []
        on_cpu = self.device.type == "cpu"
        least_full = _LEAST_FULL_ON_CPU if on_cpu else 0.0
        most = min(self.slots - len(self.running), MOST_TOGETHER)
        if on_cpu and self._place[0].itemsize < 4:
            # rounding would depend on the neighbours, and little is gained
            most = 1
        for generation in islice(self.waiting, most):
            prompts = [x.prompt for x in (*together, generation)]
            places = _places(prompts)
            is_full = places <= room and sum(map(len, prompts)) >= least_full * places
            if together and not (is_full and self._may_join(generation, together)):
                break
            together.append(generation)
        return together

    def _may_join(self, generation, others):
        """Whether a prompt need not wait to start from the state of one of the others."""
        # those that are read alone wait before all others
        if others[0].is_read_alone:
            return False
        prompt = generation.prompt
        if self._known(generation) is not None or any(prompt is x.prompt for x in others):
            return False
        starts = (x.prompt for x in others if self.prefixes.recent)
        return not any(torch.equal(x, prompt[: len(x)]) for x in starts)

    def _known(self, generation):
        """The prefix from which a prompt may start, or None."""
        prompt, scored = generation.prompt, generation.request.prompt_logprobs
        if self._shared is not None:
            prefix, reader = self._shared
            has_scores = scored in (None, reader.request.prompt_logprobs)
            if prefix.state.tokens is prompt and has_scores:
                return prefix
        return self.prefixes.longest(prompt) if scored is None else None

    def _share(self, prefix, reader):
        """Keep what was read last while the first waiting generation has the same prompt."""
        same = self.waiting and self.waiting[0].prompt is prefix.state.tokens
        self._shared = (prefix, reader) if same else None

    def _let_go(self):
        """Drop what was read last unless the first waiting generation has the same prompt."""
        if self._shared is not None:
            self._share(*self._shared)

    @torch.no_grad()
    def _read_chunk(self, chunks, cache, every_token=False):
        """Logits ``[B, 1, V]`` after the last token of each chunk, or ``[B, T, V]`` after every
        token, with padding on the left.

        Raises:
            FloatingPointError: the model's output for a prompt is not finite; if there are
                several, it is not known for which.
        """
        ids, mask = _left_padded(chunks)
        mask = None if mask is None else mask.to(self.device)
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask,
            cache=cache,
            use_cache=True,
            logits_to_keep=0 if every_token else 1,
        )
        logits = output.logits
        # a single prompt is checked when its first token is chosen, unless it is only scored
        if len(chunks) > 1 or every_token:
            broken = not_finite(logits.amax(-1))
            if (broken if mask is None else broken & mask[:, -logits.shape[1] :]).any():
                raise FloatingPointError("the model's logits hold NaN or infinity")
        return logits

    def _enter(self, generation, state, logits):
        """Choose the first token, if one is wanted; unless it is the last, take the first free
        slot."""
        row = len(self.running)
        if generation.request.max_new_tokens == 0:
            self._finish(generation, "length")
        else:
            self._choose_first(generation, row, logits)
            if generation.finish_reason == "error":
                return
        self.prefixes.leave(state, logits)
        self._share(Prefix(state, logits), generation)
        if generation.finish_reason is None:
            self.states.write(row, state)
            self.running.append(generation)
        elif generation.request.keep_state:
            generation.state = state

    def _choose_first(self, generation, row, logits):
        self.sampler.place(row, generation.request.sampling, generation.prompt)
        chosen = self.sampler(logits, first_row=row)
        if self.tokenizer is not None:
            generation.stream = TextStream(
                self.tokenizer,
                generation.request.stop,
                prompt=generation.prompt.tolist(),
                skipped=self.skipped_tokens,
            )
        chosen_at = time.perf_counter()
        self._accept([generation], chosen.tolist(), logits, chosen)
        if generation.finish_reason != "error":
            # taken before `finished`, in case this is the only token
            generation.started = chosen_at
            self.decoder.tokens[row] = chosen[0]

    def _decode(self, meanwhile):
        running = list(self.running)
        logits = self.decoder(len(running))
        chosen = self.sampler(logits)
        # a row without a valid token ends, but a graph of more rows may run it once more
        self.decoder.tokens[: len(running)] = chosen.clamp_min(0)
        meanwhile()
        ended = self._accept(running, chosen.tolist(), logits, chosen)
        for row in reversed(ended):
            self._leave(row)

    def _accept(self, generations, tokens, logits, chosen) -> list[int]:
        """Give each generation its token, end those that are done, and return their rows."""
        self._report_logprobs(generations, tokens, logits, chosen)
        self._news += generations
        ended = []
        for row, (generation, token) in enumerate(zip(generations, tokens, strict=True)):
            if token < 0:
                self._fail(generation, "the model's logits hold NaN or infinity")
                ended.append(row)
                continue
            generation.tokens.append(token)
            stream, stops = generation.stream, token in generation.stop_tokens
            if stream is not None and not stops:
                stream.push(token)
                stops = stream.stopped or stream.error is not None
            if stops or len(generation.tokens) == generation.request.max_new_tokens:
                self._finish(generation, "stop" if stops else "length")
                ended.append(row)
        self.stats.generated_tokens += len(tokens) - tokens.count(-1)
        return ended

    def _report_logprobs(self, generations, tokens, logits, chosen):
        asked = [i for i, g in enumerate(generations) if g.request.logprobs is not None]
        if not asked:
            return
        most = max(generations[i].request.logprobs for i in asked)
        rows = torch.tensor(asked, device=self.device)
        entries = _entries(logits[rows], chosen[rows].clamp_min(0), most)
        for i, entry in zip(asked, entries, strict=True):
            if tokens[i] >= 0:
                top = entry.top[: generations[i].request.logprobs]
                generations[i].logprobs.append(replace(entry, top=top))

    def _fail(self, generation, error):
        generation.error = error
        self._finish(generation, "error")

    def _finish(self, generation, reason):
        if (stream := generation.stream) is not None:
            stream.finish()
            if stream.stopped and reason == "length":
                reason = "stop"
            if stream.error is not None and reason in ("stop", "length"):
                reason = "error"
                generation.error = f"its tokens have no text: {first_line(stream.error)}"
        generation.finish_reason = reason
        generation.finished = time.perf_counter()
        self._news.append(generation)
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1

    def _leave(self, row):
        """Free a slot: the last running sequence moves into it."""
        generation, last = self.running[row], len(self.running) - 1
        is_whole = generation.finish_reason != "error"
        if is_whole and (generation.request.keep_state or self.prefixes.recent):
            state = self.states.read(row, generation.read_tokens())
            self.prefixes.leave(state)
            if generation.request.keep_state:
                generation.state = state
        if row != last:
            self.states.move(last, row)
            self.sampler.move(last, row)
            self.decoder.tokens[row] = self.decoder.tokens[last]
            self.running[row] = self.running[last]
        self.running.pop()


def _check_model(model):
    config, can_generate = getattr(model, "config", None), getattr(model, "can_generate", None)
    if getattr(config, "model_type", None) != "rodimus" or not can_generate or not can_generate():
        got = type(model).__name__
        raise ValueError(f"model must be a Rodimus or Rodimus+ language model, got {got}")


def _check_devices(model):
    devices = sorted({str(x.device) for x in model.parameters()})
    if devices == ["meta"]:
        raise ValueError(
            "the model is on the meta device, where weights have no values: load them with"
            " from_pretrained first"
        )
    if len(devices) > 1:
        raise ValueError(f"the weights must be on one device, got {' and '.join(devices)}")


def _place_of(model):
    """Dtype and device of a model, which ``model.half()`` or ``model.to()`` change: those of its
    embedding, because every request asks, and a large model has hundreds of weights."""
    weight = model.get_input_embeddings().weight
    return weight.dtype, weight.device


def _entries(logits, tokens, most) -> list[TokenLogprobs]:
    """Of tokens ``[N]``, each under its row of the logits ``[N, V]``."""
    own, values, ids = (x.tolist() for x in token_logprobs(logits, tokens, most))
    tops = [tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
    return [TokenLogprobs(*x) for x in zip(tokens.tolist(), own, tops, strict=True)]


def _places(chunks) -> int:
    """Places in a batch of the chunks, padding included."""
    return len(chunks) * max(map(len, chunks))


def _left_padded(chunks):
    """int64 ``[B, T]``, and bool ``[B, T]`` that is True for tokens, or None if there is no
    padding."""
    longest = max(map(len, chunks))
    if all(len(chunk) == longest for chunk in chunks):
        return torch.stack(chunks), None
    ids = chunks[0].new_zeros(len(chunks), longest)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, chunk in enumerate(chunks):
        ids[row, longest - len(chunk) :] = chunk
        mask[row, longest - len(chunk) :] = True
    return ids, mask


def _at_least(name, least, value) -> int:
    # torch takes no integers beyond 64 bits
    if not is_integer(value) or not least <= value < 2**63:
        what = f"an integer of at least {least}, below 2^63"
        raise ValueError(f"{name} must be {what}, got {value!r}")
    # numpy's narrow integers overflow where Python's do not
    return int(value)
