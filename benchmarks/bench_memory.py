"""Memory: bytes a model keeps between tokens, checked against the formula, and what a step adds.

Then the largest batch that each model can decode alone on a GPU, found by trying.

No times are measured, so the records of a busy machine are as good as those of a quiet one.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from . import bench_train, machine, peers, records
from .harness import MARGIN_BYTES, Bench, dtype_name, skipped_row

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
    """Peak memory of one step beyond what is resident, and the batch for which there is room."""
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


TRIED = {"tiny": 48, "full": 4096}
"""Context of the largest batch."""
SHARES = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Shares of the batch whose states alone fill the memory, in the order in which they are tried."""


def largest_batch(most: int, has_room: Callable[[int], bool]) -> dict[str, int]:
    """The first batch of ``SHARES`` that fits, and the smallest before it, which does not.

    Raises:
        peers.Unavailable: none fits.
    """
    found: dict[str, int] = {}
    for batch in dict.fromkeys(max(1, int(share * most)) for share in SHARES):
        if has_room(batch):
            return {**found, "largest_batch": batch}
        found["batch_without_room"] = batch
    raise peers.Unavailable(f"there is no room for {batch} sequences either")


def decodes(bench: Bench, model: peers.Model, context: int, batch: int) -> bool:
    """Whether a batch fits at a context, and during steps of the engine meant for speed."""
    session = None
    try:
        with torch.inference_mode():
            session = model.session(model.engines[-1], batch, context + peers.WARM_UP_STEPS + 3)
            session.fill(context)
            for _ in range(2):
                session.step()
            if bench.device.type == "cuda":
                torch.cuda.synchronize(bench.device)
        return True
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        return False
    finally:
        session = None
        bench_train.clear(bench)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether a lack of memory caused an error: a graph that cannot be recorded has its own one."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def measure_largest(bench: Bench, name: str, context: int) -> dict:
    """The row of one model; tries batches downwards from one whose states fill the free memory."""
    model = bench_train.alone(bench, name).model(name)
    free = machine.memory_bytes(bench.device)
    state = model.expected_state(1, context).total
    try_it = functools.partial(decodes, bench, model, context)
    engine = model.engines[-1]
    return records.row(
        *(f"{name}/{engine}", model.family, engine),
        weight_bytes=model.weight_bytes,
        state_bytes=state,
        free_bytes=free,
        **largest_batch((free - MARGIN_BYTES) // state, try_it),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*peers.OURS, *peers.BASELINES])
def test_largest_batch(bench, start, name):
    """One model at a time: the others would take some of its memory."""
    if bench.device.type != "cuda" or name not in bench.names:
        pytest.skip("the memory of a CPU is not the model's alone")
    context = TRIED[bench.scale]
    case = f"t{context}-{dtype_name(bench.dtype)}-{name}"
    start("largest", case, (name,))
    try:
        rows = [peers.guarded(lambda: measure_largest(bench, name, context))]
    except peers.Unavailable as reason:
        rows = [skipped_row(name, "any", reason)]
    record = bench.record("largest", case, {"context": context}, rows)
    assert records.measured(record) or name not in peers.OURS
