"""``rodimus serve``: OpenAI's HTTP interface over the engine.

One process, one model: an event loop answers HTTP, a thread runs the engine. A client's mistakes
are 4xx with a JSON error, a full queue is 429, and the requests of a client that disconnects are
cancelled.
"""

import argparse
import asyncio
import contextlib
import copy
import functools
import hmac
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import InputError, first_line
from ..limits import Limits
from ..loading import is_hub_name, split_hub_name, vocabulary_size
from ..options import API_KEY_VARIABLE
from .engine import STEP_FAILED, Delta, Engine, Generation
from .protocol import (
    Answer,
    ApiError,
    Call,
    TokenText,
    kind_of,
    parse_chat,
    parse_completion,
    parse_json,
)
from .state_file import load_state
from .terminal import load
from .text import INCOMPLETE, bytes_of_part, decode
from .worker import EngineWorker, QueueFullError, WorkerStoppedError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise InputError(
        f'serving needs more packages ({error}): in a checkout, pip install ".[serve]"'
    ) from error

from .metrics import Metrics

logger = logging.getLogger(__name__)

# longer than clients and proxies keep idle connections, commonly a minute: if the server closed
# first, they might send a request into a closing connection
_KEEP_ALIVE_SECONDS = 75
# proxies close a silent connection, commonly after a minute
_QUIET_SECONDS = 15
# status in the metrics for a client that disconnected; proxies log the same
_CLIENT_LEFT = 499
# an origin as browsers send it has no path, not even a slash, and no capitals; * means all
_ORIGIN = re.compile(r"\*|null|[a-z][^A-Z/\s]*://[^A-Z/\s]+")
_DEFECT = ApiError(500, "the server has a defect")
# headers of an error's answer, by its status
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
}


