"""The native operators against the reference: every instruction set this processor has, odd sizes,
states in place, threads, neighbours, and when they are chosen."""

import pytest
import torch
import torch.nn.functional as F

import rodimus_kernels as rk
from rodimus_kernels import native, reference
from rodimus_kernels.testing import assert_within_budget, relative_error

ops = torch.ops.rodimus
PROBLEM = native.problem("cpu")
needs_library = pytest.mark.skipif(PROBLEM is not None, reason=f"native operators: {PROBLEM}")
# float32 against float64, sums of up to 2048 terms: measured at most 3.1e-7
LIMIT = 1e-6
DTYPES = [torch.float32, torch.bfloat16]


# Each maker returns (public operator, reference, arguments, named arguments, index of the state).


def ddts_step(dtype, B=2, H=1, K=5, V=7):
    q, k = torch.randn(2, B, H, K, dtype=dtype)
    v, state = torch.randn(B, H, V, dtype=dtype), torch.randn(B, H, K, V)
    arguments = [q, k, v, -2 * torch.rand(B, H, K), state]
    return rk.ddts_step, reference.ddts_step, arguments, {"scale": 0.3}, 4


def mixer_step(dtype, B=2, K=5, V=7, R=3):
    rows = [torch.randn(B, n, dtype=dtype) for n in (K, K, K, K, R, V, V, V)]
    rows[2:4] = (30 * torch.randn(2, B, K)).unbind(0)
    wide = ("gate_bias", "residual_weight", "norm_weight")
    named = {name: torch.randn(V, dtype=dtype) for name in wide}
    named |= {"gate_weight": torch.randn(V, R, dtype=dtype), "key_eps": 1e-5}
    arguments = [*rows, torch.randn(B, 1, K, V)]
    return rk.ddts_mixer_step, reference.ddts_mixer_step, arguments, named, 8


def conv_step(dtype, B=2, D=7, W=4):
    arguments = [torch.randn(B, D), torch.randn(B, D, W), torch.randn(D, W), torch.randn(D)]
    arguments = [x.to(dtype) for x in arguments]
    return rk.short_conv_step, reference.short_conv_step, arguments, {}, 1


def conv(dtype, B=2, T=5, D=7, W=4):
    shapes = (B, T, D), (D, W), (D,)
    arguments = [torch.randn(shape).to(dtype) for shape in shapes]
    named = {"initial_state": torch.randn(B, D, W).to(dtype)}
    first = lambda operator: lambda *given, **options: operator(*given, **options)[0]
    return first(rk.short_conv), first(reference.short_conv), arguments, named, None


def linear(dtype, M=2, N=5, K=7):
    arguments = [torch.randn(M, K), torch.randn(N, K), torch.randn(N)]
    return rk.linear, reference.linear, [x.to(dtype) for x in arguments], {}, None


def int8_linear(dtype, M=2, N=5, K=7):
    values = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    arguments = [torch.randn(M, K, dtype=dtype), values, 0.1 * torch.rand(N)]
    of = lambda operator: (
        lambda x, values, scale, bias, **named: operator(
            x, rk.Int8Weight(values, scale), bias, **named
        )
    )
    arguments += [torch.randn(N, dtype=dtype)]
    return of(rk.linear), of(reference.linear), arguments, {}, None


