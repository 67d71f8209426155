"""On a CPU without instructions for half precision the model takes its products in float32."""

import importlib

import pytest
import torch

from rodimus import modeling_rodimus
from rodimus.loading import load_model
from rodimus_kernels import implementations_used
from tests.checkpoints import save_model
from tests.model.golden_data import l2_error
from tests.model.helpers import model_of, random_ids
from tests.model.ways import SHARE, full

linear = importlib.import_module("rodimus_kernels.linear")
WIDENED = "rodimus_kernels.linear:widened_linear"
HALVES = (torch.bfloat16, torch.float16)
# of a mixer fc, in_proj, mem_gate_proj, the first of ch_gate_proj, out_proj; of attention q, k, v,
# out_proj; of an MLP fc, out_proj
LAYERS = {"rodimus": 5, "rodimus_plus": 11, "grouped": 11}


@pytest.fixture
def has_products(monkeypatch):
    """Say whether the CPU has instructions for half precision."""
    return lambda found: monkeypatch.setattr(linear, "_has_products", lambda dtype: found)


def widened(call):
    return implementations_used(call).count(WIDENED)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_product_of_many_rows_is_widened(model, kind, dtype, has_products):
    ids, blocks = random_ids(2, 20), model.config.n_layer
    exact = full(model, ids)
    has_products(True)
    assert not widened(lambda: full(model.to(dtype), ids))
    plain = full(model, ids)
    has_products(False)
    assert widened(lambda: full(model, ids)) == LAYERS[kind] * blocks + 1
    assert l2_error(full(model, ids), exact) < SHARE * l2_error(plain, exact)
    assert not widened(lambda: full(model.float(), ids))


def test_gradients_autocast_and_compilers_have_the_modules(has_products):
    model, ids = model_of("rodimus_plus"), random_ids(2, 20)
    has_products(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert not widened(lambda: full(model, ids))
    model.bfloat16()
    assert not widened(lambda: model(ids, labels=ids).loss.backward())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_layer_that_does_more_is_called(has_products):
    model, ids = model_of("rodimus_plus").bfloat16(), random_ids(2, 20)
    has_products(False)
    expected, before = full(model, ids), widened(lambda: full(model, ids))
    layer, seen = model.model.layers[0].ffn.fc, []
    layer.register_forward_hook(lambda module, given, y: seen.append(y.shape))
    assert widened(lambda: full(model, ids)) == before - 1
    assert seen == [(2, 20, layer.out_features)]
    assert l2_error(full(model, ids), expected) < 0.02


def test_a_head_may_have_a_bias(has_products):
    model, ids = model_of("grouped").bfloat16(), random_ids(2, 20)
    model.lm_head.bias = torch.nn.Parameter(torch.full((model.vocab_size,), 8.0).bfloat16())
    has_products(True)
    expected = full(model, ids)
    has_products(False)
    assert l2_error(full(model, ids), expected) < 0.02


def test_generation_is_that_of_a_cpu_with_instructions(has_products):
    """Greedy, where no two logits are close: they are as far apart as random weights make them."""
    model, ids = model_of("rodimus_plus").bfloat16(), random_ids(1, 50)
    tokens = []
    for found in (True, False):
        has_products(found)
        tokens.append(model.generate(ids, max_new_tokens=1, do_sample=False, logits_to_keep=1))
    assert torch.equal(*tokens)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_quantized_weights_are_widened_in_parts(tmp_path, has_products, weight_dtype):
    pytest.importorskip("torchao")
    save_model(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    ids = torch.arange(40)[None]
    has_products(True)
    expected = full(model, ids)
    has_products(False)
    assert widened(lambda: full(model, ids)) > model.config.n_layer * 5
    assert l2_error(full(model, ids), expected) < 0.02


def test_without_the_package_torch_multiplies(monkeypatch, has_products):
    model, ids = model_of("rodimus_plus").bfloat16(), random_ids(2, 20)
    has_products(False)
    monkeypatch.setattr(modeling_rodimus, "blocks_step", None)
    assert not widened(lambda: full(model, ids))
