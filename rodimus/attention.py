"""Shared-key attention as an attention implementation of transformers: ``rodimus_ska``.

A model of this package uses it by default; another implementation is chosen with

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")

It gives the logits of "sdpa" and "eager" without a mask of queries by keys: the operator knows the
window, and packed documents and padding become boundaries between documents, one number per token.
Where that is impossible (new tokens behind padding in a cache, static caches, a caller's own mask
function), and where torch compiles a graph of any length for a CPU, the usual mask is built and
torch's attention is used.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from rodimus_kernels import shared_key_attention

logger = logging.get_logger(__name__)

NAME = "rodimus_ska"


def register() -> None:
    """Register this attention as ``attn_implementation="rodimus_ska"``, for any transformers model
    with causal or sliding-window attention."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_of)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, by the contract of transformers' ``AttentionInterface``.

    Args:
        module: the calling layer.
        query: ``[B, H, T, D]``.
        key: ``[B, Hk, S, D]``; query head i reads head ``i // (H // Hk)``. A head that was expanded
            with stride 0 is read as one head.
        value: ``[B, Hk, S, Dv]``, as ``key``.
        attention_mask: None, the boundaries ``[N + 1]`` of :func:`attention_mask_of`, or a mask
            ``[B, 1, T, S]``.
        scaling: softmax scale; default ``D ** -0.5``.
        dropout: must be 0 unless a mask ``[B, 1, T, S]`` is given.
        sliding_window: keys a query sees, its own included; None for all.
        kwargs: what other implementations need.

    Returns:
        ``(o, None)`` with o ``[B, T, H, Dv]``; attention weights are never returned.

    Raises:
        ValueError: dropout is requested without such a mask.
    """
    if kwargs.pop("output_attentions", False):
        logger.warning_once(
            f"attn_implementation={NAME!r} returns no attention weights: set_attn_implementation"
            "('eager') does"
        )
    if attention_mask is not None and attention_mask.dim() == 4:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(f"attn_implementation={NAME!r} has no attention dropout, got {dropout}")
    key, value = (_heads_read(x, query.shape[1]) for x in (key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, length = q.shape[:2]
    if attention_mask is not None:
        # all rows are laid end to end in one, and each begins a document
        q, k, v = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
    o = shared_key_attention(
        q, k, v, window_size=sliding_window, scale=scaling, cu_seqlens=attention_mask
    )
    return o.view(batch, length, *o.shape[2:]), None


def _heads_read(x, heads):
    """``x [B, Hk, S, D]`` with one head for each query head, or only its first head if all heads
    share the same memory."""
    if x.shape[1] == 1 or x.stride(1) == 0:
        return x[:, :1]
    # where Hk < H neighbours share a head; the operator would deal them out in turn
    return x.repeat_interleave(heads // x.shape[1], dim=1) if x.shape[1] < heads else x


def attention_mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """What :func:`attention_forward` needs besides the window, by the contract of transformers'
    ``AttentionMaskInterface``.

    Returns:
        None where causality and the window suffice; int32 ``[N + 1]`` boundaries of documents in
        the rows laid end to end, where rows are packed or padded; else a bool mask ``[B, 1, T,
        S]``.
    """
    if attention_mask is not None and attention_mask.dim() == 1:
        # boundaries that `generate` made for a static cache
        return attention_mask
    is_whole = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length
    is_newest = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length]
        if not is_tracing(padding) and padding.shape[1] == kv_length and padding.all():
            padding = None
    # on a CPU the operator's number of query bands depends on the length: no one graph fits all
    if torch.device(device).type == "cpu" and is_tracing():
        is_newest = is_whole = False
    if is_newest and not use_vmap and padding is None and (allow_is_causal_skip or not is_whole):
        return None
    if is_whole and not use_vmap and (padding is None or padding.shape[1] == kv_length):
        return _boundaries(batch_size, q_length, mask_function, padding, device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _boundaries(batch, length, mask_function, padding, device):
    """Where documents begin in the rows laid end to end: at tokens that do not see the one before
    them, and at all padding, so that its outputs do not depend on how much padding there is. With
    a window of one key every token is a document, which is correct."""
    rows = torch.arange(batch, device=device)[:, None]
    tokens = torch.arange(length, device=device)[None]
    starts = ~mask_function(rows, 0, tokens, (tokens - 1).clamp_min(0)).expand(batch, length)
    starts = starts | (tokens == 0)
    if padding is not None:
        padding = padding.bool()
        starts = starts | ~padding | ~padding.roll(1, dims=1)
    return boundaries_of(starts.flatten())


def boundaries_of(starts: torch.Tensor) -> torch.Tensor:
    """int32 ``[N + 1]`` boundaries of documents from bool ``[S]``, True where one begins, as at 0.

    Off the CPU N is always S, because to count the documents the host would wait for the device.
    The surplus boundaries are S and bound empty documents.
    """
    total, device = starts.shape[0], starts.device
    if device.type == "cpu" and not is_tracing(starts):
        bounds = starts.nonzero()[:, 0]
        return torch.cat((bounds, bounds.new_tensor([total]))).int()
    place = torch.where(starts, starts.cumsum(0) - 1, total)
    bounds = torch.full((total + 1,), total, dtype=torch.int32, device=device)
    bounds = bounds.scatter(0, place, torch.arange(total, dtype=torch.int32, device=device))
    return torch.cat((bounds[:-1], bounds.new_full((1,), total)))
