"""OpenAI's completion formats: JSON in, checked field by field; JSON out.

Every wrong value is an ``ApiError`` that names its field. Fields that would change the text in a
way the engine does not support are refused; those that cannot change it are ignored.
"""

import codecs
import difflib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..limits import Limits
from .engine import MAX_LOGPROBS, Delta, Generation, Request, TokenLogprobs
from .sampling import MAX_SEED, SamplingParams, is_integer, wrapped_seed

# Refused unless they ask for what happens anyway.
_UNSUPPORTED = {
    "audio": (),
    "echo": (False,),  # of a chat
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_IGNORED = {
    *("metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options"),
    *("prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"),
}
# what OpenAI writes for a token of probability zero, whose logarithm JSON cannot express
_IMPOSSIBLE = -9999.0
# a field that OpenAI's chats always have
_NO_REFUSAL = {"refusal": None}
# the fields that say how many tokens a client wants; the first takes precedence
_LENGTHS = ("max_completion_tokens", "max_tokens")
_SHARED = {
    *("model", "stream", "stream_options", "n", "stop", "seed", "max_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "logprobs", "stop_token_ids", "ignore_eos", "best_of"),
}
# fields of a message that a template is given besides role and content
_NAMES = ("name", "tool_call_id")
# fields of OpenAI's assistant messages that are not text, and those that only describe the text
_NOT_TEXT, _ABOUT_TEXT = ("tool_calls", "function_call", "refusal", "audio"), ("annotations",)


class ApiError(Exception):
    """A request that is answered with an error: HTTP status, and OpenAI's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Call:
    """One HTTP request: texts or token lists to continue, and how to answer.

    Attributes:
        is_chat: Which of the two formats the answer has.
        prompts: Strings or lists of token ids; for a chat, the one list of messages.
        choices: Continuations of each prompt.
        options: Arguments of the engine's ``Request`` except the prompt.
        stop_token_ids: Tokens that end the text besides those of the model.
        ignore_eos: The model's end tokens do not end the text.
        echo: The answer's texts, tokens and log-probabilities begin with those of the prompt.
        length_field: The field that says how many tokens the client wants; None if it did not say.
        stream, include_usage: Answer in pieces; with a last piece that counts tokens.
        id, created: Identifier and time of the answer.
    """

    is_chat: bool
    prompts: list
    choices: int
    options: dict[str, Any]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    echo: bool
    length_field: str | None
    stream: bool
    include_usage: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def input_field(self) -> str:
        """The field that says what to continue."""
        return "messages" if self.is_chat else "prompt"

    def requests(
        self,
        token_ids: list[list[int]],
        end_tokens: Sequence[int],
        max_length: int | None = None,
    ) -> list[Request]:
        """The engine's requests, in the order of the answer's choices.

        Args:
            token_ids: Token ids of each prompt.
            end_tokens: The model's tokens that end a text.
            max_length: Most tokens of prompt and continuation together, and how far a continuation
                goes if the client did not say its length.

        Raises:
            ApiError: 400, prompt and continuation are longer.
        """
        requests = []
        ends = (*self.stop_token_ids, *(() if self.ignore_eos else end_tokens))
        for ids in token_ids:
            for choice in range(self.choices):
                options = {**self.options, "stop_tokens": ends}
                if self.echo:
                    options["prompt_logprobs"] = options["logprobs"]
                if max_length is not None:
                    options["max_new_tokens"] = self._new_tokens(len(ids), max_length)
                seed = options["sampling"].seed
                if seed is not None:
                    # choices of one request differ, and each is reproducible
                    fields = {**vars(options["sampling"]), "seed": wrapped_seed(seed + choice)}
                    options["sampling"] = SamplingParams(**fields)
                requests.append(Request(prompt=ids, **options))
        return requests

    def _new_tokens(self, prompt: int, max_length: int) -> int:
        wanted, name = self.options["max_new_tokens"], self.length_field
        if name is None:
            wanted, name = min(wanted, max(max_length - prompt, 1)), "the continuation"
        if prompt + wanted > max_length:
            raise ApiError(
                400,
                f"the prompt has {prompt} tokens and {name} is {wanted}: {prompt + wanted}"
                f" together, expected at most {max_length}",
                code="context_length_exceeded",
                param=self.length_field or self.input_field,
            )
        return wanted


# ----------------------------------------------------------------------------------------------
# In
# ----------------------------------------------------------------------------------------------


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        ApiError: 400, the body is not a JSON object.
    """

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse)
        # strings with lone surrogates are JSON, but not text that a tokenizer can read
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        message = f"the body is not valid JSON: {error}"
        raise ApiError(400, message, code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got {kind_of(body)}")
    return body


def parse_completion(body: dict[str, Any], limits: Limits) -> Call:
    """A call of ``/v1/completions``.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _Fields(body, {*_SHARED, "prompt", "echo"})
    logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
    echo = fields.boolean("echo", False)
    # none where there is something to say about the prompt
    least = 0 if echo and logprobs is not None else 1
    new_tokens = fields.integer("max_tokens", min(16, limits.new_tokens), least, limits.new_tokens)
    prompts = _prompts(fields, limits)
    return _call(fields, limits, prompts, new_tokens, logprobs, is_chat=False, echo=echo)


def parse_chat(body: dict[str, Any], limits: Limits) -> Call:
    """A call of ``/v1/chat/completions``; its one prompt is the list of messages.

    Raises:
        ApiError: 400, naming the field.
    """
    fields = _Fields(body, {*_SHARED, "messages", "max_completion_tokens", "top_logprobs"})
    default = fields.integer("max_tokens", limits.new_tokens, 1, limits.new_tokens)
    new_tokens = fields.integer("max_completion_tokens", default, 1, limits.new_tokens)
    top = fields.integer("top_logprobs", 0, 0, MAX_LOGPROBS)
    wanted = fields.boolean("logprobs", False)
    if top and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
    messages = _messages(fields)
    logprobs = top if wanted else None
    return _call(fields, limits, [messages], new_tokens, logprobs, is_chat=True)


def _call(fields, limits, prompts, new_tokens, logprobs, *, is_chat, echo=False):
    choices = fields.integer("n", 1, 1, limits.choices)
    if choices * len(prompts) > limits.choices:
        what = f"at most {limits.choices} together with the number of prompts"
        raise fields.wrong("n", what, choices * len(prompts))
    if (best := fields.get("best_of")) not in (None, 1, choices):
        raise fields.wrong("best_of", f"n = {choices}: all texts are given", best)
    stream = fields.boolean("stream", False)
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise fields.wrong("stream_options", "an object", options)
    if options and not stream:
        raise ApiError(400, "stream_options needs stream = true", param="stream_options")
    sampling = SamplingParams(
        temperature=fields.number("temperature", 1.0, 0, 2),
        # -1 also means all tokens
        top_k=max(fields.integer("top_k", 0, -1, 2**31), 0),
        top_p=fields.number("top_p", 1.0, 0, 1),
        min_p=fields.number("min_p", 0.0, 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100),
        seed=_seed(fields),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        logit_bias=_logit_bias(fields),
    )
    return Call(
        is_chat=is_chat,
        prompts=prompts,
        choices=choices,
        options={
            "max_new_tokens": new_tokens,
            "sampling": sampling,
            "stop": _stop(fields, limits),
            "logprobs": logprobs,
        },
        stop_token_ids=_stop_token_ids(fields, limits),
        ignore_eos=fields.boolean("ignore_eos", False),
        echo=echo,
        length_field=next((name for name in _LENGTHS if fields.get(name) is not None), None),
        stream=stream,
        include_usage=_Fields(options, {"include_usage", "include_obfuscation"}).boolean(
            "include_usage", False
        ),
    )


def _prompts(fields, limits):
    """Strings, or lists of token ids, from any of the four shapes of ``prompt``."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(map(is_integer, prompt)):
            return [prompt]
        is_tokens = lambda item: isinstance(item, list) and all(map(is_integer, item))
        if all(isinstance(item, str) for item in prompt) or all(map(is_tokens, prompt)):
            if len(prompt) > limits.choices:
                raise fields.wrong("prompt", f"at most {limits.choices} prompts", len(prompt))
            return prompt
    what = "a string, a list of strings, a list of token ids, or a list of such lists"
    raise fields.wrong("prompt", what, prompt)


def _messages(fields):
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.wrong("messages", "a list of at least one message", messages)
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message, name):
    if not isinstance(message, dict):
        raise ApiError(400, f"{name} must be an object, got {kind_of(message)}", param=name)
    names = _names(message, name)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ApiError(400, f"{name}.role must be a string, got {kind_of(role)}", param=name)
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                raise ApiError(400, f"{name}.content must consist of text parts", param=name)
        content = "".join(part["text"] for part in content)
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise ApiError(400, f"{name}.content must be text, got {kind_of(content)}", param=name)
    # developer is OpenAI's newer name for what chat templates call system
    return {"role": "system" if role == "developer" else role, "content": content, **names}


def _names(message, name):
    """A message's fields besides role and content, for the template; others are refused."""
    names = {}
    for key, value in message.items():
        # clients send an assistant's message back together with its empty fields
        if not value or key in ("role", "content", *_ABOUT_TEXT):
            continue
        if key in _NOT_TEXT:
            raise ApiError(400, f"{name}.{key} is not supported", code="unsupported", param=name)
        if key not in _NAMES:
            raise _unknown_field(key, ("role", "content", *_NAMES), f"{name}.")
        if not isinstance(value, str):
            raise ApiError(400, f"{name}.{key} must be a string, got {kind_of(value)}", param=name)
        names[key] = value
    return names


def _stop(fields, limits):
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    most, length = limits.stop_strings, limits.stop_characters
    if (
        not isinstance(stop, list)
        or len(stop) > most
        or not all(isinstance(text, str) and 0 < len(text) <= length for text in stop)
    ):
        what = f"a string or a list of at most {most}, each of 1 to {length} characters"
        raise fields.wrong("stop", what, fields.get("stop"))
    return tuple(stop)


def _stop_token_ids(fields, limits):
    ids, most = fields.get("stop_token_ids", []), limits.stop_strings
    if not isinstance(ids, list) or len(ids) > most or not all(map(is_integer, ids)):
        raise fields.wrong("stop_token_ids", f"a list of at most {most} token ids", ids)
    return tuple(ids)


def _logit_bias(fields):
    """Bias by token id; in JSON the ids are text."""
    bias, what = fields.get("logit_bias", {}), "an object of token ids and numbers in [-100, 100]"
    if not isinstance(bias, dict):
        raise fields.wrong("logit_bias", what, bias)
    for token, value in bias.items():
        if not _is_token(token) or not _is_bias(value):
            got = f"{token[:20]!r}: {_shown(value)}"
            raise ApiError(400, f"logit_bias must be {what}, got {got}", param="logit_bias")
    return {int(token): value for token, value in bias.items()}


def _is_token(text):
    return text.isascii() and text.isdigit() and len(text) < 20


def _is_bias(value):
    return _is_number(value) and -100 <= value <= 100


def _seed(fields):
    """Any 64-bit integer, as OpenAI takes them."""
    seed = fields.integer("seed", None, -MAX_SEED - 1, MAX_SEED)
    return None if seed is None else wrapped_seed(seed)


class _Fields:
    """The fields of a JSON object, each checked when it is asked for; null means the default."""

    def __init__(self, body, known):
        self.body = body
        for name, value in body.items():
            if name in known or name in _IGNORED or value is None:
                continue
            if name not in _UNSUPPORTED:
                raise _unknown_field(name, known)
            if value not in _UNSUPPORTED[name]:
                values = " or ".join(map(json.dumps, _UNSUPPORTED[name]))
                hint = f" or send {values}" if values else ""
                message = f"{name} is not supported: leave it out{hint}"
                raise ApiError(400, message, code="unsupported", param=name)

    def get(self, name, default=None):
        value = self.body.get(name)
        return default if value is None else value

    def wrong(self, name, what, got):
        return ApiError(400, f"{name} must be {what}, got {_shown(got)}", param=name)

    def boolean(self, name, default):
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def integer(self, name, default, low, high):
        return self._between(name, default, low, high, is_integer, "an integer")

    def number(self, name, default, low, high):
        return self._between(name, default, low, high, _is_number, "a number")

    def _between(self, name, default, low, high, is_kind, kind):
        value = self.get(name, default)
        if value is None:
            return None
        if not is_kind(value) or not low <= value <= high:
            raise self.wrong(name, f"{kind} in [{low}, {high}]", value)
        return value


def _unknown_field(name, known, where=""):
    name = name[:100]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    message = f"unknown field {where + name!r}{hint}"
    return ApiError(400, message, code="unknown_field", param=where + name)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value):
    """A number as it is, of anything else its kind and no text of the client's."""
    if isinstance(value, list):
        kinds = ", ".join(sorted(set(map(kind_of, value))))
        return f"a list of {len(value)} ({kinds})" if value else "an empty list"
    return str(value)[:40] if isinstance(value, int | float) else kind_of(value)


