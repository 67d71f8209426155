"""A server on a free port of the loopback, for tests: in this process, in a thread."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

import uvicorn

from rodimus.generation import Engine
from rodimus.generation.server import Service, _Server
from rodimus.generation.worker import EngineWorker
from rodimus.limits import Limits
from tests.generation.helpers import byte_tokenizer, text_model

NAME = "tiny"


class Client:
    """Talks HTTP to a server; each call is a connection."""

    def __init__(self, port: int, headers: dict[str, str] | None = None):
        self.port, self.headers = port, headers or {}

    def call(self, method: str, path: str, body=None, **headers) -> tuple[int, bytes]:
        """Status and body of an answer; a ``body`` that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        with contextlib.closing(connection):
            sent = {"Content-Type": "application/json", **self.headers, **headers}
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def get(self, path: str, **headers) -> tuple[int, dict]:
        """Status and JSON of a GET."""
        status, body = self.call("GET", path, **headers)
        return status, json.loads(body)

    def post(self, path: str, body, **headers) -> tuple[int, dict]:
        """Status and JSON of a POST."""
        status, answer = self.call("POST", path, body, **headers)
        return status, json.loads(answer)

    def complete(self, prompt, **fields) -> tuple[int, dict]:
        """``/v1/completions``."""
        return self.post("/v1/completions", {"prompt": prompt, **fields})

    def chat(self, *contents: str, **fields) -> tuple[int, dict]:
        """``/v1/chat/completions`` with the user's messages."""
        messages = [{"role": "user", "content": content} for content in contents]
        return self.post("/v1/chat/completions", {"messages": messages, **fields})

    def stream(self, path: str, body: dict) -> list[dict]:
        """Events of a streamed answer, which must end as OpenAI's do."""
        status, answer = self.call("POST", path, body | {"stream": True})
        assert status == 200, answer
        *events, done, rest = answer.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def metric(self, name: str) -> float:
        """The value of one line of ``/metrics``."""
        _, text = self.call("GET", "/metrics")
        (line,) = (x for x in text.decode().splitlines() if x.startswith(name + " "))
        return float(line.split()[-1])


@contextlib.contextmanager
def serving(
    *,
    engine: Engine | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    max_waiting: int = 64,
    **engine_options,
) -> Iterator[tuple[Client, Service, uvicorn.Server]]:
    """A running server, a client of it, and its parts."""
    if engine is None:
        engine = Engine(text_model(), byte_tokenizer(), **engine_options)
    worker = EngineWorker(engine, max_waiting=max_waiting)
    service = Service(worker, model_name=NAME, limits=limits, api_key=api_key, origins=origins)
    config = uvicorn.Config(service.app(), log_level="critical", timeout_graceful_shutdown=10)
    server = _Server(config, worker)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Client(listening.getsockname()[1]), service, server
        finally:
            server.should_exit = True
            thread.join(timeout=60)
    assert not thread.is_alive()


def wait_until(condition, seconds: float = 20) -> None:
    """Wait for what another thread does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.01)
