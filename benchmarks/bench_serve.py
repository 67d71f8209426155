"""`rodimus serve` under load: clients on the loopback that each send the next request when one is
answered, and read their answers as a stream.

Times are measured by a client, and include the connection, HTTP and detokenisation: to the first
token, and from one token to the next. If an event brings several tokens, the time since the last
one is divided among them. Every load has its own prompts, so no state is reused.
"""

import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from . import bench_train, machine, peers, records, timing
from .harness import Bench, skipped_row

# clients of each load in turn, prompt length, new tokens
LOADS = {
    "tiny": ((1, 3), 16, 4),
    "cpu": ((1,), 128, 32),
    "cuda": ((1, 8, 64), 1024, 128),
}
# tests without a point, as all of this module are, run last
LAST = (None,)
REQUESTS_A_CLIENT = 4
START_SECONDS = 240.0
"""Limit for the start of a server, which reads its weights and captures its steps."""
PERCENTILES = (50, 95, 99)
END = ";"
"""The text of every token ends with it, so that tokens can be counted."""


class Answer(NamedTuple):
    """When a request was sent, and when how many tokens arrived, in seconds."""

    asked: float
    came: list[tuple[float, int]]

    @property
    def first_ms(self) -> float:
        """Time to the first token."""
        return 1e3 * (self.came[0][0] - self.asked)

    @property
    def between_ms(self) -> list[float]:
        """Time from each token to the next one."""
        gaps = []
        last, first_tokens = self.came[0]
        # tokens that came with the first one were not waited for
        gaps += [0.0] * (first_tokens - 1)
        for at, tokens in self.came[1:]:
            gaps += [1e3 * (at - last) / tokens] * tokens
            last = at
        return gaps


# ----------------------------------------------------------------------------------------------
# The server
# ----------------------------------------------------------------------------------------------


