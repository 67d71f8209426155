"""The generation engine under load: clients that each send the next request when one is answered.

Time to the first token and time between tokens as percentiles over the requests, and tokens per
second of the whole engine. Then steps of a full engine and of the model alone: the difference is
what sampling and the host add. Only our models are measured: the peers' packages have no engine of
their own.
"""

import functools
import time
from collections.abc import Iterator

import pytest
import torch

from . import operators, peers, records, timing
from .harness import Bench, skipped_row

# (clients, prompt, new tokens)
POINTS = {
    "tiny": [(2, 16, 4)],
    # prompts of a 1.5B model take seconds each on a CPU, so only one client is served
    "cpu": [(1, 128, 32)],
    # short prompts are read together
    "cuda": [(1, 1024, 128), (8, 1024, 128), (64, 1024, 128), (64, 64, 128), (8, 16384, 128)],
}
REQUESTS_A_CLIENT = {"tiny": 2, "full": 4}

# (running sequences, prompt)
FULL = {"tiny": (2, 16), "full": (64, 1024)}
STEPS = 8
"""Steps in one timed call of a full engine."""
SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": peers.SEED}}


def serve(engine, prompts: Iterator[list[int]], clients: int, new_tokens: int) -> list:
    """Keeps ``clients`` requests in flight until no prompt is left; the finished generations."""
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


def full_engine(bench: Bench, model: peers.Model, slots: int, length: int, sampling: dict):
    """An engine in which every slot has a sequence that does not end while steps are timed."""
    from rodimus.generation.engine import Engine, Request, SamplingParams

    # tokens until the last prompt is read, and of each target's calls in warm-up and timed rounds
    room = slots * (2 + length // 512) + 8 * STEPS * bench.rounds
    engine = Engine(model.model, slots=slots, max_length=length + room)
    for prompt in peers.random_tokens(slots, length, model).tolist():
        how = SamplingParams(**sampling)
        engine.submit(Request(prompt, max_new_tokens=room, sampling=how, stop_tokens=()))
    while len(engine.running) < slots:
        engine.step()
    return engine


def measure_steps(bench: Bench, name: str, slots: int, length: int, mode: str) -> dict:
    """Steps of a full engine, and of its model alone, in turn."""
    model = bench.model(name)
    if not isinstance(model, peers.HuggingFaceModel):
        raise peers.Unavailable(f"{name} has no engine")
    bench.require_room(model, slots, length)
    engine = full_engine(bench, model, slots, length, SAMPLING[mode])
    run = lambda call: [call() for _ in range(STEPS)]
    alone = torch.no_grad()(functools.partial(engine.decoder, slots))
    calls = {"step": lambda: run(engine.step), "model": lambda: run(alone)}
    turns = timing.RoundRobin(calls, bench.device, focus="step")
    for _ in range(turns.settle(bench.rounds, bench.case_seconds)[0]):
        turns.round()
    profile = operators.kernels(calls["step"]) if bench.device.type == "cuda" else {}
    assert len(engine.running) == slots, "a sequence ended while steps were timed"
    return records.row(
        f"{name}/{mode}", model.family, mode, **profile, **step_times(turns, slots, profile)
    )


def step_times(turns: timing.RoundRobin, slots: int, profile: dict) -> dict:
    """Milliseconds of one step, as fields of a row.

    On a GPU the model's time is device time. ``beside_model_ms`` is the median of the rounds'
    differences; ``host_ms`` is a step's time without that of all kernels, those of sampling
    included, if the device's profiler reports them.
    """
    clocks = {"step": "wall_ms", "model": "device_ms"}
    if turns.device.type != "cuda":
        clocks["model"] = "wall_ms"
    samples = {n: [ms / STEPS for ms in turns.column(n, clock)] for n, clock in clocks.items()}
    step, model = samples.values()
    summary = timing.summarize(step)
    beside = [a - b for a, b in zip(step, model, strict=True)]
    found = {
        "samples": samples,
        **summary.in_ms(),
        "model_ms": timing.summarize(model).median,
        "beside_model_ms": timing.summarize(beside).median,
        "tokens_per_s": 1e3 * slots / summary.median,
    }
    if profile.get("kernels"):
        found["host_ms"] = summary.median - profile["kernels_ms"] / STEPS
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_steps(bench, start):
    if bench.scale == "full" and bench.device.type != "cuda":
        pytest.skip("a CPU computes while its host works: nothing is hidden")
    slots, length = FULL[bench.scale]
    case = bench.case(slots, length)
    names = [name for name in peers.OURS if name in bench.names]
    start("engine-step", case, names)
    rows = []
    for name in names:
        for mode in SAMPLING:
            measure = functools.partial(measure_steps, bench, name, slots, length, mode)
            try:
                rows.append(peers.guarded(measure))
            except peers.Unavailable as reason:
                rows.append(skipped_row(f"{name}/{mode}", mode, reason))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    settings = {"batch": slots, "context": length, "steps": STEPS}
    record = bench.record("engine-step", case, settings, rows)
    assert records.measured(record) or not rows, rows
