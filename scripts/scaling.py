"""Writes docs/scaling.md: the released models on 8, 64 and 256 GPUs, by `rodimus plan`.

    python scripts/scaling.py

Arithmetic only: nothing in it was measured, and the page says so.
"""

from __future__ import annotations

from pathlib import Path

from rodimus.train.flops import PEAK_FLOPS
from rodimus.train.load import load_config
from rodimus.train.plan import Plan, make_plan

ROOT = Path(__file__).resolve().parent.parent
RUNS = ("rodimus_plus_1b6", "rodimus_1b4", "rodimus_plus_4b")
GPUS = (8, 64, 256)
PER_NODE = 8
MFU = 0.5
HEAD = f"""# Scaling on paper

Written by `python scripts/scaling.py` from `rodimus plan`; **nothing here was measured**. Assumed:
H100 at {MFU:.0%} MFU of {PEAK_FLOPS["H100"] / 1e12:.0f} TFLOP/s, perfect scaling, {PER_NODE} GPUs a
node, one replica a node (HSDP). The global batch stays, so
many GPUs have few rows each. Memory of activations is an estimate from what backward needs with
fused kernels. Settings: the files of the same names in `configs/train`.

"""
TABLE = """| GPUs | memory a GPU, GB | of it activations | traffic in the node a micro-step, GB | \
between nodes a step, GB | tokens/s | days |
|---|---|---|---|---|---|---|
"""


def row(plan: Plan) -> str:
    """One line of a model's table."""
    inside, between = plan.traffic.values()
    return (
        f"| {plan.gpus} | {plan.memory_gb:.1f} | {plan.memory['activations (estimate)'] / 1e9:.1f} "
        f"| {inside / 1e9:.2f} | {between / 1e9:.2f} | {plan.tokens_per_s:,.0f} "
        f"| {plan.days:.1f} |\n"
    )


def main() -> None:
    """Writes the page."""
    text = HEAD
    for name in RUNS:
        plans = []
        for gpus in GPUS:
            path = ROOT / "configs" / "train" / f"{name}.toml"
            config = load_config(path)
            # the global batch stays: many GPUs have few rows each
            rows = min(config.train.micro_batch, config.rows // gpus)
            changes = ["--train.micro-batch", str(rows)]
            changes += ["--parallel.replicate", str(gpus // PER_NODE)]
            config = load_config(path, changes)
            plans.append(make_plan(config, gpus, mfu=MFU, peak=PEAK_FLOPS["H100"]))
        first = plans[0]
        text += (
            f"## {name}\n\n{first.parameters:,} parameters, {first.flops.total / 1e9:.3f} GFLOP a "
            f"token in rows of {config.data.seq_len}, {first.tokens / 1e12:.1f} T tokens.\n\n"
        )
        text += TABLE + "".join(map(row, plans)) + "\n"
    (ROOT / "docs" / "scaling.md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
