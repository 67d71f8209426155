"""Products of half precision in float32, for CPUs that lack instructions for them."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import rodimus_kernels as rk
from rodimus_kernels import native, reference
from rodimus_kernels.linear import _choose

module = importlib.import_module("rodimus_kernels.linear")
HALVES = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def weights(dtype, outputs, inputs):
    if dtype == torch.int8:
        values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return rk.Int8Weight(values, torch.rand(outputs) / 100)
    if dtype == torch.uint8:
        return rk.quantize_int4(torch.randn(outputs, inputs))
    return torch.randn(outputs, inputs).to(dtype)


def in_float64(matrix):
    if isinstance(matrix, tuple):
        return reference.dense_weight(matrix._replace(scale=matrix.scale.double()))
    return matrix.double()


@pytest.mark.parametrize("outputs", [1, 5, 512, 1100])
@pytest.mark.parametrize("rows", [0, 1, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_widened_products_are_summed_in_float32_and_rounded_once(dtype, rows, outputs):
    inputs = 70
    x = torch.randn(rows, inputs).to(dtype)
    for kind in (dtype, torch.int8, torch.uint8):
        matrix = weights(kind, outputs, inputs)
        for bias in (None, torch.randn(outputs), torch.randn(outputs).to(dtype)):
            y = rk.linear(x, matrix, bias, impl="widened")
            dense = in_float64(matrix)
            exact = F.linear(x.double(), dense, None if bias is None else bias.double())
            sizes = F.linear(x.double().abs(), dense.abs())
            sizes = sizes if bias is None else sizes + bias.double().abs()
            # terms summed in float32, a scale and a bias; then half a unit of the result's dtype
            wide = torch.promote_types(dtype, torch.float32)
            summed = (inputs + 2) * torch.finfo(wide).eps / 2 * sizes
            assert y.dtype == dtype
            assert ((y - exact).abs() <= summed + torch.finfo(dtype).eps / 2 * exact.abs()).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_no_sum_is_kept_in_half_precision(dtype):
    """In float16 one of these would be infinite, in bfloat16 it would stop growing."""
    x, matrix = torch.full((9, 4096), 8.0, dtype=dtype), torch.full((3, 4096), 8.0, dtype=dtype)
    y = rk.linear(x, matrix, torch.full((3,), -8.0 * 8 * 4095), impl="widened")
    assert torch.equal(y, torch.full((9, 3), 64.0, dtype=dtype))


def test_automatic_choice(monkeypatch):
    """Where products are slow few rows still read the weights natively, and many are widened."""
    for is_built in (True, False):
        chosen = "native" if is_built else "eager"
        monkeypatch.setattr(module, "choose_compiled", lambda *_, chosen=chosen: chosen)
        for is_slow in (True, False):
            monkeypatch.setattr(module, "multiplies_slowly", lambda *_, slow=is_slow: slow)
            for name, dtype in KINDS.items():
                found = [
                    _choose(torch.randn(rows, 4, dtype=torch.bfloat16), weights(dtype, 3, 4), None)
                    for rows in (0, 1, 8, 9, 32, 33, 600)
                ]
                assert found == CHOICES[is_built, is_slow, name], (is_built, is_slow, name)


KINDS = {"half": torch.bfloat16, "8 bits": torch.int8, "4 bits": torch.uint8}
CHOICES = {
    (True, True, "4 bits"): ["eager"] + 4 * ["native"] + 2 * ["widened"],
    (True, False, "4 bits"): ["eager"] + 4 * ["native"] + 2 * ["widened"],
    (False, True, "4 bits"): 3 * ["eager"] + 4 * ["widened"],
    (False, False, "4 bits"): 3 * ["eager"] + 4 * ["widened"],
    (True, True, "half"): ["eager"] + 4 * ["native"] + 2 * ["widened"],
    (True, True, "8 bits"): ["eager"] + 4 * ["native"] + 2 * ["widened"],
    (True, False, "half"): ["eager"] + 2 * ["native"] + 4 * ["eager"],
    (True, False, "8 bits"): ["eager"] + 6 * ["native"],
    (False, True, "half"): 3 * ["eager"] + 4 * ["widened"],
    (False, True, "8 bits"): 3 * ["eager"] + 4 * ["widened"],
    (False, False, "half"): 7 * ["eager"],
    (False, False, "8 bits"): 7 * ["eager"],
}


def test_slow_are_half_precision_on_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(module, "_has_products", lambda dtype: dtype == torch.float16)
    assert rk.multiplies_slowly(CPU, torch.bfloat16)
    assert not rk.multiplies_slowly(CPU, torch.float16)
    monkeypatch.setattr(module, "_has_products", lambda dtype: False)
    assert rk.multiplies_slowly(CPU, torch.float16)
    assert not rk.multiplies_slowly(torch.device("cuda"), torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        assert not rk.multiplies_slowly(CPU, dtype)


def test_torch_says_what_it_has():
    for dtype in HALVES:
        assert isinstance(module._has_products(dtype), bool)


@pytest.mark.skipif(native.problem("cpu") is not None, reason="native operators are missing")
def test_rows_read_natively_in_parts_are_as_alone(monkeypatch):
    monkeypatch.setattr(module, "_has_products", lambda dtype: False)
    x, matrix = torch.randn(19, 70).bfloat16(), torch.randn(33, 70).bfloat16()
    alone = [rk.linear(row[None], matrix, impl="native") for row in x]
    assert torch.equal(rk.linear(x, matrix), torch.cat(alone))


@pytest.mark.skipif(native.problem("cpu") is not None, reason="native operators are missing")
def test_more_rows_take_fused_steps_where_torch_multiplies_no_better(monkeypatch):
    rows = (0, 8, 9, 32, 33)
    takes = lambda *tensors: [rk.can_fuse_block(n, *tensors) for n in rows]
    wide, half = torch.randn(2, 4), torch.randn(2, 4).bfloat16()
    for is_fast in (True, False):
        monkeypatch.setattr(module, "_has_products", lambda dtype, found=is_fast: found)
        assert takes(wide, None) == [False, True, True, True, False]
        assert takes(wide, half) == [False, True, not is_fast, not is_fast, False]


def test_any_number_of_rows_takes_fused_steps_on_a_gpu(monkeypatch):
    """A tensor that is not on the CPU stands for one there."""
    monkeypatch.setattr(native, "fits", lambda *tensors, is_decoding: True)
    assert rk.can_fuse_block(600, torch.empty(1, device="meta"))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_without_gradients_multiplies_alike(monkeypatch, reduction):
    hidden, weight = torch.randn(40, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    labels = torch.randint(0, 50, (40,))
    loss = lambda: rk.linear_cross_entropy(hidden, weight, labels, reduction=reduction)[0]
    monkeypatch.setattr(module, "_has_products", lambda dtype: True)
    expected, products = loss(), "rodimus_kernels.linear:widened_linear"
    assert products not in rk.implementations_used(loss)
    monkeypatch.setattr(module, "_has_products", lambda dtype: False)
    assert products in rk.implementations_used(loss)
    # logits are rounded alike but for sums in another order
    torch.testing.assert_close(loss(), expected, rtol=1e-3, atol=0)


def test_the_input_gate_is_computed_in_float32_where_products_are_slow(monkeypatch):
    shapes = (9, 40), (9, 16), (40, 16), (40,)
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    gate = lambda: rk.input_gate(*tensors)
    for is_fast, chosen in ((True, "input_gate:eager_input_gate"), (False, "reference:input_gate")):
        monkeypatch.setattr(module, "_has_products", lambda dtype, found=is_fast: found)
        assert rk.implementations_used(gate) == [f"rodimus_kernels.{chosen}"]
