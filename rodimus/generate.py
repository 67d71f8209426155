"""``rodimus generate`` and ``rodimus chat``: text that appears as it is made, and what it took."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from .errors import InputError
from .loading import end_tokens, find_device, load_generator, load_tokenizer


class Sampling(NamedTuple):
    """How the next token is chosen; ``temperature=0`` takes the likeliest one."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """The same as keyword arguments of ``model.generate``."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {**self._asdict(), "do_sample": True}


class Generation(NamedTuple):
    """One continuation: token ids ``[T]`` with the prompt in front, the cache, and seconds spent.

    ``prefill_tokens`` of the prompt were read; the state of an earlier call stood for the rest.
    """

    ids: Tensor
    prompt_tokens: int
    prefill_tokens: int
    cache: Cache
    prefill_seconds: float
    decode_seconds: float

    @property
    def new_tokens(self) -> int:
        """Tokens generated, the one that ended the text included."""
        return self.ids.shape[0] - self.prompt_tokens

    def stats(self) -> str:
        """One line: tokens per second of both phases, and the bytes that the state takes."""
        decoded = self.new_tokens - 1
        parts = [_rate("prompt", self.prefill_tokens, self.prefill_seconds)]
        if decoded:
            parts.append(_rate("decode", decoded, self.decode_seconds))
        sizes = cache_bytes(self.cache)
        kinds = ", ".join(f"{kind} {size:,}" for kind, size in sizes.items())
        return f"{'; '.join(parts)}; state {sum(sizes.values()):,} bytes ({kinds})"


def _rate(phase: str, tokens: int, seconds: float) -> str:
    return (
        f"{phase} {tokens} tokens in {seconds:.3f} s = {tokens / max(seconds, 1e-9):.1f} tokens/s"
    )


class _TimedStreamer(TextStreamer):
    """Passes finished text on, and notes when the first and the last token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called once with the prompt, then with each token, already on the host."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with text that later tokens cannot change any more."""
        self.write(text)


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    add_special_tokens: bool = True,
) -> Tensor:
    """The tokens of a prompt, int64 ``[T]``.

    Raises:
        InputError: there are none, the model does not know one of them, or the text is not Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is no UTF-8 text at character {error.start}") from error
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")
    ids = encoded.input_ids[0].long()
    if ids.numel() == 0:
        raise InputError("the prompt has no tokens: there is nothing to continue")
    if ids.max() >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer gives token {int(ids.max())}, and the model knows"
            f" {model.config.vocab_size}: they do not belong together"
        )
    return ids


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    sampling: Sampling,
    *,
    after: Generation | None = None,
    write: Callable[[str], Any] = lambda text: None,
) -> Generation:
    """Continue a sequence of tokens.

    Args:
        ids: prompt ``[T]``, int64, T >= 1.
        after: an earlier generation. Where the prompt begins with what the model has read in it,
            its cache is continued (and changed), so that nothing is read twice.
        write: gets the text in pieces, as it comes.
    """
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    # the last token generated was never read
    read = ids[:0] if after is None else after.ids[:-1]
    continues = read.numel() > 0 and torch.equal(ids[: read.numel()], read)
    streamer = _TimedStreamer(tokenizer, write)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids[None].to(model.device),
            attention_mask=torch.ones_like(ids)[None].to(model.device),
            past_key_values=after.cache if continues else None,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if pad is None and ends else pad,
            streamer=streamer,
            return_dict_in_generate=True,
            **sampling.arguments(),
        )
    first, last = streamer.times[1], streamer.times[-1]
    return Generation(
        ids=output.sequences[0].cpu(),
        prompt_tokens=ids.numel(),
        prefill_tokens=ids.numel() - (read.numel() if continues else 0),
        cache=output.past_key_values,
        prefill_seconds=first - start,
        decode_seconds=last - first,
    )


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Bytes of a cache by what they hold: ``recurrent``, ``convolution``, ``window``, ``other``."""
    names = {
        "recurrent_states": "recurrent",
        "conv_states": "convolution",
        **dict.fromkeys(("keys", "values", "_keys", "_values", "ring"), "window"),
    }
    sizes: dict[str, int] = {}
    for layer in cache.layers:
        for name, value in vars(layer).items():
            kind = names.get(name, "other")
            for tensor in _tensors(value):
                sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
    return {kind: size for kind, size in sizes.items() if size}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def run_generate(options: argparse.Namespace) -> None:
    """The command ``rodimus generate``."""
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    model, tokenizer = _load(options)
    ids = encode(model, tokenizer, prompt)
    _write(prompt)
    generation = generate_text(model, tokenizer, ids, _sampling(options), write=_write)
    _write("\n")
    if options.stats:
        print(generation.stats(), file=sys.stderr)


def run_chat(options: argparse.Namespace) -> None:
    """The command ``rodimus chat``."""
    model, tokenizer = _load(options)
    if tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer of {options.model} has no chat template, so the model was not made to"
            " chat: let it continue text with `rodimus generate`"
        )
    conversation = Conversation(model, tokenizer, _sampling(options), options.system)
    while (line := _read_line()) not in ("", "/exit"):
        if line == "/reset":
            conversation = Conversation(model, tokenizer, _sampling(options), options.system)
            continue
        generation = conversation.reply(line, _write)
        _write("\n")
        if options.stats:
            print(generation.stats(), file=sys.stderr)


class Conversation:
    """Turns of a chat, and the state that stands for all of them, so that none is read twice."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        system: str = "",
    ):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.messages = [{"role": "system", "content": system}] if system else []
        self.last: Generation | None = None

    def reply(self, text: str, write: Callable[[str], Any] = lambda text: None) -> Generation:
        """Add what the user says and generate the answer to it."""
        self.messages.append({"role": "user", "content": text})
        rendered = self.tokenizer.apply_chat_template(
            self.messages, tokenize=False, add_generation_prompt=True
        )
        ids = encode(self.model, self.tokenizer, rendered, add_special_tokens=False)
        self.last = generate_text(
            self.model, self.tokenizer, ids, self.sampling, after=self.last, write=write
        )
        answer = self.last.ids[self.last.prompt_tokens :]
        content = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": content})
        return self.last


def _load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    device = find_device(options.device)
    torch.manual_seed(options.seed)
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(options.model)
    return load_generator(options.model, dtype=options.dtype, device=device), tokenizer


def _sampling(options: argparse.Namespace) -> Sampling:
    return Sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
