"""Linear layers in 8 and 4 bits: a fused step on a CPU reads them, and equals the modules."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

from rodimus import modeling_rodimus
from rodimus.generation import Engine, Request
from rodimus.loading import load_model
from rodimus.quantization import Int4Tensor, round_to_int4
from rodimus_kernels import (
    Int4Weight,
    Int8Weight,
    decode_weight,
    implementations_used,
    linear,
    native,
    quantize_int4,
    reference,
)
from tests.checkpoints import save_model
from tests.model.golden_data import relative_max_error
from tests.model.helpers import ONE_KIND, enliven, random_ids
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


def quantised_to_4_bits(model):
    copied = copy.deepcopy(model)
    round_to_int4(copied)
    return copied


ROUNDED = pytest.mark.parametrize("rounded", [quantised, quantised_to_4_bits])


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
@ROUNDED
def test_fused_equals_the_modules(model, monkeypatch, rounded, batch):
    """In float32; rounding of the weights is common to both."""
    ids, rounded = random_ids(batch, 40), rounded(model)
    fused = token_by_token(rounded, ids)
    assert relative_max_error(fused, full(rounded, ids)) < BOUND
    assert relative_max_error(fused, full(model, ids)) > 100 * BOUND
    monkeypatch.setattr(modeling_rodimus, "blocks_step", None)
    assert relative_max_error(fused, token_by_token(rounded, ids)) < BOUND


@ROUNDED
def test_blocks_and_head_are_fused(model, rounded):
    used = operators_of_a_step(rounded(model))
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


def test_weights_are_rounded_to_the_nearest_of_16():
    torch.manual_seed(0)
    weight = torch.randn(300, 200)
    packed = quantize_int4(weight)
    assert packed.values.shape == (300, 128) and packed.scale.shape == (300, 8)
    error = (reference.dense_weight(packed) - weight).double()
    # with a symmetric range and the largest weight at its end it is 0.097
    assert error.norm() / weight.norm() < 0.084
    steps = error.abs() / packed.scale.double().abs().repeat_interleave(32, 1)[:, :200]
    # half a step, but for the few that the scale leaves outside: of 8.5 steps 7 are left
    assert steps.max() < 1.51 and (steps > 0.501).double().mean() < 0.03


def test_what_16_values_hold_is_kept():
    integers = torch.randint(-8, 8, (40, 256))
    integers[:, ::32] = -8
    weight = integers * (2.0 ** torch.randint(-9, 9, (40, 8))).repeat_interleave(32, 1)
    for given in (weight, -weight, 2.0**-40 * weight, torch.zeros(3, 70), torch.zeros(0, 64)):
        assert torch.equal(reference.dense_weight(quantize_int4(given)), given)


def test_weights_that_cannot_be_rounded_are_refused():
    for bad, message in (
        (torch.randn(4), r"matrix \[N, K\] of floating point, got shape \(4,\)"),
        (torch.ones(4, 4, dtype=torch.int8), "got shape .* of torch.int8"),
        (torch.full((4, 40), torch.inf), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_int4(bad)


def test_gates_and_head_keep_8_bits(model):
    rounded = quantised_to_4_bits(model)
    kinds = {name: type(x) for name, x in rounded.named_parameters() if x.dim() == 2}
    wide = {name for name in kinds if "ch_gate" in name or "mem_gate" in name or "head" in name}
    layers = {name for name in kinds if "embeddings" not in name}
    found = {name: type(decode_weight(rounded.get_parameter(name))) for name in layers}
    assert found == {n: Int8Weight if n in wide else Int4Weight for n in layers} and wide
    assert rounded.model.embeddings.weight.dtype == torch.float32


def test_a_layer_in_4_bits_passes_gradients_on():
    layer = nn.Linear(70, 33)
    layer.weight = nn.Parameter(
        Int4Tensor(*quantize_int4(layer.weight), torch.float32), requires_grad=False
    )
    x = torch.randn(3, 70, requires_grad=True)
    y = layer(x)
    expected = torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias)
    torch.testing.assert_close(y, expected)
    for of in (x, layer.bias):
        (found,), (exact,) = (
            torch.autograd.grad(z.sum(), of, retain_graph=True) for z in (y, expected)
        )
        assert torch.equal(found, exact)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@ONE_KIND
def test_a_model_in_4_bits_is_copied_compiled_and_kept(model, tmp_path):
    rounded, ids = quantised_to_4_bits(model), random_ids(1, 20)
    expected = full(rounded, ids)
    assert torch.equal(full(copy.deepcopy(rounded), ids), expected)
    with torch.no_grad():
        compiled = torch.compile(rounded, backend="eager", fullgraph=True)
        # torch 2.11 cannot record how a cache is made
        found = compiled(ids, use_cache=torch.__version__ >= "2.12").logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.save(rounded.state_dict(), tmp_path / "weights.pt")
    enliven(model, seed=1)
    other = quantised_to_4_bits(model)
    assert not torch.equal(full(other, ids), expected)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(full(other, ids), expected)


def test_a_saved_model_is_loaded_as_it_is(tmp_path):
    """Its files hold other names than ``config.json`` gives a model."""
    save_model(tmp_path / "wide")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", quantization_config=config)
    rounded.save_pretrained(tmp_path / "narrow")
    loaded, ids = load_model(tmp_path / "narrow"), torch.arange(20)[None]
    assert type(decode_weight(loaded.model.layers[0].mixer.fc.weight)) is Int8Weight
    assert torch.equal(full(loaded, ids), full(rounded, ids))


@ROUNDED
def test_the_engine_equals_generate(model, rounded):
    rounded, ids = rounded(model), random_ids(1, 12)
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
