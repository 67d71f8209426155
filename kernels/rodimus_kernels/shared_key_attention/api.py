"""Public functions of sliding-window shared-key attention (SW-SKA), their checks and the one
dispatch."""

import torch

from .. import reference
from .._dispatch import (
    check_floating,
    check_position,
    check_same_device,
    check_scale,
    check_shape,
    choose_compiled,
    load,
    mark_written,
    plain_integer,
    runs_triton,
)
from .._schemas import is_transformed

_SEQUENCE = {
    "reference": "rodimus_kernels.reference:shared_key_attention",
    "sdpa": "rodimus_kernels.shared_key_attention.sdpa:forward",
    "triton": "rodimus_kernels.shared_key_attention.triton_attention:forward",
    "flex": "rodimus_kernels.shared_key_attention.flex:forward",
    "flash": "rodimus_kernels.shared_key_attention.flash:forward",
}
_STEP = {
    "reference": "rodimus_kernels.reference:shared_key_attention_step",
    "sdpa": "rodimus_kernels.shared_key_attention.sdpa:step",
    "native": "rodimus_kernels.shared_key_attention.native_step:step",
    "triton": "rodimus_kernels.shared_key_attention.triton_step:step",
}
_ROPE = {
    "reference": "rodimus_kernels.reference:rope",
    "triton": "rodimus_kernels.shared_key_attention.triton_rope:forward",
}
IMPLS = tuple(_SEQUENCE)

_TRITON_MAX_DIM = 256

# Most queries against the ring cache in one call: speculative decoding verifies a few tokens,
# prefill uses the sequence form.
MAX_STEP = 8


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """Rotary position embedding in the released convention: channel d pairs with channel d + dim /
    2; differentiable in x.

    Args:
        x: ``[B, T, H, D]``.
        cos: ``[B or 1, T, dim / 2]``, from :func:`rodimus_kernels.rope_tables`; the first ``dim <=
            D`` channels are rotated, the rest pass unchanged.
        sin: Shaped like ``cos``.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``; an explicit choice never falls back.

    Returns:
        ``[B, T, H, D]`` in x's dtype.

    Raises:
        ValueError: the tables do not fit x.
        ImportError: the chosen implementation cannot be loaded.
    """
    check_shape("x", x, ("B", "T", "H", "D"))
    check_shape("cos", cos, ("1 or B", x.shape[1], "dim / 2"))
    check_shape("sin", sin, tuple(cos.shape))
    if cos.shape[0] not in (1, x.shape[0]) or not 0 < 2 * cos.shape[-1] <= x.shape[-1]:
        raise ValueError(
            f"cos must be [1 or {x.shape[0]}, {x.shape[1]}, 1 to {x.shape[-1] // 2}],"
            f" got {tuple(cos.shape)}"
        )
    check_floating(x=x, cos=cos, sin=sin)
    check_same_device("x", x, cos=cos, sin=sin)
    if impl == "auto":
        double = torch.float64 in (x.dtype, cos.dtype, sin.dtype)
        impl = "triton" if runs_triton(x.device) and not double else "reference"
    return load("rope", impl, _ROPE)(x, cos, sin)


