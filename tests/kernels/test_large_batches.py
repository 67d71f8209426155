"""Operators over sequences on a GPU: offsets beyond 32 bits, and nothing waits for the device.
Attention has tests of its own. Small shapes run everywhere, so that it is the GPU which fails."""

import fcntl
import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch

import rodimus_kernels as rk
from rodimus_kernels.testing import relative_error
from tests.kernels.device import DEVICE, TRITON_MARKS

pytestmark = TRITON_MARKS
SMALL, LARGE = (2, 9, 32), (66, 16384, 2048)


@pytest.fixture(autouse=True)
def one_at_a_time():
    """Each takes tens of GB of a GPU, which tests in other processes use too: so they wait for each
    other, and keep nothing."""
    if DEVICE == "cpu":
        yield
        return
    with open(Path(tempfile.gettempdir(), "rodimus-large-batches.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@functools.cache
def constants(*shape):
    """The same numbers in every call, in bfloat16; to copy them to a GPU waits for it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)


def keys(x):
    """Queries, keys and log-decays of all rows, which share memory."""
    q, k, g = (constants(3, x.shape[1], 1, 16)).unbind(0)
    return [t.expand(x.shape[0], *t.shape) for t in (q, k, -g.abs())]


def ddts(x, impl="triton_chunk", **named):
    q, k, g = keys(x)
    return rk.ddts(q, k, x[:, :, None], g, impl=impl, **named)[0]


def gated_ddts(x):
    q, k, g = keys(x)
    return rk.gated_ddts(q, k, x[:, :, None], g, k, impl="triton_chunk")[0]


def short_conv(x, **named):
    return rk.short_conv(x, constants(x.shape[2], 4), impl="triton", **named)[0]


def input_gate(x):
    hidden = constants(x.shape[1], 16).expand(x.shape[0], -1, -1)
    weight = constants(x.shape[2], 16)
    return rk.input_gate(x.flatten(0, 1), hidden.flatten(0, 1), weight, weight[:, 0], impl="triton")


OPERATORS = {
    "ddts": ddts,
    "gated_ddts": gated_ddts,
    "short_conv": short_conv,
    "rms_norm": lambda x: rk.rms_norm(x, constants(x.shape[2]), impl="triton"),
    "add_rms_norm": lambda x: rk.add_rms_norm(x, x, constants(x.shape[2]), impl="triton")[0],
    "gated_rms_norm": lambda x: rk.gated_rms_norm(x, x, constants(x.shape[2]), impl="triton"),
    "swiglu": lambda x: rk.swiglu(x, impl="triton"),
    "input_gate": input_gate,
}


def run(operator, x, dy=None):
    """Output and gradient, as rows of the batch; the last row's gradient is not zero."""
    x = x.detach().requires_grad_()
    y = operator(x)
    rows = y.reshape(x.shape[0], x.shape[1], -1)
    dy = torch.zeros_like(rows)
    dy[-1] = constants(*rows.shape[1:])
    rows.backward(dy)
    return rows.detach(), x.grad


@pytest.mark.parametrize("shape", [SMALL, pytest.param(LARGE, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_the_last_row_of_many_is_that_of_one(operator, shape):
    """Of a large batch it is past 2**31 elements."""
    if shape == LARGE and torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of device memory")
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = constants(*shape[1:])
    for together, alone in zip(run(operator, x), run(operator, x[-1:]), strict=True):
        assert alone.any()
        assert relative_error(together[-1:], alone) < 1e-2
        assert not together[0].any()


def packed(operator):
    """Three documents in a row, one of them empty, and their last states."""
    bounds = torch.tensor([0, 90, 90, 200], device=DEVICE)
    return lambda x: operator(x, cu_seqlens=bounds, output_final_state=True)


APART, TOKENS = 2**28, 9


def time_first(memory, tensors):
    """The same numbers ``[B, T, ...]`` in memory that has all of a token in one row: ``APART``
    elements from one token to the next, 2**31 to the last."""
    rows = [x.transpose(0, 1).flatten(1) for x in tensors]
    edges = [0, *itertools.accumulate(row.shape[1] for row in rows)]
    views = [memory[:, first:last] for first, last in itertools.pairwise(edges)]
    for view, row in zip(views, rows, strict=True):
        view.copy_(row)
    return [
        view.unflatten(1, (x.shape[0], *x.shape[2:])).transpose(0, 1)
        for view, x in zip(views, tensors, strict=True)
    ]


def attention(q, k, v):
    return rk.shared_key_attention(q, k, v, window_size=5, impl="triton")


SEQUENCES = {
    "ddts": (lambda *x: rk.ddts(*x, impl="triton_chunk")[0], 4),
    "gated_ddts": (lambda *x: rk.gated_ddts(*x, impl="triton_chunk")[0], 5),
    "ddts_gates": (lambda *x: rk.ddts_gates(*x, impl="triton")[0].bfloat16(), 3),
    "short_conv": (lambda x: short_conv(x[:, :, 0]), 1),
    "shared_key_attention": (attention, 3),
}


@pytest.fixture
def memory(tmp_path):
    """Memory of rows that lie ``APART``, behind 2**31 elements more: what wraps stays in it."""
    shape = {"dtype": torch.bfloat16, "size": 2**31 + TOKENS * APART}
    if DEVICE == "cpu":
        # a file with holes: only what is written takes memory
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, **shape)
    elif torch.cuda.get_device_properties(0).total_memory < 20e9:
        pytest.skip("needs 20 GB of device memory")
    else:
        memory = torch.zeros(shape["size"], dtype=shape["dtype"], device=DEVICE)
    return memory[2**31 :].view(TOKENS, APART)


@pytest.mark.parametrize("operator, inputs", SEQUENCES.values(), ids=SEQUENCES)
def test_tokens_may_be_far_apart(operator, inputs, memory):
    """Offsets of a tile's rows are past 2**31 elements."""
    # log-decays among them
    given = (-constants(inputs + 1, 2, TOKENS, 1, 16).abs()).unbind(0)
    far = time_first(memory, given)
    found = []
    for *leaves, dy in given, far:
        leaves = [x.requires_grad_() for x in leaves]
        y = operator(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, dy.view(y.shape))])
    assert all(map(torch.equal, *found))


ROWS = OPERATORS | {"shared_key_attention": lambda x: attention(*[x[:, :, None]] * 3)}


@pytest.mark.parametrize("operator", ROWS.values(), ids=ROWS)
def test_rows_may_be_far_apart(operator, memory):
    """Of a batch of single tokens; the last begins 2**31 elements behind the first."""
    given = constants(3, 1, 16)
    # with tokens as near as they can be: others would be copied
    far = memory[::4, :16].unsqueeze(1).copy_(given)
    assert far.stride() == (2**30, 16, 1)
    with torch.no_grad():
        assert torch.equal(operator(given), operator(far))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*OPERATORS, "ddts, packed", "short_conv, packed"])
def test_nothing_waits_for_the_device(name):
    name, *is_packed = name.split(", ")
    operator, x = OPERATORS[name], constants(2, 200, 64)
    if is_packed:
        operator, x = packed(operator), x[:1]
    run(operator, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(operator, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
