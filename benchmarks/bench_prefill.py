"""Prefill: time to the first token and tokens per second, by prompt length, every model in turn."""

import pytest
import torch

from . import peers, records
from .harness import Bench, Target

# (batch, prompt)
POINTS = {
    "tiny": [(1, 64)],
    "cpu": [(1, 512)],
    "cuda": [(1, length) for length in (8192, 2048, 32768, 512, 131072)],
}
LAST = [(1, 131072)]


def prepare(bench: Bench, model: peers.Model, engine: str, batch: int, length: int) -> Target:
    """From a prompt to the logits of its last position, and their argmax: the first token."""
    bench.require_room(model, batch, length)
    session = model.session(engine, batch, length + 1)
    ids = peers.random_tokens(batch, length, model)

    def call() -> None:
        session.token.copy_(session.prefill(ids).argmax(-1, keepdim=True))

    facts = {"flops": model.forward_flops(batch, length, logits=1)}
    return Target(model, engine, call, facts)


def engines_of(model: peers.Model) -> tuple[str, ...]:
    """One cache, because caches differ only in decoding, and llama.cpp if it is an engine."""
    first = model.engines[0]
    return tuple(engine for engine in model.engines if engine in (first, peers.LLAMA_CPP))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_prefill(bench, benchmark, start, point):
    batch, length = point
    case = bench.case(batch, length)
    start("prefill", case, bench.names)
    with torch.inference_mode():
        targets, skipped = bench.targets(
            lambda model, engine: prepare(bench, model, engine, batch, length), engines_of
        )
        settings = {"batch": batch, "context": length}
        record = bench.interleave(
            benchmark,
            "prefill",
            case,
            settings,
            targets,
            skipped,
            tokens=batch * length,
            rounds=bench.few_rounds,
        )
    assert records.measured(record)
