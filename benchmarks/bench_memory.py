"""Memory: bytes a model keeps between tokens, held to the formula, and what a step needs besides.

Nothing here is a time, so the records of a busy machine are as good as those of a quiet one.
"""

import pytest
import torch

from . import machine, peers, records
from .harness import Bench, skipped_row

# (batch, context)
POINTS = {
    "tiny": [(1, 48), (2, 96)],
    "cpu": [(1, 1024), (1, 4096), (1, 32768)],
    "cuda": [
        *((1, context) for context in (1024, 4096, 32768, 131072)),
        *((32, context) for context in (4096, 32768)),
    ],
}


def measure(bench: Bench, model: peers.Model, batch: int, context: int) -> dict:
    """One model: the bytes of its state, and on a GPU the peak of a step and the largest batch."""
    engine = model.engines[0]
    bench.require_room(model, batch, context)
    session = model.session(engine, batch, context + 2)
    session.fill(context)
    state, expected = session.state_bytes(), model.expected_state(batch, context)
    assert state == expected, f"{model.name}: expected {expected}, got {state}"
    row = records.row(
        *(f"{model.name}/{engine}", model.family, engine),
        weight_bytes=model.weight_bytes,
        state_bytes=state.total,
        recurrent_bytes=state.recurrent,
        cached_bytes=state.cached,
        expected_bytes=expected.total,
    )
    if bench.device.type == "cuda":
        row |= _step_memory(bench, model, session, state.total, batch)
    return row


def _step_memory(bench: Bench, model, session, state_bytes: int, batch: int) -> dict:
    """Peak of one step over what is resident, and the batch that this leaves room for."""
    resident = torch.cuda.memory_allocated(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    session.step()
    torch.cuda.synchronize(bench.device)
    workspace = torch.cuda.max_memory_allocated(bench.device) - resident
    total = torch.cuda.get_device_properties(bench.device).total_memory
    one = (state_bytes + workspace) / batch
    return {
        "step_bytes": workspace,
        "peak_bytes": model.weight_bytes + state_bytes + workspace,
        "largest_batch_computed": int((0.95 * total - model.weight_bytes) // one),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_memory(bench, start, point):
    batch, context = point
    case = bench.case(batch, context)
    start("memory", case, bench.names)
    rows = []
    for name in bench.names:
        try:
            model = bench.model(name)
            with torch.inference_mode():
                rows.append(peers.guarded(lambda m=model: measure(bench, m, batch, context)))
        except peers.Unavailable as reason:
            rows.append(skipped_row(name, "any", reason))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    free = machine.memory_bytes(bench.device)
    settings = {"batch": batch, "context": context, "free_bytes": free}
    record = bench.record("memory", case, settings, rows)
    assert records.measured(record)
