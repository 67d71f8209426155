"""The generation engine under load: clients that each ask again as soon as they are answered.

Time to the first token and time between tokens as percentiles over the requests, and tokens a
second of the whole engine. Ours alone: the peers' packages have no engine of their own.
"""

import time
from collections.abc import Iterator

import pytest
import torch

from . import peers, records, timing
from .harness import Bench, skipped_row

# (clients, prompt, new tokens)
POINTS = {
    "tiny": [(2, 16, 4)],
    # prompts of a 1.5B model take seconds each on a CPU, so only one client is served
    "cpu": [(1, 128, 32)],
    "cuda": [(1, 1024, 128), (8, 1024, 128), (64, 1024, 128), (8, 16384, 128)],
}
REQUESTS_A_CLIENT = {"tiny": 2, "full": 4}


def serve(engine, prompts: Iterator[list[int]], clients: int, new_tokens: int) -> list:
    """Keep ``clients`` requests in flight until the prompts are used up; finished generations."""
    from rodimus.generation.engine import Request

    def ask() -> None:
        prompt = next(prompts, None)
        if prompt is not None:
            # no token ends a text, so every request does the same work
            engine.submit(Request(prompt, max_new_tokens=new_tokens, stop_tokens=()))

    finished = []
    for _ in range(clients):
        ask()
    while engine.has_work:
        for generation in engine.step():
            if generation.finish_reason is not None:
                finished.append(generation)
                ask()
    return finished


def measure(bench: Bench, name: str, clients: int, length: int, new_tokens: int) -> dict:
    """One model: an untimed request first, then the load."""
    from rodimus.generation.engine import Engine

    model = bench.model(name)
    if not isinstance(model, peers.HuggingFaceModel):
        raise peers.Unavailable(f"{name} has no engine")
    bench.require_room(model, clients, length + new_tokens)
    engine = Engine(model.model, slots=clients, max_length=length + new_tokens)
    count = clients * REQUESTS_A_CLIENT[bench.scale]
    ids = peers.random_tokens(count + 1, length, model).tolist()
    serve(engine, iter(ids[:1]), 1, new_tokens)
    start = time.perf_counter()
    finished = serve(engine, iter(ids[1:]), clients, new_tokens)
    seconds = time.perf_counter() - start
    assert [g.finish_reason for g in finished] == ["length"] * count
    assert all(len(g.tokens) == new_tokens for g in finished)
    first = [1e3 * (g.started - g.submitted) for g in finished]
    between = [1e3 * (g.finished - g.started) / (new_tokens - 1) for g in finished]
    return records.row(
        *(f"{name}/engine", model.family, "engine"),
        requests=count,
        tokens_per_s=count * new_tokens / seconds,
        samples={"first_token_ms": first, "between_tokens_ms": between},
        **_percentiles("first_token", first),
        **_percentiles("between_tokens", between),
    )


def _percentiles(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}_p{p}_ms": timing.quantile(values, p / 100) for p in (50, 90, 99)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_engine(bench, start, point):
    clients, length, new_tokens = point
    case = f"{bench.case(clients, length)}-n{new_tokens}"
    names = [name for name in peers.OURS if name in bench.names]
    start("engine", case, names)
    rows = []
    for name in names:
        try:
            rows.append(peers.guarded(lambda n=name: measure(bench, n, *point)))
        except peers.Unavailable as reason:
            rows.append(skipped_row(f"{name}/engine", "engine", reason))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    settings = {"batch": clients, "context": length, "new_tokens": new_tokens}
    record = bench.record("engine", case, settings, rows)
    assert records.measured(record) or not rows, rows
