"""The only file that knows about processes, sharding, compilation and activation checkpointing.

The same calls serve one CPU process (a mesh of one), two CPU processes (gloo), one GPU, a node
(FSDP2) and many nodes (HSDP: shards inside a node, replicas across).
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from ..errors import InputError
from .config import ParallelSection, TrainConfig
from .initialize import initialize, template
from .shards import allow_open_files
from .signals import spared

T = TypeVar("T")
# parameters of glibc's mallopt; a block may be at most 32 MiB to stay on the heap
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# enough to hash terabytes or to wait for a hub; a rank that has died is noticed at once anyway
_START_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    context: dist.ProcessGroup | None = None
    """Neighbours that share this rank's rows; None where every rank has rows of its own."""
    patient: dist.ProcessGroup | None = None
    """All ranks, with a long timeout for work that takes hours on one of them before training
    begins; None: the default group."""

    @property
    def per_row(self) -> int:
        """Ranks that share a row."""
        return 1 if self.context is None else dist.get_world_size(self.context)

    @property
    def share(self) -> tuple[int, int]:
        """``(i, n)``: this rank computes on part i of n of a batch's rows."""
        return self.rank // self.per_row, self.world_size // self.per_row

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints, and writes what is written once."""
        return self.rank == 0


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products in hardware (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of products: ``auto`` is bfloat16 where the device has it in hardware."""
    if name != "auto":
        return getattr(torch, name)
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one.

    By default it returns large blocks, and the system clears every page again: 24,000 page faults,
    a tenth of the time, in each step of `configs/train/demo_cpu.toml`. Other C libraries have no
    ``mallopt`` and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 25)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def start(config: ParallelSection, device: str) -> Ranks:
    """Joins the process group that torchrun describes, or makes a group of one.

    Raises:
        InputError: the device is missing, a machine has more ranks than GPUs, or replicas or pieces
            of a row do not divide the ranks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device is cuda, but torch sees no CUDA device")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world % config.replicate:
        raise InputError(f"parallel.replicate = {config.replicate} does not divide {world} ranks")
    pieces = config.context_parallel
    if world % pieces:
        raise InputError(f"parallel.context_parallel = {pieces} does not divide {world} ranks")
    if kind == "cpu":
        keep_freed_memory()
    where = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else None
    if where is not None:
        _check_gpus()
        torch.cuda.set_device(where)
    allow_open_files()
    # longer than the watchdog's timeout, whose report says more
    timeout = timedelta(seconds=config.timeout_s + 60)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=None if "RANK" in os.environ else dist.HashStore(),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    shape, names = (world,), ("shard",)
    if config.replicate > 1:
        shape, names = (config.replicate, world // config.replicate), ("replicate", "shard")
    groups = [_group_along(shape, dim, timeout) for dim in range(len(shape))]
    mesh = DeviceMesh.from_group(
        groups,
        kind,
        mesh=torch.arange(world).view(shape),
        mesh_dim_names=names,
    )
    return Ranks(
        rank,
        world,
        where or torch.device("cpu"),
        mesh,
        # gradients are summed over all ranks anyway, so the mesh of the shards does not change
        context=_group_along((world // pieces, pieces), 1, timeout) if pieces > 1 else None,
        patient=dist.new_group(backend="gloo", timeout=_START_TIMEOUT),
    )


def _check_gpus() -> None:
    """Every rank of the machine reaches the same result, so its first one can report it."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > gpus:
        raise InputError(
            f"{here} ranks on this machine, but torch sees {gpus} GPU{'s' if gpus > 1 else ''}:"
            " start fewer, or set train.device = cpu"
        )


def _group_along(shape: tuple[int, ...], dim: int, timeout: timedelta) -> dist.ProcessGroup:
    """This rank's group along dimension ``dim`` of all ranks arranged in ``shape``; groups made by
    a mesh would have torch's default timeout. For one dimension, the existing group of all."""
    if len(shape) == 1:
        return dist.group.WORLD
    ranks = torch.arange(math.prod(shape)).view(shape).movedim(dim, -1).flatten(0, -2)
    return dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)[0]


def stop() -> None:
    """Leaves the process group; the barrier keeps a fast rank from ending it under a slow one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def reduce_sum(values: list[float]) -> list[float]:
    """Sums a few numbers over all ranks, in float64 on the CPU; every rank gets the same result."""
    return sum_over_ranks(values, torch.device("cpu")).tolist()


def sum_over_ranks(values: Sequence[float | torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sums a few numbers over all ranks on their device, without making the host wait.

    Args:
        values: Numbers, or tensors ``[]`` on the device.
        device: Where the sum is made; of the same kind on every rank.

    Returns:
        float64 ``[len(values)]`` on the device, the same on every rank.
    """
    options = {"dtype": torch.float64, "device": device}
    # copying a number to a GPU waits for the GPU, filling a tensor with it does not
    total = torch.stack(
        [
            x.double() if isinstance(x, torch.Tensor) else torch.full((), x, **options)
            for x in values
        ]
    )
    dist.all_reduce(total)
    return total


