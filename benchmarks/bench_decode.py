"""Decoding: milliseconds per token, by context and batch, every model in turn."""

import pytest
import torch

from . import peers, records
from .harness import Bench, Target
from .peers import LLAMA_CPP

# (batch, context)
POINTS = {
    "tiny": [(1, 48), (2, 96)],
    "cpu": [(1, 128), (1, 1024), (1, 4096), (1, 16384)],
    "cuda": [
        *((1, context) for context in (4096, 1024, 32768, 131072, 128)),
        *((8, 4096), (64, 1024), (32, 32768), (256, 1024), (32, 4096), (8, 32768), (256, 4096)),
    ],
}
LAST = [point for point in POINTS["cuda"] if point[0] > 1]
STEPS = 8
"""Tokens of one timed call on a GPU, so that a call takes much longer than its synchronisation."""
SIDE_BY_SIDE = 2**18
"""Most tokens in a batch for which several engines of a peer each keep a cache: 8 GB of Qwen2."""


def prepare(bench: Bench, model: peers.Model, engine: str, batch: int, context: int) -> Target:
    """A session after ``context`` tokens, which decodes greedily."""
    steps = STEPS if bench.device.type == "cuda" else 1
    bench.require_room(model, batch, context)
    rewinds = model.rewinds(engine)
    # warm-up and timed rounds, and the steps that record a graph
    calls = 1 if rewinds else 3 * bench.rounds + 8
    session = model.session(engine, batch, context + steps * calls + peers.WARM_UP_STEPS)
    session.fill(context)
    state = model.expected_state(batch, context)
    weight_bytes, token_bytes = model.bytes_in(engine)
    facts = {
        "weight_bytes": weight_bytes,
        "token_bytes": token_bytes,
        "state_bytes": state.total,
        "moved_bytes": steps * (token_bytes + state.traffic),
        "disagreement": bench.checked[f"{model.name}/{engine}"],
        "graph": engine in peers.RECORDED,
    }
    before = (lambda: session.rewind(context)) if rewinds else None
    return Target(model, engine, lambda: session.run(steps), facts, before)


def engines_of(bench: Bench, model: peers.Model, batch: int, context: int) -> tuple[str, ...]:
    """All engines for one sequence; for a batch the plain one and the one meant for speed. With
    quantised weights those that support them: our own, and llama.cpp.

    On a GPU the plain engines wait for Python at any context, so only the first case times them.
    All other cases time the engines meant for speed: of a peer, all that worked in the first case,
    or only one where the cache is so large that several do not fit.
    """
    if bench.weight_dtype:
        reads = "engine" if model.name in peers.OURS else LLAMA_CPP
        return tuple(engine for engine in model.engines if engine == reads)
    if bench.device.type == "cuda" and (batch, context) != POINTS["cuda"][0]:
        failed = lambda engine: isinstance(
            bench.checked.get(f"{model.name}/{engine}"), peers.Unavailable
        )
        recorded = [engine for engine in model.engines if engine in peers.RECORDED]
        working = [engine for engine in recorded if not failed(engine)] or recorded
        if model.name in peers.OURS or not working:
            return model.engines[-1:]
        return tuple(working if batch * context <= SIDE_BY_SIDE else working[-1:])
    if batch == 1:
        return model.engines
    engines = [engine for engine in model.engines if engine != LLAMA_CPP]
    return tuple(dict.fromkeys((engines[0], engines[-1])))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_decode(bench, benchmark, start, point):
    batch, context = point
    case = bench.case(batch, context)
    start("decode", case, bench.names)
    with torch.inference_mode():
        targets, skipped = bench.targets(
            lambda model, engine: prepare(bench, model, engine, batch, context),
            lambda model: engines_of(bench, model, batch, context),
        )
        steps = STEPS if bench.device.type == "cuda" else 1
        settings = {"batch": batch, "context": context, "steps": steps}
        record = bench.interleave(
            benchmark, "decode", case, settings, targets, skipped, tokens=batch * steps
        )
    assert records.measured(record)
