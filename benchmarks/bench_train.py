"""Training step: forward, backward and AdamW; tokens a second and the share of the matrix rate."""

import pytest
import torch

from . import operators, peers
from .harness import Bench, Target

# (batch, length)
POINTS = {
    "tiny": [(2, 64)],
    # a step of a 1.5B model takes minutes and 20 GB on a CPU
    "cpu": [],
    "cuda": [(4, 4096), (1, 16384), (8, 2048), (2, 8192)],
}


def prepare(bench: Bench, model: peers.Model, engine: str, batch: int, length: int) -> Target:
    """One optimizer step on random tokens; the weights stay in the benchmark's dtype."""
    if not isinstance(model, peers.HuggingFaceModel):
        raise peers.Unavailable(f"{model.name} by its package has no backward")
    network = model.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    ids = peers.random_tokens(batch, length, model, seed=bench.seed)
    arguments = {"labels": ids, "use_cache": False}
    if model.name in peers.OURS or model.family == "qwen2":
        # the chunked loss, which never holds all logits; targets do not matter for the time
        arguments = {"shift_labels": ids, "use_cache": False}
        arguments |= {"num_items_in_batch": ids.numel(), "loss_only": True}
    if model.family == "qwen2":
        # its loss needs positions; ours would look for packed documents in them and wait
        positions = torch.arange(length, device=ids.device).expand(batch, -1)
        arguments["position_ids"] = positions

    def call() -> None:
        network(ids, **arguments).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # backward is twice forward
    facts = {"flops": 3 * model.forward_flops(batch, length, logits=length)}
    return Target(f"{model.name}/{engine}", model, engine, call, facts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_train(bench, benchmark, start, point):
    batch, length = point
    case = bench.case(batch, length)
    start("train", case)
    targets, skipped = bench.targets(
        lambda model, engine: prepare(bench, model, engine, batch, length),
        lambda model: model.engines[:1],
    )
    rows, used = bench.time_targets(
        benchmark, targets, skipped, tokens=batch * length, rounds=bench.few_rounds
    )
    timed = {row["target"]: row for row in rows}
    for target in targets if bench.device.type == "cuda" else ():
        # not timed: a step alone, for what it allocates and where its time goes
        timed[target.name]["step_bytes"] = operators.peak_bytes(target.call, bench.device)
        if target.model.name in peers.OURS:
            timed[target.name]["kernels"] = operators.kernels(target.call)
    for target in targets:
        target.model.model.eval().requires_grad_(False)
    settings = {"batch": batch, "context": length, **used}
    record = bench.record("train", case, settings, rows)
    assert any(row["status"] == "measured" for row in record["rows"])
