"""A GPU counts 65,535 programs along the second and third axis of a grid: more are refused."""

import pytest
import torch

from rodimus_kernels import (
    ddts,
    ddts_scan,
    ddts_step,
    input_gate,
    shared_key_attention,
    shared_key_attention_step,
    short_conv,
)
from tests.kernels.device import DEVICE, triton_module

triton_helpers = triton_module("rodimus_kernels._triton")
LIMIT = 3


def sequence(impl, *shape, **options):
    x = [torch.zeros(*shape, 16).requires_grad_(impl == "triton_chunk") for _ in "qkvg"]
    o, _ = ddts(*x, impl=impl, **options)
    if o.requires_grad:
        o.sum().backward()


def packed(documents):
    state = torch.zeros(documents, 1, 16, 16)
    bounds = torch.arange(documents + 1, dtype=torch.int32)
    sequence("triton_chunk", 1, documents, 1, initial_state=state, cu_seqlens=bounds)


def conv(shape, state=None, **options):
    x, weight = torch.zeros(*shape, 16, requires_grad=True), torch.zeros(16, 4)
    if state is not None:
        options["initial_state"] = torch.zeros(state, 16, 4)
    short_conv(x, weight, impl="triton", **options)[0].sum().backward()


def gate(tokens):
    x = torch.zeros(1, tokens, 16, requires_grad=True)
    weight, bias = torch.zeros(16, 16), torch.zeros(16)
    input_gate(x, torch.zeros(1, tokens, 16), weight, bias, impl="triton").sum().backward()


def attention(rows):
    q, k, v = (torch.zeros(rows, 4, 1, 16, requires_grad=True) for _ in "qkv")
    shared_key_attention(q, k, v, impl="triton").sum().backward()


def ring(rows):
    q, k, v = (torch.zeros(rows, 1, 1, 16) for _ in "qkv")
    position = torch.zeros(rows, dtype=torch.long)
    cache = torch.zeros(rows, 8, 32)
    shared_key_attention_step(q, k, v, cache, position, window_size=8, impl="triton")


def token(rows):
    q, k, v, g = (torch.zeros(rows, 1, 16) for _ in "qkvg")
    ddts_step(q, k, v, g, torch.zeros(rows, 1, 16, 16), impl="triton")


def scan(rows):
    ddts_scan(torch.zeros(2, rows, 1, 16, 16), torch.zeros(2, rows, 1, 16), impl="triton")


documents = lambda n: torch.arange(n + 1, dtype=torch.int32)
CALLS = {
    "rows by chunks": (lambda n: sequence("triton_chunk", n, 4, 1), "sequences"),
    "heads by chunks": (lambda n: sequence("triton_chunk", 1, 4, n), "sequences"),
    "documents by chunks": (packed, "sequences"),
    "rows by tokens": (lambda n: sequence("triton_recurrent", n, 4, 1), "sequences"),
    "step": (token, "sequences"),
    "scan": (scan, "sequences"),
    "convolution": (lambda n: conv((n, 4)), "rows"),
    "long convolution": (lambda n: conv((1, 64 * n)), "runs of 64 tokens"),
    "states of a convolution": (
        lambda n: conv((1, n), n, cu_seqlens=documents(n)),
        "documents with a state",
    ),
    "input gate": (lambda n: gate(64 * n), "blocks of 64 tokens"),
    "attention": (attention, "rows"),
    "attention step": (ring, "tokens"),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter says what was launched")
@pytest.mark.parametrize("name", CALLS)
def test_a_grid_beyond_the_limit_is_refused(name, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    grids, run = [], InterpretedFunction.run

    def recorded(self, *args, grid, **options):
        grids.append(grid)
        return run(self, *args, grid=grid, **options)

    monkeypatch.setattr(InterpretedFunction, "run", recorded)
    monkeypatch.setattr(triton_helpers, "_GRID_LIMIT", LIMIT)
    call, what = CALLS[name]
    call(LIMIT)
    assert max(size for grid in grids for size in grid[1:]) <= LIMIT
    with pytest.raises(ValueError, match=f"expected at most {LIMIT} {what}.* in a call, got 4"):
        call(LIMIT + 1)
