"""DDTS token by token in Triton: one step, short sequences, prefill without gradients.

A program keeps ``[K, BV]`` of the state in registers and walks the tokens of one sequence. Exact in
float32 for every input dtype, any K and V; not differentiable.
"""

import torch
import triton
import triton.language as tl

from .. import _schemas  # noqa: F401  (the schemas come first)
from .._triton import (
    FP_FUSION,
    check_grid,
    check_runs_here,
    implement,
    row_block,
    sequence_tokens,
    strides,
    unit_stride,
)

# elements of the state per program; few, because for one token V is the only parallelism
_ELEMENTS = 4096


@triton.jit
def ddts_recurrent_kernel(
    q,
    k,
    v,
    g,
    o,
    h0,
    ht,
    bounds,
    scale,
    T,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    g_b,
    g_t,
    g_h,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """``o`` contiguous ``[B, T, H, V]``; ``h0`` and ``ht`` fp32 ``[N, H, K, V]``, may be the same.

    Program (block of V, sequence * H + head). ``bounds [N + 1]`` of packed documents or None.
    """
    i_nh = tl.program_id(1).to(tl.int64)
    i_n = i_nh // H
    i_h = i_nh % H
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    mask_k = o_k < K
    mask_v = o_v < V
    mask_state = mask_k[:, None] & mask_v[None, :]
    o_state = i_nh * K * V + o_k[:, None] * V + o_v[None, :]
    i_b, start, end = sequence_tokens(i_n, bounds, T)
    state = tl.zeros([BK, BV], tl.float32)
    if h0 is not None:
        state = tl.load(h0 + o_state, mask=mask_state, other=0.0)
    for t in range(start, end):
        b_q = tl.load(q + i_b * q_b + t * q_t + i_h * q_h + o_k, mask=mask_k, other=0.0)
        b_k = tl.load(k + i_b * k_b + t * k_t + i_h * k_h + o_k, mask=mask_k, other=0.0)
        b_g = tl.load(g + i_b * g_b + t * g_t + i_h * g_h + o_k, mask=mask_k, other=0.0)
        b_v = tl.load(v + i_b * v_b + t * v_t + i_h * v_h + o_v, mask=mask_v, other=0.0)
        b_kv = b_k.to(tl.float32)[:, None] * b_v.to(tl.float32)[None, :]
        state = tl.exp(b_g.to(tl.float32))[:, None] * state + b_kv
        b_o = tl.sum((b_q.to(tl.float32) * scale)[:, None] * state, 0)
        p_o = o + ((i_b * T + t) * H + i_h) * V + o_v
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=mask_v)
    tl.store(ht + o_state, state, mask=mask_state)


def forward(
    q, k, v, log_decay, *, scale, initial_state=None, output_final_state=False, cu_seqlens=None
):
    """``ddts`` token by token; the contract is that of :func:`rodimus_kernels.ddts`.

    Raises:
        ValueError: a gradient is wanted, a dtype is float64, sequences * heads is more than 65,535,
            or Triton does not run on the tensors' device.
    """
    check_runs_here("ddts", q, k, v, log_decay)
    inputs = (q, k, v, log_decay, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError(
            "ddts(impl='triton_recurrent') has no gradient: expected inputs without requires_grad"
            " or torch.no_grad(); impl='triton_chunk' is differentiable"
        )
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    o, final_state = torch.ops.rodimus.ddts_recurrent(
        q, k, v, log_decay, scale, initial_state, cu_seqlens
    )
    return o, (final_state if output_final_state else None)


def step(q, k, v, log_decay, state, *, scale):
    """``ddts_step``; the contract is that of :func:`rodimus_kernels.ddts_step`."""
    check_runs_here("ddts_step", q, k, v, log_decay)
    return torch.ops.rodimus.ddts_recurrent_step(q, k, v, log_decay, state, scale)


def _launch(q, k, v, log_decay, scale, initial_state, final_state, cu_seqlens):
    tensors = [unit_stride(x) for x in (q, k, v, log_decay)]
    _, length, heads, key_dim = q.shape
    check_grid("ddts", "sequences * heads", final_state.shape[0] * heads)
    value_dim, block_k = v.shape[-1], row_block(key_dim)
    block_v = min(row_block(value_dim), max(_ELEMENTS // block_k, 16))
    o = v.new_empty(v.shape)
    ddts_recurrent_kernel[(triton.cdiv(value_dim, block_v), final_state.shape[0] * heads)](
        *tensors,
        o,
        initial_state,
        final_state,
        cu_seqlens,
        scale,
        length,
        *strides(*tensors),
        H=heads,
        K=key_dim,
        V=value_dim,
        BK=block_k,
        BV=block_v,
        num_warps=4,
        **FP_FUSION,
    )
    return o


@implement("ddts_recurrent")
def _forward(q, k, v, log_decay, scale, initial_state, cu_seqlens):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    final_state = v.new_empty(state_shape, dtype=torch.float32)
    if initial_state is not None:
        initial_state = initial_state.to(torch.float32).contiguous()
    o = _launch(q, k, v, log_decay, scale, initial_state, final_state, cu_seqlens)
    return o, final_state


@implement("ddts_recurrent_step")
def _step(q, k, v, log_decay, state, scale):
    rows = (x.unsqueeze(1) for x in (q, k, v, log_decay))
    return _launch(*rows, scale, state, state, None).squeeze(1)
