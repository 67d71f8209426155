"""``rodimus generate`` and ``rodimus chat``: text that appears as it is made, and statistics."""

import argparse
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import InputError, first_line
from ..limits import Limits
from ..loading import (
    checkpoint_folder,
    find_device,
    load_config,
    load_rodimus,
    load_tokenizer,
)
from .engine import Engine, Generation, Request
from .sampling import SamplingParams, random_seed, wrapped_seed
from .text import encode


def run(
    engine: Engine,
    request: Request,
    write: Callable[[str], Any],
    stop: Callable[[], bool] = lambda: False,
    opening: str = "",
) -> Generation:
    """Run one request to its end; ``write`` gets the text in pieces, as it comes.

    Args:
        stop: Called before every step; true cancels the request.
        opening: Written before the text, once the request is accepted.

    Raises:
        InputError: the request cannot be served, or the model's numbers are not finite.
    """
    try:
        generation = engine.submit(request)
    except ValueError as error:
        raise InputError(str(error)) from error
    write(opening)
    while generation.finish_reason is None:
        if stop():
            engine.cancel(generation)
        else:
            engine.step()
        write(generation.drain().text)
    if generation.error is not None:
        raise InputError(generation.error)
    return generation


def stats(engine: Engine, generation: Generation) -> str:
    """One line: tokens per second of both phases, and the bytes that the state takes."""
    read = len(generation.prompt) - generation.prefix_tokens
    parts = [_rate("prompt", read, generation.started - generation.submitted)]
    if decoded := len(generation.tokens) - 1:
        parts.append(_rate("decode", decoded, generation.finished - generation.started))
    sizes = {kind: size for kind, size in engine.layout.bytes().items() if size}
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in sizes.items())
    return f"{'; '.join(parts)}; state {sum(sizes.values()):,} bytes ({kinds})"


def _rate(phase: str, tokens: int, seconds: float) -> str:
    return (
        f"{phase} {tokens} tokens in {seconds:.3f} s = {tokens / max(seconds, 1e-9):.1f} tokens/s"
    )


class Conversation:
    """Turns of a chat.

    Args:
        engine: Its tokenizer must have a chat template. With two ``recent_states`` it reads no turn
            twice, except a reply whose text has other tokens than those that were generated.
        sampling: How all replies are sampled; each has another seed.
        max_new_tokens: Most tokens of a reply.
        system: What the model is told about its role first.
        stop: Strings that end a reply, which does not contain them.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: SamplingParams,
        max_new_tokens: int,
        system: str = "",
        stop: tuple[str, ...] = (),
    ):
        self.engine, self.sampling, self.max_new_tokens = engine, sampling, max_new_tokens
        self.stop = stop
        self.messages = [{"role": "system", "content": system}] if system else []

    def reply(
        self,
        text: str,
        write: Callable[[str], Any] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Generation:
        """Add what the user says and generate the answer to it, unless ``stop`` ends it early.

        A turn that is stopped before the answer's first token is forgotten.

        Raises:
            InputError: the template refuses the messages, or the model's numbers are not finite.
        """
        engine, sampling = self.engine, self.sampling
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            rendered = engine.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything it likes about the messages
            raise InputError(f"the messages do not fit the chat template: {error}") from error
        size = engine.model.config.vocab_size
        ids = encode(engine.tokenizer, rendered, size, add_special_tokens=False)
        if sampling.seed is not None:
            sampling = replace(sampling, seed=wrapped_seed(sampling.seed + len(messages)))
        request = Request(ids, self.max_new_tokens, sampling, self.stop)
        generation = run(engine, request, write, stop)
        if generation.tokens:
            self.messages = [*messages, {"role": "assistant", "content": generation.text}]
        return generation


def run_generate(options: argparse.Namespace) -> None:
    """The command ``rodimus generate``."""
    stop = _stop(options)
    prompt = _standard_input() if options.prompt == "-" else options.prompt
    model, tokenizer = load(options)
    ids = encode(tokenizer, prompt, model.config.vocab_size)
    engine = _engine(model, tokenizer, len(ids) + options.max_new_tokens)
    request = Request(ids, options.max_new_tokens, _sampling(options, options.seed), stop)
    generation = run(engine, request, _write, opening=prompt)
    _write("\n")
    if options.stats:
        print(stats(engine, generation), file=sys.stderr)


def run_chat(options: argparse.Namespace) -> None:
    """The command ``rodimus chat``."""
    stop = _stop(options)
    model, tokenizer = load(options)
    if tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer of {options.model} has no chat template, so the model was not made to"
            " chat: let it continue text with `rodimus generate`"
        )
    # two states: after the prompt and after the reply
    engine = _engine(model, tokenizer, model.config.max_position_embeddings, recent_states=2)

    def start():
        seed = random_seed() if options.seed is None else options.seed
        sampling = _sampling(options, seed)
        return Conversation(engine, sampling, options.max_new_tokens, options.system, stop)

    conversation = start()
    while (line := _read_line()) not in ("", "/exit"):
        if line == "/reset":
            conversation = start()
            continue
        with _Interrupts() as interrupts:
            generation = conversation.reply(line, _write, interrupts.came)
        _write("\n")
        if options.stats and generation.started is not None:
            seed = conversation.sampling.seed
            print(f"{stats(engine, generation)}; seed {seed}", file=sys.stderr)


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer that the options of ``add_model`` name, with no progress bar.

    Raises:
        InputError: one of them cannot be loaded, or it is no Rodimus language model.
    """
    logging.disable_progress_bar()
    device = find_device(options.device)
    # the tokenizer's loader reads the config too, and would blame the tokenizer
    load_config(checkpoint_folder(options.model))
    tokenizer = load_tokenizer(options.model)
    model = load_rodimus(
        options.model, dtype=options.dtype, device=device, weight_dtype=options.weight_dtype
    )
    return model, tokenizer


def _engine(model, tokenizer, longest: int, recent_states: int = 0) -> Engine:
    """An engine for one text; only attention without a window limits its length."""
    limited = model.config.block_type == "rodimus_plus" and model.config.sliding_window is None
    try:
        length = longest if limited else None
        return Engine(model, tokenizer, slots=1, max_length=length, recent_states=recent_states)
    except (ValueError, RuntimeError) as error:
        # there is not enough memory for so many tokens
        raise InputError(first_line(error)) from error


def _sampling(options: argparse.Namespace, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=seed,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
    )


def _stop(options: argparse.Namespace) -> tuple[str, ...]:
    """The strings of ``--stop``, within the server's limits."""
    limits, stop = Limits(), options.stop
    most, length = limits.stop_strings, limits.stop_characters
    if len(stop) > most or not all(0 < len(text) <= length for text in stop):
        got = [len(text) for text in stop]
        raise InputError(
            f"--stop takes at most {most} texts of 1 to {length} characters, got {got} characters"
        )
    return tuple(stop)


class _Interrupts:
    """Remembers Ctrl-C while entered, so that it ends a reply between two tokens; a second one
    interrupts as usual."""

    def __init__(self):
        self._came = False

    def __enter__(self) -> "_Interrupts":
        self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _receive(self, *_: object) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True

    def came(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._came


def _standard_input() -> str:
    # None if it was closed, as by `<&-`
    if sys.stdin is None:
        raise InputError("there is no standard input")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is no UTF-8 text at byte {error.start}") from error


def _write(text: str) -> None:
    # a model may write what the terminal's encoding lacks
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


def _read_line() -> str:
    if sys.stdin is None:
        return ""
    try:
        return input("> ").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise InputError(f"the line is no UTF-8 text at byte {error.start}") from error
