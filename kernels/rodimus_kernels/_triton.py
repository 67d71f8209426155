"""Helpers that two or more Triton implementations share."""

import contextlib
import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ._schemas import refuse_forward_mode

INTERPRETED = triton.knobs.runtime.interpret
"""Kernels run in Triton's interpreter, on CPU tensors; fixed when triton is imported."""

if INTERPRETED:
    from ._triton_interpreter import round_as_a_gpu

    round_as_a_gpu()

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)

# Triton 3.10 turns this off by default; the kernels are tested with it on
FP_FUSION = {"enable_fp_fusion": True}

# most programs along the second and third axis (CUDA programming guide, technical specifications)
_GRID_LIMIT = 65_535

_assumed_capability = 0


def capability(x: torch.Tensor) -> int:
    """Compute capability of the tensor's device, times ten: 80, 86, 90, 100; of one that is no GPU,
    what is assumed, else 0. 86 stands for GA10x Ampere, Ada and workstation Blackwell together
    (8.6, 8.9, 12.x), where a thread block has 99 KiB of shared memory instead of 163."""
    if not x.is_cuda:
        return _assumed_capability
    major, minor = torch.cuda.get_device_capability(x.device)
    if major >= 12 or (major == 8 and minor in (6, 9)):
        return 86
    return 80 if major == 8 else 10 * major + minor


@contextlib.contextmanager
def assume_capability(value: int):
    """Launch what is on no GPU as if on such a device: for compiling, and for the interpreter. On a
    GPU kernels are compiled for it, and the tiles of another may be ones that break on it."""
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
    """Raise ValueError unless Triton takes the tensors' devices and dtypes, and no forward-mode
    differentiation is active."""
    refuse_forward_mode(operator)
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


def check_grid(operator: str, what: str, programs: int) -> None:
    """Raise ValueError if a launch has more programs along the second or third axis of its grid
    than a GPU allows there; the first axis takes ``2^31 - 1``."""
    if programs > _GRID_LIMIT:
        raise ValueError(
            f"{operator}: expected at most {_GRID_LIMIT} {what} in a call, got {programs}"
        )


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its last dimension is dense, else a dense copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def near_tokens(x: torch.Tensor) -> torch.Tensor:
    """:func:`unit_stride` for a kernel with tiles of up to 128 tokens of ``[B, T, ...]``. It also
    copies x if its tokens are so far apart that offsets within a tile exceed 2^31: 64-bit offsets
    take registers, and with them attention's backward spills on sm_80."""
    x = unit_stride(x)
    return x if x.stride(1) < 2**31 // 128 else x.contiguous()


def as_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """``x`` as rows of unit stride ``[N, D]``; a slice of a projection is not copied."""
    if x is None:
        return None
    # not reshape(-1, D): -1 would be ambiguous for D = 0
    return unit_stride(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def strides(*tensors: torch.Tensor) -> list[int]:
    """Strides of the first three dimensions of each: batch, time and head."""
    return [stride for x in tensors for stride in x.stride()[:3]]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 in the interpreter, where nothing runs in parallel."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_block(dim: int) -> int:
    """Size of a block that holds a dimension: a power of two, and 1 for a dimension of 0."""
    return triton.next_power_of_2(max(dim, 1))


def block_dim(dim: int) -> int:
    """Size of a tile that holds a dimension multiplied on tensor cores: a power of two, at least
    16."""
    return max(row_block(dim), 16)


def divisor_tile(size: int, limit: int) -> int:
    """The largest power of two up to ``limit``, itself a power of two, that divides ``size``."""
    return math.gcd(size, limit)


@triton.jit
def sequence_tokens(i_n, bounds, T):
    """Row of the batch, first token and end of a sequence: packed sequences (with ``bounds``) share
    row 0, others are rows of T tokens."""
    if bounds is None:
        start = i_n * 0
        return i_n, start, start + T
    else:
        start = tl.load(bounds + i_n).to(tl.int64)
        return i_n * 0, start, tl.load(bounds + i_n + 1).to(tl.int64)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32, ``a`` rounded to b's dtype."""
    return tl.dot(a.to(b.dtype), b, acc=acc, input_precision=PRECISION)


@triton.jit
def exp2(x):
    """``2 ** x`` of fp32, with results below 2 ** -126 flushed to zero: this is one instruction,
    and keeping denormal results would take four."""
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def settle(x):
    """fp32 x unchanged. Without this, Triton repeats the whole computation of an operand of
    ``mma.sync``, from the loads on, in each warp that multiplies it."""
    if _INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1
        )


@triton.jit
def reciprocal(x):
    """``1 / x`` of fp32 within 1 ulp, for x between 2 ** -126 and 2 ** 126; zero beyond."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def softplus_terms(b_x):
    """``(softplus, log softplus, sigmoid, sigmoid / softplus)`` of fp32 pre-activations.

    With s = exp(-|x|), softplus(x) = max(x, 0) + s r with r = log(1 + s) / s, between ln 2 and 1.
    All four follow from r without a difference or a quotient that underflows, however large |x| is.
    """
    small = exp2(-tl.abs(b_x) * LOG2_E)
    # log(1 + s) = 2 atanh(z) with z = s / (2 + s) <= 1/3: the next term is below 2e-8 of the sum
    half = reciprocal(2.0 + small)
    w = small * half
    w *= w
    series = 1.0 / 13.0 + w * (1.0 / 15.0)
    series = 1.0 / 11.0 + w * series
    series = 1.0 / 9.0 + w * series
    series = 1.0 / 7.0 + w * series
    series = 1.0 / 5.0 + w * series
    series = 1.0 / 3.0 + w * series
    r = 2.0 * half * (1.0 + w * series)
    negative = b_x < 0
    softplus = tl.maximum(b_x, 0.0) + small * r
    # r where x < 0, else softplus: never below ln 2
    whole = tl.where(negative, r, softplus)
    log_softplus = tl.minimum(b_x, 0.0) + tl.log(whole)
    inverse = reciprocal(1.0 + small)
    sigmoid = tl.where(negative, small * inverse, inverse)
    return softplus, log_softplus, sigmoid, inverse * reciprocal(whole)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))`` of fp32, zero below 2 ** -126: a smallest value instead of zero would
    matter again in a product with a very large number."""
    return reciprocal(1.0 + exp2(-x * LOG2_E))


@triton.jit
def tempered_gates(b_select, b_temper):
    """``(softplus(select) ** tau, log_decay)``: how much of a unit key is written, what stays."""
    softplus, log_softplus, _, _ = softplus_terms(b_select)
    tau = sigmoid(b_temper)
    return exp2(tau * log_softplus * LOG2_E), -softplus * tau


@triton.jit
def tempered_gate_gradients(b_dk, b_dg, b_unit, b_select, b_temper):
    """Gradients of the unit key, select and temper, from those of the written key and log_decay."""
    softplus, log_softplus, slope, ratio = softplus_terms(b_select)
    tau = sigmoid(b_temper)
    b_dunit = b_dk * exp2(tau * log_softplus * LOG2_E)
    through_log = b_dunit * b_unit
    b_ds = through_log * tau * ratio - b_dg * tau * slope
    # sigmoid(-x) rather than 1 - tau, which is 0 long before it should be
    b_dt = (through_log * log_softplus - b_dg * softplus) * tau * sigmoid(-b_temper)
    return b_dunit, b_ds, b_dt