def int4_linear(dtype, M=2, N=5, K=7):
    units = -(-K // 128)
    values = torch.randint(0, 256, (N, 64 * units), dtype=torch.uint8)
    scale = (0.2 * torch.rand(N, 4 * units) - 0.1).bfloat16()
    of = lambda operator: (
        lambda x, values, scale, bias, **named: operator(
            x, rk.Int4Weight(values, scale, K), bias, **named
        )
    )
    arguments = [torch.randn(M, K, dtype=dtype), values, scale, torch.randn(N, dtype=dtype)]
    return of(rk.linear), of(reference.linear), arguments, {}, None


def rms_norm(dtype, N=2, D=7):
    arguments = [torch.randn(N, D), torch.randn(D, dtype=dtype)]
    return rk.rms_norm, reference.rms_norm, arguments, {"eps": 1e-3}, None


def add_rms_norm(dtype, N=2, D=7):
    arguments = [torch.randn(N, D, dtype=dtype), torch.randn(N, D), torch.randn(D, dtype=dtype)]
    return rk.add_rms_norm, reference.add_rms_norm, arguments, {}, None


def gated_rms_norm(dtype, N=2, D=7):
    x, gate, residual = torch.randn(3, N, D, dtype=dtype)
    arguments = [x, gate, torch.randn(D, dtype=dtype)]
    named = {"residual": residual, "residual_weight": torch.randn(D)}
    return rk.gated_rms_norm, reference.gated_rms_norm, arguments, named, None


def attention_step(dtype, B=2, T=3, H=4, heads=(2, 4), dims=(5, 6), ring=13, window=11, past=0):
    (Hk, Hv), (D, Dv) = heads, dims
    q, k, v = (torch.randn(B, T, *s, dtype=dtype) for s in ((H, D), (Hk, D), (Hv, Dv)))
    cache = torch.randn(B, ring, Hk * D + Hv * Dv, dtype=dtype)
    position = past + 2 * torch.arange(B)
    arguments = [q, k, v, cache, position]
    named = {"window_size": window}
    return rk.shared_key_attention_step, reference.shared_key_attention_step, arguments, named, 3


def int8_attention_step(dtype, *sizes, **named):
    """As ``attention_step``, with a ring of bytes; the truth has plain values, those that the bytes
    stand for."""
    operator, definition, arguments, named, state = attention_step(dtype, *sizes, **named)
    q, k, v, plain, position = arguments
    heads = (*k.shape[2:], *v.shape[2:])
    row = rk.int8_row_bytes(*heads, dtype)
    cache = torch.zeros(*plain.shape[:2], row, dtype=torch.uint8)
    rk.write_ring(
        rk.ring_parts(cache, *heads, dtype), ..., *rk.ring_parts(plain, *heads, dtype)[:2]
    )

    def attend(q, k, v, cache, position, **named):
        if q.dtype == dtype:
            return definition(q, k, v, cache, position, **named)
        # float64: keys and values are read from the bytes, those of the new tokens too
        values = reference.quantize_values(v.to(dtype))
        parts = rk.read_ring(rk.ring_parts(cache, *heads, dtype), q.dtype)
        ring = torch.cat([x.flatten(2) for x in parts], -1)
        o = definition(q, k, reference.dequantize_values(*values, q.dtype), ring, position, **named)
        new = (position[:, None] + torch.arange(q.shape[1])) % cache.shape[1]
        at = (torch.arange(len(new))[:, None], new)
        rk.write_ring(rk.ring_parts(cache, *heads, dtype), at, k.to(dtype), v.to(dtype))
        return o

    return operator, attend, [q, k, v, cache, position], named, state


SMALL = [
    *(ddts_step, mixer_step, conv_step, conv, linear, int8_linear, int4_linear),
    *(rms_norm, add_rms_norm, gated_rms_norm, attention_step, int8_attention_step),
]
FORMS = [
    *((maker, impl) for maker in SMALL for impl in ("native", "reference")),
    *((maker, "eager") for maker in (ddts_step, linear, int8_linear, int4_linear)),
    (int4_linear, "widened"),
    *((maker, "sdpa") for maker in (attention_step, int8_attention_step)),
]
CASES = {
    ddts_step: [(1, 1, 64, 4096), (3, 2, 19, 77), (2, 1, 300, 513), (1, 1, 1, 1)],
    mixer_step: [(1, 64, 2048, 32), (3, 19, 300, 17), (8, 300, 513, 300), (1, 1, 1, 1)],
    conv_step: [(1, 2048, 4), (3, 77, 4), (2, 300, 3), (1, 1, 1)],
    conv: [(1, 65, 2048, 4), (3, 5, 77, 4), (2, 130, 300, 3), (1, 1, 1, 1)],
    linear: [(1, 600, 2048), (8, 77, 131), (3, 5, 64), (5, 33, 32), (4, 9, 7), (7, 1, 1)]
    # the MLP's inner width, no whole number of vectors
    + [(1, 40, 2736)],
    rms_norm: [(1, 2048), (3, 77), (5, 300), (1, 1)],
    add_rms_norm: [(1, 2048), (3, 77), (5, 300)],
    gated_rms_norm: [(1, 2048), (3, 77), (5, 300)],
    attention_step: [
        (1, 1, 16, (1, 16), (128, 128), 576, 513, past) for past in (0, 300, 5 * 576 + 3)
    ]
    + [(2, 8, 6, (1, 3), (7, 300), 300, 280, past) for past in (0, 150, 5000)]
    + [(2, 3, 4, (2, 4), (300, 30), 35, 33, past) for past in (0, 31, 9000)]
    # more heads than are scored together, and seven keys that do not divide them
    + [(2, 2, 70, (7, 10), (24, 40), 900, 850, past) for past in (0, 4321)]
    + [(1, 1, 1, (1, 1), (1, 1), 1, 1, 5)],
}
CASES[int8_attention_step] = CASES[attention_step]
CASES[int8_linear] = CASES[linear]
CASES[int4_linear] = CASES[linear] + [(6, 70, 128), (3, 9, 129), (4, 40, 2048)]
PARAMETERS = [
    pytest.param(maker, size, id=f"{maker.__name__}-{'x'.join(map(str, size))}")
    for maker, sizes in CASES.items()
    for size in sizes
]
RESULTS = lambda x: x if isinstance(x, tuple) else (x,)


def cast(value, convert):
    """Numbers converted; positions and bytes only copied to where the numbers are."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return convert(value)
    return value.to(convert(torch.empty(0)).device, copy=True)


def run(function, case, convert=torch.clone, **options):
    """All results of a run on converted copies, the state it leaves among them."""
    _, _, arguments, named, state = case
    arguments = [cast(x, convert) for x in arguments]
    named = {name: cast(x, convert) for name, x in named.items()}
    results = RESULTS(function(*arguments, **named, **options))
    return results if state is None else (*results, arguments[state])


def check(case):
    check_results(run(case[0], case, impl="native"), case)


def check_results(results, case, limit=LIMIT):
    """float32 results to ``limit`` of the float64 truth, bfloat16 ones within the errors that the
    reference itself makes on the same inputs."""
    exact = run(case[1], case, torch.Tensor.double)
    baseline = run(case[1], case)
    for i, x in enumerate(results):
        assert x.shape == exact[i].shape and x.dtype == baseline[i].dtype
        if x.dtype == torch.uint8:
            assert torch.equal(x, exact[i]), f"result {i}"
        elif x.dtype == torch.float32:
            assert relative_error(x, exact[i]) <= limit, f"result {i}"
        else:
            assert_within_budget(f"result {i}", x, exact[i], baseline[i])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maker, size", PARAMETERS)
def test_matches_reference(isa, maker, size, dtype):
    check(maker(dtype, *size))


@needs_library
def test_halves_of_a_projection_and_leading_dimensions(isa):
    case = mixer_step(torch.bfloat16, 3, 16, 70, 8)
    for pair in ((0, 1), (2, 3), (5, 7)):
        halves = torch.cat([case[2][i] for i in pair], dim=-1).chunk(2, dim=-1)
        for i, half in zip(pair, halves, strict=True):
            case[2][i] = half
    copied = run(case[0], case, impl="native")
    in_place = case[2][8].clone()
    views = case[0](*case[2][:8], in_place, **case[3], impl="native")
    assert torch.equal(views, copied[0]) and torch.equal(in_place, copied[1])

    x = torch.randn(2, 3, 1, 2 * 40)
    weight = torch.randn(40)
    expected = rk.rms_norm(x[..., 40:].contiguous(), weight, impl="native")
    assert torch.equal(rk.rms_norm(x[..., 40:], weight, impl="native"), expected)
    assert relative_error(expected, reference.rms_norm(x[..., 40:], weight)) < LIMIT


def apart(x):
    """The same numbers, each two elements behind the one before it."""
    return torch.stack([x, x], -1)[..., 0]


@needs_library
@pytest.mark.parametrize("maker", SMALL)
def test_nothing_but_states_must_be_dense(maker):
    operator, _, arguments, named, state = case = maker(torch.float32)
    expected = run(operator, case, impl="native")
    arguments = [x.clone() if i == state else apart(x) for i, x in enumerate(arguments)]
    named = {n: apart(x) if isinstance(x, torch.Tensor) else x for n, x in named.items()}
    results = RESULTS(operator(*arguments, **named, impl="native"))
    results = results if state is None else (*results, arguments[state])
    assert all(map(torch.equal, results, expected))


@needs_library
def test_bias_may_be_absent_or_wider():
    for dtype in DTYPES:
        _, _, (x, weight, _), _, _ = linear(dtype, 3, 40, 100)
        wide = torch.randn(40)
        for bias in (None, wide):
            actual = rk.linear(x, weight, bias, impl="native")
            truth = F.linear(x.double(), weight.double(), None if bias is None else wide.double())
            assert actual.dtype == dtype
            assert relative_error(actual, truth) < (LIMIT if dtype == torch.float32 else 3e-3)
        case = conv_step(dtype, 2, 40)
        case[2].pop()
        check(case)


@needs_library
@pytest.mark.parametrize("impl", ["eager", "native", "reference"])
def test_every_linear_agrees(impl):
    for bias in (torch.randn(33), torch.randn(33, dtype=torch.bfloat16), None):
        x, weight = torch.randn(5, 70).bfloat16(), torch.randn(33, 70).bfloat16()
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert relative_error(rk.linear(x, weight, bias, impl=impl), exact) < 4e-3


@needs_library
@pytest.mark.parametrize("impl", ["auto", "eager", "native", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maker", [int8_linear, int4_linear])
def test_every_linear_of_quantized_weights_agrees(maker, dtype, impl):
    operator, definition, (x, values, scale, bias), *_ = maker(dtype, 5, 33, 70)
    for given in (bias, torch.randn(33), None):
        wide = None if given is None else given.double()
        exact = definition(x.double(), values, scale.double(), wide)
        y = operator(x, values, scale, given, impl=impl)
        assert y.dtype == dtype
        assert relative_error(y, exact) < (LIMIT if dtype == torch.float32 else 8e-3)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_than_the_native_form_takes_meet_8_bit_weights_in_it(dtype):
    """Each as it would alone."""
    operator, _, (x, values, scale, bias), *_ = int8_linear(dtype, 19, 33, 70)
    alone = [operator(row[None], values, scale, bias, impl="native") for row in x]
    assert torch.equal(operator(x, values, scale, bias), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_8_bit_weights_are_rounded_once(dtype):
    """After the scale, so that a sum which float16 cannot hold is no infinity."""
    x = (40 + torch.rand(2, 2048)).to(dtype)
    weight = rk.Int8Weight(torch.full((3, 2048), 127, dtype=torch.int8), torch.full((3,), 5e-4))
    exact = x.double() @ reference.dense_weight(weight).double().T
    y = rk.linear(x, weight, impl="eager")
    # half a unit in the last place, and terms of one sign summed in float32
    limit = torch.finfo(dtype).eps / 2 + 2048 * torch.finfo(torch.float32).eps / 2
    assert ((y - exact).abs() <= limit * exact).all()


@needs_library
def test_8_bit_weights_of_every_value(isa):
    """Each of the 256 at each place of a vector, in whole vectors and in the rest of a row."""
    for size in (1, 3, 64, 97):
        values = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(256, size).contiguous()
        y = rk.linear(torch.eye(8, size), rk.Int8Weight(values, torch.ones(256)))
        places = min(8, size)
        assert torch.equal(y[:places], values[:, :places].T.float()) and not y[places:].any()


@needs_library
@pytest.mark.parametrize("size", [2048, 4097, 40_000])
def test_8_bit_sums_hold_any_number_of_inputs(isa, size):
    """Products of the largest magnitude, more of them than an integer of 32 bits holds, by upper
    and by lower halves."""
    values = torch.full((3, size), -128, dtype=torch.int8)
    values[1] = 127
    values[2, ::2] = 127
    # in units of 2^-28: lower halves of 2^14 - 32, and of -32 or, cut off, 2^15 - 32
    numbers = [1.99, -1.99, 1 + (2**14 - 32) * 2**-28, 1 + (2**15 - 32) * 2**-28, -1.5]
    x = torch.tensor(numbers)[:, None].expand(-1, size).contiguous()
    x[4, ::3] = -1e-3
    y = rk.linear(x, rk.Int8Weight(values, torch.ones(3)))
    exact = x.double() @ values.double().T
    assert ((y - exact).abs() <= LIMIT * (x.double().abs() @ values.double().abs().T)).all()


@needs_library
@pytest.mark.parametrize("rows", [1, 4])
def test_8_bit_products_beside_an_outlier(isa, rows):
    """x is kept to half of 2^-29 of the power of two above its largest number."""
    x, values = torch.randn(rows, 515), torch.randint(-127, 128, (9, 515), dtype=torch.int8)
    x[:, 7], values[:, 7] = 10_000.0, 0
    y = rk.linear(x, rk.Int8Weight(values, torch.ones(9)))
    kept = 2**14 * 2**-29 / 2 * values.double().abs().sum(1)
    rounded = LIMIT * (x.double().abs() @ values.double().abs().T)
    assert ((y - x.double() @ values.double().T).abs() <= kept + rounded).all()


@needs_library
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e30, 3e36])
def test_8_bit_products_of_any_size(isa, size):
    x, values = torch.randn(2, 70).clamp(-1, 1) * size, torch.ones(3, 70, dtype=torch.int8)
    y = rk.linear(x, rk.Int8Weight(values, torch.tensor([1.0, 0.5, 2.0**-7])))
    exact = x.double().sum(1, keepdim=True) * torch.tensor([1.0, 0.5, 2.0**-7])
    assert ((y - exact).abs() <= 1e-5 * x.double().abs().sum(1, keepdim=True)).all()


@needs_library
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("maker", [int8_linear, int4_linear])
def test_what_is_no_number_or_infinite_is_seen_beside_quantized_weights(isa, maker, bad):
    operator, _, (x, *weight), *_ = maker(torch.float32, 3, 2, 40)
    x[1, 5] = bad
    y = operator(x, *weight)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@needs_library
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_4_bit_weights_of_every_value(isa, rows):
    """Each of the 16 at each place of two units, of which the second is not full."""
    integers = torch.arange(-8, 8)[:, None].expand(16, 200)
    bits = F.pad(integers & 15, (0, 56)).view(16, 2, 4, 32)
    words = sum(bits[:, :, j] << 4 * j for j in range(4))
    values = torch.stack([words & 255, words >> 8], -1).flatten(1).byte()
    # of each group its own: powers of two, so that products are exact
    scale = (2.0 ** torch.arange(-4, 4)).expand(16, 8).bfloat16().contiguous()
    exact = integers * scale.float().repeat_interleave(32, 1)[:, :200]
    weight = rk.Int4Weight(values, scale, 200)
    assert torch.equal(reference.dense_weight(weight), exact)
    for first in range(0, 200, rows):
        x = torch.eye(200)[first : first + rows]
        assert torch.equal(rk.linear(x, weight, impl="native"), exact.T[first : first + rows])


@needs_library
@pytest.mark.parametrize("rows", [1, 5])
def test_4_bit_sums_of_the_largest_products(isa, rows):
    """All weights -8, all of x in one unit near its end."""
    x = torch.full((rows, 4096), 1.99) * torch.tensor([1.0, -1.0])[torch.arange(rows) % 2, None]
    values, scale = torch.full((3, 2048), 0x88, dtype=torch.uint8), torch.ones(3, 128).bfloat16()
    y = rk.linear(x, rk.Int4Weight(values, scale, 4096), impl="native")
    assert ((y + 8 * x.double().sum(1, keepdim=True)).abs() <= LIMIT * 8 * 1.99 * 4096).all()


@needs_library
@pytest.mark.parametrize("maker, impl", FORMS)
def test_autocast_changes_nothing(maker, impl):
    case = maker(torch.float32)
    plain = run(case[0], case, impl=impl)
    with torch.autocast("cpu"):
        cast = run(case[0], case, impl=impl)
    assert [x.dtype for x in cast] == [x.dtype for x in plain]
    assert all(map(torch.equal, cast, plain))


@needs_library
@pytest.mark.parametrize("log_decay", [0.0, -1e-6, -20.0, -87.0, -104.0, -1e4, -1e30, -torch.inf])
def test_extreme_decays(isa, log_decay):
    case = ddts_step(torch.float32, 1, 1, 8, 40)
    case[2][3].fill_(log_decay)
    check(case)


@needs_library
def test_extreme_gates(isa):
    edges = torch.tensor([-1e4, -100.0, -30.0, -20.0, -5.0, 0.0, 5.0, 100.0, 1e4])
    select, temper = (x.reshape(1, -1) for x in torch.meshgrid(edges, edges, indexing="ij"))
    case = mixer_step(torch.float32, 1, edges.numel() ** 2, 33, 4)
    case[2][2], case[2][3] = select.clone(), temper.clone()
    case[2][1] = case[2][1].clamp(-1, 1)
    check(case)


@needs_library
def test_keys_shorter_than_the_least_norm(isa):
    """A zero key writes nothing."""
    case = mixer_step(torch.float32, 3, 5, 40)
    case[2][1][0] *= 1e-7
    case[2][1][1] = 0
    check(case)


@needs_library
def test_a_closed_gate_lets_nothing_through(isa):
    """However large what it stands before: a least value of the gate would be seen behind it."""
    huge, closed, one = torch.full((1, 40), 1e20), torch.full((1, 40), -1e20), torch.ones(40)
    y = rk.gated_rms_norm(huge, closed, one, impl="native")
    assert not y.any() and y.isfinite().all()
    closed = closed * 1e18
    y = rk.short_conv_step(closed, torch.zeros(1, 40, 2), torch.ones(40, 2), impl="native")
    assert not y.any()
    operator, _, arguments, named, state = mixer_step(torch.float32, 1, 5, 40)
    arguments[5].fill_(1e38), named["gate_bias"].fill_(-1e38)
    before = arguments[state].clone()
    operator(*arguments, impl="native", **named)
    _, log_decay = reference.ddts_gates(*(x.double() for x in arguments[1:4]))
    decayed = before.double() * log_decay.exp()[:, None, :, None]
    assert relative_error(arguments[state], decayed) < LIMIT


def test_a_broken_state_stays_visible(isa):
    operator, _, arguments, named, _ = ddts_step(torch.float32, 1, 1, 8, 40)
    arguments[4][0, 0, 3, 7] = torch.nan
    o = operator(*arguments, **named, impl="native")
    assert o[0, 0, 7].isnan() and o.isnan().sum() == 1
    arguments[3][0, 0, 0] = torch.nan
    assert operator(*arguments, **named, impl="native").isnan().all()


@needs_library
def test_empty_rows_of_the_ring_are_never_read(isa):
    for maker, nothing in ((attention_step, torch.nan), (int8_attention_step, 255)):
        operator, _, arguments, named, _ = maker(torch.float32, past=0)
        arguments[3].fill_(nothing)
        arguments[4].zero_()
        assert operator(*arguments, **named, impl="native").isfinite().all()


@needs_library
@pytest.mark.parametrize(
    "maker",
    [linear, int8_linear, int4_linear, ddts_step, mixer_step, attention_step, int8_attention_step],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_neighbours(isa, dtype, maker):
    case = maker(dtype, 7)
    one = lambda x: x[4:5].clone() if x.shape[0] == 7 else x.clone()
    alone = (*case[:2], [x[4:5] if x.shape[0] == 7 else x for x in case[2]], *case[3:])
    for whole, single in zip(
        run(case[0], case, impl="native"), run(case[0], alone, impl="native"), strict=True
    ):
        assert torch.equal(one(whole), single)


@needs_library
@pytest.mark.parametrize(
    "maker, size", [p for p in PARAMETERS if p.values[1] == CASES[p.values[0]][0]]
)
def test_threads_change_nothing(maker, size):
    case, before = maker(torch.float32, *size), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(case[0], case, impl="native")
        torch.set_num_threads(3)
        for x, y in zip(alone, run(case[0], case, impl="native"), strict=True):
            assert torch.equal(x, y)
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------- torch: schemas, compilation


def registered(maker, dtype):
    """``(operator, arguments)`` of torch.ops for a maker's case, in the order of the schema."""
    _, _, a, n, _ = maker(dtype)
    if maker is mixer_step:
        weights = [n[x] for x in ("gate_weight", "gate_bias", "residual_weight", "norm_weight")]
        return ops.native_ddts_mixer_step, (*a, *weights, 0.5, 1e-5, 1e-5)
    if maker is gated_rms_norm:
        return ops.native_gated_rms_norm, (*a, n["residual"], n["residual_weight"], 1e-5)
    if maker is int8_attention_step:
        return ops.native_shared_key_attention_step, (*a, n["window_size"], 0.4)
    return {
        ddts_step: lambda: (ops.native_ddts_step, (*a, 0.3)),
        conv_step: lambda: (ops.native_short_conv_step, a),
        conv: lambda: (ops.native_short_conv, (*a, n["initial_state"], None)),
        linear: lambda: (ops.native_linear_step, a),
        int8_linear: lambda: (ops.native_linear_step, (a[0], a[1], a[3], a[2])),
        int4_linear: lambda: (ops.native_linear_step, (a[0], a[1], a[3], a[2])),
        rms_norm: lambda: (ops.native_rms_norm, (*a, 1e-3)),
        add_rms_norm: lambda: (ops.native_add_rms_norm, (*a, 1e-5)),
        attention_step: lambda: (ops.native_shared_key_attention_step, (*a, n["window_size"], 0.4)),
    }[maker]()


@needs_library
@pytest.mark.parametrize("maker", SMALL)
def test_opcheck(maker):
    operator, arguments = registered(maker, torch.bfloat16)
    parts = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.default, arguments, test_utils=parts)


