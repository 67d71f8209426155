"""Cross entropy of rows of logits in Triton: a row is read twice and becomes its gradient in place.

A program reads a row first for its log-partition function, then for the gradient. With one row per
multiprocessor at a time, the second read finds the row in the L2 cache.
"""

import torch
import triton
import triton.language as tl

from . import _schemas  # noqa: F401  (the schemas come first)
from ._triton import FP_FUSION, LOG2_E, check_runs_here, exp2, implement, unit_stride

# logits of a row held at once by a program, and its warps
_LOGITS, _WARPS = 8192, 16


@triton.jit
def cross_entropy_rows_kernel(
    logits,
    labels,
    losses,
    z_loss,
    ignore_index,
    V,
    logits_t,
    labels_t,
    WRITE_GRADIENT: tl.constexpr,
    BV: tl.constexpr,
):
    """``losses [rows, 2]`` fp32: with the z term and without. The gradient is that of the first."""
    i_t = tl.program_id(0).to(tl.int64)
    p_x = logits + i_t * logits_t
    o_v = tl.arange(0, BV)
    label = tl.load(labels + i_t * labels_t)
    valid = label != ignore_index
    # A label outside the vocabulary makes the loss NaN. This is loaded before the reductions, whose
    # barriers make sure that every thread has read it before the logits are overwritten below.
    inside = valid & (label >= 0) & (label < V)
    target = tl.load(p_x + label, mask=inside, other=float("nan")).to(tl.float32)
    # finite, so that a block of masked logits does not subtract infinities
    top = -3.4e38
    b_sum = tl.zeros([BV], tl.float32)
    for i_v in range(0, V, BV):
        b_x = tl.load(p_x + i_v + o_v, mask=i_v + o_v < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(b_x, 0))
        # exponents never exceed 0
        b_sum = b_sum * tl.exp(top - higher) + exp2((b_x - higher) * LOG2_E)
        top = higher
    lse = tl.log(tl.sum(b_sum, 0)) + top
    cross_entropy = tl.where(valid, lse - target, 0.0)
    penalty = tl.where(valid, z_loss * lse * lse, 0.0)
    tl.store(losses + 2 * i_t, cross_entropy + penalty)
    tl.store(losses + 2 * i_t + 1, cross_entropy)
    if WRITE_GRADIENT:
        # d loss / d logits = (1 + 2 z lse) softmax - onehot
        scale = tl.where(valid, 1.0 + 2.0 * z_loss * lse, 0.0)
        hot = tl.where(valid, label, -1)
        for i_v in range(0, V, BV):
            p_v, mask = p_x + i_v + o_v, i_v + o_v < V
            b_x = tl.load(p_v, mask=mask, other=-float("inf")).to(tl.float32)
            b_d = scale * exp2((b_x - lse) * LOG2_E) - tl.where(i_v + o_v == hot, 1.0, 0.0)
            tl.store(p_v, b_d.to(logits.dtype.element_ty), mask=mask)


def rows(logits, labels, z_loss, ignore_index, write_gradient):
    """The contract is that of :func:`rodimus_kernels.cross_entropy.eager_rows`."""
    check_runs_here("linear_cross_entropy", logits)
    return torch.ops.rodimus.cross_entropy_rows(
        logits, labels, z_loss, ignore_index, write_gradient
    )


@implement("cross_entropy_rows")
def _rows(logits, labels, z_loss, ignore_index, write_gradient):
    assert unit_stride(logits) is logits
    losses = logits.new_empty((logits.shape[0], 2), dtype=torch.float32)
    cross_entropy_rows_kernel[(logits.shape[0],)](
        logits,
        labels,
        losses,
        z_loss,
        ignore_index,
        logits.shape[1],
        logits.stride(0),
        labels.stride(0),
        WRITE_GRADIENT=write_gradient,
        BV=min(_LOGITS, triton.next_power_of_2(logits.shape[1])),
        num_warps=_WARPS,
        **FP_FUSION,
    )
    return losses
