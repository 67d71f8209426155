"""Linear layers in 8 bits by torchao: a fused step on a CPU reads them, and equals the modules."""

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

from rodimus import modeling_rodimus
from rodimus.generation import Engine, Request
from rodimus.loading import load_model
from rodimus_kernels import Int8Weight, decode_weight, implementations_used, linear, native
from tests.checkpoints import save_model
from tests.model.golden_data import relative_max_error
from tests.model.helpers import random_ids
from tests.model.ways import BOUND, full, in_pieces

pytestmark = [
    pytest.mark.skipif(native.problem("cpu") is not None, reason="native operators are missing"),
    pytest.mark.filterwarnings("ignore"),
]


def quantised(model, config=None, chosen=None):
    """A copy with its linear layers in 8 bits, or those whose names are chosen."""
    copied = copy.deepcopy(model)
    is_chosen = lambda layer, name: isinstance(layer, nn.Linear) and (not chosen or chosen in name)
    quantize_(copied, config or Int8WeightOnlyConfig(), filter_fn=is_chosen)
    return copied


def token_by_token(model, ids):
    return in_pieces(model, ids, [12] + [1] * (ids.shape[1] - 12))


def operators_of_a_step(model):
    ids = random_ids(1, 13)
    with torch.no_grad():
        cache = model(ids[:, :12]).past_key_values
        return implementations_used(lambda: model(ids[:, 12:], past_key_values=cache))


def test_weights_of_torchao_are_taken_as_they_lie():
    layer = nn.Linear(70, 33)
    original = layer.weight.detach().clone()
    quantize_(layer, Int8WeightOnlyConfig())
    weight = decode_weight(layer.weight)
    assert type(weight) is Int8Weight
    assert weight.values.data_ptr() == layer.weight.qdata.data_ptr()
    assert torch.equal(weight.values * weight.scale[:, None], layer.weight.dequantize())
    half_a_step = weight.scale[:, None] / 2
    assert ((weight.values * weight.scale[:, None] - original).abs() <= 1.001 * half_a_step).all()
    x = torch.randn(3, 70)
    assert relative_max_error(linear(x, weight, layer.bias), layer(x)) < 1e-6


def test_other_weights_are_left_alone():
    layer = nn.Linear(64, 32)
    assert decode_weight(layer.weight) is layer.weight
    for change in ("scale", "zero_point", "act_pre_scale"):
        quantize_(layer := nn.Linear(64, 32), Int8WeightOnlyConfig())
        weight = layer.weight
        if change == "scale":
            weight.scale = weight.scale.bfloat16()
        elif change == "zero_point":
            weight.zero_point = torch.ones_like(weight.scale, dtype=torch.int8)
        else:
            weight.act_pre_scale = torch.ones(64)
        assert decode_weight(weight) is weight, change
    quantize_(layer := nn.Linear(64, 32), Int8DynamicActivationInt8WeightConfig())
    assert decode_weight(layer.weight) is layer.weight


@pytest.mark.parametrize("batch", [1, 3])
def test_fused_equals_the_modules(model, monkeypatch, batch):
    """In float32; rounding of the weights is common to both."""
    ids, rounded = random_ids(batch, 40), quantised(model)
    fused = token_by_token(rounded, ids)
    assert relative_max_error(fused, full(rounded, ids)) < BOUND
    assert relative_max_error(fused, full(model, ids)) > 100 * BOUND
    monkeypatch.setattr(modeling_rodimus, "blocks_step", None)
    assert relative_max_error(fused, token_by_token(rounded, ids)) < BOUND


def test_blocks_and_head_are_fused(model):
    used = operators_of_a_step(quantised(model))
    assert used == operators_of_a_step(model)
    assert "rodimus_kernels.native_block:step" in used
    assert "rodimus_kernels.native_linear:linear" in used


@pytest.mark.parametrize(
    "config, chosen",
    [(Int8DynamicActivationInt8WeightConfig(), None), (None, "fc"), (None, "ch_gate_proj.1")],
    ids=["activations too", "some matrices", "a narrow matrix"],
)
def test_anything_else_runs_as_modules(model, config, chosen):
    rounded, ids = quantised(model, config, chosen), random_ids(1, 20)
    assert "rodimus_kernels.native_block:step" not in operators_of_a_step(rounded)
    if config is None:
        assert relative_max_error(token_by_token(rounded, ids), full(rounded, ids)) < BOUND


def test_no_kernel_is_given_a_wrapped_weight(model, monkeypatch):
    """On a GPU long inputs join the weights of layers and gates are fused; both read numbers."""
    rounded, ids = quantised(model), random_ids(2, 20)
    expected = full(rounded, ids)
    plain = lambda self, x: self._projections_are_plain()
    monkeypatch.setattr(modeling_rodimus.RodimusInnerMixer, "_joins_weights", plain)
    monkeypatch.setattr(modeling_rodimus, "input_gate", None)
    assert torch.equal(full(rounded, ids), expected)


def test_a_saved_model_is_loaded_as_it_is(tmp_path):
    """Its files hold other names than ``config.json`` gives a model."""
    save_model(tmp_path / "wide")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", quantization_config=config)
    rounded.save_pretrained(tmp_path / "narrow")
    loaded, ids = load_model(tmp_path / "narrow"), torch.arange(20)[None]
    assert type(decode_weight(loaded.model.layers[0].mixer.fc.weight)) is Int8Weight
    assert torch.equal(full(loaded, ids), full(rounded, ids))


def test_the_engine_equals_generate(model):
    rounded, ids = quantised(model), random_ids(1, 12)
    tokens = rounded.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 12:]
    (found,) = Engine(rounded).generate([Request(ids[0], 30, stop_tokens=())])
    assert found.tokens == tokens.tolist()


def test_a_layer_in_another_dtype_is_no_fused_step(model):
    mixed = copy.deepcopy(model)
    for block in mixed.model.layers:
        gate = block.mixer.inner_mixer.mem_gate_proj
        gate.weight.data = gate.weight.data.bfloat16()
    block = mixed.model.layers[0].step_weights()
    assert not block.is_uniform and model.model.layers[0].step_weights().is_uniform
