"""The 8-bit values of a window: what quantising costs at most, and that it may be repeated."""

import pytest
import torch

from rodimus_kernels import int8_row_bytes, native, read_ring, reference, ring_parts, write_ring
from rodimus_kernels import shared_key_attention_step as step
from rodimus_kernels.reference import dequantize_values, quantize_values
from rodimus_kernels.testing import relative_error
from tests.kernels.device import TRITON_MARKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values_of(kind, *shape):
    """Random values; heavy-tailed ones are a quotient of normal numbers."""
    normal = torch.randn(*shape)
    return normal if kind == "normal" else normal / torch.randn(*shape)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_value_is_off_by_more_than_half_a_scale(kind, dtype):
    v = values_of(kind, 50, 3, 128).clamp(-6e4, 6e4).to(dtype)
    values, scales = quantize_values(v)
    assert values.dtype == torch.int8 and scales.dtype == torch.bfloat16
    assert (values.abs().amax(-1) == 127).all()
    # the quotient is rounded to float32 before it is rounded to a step
    limit = scales.double() * (0.5 + 127 * 2**-24)
    off = (dequantize_values(values, scales, torch.float64) - v.double()).abs().amax(-1)
    assert (off <= limit).all()


def every_quantised_head(dtype):
    """Heads whose largest values have every significand of ``dtype`` up to 11 bits, in several
    powers of two, the smallest normal ones among them, and every step beside it."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 11}[dtype]
    least = torch.finfo(dtype).tiny
    for power in (least, 64 * least, 2.0**-7, 1.0, 2.0**9):
        largest = power * torch.arange(2 ** (bits - 1), 2**bits) / 2 ** (bits - 1)
        v = largest[:, None] * torch.linspace(-1, 1, 1021)
        yield torch.cat((largest[:, None], v), 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantising_again_gives_the_same_bytes(dtype):
    for v in every_quantised_head(dtype):
        values, scales = quantize_values(v)
        again = quantize_values(dequantize_values(values, scales, dtype))
        assert torch.equal(again[1].float(), scales.float())
        assert torch.equal(again[0], values)


def test_zeros_are_exact_and_what_is_too_small_becomes_zero():
    v = torch.tensor([[0.0, -0.0], [1e-37, -1e-40], [1e-45, 0.0]])
    values, scales = quantize_values(v)
    assert not values.any() and torch.equal(scales.float(), torch.zeros(3))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_value_breaks_its_head(broken):
    v = torch.randn(4, 2, 8)
    v[1, 0, 3] = broken
    values, scales = quantize_values(v)
    found = dequantize_values(values, scales, torch.float32)
    assert found[1, 0].isnan().all() and found.isnan().sum() == 8


def test_the_row_of_the_1_6b_model():
    assert int8_row_bytes(1, 128, 16, 128, torch.bfloat16) == 256 + 2048 + 32
    # scales on an even byte, rows of whole pieces of 16 bytes
    assert int8_row_bytes(1, 2, 1, 7, torch.bfloat16) == 16
    assert int8_row_bytes(1, 2, 1, 11, torch.bfloat16) == 32


def test_parts_are_views_and_hold_what_is_written():
    cache = torch.zeros(3, 5, int8_row_bytes(2, 6, 3, 7, torch.bfloat16), dtype=torch.uint8)
    k, v = torch.randn(3, 2, 2, 6).bfloat16(), torch.randn(3, 2, 3, 7).bfloat16()
    parts = ring_parts(cache, 2, 6, 3, 7, torch.bfloat16)
    write_ring(parts, (slice(None), torch.tensor([4, 1])), k, v)
    keys, values = read_ring(ring_parts(cache, 2, 6, 3, 7, torch.bfloat16), torch.bfloat16)
    assert torch.equal(keys[:, [4, 1]], k) and not cache[:, [0, 2, 3]].any()
    assert torch.equal(values[:, [4, 1]], dequantize_values(*quantize_values(v), torch.bfloat16))


NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(not native.is_available("cpu"), reason="not built")
)


FORMS = ["sdpa", NATIVE, pytest.param("triton", marks=TRITON_MARKS)]


def edges():
    """float32 heads ``[N, 4]`` where forms could differ: scales and values that lie halfway between
    two, the smallest scales, zeros, and what is not finite."""
    factor = torch.tensor(1.0 / 127)
    # halfway between neighbouring bfloat16 numbers, the lower of which is even or odd
    halfway = torch.tensor([0x3C008000, 0x3C018000, 0x3F7E8000, 0x3F7F8000]).int()
    halfway = halfway.view(torch.float32)
    near = halfway[:, None] / factor
    near = (near.view(torch.int32) + torch.arange(-4, 5)).view(torch.float32)
    found = near * factor == halfway[:, None]
    assert found.any(1).all()
    largest = near[torch.arange(4), found.int().argmax(1)]
    ties = largest[:, None] * torch.tensor([1.0, -0.5, 0.25, 0.1])
    tiny = torch.finfo(torch.float32).tiny
    steps = torch.tensor([[127.0, 0.5, 1.5, -2.5], [254.0, 1.0, -3.0, 5.0], [0.0, -0.0, 0.0, 0.0]])
    small = torch.tensor([[127 * tiny, tiny, -tiny, 0.0], [120 * tiny, tiny, -tiny, 0.0]])
    broken = torch.randn(3, 4)
    broken[0, 1], broken[1, 2], broken[2, 3] = torch.nan, torch.inf, -torch.inf
    return torch.cat((ties, steps, small, broken))


@pytest.mark.parametrize("impl", FORMS)
def test_every_form_writes_the_same_bytes(impl, device):
    if impl == "native" and device.type == "cuda" and not native.is_available("cuda"):
        pytest.skip("the CUDA library is not built")
    v = edges().to(device)[None, None]
    heads = (1, 4, v.shape[2], 4)
    q, k = torch.randn(1, 1, v.shape[2], 4, device=device), torch.randn(1, 1, 1, 4, device=device)
    expected = torch.zeros(1, 1, int8_row_bytes(*heads, torch.float32), device=device).byte()
    cache = expected.clone()
    write_ring(ring_parts(expected, *heads, torch.float32), ..., k, v)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    step(q, k, v, cache, position, window_size=1, impl=impl)
    # torch has several bit patterns of NaN
    for ring in (cache, expected):
        scales = ring_parts(ring, *heads, torch.float32)[2]
        scales[:] = scales.nan_to_num(-1.0)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("impl", FORMS[:2])
def test_values_meet_their_scales_in_float32(impl):
    """In bfloat16 one rounding is left, that of the output: as large as the reference's."""
    heads = (1, 16, 8, 64)
    k, v = torch.randn(1, 40, 1, 16).bfloat16(), torch.randn(1, 40, 8, 64).bfloat16()
    q, position = torch.randn(1, 1, 8, 16).bfloat16(), torch.tensor([39])
    cache = torch.zeros(1, 40, int8_row_bytes(*heads, torch.bfloat16)).byte()
    write_ring(ring_parts(cache, *heads, torch.bfloat16), ..., k, v)
    values = dequantize_values(*quantize_values(v), torch.float64)
    exact = reference.shared_key_attention(q.double(), k.double(), values)
    new = (q, k[:, -1:], v[:, -1:], cache, position)
    found, base = (
        relative_error(step(*new, window_size=40, impl=name), exact) for name in (impl, "reference")
    )
    # measured: equal; with values rounded to bfloat16 1.36 times as large
    assert found < 1.1 * base


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", ["reference", *FORMS])
def test_a_broken_value_is_seen_by_its_queries_alone(impl, broken, device):
    """In the token's own step and as long as it is in the window; other heads stay finite."""
    if impl == "native" and device.type == "cuda" and not native.is_available("cuda"):
        pytest.skip("the CUDA library is not built")
    draw = lambda *shape: torch.randn(1, *shape, device=device)
    row = int8_row_bytes(1, 16, 2, 16, torch.float32)
    cache = torch.full((1, 9, row), 255, dtype=torch.uint8, device=device)
    for age in range(12):
        q, k, v = draw(1, 2, 16), draw(1, 1, 16), draw(1, 2, 16)
        if age == 4:
            v[0, 0, 1, 5] = broken
        position = torch.tensor([age], device=device)
        o = step(q, k, v, cache, position, window_size=5, impl=impl)
        assert o[0, 0, 0].isfinite().all()
        if 4 <= age < 9:
            assert o[0, 0, 1].isnan().all(), age
        elif age < 4:
            assert o.isfinite().all()