def shared_key_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window_size: int | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Causal sliding-window attention with one (or few) key heads and many value heads;
    differentiable.

    Query head i uses key head ``i % Hk`` and value head ``i % Hv``. Rodimus* (arXiv 2410.06577),
    section 3.2.

    Args:
        q: Queries ``[B, T, H, D]`` after rotary embedding; the last T positions of the keys.
        k: Keys ``[B, S, Hk, D]`` after rotary embedding, S >= T, H divisible by Hk.
        v: Values ``[B, S, Hv, Dv]``, H divisible by Hv; Dv may differ from D.
        window_size: Keys a query sees, its own position included; None for all before it.
        scale: Softmax scale, > 0. Default ``D ** -0.5``.
        cu_seqlens: int ``[N + 1]`` boundaries of packed documents among the S keys, rising from 0
            to S; requires B = 1. The values are checked as in :func:`ddts`.
        impl: ``"auto"``, ``"triton"``, ``"flash"``, ``"flex"``, ``"sdpa"`` or ``"reference"``; an
            explicit choice never falls back.

    Returns:
        ``[B, T, H, Dv]`` in ``v.dtype``.

    Raises:
        ValueError: a shape, dtype or device breaks the contract.
        ImportError: the chosen implementation cannot be loaded.
    """
    window_size = plain_integer("window_size", window_size)
    _check(q, k, v, window_size, scale)
    batch, queries, _, dim = q.shape
    keys = k.shape[1]
    if queries == 0 or keys < queries:
        raise ValueError(f"expected S >= T >= 1, got T = {queries} queries and S = {keys} keys")
    check_same_device("q", q, cu_seqlens=cu_seqlens)
    reference.check_cu_seqlens(cu_seqlens, batch, keys)
    if impl == "auto":
        double = torch.float64 in (q.dtype, k.dtype)
        dtype = torch.float64 if double else v.dtype
        impl = _choose(runs_triton(q.device), max(dim, v.shape[-1]), dtype)
        # torch's kernel on a CPU has no forward-mode derivative
        impl = "reference" if is_transformed() else impl
    function = load("shared_key_attention", impl, _SEQUENCE)
    return function(
        q,
        k,
        v,
        window_size=window_size,
        scale=dim**-0.5 if scale is None else scale,
        cu_seqlens=cu_seqlens,
    )


def _choose(triton: bool, dim: int, dtype: torch.dtype) -> str:
    """What ``impl="auto"`` means: Triton on a GPU where it takes the shape, else torch."""
    # the registers cannot hold the parts of float32 operands, which are split for three products
    widest = _TRITON_MAX_DIM // 2 if dtype == torch.float32 else _TRITON_MAX_DIM
    return "triton" if triton and dim <= widest and dtype != torch.float64 else "sdpa"


def shared_key_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    position: torch.Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """One to eight tokens against a ring cache, which is updated in place. Not differentiable.

    Token p of a sequence lives in row ``p % R`` as ``[Hk keys | Hv values]``: one contiguous row
    per token, no shift and no copy when the window is full. Sequences of one batch may be at
    different positions.

    A ring of dtype uint8 keeps values in 8 bits, about half the bytes: a row is the Hk * D keys in
    their dtype, Hv * Dv int8 values, and from the next even byte Hv scales in bfloat16, together
    :func:`rodimus_kernels.int8_row_bytes`. Values of the new tokens are quantised with
    :func:`rodimus_kernels.reference.quantize_values` before any query sees them; a head that holds
    NaN or infinity makes every query that attends to it NaN.

    Args:
        q: Queries ``[B, T, H, D]`` after rotary embedding, 1 <= T <= 8.
        k: Keys of the same tokens ``[B, T, Hk, D]``, after rotary embedding.
        v: Values of the same tokens ``[B, T, Hv, Dv]``.
        cache: ``[B, R, Hk * D + Hv * Dv]`` with R >= window_size + T - 1; overwritten. Or uint8
            ``[B, R, int8_row_bytes]``, rows dense and starting on multiples of 16 bytes.
        position: int64 ``[B]``, >= 0: tokens each sequence has seen before these. Values are
            checked on the CPU.
        window_size: Keys a query sees, its own position included.
        scale: Softmax scale, > 0. Default ``D ** -0.5``.
        impl: ``"auto"``, ``"native"``, ``"triton"``, ``"sdpa"`` or ``"reference"``; an explicit
            choice never falls back.

    Returns:
        ``[B, T, H, Dv]`` in ``v.dtype``.

    Raises:
        ValueError: a shape, dtype or device breaks the contract, or the ring is too small or
            expanded.
    """
    window_size = plain_integer("window_size", window_size)
    _check(q, k, v, window_size, scale)
    if window_size is None:
        raise ValueError("window_size must be an integer: a ring holds no more than a window")
    batch, steps, _, dim = q.shape
    if not 1 <= steps <= MAX_STEP or k.shape[1] != steps:
        raise ValueError(
            f"expected 1 <= T <= {MAX_STEP} tokens in q, k and v, got {steps} and {k.shape[1]}"
        )
    _check_ring(cache, k, v)
    check_position(position, batch)
    check_same_device("q", q, cache=cache, position=position)
    if cache.shape[1] < window_size + steps - 1:
        raise ValueError(
            f"cache needs R >= window_size + T - 1 = {window_size + steps - 1} rows,"
            f" got {cache.shape[1]}"
        )
    with torch.no_grad():
        if impl == "auto":
            # a ring of bytes holds keys in the dtype of k
            tensors = (q, k, v) if cache.dtype == torch.uint8 else (q, k, v, cache)
            fallback = _choose_step(runs_triton(q.device), max(dim, v.shape[-1]), cache, tensors)
            impl = choose_compiled(fallback, *tensors, one_dtype=True)
            if impl == "native" and not _fits_compiled_step(q, k, v, cache):
                impl = fallback
        o = load("shared_key_attention_step", impl, _STEP)(
            q,
            k,
            v,
            cache,
            # one position for all rows may be an expanded tensor
            position.contiguous(),
            window_size=window_size,
            scale=dim**-0.5 if scale is None else scale,
        )
    mark_written(cache)
    return o


def _check_ring(cache, k, v):
    heads = (*k.shape[2:], *v.shape[2:])
    if getattr(cache, "dtype", None) == torch.uint8:
        width = reference.int8_row_bytes(*heads, k.dtype)
    else:
        width = heads[0] * heads[1] + heads[2] * heads[3]
        check_floating(cache=cache)
    check_shape("cache", cache, (k.shape[0], "R", width))
    # torch only warns when a row that stands for several is written
    if any(step == 0 and size > 1 for step, size in zip(cache.stride(), cache.shape, strict=True)):
        raise ValueError(f"cache must not be expanded: it is written, got strides {cache.stride()}")
    if cache.dtype != torch.uint8:
        return
    # torch.compile cannot trace storage_offset
    offset = 0 if torch.compiler.is_compiling() else cache.storage_offset()
    if cache.stride(2) != 1 or any(place % 16 for place in (*cache.stride()[:2], offset)):
        raise ValueError(
            "a uint8 cache needs dense rows that start on multiples of 16 bytes,"
            f" got strides {cache.stride()} and offset {offset}"
        )


def _choose_step(
    triton: bool, dim: int, cache: torch.Tensor, tensors: tuple[torch.Tensor, ...]
) -> str:
    """Like :func:`_choose`, for the step: mixed dtypes go to the reference, and Triton needs a
    cache with dense rows."""
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1:
        return "reference"
    fits = torch.float64 not in dtypes and cache.stride(-1) == 1
    return "triton" if triton and fits and dim <= _TRITON_MAX_DIM else "sdpa"


def _fits_compiled_step(q, k, v, cache) -> bool:
    """Whether the compiled step takes this ring and, on a GPU, has more than a plain loop for these
    heads: its fast kernel is for one key head and heads of 128 channels, as in the models."""
    heads, dim = q.shape[2:]
    staged = k.shape[2] == 1 and heads % 2 == 0 and heads <= 24 and dim == v.shape[3] == 128
    return cache.is_contiguous() and (q.device.type == "cpu" or staged)


def _check(q, k, v, window_size, scale):
    check_shape("q", q, ("B", "T", "H", "D"))
    batch, _, heads, dim = q.shape
    check_shape("k", k, (batch, "S", "Hk", dim))
    check_shape("v", v, (batch, k.shape[1], "Hv", "Dv"))
    check_floating(q=q, k=k, v=v)
    check_same_device("q", q, k=k, v=v)
    if 0 in (heads, dim, k.shape[2], v.shape[2]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k and v need at least one head and one channel, got {shapes}")
    if heads % k.shape[2] or heads % v.shape[2]:
        raise ValueError(
            "query heads must be a multiple of key and value heads,"
            f" got H = {heads}, Hk = {k.shape[2]}, Hv = {v.shape[2]}"
        )
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size counts the query itself and must be >= 1, got {window_size}")
    check_scale(scale)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
