"""The server under load: what clients count, what they refuse, and one run with the real server."""

import asyncio
import contextlib
import json
import sys

import pytest
import torch

from benchmarks import bench_serve, harness, peers, records
from benchmarks.bench_serve import Answer
from tests import warm_python
from tests.benchmarks.test_suite import run

pytest.importorskip("uvicorn")

CPU = torch.device("cpu")


def test_gaps_add_up_to_the_time_after_the_first_token():
    answer = Answer(10.0, [(10.5, 2), (10.75, 1), (11.75, 4)])
    assert answer.first_ms == 500.0
    # the second token came with the first; four that came together waited a second in all
    assert answer.between_ms == [0.0, 250.0, 250.0, 250.0, 250.0, 250.0]
    assert sum(answer.between_ms) == 1e3 * (11.75 - 10.5)
    assert len(answer.between_ms) == sum(tokens for _, tokens in answer.came) - 1


def test_percentiles_are_over_all_tokens_and_the_rate_over_all_requests():
    # two requests at once: 3 tokens in 2 s, and 3 tokens in 4 s
    answers = [Answer(0.0, [(1.0, 1), (2.0, 2)]), Answer(1.0, [(3.0, 1), (5.0, 2)])]
    row = bench_serve.row("rodimus-1.4b", "rodimus", 2, answers)
    assert row["target"] == "rodimus-1.4b/serve-2" and row["requests"] == row["clients"] == 2
    assert row["tokens_per_s"] == 6 / 5
    assert row["samples"] == {
        "first_token_ms": [1000.0, 2000.0],
        "between_tokens_ms": [500.0, 1000.0],
    }
    # gaps of 500, 500, 1000 and 1000 ms
    assert row["between_tokens_p50_ms"] == 750.0 and row["between_tokens_p99_ms"] == 1000.0
    assert row["first_token_p50_ms"] == 1500.0 and row["first_token_p95_ms"] == 1950.0


def event(text):
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


def ask(answer, new_tokens):
    """What a client makes of an answer of these bytes, and the request that it sent."""
    asked = []

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        asked.append(json.loads(await reader.readexactly(length)))
        with contextlib.closing(writer):
            writer.write(answer)
            await writer.drain()

    async def main():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await bench_serve.ask(port, [1, 2], new_tokens)

    return asyncio.run(main()), asked[0]


OK = b"HTTP/1.1 200 OK\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def test_a_client_counts_the_tokens_of_every_event():
    events = event("t5;") + b": waiting\n\n" + event("t6;t7;") + event("")
    answer, asked = ask(OK + events + DONE, 3)
    assert [tokens for _, tokens in answer.came] == [1, 2] and answer.asked < answer.came[0][0]
    assert asked["prompt"] == [1, 2] and asked["stream"] and asked["ignore_eos"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 429 Too Many\r\n\r\nfull\n", "the server refuses: full"),
        (OK + event("t5;") + DONE, "gives 1 tokens, expected 2"),
        (OK + event("t5;") + b'data: {"error": "lost"}\n\n' + DONE, "the server fails.*lost"),
    ],
    ids=["refused", "short", "error"],
)
def test_an_answer_that_is_none_is_a_fault(answer, message):
    with pytest.raises(peers.Fault, match=message):
        ask(answer, 2)


def test_a_server_that_does_not_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_python.executable())
    bench = harness.Bench("tiny", CPU, torch.float32, (), folder=None, rounds=1, load=0.0)
    model = bench.model("rodimus-1.4b")
    with pytest.raises(peers.Fault, match=r"does not listen: .*--slots.*must be at least 1, got 0"):
        with bench_serve.serving(model, 0):
            pass


def test_the_server_has_the_packages_of_this_process(tmp_path, monkeypatch):
    """They may come by PYTHONPATH alone, as on a machine where nothing can be installed."""
    monkeypatch.setattr(sys, "executable", warm_python.executable())
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "uvicorn.py").write_text("raise ImportError('this one is found')")
    bench = harness.Bench("tiny", CPU, torch.float32, (), folder=None, rounds=1, load=0.0)
    model = bench.model("rodimus-1.4b")
    with pytest.raises(peers.Fault, match="this one is found"):
        with bench_serve.serving(model, 1):
            pass


def test_the_server_is_measured_as_its_clients_see_it(tmp_path):
    run(tmp_path, "--bench-models", "rodimus-plus-1.6b", files=["bench_serve.py"])
    (record,) = records.read(tmp_path)
    assert (record["group"], record["case"]) == ("serve", "b3-t16-bfloat16-n4-rodimus-plus-1.6b")
    loads, _, new_tokens = bench_serve.LOADS["tiny"]
    assert [row["clients"] for row in record["rows"]] == list(loads) == [1, 3]
    for row in record["rows"]:
        assert row["requests"] == row["clients"] * bench_serve.REQUESTS_A_CLIENT
        assert len(row["samples"]["first_token_ms"]) == row["requests"]
        for what in ("first_token", "between_tokens"):
            p50, p95, p99 = (row[f"{what}_p{p}_ms"] for p in bench_serve.PERCENTILES)
            # tokens that came with the first one were not waited for
            assert 0 <= p50 <= p95 <= p99
        assert row["first_token_p50_ms"] > 0
        # no request is done faster than its tokens come
        slowest = max(row["samples"]["first_token_ms"])
        assert 0 < row["tokens_per_s"] < 1e3 * row["requests"] * new_tokens / slowest
