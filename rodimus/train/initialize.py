"""Initial weights from a seed alone: the same on one rank and on many, without a checkpoint.
CPUs with other vector instructions may draw other numbers; all replicas get those of the first.

A 1.6B model is built on the meta device and sharded before it has any memory. Each block is then
allocated on its own, initialised by the model's own rule from generators seeded with (seed, module
name), and copied into its shards; a rank holds one whole block at a time, never the whole model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


def module_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one module: sha256 of the run's seed and the module's name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model that are initialised whole: blocks, and leaves outside of them."""
    blocks = set(getattr(model, "_no_split_modules", ()) or ())

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        children = list(module.named_children())
        if type(module).__name__ in blocks or not children:
            yield name, module
        else:
            for child_name, child in children:
                yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return walk("", model)


def template(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Copies of a model's units on the meta device; taken before sharding changes the modules."""
    return {name: copy.deepcopy(unit).to("meta") for name, unit in _units(model)}


@torch.no_grad()
def initialize(model: PreTrainedModel, units: dict[str, nn.Module], seed: int) -> None:
    """Fills the parameters and buffers of ``model``, which is on its device, whole or sharded. All
    ranks must call it.

    Args:
        model: The model after ``to_empty``; tied weights are still tied.
        units: What ``template`` returned for the same model before it was sharded.
        seed: The run's seed.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    for unit_name, unit in units.items():
        real = copy.deepcopy(unit).to_empty(device="cpu")
        # children first: a parent's rule may rescale what it owns
        for name, module in reversed(list(real.named_modules(prefix=unit_name))):
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(module_seed(seed, name))
                model._init_weights(module)
        values = dict(real.named_parameters(prefix=unit_name)) | dict(
            real.named_buffers(prefix=unit_name)
        )
        for name, value in values.items():
            # a tied head is not a parameter of its own
            if name in targets:
                # every rank has made the value, so no rank has to send it
                assign(targets[name], value, source=None)
    for target in targets.values():
        if isinstance(target, DTensor) and target.device_mesh.ndim > 1:
            # different CPUs may draw different numbers, and the replicas would never agree again
            group = target.device_mesh.get_group(0)
            dist.broadcast(target.to_local(), group=group, group_src=0)


def assign(target: torch.Tensor, value: torch.Tensor, *, source: int | None) -> None:
    """Copies a whole tensor into a parameter, which may be sharded, on any device.

    Args:
        target: The parameter.
        value: Tensor of the whole shape; with a ``source``, only that rank's is read.
        source: The rank that sends its value; None: each rank takes its shard of its own value.
    """
    if isinstance(target, DTensor):
        value = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=source
        )
    target.copy_(value)
