"""Training step: forward, backward and AdamW; tokens a second and the share of the matrix rate."""

import pytest
import torch

from . import peers
from .harness import Bench, Target

# (batch, length)
POINTS = {
    "tiny": [(2, 64)],
    # a step of a 1.5B model takes minutes and 20 GB on a CPU
    "cpu": [],
    "cuda": [(8, 2048), (4, 4096), (2, 8192), (1, 16384)],
}


def step_flops(model: peers.Model, batch: int, length: int) -> float:
    """Operations of a step: ours counted by part, peers by 6 a weight and causal attention."""
    if model.name in peers.OURS:
        from rodimus.train.flops import train_flops

        return batch * length * train_flops(model.model, model.model.config, length).total
    dense = 6.0 * model.token_bytes / model.dtype.itemsize
    config = model.model.config
    attention = 0.0
    if model.family == "qwen2":
        # two products with each visible key, half of the keys visible, backward twice forward
        attention = 6.0 * config.num_hidden_layers * config.hidden_size * length
    return batch * length * (dense + attention)


def prepare(bench: Bench, model: peers.Model, engine: str, batch: int, length: int) -> Target:
    """One optimizer step on random tokens; the weights stay in the benchmark's dtype."""
    if not isinstance(model, peers.HuggingFaceModel):
        raise peers.Unavailable(f"{model.name} by its package has no backward")
    network = model.model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    ids = peers.random_tokens(batch, length, model, seed=bench.seed)
    options = {"loss_only": True} if model.name in peers.OURS else {}

    def call() -> None:
        network(ids, labels=ids, use_cache=False, **options).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Target(f"{model.name}/{engine}", model, engine, call)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_train(bench, benchmark, start, point):
    batch, length = point
    case = f"b{batch}-t{length}"
    start("train", case)
    targets, skipped = bench.targets(
        lambda model, engine: prepare(bench, model, engine, batch, length),
        lambda model: model.engines[:1],
    )
    rows, warm_up = bench.time_targets(benchmark, targets, skipped, tokens=batch * length)
    for target in targets:
        row = next(row for row in rows if row["target"] == target.name)
        row["flops"] = step_flops(target.model, batch, length)
        row["TFLOPs"] = row["flops"] / row["median_ms"] / 1e9
        row["share_of_gemm"] = row["TFLOPs"] / bench.ceilings["gemm_TFLOPs"]
        target.model.model.eval().requires_grad_(False)
    settings = {"batch": batch, "context": length, "warm_up_rounds": warm_up}
    record = bench.record("train", case, settings, rows)
    assert any(row["status"] == "measured" for row in record["rows"])