@pytest.mark.parametrize("maker", SMALL)
def test_schemas_and_fakes_need_no_library(maker):
    _, definition, arguments, named, state = case = maker(torch.bfloat16)
    real = RESULTS(definition(*arguments, **named))
    with torch._subclasses.FakeTensorMode():
        operator, arguments = registered(maker, torch.bfloat16)
        for fake, x in zip(RESULTS(operator(*arguments)), real, strict=True):
            assert fake.shape == x.shape and fake.dtype == x.dtype
    assert case[4] == state


@needs_library
def test_compiles_without_a_break():
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(q, k, v, log_decay, state):
        return rk.ddts_step(q, k, v, log_decay, state, scale=0.3) * 2

    case = ddts_step(torch.float32)
    plain = run(rk.ddts_step, case)
    state = case[2][4].clone()
    compiled = function(*case[2][:4], state)
    assert torch.equal(compiled, plain[0] * 2) and torch.equal(state, plain[1])


# ------------------------------------------------------------------------------------- the dispatch

HALF, DOUBLE = torch.float16, torch.float64


@needs_library
@pytest.mark.parametrize(
    "chosen, change",
    [
        (True, lambda x: x),
        (True, torch.Tensor.bfloat16),
        (True, torch.nn.Parameter),
        (False, torch.Tensor.double),
        (False, torch.Tensor.half),
        (False, lambda x: x.to("meta")),
        (False, lambda x: x.requires_grad_()),
        (False, lambda x: torch.nn.Buffer(x).as_subclass(Subclass)),
    ],
    ids=["float32", "bfloat16", "parameter", "float64", "float16", "meta", "gradient", "subclass"],
)
def test_auto_is_native_where_it_fits(chosen, change):
    x = change(torch.zeros(2, 3))
    if type(x) is torch.nn.Parameter:
        x.requires_grad_(False)
    assert native.fits(x, None) == chosen
    with torch.no_grad():
        assert native.fits(x) == (chosen or x.requires_grad)


