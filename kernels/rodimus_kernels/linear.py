"""Linear layer without gradients: for the few rows of a decode step, where reading the weights
takes all the time, and for many rows on a CPU without instructions for the weights' dtype."""

import functools

import torch
import torch.nn.functional as F

from . import native, reference
from ._dispatch import check_floating, check_same_device, check_shape, choose_compiled, load
from .quantized_weight import QUANTIZED, Int4Weight, Int8Weight, QuantizedWeight, int4_units

_IMPLS = {
    "reference": "rodimus_kernels.reference:linear",
    "eager": "rodimus_kernels.linear:eager_linear",
    "widened": "rodimus_kernels.linear:widened_linear",
    "native": "rodimus_kernels.native_linear:linear",
}
IMPLS = tuple(_IMPLS)

# Outputs whose weights are widened at once: a few MiB, which stay in cache until they are used.
_OUTPUTS_AT_ONCE = 512


def linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in float32 and rounded once. Not differentiable.

    Args:
        x: ``[M, K]``; the native form takes M <= 8.
        weight: ``[N, K]`` of x's dtype, or weights of 8 or 4 bits, which the native form takes on a
            CPU.
        bias: ``[N]`` or None; float32 or x's dtype.
        impl: ``"auto"``, ``"native"``, ``"eager"``, ``"widened"``, which multiplies in float32 with
            a part of the weights at a time, or ``"reference"``; an explicit choice never falls
            back.

    Returns:
        ``[M, N]`` in x's dtype. With the native form a row does not depend on the other rows.

    Raises:
        ValueError: a shape, dtype or device breaks the contract.
        ImportError: the chosen implementation cannot be loaded.
    """
    check_shape("x", x, ("M", "K"))
    check_shape("weight", weight, ("N", x.shape[1]))
    if type(weight) in QUANTIZED:
        _check_quantized(weight)
    elif weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} like x, got {weight.dtype}")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
    check_floating(x=x, bias=bias)
    check_same_device("x", x, weight=weight, bias=bias)
    with torch.no_grad():
        if impl == "auto":
            impl = _choose(x, weight, bias)
            if impl == "native" and x.shape[0] > native.MAX_ROWS:
                parts = x.split(native.MAX_ROWS)
                return torch.cat([linear(part, weight, bias, impl="native") for part in parts])
        return load("linear", impl, _IMPLS)(x, weight, bias)


def _check_quantized(weight):
    """Raise ValueError unless values and scale belong together."""
    outputs, units = weight.shape[0], int4_units(weight.shape[1])
    if type(weight) is Int8Weight:
        check_shape("weight.scale", weight.scale, (outputs,))
    else:
        check_shape("weight.values", weight.values, (outputs, 64 * units))
        check_shape("weight.scale", weight.scale, (outputs, 4 * units))


def _choose(x, weight, bias):
    """What ``impl="auto"`` means; the native form also for more rows than it takes, in parts."""
    rows, is_slow = x.shape[0], multiplies_slowly(x.device, x.dtype)
    widens = is_slow or type(weight) is Int4Weight
    most = native.MAX_CPU_ROWS if widens else native.MAX_ROWS
    # 8-bit weights, unless x's dtype is slow: each row gets the same result as it would alone
    always = type(weight) is Int8Weight and not is_slow
    if rows >= 1 and (rows <= most or always):
        if choose_compiled("eager", x, weight, bias) == "native":
            return "native"
    return "widened" if widens and rows > native.MAX_ROWS else "eager"


@torch.compiler.assume_constant_result
def multiplies_slowly(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's products in this dtype are far slower on this device than those in float32:
    so on a CPU for which MKLDNN has no products in half precision."""
    return device.type == "cpu" and dtype in _ASKS_MKLDNN and not _has_products(dtype)


_ASKS_MKLDNN = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@functools.cache
def _has_products(dtype):
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, _ASKS_MKLDNN[dtype])()


@reference.outside_autocast
def eager_linear(x, weight, bias=None):
    """``F.linear``; a wider bias is added in its own dtype, then rounded. Quantised weights are
    multiplied out first: the sum of their unscaled values times x may overflow float16."""
    if type(weight) in QUANTIZED:
        return reference.linear(x, weight, bias)
    if bias is None or bias.dtype == x.dtype:
        return F.linear(x, weight, bias)
    return (F.linear(x, weight).to(bias.dtype) + bias).to(x.dtype)


@reference.outside_autocast
def widened_linear(x, weight, bias=None):
    """Products in float32 with a part of the weights at a time, in one buffer."""
    outputs, dtype = weight.shape[0], reference.accumulation_dtype(x)
    y, wide = x.new_empty(x.shape[0], outputs), x.to(dtype)
    columns = weight.values.shape[1] * 2 if type(weight) is Int4Weight else x.shape[1]
    buffer = x.new_empty(min(outputs, _OUTPUTS_AT_ONCE), columns, dtype=dtype)
    for start in range(0, outputs, _OUTPUTS_AT_ONCE):
        part = slice(start, start + _OUTPUTS_AT_ONCE)
        product = wide @ _widened(weight, part, buffer).t()
        if type(weight) is Int8Weight:
            product *= weight.scale[part]
        y[:, part] = product if bias is None else product.add_(bias[part])
    return y


def _widened(weight, part, buffer):
    """Rows of weights, widened into the buffer; 8-bit weights without their scale."""
    if type(weight) is Int4Weight:
        values, scale = reference.int4_values(weight.values[part]), weight.scale[part]
        rows = buffer[: len(values)]
        torch.mul(values, scale[..., None].to(rows.dtype), out=rows.view(values.shape))
        return rows[:, : weight.inputs]
    values = (weight.values if type(weight) is Int8Weight else weight)[part]
    return buffer[: len(values)].copy_(values)
