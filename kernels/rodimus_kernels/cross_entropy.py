"""Linear head and cross entropy in one operator that never holds all logits."""

import torch

from . import reference
from ._dispatch import check_alike, check_shape

IMPLS = ("reference", "eager")

# Logits held at once, in elements. On a CPU 8 MiB of them stay in cache between the passes (with
# 4096 classes, 2^21 beat 2^18 .. 2^24 there); a GPU wants whole waves of work instead.
_LOGITS_AT_ONCE_CPU = 1 << 21
_LOGITS_AT_ONCE = 1 << 27
# The weight gradient is rewritten once per chunk, so a large vocabulary must not shrink it further.
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
    vocabulary is saved. Logits are float32 whatever the input dtype.

    Args:
        hidden: ``[N, D]``.
        weight: Head ``[vocabulary, D]``, dtype of ``hidden``.
        labels: int64 ``[N]``; already shifted.
        z_loss: Weight of the squared log-partition term.
        ignore_index: Label that counts for nothing.
        reduction: ``"sum"``, or ``"mean"`` over the labels that count.
        impl: ``"auto"``, ``"eager"`` (chunked) or ``"reference"``.

    Returns:
        ``(loss, cross_entropy)``: scalars in float32 (float64 for float64 inputs). The second
        leaves the z term out and
        carries no gradient: the number to log.

    Raises:
        ValueError: shapes or devices differ, a label is outside the vocabulary (checked on the
        CPU), or an option is
            unknown.
    """
    check_shape("hidden", hidden, ("N", "D"))
    check_shape("weight", weight, ("vocabulary", hidden.shape[1]))
    check_shape("labels", labels, (hidden.shape[0],))
    check_alike("hidden", hidden, weight=weight, labels=labels)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"linear_cross_entropy: unknown impl {impl!r}; expected one of {IMPLS}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(labels):
        worst = torch.where(labels == ignore_index, 0, labels)
        if worst.min() < 0 or worst.max() >= weight.shape[0]:
            raise ValueError(
                f"labels must be in 0 .. {weight.shape[0] - 1} or {ignore_index}, got"
                f" {int(worst.min())} .. {int(worst.max())}"
            )
    if impl == "reference":
        return reference.linear_cross_entropy(
            *(hidden, weight, labels), z_loss=z_loss, ignore_index=ignore_index, reduction=reduction
        )
    loss, cross_entropy = _ChunkedCrossEntropy.apply(hidden, weight, labels, z_loss, ignore_index)
    if reduction == "mean":
        count = (labels != ignore_index).sum()
        loss, cross_entropy = loss / count, cross_entropy / count
    return loss, cross_entropy


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses; the gradients are taken in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, z_loss, ignore_index):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        totals = hidden.new_zeros(2, dtype=wide)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        at_once = _LOGITS_AT_ONCE_CPU if hidden.device.type == "cpu" else _LOGITS_AT_ONCE
        rows = max(at_once // weight.shape[0], _MIN_ROWS)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                chunk = slice(start, start + rows)
                x, y = hidden[chunk], labels[chunk]
                valid, target = (y != ignore_index).to(wide)[:, None], y.clamp_min(0)[:, None]
                logits = (x @ weight.t()).to(wide)
                top, target_logit = logits.amax(-1, keepdim=True), logits.gather(-1, target)
                # One exponential per logit, in the logits' own memory, serves loss and gradient.
                odds = logits.sub_(top).exp_()
                total = odds.sum(-1, keepdim=True)
                lse = total.log() + top
                cross_entropy = ((lse - target_logit) * valid).sum()
                totals[0] += cross_entropy + z_loss * (lse.square() * valid).sum()
                totals[1] += cross_entropy
                if not (need_hidden or need_weight):
                    continue
                # d loss / d logits = (1 + 2 z lse) softmax - onehot
                dlogits = odds.mul_(valid * (1 + 2 * z_loss * lse) / total)
                dlogits = dlogits.scatter_add_(-1, target, -valid).to(hidden.dtype)
                if need_hidden:
                    dhidden[chunk] = dlogits @ weight
                if need_weight:
                    dweight += dlogits.t() @ x
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype))
        loss, cross_entropy = totals.clone().unbind()
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx, dloss, _):
        dhidden, dweight = ctx.saved_tensors
        dhidden = None if dhidden is None else dhidden * dloss.to(dhidden.dtype)
        dweight = None if dweight is None else dweight * dloss.to(dweight.dtype)
        return dhidden, dweight, None, None, None
