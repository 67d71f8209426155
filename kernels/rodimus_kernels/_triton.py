"""Helpers of Triton implementations with two callers or more."""

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors; fixed when triton is imported."""

# Triton 3.10 turns this off by default; kernels are tested with it
FP_FUSION = {"enable_fp_fusion": True}

# below this ln(1 + e^x) = e^x (1 - e^x / 2 + ...) to fp32, and sigmoid(x) / softplus(x) = 1
_FAR = tl.constexpr(-20.0)

_assumed_capability: int | None = None


def capability(x: torch.Tensor) -> int:
    """Compute capability of the tensor's device, times ten: 80, 90, 100; 0 without a GPU."""
    if _assumed_capability is not None:
        return _assumed_capability
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


@contextlib.contextmanager
def assume_capability(value: int):
    """Launch as if on such a device: for compilation without one, and for the interpreter."""
    global _assumed_capability
    _assumed_capability, before = value, _assumed_capability
    try:
        yield
    finally:
        _assumed_capability = before


def implement(operator: str) -> Callable[[Callable], None]:
    """Register an implementation of ``rodimus::operator`` that launches on its tensors' device.

    Triton launches on the current device, which need not be the one the tensors are on.
    """

    def register(function):
        @functools.wraps(function)
        def guarded(first, *args):
            guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
            with guard:
                return function(first, *args)

        torch.library.impl(f"rodimus::{operator}", "CompositeExplicitAutograd", guarded)

    return register


def check_runs_here(operator: str, *tensors: torch.Tensor) -> None:
    """Raise ValueError unless the tensors are where Triton can run and of a dtype it takes."""
    for tensor in tensors:
        if not (tensor.is_cuda or INTERPRETED):
            raise ValueError(
                f"{operator}: Triton expects CUDA tensors (or TRITON_INTERPRET=1),"
                f" got {tensor.device}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{operator}: Triton takes float32, bfloat16 and float16, got {tensor.dtype}"
            )


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself where its last dimension is dense, else a copy where it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def divisor_tile(size: int, limit: int) -> int:
    """The largest power of two up to ``limit`` that divides ``size``."""
    return min(size & -size, limit)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b in fp32. UPCAST: the interpreter multiplies bf16 operands wrongly."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def softplus_terms(b_x):
    """``(softplus, log softplus, sigmoid, sigmoid / softplus)`` of fp32 pre-activations."""
    small = tl.exp(-tl.abs(b_x))
    # log(1 + small) loses the small part: the correction of the rounding restores it
    one_plus = 1.0 + small
    lost = one_plus == 1.0
    ratio = small / tl.where(lost, 1.0, one_plus - 1.0)
    softplus = tl.maximum(b_x, 0.0) + tl.where(lost, small, tl.log(one_plus) * ratio)
    sigmoid = tl.sigmoid(b_x)
    far = b_x < _FAR
    safe = tl.where(far, 1.0, softplus)
    log_softplus = tl.where(far, b_x - 0.5 * tl.exp(tl.where(far, b_x, _FAR)), tl.log(safe))
    return softplus, log_softplus, sigmoid, tl.where(far, 1.0, sigmoid / safe)


@triton.jit
def tempered_gates(b_select, b_temper):
    """``(softplus(select) ** tau, log_decay)``: how much of a unit key is written, what stays."""
    softplus, log_softplus, _, _ = softplus_terms(b_select)
    tau = tl.sigmoid(b_temper)
    return tl.exp(tau * log_softplus), -softplus * tau


@triton.jit
def tempered_gate_gradients(b_dk, b_dg, b_unit, b_select, b_temper):
    """Gradients of the unit key, select and temper, from those of the written key and log_decay."""
    softplus, log_softplus, sigmoid, ratio = softplus_terms(b_select)
    tau = tl.sigmoid(b_temper)
    b_dunit = b_dk * tl.exp(tau * log_softplus)
    through_log = b_dunit * b_unit
    b_ds = through_log * tau * ratio - b_dg * tau * sigmoid
    # sigmoid(-x) rather than 1 - tau, which is 0 long before it should be
    b_dt = (through_log * log_softplus - b_dg * softplus) * tau * tl.sigmoid(-b_temper)
    return b_dunit, b_ds, b_dt
