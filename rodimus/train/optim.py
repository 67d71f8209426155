"""Optimizers over parameter groups that are chosen by name and module type.

Attributes set on a parameter do not survive sharding or a move from the meta device, so nothing
here depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import _muon

from .config import OptimSection


def is_decayed(name: str, module: nn.Module) -> bool:
    """Whether weight decay applies to parameter ``name`` (last part of its name) of ``module``.

    Off for biases, norms, residual weights and the embedding (with it the tied head), as in the
    released training code.
    """
    is_norm = "Norm" in type(module).__name__
    return not (name in ("bias", "residual_weight") or is_norm or isinstance(module, nn.Embedding))


def _named_owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Module, nn.Parameter]]:
    """Every distinct parameter as ``(full name, last part, owning module, parameter)``."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}", name, module, parameter


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Splits parameters into ``matrix`` (2-D, inside blocks, decayed), ``decay`` and ``plain``."""
    groups: dict[str, list[nn.Parameter]] = {"matrix": [], "decay": [], "plain": []}
    for full_name, name, module, parameter in _named_owners(model):
        if not is_decayed(name, module):
            groups["plain"].append(parameter)
        elif parameter.ndim == 2 and ".layers." in f".{full_name}":
            groups["matrix"].append(parameter)
        else:
            groups["decay"].append(parameter)
    return groups


class _OnShards:
    """An optimizer that computes on this rank's shards as plain tensors; its parameters and state
    stay DTensors."""

    def _init_group(self, group, *lists):
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        return has_complex


class ShardAdamW(_OnShards, torch.optim.AdamW):
    """AdamW on this rank's shards as plain tensors, with the same result element by element.

    DTensor's dispatch would take host time at the end of a step, when the GPU waits: 7 to 11 ms
    instead of 3 for the 506 parameters of 24 blocks of Rodimus+ (one core of an AMD EPYC).
    """


class ShardMuon(_OnShards, torch.optim.Muon):
    """Muon that iterates on whole matrices, each on one of the ranks that share a replica.

    A round takes one matrix per rank and two exchanges, in bfloat16 like the iteration. DTensor
    would communicate for nearly every product: on 8 ranks 13.5 collectives and 4.4 ms of host time
    per matrix, instead of 0.25 and 0.14 (one core of an AMD EPYC, nothing really sent).
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix that has a gradient; all ranks make it together."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            # matrices of similar size share a round, because its ranks wait for the largest
            matrices.sort(key=torch.Tensor.numel)
            ranks = _sharing(matrices[0]) if matrices else None
            at_once = ranks.size() if ranks else 1
            for first in range(0, len(matrices), at_once):
                self._update(matrices[first : first + at_once], group, ranks)
        return loss

    def _update(self, matrices, group, ranks):
        lr, momentum = group["lr"], group["momentum"]
        weights, grads, means = lists = [], [], []
        self._init_group({"params": matrices}, *lists)
        torch._foreach_lerp_(means, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, means, momentum) if group["nesterov"] else means
        options = [group[key] for key in ("ns_coefficients", "ns_steps", "eps")]
        updates = _on_whole(
            lambda x: _muon._zeropower_via_newtonschulz(x, *options),
            [p.shape for p in matrices],
            updates,
            ranks,
        )
        for matrix, weight, update in zip(matrices, weights, updates, strict=True):
            weight.mul_(1 - lr * group["weight_decay"])
            scaled = _muon._adjust_lr(lr, group["adjust_lr_fn"], matrix.shape)
            weight.add_(update, alpha=-scaled)


def _sharing(parameter: nn.Parameter) -> dist.ProcessGroup | None:
    """The ranks that have shards of one replica of a parameter; None if this rank has all of it."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    return group if group.size() > 1 else None


def _on_whole(
    function: Callable[[torch.Tensor], torch.Tensor],
    shapes: Sequence[torch.Size],
    shards: Sequence[torch.Tensor],
    ranks: dist.ProcessGroup | None,
) -> list[torch.Tensor]:
    """Applies a function to whole matrices in bfloat16, the i-th matrix on the i-th rank.

    Args:
        function: Its result has the shape of its argument, which it may overwrite.
        shapes: Shapes of the matrices, at most as many as there are ranks.
        shards: This rank's rows of each matrix; the ranks split the rows as ``torch.chunk`` does.
        ranks: The ranks that share the matrices; None if this rank has them whole.

    Returns:
        This rank's rows of the results, bfloat16.
    """
    if ranks is None:
        return [function(x.bfloat16()) for x in shards]
    n, rank = ranks.size(), ranks.rank()
    rows, columns = shapes[rank] if rank < len(shapes) else (0, 0)
    ends = [min(i * -(-rows // n), rows) for i in range(n + 1)]
    of_ranks = [columns * (end - begin) for begin, end in pairwise(ends)]
    of_matrices = [x.numel() for x in shards] + [0] * (n - len(shards))
    parts = torch.cat([x.flatten() for x in shards]).bfloat16()
    whole = parts.new_empty(rows * columns)
    dist.all_to_all_single(whole, parts, of_ranks, of_matrices, group=ranks)
    if rows:
        whole = function(whole.view(rows, columns)).flatten()
    dist.all_to_all_single(parts, whole, of_matrices, of_ranks, group=ranks)
    return [part.view_as(x) for part, x in zip(parts.split(of_matrices), shards, strict=False)]


@torch.no_grad()
def gradient_shards(model: nn.Module) -> list[torch.Tensor]:
    """This rank's shards of all gradients, as plain tensors that share their memory.

    Of plain tensors, torch computes the norms of all at once. Of DTensors it computes each alone,
    and scales each alone, by a dispatch that takes the host long.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [x.to_local() if isinstance(x, DTensor) else x for x in grads]


def squared_norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all entries, in float32 up to the last square; float64 ``[]``."""
    return torch.nn.utils.get_total_norm(tensors).double().square()


@torch.no_grad()
def clip(shards: Sequence[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients down to a global norm.

    Args:
        shards: What ``gradient_shards`` returned; changed in place.
        norm: Their norm over all ranks, float64 ``[]``, the same on every rank to the last bit:
            replicas that clip differently would never agree again.
        limit: The largest norm.
    """
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(shards, scale.float())


def checkpoint_bytes(model: nn.Module, config: OptimSection) -> int:
    """Bytes of weights and moments in float32: AdamW keeps two moments, Muon one per matrix."""
    sizes = {name: sum(p.numel() for p in part) for name, part in parameter_groups(model).items()}
    less = sizes["matrix"] if config.name == "muon" else 0
    return 4 * (3 * sum(sizes.values()) - less)


def build_optimizers(model: nn.Module, config: OptimSection) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside blocks and AdamW for the rest.

    Muon's update is scaled to the size of AdamW's (``match_rms_adamw``), so one learning rate and
    one weight decay serve both.
    """
    groups = parameter_groups(model)
    decayed = groups["decay"] if config.name == "muon" else groups["matrix"] + groups["decay"]
    adamw = ShardAdamW(
        [
            {"params": p, "weight_decay": decay}
            for p, decay in ((decayed, config.weight_decay), (groups["plain"], 0.0))
            if p
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    if config.name == "adamw":
        return [adamw]
    muon = ShardMuon(
        groups["matrix"],
        lr=config.lr,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw]


def set_lr(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Gives every group of every optimizer the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
