"""DDTS: every implementation against the token loop in float64, values and gradients."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from rodimus_kernels import ddts, ddts_gates, ddts_step, reference
from rodimus_kernels.ddts import api
from rodimus_kernels.testing import (
    REGIMES,
    DdtsCase,
    assert_close,
    ddts_inputs,
    relative_error,
    run_ddts,
)

# float32 against float64 over 150 tokens: measured at most 7e-7 (log_decay at -20 a token)
LIMIT = 2e-6
PACKED = {
    "inside a chunk": (37, 63, 50),
    "on a chunk edge": (64, 64, 22),
    "empty ones": (0, 40, 0, 0, 100, 10, 0),
    "single tokens": (1, 1, 1, 1, 70),
}


def truth(inputs):
    return run_ddts(reference.ddts, inputs, dtype=torch.float64)


def check(case, impl, limit=LIMIT, **options):
    inputs = ddts_inputs(case)
    assert_close(run_ddts(ddts, inputs, impl=impl, **options), truth(inputs), limit)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_matches_the_float64_recurrence(impl, regime):
    check(DdtsCase(2, 150, 1, 32, 48, regime), impl)


@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 150])
def test_any_length(length):
    check(DdtsCase(2, length, 2, 16, 16), "eager")


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("documents", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_packed_documents(impl, documents, states):
    case = DdtsCase(1, sum(documents), 2, 16, 16, states=states, documents=documents)
    inputs = ddts_inputs(case)
    pieces = []
    bounds = inputs.cu_seqlens.tolist()
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        if start < stop:
            one = (x[:, start:stop].double() for x in inputs[:4])
            n = bounds.index(stop) - 1
            h0 = inputs.initial_state[n : n + 1] if states else None
            pieces.append(reference.ddts(*one, initial_state=h0)[0])
    actual = run_ddts(ddts, inputs, impl=impl)
    assert relative_error(actual["o"], torch.cat(pieces, dim=1)) <= LIMIT
    assert_close(actual, truth(inputs), LIMIT)


def test_an_empty_document_keeps_its_state():
    inputs = ddts_inputs(DdtsCase(1, 10, 1, 16, 16, documents=(0, 10, 0)))
    for impl in api.IMPLS:
        if impl.startswith("triton"):
            continue
        final = run_ddts(ddts, inputs, impl=impl)["final_state"]
        assert torch.equal(final[0], inputs.initial_state[0])
        assert torch.equal(final[2], inputs.initial_state[2])


@pytest.mark.parametrize("split", [1, 40, 64, 99])
def test_split_run_equals_whole_run(split):
    inputs = ddts_inputs(DdtsCase(2, 100, 2, 16, 16, "mixed"))
    h0, x = inputs.initial_state, inputs[:4]
    whole, final = ddts(*x, initial_state=h0, output_final_state=True)
    first, h1 = ddts(*(t[:, :split] for t in x), initial_state=h0, output_final_state=True)
    second, h2 = ddts(*(t[:, split:] for t in x), initial_state=h1, output_final_state=True)
    assert relative_error(torch.cat((first, second), 1), whole) < 1e-6
    assert relative_error(h2, final) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_steps_equal_the_sequence(impl):
    inputs = ddts_inputs(DdtsCase(2, 70, 2, 16, 32, "mixed"))
    o, final = ddts(*inputs[:4], initial_state=inputs.initial_state, output_final_state=True)
    state = inputs.initial_state.clone()
    steps = [ddts_step(*(x[:, t] for x in inputs[:4]), state, impl=impl) for t in range(70)]
    assert relative_error(torch.stack(steps, dim=1), o) < 1e-6
    assert relative_error(state, final) < 1e-6


def test_step_writes_in_place_and_keeps_no_graph():
    inputs = ddts_inputs(DdtsCase(2, 1))
    state = inputs.initial_state.clone()
    pointer = state.data_ptr()
    o = ddts_step(inputs.q[:, 0].requires_grad_(), *(x[:, 0] for x in inputs[1:4]), state)
    assert state.data_ptr() == pointer and not torch.equal(state, inputs.initial_state)
    assert not o.requires_grad


def test_rows_of_a_batch_do_not_depend_on_each_other():
    inputs = ddts_inputs(DdtsCase(3, 70))
    whole, _ = ddts(*inputs[:4], initial_state=inputs.initial_state)
    alone, _ = ddts(*(x[1:2] for x in inputs[:4]), initial_state=inputs.initial_state[1:2])
    assert torch.equal(whole[1:2], alone)


def test_strided_inputs():
    inputs = ddts_inputs(DdtsCase(2, 70, 1, 16, 32))
    wide = torch.cat((inputs.v, inputs.v + 1), dim=-1)
    strided = inputs._replace(v=wide[..., :32], q=inputs.q.transpose(1, 2).clone().transpose(1, 2))
    assert not strided.v.is_contiguous()
    for impl in ("reference", "eager"):
        assert_close(run_ddts(ddts, strided, impl=impl), truth(inputs), LIMIT)


def test_half_precision_inputs_keep_a_float32_state():
    inputs = ddts_inputs(DdtsCase(2, 70, dtype=torch.bfloat16))
    exact = reference.ddts(
        *(x.double() for x in inputs[:4]),
        initial_state=inputs.initial_state.double(),
        output_final_state=True,
    )
    o, final = ddts(*inputs[:4], initial_state=inputs.initial_state, output_final_state=True)
    assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert relative_error(final, exact[1]) < 1e-6
    # one rounding of the output to 8 bits
    assert relative_error(o, exact[0]) < 3e-3


def test_gradcheck():
    inputs = ddts_inputs(DdtsCase(1, 9, 2, 4, 3, dtype=torch.float64))
    leaves = [x.requires_grad_() for x in inputs[:5]]

    def function(*x):
        return ddts(*x[:4], initial_state=x[4], output_final_state=True, impl="eager")

    assert torch.autograd.gradcheck(function, leaves)


def test_gradient_of_one_output_alone():
    inputs = ddts_inputs(DdtsCase(1, 70))
    for index in (0, 1):
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:4]]
        exact = [x.detach().double().requires_grad_() for x in inputs[:4]]
        ddts(*leaves, output_final_state=True, impl="eager")[index].sum().backward()
        reference.ddts(*exact, output_final_state=True)[index].sum().backward()
        for a, b in zip(leaves, exact, strict=True):
            grad = torch.zeros_like(b) if b.grad is None else b.grad
            assert relative_error(torch.zeros_like(a) if a.grad is None else a.grad, grad) < LIMIT


# ------------------------------------------------------------------------------------------ gates


def exact_gates(k, select, temper, eps):
    """The definition, with the logarithm taken before anything underflows."""
    norm = k.norm(dim=-1, keepdim=True).clamp_min(eps)
    soft = torch.logaddexp(select, torch.zeros_like(select))
    return k / norm * soft ** temper.sigmoid(), -soft * temper.sigmoid()


def test_gates_match_their_definition():
    x = [torch.randn(3, 5, 2, 16, dtype=torch.float64) for _ in range(3)]
    for actual, exact in zip(ddts_gates(*x), exact_gates(*x, 1e-12), strict=True):
        assert relative_error(actual, exact) < 1e-14
    single = ddts_gates(*(t.float() for t in x))
    for actual, exact in zip(single, exact_gates(*x, 1e-12), strict=True):
        assert actual.dtype == torch.float32 and relative_error(actual, exact) < 1e-6


@pytest.mark.parametrize("size", [100.0, 1e4, 1e30])
def test_gates_stay_finite_for_any_preactivation(size):
    edges = torch.tensor([-size, -20.0, -1.0, 0.0, 1.0, 20.0, size])
    select, temper = torch.meshgrid(edges, edges, indexing="ij")
    leaves = [x.reshape(1, -1).clone().requires_grad_() for x in (select, select, temper)]
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    k, log_decay = ddts_gates(*leaves)
    assert torch.isfinite(k).all() and torch.isfinite(log_decay).all() and (log_decay <= 0).all()
    (k.sum() + (log_decay / size).sum()).backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


def test_gate_gradients_at_plus_minus_100():
    edges = torch.tensor([-100.0, -30.0, -20.5, -19.5, -5.0, 0.3, 5.0, 25.0, 100.0])
    select, temper = (x.reshape(-1, 1) for x in torch.meshgrid(edges, edges, indexing="ij"))
    leaves = [x.clone().requires_grad_() for x in (torch.ones_like(select), select, temper)]
    k, log_decay = ddts_gates(*leaves)
    (k.sum() + log_decay.sum()).backward()
    # closed form in float64: s^tau = exp(tau ln s), ln s = a - e^a / 2 for a << 0
    a, b = select.double(), temper.double()
    tau = b.sigmoid()
    s = torch.where(a < -30, a.exp(), F.softplus(a.clamp_min(-40), threshold=50))
    log_s = torch.where(a < -30, a, s.log())
    written = (tau * log_s).exp()
    ratio = torch.where(a < -30, torch.ones_like(a), a.sigmoid() / s)
    dselect = written * tau * ratio - tau * a.sigmoid()
    dtemper = (written * log_s - s) * tau * (1 - tau)
    assert relative_error(leaves[1].grad, dselect) < 1e-6
    assert relative_error(leaves[2].grad, dtemper) < 1e-6


def test_gates_gradcheck():
    leaves = [torch.randn(2, 3, 1, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(ddts_gates, leaves)


# ------------------------------------------------------------------- torch: compile, autocast, ops


def test_opcheck():
    inputs = ddts_inputs(DdtsCase(1, 70, 2, 16, 16))
    leaves = [x.requires_grad_() for x in inputs[:4]]
    arguments = (*leaves, 0.25, inputs.initial_state.requires_grad_(), True)
    torch.library.opcheck(torch.ops.rodimus.ddts_eager.default, arguments)


def test_compiles_without_a_break_for_any_length():
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(q, k, v, g):
        return ddts(q, k, v, g, impl="eager")[0] * 2

    for length in (65, 70, 130):
        x = ddts_inputs(DdtsCase(1, length, states=False))[:4]
        leaves = [t.requires_grad_() for t in x]
        compiled = torch.autograd.grad(function(*leaves).sum(), leaves)
        plain = torch.autograd.grad((ddts(*leaves, impl="eager")[0] * 2).sum(), leaves)
        for a, b in zip(compiled, plain, strict=True):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_autocast_changes_nothing(impl):
    inputs = ddts_inputs(DdtsCase(1, 70))
    plain = run_ddts(ddts, inputs, impl=impl)
    with_autocast = torch.autocast("cpu", dtype=torch.bfloat16)(ddts)
    cast = run_ddts(with_autocast, inputs, impl=impl)
    for name, x in plain.items():
        assert torch.equal(x, cast[name]), name


def test_activation_checkpointing_changes_nothing():
    inputs = ddts_inputs(DdtsCase(1, 70))
    checkpointed = lambda *a, **k: torch.utils.checkpoint.checkpoint(
        ddts, *a, use_reentrant=False, **k
    )
    plain, again = run_ddts(ddts, inputs), run_ddts(checkpointed, inputs)
    assert all(torch.equal(x, again[name]) for name, x in plain.items())


# ------------------------------------------------------------------------------ dispatch and errors


def bad_inputs():
    q = torch.zeros(2, 5, 1, 4)
    v = torch.zeros(2, 5, 1, 8)
    ok = {"q": q, "k": q, "v": v, "log_decay": q}
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    one = {name: x[:1] for name, x in ok.items()}
    yield "q must have shape", ok | {"q": q[0]}
    yield r"k must have shape \[2, 5, 1, 4\], got \(2, 4, 1, 4\)", ok | {"k": q[:, :4]}
    yield r"v must have shape \[2, 5, 1, V\]", ok | {"v": v[:, :4]}
    yield "log_decay must have shape", ok | {"log_decay": q[..., :3]}
    yield "v must be floating point, got torch.int64", ok | {"v": v.long()}
    yield "initial_state must have shape", ok | {"initial_state": torch.zeros(1, 1, 4, 8)}
    yield "expected B = 1, got B = 2", ok | {"cu_seqlens": bounds}
    yield "integers", one | {"cu_seqlens": bounds.float()}
    yield r"rise from 0 to T = 5, got \[0, 4\]", one | {"cu_seqlens": bounds.clamp(max=4)}
    yield "at least one token", {name: x[:, :0] for name, x in ok.items()}
    yield "unknown impl 'fast'", ok | {"impl": "fast"}
    yield "device of q", ok | {"v": v.to("meta")}


@pytest.mark.parametrize("message, arguments", list(bad_inputs()))
def test_bad_input_says_what_was_expected(message, arguments):
    with pytest.raises(ValueError, match=message):
        ddts(**arguments)


def test_bad_step_input_says_what_was_expected():
    q, state = torch.zeros(2, 1, 4), torch.zeros(2, 1, 4, 8)
    v = torch.zeros(2, 1, 8)
    with pytest.raises(ValueError, match=r"state must have shape \[2, 1, 4, 8\]"):
        ddts_step(q, q, v, q, state[..., :7])
    with pytest.raises(ValueError, match="state must be contiguous torch.float32, got strides"):
        ddts_step(q, q, v, q, state.transpose(2, 3).contiguous().transpose(2, 3))
    with pytest.raises(ValueError, match=r"got contiguous torch.bfloat16"):
        ddts_step(q, q, v, q, state.bfloat16())
    with pytest.raises(ValueError, match="temper must have shape"):
        ddts_gates(q, q, q[..., :3])


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, rodimus_kernels as r\n"
        "x = torch.zeros(1, 70, 1, 16)\n"
        "r.ddts(x, x, x, x)\n"
        "assert not any(m.startswith('triton.') for m in sys.modules)\n"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=path)


@pytest.mark.slow
def test_chunks_are_twenty_times_faster_than_the_loop():
    inputs = ddts_inputs(DdtsCase(1, 2048, 1, 64, 512, states=False))

    def processor_seconds(impl):
        start = time.process_time()
        run_ddts(ddts, inputs, impl=impl)
        return time.process_time() - start

    run_ddts(ddts, inputs, impl="eager")
    eager = min(processor_seconds("eager") for _ in range(3))
    assert processor_seconds("reference") > 20 * eager
