"""Many clients at once against a server on the loopback: good requests, bad ones, and rude ones.

    python -m tests.generation.soak --seconds 120

Every answer that completes is compared with the same request served alone; at the end no slot, no
request and no generation may be left over.
"""

import argparse
import asyncio
import collections
import dataclasses
import gc
import json
import os
import random
import threading

from rodimus.generation import Engine, Generation, Request, SamplingParams
from rodimus.limits import Limits
from tests.generation.helpers import byte_tokenizer, text_model
from tests.generation.serving import serving, wait_until

LIMITS = Limits(body_bytes=8_000, body_seconds=2, prompt_tokens=600, new_tokens=4000)
SLOTS, WAITING = 8, 24
REQUESTS = 24


@dataclasses.dataclass
class Report:
    """What happened: how often each thing was done and came out how, and what was left over."""

    outcomes: collections.Counter
    differing: list[str]
    unfinished: int
    running: int
    generations_alive: int
    threads_gained: int
    server_errors: int
    resident_bytes: tuple[int, int]
    generated_tokens: int

    def lines(self) -> str:
        """The report as text."""
        before, after = self.resident_bytes
        parts = [f"{name}: {count}" for name, count in sorted(self.outcomes.items())]
        parts.append(f"tokens generated: {self.generated_tokens}")
        parts.append(f"completed answers that differ from the same request alone: {self.differing}")
        parts.append(f"left over: {self.unfinished} requests, {self.running} slots in use,")
        parts.append(f"  {self.generations_alive} generations, {self.threads_gained} threads")
        parts.append(f"answers with status 500: {self.server_errors}")
        parts.append(f"resident memory: {before:,} bytes after warming up, {after:,} at the end")
        return "\n".join(parts)


def make_requests() -> list[tuple[dict, str]]:
    """Bodies of completions, and the text that each gets when it is alone."""
    generator, tokenizer = random.Random(0), byte_tokenizer()
    engine = Engine(text_model(), tokenizer, slots=1, prefill_chunk=32)
    engine.end_tokens = ()
    pairs = []
    for i in range(REQUESTS):
        prompt = "".join(generator.choices("abcdefgh \u00e9", k=generator.randint(1, 120)))
        body = {"prompt": prompt, "max_tokens": generator.randint(1, 30), "temperature": 0}
        if i % 2:
            body |= {"temperature": 0.8, "top_p": 0.95, "seed": i, "repetition_penalty": 1.1}
        names = ("temperature", "top_p", "seed", "repetition_penalty")
        sampling = SamplingParams(**{name: body[name] for name in names if name in body})
        request = Request(tokenizer(prompt).input_ids, body["max_tokens"], sampling)
        pairs.append((body, engine.generate([request])[0].text))
    return pairs


