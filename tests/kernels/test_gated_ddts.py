"""DDTS from raw projections: gates inside the kernels, against gates and token loop in float64."""

import pytest
import torch

from rodimus_kernels import gated_ddts, reference
from rodimus_kernels.ddts.gated import _choose
from rodimus_kernels.testing import REGIMES, assert_close, gate_preactivations, relative_error
from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module

# as in test_ddts: float32 against float64; on a GPU a float32 product is three tf32 products
LIMIT = 2e-6 if DEVICE == "cpu" else 5e-6
IMPLS = ["reference", "separate", pytest.param("triton_chunk", marks=TRITON_MARKS)]
INSIDE = [pytest.param("triton_chunk", marks=TRITON_MARKS)]
EPS = 1e-5


def make(regime="random", batch=1, length=70, heads=1, key_dim=16, value_dim=16):
    """Raw projections as slices of one tensor, a state, and gradients of both outputs."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    keys = (batch, length, heads, key_dim)
    gates = gate_preactivations("random" if regime == "reset" else regime, keys, generator)
    if regime == "spike":
        # a spike writes a key as large as its decay: the rest would drown beside it
        gates = gates[0], torch.where(gates[0] > 100, -30.0, gates[1])
    wide = torch.cat((draw(*keys), draw(*keys), *gates), dim=-1)
    q, k, select, temper = wide.float().to(DEVICE).split(key_dim, dim=-1)
    v, do = (draw(batch, length, heads, value_dim).float().to(DEVICE) for _ in "ab")
    state, dstate = (draw(batch, heads, key_dim, value_dim).float().to(DEVICE) for _ in "ab")
    starts = None
    if regime == "reset":
        starts = torch.zeros(batch, length, dtype=torch.bool, device=DEVICE)
        starts[:, [t for t in (0, 13, 64) if t < length]] = True
    tensors = {"q": q, "k": k, "v": v, "select": select, "temper": temper, "initial_state": state}
    return tensors, starts, (do, 0.1 * dstate)


def run(function, tensors, seeds, dtype=None, **options):
    leaves = {n: x.detach().to(dtype or x.dtype).requires_grad_() for n, x in tensors.items()}
    outputs = function(**leaves, eps=EPS, output_final_state=True, **options)
    torch.autograd.backward(outputs, [d.to(o.dtype) for o, d in zip(outputs, seeds, strict=True)])
    named = dict(zip(("o", "final_state"), (x.detach() for x in outputs), strict=True))
    return {**named, **{f"d{name}": x.grad for name, x in leaves.items()}}


def token_loop(q, k, v, select, temper, *, eps, starts=None, **options):
    k, log_decay = reference.ddts_gates(k, select, temper, eps=eps)
    if starts is not None:
        log_decay = log_decay.masked_fill(starts[..., None, None], reference.RESET)
    return reference.ddts(q, k, v, log_decay, **options)


def check(case, impl, limit=LIMIT):
    tensors, starts, seeds = case
    exact = run(token_loop, tensors, seeds, torch.float64, starts=starts)
    if tensors["temper"].min() > 20:
        # 1 - sigmoid(30) keeps three digits in float64: the truth is not known
        del exact["dtemper"]
    assert_close(run(gated_ddts, tensors, seeds, impl=impl, starts=starts), exact, limit)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_gates_and_token_loop_in_float64(impl, regime):
    check(make(regime), impl)


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1},
        {"batch": 2, "length": 65, "heads": 2},
        {"length": 30, "key_dim": 64},
        pytest.param({"length": 30, "key_dim": 256}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", INSIDE)
def test_any_shape(impl, shape):
    check(make(**shape), impl)


@pytest.mark.parametrize("impl", INSIDE)
def test_short_and_zero_keys_have_the_gradient_of_a_constant_norm(impl):
    case = make(length=20)
    case[0]["k"][:, 3] *= 1e-6
    case[0]["k"][:, 5] = 0
    exact = run(token_loop, case[0], case[2], torch.float64)
    actual = run(gated_ddts, case[0], case[2], impl=impl)
    # their gradient is 1 / eps of the others': each row by itself
    for t in (0, 3, 4, 5, 19):
        assert_close({"dk": actual["dk"][:, t]}, {"dk": exact["dk"][:, t]}, 5e-6)


@pytest.mark.parametrize("impl", INSIDE)
def test_gradients_at_preactivations_of_plus_minus_100(impl):
    edges = torch.tensor([-100.0, -30.0, -20.5, -19.5, -5.0, 5.0, 25.0, 100.0], device=DEVICE)
    case = make(length=64)
    grid = torch.stack(torch.meshgrid(edges, edges, indexing="ij")).reshape(2, 1, 64, 1, 1)
    case[0]["select"], case[0]["temper"] = (x.expand(1, 64, 1, 16).clone() for x in grid)
    actual = run(gated_ddts, case[0], case[2], impl=impl)
    exact = run(token_loop, case[0], case[2], torch.float64)
    # selection by selection: the gradients of closed gates would drown beside those of open ones
    for rows in torch.arange(64, device=DEVICE).view(8, 8):
        names = ("dselect", "dtemper", "dk")
        assert_close(*({n: x[n][:, rows] for n in names} for x in (actual, exact)), 1e-5)


@pytest.mark.parametrize("impl", INSIDE)
def test_gradient_of_a_temperature_that_rounds_to_1(impl):
    tensors, _, seeds = make(length=20)
    # sigmoid(15) has two digits left of its distance from 1 in float32
    tensors["temper"] = torch.full_like(tensors["temper"], 15.0)
    exact = run(token_loop, tensors, seeds, torch.float64)["dtemper"]
    actual = run(gated_ddts, tensors, seeds, impl=impl)["dtemper"]
    assert_close({"dtemper": actual}, {"dtemper": exact}, LIMIT)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_row_of_starts_serves_all(impl):
    tensors, starts, seeds = make("reset", batch=2)
    every = run(gated_ddts, tensors, seeds, impl=impl, starts=starts)
    # what follows the row in memory is something else
    shared = torch.stack((starts[0], ~starts[0]))[:1]
    assert_close(run(gated_ddts, tensors, seeds, impl=impl, starts=shared), every, 1e-7)


@pytest.mark.parametrize("impl", INSIDE)
def test_keys_need_no_least_norm(impl):
    """With eps = 0 the rows behind the last token, of zeros, must not be divided by their norm."""
    tensors, *_ = make(length=65)
    named = {"eps": 0.0, "output_final_state": True}
    exact = token_loop(**{name: x.double() for name, x in tensors.items()}, **named)
    for actual, expected in zip(gated_ddts(**tensors, **named, impl=impl), exact, strict=True):
        assert relative_error(actual, expected) < LIMIT


@pytest.mark.parametrize("impl", IMPLS)
def test_any_preactivation_stays_finite(impl):
    case = make(length=49)
    edges = torch.tensor([-1e30, -1e4, -20.0, 0.0, 20.0, 1e4, 1e15], device=DEVICE)
    grid = torch.stack(torch.meshgrid(edges, edges, indexing="ij")).reshape(2, 1, 49, 1, 1)
    case[0]["select"], case[0]["temper"] = (x.expand(1, 49, 1, 16).clone() for x in grid)
    results = run(gated_ddts, case[0], case[2], impl=impl)
    assert all(torch.isfinite(x).all() for x in results.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_closed_gate_leaves_the_state_alone(impl):
    case, rest = make(length=40), make(length=30)
    for name, x in rest[0].items():
        if name != "initial_state":
            case[0][name][:, 10:] = x
    case[0]["select"][:, :10] = -1e30
    rest[0]["initial_state"] = case[0]["initial_state"]
    with torch.no_grad():
        padded, state = gated_ddts(**case[0], output_final_state=True, impl=impl)
        plain, alone = gated_ddts(**rest[0], output_final_state=True, impl=impl)
    assert_close({"o": padded[:, 10:], "state": state}, {"o": plain, "state": alone}, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("impl", INSIDE)
def test_half_precision_keys_with_float32_gates(impl, dtype):
    tensors, starts, seeds = make("mixed", length=100, value_dim=32)
    for name in "qkv":
        tensors[name] = tensors[name].to(dtype)
    actual = run(gated_ddts, tensors, seeds, impl=impl)
    assert actual["o"].dtype == actual["dk"].dtype == dtype
    assert actual["dselect"].dtype == torch.float32
    # a few roundings to 8 or 11 bits, each of half a unit at most
    exact = run(token_loop, tensors, seeds, torch.float64)
    assert_close(actual, exact, torch.finfo(dtype).eps)


def test_opcheck():
    triton_module("rodimus_kernels.ddts.triton_chunk")
    tensors, starts, _ = make("reset", batch=2, length=20)
    q, k, v, select, temper, h0 = (x.requires_grad_() for x in tensors.values())
    arguments = (q, k, v, select, temper, EPS, 0.25, h0, starts, None, True)
    torch.library.opcheck(torch.ops.rodimus.ddts_chunk.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_break(impl):
    torch.compiler.reset()
    # a few tokens of the loop over them, which is unrolled, and a chunk for the others
    tensors, starts, seeds = make("reset", batch=2, length=16 if impl == "reference" else 20)
    compiled = torch.compile(gated_ddts, fullgraph=True, backend="aot_eager")
    plain = run(gated_ddts, tensors, seeds, impl=impl, starts=starts[:1])
    assert_close(run(compiled, tensors, seeds, impl=impl, starts=starts[:1]), plain, 1e-6)


def test_automatic_choice():
    assert _choose("triton_chunk", torch.bfloat16, 64) == "triton_chunk"
    assert _choose("triton_chunk", torch.bfloat16, 256) == "separate"
    assert _choose("triton_chunk", torch.float32, 64) == "separate"
    assert _choose("triton_recurrent", torch.bfloat16, 64) == "separate"
    assert _choose("eager", torch.bfloat16, 64) == "separate"


def test_bad_input_says_what_was_expected():
    ok = {name: x for name, x in make(batch=2, length=5)[0].items() if name != "initial_state"}
    q, starts = ok["q"], torch.zeros(2, 5, dtype=torch.bool, device=DEVICE)
    for message, change in [
        ("q must have shape", {"q": q[0]}),
        (r"k must have shape \[2, 5, 1, 16\], got \(2, 4, 1, 16\)", {"k": q[:, :4]}),
        (r"v must have shape \[2, 5, 1, V\]", {"v": q[:1]}),
        ("select must have shape", {"select": q[..., :3]}),
        ("temper must have shape", {"temper": q[..., :3]}),
        ("temper must be floating point", {"temper": q.long()}),
        ("initial_state must have shape", {"initial_state": q}),
        (r"starts must have shape \[2, 5\], got \(2, 4\)", {"starts": starts[:, :4]}),
        ("starts must be torch.bool, got torch.int64", {"starts": starts.long()}),
        ("v must be on the device of q", {"v": ok["v"].to("meta")}),
        (
            "at least one channel, got K = 0",
            dict.fromkeys(("q", "k", "select", "temper"), q[..., :0]),
        ),
        ("unknown impl 'fast'", {"impl": "fast"}),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_ddts(**{**ok, **change})
    with pytest.raises(ValueError, match="at least one token"):
        gated_ddts(**{name: x[:, :0] for name, x in ok.items()})