def word_tokenizer(vocab_size: int):
    """A tokenizer in which every token of a model is a word that ends with ``END``."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}{END}": i for i in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token=f"t0{END}"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@contextlib.contextmanager
def serving(model: peers.HuggingFaceModel, slots: int) -> Iterator[int]:
    """Runs the server with a copy of the model until the end of the context; yields its port.

    Raises:
        peers.Fault: it ends, or does not listen in time; the message has its last line of output.
    """
    from rodimus.options import API_KEY_VARIABLE

    paths = os.pathsep.join((str(machine.ROOT), str(machine.ROOT / "kernels"), *sys.path))
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop(API_KEY_VARIABLE, None)
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name, "model"), Path(name, "log")
        model.model.save_pretrained(folder)
        word_tokenizer(model.vocab_size).save_pretrained(folder)
        command = [sys.executable, "-m", "rodimus", "serve", str(folder), "--port", "0"]
        command += ["--slots", str(slots)]
        with log.open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            yield _port(process, log)
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port(process: subprocess.Popen, log: Path) -> int:
    """The port on which the server listens, from its output."""
    deadline, mark = time.monotonic() + START_SECONDS, "running on http://127.0.0.1:"
    while True:
        ended = process.poll() is not None or time.monotonic() > deadline
        said = log.read_text(encoding="utf-8", errors="replace")
        if mark in said:
            return int(said.partition(mark)[2].split()[0])
        if ended:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise peers.Fault(f"the server does not listen: {last}")
        time.sleep(0.1)


# ----------------------------------------------------------------------------------------------
# The clients
# ----------------------------------------------------------------------------------------------


async def ask(port: int, prompt: list[int], new_tokens: int) -> Answer:
    """One streamed completion of exactly ``new_tokens`` tokens."""
    asked = time.perf_counter()
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
    data = json.dumps(body | {"stream": True, "ignore_eos": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    # an answer in HTTP/1.0 is not chunked and ends with the connection
    head = "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    lines = []
    with contextlib.closing(writer):
        while line := await reader.readline():
            lines.append((time.perf_counter(), line))
    # parsed only now, when no time is being taken
    events = [(at, line) for at, line in lines if line.startswith(b"data: {")]
    if b" 200 " not in lines[0][1] or not events:
        raise peers.Fault(f"the server refuses: {lines[-1][1].decode(errors='replace').strip()}")
    came = [(at, _tokens(json.loads(line[6:]))) for at, line in events]
    answer = Answer(asked, [(at, tokens) for at, tokens in came if tokens])
    if (got := sum(tokens for _, tokens in answer.came)) != new_tokens:
        raise peers.Fault(f"the server gives {got} tokens, expected {new_tokens}")
    return answer


def _tokens(event: dict) -> int:
    """Tokens in an event's text.

    Raises:
        peers.Fault: the event is an error.
    """
    if "choices" not in event:
        raise peers.Fault(f"the server fails: {event}")
    return event["choices"][0]["text"].count(END)


async def load(
    port: int, prompts: Sequence[list[int]], clients: int, new_tokens: int
) -> list[Answer]:
    """Answers to all prompts, with ``clients`` requests in flight."""
    waiting, answers = iter(prompts), []

    async def client() -> None:
        for prompt in waiting:
            answers.append(await ask(port, prompt, new_tokens))

    # the first failure ends the others and is raised
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def row(name: str, family: str, clients: int, answers: list[Answer]) -> dict:
    """The row of one load: percentiles over its requests, and over all tokens but the first."""
    first = [answer.first_ms for answer in answers]
    between = [answer.between_ms for answer in answers]
    seconds = max(a.came[-1][0] for a in answers) - min(a.asked for a in answers)
    tokens = sum(count for answer in answers for _, count in answer.came)
    every = {"first_token": first, "between_tokens": [ms for each in between for ms in each]}
    engine = f"serve-{clients}"
    return records.row(
        *(f"{name}/{engine}", family, engine),
        clients=clients,
        requests=len(answers),
        tokens_per_s=tokens / seconds,
        # tokens are too many to record: of each request only the mean between tokens
        samples={"first_token_ms": first, "between_tokens_ms": [sum(x) / len(x) for x in between]},
        **{
            f"{what}_p{p}_ms": timing.quantile(values, p / 100)
            for what, values in every.items()
            for p in PERCENTILES
        },
    )


def measure(bench: Bench, name: str, loads: Sequence[int], length: int, new_tokens: int) -> list:
    """Rows of all loads on one server, after a request that is not timed."""
    model = bench.model(name)
    counts = [clients * REQUESTS_A_CLIENT for clients in loads]
    prompts = iter(peers.random_tokens(1 + sum(counts), length, model).tolist())
    take = lambda count: [next(prompts) for _ in range(count)]
    rows = []
    # the server is another process, and cannot use the memory that this one keeps cached
    bench_train.clear(bench)
    with serving(model, max(loads)) as port:
        asyncio.run(load(port, take(1), 1, new_tokens))
        for clients, count in zip(loads, counts, strict=True):
            answers = asyncio.run(load(port, take(count), clients, new_tokens))
            rows.append(row(name, model.family, clients, answers))
    return rows


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", peers.OURS)
def test_serve(bench, start, name):
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    if name not in bench.names:
        pytest.skip("not asked for")
    loads, length, new_tokens = LOADS["tiny" if bench.scale == "tiny" else bench.device.type]
    case = f"{bench.case(max(loads), length)}-n{new_tokens}-{name}"
    start("serve", case, (name,))
    try:
        rows = peers.guarded(functools.partial(measure, bench, name, loads, length, new_tokens))
    except peers.Unavailable as reason:
        rows = [skipped_row(f"{name}/serve", "serve", reason)]
    settings = {"batch": max(loads), "context": length, "new_tokens": new_tokens}
    record = bench.record("serve", case, settings, rows)
    assert records.measured(record)