def post(body: bytes, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """An HTTP/1.0 request: its answer ends with the connection."""
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return head.encode() + b"\r\n\r\n" + body


class Clients:
    """Clients that do one thing after another, at random, until time is up."""

    def __init__(self, port: int, pairs: list[tuple[dict, str]], seed: int):
        self.port, self.pairs, self.seed = port, pairs, seed
        self.outcomes: collections.Counter = collections.Counter()
        self.differing: list[str] = []

    async def run(self, clients: int, seconds: float) -> None:
        """All clients at once."""
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for i in range(clients):
                group.create_task(self._client(random.Random(self.seed + i), until))

    async def _client(self, generator, until):
        actions = {
            self._whole: 6,
            self._streamed: 6,
            self._leaves_a_stream: 3,
            self._leaves_before_the_answer: 3,
            self._sends_bad_json: 1,
            self._sends_a_bad_field: 1,
            self._sends_too_much: 1,
            self._sends_half_a_body: 1,
            self._speaks_no_http: 1,
        }
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            (action,) = generator.choices(list(actions), actions.values())
            outcome = await action(generator)
            self.outcomes[f"{action.__name__.strip('_').replace('_', ' ')}: {outcome}"] += 1
            # who is told to come back later does
            await asyncio.sleep(generator.uniform(0.05, 0.3) if outcome == "429" else 0)

    async def _ask(self, data: bytes) -> tuple[str, bytes]:
        """Status and body of the answer to ``data``; "closed" where there is none."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(), timeout=120)
        except ConnectionError:
            return "closed", b""
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return (head.split()[1].decode() if head else "closed"), body

    async def _whole(self, generator):
        body, expected = generator.choice(self.pairs)
        status, answer = await self._ask(post(json.dumps(body).encode()))
        if status == "200":
            self._compare(body, json.loads(answer)["choices"][0]["text"], expected)
        return status

    async def _streamed(self, generator):
        body, expected = generator.choice(self.pairs)
        status, answer = await self._ask(post(json.dumps(body | {"stream": True}).encode()))
        if status == "200":
            *events, done, _ = answer.decode().split("\n\n")
            assert done == "data: [DONE]"
            # while nothing comes, for as long as a busy machine takes, there are comments
            events = [event for event in events if not event.startswith(":")]
            pieces = (json.loads(event.removeprefix("data: ")) for event in events)
            text = "".join(piece["choices"][0]["text"] for piece in pieces)
            self._compare(body, text, expected)
        return status

    def _compare(self, body, text, expected):
        if text != expected:
            self.differing.append(f"{body}: {text!r} instead of {expected!r}")

    async def _leaves_a_stream(self, generator):
        try:
            reader, writer = await self._open(generator, {"stream": True, "max_tokens": 4000})
        except ConnectionError:
            return "closed"
        try:
            status = (await reader.readexactly(12))[9:].decode()
            await reader.read(generator.randint(1, 4000))
        except (ConnectionError, asyncio.IncompleteReadError):
            status = "closed"
        writer.close()
        return status

    async def _leaves_before_the_answer(self, generator):
        try:
            _, writer = await self._open(generator, {"max_tokens": 4000})
        except ConnectionError:
            return "closed"
        await asyncio.sleep(generator.uniform(0, 0.3))
        writer.close()
        return "left"

    async def _open(self, generator, fields):
        body, _ = generator.choice(self.pairs)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(post(json.dumps(body | fields).encode()))
        await writer.drain()
        return reader, writer

    async def _sends_bad_json(self, generator):
        body = json.dumps(generator.choice(self.pairs)[0]).encode()
        return (await self._ask(post(body[: generator.randint(0, len(body) - 1)])))[0]

    async def _sends_a_bad_field(self, generator):
        wrong = {"temperature": "hot", "top_p": -1, "n": 10**9, "prompt": None, "stop": {}, "x": 1}
        name = generator.choice(list(wrong))
        body = generator.choice(self.pairs)[0] | {name: wrong[name]}
        return (await self._ask(post(json.dumps(body).encode())))[0]

    async def _sends_too_much(self, generator):
        body = b'{"prompt": "' + b"x" * generator.randint(9_000, 200_000) + b'"}'
        return (await self._ask(post(body)))[0]

    async def _sends_half_a_body(self, generator):
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(post(b'{"prompt": "x"', length=100))
        await writer.drain()
        await asyncio.sleep(generator.uniform(0, 0.3))
        writer.close()
        return "left"

    async def _speaks_no_http(self, generator):
        return (await self._ask(generator.randbytes(200) + b"\r\n\r\n"))[0]


def resident_bytes() -> int:
    """Memory of this process, where the system tells."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def soak(seconds: float, clients: int = 64, seed: int = 0) -> Report:
    """Run clients against a server for so long, and look at what is left."""
    pairs = make_requests()
    threads = threading.active_count()
    engine = Engine(text_model(), byte_tokenizer(), slots=SLOTS, prefill_chunk=32, recent_states=6)
    engine.end_tokens = ()
    with serving(engine=engine, limits=LIMITS, max_waiting=WAITING) as (client, service, server):
        crowd = Clients(client.port, pairs, seed)
        asyncio.run(crowd.run(clients, min(seconds / 4, 20)))
        gc.collect()
        before = resident_bytes()
        asyncio.run(crowd.run(clients, seconds))
        wait_until(lambda: service.worker.unfinished == 0 and not server.server_state.tasks)
        running, unfinished = len(engine.running), service.worker.unfinished
        _, metrics = client.call("GET", "/metrics")
        errors = [line for line in metrics.decode().splitlines() if 'status="500"' in line]
    gc.collect()
    return Report(
        outcomes=crowd.outcomes,
        differing=crowd.differing,
        unfinished=unfinished,
        running=running,
        generations_alive=sum(type(thing) is Generation for thing in gc.get_objects()),
        threads_gained=threading.active_count() - threads,
        server_errors=sum(int(float(line.split()[-1])) for line in errors),
        resident_bytes=(before, resident_bytes()),
        generated_tokens=engine.stats.generated_tokens,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    print(soak(**vars(parser.parse_args())).lines())