@pytest.fixture
def gpu_of(monkeypatch, tmp_path):
    """A function that pretends that the GPU has a capability and the library code for others."""
    monkeypatch.setattr(native.build, "PACKAGE", tmp_path)
    library = tmp_path / native.build.LIBRARIES["cuda"]

    def forget():
        for found in (native._lacks_code, native._warn_once, native.problem):
            found.cache_clear()

    def pretend(capability, archs, problem=None):
        library.write_bytes(b"\x7fELF\0RODIMUS-ARCHS:" + archs.encode() + b"\0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(native, "_cuda_problem", lambda: problem)
        forget()

    yield pretend
    forget()


@pytest.mark.parametrize(
    "capability, archs, runs",
    [
        ((7, 5), "80", False),
        ((8, 0), "80", True),
        ((8, 6), "80", True),
        ((8, 0), "86", False),
        ((9, 0), "80", True),  # by PTX
        ((9, 0), "90a", True),
        ((8, 9), "90a", False),
        ((10, 0), "80;90a", True),
        ((10, 3), "100f", True),
        ((8, 0), "90a;100", False),
        ((12, 0), "80;90a;100", True),
        ((9, 0), "86;120", False),
    ],
)
def test_a_gpu_that_the_library_has_no_code_for_is_not_asked(gpu_of, capability, archs, runs):
    gpu_of(capability, archs)
    assert native._runs_here(torch.device("cuda", 0)) == runs


def test_how_to_build_for_this_gpu_is_said_once(gpu_of, caplog):
    gpu_of((8, 9), "90a")
    for index in (0, 1, 0):
        native._runs_here(torch.device("cuda", index))
    (record,) = caplog.records
    assert "was built for 90a, this GPU has compute capability 8.9" in record.message
    assert "RODIMUS_CUDA_ARCHS=89" in record.message


@pytest.mark.parametrize("is_stale, reason", [(True, "from other sources"), (False, "_cuda.so")])
def test_a_library_that_is_not_loaded_is_not_asked(
    gpu_of, monkeypatch, tmp_path, caplog, is_stale, reason
):
    ask = native._cuda_problem
    gpu_of((9, 0), "90a")
    monkeypatch.setattr(native, "_cuda_problem", ask)
    if is_stale:
        (tmp_path / "csrc").mkdir()
        (tmp_path / "csrc" / "arguments.h").touch()
    assert native._runs_here(torch.device("cuda", 0))
    assert not native.is_available("cuda")
    (record,) = caplog.records
    assert reason in record.message


def test_a_library_newer_than_the_driver_is_not_asked(gpu_of, caplog):
    gpu_of((9, 0), "90a", "CUDA driver version is insufficient for CUDA runtime version")
    assert not native._runs_here(torch.device("cuda", 0))
    (record,) = caplog.records
    assert "driver version is insufficient" in record.message
    assert "an nvcc that is not newer than the driver" in record.message


class Subclass(torch.Tensor):
    """A tensor that may mean more than its numbers."""


@needs_library
def test_auto_equals_native_and_keeps_gradients():
    x, weight = torch.randn(2, 40), torch.randn(40)
    assert torch.equal(rk.rms_norm(x, weight), rk.rms_norm(x, weight, impl="native"))
    y = rk.rms_norm(x.requires_grad_(), weight)
    y.sum().backward()
    assert x.grad is not None
    assert rk.linear(torch.randn(9, 4), torch.randn(3, 4)).shape == (9, 3)


@needs_library
@pytest.mark.parametrize("maker", [maker for maker in SMALL if maker is not int8_attention_step])
def test_an_explicit_choice_never_falls_back(maker):
    case = maker(torch.float32)
    with pytest.raises(ValueError, match=r"impl='native'\) takes float32 and bfloat16, got"):
        run(case[0], case, torch.Tensor.double, impl="native")


@needs_library
def test_a_ring_of_bytes_wants_keys_of_such_a_dtype():
    operator, _, arguments, named, _ = int8_attention_step(torch.float16)
    with pytest.raises(ValueError, match=r"takes float32 and bfloat16, got torch.float16"):
        operator(*arguments, **named, impl="native")


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_a_mixer_without_key_channels_is_refused(impl):
    operator, _, arguments, named, _ = mixer_step(torch.float32, K=0)
    with pytest.raises(ValueError, match="at least one channel, got K = 0"):
        operator(*arguments, **named, impl=impl)


@needs_library
def test_no_gradient_and_no_mixture_are_said():
    x, weight = torch.randn(2, 4, requires_grad=True), torch.randn(4)
    with pytest.raises(ValueError, match=r"rms_norm\(impl='native'\) has no gradient"):
        rk.rms_norm(x, weight, impl="native")
    with pytest.raises(ValueError, match="takes tensors of one dtype, got torch.bfloat16 and"):
        case = conv_step(torch.float32)
        rk.short_conv_step(case[2][0].bfloat16(), *case[2][1:], impl="native")
    with pytest.raises(ValueError, match="takes 1 to 8 rows, got 9"):
        rk.linear(torch.randn(9, 4), torch.randn(3, 4), impl="native")
    with pytest.raises(ValueError, match="weight must be torch.float32 like x"):
        rk.linear(torch.randn(2, 4), torch.randn(3, 4).bfloat16())


@needs_library
def test_bad_8_bit_weights_are_refused():
    x, (values, scale) = torch.randn(2, 4), (torch.ones(3, 4, dtype=torch.int8), torch.ones(3))
    refused = {
        r"weight must have shape \[N, 4\], got \(3, 3\)": rk.Int8Weight(values[:, :3], scale),
        r"weight.scale must have shape \[3\], got \(3, 1\)": rk.Int8Weight(values, scale[:, None]),
        "Int8Weight of torch.int8 .* torch.float32 .* got torch.int8 with torch.b": rk.Int8Weight(
            values, scale.bfloat16()
        ),
        "Int8Weight of torch.int8 .* got torch.uint8 with": rk.Int8Weight(values.byte(), scale),
        "weight must be torch.float32 like x, got torch.int8": values,
    }
    for message, weight in refused.items():
        with pytest.raises(ValueError, match=message):
            rk.linear(x, weight, impl="native")
    with pytest.raises(RuntimeError, match="quantised weights and their scale come together"):
        ops.native_linear_step(x, values, None)
    with pytest.raises(RuntimeError, match="quantised weights and their scale come together"):
        ops.native_linear_step(x, values.float(), None, scale)


@needs_library
def test_bad_4_bit_weights_are_refused():
    x, values = torch.randn(2, 130), torch.zeros(3, 128, dtype=torch.uint8)
    scale = torch.ones(3, 8).bfloat16()
    refused = {
        r"weight must have shape \[N, 130\], got \(3, 129\)": (values, scale, 129),
        r"weight.values must have shape \[3, 128\], got \(3, 64\)": (values[:, :64], scale, 130),
        r"weight.scale must have shape \[3, 8\], got \(3, 5\)": (values, scale[:, :5], 130),
        "Int4Weight of torch.uint8 .* got torch.uint8 with torch.float32": (
            values,
            scale.float(),
            130,
        ),
        "Int4Weight of torch.uint8 .* got torch.int8 with": (values.char(), scale, 130),
    }
    for message, parts in refused.items():
        with pytest.raises(ValueError, match=message):
            rk.linear(x, rk.Int4Weight(*parts), impl="native")
    with pytest.raises(RuntimeError, match="quantised weights and their scale come together"):
        ops.native_linear_step(x, values, None)
    for bad in (scale.float(), scale[:, :7], scale.mT.contiguous().mT):
        with pytest.raises(RuntimeError, match="scale"):
            ops.native_linear_step(x, values, None, bad)
    with pytest.raises(RuntimeError, match=r"weight must have shape \[any, 128\], got \[3, 64\]"):
        ops.native_linear_step(x, values[:, :64], None, scale)


@needs_library
def test_bad_arguments_say_what_was_expected():
    _, _, (q, k, v, g, state), _, _ = ddts_step(torch.float32)
    strided = torch.zeros(2, 1, 10)[..., ::2]
    for message, arguments in {
        r"k must have shape \[2, 1, 5\], got \[1, 1, 5\]": (q, k[:1], v, g, state),
        r"state must have shape \[2, 1, 5, 7\], got \[2, 1, 5, 6\]": (q, k, v, g, state[..., :6]),
        "state must be contiguous float32": (q, k, v, g, state.mT.contiguous().mT),
        "v must be float32 or bfloat16": (q, k, v.half(), g, state),
        "q must be contiguous, or a matrix with dense rows": (strided, k, v, g, state),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ops.native_ddts_step(*arguments, 0.3)
    operator, (*rows, _, window, scale) = registered(attention_step, torch.float32)
    with pytest.raises(RuntimeError, match="position must be >= 0, got -1"):
        operator(*rows, torch.tensor([-1, 0]), window, scale)
    with pytest.raises(RuntimeError, match="position must be at most 2.62, got 92233720368547758"):
        operator(*rows, torch.tensor([2**63 - 2, 0]), window, scale)
    with pytest.raises(RuntimeError, match="query heads must be a multiple of key and value heads"):
        operator(
            rows[0],
            rows[1][:, :, :0],
            rows[2],
            rows[3][..., 10:].contiguous(),
            torch.tensor([0, 0]),
            window,
            scale,
        )
    with pytest.raises(RuntimeError, match="cache needs at least window_size"):
        operator(*rows, torch.tensor([0, 0]), 12, scale)
    (_, k, v, cache), zeros = rows, torch.zeros(2, dtype=torch.int64)
    size = reference.int8_row_bytes(*k.shape[2:], *v.shape[2:], k.dtype)
    aside = torch.zeros(cache.shape[0] * cache.shape[1] * size + 1, dtype=torch.uint8)[1:]
    with pytest.raises(RuntimeError, match="of 8-bit values must start on a multiple of 16 bytes"):
        operator(*rows[:3], aside.view(*cache.shape[:2], size), zeros, window, scale)
