"""Shared-key attention by device time: against its floor, FlexAttention and flash-attn.

Shapes are those of a layer of the 1.6B model: 16 query heads, 1 key head, 16 value heads of 128, a
window of 2049 keys. Peers run once with the key head expanded with stride 0 and once copied to all
heads, as a model without shared keys has it. On a GPU every call is a CUDA graph of several runs.
Before anything is timed, values and gradients are compared with float64 on the device.

    floor   forward, training: products of visible pairs over the measured rate of a large product
            decode: the visible rows of the cache, read once, over the measured copy rate;
            step-int8 is the same step over a cache of 8-bit values
"""

import functools
import math

import torch

from rodimus_kernels import (
    int8_row_bytes,
    native,
    ring_parts,
    shared_key_attention,
    shared_key_attention_step,
    write_ring,
)
from rodimus_kernels.testing import relative_error

from . import operators, records, sizes
from .operators import Call

HEADS = 16
PEERS = ("flex", "flash", "sdpa")

# what, batch, length (of the sequence, or of the ring), head dimension, window
POINTS = {
    "tiny": [
        ("forward", 1, 70, 16, 33),
        ("training", 1, 70, 16, 33),
        ("decode", 2, 40, 16, 33),
    ],
    # the kernels are for GPUs; on a CPU the torch forms run
    "cpu": [],
    "cuda": [
        *((what, 8, 4096, 128, 2049) for what in ("forward", "training")),
        *((what, 1, 32768, 128, 2049) for what in ("forward", "training")),
        *(("decode", batch, 2112, 128, 2049) for batch in (1, 8, 64, 256)),
    ],
}


def flops(what: str, batch: int, length: int, dim: int, window: int) -> int:
    """Forward: two products per pair. Backward: five, one of which repeats one of the forward's."""
    products = {"forward": 2, "training": 7}[what]
    return products * 2 * dim * HEADS * batch * sizes.visible_pairs(length, window)


def make_inputs(batch, length, dim, device, dtype):
    """``(q, k, v, do)`` of a sequence."""
    shapes = ((HEADS, dim), (1, dim), (HEADS, dim), (HEADS, dim))
    return [torch.randn(batch, length, *shape, device=device, dtype=dtype) for shape in shapes]


def gradients(function, tensors):
    """Output and gradients of one run."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, tensors[3].to(o.dtype))]


def check(impl: str, dim: int, window: int, device, dtype) -> float:
    """Largest relative error of an output or gradient, at a length past the window."""
    tensors = make_inputs(1, window + 150, dim, device, dtype)
    attend = functools.partial(shared_key_attention, window_size=window)
    actual = gradients(functools.partial(attend, impl=impl), tensors)
    exact = gradients(functools.partial(attend, impl="sdpa"), [x.double() for x in tensors])
    error = max(relative_error(a, e) for a, e in zip(actual, exact, strict=True))
    assert error <= operators.LIMITS[dtype], f"{impl}: relative error {error:.1e}"
    return error


def sequence_call(what, function, tensors, flops=None) -> Call:
    """Forward alone, or forward and all gradients."""
    if what == "training":
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        train = lambda: torch.autograd.grad(function(*leaves), leaves, tensors[3])
        return Call(train, flops=flops)

    def infer():
        with torch.no_grad():
            function(*tensors[:3])

    return Call(infer, flops=flops)


def repeated(function):
    """The same attention over a key head that is copied to all heads first."""
    return lambda q, k, v: function(q, k.repeat(1, 1, HEADS, 1), v)


def sequence_calls(what, tensors, window, impl, flops) -> dict[str, Call]:
    """Ours, and each peer once with the key expanded and once with it copied."""
    attend = functools.partial(shared_key_attention, window_size=window)
    found = {}
    for name in (impl, *(peer for peer in PEERS if peer != impl)):
        function = functools.partial(attend, impl=name)
        found[f"{name}/expanded"] = sequence_call(what, function, tensors, flops)
        if name != impl:
            copied = repeated(function)
            found[f"{name}/repeated"] = sequence_call(what, copied, tensors, flops)
    return found


def decode_calls(batch, rows, dim, window, impl, device, dtype) -> dict[str, Call]:
    """One token over a full window, with plain and with 8-bit values."""
    compiled = device.type == "cuda" and native.is_available("cuda")
    names = dict.fromkeys((impl, *(("native",) if compiled else ()), "reference"))
    found = {}
    for label, int8 in (("step", False), ("step-int8", True)):
        caches = rings(batch, rows, dim, device, dtype, int8=int8)
        q, k, v, _ = make_inputs(batch, 1, dim, device, dtype)
        position = torch.full((batch,), 3 * rows + 7, device=device)
        row_bytes = caches[0].shape[-1] * caches[0].element_size()
        step = functools.partial(shared_key_attention_step, window_size=window)
        calls = {
            name: functools.partial(run_steps, step, (q, k, v), caches, position, name)
            for name in names
        }
        exact = calls["reference"]()[0].double()
        for name, call in calls.items():
            assert relative_error(call()[0], exact) <= operators.LIMITS[dtype], f"{label}/{name}"
            found[f"{label}/{name}"] = Call(call, batch * window * row_bytes, len(caches))
    return found


def run_steps(step, tokens, caches, position, impl):
    """The same token against each cache."""
    return [step(*tokens, cache, position, impl=impl) for cache in caches]


def rings(batch, rows, dim, device, dtype, *, int8) -> list[torch.Tensor]:
    """Full ring caches, to be used in turn."""
    heads, like = (1, dim, HEADS, dim), {"device": device, "dtype": dtype}
    shape = (batch, rows, (1 + HEADS) * dim)
    if int8:
        shape = (batch, rows, int8_row_bytes(*heads, dtype))
    kind = torch.uint8 if int8 else dtype
    count = operators.rotated(math.prod(shape) * kind.itemsize)
    caches = [torch.zeros(shape, dtype=kind, device=device) for _ in range(count)]
    k, v = (torch.randn(batch, rows, n, dim, **like) for n in (1, HEADS))
    for cache in caches:
        write_ring(ring_parts(cache, *heads, dtype), ..., k, v)
    return caches


def calls_of(point, bench, impl) -> tuple[dict[str, Call], float | None]:
    """The calls to time at a point, by name, and the error that was found before timing."""
    what, batch, length, dim, window = point
    device, dtype = bench.device, bench.dtype
    if what == "decode":
        return decode_calls(batch, length, dim, window, impl, device, dtype), None
    # torch compiles FlexAttention for each shape, and stops compiling a function after eight
    torch.compiler.reset()
    error = check(impl, dim, window, device, dtype)
    tensors = make_inputs(batch, length, dim, device, dtype)
    products = flops(what, batch, length, dim, window)
    return sequence_calls(what, tensors, window, impl, products), error


def test_attention(bench, benchmark, start, point):
    what, batch, length, dim, window = point
    on_gpu = bench.device.type == "cuda"
    case = bench.case(batch, length)
    start(f"attention-{what}", case)
    impl = "triton" if on_gpu else "reference" if what == "decode" else "sdpa"
    calls, error = calls_of(point, bench, impl)
    rows, rounds = operators.measure(bench, benchmark, calls)
    settings = {
        "batch": batch,
        "context": length,
        "heads": HEADS,
        "head_dim": dim,
        "window": window,
        "largest_error": error,
        **rounds,
    }
    record = bench.record(f"attention-{what}", case, settings, rows)
    assert records.measured(record)
