"""`rodimus plan CONFIG --gpus N`: estimates what a run needs, without a GPU.

Parameters are counted on the meta device and operations follow ``flops``. Memory of weights and
optimizer is exact arithmetic; activations are an estimate from the tensors that backward needs,
with fused kernels; throughput follows from an assumed MFU.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .. import RodimusConfig
from ..devices import DEVICES
from ..errors import InputError
from ..loading import model_class
from ..peers import PEERS
from .config import TrainConfig
from .context import check_splits
from .flops import CHUNK, TokenFlops, hardware_flops, train_flops
from .load import load_config
from .optim import checkpoint_bytes, parameter_groups
from .parallel import reshards
from .units import in_unit
from .weights import has_begun, read_model_config


@dataclass(frozen=True)
class Plan:
    """Figures of a run on some GPUs; bytes are for one GPU."""

    parameters: int
    gpus: int
    flops: TokenFlops
    recomputed: float
    """Recomputed operations per token."""
    steps: int
    tokens: int
    memory: dict[str, float]
    tokens_per_s: float
    traffic: dict[str, float]
    checkpoint: int
    """Bytes of one checkpoint on disk."""
    checkpoints: int
    """Most checkpoints on disk at once: those that are kept, and the next while it is written."""

    @property
    def days(self) -> float:
        """Days that the whole run takes."""
        return self.tokens / self.tokens_per_s / 86400

    @property
    def memory_gb(self) -> float:
        """Memory of one GPU in GB."""
        return sum(self.memory.values()) / 1e9


def activation_bytes(config: PreTrainedConfig, mode: str) -> float:
    """Bytes kept for backward per token and block in bf16, with the fused kernels of a GPU.

    Args:
        config: Model shapes.
        mode: ``none``, ``selective`` or ``full``.
    """
    if mode == "full":
        return 4 * config.hidden_size
    plain, selective = (_peer_bytes if config.model_type in PEERS else _rodimus_bytes)(config)
    return plain if mode == "none" else selective


def _rodimus_bytes(config: RodimusConfig) -> tuple[float, float]:
    """Bytes without checkpointing, and if only results of products, DDTS and attention are kept."""
    d, mem, wide, stream = config.d_model, config.mem_size, config.d_inner, 4 * config.d_model
    # [x, gate]; low rank of the input gate; q and k; output and states of the recurrence
    both = 2 * 2 * wide + 2 * config.input_gate_rank + 2 * 2 * mem
    both += 2 * wide + 2 * mem * wide / CHUNK
    # norm, stream; convolution, gated input, gated norm; gates in fp32
    plain = both + 2 * d + stream + 2 * 3 * wide + 4 * 2 * mem
    # gates
    selective = both + stream + 2 * 2 * mem
    if config.block_type == "rodimus_plus":
        hidden, heads = config.intermediate_size, config.num_attention_heads
        keys = config.num_key_value_heads + config.num_value_heads
        # q, k, v, output, its logsumexp; [x, gate]
        both = 2 * (2 * d + keys * config.head_dim) + 4 * heads + 2 * 2 * hidden
        # two norms and streams; product with the gate
        plain += both + 2 * 2 * d + 2 * stream + 2 * hidden
        # the products that end mixer and attention
        selective += both + 2 * 2 * d
    return plain, selective


def _peer_bytes(config: PreTrainedConfig) -> tuple[float, float]:
    """As ``_rodimus_bytes``, for a mixer or attention with a gated MLP."""
    d, hidden, stream = config.hidden_size, config.intermediate_size, 4 * config.hidden_size
    if config.model_type == "gla":
        keys, values = config.key_dim, config.value_dim
        # q, k, v, gate, output; states of the recurrence; [gate, up]
        both = 2 * (2 * keys + 3 * values) + 2 * keys * values / config.num_heads / CHUNK
        both += 2 * 2 * hidden + stream
        # decays in fp32, three times; norm, silu and product; two norms, stream; silu and product
        plain = both + 3 * 4 * keys + 3 * 2 * values + 2 * 2 * d + stream + 2 * 2 * hidden
        # decays, projection
        return plain, both + 2 * keys + 2 * d
    keys = d * config.num_key_value_heads // config.num_attention_heads
    # q, k, v, output, projection; [gate, up]
    products = 2 * (3 * d + 2 * keys) + 2 * 2 * hidden
    # rotated q and k; two norms, two streams, silu and product
    rest = 2 * (d + keys) + 2 * 2 * d + 2 * stream + 2 * 2 * hidden
    return products + rest, products + stream


def make_plan(config: TrainConfig, gpus: int, *, mfu: float, gpu: str = "H100") -> Plan:
    """Computes the figures of a run.

    Args:
        config: The run.
        gpus: Ranks; ``parallel.replicate`` copies of the model share them.
        mfu: Share of its peak FLOP/s that a GPU reaches; the MFU, unless blocks are recomputed.
        gpu: Kind of GPU, a key of ``devices.DEVICES``.

    Raises:
        InputError: the batch, the replicas or the pieces of rows do not divide over the GPUs, this
            model does not support context parallelism, or a number is out of range.
    """
    if gpus < 1 or not 0 < mfu <= 1:
        what = "--gpus must be at least 1 and --mfu a share, above 0 and at most 1"
        raise InputError(f"{what}, got {gpus} and {mfu}")
    config.accumulation(gpus)
    replicas = config.parallel.replicate
    if gpus % replicas:
        raise InputError(f"parallel.replicate = {replicas} does not divide {gpus} GPUs")
    model_config = read_model_config(config, has_begun(config))
    check_splits(config, model_config)
    with torch.device("meta"):
        model = model_class(model_config)(model_config)
    n = model.num_parameters()
    shards = gpus // replicas
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    gathers_twice = reshards(config.parallel, n, DEVICES[gpu].memory)
    flops = train_flops(model, model_config, config.data.seq_len)
    made = partial(hardware_flops, model, model_config, config.data.seq_len)
    recomputed = made(recompute=config.train.ac == "full") - made(recompute=False)
    return Plan(
        parameters=n,
        gpus=gpus,
        flops=flops,
        recomputed=recomputed,
        steps=config.steps,
        tokens=config.steps * config.train.global_batch_tokens,
        memory=_memory(model, model_config, config, n, shards, gathers_twice),
        tokens_per_s=gpus * DEVICES[gpu].flops * mfu / (flops.total + recomputed),
        traffic=_traffic(n, blocks if gathers_twice else 0, shards, replicas)
        | _muon_traffic(model, config, shards)
        | _pieces_traffic(config, model_config),
        checkpoint=checkpoint_bytes(model, config.optim),
        checkpoints=_checkpoints(config),
    )


def _memory(
    model: PreTrainedModel,
    shapes: PreTrainedConfig,
    config: TrainConfig,
    n: int,
    shards: int,
    gathers_twice: bool,
) -> dict[str, float]:
    layers = model.model.layers
    block = sum(p.numel() for p in layers[0].parameters())
    gathered = n - block * (len(layers) - 2) if gathers_twice else n
    tokens = config.train.micro_batch * config.data.seq_len / config.parallel.context_parallel
    kept, whole = (activation_bytes(shapes, mode) for mode in (config.train.ac, "none"))
    # backward holds all activations of one block
    activations = tokens * ((len(layers) - 1) * kept + whole)
    return {
        "weights, fp32": 4 * n / shards,
        "gradients, fp32": 4 * n / shards,
        "optimizer": checkpoint_bytes(model, config.optim) / shards - 4 * n / shards,
        "gathered weights, bf16": 2.0 * gathered,
        "activations (estimate)": activations,
        "gradient of the head, fp32": 4.0 * model.lm_head.weight.numel(),
    }


def _traffic(n: int, again: int, shards: int, replicas: int) -> dict[str, float]:
    """Bytes one GPU sends in a micro-step inside its replica, and in a step between replicas.

    again: Parameters that backward gathers a second time, all but embedding, head and last norm.
    """
    share = (shards - 1) / shards
    return {
        "inside a replica, per micro-step": (2 * (n + again) + 4 * n) * share,
        "between replicas, per step": 2 * (replicas - 1) / replicas * 4 * n / shards,
    }


def _muon_traffic(model: PreTrainedModel, config: TrainConfig, shards: int) -> dict[str, float]:
    """Every matrix goes to one rank of its replica in bf16, and its update comes back."""
    if config.optim.name != "muon":
        return {}
    matrices = sum(p.numel() for p in parameter_groups(model)["matrix"])
    return {"of Muon, per step": 2 * 2 * matrices / shards * (shards - 1) / shards}


def _checkpoints(config: TrainConfig) -> int:
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    for_good = config.steps // math.lcm(every, keep_every) if keep_every else 0
    return config.checkpoint.keep + 1 + for_good


def context_bytes(config: TrainConfig, shapes: RodimusConfig) -> dict[str, float]:
    """Bytes one GPU sends for one row and block in a forward pass when ranks share the row.

    States go round a ring; tokens that a convolution or window looks back on go to their readers,
    in bf16. Backward sends the same.
    """
    pieces = config.parallel.context_parallel
    length = config.data.seq_len // pieces
    keys, width = shapes.mixer_cfg["mem_size"], shapes.d_inner
    sent = {
        "states": 4 * keys * (width + 1) * (pieces - 1),
        "convolution": 2 * width * (shapes.mixer_cfg["d_conv"] - 1),
    }
    if shapes.block_type == "rodimus_plus":
        heads = shapes.num_key_value_heads + shapes.num_value_heads
        before = length * (pieces - 1)
        reach = before if shapes.sliding_window is None else min(shapes.sliding_window - 1, before)
        sent["window"] = 2 * heads * shapes.head_dim * reach
    return sent


def _pieces_traffic(config: TrainConfig, shapes: PreTrainedConfig) -> dict[str, float]:
    if config.parallel.context_parallel == 1:
        return {}
    both_ways = 2 * sum(context_bytes(config, shapes).values()) * shapes.num_hidden_layers
    return {"between pieces, per micro-step": config.train.micro_batch * both_ways}


def render(plan: Plan, mfu: float) -> str:
    """The plan as text; the figures of a table have one unit."""
    made, flops = plan.flops.total + plan.recomputed, plan.flops._asdict()
    flops = {k: v for k, v in {**flops, "made again": plan.recomputed}.items() if v}
    operations, flop = in_unit("FLOP", 3, made, *flops.values())
    parts = "  ".join(map(" ".join, zip(flops, operations[1:], strict=True)))
    (tokens,), token = in_unit(" tokens", 1, plan.tokens)
    memory, used = in_unit("B", 2, sum(plan.memory.values()), *plan.memory.values())
    checkpoints, kept = in_unit("B", 1, plan.checkpoint, plan.checkpoint * plan.checkpoints)
    traffic, sent = in_unit("B", 2, *plan.traffic.values())
    lines = [
        f"parameters            {plan.parameters:,}",
        f"operations a token    {operations[0]} {flop} ({parts})",
        f"run                   {plan.steps:,} steps, {tokens} {token}",
        f"memory of one GPU     {memory[0]} {used}",
        *(f"  {k:<30}{v:>8} {used}" for k, v in zip(plan.memory, memory[1:], strict=True)),
        f"checkpoints           {checkpoints[0]} {kept} each, at most {plan.checkpoints} "
        f"at once: {checkpoints[1]} {kept}",
        f"traffic of one GPU    (ring; {plan.gpus} GPU{'s' if plan.gpus > 1 else ''})",
        *(f"  {k:<36}{v:>8} {sent}" for k, v in zip(plan.traffic, traffic, strict=True)),
        f"at {mfu * plan.flops.total / made:.0%} MFU            {plan.tokens_per_s:,.0f} tokens/s, "
        f"{plan.tokens_per_s / plan.gpus:,.0f} a GPU, {_duration(plan.days)}",
    ]
    return "\n".join(lines)


def _duration(days: float) -> str:
    units = ((1.0, "days"), (24.0, "hours"), (1440.0, "minutes"))
    count, name = next((x for x in units if days * x[0] >= 1), (86400.0, "seconds"))
    return f"{days * count:.1f} {name}"


def run(options: argparse.Namespace) -> None:
    """The command ``rodimus plan``.

    Raises:
        InputError: the file, a setting or an option is wrong.
    """
    config = load_config(options.config, options.settings)
    print(render(make_plan(config, options.gpus, mfu=options.mfu, gpu=options.gpu), options.mfu))
    if config.train.dtype == "float32":
        print("figures are those of bfloat16; train.dtype = float32 takes more memory and time")
