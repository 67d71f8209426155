"""Writes docs/scaling.md: the released models on 8, 64 and 256 GPUs, by `rodimus plan`.

    python scripts/scaling.py

Arithmetic only: nothing on the page was measured, and it says so.
"""

from __future__ import annotations

from pathlib import Path

from rodimus.devices import DEVICES
from rodimus.loading import read_config
from rodimus.train.load import load_config
from rodimus.train.plan import Plan, context_bytes, make_plan

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("rodimus_plus_1b6", "rodimus_1b4", "rodimus_plus_4b")
GPUS = (8, 64, 256)
PER_NODE = 8
MFU = 0.5
TFLOPS = DEVICES["H100"].flops / 1e12
HEAD = f"""# Scaling on paper

Written by `python scripts/scaling.py` from `rodimus plan`; **nothing here was measured**. Assumed:
H100 at {MFU:.0%} MFU of {TFLOPS:.0f} TFLOP/s, perfect scaling, {PER_NODE} GPUs
per node, one replica per node (HSDP). With a fixed global batch, more GPUs mean fewer rows on each,
hence less activation memory, which is an estimate from what backward needs with fused kernels.
The one GPU that was measured reached [less](training.md#speed-on-a-gpu), without FSDP.
Settings are the files of the same names in `configs/train`.

"""
TABLE = """| GPUs | memory per GPU, GB | of it activations | \
traffic inside a node per micro-step, GB | between nodes per step, GB | tokens/s | days |
|---|---|---|---|---|---|---|
"""


def row(plan: Plan) -> str:
    """One line of a model's table."""
    inside, between = list(plan.traffic.values())[:2]
    return (
        f"| {plan.gpus} | {plan.memory_gb:.1f} | {plan.memory['activations (estimate)'] / 1e9:.1f} "
        f"| {inside / 1e9:.2f} | {between / 1e9:.2f} | {plan.tokens_per_s:,.0f} "
        f"| {plan.days:.1f} |\n"
    )


CONTEXT = """## Rows longer than a GPU holds: {name} with parallel.context_parallel

What one GPU sends per row and block in a forward pass, and again in backward, however long the row
is (pieces no shorter than the window). The last column is both passes of one row through all
{blocks} blocks.

| ranks per row | states, MB | convolution, MB | window, MB | whole row, GB |
|---|---|---|---|---|
"""


def context_table(name: str) -> str:
    """Traffic between the ranks that share a row."""
    path = ROOT / "configs" / "train" / f"{name}.toml"
    shapes, lines = read_config(Path(load_config(path).model.config)), ""
    for ranks in (2, 4, 8, 16):
        length = ["--data.seq-len", str(ranks * 8192), "--train.global-batch-tokens", str(2**21)]
        config = load_config(path, [*length, "--parallel.context-parallel", str(ranks)])
        parts = context_bytes(config, shapes)
        total = 2 * sum(parts.values()) * shapes.n_layer
        figures = " | ".join(f"{size / 1e6:.2f}" for size in parts.values())
        lines += f"| {ranks} | {figures} | {total / 1e9:.2f} |\n"
    return CONTEXT.format(name=name, blocks=shapes.n_layer) + lines


def page() -> str:
    """The page."""
    text = HEAD
    for name in RUNS:
        plans = []
        for gpus in GPUS:
            path = ROOT / "configs" / "train" / f"{name}.toml"
            config = load_config(path)
            # the global batch stays the same, so with many GPUs each has few rows
            rows = min(config.train.micro_batch, config.rows // gpus)
            changes = ["--train.micro-batch", str(rows)]
            changes += ["--parallel.replicate", str(gpus // PER_NODE)]
            config = load_config(path, changes)
            plans.append(make_plan(config, gpus, mfu=MFU, gpu="H100"))
        first = plans[0]
        text += (
            f"## {name}\n\n{first.parameters:,} parameters, {first.flops.total / 1e9:.3f} GFLOP "
            f"per token in rows of {config.data.seq_len}, {first.tokens / 1e12:.1f} T tokens.\n\n"
        )
        text += TABLE + "".join(map(row, plans)) + "\n"
    return text + context_table(RUNS[0])


if __name__ == "__main__":
    (ROOT / "docs" / "scaling.md").write_text(page())
