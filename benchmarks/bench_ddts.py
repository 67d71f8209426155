"""DDTS and what surrounds it in a layer, by device time: against bytes, and chunk_gla of fla.

Shapes are those of a layer of the 1.6B (V = 4096) and 4B (V = 6144) models. On a GPU every call is
a CUDA graph of several runs, so host time does not count, and its inputs, except those of the
gates, are several times as large as the cache. Before anything is timed, its values and gradients
are compared with float64 on the device.

    floor   bytes: each input read once, each output written once, over the measured copy rate
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch

from rodimus_kernels import ddts, ddts_step, native
from rodimus_kernels.testing import (
    DdtsCase,
    DdtsInputs,
    assert_close,
    ddts_inputs,
    relative_error,
    run_ddts,
)

from . import bench_fused, operators, records
from .bench_fused import Shape, size
from .harness import Bench
from .operators import Call

KEY_DIM = 64
SURROUNDINGS = ("short_conv", "input_gate", "ddts_gates", "gated_rms_norm")

# what, batch, length, V
POINTS = {
    "tiny": [
        *(("forward", 1, 70, 32), ("training", 1, 70, 32)),
        *(("surroundings", 1, 20, 32), ("step", 2, 1, 32)),
    ],
    # the kernels are for GPUs; on a CPU the torch forms run
    "cpu": [],
    "cuda": [
        *(("forward", 8, 4096, width) for width in (4096, 6144)),
        ("forward", 1, 32768, 4096),
        *(("training", 8, 4096, width) for width in (4096, 6144)),
        ("training", 1, 32768, 4096),
        ("surroundings", 8, 4096, 4096),
        *(("step", batch, 1, 4096) for batch in (1, 256)),
    ],
}


def check(case: DdtsCase, impl: str, device: torch.device) -> float:
    """Largest relative error of any output or gradient of the shape with 64 columns of V."""
    inputs = ddts_inputs(case, device=device)
    actual = run_ddts(ddts, inputs, impl=impl)
    exact = run_ddts(ddts, inputs, dtype=torch.float64, impl="eager")
    assert_close(actual, exact, operators.LIMITS[case.dtype])
    return max(relative_error(actual[name], exact[name]) for name in exact)


def make_inputs(case: DdtsCase, device: torch.device) -> DdtsInputs:
    """The case's inputs; values and gradients are large, so they are drawn on the device."""
    narrow = ddts_inputs(dataclasses.replace(case, value_dim=16), device=device)
    shape = (case.batch, case.length, case.heads, case.value_dim)
    v, do = (torch.randn(shape, device=device, dtype=case.dtype) for _ in range(2))
    return narrow._replace(v=v, do=do)


def forward(inputs: DdtsInputs, function: Callable) -> Call:
    """The forward pass without gradients."""
    x = inputs[:4]

    def call() -> None:
        with torch.no_grad():
            function(*x)

    return Call(call, size(*x, inputs.v))


def training(inputs: DdtsInputs, function: Callable) -> Call:
    """Forward and all gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]

    def call() -> None:
        torch.autograd.grad(function(*leaves)[0], leaves, inputs.do)

    # forward: inputs, o; backward: inputs, do, gradients
    return Call(call, 3 * size(*leaves) + 2 * size(inputs.do))


PASSES = {"forward": forward, "training": training}


def surroundings(
    bench: Bench, batch: int, length: int, width: int, impls: Sequence[str]
) -> tuple[dict[str, Call | str], float]:
    """Convolution, input gate, gates and the gated norm of a layer, forward; and the largest error
    of any of them against float64.

    Args:
        impls: The first is ours and must be correct; for others that are not, a reason is returned.
    """
    shape = Shape.of(bench.scale, batch, length)._replace(inner=width, keys=KEY_DIM)
    calls, largest = {}, 0.0
    for name in SURROUNDINGS:
        operator = bench_fused.make(name, shape, bench.device, bench.dtype)
        others = {impl: operator.ours(impl) for impl in impls[1:]}
        found, error = bench_fused.calls_of("forward", name, operator, impls[0], others)
        calls |= found
        largest = max(largest, error)
    return calls, largest


def step_calls(case: DdtsCase, device: torch.device) -> tuple[dict[str, Call], float]:
    """One token of each sequence, by implementation, with states that take turns; and the largest
    error of any of them against float64."""
    q, k, v, log_decay = (x[:, 0] for x in ddts_inputs(case, device=device)[:4])
    shape = (case.batch, 1, case.key_dim, case.value_dim)
    one = torch.randn(shape, device=device)
    count = operators.rotated(one.nbytes)
    states = [torch.randn_like(one) for _ in range(count)]
    impls = ("triton", "native") if device.type == "cuda" else ("eager", "native")
    impls = [impl for impl in impls if impl != "native" or native.is_available(device.type)]
    exact = one.double()
    o = ddts_step(*(x.double() for x in (q, k, v, log_decay)), exact, impl="reference")
    calls, error = {}, 0.0
    for impl in impls:
        state = one.clone()
        found = ddts_step(q, k, v, log_decay, state, impl=impl)
        assert relative_error(state, exact) <= operators.LIMITS[torch.float32], impl
        error = max(error, relative_error(found, o))
        step = functools.partial(ddts_step, q, k, v, log_decay, impl=impl)
        call = lambda step=step: [step(state) for state in states]
        calls[f"ddts_step/{impl}"] = Call(call, 2 * size(one) + size(q, k, v, log_decay, v), count)
    assert error <= operators.LIMITS[case.dtype], error
    return calls, error


def fla_forward(q, k, v, log_decay):
    """``chunk_gla`` of the installed flash-linear-attention."""
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, log_decay, scale=q.shape[-1] ** -0.5)


def calls_of(what: str, inputs: DdtsInputs, on_gpu: bool) -> dict[str, Call]:
    """The calls to time at a point, by name."""
    impl = "triton_chunk" if on_gpu else "eager"
    ours = functools.partial(ddts, impl=impl)
    return {
        f"ddts/{impl}": PASSES[what](inputs, ours),
        "chunk_gla/fla": PASSES[what](inputs, fla_forward),
    }


def test_ddts(bench, benchmark, start, point):
    what, batch, length, width = point
    on_gpu = bench.device.type == "cuda"
    name = f"{bench.case(batch, length)}-v{width}"
    start(f"ddts-{what}", name)
    case = DdtsCase(batch, length, 1, KEY_DIM, width, states=False, dtype=bench.dtype)
    if what == "step":
        calls, error = step_calls(case, bench.device)
    elif what == "surroundings":
        impls = ("triton", "reference") if on_gpu else ("reference",)
        calls, error = surroundings(bench, batch, length, width, impls)
    else:
        narrow = dataclasses.replace(case, value_dim=min(width, 64))
        error = check(narrow, "triton_chunk" if on_gpu else "eager", bench.device)
        calls = calls_of(what, make_inputs(case, bench.device), on_gpu)
    rows, rounds = operators.measure(bench, benchmark, calls)
    settings = {
        "batch": batch,
        "context": length,
        "key_dim": KEY_DIM,
        "value_dim": width,
        "largest_error": error,
        **rounds,
    }
    record = bench.record(f"ddts-{what}", name, settings, rows)
    assert records.measured(record)
