"""The ring-cache step of shared-key attention against full attention over everything seen."""

import dataclasses
import functools
import importlib

import pytest
import torch

from rodimus_kernels import (
    int8_row_bytes,
    reference,
    ring_parts,
    shared_key_attention_step,
    write_ring,
)
from rodimus_kernels.shared_key_attention import api
from rodimus_kernels.testing import relative_error
from tests.kernels.device import DEVICE, TRITON_MARKS

# float32 against float64: measured at most 4e-7
LIMIT = 1e-6
# the compiled step is held to the definition in test_native.py
IMPLS = ["reference", "sdpa", pytest.param("triton", marks=TRITON_MARKS)]
needs_triton = lambda test: functools.reduce(lambda t, mark: mark(t), TRITON_MARKS, test)
# in the interpreter a call takes a tenth of a second
LONG = IMPLS if DEVICE == "cuda" else [*IMPLS[:2], pytest.param("triton", marks=pytest.mark.slow)]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Sequences of one batch and the ring they share the shape of."""

    batch: int = 2
    heads: int = 4
    key_heads: int = 1
    value_heads: int = 4
    dim: int = 16
    value_dim: int = 16
    window: int = 9
    rows: int = 16
    int8: bool = False

    def __str__(self):
        heads = f"H{self.heads}-{self.key_heads}-{self.value_heads}"
        shape = f"B{self.batch}{heads}D{self.dim}-{self.value_dim}W{self.window}R{self.rows}"
        return shape + "-int8" * self.int8

    @property
    def row(self):
        """Heads and channels of keys and values, as :func:`rodimus_kernels.ring_parts` wants."""
        return self.key_heads, self.dim, self.value_heads, self.value_dim

    def tokens(self, length, device, dtype=torch.float32):
        """``(q, k, v)`` of a history."""
        draw = lambda *shape: torch.randn(self.batch, length, *shape).to(device, dtype)
        return (
            draw(self.heads, self.dim),
            draw(self.key_heads, self.dim),
            draw(self.value_heads, self.value_dim),
        )

    def cache(self, device, dtype=torch.float32):
        """A ring in which nothing has been written: NaN, which no result may show."""
        if self.int8:
            # in every floating dtype the bits of a NaN
            shape = (self.batch, self.rows, int8_row_bytes(*self.row, dtype))
            return torch.full(shape, 255, device=device, dtype=torch.uint8)
        width = self.key_heads * self.dim + self.value_heads * self.value_dim
        shape = (self.batch, self.rows, width)
        return torch.full(shape, float("nan"), device=device, dtype=dtype)

    def filled(self, device, dtype=torch.float32):
        """A ring that holds numbers everywhere."""
        cache = self.cache(device, dtype)
        draw = lambda *shape: torch.randn(*cache.shape[:2], *shape).to(device, dtype)
        k, v = draw(self.key_heads, self.dim), draw(self.value_heads, self.value_dim)
        write_ring(ring_parts(cache, *self.row, dtype), ..., k, v)
        return cache


RINGS = [
    Ring(),
    Ring(rows=9),
    Ring(window=1, rows=8),
    Ring(heads=6, key_heads=2, value_heads=3, dim=32, value_dim=24),
    Ring(heads=3, key_heads=3, value_heads=1),
    Ring(window=40, rows=64),
]
# the same with values in 8 bits: rows with and without padding, scales behind an odd byte
RINGS += [dataclasses.replace(ring, int8=True) for ring in (RINGS[0], RINGS[2], RINGS[3])]
RINGS += [Ring(heads=3, key_heads=3, value_heads=1, value_dim=7, int8=True)]
FORMATS = pytest.mark.parametrize("int8", [False, True], ids=["plain", "int8"])


def decode(ring, tokens, cache, lengths, *, start=0, impl):
    """Feed a history in calls of these lengths; ``start`` is the age of every sequence."""
    outputs, at = [], start
    for length in lengths:
        part = (x[:, at - start : at - start + length] for x in tokens)
        position = torch.full((ring.batch,), at, device=cache.device)
        outputs.append(
            shared_key_attention_step(*part, cache, position, window_size=ring.window, impl=impl)
        )
        at += length
    return torch.cat(outputs, 1)


def recompute(tokens, ring):
    """The same tokens in one float64 attention, over the values that the ring holds."""
    q, k, v = (x.double() for x in tokens)
    if ring.int8:
        v = reference.dequantize_values(*reference.quantize_values(tokens[2]), torch.float64)
    return reference.shared_key_attention(q, k, v, window_size=ring.window)


@pytest.mark.parametrize("ring", RINGS, ids=str)
@pytest.mark.parametrize("impl", LONG)
def test_every_token_equals_recomputing_the_history(impl, ring, device):
    length = 3 * ring.rows + 2
    tokens = ring.tokens(length, device)
    o = decode(ring, tokens, ring.cache(device), [1] * length, impl=impl)
    assert relative_error(o, recompute(tokens, ring)) < LIMIT


@FORMATS
@pytest.mark.parametrize("impl", LONG)
def test_thousands_of_tokens_past_the_window(impl, int8, device):
    """Errors do not build up: the last tokens are as exact as the first."""
    # a call takes a tenth of a second in the interpreter
    length = 600 if impl == "triton" and DEVICE == "cpu" else 2400
    ring = Ring(batch=1, heads=2, value_heads=2, window=37, rows=53, int8=int8)
    tokens = ring.tokens(length, device)
    o = decode(ring, tokens, ring.cache(device), [8] * (length // 8), impl=impl)
    exact = recompute(tokens, ring)
    for part in (slice(0, 100), slice(length - 100, length)):
        assert relative_error(o[:, part], exact[:, part]) < LIMIT


@FORMATS
@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("impl", LONG)
def test_several_tokens_a_call_wrap_around_at_every_offset(impl, steps, int8, device):
    """A call that begins at every row of the ring, so that its tokens straddle the end at each."""
    ring = Ring(batch=1, heads=2, value_heads=2, window=5, rows=5 + steps - 1, int8=int8)
    length = ring.rows + 2 * steps
    tokens = ring.tokens(length, device)
    exact = recompute(tokens, ring)
    for offset in range(ring.rows):
        cache = ring.cache(device)
        lengths = [1] * offset + [steps] * ((length - offset) // steps)
        o = decode(ring, tokens, cache, lengths, impl=impl)
        assert relative_error(o, exact[:, : o.shape[1]]) < LIMIT, f"offset {offset}"


@pytest.mark.parametrize(
    "ring",
    [
        *(Ring(1, 2, 1, 2, rows=10), Ring(1, 6, 2, 3, 32, 24, rows=9)),
        *(Ring(1, 2, 1, 2, rows=10, int8=True), Ring(1, 6, 2, 3, 32, 25, rows=9, int8=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_one_call_at_every_offset(impl, ring, device):
    """The history by the definition, then one call: it may begin at any row of the ring."""
    steps = ring.rows - ring.window + 1
    tokens = ring.tokens(2 * ring.rows + steps, device)
    exact = recompute(tokens, ring)
    cache = ring.cache(device)
    for age in range(2 * ring.rows):
        if age in (0, 1, ring.window - 1) or age >= ring.rows:
            now = slice(age, age + steps)
            position = torch.full((ring.batch,), age, device=device)
            new = (x[:, now] for x in tokens)
            o = shared_key_attention_step(
                *new, cache.clone(), position, window_size=ring.window, impl=impl
            )
            assert relative_error(o, exact[:, now]) < LIMIT, f"age {age}"
        decode(ring, [x[:, age : age + 1] for x in tokens], cache, [1], start=age, impl="reference")


@FORMATS
@pytest.mark.parametrize("impl", LONG)
def test_tokens_together_equal_tokens_one_by_one(impl, int8, device):
    ring = Ring(batch=3, rows=20, int8=int8)
    tokens = ring.tokens(48, device)
    alone, together = ring.cache(device), ring.cache(device)
    one_by_one = decode(ring, tokens, alone, [1] * 48, impl=impl)
    by_eight = decode(ring, tokens, together, [8] * 6, impl=impl)
    assert relative_error(by_eight, one_by_one) < LIMIT
    assert torch.equal(alone, together)


@FORMATS
@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_of_different_ages_in_one_batch(impl, int8, device):
    ring = Ring(batch=5, rows=12, int8=int8)
    ages = [0, 1, 8, 12, 31]
    tokens = ring.tokens(max(ages) + 3, device)
    cache = ring.cache(device)
    for b, age in enumerate(ages):
        alone = dataclasses.replace(ring, batch=1)
        row = [x[b : b + 1, :age] for x in tokens]
        if age:
            decode(alone, row, cache[b : b + 1], [1] * age, impl="reference")
    position = torch.tensor(ages, device=device)
    new = [torch.stack([x[b, age : age + 3] for b, age in enumerate(ages)]) for x in tokens]
    o = shared_key_attention_step(*new, cache, position, window_size=ring.window, impl=impl)
    exact = recompute(tokens, ring)
    expected = torch.stack([exact[b, age : age + 3] for b, age in enumerate(ages)])
    assert relative_error(o, expected) < LIMIT


@pytest.mark.parametrize(
    "ring",
    [Ring(rows=11), Ring(rows=11, int8=True), Ring(2, 6, 2, 3, 32, 25, rows=11, int8=True)],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_writes_the_rows_of_its_tokens_and_no_other(impl, ring, device):
    """And of a row of bytes only what is not padding, to the bit."""
    cache = ring.filled(device)
    expected = cache.clone()
    q, k, v = ring.tokens(3, device)
    position = torch.tensor([10, 24], device=device)
    shared_key_attention_step(q, k, v, cache, position, window_size=9, impl=impl)
    rows = (position[:, None] + torch.arange(3, device=device)) % 11
    sequences = torch.arange(2, device=device)[:, None]
    write_ring(ring_parts(expected, *ring.row, k.dtype), (sequences, rows), k, v)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_age_may_be_expanded_to_all_rows(impl, device):
    ring = Ring()
    cache = ring.filled(device)
    caches = cache, cache.clone()
    new, age = ring.tokens(1, device), torch.tensor([7], device=device)
    ages = age.expand(ring.batch), age.repeat(ring.batch)
    found, expected = (
        shared_key_attention_step(*new, cache, position, window_size=ring.window, impl=impl)
        for cache, position in zip(caches, ages, strict=True)
    )
    assert ring.batch > 1 and torch.equal(found, expected) and torch.equal(*caches)


@FORMATS
@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_a_cache_that_is_part_of_a_larger_one(impl, int8, device):
    ring = Ring(batch=2, value_heads=2, value_dim=24, int8=int8)
    pool = ring.cache(device).repeat(1, 1, 2)
    untouched = pool[..., pool.shape[-1] // 2 :].clone()
    cache = pool[..., : pool.shape[-1] // 2]
    q, k, v = ring.tokens(20, device)
    row = torch.cat((k.flatten(2), v.flatten(2)), dim=-1)
    k_view, v_view = row[..., :16].unflatten(-1, (1, 16)), row[..., 16:].unflatten(-1, (2, 24))
    o = decode(ring, (q, k_view, v_view), cache, [4] * 5, impl=impl)
    assert relative_error(o, recompute((q, k, v), ring)) < LIMIT
    rest = pool[..., cache.shape[-1] :]
    assert torch.equal(rest.contiguous().view(torch.uint8), untouched.view(torch.uint8))


@FORMATS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision(impl, dtype, int8, device):
    ring = Ring(window=12, rows=16, int8=int8)
    tokens, cache = ring.tokens(40, device, dtype), ring.cache(device, dtype)
    decode(ring, [x[:, :36] for x in tokens], cache, [4] * 9, impl="reference")
    o = decode(ring, [x[:, 36:] for x in tokens], cache, [4], start=36, impl=impl)
    assert o.dtype == dtype
    # one rounding of the output
    assert relative_error(o, recompute(tokens, ring)[:, 36:]) < torch.finfo(dtype).eps / 2


@needs_triton
@pytest.mark.parametrize("part, int8", [(16, False), (32, False), (48, False), (32, True)])
def test_parts_of_the_window_are_joined(part, int8, device, monkeypatch):
    """The last part may be short, or behind the newest key and empty."""
    triton_step = importlib.import_module("rodimus_kernels.shared_key_attention.triton_step")
    monkeypatch.setattr(triton_step, "split_window", lambda window, *_: (-(-window // part), part))
    ring = Ring(batch=3, heads=2, value_heads=2, window=77, rows=80, int8=int8)
    ages = [3, 70, 200]
    tokens = ring.tokens(204, device)
    cache = ring.cache(device)
    for b, age in enumerate(ages):
        history = [x[b : b + 1, :age] for x in tokens]
        lengths = [4] * (age // 4) + [1] * (age % 4)
        alone = dataclasses.replace(ring, batch=1)
        decode(alone, history, cache[b : b + 1], lengths, impl="reference")
    new = [torch.stack([x[b, age : age + 2] for b, age in enumerate(ages)]) for x in tokens]
    position = torch.tensor(ages, device=device)
    o = shared_key_attention_step(*new, cache, position, window_size=77, impl="triton")
    exact = recompute(tokens, ring)
    expected = torch.stack([exact[b, age : age + 2] for b, age in enumerate(ages)])
    assert relative_error(o, expected) < LIMIT


@needs_triton
def test_the_window_is_split_to_fill_the_gpu():
    triton_step = importlib.import_module("rodimus_kernels.shared_key_attention.triton_step")
    for programs in (1, 2, 16, 256):
        parts, part = triton_step.split_window(2049, programs, 132)
        assert (parts - 1) * part < 2049 <= parts * part
    # every multiprocessor but three, with the fewest keys that are worth a part
    assert triton_step.split_window(2049, 1, 132) == (129, 16)
    # several programs a multiprocessor
    assert triton_step.split_window(2049, 256, 132)[0] == 2
    assert triton_step.split_window(10, 1, 132) == (1, 12)


@needs_triton
@FORMATS
def test_registration(int8, device):
    ring = Ring(batch=1, heads=1, value_heads=1, int8=int8)
    q, k, v = ring.tokens(1, device)
    position = torch.tensor([20], device=device)
    operator = torch.ops.rodimus.ring_attention.default
    cache = ring.filled(device)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (q, k, v, cache, position, 9, 0.25), test_utils=checks)


@pytest.mark.parametrize("impl", IMPLS)
def test_keeps_no_graph(impl, device):
    ring = Ring()
    q, k, v = ring.tokens(1, device)
    position = torch.zeros(2, dtype=torch.int64, device=device)
    cache = ring.cache(device)
    o = shared_key_attention_step(
        q.requires_grad_(), k, v, cache, position, window_size=9, impl=impl
    )
    assert not o.requires_grad and not cache.requires_grad


@FORMATS
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_without_a_graph_break(impl, int8, device):
    ring = Ring(int8=int8)
    tokens = ring.tokens(2, device)
    position = torch.tensor([3, 30], device=device)
    cache = ring.filled(device)
    function = lambda cache, position: shared_key_attention_step(
        *tokens, cache, position, window_size=9, impl=impl
    )
    plain, inside = cache.clone(), cache.clone()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(inside, position), function(plain, position)) < LIMIT
    assert torch.equal(inside, plain)


@FORMATS
@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_a_batch_may_be_empty(impl, int8, device):
    ring = Ring(batch=0, int8=int8)
    position = torch.zeros(0, dtype=torch.int64, device=device)
    cache = ring.cache(device)
    o = shared_key_attention_step(
        *ring.tokens(2, device), cache, position, window_size=9, impl=impl
    )
    assert o.shape == (0, 2, 4, 16)


def test_automatic_choice():
    row = torch.zeros(2, 16, 80)
    assert api._choose_step(True, 128, row, (row, row)) == "triton"
    assert api._choose_step(False, 128, row, (row, row)) == "sdpa"
    assert api._choose_step(True, 264, row, (row, row)) == "sdpa"
    assert api._choose_step(True, 128, row, (row, row.bfloat16())) == "reference"
    assert api._choose_step(True, 128, row.double(), (row.double(), row.double())) == "sdpa"
    assert api._choose_step(True, 128, row.transpose(1, 2), (row, row)) == "sdpa"
    assert api._choose_step(True, 128, row.byte(), (row, row)) == "triton"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_compiled_step_is_chosen_for_the_shapes_it_is_written_for(device):
    """A tensor that is not on the CPU stands for one on a GPU."""

    def fits(heads=16, key_heads=1, dim=128, value_dim=128):
        q = torch.empty(1, 1, heads, dim, device=device)
        k = torch.empty(1, 1, key_heads, dim, device=device)
        v = torch.empty(1, 1, heads, value_dim, device=device)
        cache = torch.empty(1, 9, key_heads * dim + heads * value_dim, device=device)
        assert not api._fits_compiled_step(q, k, v, cache.expand(2, 9, -1))
        return api._fits_compiled_step(q, k, v, cache)

    assert fits() and fits(heads=8)
    others = fits(heads=3), fits(heads=32), fits(key_heads=2), fits(dim=64), fits(value_dim=256)
    assert set(others) == {device == "cpu"}


class TestErrors:
    """Each message names what was expected and what was given."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"q": (2, 9, 4, 16)}, "1 <= T <= 8 tokens in q, k and v, got 9 and 1"),
            ({"k": (2, 2, 1, 16), "v": (2, 2, 4, 16)}, "q, k and v, got 1 and 2"),
            ({"cache": (2, 16, 79)}, r"cache must have shape \[2, R, 80\], got \(2, 16, 79\)"),
            ({"cache": (2, 8, 80)}, r"R >= window_size \+ T - 1 = 9 rows, got 8"),
            ({"position": (3,)}, r"position must have shape \[2\], got \(3,\)"),
        ],
    )
    def test_message(self, change, message):
        shapes = {
            "q": (2, 1, 4, 16),
            "k": (2, 1, 1, 16),
            "v": (2, 1, 4, 16),
            "cache": (2, 16, 80),
            "position": (2,),
            **change,
        }
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        tensors["position"] = tensors["position"].long()
        with pytest.raises(ValueError, match=message):
            shared_key_attention_step(**tensors, window_size=9)

    @pytest.mark.parametrize(
        ("shape", "view", "message"),
        [
            ((2, 16, 80), lambda x: x, r"shape \[2, R, 144\], got \(2, 16, 80\)"),
            ((2, 144, 16), lambda x: x.transpose(1, 2), r"of 16 bytes, got strides \(2304, 1, 16"),
            ((2, 16, 152), lambda x: x[..., :144], r"got strides \(2432, 152, 1\) and offset 0"),
            ((2, 16, 160), lambda x: x[..., 8:152], r"strides \(2560, 160, 1\) and offset 8"),
        ],
    )
    def test_a_ring_of_bytes(self, shape, view, message):
        q, k, v = Ring().tokens(1, "cpu")
        cache = view(torch.zeros(shape, dtype=torch.uint8))
        position = torch.zeros(2, dtype=torch.int64)
        with pytest.raises(ValueError, match=message):
            shared_key_attention_step(q, k, v, cache, position, window_size=9)

    def test_position_is_integer(self):
        q, k, v = Ring().tokens(1, "cpu")
        with pytest.raises(ValueError, match="position must be int64, got torch.float32"):
            shared_key_attention_step(q, k, v, Ring().cache("cpu"), torch.zeros(2), window_size=9)

    @pytest.mark.parametrize("impl", ["reference", "sdpa", "native", "auto"])
    def test_position_is_not_negative(self, impl):
        given = *Ring().tokens(1, "cpu"), Ring().cache("cpu"), torch.tensor([3, -1])
        with pytest.raises(ValueError, match="position must be >= 0, got -1"):
            shared_key_attention_step(*given, window_size=9, impl=impl)

    def test_cache_is_floating(self):
        q, k, v = Ring().tokens(1, "cpu")
        cache, position = torch.zeros(2, 16, 80, dtype=torch.int32), torch.zeros(2).long()
        with pytest.raises(ValueError, match="cache must be floating point, got torch.int32"):
            shared_key_attention_step(q, k, v, cache, position, window_size=9)

    def test_window_scale_and_impl(self):
        q, k, v = Ring().tokens(1, "cpu")
        cache, position = Ring().cache("cpu"), torch.zeros(2, dtype=torch.int64)
        for options, message in (
            ({"window_size": 0}, "must be >= 1, got 0"),
            ({"window_size": None}, "window_size must be an integer: a ring holds no more"),
            ({"window_size": 9, "scale": -1.0}, "scale must be > 0, got -1.0"),
            ({"window_size": 9, "impl": "fast"}, "unknown impl 'fast'; expected one of 'auto'"),
        ):
            with pytest.raises(ValueError, match=message):
                shared_key_attention_step(q, k, v, cache, position, **options)
