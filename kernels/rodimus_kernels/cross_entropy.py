"""Linear head and cross entropy in one operator that never holds all logits."""

import torch
import torch.nn.functional as F

from ._dispatch import check_floating, check_same_device, check_shape, load, runs_triton
from ._schemas import is_transformed, refuse_second_derivative
from .linear import linear, multiplies_slowly
from .reference import can_read_values, no_autocast

_IMPLS = {
    "reference": "rodimus_kernels.reference:linear_cross_entropy",
    "eager": "rodimus_kernels.cross_entropy:eager_rows",
    "triton": "rodimus_kernels.triton_cross_entropy:rows",
}
IMPLS = tuple(_IMPLS)

# Bytes of logits held at once. On a CPU 8 MiB of them stay in cache between the passes (with 4096
# classes, this was the fastest size of 1 MiB .. 64 MiB); a GPU needs whole waves of work instead.
_BYTES_AT_ONCE_CPU = 1 << 23
_BYTES_AT_ONCE = 1 << 30
# Least rows of a chunk, whatever the vocabulary: every chunk rewrites the whole weight gradient.
_MIN_ROWS = 256


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "sum",
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of ``softmax(hidden @ weight.T)``, chunk by chunk; differentiable.

        loss_n = lse_n - logit_n[label_n] + z_loss * lse_n^2

    Gradients are computed in the forward, while a chunk's logits exist, so nothing of size N x
    vocabulary is saved. Everything computed from the logits is float32 or wider for any input
    dtype; the logits themselves are rounded to half precision if the inputs have it.

    Args:
        hidden: ``[N, D]``.
        weight: Head ``[vocabulary, D]``, dtype of ``hidden``.
        labels: Integers ``[N]``; already shifted.
        z_loss: Weight of the squared log-partition term.
        ignore_index: Label to ignore.
        reduction: ``"sum"``, or ``"mean"`` over the labels that are not ignored.
        impl: ``"auto"``, ``"triton"``, ``"eager"`` or ``"reference"``, which holds all logits; an
            explicit choice never falls back.

    Returns:
        ``(loss, cross_entropy)``: scalars in float32 (float64 for float64 inputs). The second
        leaves the z term out and carries no gradient: the number to log.

    Raises:
        ValueError: shapes, devices or dtypes differ, a label is outside the vocabulary (on a CPU;
            in Triton the loss is NaN then), or an option is unknown.
    """
    check_shape("hidden", hidden, ("N", "D"))
    check_shape("weight", weight, ("vocabulary", hidden.shape[1]))
    check_shape("labels", labels, (hidden.shape[0],))
    check_floating(hidden=hidden, weight=weight)
    check_same_device("hidden", hidden, weight=weight, labels=labels)
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    labels = labels.long()
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if impl == "auto":
        double = hidden.dtype == torch.float64
        impl = "triton" if runs_triton(hidden.device) and not double else "eager"
        impl = "reference" if is_transformed() else impl
    function = load("linear_cross_entropy", impl, _IMPLS)
    if can_read_values(labels) and len(labels):
        worst = torch.where(labels == ignore_index, 0, labels)
        if worst.min() < 0 or worst.max() >= weight.shape[0]:
            raise ValueError(
                f"labels must be in 0 .. {weight.shape[0] - 1} or {ignore_index}, got"
                f" {int(worst.min())} .. {int(worst.max())}"
            )
    if impl == "reference":
        return function(
            hidden, weight, labels, z_loss=z_loss, ignore_index=ignore_index, reduction=reduction
        )
    if not torch.is_grad_enabled():
        # needs_input_grad ignores the grad mode: without this, gradients would be computed
        hidden, weight = hidden.detach(), weight.detach()
    losses = _ChunkedCrossEntropy.apply(hidden, weight, labels, z_loss, ignore_index, function)
    loss, cross_entropy = losses
    if reduction == "mean":
        count = (labels != ignore_index).sum()
        loss, cross_entropy = loss / count, cross_entropy / count
    return loss, cross_entropy


def eager_rows(logits, labels, z_loss, ignore_index, write_gradient):
    """Losses of rows of logits; the logits are replaced in place by their gradient.

    Args:
        logits: ``[N, vocabulary]``, float32 or float64; overwritten.
        labels: int64 ``[N]``. z_loss, ignore_index: as in :func:`linear_cross_entropy`.
        write_gradient: If False, the logits' memory holds nothing useful afterwards.

    Returns:
        ``[N, 2]`` in float32 or wider: the loss with the z term, whose gradient is written, and
        the loss without it.
    """
    ignored = labels == ignore_index
    valid, target = (~ignored).to(logits.dtype), torch.where(ignored, 0, labels)[:, None]
    top, target_logit = logits.amax(-1, keepdim=True), logits.gather(-1, target)[:, 0]
    # One exponential per logit, in the logits' own memory, serves loss and gradient.
    odds = logits.sub_(top).exp_()
    total = odds.sum(-1, keepdim=True)
    lse = (total.log() + top)[:, 0]
    cross_entropy = (lse - target_logit) * valid
    if write_gradient:
        # d loss / d logits = (1 + 2 z lse) softmax - onehot
        odds.mul_((valid * (1 + 2 * z_loss * lse))[:, None] / total)
        odds.scatter_add_(-1, target, -valid[:, None])
    return torch.stack((cross_entropy + z_loss * lse.square() * valid, cross_entropy), dim=1)


def _chunk_rows(logit_bytes: int, vocabulary: int, device: torch.device) -> int:
    """Rows whose logits are held at once; a multiple of ``_MIN_ROWS`` fills product tiles."""
    at_once = _BYTES_AT_ONCE_CPU if device.type == "cpu" else _BYTES_AT_ONCE
    rows = at_once // (logit_bytes * vocabulary)
    return max(rows // _MIN_ROWS, 1) * _MIN_ROWS


def _add_product(total, a, b):
    """``total += a @ b`` in total's dtype. On a GPU the product accumulates into total and is not
    rounded; elsewhere float16 is widened first, as a sum over many rows may overflow it."""
    if total.is_cuda and total.dtype != a.dtype and not torch.compiler.is_compiling():
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.float16:
        total += a.to(total.dtype) @ b.to(total.dtype)
    else:
        total += a @ b


def _scaled(x, factor, dtype):
    """``x * factor`` in ``dtype``; the factor is not rounded: 1 / tokens is inexact in bfloat16."""
    if x is None:
        return None
    factor = factor.reshape((1,) * x.dim())
    if torch.compiler.is_compiling():
        return (x * factor).to(dtype)
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses; the gradients are computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, z_loss, ignore_index, losses_of_rows):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # the kernel widens in registers
        dtype = wide if losses_of_rows is eager_rows else hidden.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        totals = hidden.new_zeros(2, dtype=wide)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        rows = _chunk_rows(dtype.itemsize, weight.shape[0], hidden.device)
        multiply = linear if multiplies_slowly(hidden.device, hidden.dtype) else F.linear
        with no_autocast(hidden.device):
            for start in range(0, hidden.shape[0], rows):
                chunk = slice(start, start + rows)
                x = hidden[chunk]
                logits = multiply(x, weight).to(dtype)
                options = (z_loss, ignore_index, need_hidden or need_weight)
                totals += losses_of_rows(logits, labels[chunk], *options).sum(0)
                dlogits = logits.to(hidden.dtype)
                if need_hidden:
                    dhidden[chunk] = dlogits @ weight
                if need_weight:
                    _add_product(dweight, dlogits.t(), x)
        # not rounded in float16: the sum over all tokens may overflow even if their mean does not
        if dweight is not None and weight.dtype != torch.float16:
            dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        # clones, not views of one tensor: the loss may be changed in place
        loss, cross_entropy = (total.clone() for total in totals)
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    @refuse_second_derivative
    def backward(ctx, dloss, _):
        dhidden, dweight = (_scaled(x, dloss, ctx.dtype) for x in ctx.saved_tensors)
        return dhidden, dweight, None, None, None, None