def kind_of(value: object) -> str:
    """What a value of JSON is called in errors."""
    if value == "":
        return "an empty string"
    names = {str: "a string", list: "a list", dict: "an object", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


# ----------------------------------------------------------------------------------------------
# Out
# ----------------------------------------------------------------------------------------------


class TokenText(NamedTuple):
    """The name and the text of a token.

    Attributes:
        name: Its text; if it is only part of a character, the tokenizer's name for it.
        data: Its bytes, also if it is part of a character; None if they are unknown.
        is_shown: Whether its bytes are in the answer's text: a special token's are not.
    """

    name: str
    data: bytes | None
    is_shown: bool


class _Place:
    """Counts the complete characters of a text."""

    def __init__(self):
        self._characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_by(self, token: TokenText) -> int:
        """Return where a token begins, and move past it."""
        at = self._characters
        if token.is_shown and token.data is not None:
            self._characters += len(self._decoder.decode(token.data))
        return at

    def move_to(self, characters: int) -> None:
        """Go on behind so many characters, the last of which may have been cut."""
        self._characters = characters
        self._decoder.reset()


class Answer:
    """Writes the answers to one call.

    Args:
        model: Name of the model.
        call: The call to answer.
        token_text: Gives the ``TokenText`` of a token id.
        echoed: For each prompt, the text that its choices begin with; empty without ``echo``.
    """

    def __init__(
        self,
        model: str,
        call: Call,
        token_text: Callable[[int], TokenText],
        echoed: Sequence[str] = (),
    ):
        self.model, self.call, self.token_text, self.echoed = model, call, token_text, echoed
        # where each choice's next token begins in its text
        self._places: dict[int, _Place] = {}

    def whole(self, generations: list[Generation]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, generation in enumerate(generations):
            echo = self._echo(index, generation) if self.call.echo else None
            choice = self._choice(index, generation.logprobs, generation.finish_reason)
            if self.call.is_chat:
                message = {"role": "assistant", "content": generation.text}
                choice["message"] = message | _NO_REFUSAL
            else:
                choice["text"] = generation.text
            if echo is not None:
                choice["text"] = echo["text"] + choice["text"]
                choice["logprobs"] = _joined(echo["logprobs"], choice["logprobs"])
            choices.append(choice)
        kind = "chat.completion" if self.call.is_chat else "text_completion"
        return {**self._envelope(kind, choices), "usage": usage(generations, self.call.choices)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first piece of a choice in a chat, which names the role; else None."""
        if not self.call.is_chat:
            return None
        choice = self._choice(index, [], None)
        return self._piece([choice | {"delta": {"role": "assistant", "content": ""}}])

    def echo(self, index: int, generation: Generation) -> dict[str, Any]:
        """The piece of a choice that repeats its prompt, once that has been read."""
        return self._piece([self._echo(index, generation)])

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """One piece of a choice."""
        choice = self._choice(index, delta.logprobs, delta.finish_reason)
        if self.call.is_chat:
            choice["delta"] = {"content": delta.text} if delta.text else {}
        else:
            choice["text"] = delta.text
        return self._piece([choice])

    def closing(self, generations: list[Generation]) -> dict[str, Any]:
        """The last piece, which counts tokens, for clients that asked for it."""
        return {**self._piece([]), "usage": usage(generations, self.call.choices)}

    def _echo(self, index, generation):
        text, logprobs = self.echoed[index // self.call.choices], None
        if self.call.options["logprobs"] is not None:
            # nothing comes before the first token that could make it likely
            first = self.token_text(int(generation.prompt[0]))
            logprobs = {
                "tokens": [first.name],
                "token_logprobs": [None],
                "top_logprobs": [None],
                "text_offset": [self._place(index).pass_by(first)],
            }
            logprobs = _joined(logprobs, self._lists(index, generation.prompt_logprobs))
        self._place(index).move_to(len(text))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _place(self, index):
        return self._places.setdefault(index, _Place())

    def _choice(self, index, logprobs, finish_reason):
        written = None
        if logprobs:
            is_chat = self.call.is_chat
            written = self._contents(logprobs) if is_chat else self._lists(index, logprobs)
        return {"index": index, "logprobs": written, "finish_reason": finish_reason}

    def _piece(self, choices):
        kind = "chat.completion.chunk" if self.call.is_chat else "text_completion"
        counted = {"usage": None} if self.call.include_usage else {}
        return self._envelope(kind, choices) | counted

    def _envelope(self, kind, choices):
        prefix = "chatcmpl" if self.call.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.call.id}",
            "object": kind,
            "created": self.call.created,
            "model": self.model,
            "choices": choices,
        }

    def _contents(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        """A chat's log-probabilities: one object per token."""

        def written(token, logprob):
            name, data, _ = self.token_text(token)
            data = None if data is None else list(data)
            return {"token": name, "logprob": max(logprob, _IMPOSSIBLE), "bytes": data}

        contents = [
            {**written(e.token, e.logprob), "top_logprobs": [written(*pair) for pair in e.top]}
            for e in entries
        ]
        return {"content": contents} | _NO_REFUSAL

    def _lists(self, index: int, entries: list[TokenLogprobs]) -> dict[str, Any]:
        """A completion's log-probabilities: lists with one entry per token."""
        texts = [self.token_text(entry.token) for entry in entries]
        place = self._place(index)
        return {
            "tokens": [text.name for text in texts],
            "token_logprobs": [max(entry.logprob, _IMPOSSIBLE) for entry in entries],
            # the chosen token is always among them, even if it is not one of the likeliest
            "top_logprobs": [
                {
                    self.token_text(t).name: max(p, _IMPOSSIBLE)
                    for t, p in (*e.top, (e.token, e.logprob))
                }
                for e in entries
            ],
            "text_offset": [place.pass_by(text) for text in texts],
        }


def _joined(first, then):
    """Lists of tokens behind those of the tokens before them; either may be None."""
    if first is None or then is None:
        return then if first is None else first
    return {name: first[name] + then[name] for name in first}


def usage(generations: list[Generation], choices: int) -> dict[str, Any]:
    """OpenAI's count of tokens; a prompt counts once, however many choices it has."""
    prompts = generations[::choices]
    prompt = sum(len(generation.prompt) for generation in prompts)
    completion = sum(len(generation.tokens) for generation in generations)
    cached = sum(generation.prefix_tokens for generation in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