def from_main(compute: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Returns on every rank what ``compute`` returns on rank 0; ``group`` contains all ranks."""
    result = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result, src=0, group=group)
    return result[0]


def together(work: Callable[[], T], ranks: Ranks) -> T:
    """Runs ``work``, which may take hours, on every rank; if it fails on one, all ranks raise the
    same error.

    Returns:
        What ``work`` returned on this rank.

    Raises:
        InputError: the error of the first rank that failed.
    """
    result = problem = None
    try:
        result = work()
    except InputError as error:
        problem = str(error)
    problems: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(problems, problem, group=ranks.patient)
    for found in filter(None, problems):
        raise InputError(found)
    return result


def build_model(model: PreTrainedModel, config: TrainConfig, ranks: Ranks) -> PreTrainedModel:
    """Shards a model that lies on the meta device and gives it its initial weights.

    Order: activation checkpointing, compilation, shards block by block, the root, memory, ties,
    weights.

    Args:
        model: Built under ``torch.device("meta")``.
        config: Activation checkpointing, compilation, dtype, seed.
        ranks: What ``start`` returned.
    """
    units = template(model)
    blocks = _blocks(model)
    checkpoint_activations(model, config.train.ac)
    if config.train.compile:
        compile_blocks(blocks, ranks.device)
    options = {
        "mesh": ranks.mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=resolve_dtype(config.train.dtype, ranks.device),
            reduce_dtype=torch.float32,
            # the residual stream between blocks stays in fp32
            cast_forward_inputs=False,
        ),
        "reshard_after_forward": reshards(
            config.parallel, model.num_parameters(), _memory(ranks.device)
        ),
    }
    for module in (*blocks, model):
        if module is model:
            # backward begins with the head: it would be gathered again at once
            options["reshard_after_forward"] = False
        fully_shard(module, **options)
        # the loss is a sum over all ranks divided once by all predicted tokens, so gradients are
        # summed, with a plain sum because gloo has no scaled one; children need their own calls
        module.set_force_sum_reduction_for_comms(True)
        if ranks.world_size > 1:
            # on one rank it is 1 anyway, and setting it would cost a pass over all gradients
            module.set_gradient_divide_factor(1.0)
    for block in blocks:
        # the model calls this instead of forward if the next block's norm adds the residual
        if hasattr(block, "forward_unsummed"):
            register_fsdp_forward_method(block, "forward_unsummed")
    model.to_empty(device=ranks.device)
    # to_empty gives a tied head a tensor of its own
    model.tie_weights()
    initialize(model, units, config.train.seed)
    return model.train()


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Has blocks compiled when they are first called.

    For a GPU, torch compiles in processes of their own, and the run would wait forever for one that
    SIGUSR1 has ended. They are started here, where they can be spared.
    """
    if device.type == "cuda":
        from torch._inductor.async_compile import maybe_warm_pool

        with spared():
            maybe_warm_pool()
    for block in blocks:
        block.compile()


def reshards(config: ParallelSection, parameters: int, memory: float) -> bool:
    """Whether weights are freed after a block's forward, and gathered again in backward.

    Args:
        config: ``auto`` frees them if the bf16 weights of one replica are more than a tenth of the
            device's memory.
        parameters: Parameters of the whole model.
        memory: Bytes of one device; infinite on a CPU, where a tenth says nothing.
    """
    if config.reshard_after_forward == "auto":
        return 2 * parameters > 0.1 * memory
    return config.reshard_after_forward == "true"


def _memory(device: torch.device) -> float:
    if device.type == "cpu":
        return math.inf
    return torch.cuda.get_device_properties(device).total_memory


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in model._no_split_modules]


def checkpoint_activations(model: PreTrainedModel, mode: str) -> None:
    """Recomputes block activations in backward: all of them, or all but the costly products.

    Each block's ``forward`` is replaced, inside of what compiles or shards the block afterwards.
    Some versions of transformers would checkpoint the call of a block instead: around the compiled
    block, whose operators a policy cannot see.

    Args:
        model: A transformers model, neither compiled nor sharded yet.
        mode: ``none``, ``full`` or ``selective``: results of ``SAVED_OPS`` are kept, except that of
            the product that ends a block, because backward does not need it.
    """
    if mode != "none":
        for block in _blocks(model):
            block.forward = _checkpointed(block, mode)


def _checkpointed(block: nn.Module, mode: str) -> Callable:
    forward, options = block.forward, {"use_reentrant": False}
    if mode == "selective":
        *_, last = (m for m in block.modules() if isinstance(m, nn.Linear))
        keeps = partial(_keep_products, last.weight.shape[::-1])
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keeps)

    @wraps(forward)
    def checkpointed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return checkpointed


# the results that cost most to recompute for their size: products, attention and the recurrence.
# Norms are not among them: their results would be kept here, although autograd does not keep them
SAVED_OPS = frozenset(
    """
    aten::mm aten::addmm aten::bmm aten::baddbmm
    aten::_scaled_dot_product_flash_attention aten::_scaled_dot_product_flash_attention_for_cpu
    aten::_scaled_dot_product_efficient_attention aten::_scaled_dot_product_cudnn_attention
    rodimus::ddts_chunk rodimus::ddts_eager rodimus::shared_key_attention
    """.split()
)


def _keep_products(last: torch.Size, context, op, *args, **kwargs) -> CheckpointPolicy:
    """last: shape of the transposed weight whose product ends the block; products with another
    weight of that shape are recomputed too."""
    name = (op.name() if hasattr(op, "name") else str(op)).partition(".")[0]
    ends = name == "aten::mm" and args[1].shape == last
    if name in SAVED_OPS and not ends:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def mark_micro_step(model: FSDPModule, *, last: bool) -> None:
    """Called before a backward pass: replicas exchange gradients only in the last micro-step."""
    model.set_is_last_backward(last)
    model.set_requires_all_reduce(last)
