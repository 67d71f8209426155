"""Tensors without values: a check of values lets them pass, as it does those of a GPU."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import rodimus_kernels as rk
from rodimus_kernels.reference import can_read_values


def documents():
    """Two of six tokens; torch knows the values of a fake ``torch.tensor([0, 6, 12])``."""
    return torch.arange(0, 13, 6)


def step(impl):
    q, k, v = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 1, 8), torch.randn(2, 1, 2, 8)
    position = torch.zeros(2, dtype=torch.int64)
    return rk.shared_key_attention_step(
        q, k, v, torch.zeros(2, 6, 24), position, window_size=5, impl=impl
    )


def attention(impl):
    q, k, v = torch.randn(1, 12, 4, 8), torch.randn(1, 12, 1, 8), torch.randn(1, 12, 2, 8)
    return rk.shared_key_attention(q, k, v, cu_seqlens=documents(), impl=impl)


def ddts(impl):
    inputs = (torch.randn(1, 12, 1, 16) for _ in range(4))
    return rk.ddts(*inputs, cu_seqlens=documents(), impl=impl)[0]


def convolution(impl):
    x, weight = torch.randn(1, 12, 8), torch.randn(8, 4)
    return rk.short_conv(x, weight, cu_seqlens=documents(), impl=impl)[0]


def loss(impl):
    labels = torch.zeros(3, dtype=torch.int64)
    return rk.linear_cross_entropy(torch.randn(3, 4), torch.randn(5, 4), labels, impl=impl)[0]


CALLS = [
    *((step, impl) for impl in ("auto", "sdpa", "reference")),
    *((attention, impl) for impl in ("auto", "sdpa", "reference")),
    *((ddts, impl) for impl in ("auto", "eager")),
    *((convolution, impl) for impl in ("auto", "reference")),
    *((loss, impl) for impl in ("auto", "eager", "reference")),
]


@pytest.mark.parametrize("call, impl", CALLS)
def test_no_check_needs_values(call, impl):
    real = call(impl)
    with FakeTensorMode():
        fake = call(impl)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_values_are_read_where_that_is_free(monkeypatch):
    x = torch.zeros(3)
    assert can_read_values(x) and can_read_values(torch.nn.Parameter(x))
    assert not can_read_values(x.to("meta"))
    with FakeTensorMode():
        assert not can_read_values(torch.zeros(3))
    seen = []
    torch.compile(lambda x: seen.append(can_read_values(x)) or x + 1, backend="eager")(x)
    torch.vmap(lambda x: seen.append(can_read_values(x)) or x)(x)
    assert seen == [False, False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not can_read_values(x)
