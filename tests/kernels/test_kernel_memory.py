"""The check of what kernels load and store: it notices each kind of fault, and finds none."""

import contextlib

import pytest
import torch

from rodimus_kernels import ddts
from rodimus_kernels.testing import DdtsCase, ddts_inputs, run_ddts
from tests.kernel_memory import checked_memory
from tests.kernels.device import DEVICE, triton_module

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter is for the CPU")
SIZE = 16


@triton.jit
def copy(x, y, size, shift, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    tl.store(y + columns, tl.load(x + shift + columns, columns < size), columns < size)


@triton.jit
def store_a_number(y, programs_alike, SIZE: tl.constexpr):
    number = tl.program_id(0) // programs_alike
    tl.store(y + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32) + number)


@triton.jit
def increase_by_one_program(y):
    first = tl.load(y)
    if tl.program_id(0) == 1:
        tl.store(y, first + 1)


@triton.jit
def load_of_the_program_before(y, SIZE: tl.constexpr):
    place = y + tl.program_id(0)
    tl.store(place + 1, 1.0)
    tl.store(place + SIZE, tl.load(place))


@triton.jit
def turn_round(y, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    tl.store(y + columns, columns.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y + SIZE + columns, tl.load(y + SIZE - 1 - columns))


@triton.jit
def store_in_pairs(y, SIZE: tl.constexpr):
    columns = tl.arange(0, SIZE)
    tl.store(y + columns // 2, columns.to(tl.float32))


@pytest.mark.parametrize(
    "kernel, programs, settings, fault",
    [
        (copy, 1, {"size": SIZE, "shift": SIZE}, None),
        (copy, 1, {"size": SIZE - 1, "shift": SIZE + 1}, None),
        (copy, 1, {"size": SIZE, "shift": SIZE + 1}, "loads outside its tensors"),
        (copy, 1, {"size": 1, "shift": -1}, "loads outside its tensors"),
        (copy, 1, {"size": 3 * SIZE, "shift": 0, "SIZE": 4 * SIZE}, "outside its tensors"),
        (store_a_number, 2, {"programs_alike": 2}, None),
        (store_a_number, 2, {"programs_alike": 1}, "another value than another program stores"),
        (increase_by_one_program, 1, {}, None),
        (increase_by_one_program, 2, {}, "stores another value than another program loads"),
        (load_of_the_program_before, 1, {}, None),
        (load_of_the_program_before, 2, {}, "loads what another program stores"),
        (turn_round, 1, {"BARRIER": True}, None),
        (turn_round, 1, {"BARRIER": False}, "what it stored, without a barrier in between"),
        (store_in_pairs, 1, {}, "stores two values in one place"),
    ],
)
def test_faults_are_noticed(kernel, programs, settings, fault):
    names = kernel.arg_names
    settings = {"SIZE": SIZE, **settings} if "SIZE" in names else settings
    # in the middle of what is allocated, where no operating system would notice
    tensors = {
        name: torch.zeros(6 * SIZE)[SIZE : -3 * SIZE] for name in names if name in ("x", "y")
    }
    expected = pytest.raises(Exception, match=f"program . of {kernel.__name__} .*{fault}")
    with checked_memory(), contextlib.nullcontext() if fault is None else expected:
        kernel[(programs,)](**tensors, **settings)


@pytest.mark.parametrize("documents, engine", [((1, 0, 17), 0), (None, 90)])
def test_recurrence_has_none(documents, engine):
    """Where a tile is loaded by pointers, or by the copy engine."""
    inputs = ddts_inputs(DdtsCase(1, 18, 2, 16, 16, documents=documents))
    helpers = triton_module("rodimus_kernels._triton")
    with checked_memory(), helpers.assume_capability(engine):
        run_ddts(ddts, inputs, impl="triton_chunk")