class Service:
    """The handlers of one model's server.

    Args:
        worker: Runs the engine, which has a tokenizer; started and stopped with the application.
        model_name: What clients call the model.
        limits: What clients may ask for.
        api_key: Required as a bearer token under ``/v1``; None requires none.
        origins: Origins of web pages whose scripts may call the server; ``*`` for all.
    """

    def __init__(
        self,
        worker: EngineWorker,
        *,
        model_name: str,
        limits: Limits | None = None,
        api_key: str | None = None,
        origins: Sequence[str] = (),
    ):
        self.worker, self.model_name = worker, model_name
        self.limits, self.api_key, self.origins = limits or Limits(), api_key, origins
        # the engine's thread decodes with its own tokenizer while this one encodes
        self.tokenizer: PreTrainedTokenizerBase = copy.deepcopy(worker.engine.tokenizer)
        # names tokens in other threads while that one encodes prompts; and the names found so far
        self._namer, self._names = copy.deepcopy(self.tokenizer), {}
        self._known = vocabulary_size(self.tokenizer)
        self.metrics = Metrics(worker)
        self.created = int(time.time())
        self._encoding = threading.Lock()

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/v1/models", self.models),
            # the route below would take it for a model with an empty name
            Route("/v1/models/", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers = {
            ApiError: self._refuse,
            HTTPException: lambda request, error: _error(
                ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"),
                error.headers,
            ),
            # nobody is left to read the answer
            ClientDisconnect: lambda request, error: Response(status_code=400),
            Exception: lambda request, error: _error(_DEFECT),
        }
        allowed = {"allow_origins": self.origins, "allow_methods": ("*",), "allow_headers": ("*",)}
        middleware = [Middleware(CORSMiddleware, **allowed)] if self.origins else []
        return Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers=handlers,
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app):
        self._mail = _Mail(asyncio.get_running_loop())
        self.worker.after_news = self._mail.deliver
        self.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.worker.stop)

    async def _refuse(self, request: Request, error: ApiError) -> Response:
        # starlette would run a lambda in another thread, for which a stopping server has no time
        return _error(error)

    # -- small answers -------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 while requests are accepted, else 503."""
        works = self.worker.accepts
        return JSONResponse({"status": "ok" if works else "down"}, 200 if works else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def models(self, request: Request) -> Response:
        """The one model."""
        self._authorise(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model, by its name."""
        self._authorise(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self):
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "rodimus",
        }

    def _check_model(self, name):
        if name is not None and name != self.model_name:
            if isinstance(name, str):
                message = f"there is no model {name[:100]!r} here, only {self.model_name!r}"
            else:
                message = f"model must be a string, got {kind_of(name)}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def _authorise(self, request):
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # starlette decodes a header's bytes as latin-1
        sent, key = given.encode("latin-1").strip(), os.fsencode(self.api_key)
        is_key = hmac.compare_digest(sent, key)
        if scheme.lower() != "bearer" or not is_key:
            raise ApiError(401, "expected the API key as a bearer token", code="invalid_api_key")

    # -- completions ---------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """``/v1/completions``."""
        return await self._observed(request, "completions", parse_completion)

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        return await self._observed(request, "chat", parse_chat)

    async def _observed(self, request, endpoint, parse):
        try:
            with _until_cancelled():
                response = await self._complete(request, endpoint, parse)
        except ApiError as error:
            self.metrics.count_request(endpoint, error.status)
            raise
        except ClientDisconnect:
            self.metrics.count_request(endpoint, _CLIENT_LEFT)
            raise
        except Exception:
            # not by starlette, whose answer would lack the CORS headers for pages of other origins
            logger.exception("a request met a defect")
            response = _error(_DEFECT)
        # a stream is counted when it ends
        if not isinstance(response, _EventStream):
            self.metrics.count_request(endpoint, response.status_code)
        return response

    async def _complete(self, request, endpoint, parse):
        self._authorise(request)
        body = await self._body(request)
        # the time is measured from here, when the whole body has arrived
        exchange = _Exchange(self.worker, request, self._mail)
        body = parse_json(body)
        self._check_model(body.get("model"))
        call = parse(body, self.limits)
        self._check_tokens("stop_token_ids", call.stop_token_ids)
        biased = [token for token, _ in call.options["sampling"].logit_bias]
        self._check_tokens("logit_bias", biased)
        with _refusals():
            # a full server does not tokenise prompts that it cannot take
            self.worker.check_room(len(call.prompts) * call.choices)
        token_ids = [await run_in_threadpool(self._encode, call, text) for text in call.prompts]
        echoed = []
        if call.echo:
            pairs = zip(call.prompts, token_ids, strict=True)
            echoed = [await run_in_threadpool(self._text_of, *pair) for pair in pairs]
        engine = self.worker.engine
        await exchange.submit(call.requests(token_ids, engine.end_tokens, engine.max_length))
        answer = Answer(self.model_name, call, self._token_text, echoed)
        if call.stream:
            ended = functools.partial(self._stream_ended, endpoint, exchange)
            return _EventStream(self._pieces(exchange, answer, call), ended)
        try:
            async with aclosing(exchange.news()) as news:
                async for _ in news:
                    pass
        finally:
            self.metrics.observe(exchange.generations, exchange.arrived)
        self._finished(exchange.generations)
        # in a thread, because an answer with logprobs of thousands of tokens takes long to write
        return await run_in_threadpool(lambda: JSONResponse(answer.whole(exchange.generations)))

    async def _body(self, request):
        media_type = request.headers.get("content-type", "").partition(";")[0]
        if media_type.strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
        limit = self.limits.body_bytes
        too_long = ApiError(413, f"the body must be at most {limit} bytes", code="body_too_long")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_long
        data = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for piece in request.stream():
                    data += piece
                    if len(data) > limit:
                        raise too_long
        except TimeoutError as error:
            seconds = self.limits.body_seconds
            raise ApiError(408, f"the body did not come within {seconds} s") from error
        return bytes(data)

    def _encode(self, call: Call, prompt) -> list[int]:
        """Token ids of one prompt of a call."""
        with self._encoding:
            if call.is_chat:
                ids = self.tokenizer(self._render(prompt), add_special_tokens=False).input_ids
            elif isinstance(prompt, str):
                ids = self.tokenizer(prompt).input_ids
            else:
                ids = prompt
        if len(ids) > self.limits.prompt_tokens:
            message = f"the prompt has {len(ids)} tokens, expected at most"
            message = f"{message} {self.limits.prompt_tokens}"
            raise ApiError(400, message, code="context_length_exceeded", param=call.input_field)
        if not ids:
            message = "the prompt must have at least one token"
            raise ApiError(400, message, param=call.input_field)
        self._check_tokens(call.input_field, ids)
        return ids

    def _text_of(self, prompt, ids) -> str:
        """A prompt as text; of tokens without those that texts leave out."""
        if isinstance(prompt, str):
            return prompt
        shown = [token for token in ids if token not in self.worker.engine.skipped_tokens]
        with self._encoding:
            return decode(self.tokenizer, shown)

    def _check_tokens(self, field, ids):
        size = self.worker.engine.model.config.vocab_size
        for token in (min(ids), max(ids)) if ids else ():
            if not 0 <= token < size:
                message = f"tokens of {field} must be in [0, {size}), got {token!s:.40}"
                raise ApiError(400, message, param=field)

    def _render(self, messages):
        if self.tokenizer.chat_template is None:
            message = "the model has no chat template: use /v1/completions"
            raise ApiError(400, message, code="no_chat_template")
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template may raise anything it likes about the messages
            message = f"the messages do not fit the model's chat template: {error}"
            raise ApiError(400, message[:300], param="messages") from error

    def _token_text(self, token):
        if token >= self._known:
            return TokenText("", b"", False)
        if token not in self._names:
            # decoders drop the space that a text's first token begins with
            before = self._namer("a", add_special_tokens=False).input_ids
            named = functools.partial(decode, self._namer, skip_special_tokens=False)
            text = named([*before, token])[len(named(before)) :]
            name, data = text, text.encode()
            if INCOMPLETE in text:
                # part of a character: different parts must not look alike
                name = self._namer.convert_ids_to_tokens(token)
                data = bytes_of_part(name, text)
            is_shown = token not in self.worker.engine.skipped_tokens
            self._names[token] = TokenText(name, data, is_shown)
        return self._names[token]

    async def _pieces(self, exchange, answer, call) -> AsyncIterator[str]:
        """Server-sent events of a streamed answer."""
        for index in range(len(exchange.generations)):
            if (piece := answer.opening(index)) is not None:
                yield _event(piece)
        echoes = set(exchange.generations) if call.echo else set()
        try:
            with _until_cancelled():
                async with aclosing(exchange.news()) as news:
                    async for found in news:
                        if found is None:
                            # a comment, which clients ignore
                            yield ": waiting\n\n"
                            continue
                        generation, delta = found
                        if delta.finish_reason in ("error", "cancelled"):
                            break
                        index = exchange.generations.index(generation)
                        if generation in echoes:
                            echoes.remove(generation)
                            # with log-probabilities it takes its time
                            echo = await run_in_threadpool(answer.echo, index, generation)
                            yield _event(echo)
                        if delta.text or delta.logprobs or delta.finish_reason:
                            yield _event(answer.piece(index, delta))
            self._finished(exchange.generations)
            exchange.status = 200
        except ApiError as error:
            exchange.status = error.status
            yield _event(error.body())
        except ClientDisconnect:
            raise
        except Exception:
            exchange.status = _DEFECT.status
            yield _event(_DEFECT.body())
            raise
        else:
            if call.include_usage:
                yield _event(answer.closing(exchange.generations))
        yield "data: [DONE]\n\n"

    def _stream_ended(self, endpoint, exchange):
        exchange.cancel()
        self.metrics.count_request(endpoint, exchange.status)
        self.metrics.observe(exchange.generations, exchange.arrived)

    def _finished(self, generations: list[Generation]) -> None:
        """Check that all generations have ended without an error.

        Raises:
            ApiError: 503, the server shut down in between, or a step of its engine failed; 422, the
                model could not continue.
        """
        for generation in generations:
            if generation.finish_reason == "error" and self.worker.failure is None:
                if generation.error == STEP_FAILED:
                    raise ApiError(503, f"{STEP_FAILED}: try again")
                message = f"the model could not continue this prompt: {generation.error}"
                raise ApiError(422, message, code="generation_failed")
        if any(x.finish_reason in ("cancelled", "error") for x in generations):
            raise ApiError(503, "the server is shutting down or has failed")


class _Mail:
    """Carries news from the engine's thread to the event loop, which is woken only once per step,
    because each time the two threads have to switch."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._collected: list[tuple[_Exchange, Generation, Delta]] = []

    def post(self, exchange: "_Exchange", generation: Generation, delta: Delta) -> None:
        """Collect the news of one generation."""
        self._collected.append((exchange, generation, delta))

    def deliver(self) -> None:
        """Hand over what is collected."""
        collected, self._collected = self._collected, []
        # a closed loop has nobody left to tell
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_hand_over, collected)


def _hand_over(collected):
    for exchange, generation, delta in collected:
        exchange.receive(generation, delta)


class _Exchange:
    """The generations of one HTTP request, tied to the connection: they end when it ends.

    News that has not been taken yet, because the loop is busy or the client slow, is joined: the
    higher the load, the fewer pieces a text is sent in.
    """

    def __init__(self, worker: EngineWorker, request: Request, mail: _Mail):
        self.worker, self.request, self.mail = worker, request, mail
        self.arrived = time.perf_counter()
        self.generations: list[Generation] = []
        # the status of a stream, set when it ends
        self.status = _CLIENT_LEFT
        self._news: dict[Generation, Delta] = {}
        self._is_gone = False
        self._changed = asyncio.Event()
        self._last = time.monotonic()

    async def submit(self, requests):
        """Give the requests to the worker, all or none."""
        with _refusals():
            # checking a long prompt takes some milliseconds
            generations = await run_in_threadpool(self.worker.prepare, requests)
            self.worker.enqueue(generations, functools.partial(self.mail.post, self))
        self.generations = generations

    def receive(self, generation: Generation, delta: Delta) -> None:
        """Take news, in the event loop."""
        untaken = self._news.get(generation)
        self._news[generation] = delta if untaken is None else untaken.then(delta)
        self._changed.set()

    async def news(self) -> AsyncIterator[tuple[Generation, Delta] | None]:
        """News until every generation has ended; None if there has been none for a while.

        What has not ended is cancelled if the loop is left early or the client disconnects.

        Raises:
            ClientDisconnect: the client disconnected.
        """
        watchers = [asyncio.create_task(self._watch()), asyncio.create_task(self._remind())]
        unfinished = len(self.generations)
        try:
            while unfinished:
                await self._changed.wait()
                self._changed.clear()
                if self._is_gone:
                    raise ClientDisconnect
                news, self._news = self._news, {}
                self._last = time.monotonic()
                if not news:
                    yield None
                for generation, delta in news.items():
                    unfinished -= delta.finish_reason is not None
                    yield generation, delta
        finally:
            for watcher in watchers:
                watcher.cancel()
            self.cancel()

    def cancel(self) -> None:
        """Cancel what has not ended."""
        if any(generation.finish_reason is None for generation in self.generations):
            self.worker.cancel(self.generations)

    async def _watch(self):
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        self._changed.set()

    async def _remind(self):
        # one timer per request: a timeout for each piece costs as much as writing its JSON
        while True:
            left = self._last + _QUIET_SECONDS - time.monotonic()
            if left <= 0:
                self._changed.set()
                left = _QUIET_SECONDS
            await asyncio.sleep(left)


class _EventStream(Response):
    """A response of server-sent events; ``on_end`` is called whatever happens to the client."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.on_end = events, on_end

    async def __call__(self, scope, receive, send):
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        # a client that disconnects ends the stream without an error; so does one that is not
        # reading when the time to shut down is over
        ends = (ClientDisconnect, OSError, asyncio.CancelledError)
        with contextlib.suppress(*ends), contextlib.ExitStack() as stack:
            stack.callback(self.on_end)
            await send(start)
            async with aclosing(self.events) as events:
                async for event in events:
                    body = event.encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def _refusals():
    """Turn a worker's refusals into HTTP errors: 400, the request cannot be served; 429, there is
    no room; 503, the server is shutting down."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    except QueueFullError as error:
        raise ApiError(429, f"{error}: try again later", code="queue_full") from error
    except WorkerStoppedError as error:
        raise ApiError(503, str(error)) from error


@contextlib.contextmanager
def _until_cancelled():
    """Answer 503 to requests that are cancelled because the time to shut down is over."""
    try:
        yield
    except asyncio.CancelledError as error:
        raise ApiError(503, "the server is shutting down") from error


def _event(value) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    headers = {**_HEADERS.get(error.status, {}), **(headers or {})}
    # ASCII, because a message may quote text that no encoding can express
    body = json.dumps(error.body())
    return Response(body, error.status, headers=headers, media_type="application/json")


# ----------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """The command ``rodimus serve``: serve until told to stop; returns its exit status.

    Raises:
        InputError: the model, a state file or an option is wrong, or the port is in use.
    """
    _check_address(options.host, options.port)
    _check_origins(options.allow_origin)
    service = _service(options)
    if options.host not in ("127.0.0.1", "::1", "localhost") and service.api_key is None:
        logger.warning("serving on %s without an API key: set %s", options.host, API_KEY_VARIABLE)
    _Server(_config(service.app(), options), service.worker).run()
    return 0 if service.worker.failure is None else 1


def _config(app: Starlette, options: argparse.Namespace) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=options.shutdown_seconds,
    )


class _Server(uvicorn.Server):
    """A second Ctrl-C cuts the time for running requests short; all else shuts down as usual.

    A broken engine ends the server, so that a supervisor can start another.
    """

    def __init__(self, config: uvicorn.Config, worker: EngineWorker):
        super().__init__(config)
        self.worker = worker
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets=None):
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig, frame):
        super().handle_exit(sig, frame)
        # from Python 3.12.1 on, the shutdown waits until all connections are closed
        if self.force_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self):
        for task in self.server_state.tasks:
            task.cancel()

    async def on_tick(self, counter):
        return await super().on_tick(counter) or self.worker.failure is not None

    async def shutdown(self, sockets=None):
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()


def _check_address(host: str, port: int) -> None:
    """Raise before the model is loaded if the server could not listen afterwards."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise InputError(f"cannot listen: {error.strerror}") from error
    except TypeError as error:
        # of a name that cannot be looked up, such as one with an empty part between its dots
        raise InputError(f"cannot listen: {error} ({host!r})") from error


def _check_origins(origins: Sequence[str]) -> None:
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise InputError(
                f"--allow-origin must be * or like http://localhost:3000, got {origin!r}"
            )


def _service(options) -> Service:
    """Load everything: model, tokenizer, engine, prefixes."""
    api_key = _api_key()
    try:
        model, tokenizer = load(options)
        engine = Engine(
            model,
            tokenizer,
            slots=options.slots,
            prefill_chunk=options.prefill_chunk,
            max_length=options.max_length,
            window_dtype=torch.int8 if options.window_dtype == "int8" else None,
            recent_states=options.recent_states,
        )
        for path in options.prefix:
            engine.add_prefix(load_state(path, model))
        worker = EngineWorker(engine, max_waiting=options.max_waiting)
    except (ValueError, RuntimeError) as error:
        raise InputError(first_line(error)) from error
    limits = Limits(
        body_bytes=options.max_body_bytes,
        prompt_tokens=options.max_prompt_tokens,
        new_tokens=options.max_new_tokens,
        choices=options.max_choices,
    )
    name = options.name or _name_of(options.model)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the model's name is no UTF-8 text: {name!r}") from error
    origins = options.allow_origin
    return Service(worker, model_name=name, limits=limits, api_key=api_key, origins=origins)


def _name_of(model):
    """What clients call a model: its name on the hub without the revision, or its folder's."""
    if is_hub_name(model):
        return split_hub_name(model)[0]
    return os.path.basename(os.path.abspath(model))


def _api_key() -> str | None:
    """The key in the environment, if there is one."""
    key = os.environ.get(API_KEY_VARIABLE)
    if key is None:
        return None
    # no header can carry blanks around the key, such as the line break of the file it came from
    if not key.strip():
        raise InputError(f"{API_KEY_VARIABLE} is empty: unset it to ask clients for no key")
    return key.strip()
