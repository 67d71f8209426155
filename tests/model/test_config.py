"""The configuration: the released format in and out, the usual names beside it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rodimus import (
    RodimusConfig,
    RodimusForCausalLM,
    RodimusForSequenceClassification,
    RodimusModel,
)
from tests.model.golden_data import BLOCK_TYPES, GOLDENS, golden_config, golden_weights
from tests.model.helpers import config_of, golden_model, model_of
from tests.model.oracle import parameter_shapes

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("rodimus*.json"))

# the published configuration of the 1.6B model
RELEASED = {
    "architectures": ["RodimusForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_rodimus.RodimusConfig",
        "AutoModelForCausalLM": "modeling_rodimus.RodimusForCausalLM",
    },
    "attn_cfg": {
        "ffn_expand_ratio": 4 / 3,
        "num_heads": 16,
        "num_heads_k": 1,
        "num_heads_v": 16,
        "rotary_emb_dim": -1,
        "rotary_emb_scale_base": None,
        "window_size": 4096,
    },
    "block_type": "rodimus_plus",
    "bos_token_id": 126080,
    "d_model": 2048,
    "eos_token_id": 126081,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "mixer_cfg": {
        "expand_ratio": 2.0,
        "input_gate_low_rank": "auto",
        "mem_size": 64,
        "mode": "fused_chunk",
        "normalize_epsilon": 1e-5,
    },
    "model_type": "rodimus",
    "n_layer": 24,
    "norm_epsilon": 1e-5,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": True,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_fast_path": True,
    "use_fused_cross_entropy": True,
    "use_norm_embedding": False,
    "use_scale_embedding": False,
    "vocab_size": 126464,
}


def contains(actual, expected) -> bool:
    """Every field of ``expected``, nested ones too, with the same value."""
    if isinstance(expected, dict):
        return all(key in actual and contains(actual[key], expected[key]) for key in expected)
    return actual == expected


@pytest.mark.parametrize(
    "fields",
    [
        RELEASED,
        golden_config("rodimus"),
        golden_config("rodimus_plus"),
        config_of("grouped"),
        RELEASED | {"block_type": "rodimus", "attn_cfg": {"num_heads": None, "window_size": 128}},
    ],
    ids=["released 1.6B", "rodimus", "rodimus_plus", "grouped", "null heads"],
)
def test_saving_keeps_the_released_layout(tmp_path, fields):
    """Every released field comes back with its value; derived names are not written."""
    RodimusConfig.from_dict(copy.deepcopy(fields)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    volatile = {"torch_dtype", "transformers_version", "architectures", "auto_map"}
    kept = {name: value for name, value in fields.items() if name not in volatile}
    assert contains(saved, kept)
    assert not saved.keys() & {"hidden_size", "num_hidden_layers", "num_attention_heads"}
    assert not saved.keys() & {"head_dim", "sliding_window", "layer_types", "num_key_value_heads"}
    again = RodimusConfig.from_pretrained(tmp_path)
    assert again.to_dict() == RodimusConfig.from_dict(copy.deepcopy(fields)).to_dict()


def test_unknown_fields_survive(tmp_path):
    config = RodimusConfig.from_dict(golden_config("rodimus") | {"a_later_field": [1, {"x": 2}]})
    config.save_pretrained(tmp_path)
    assert RodimusConfig.from_pretrained(tmp_path).a_later_field == [1, {"x": 2}]
    assert json.loads((tmp_path / "config.json").read_text())["a_later_field"] == [1, {"x": 2}]


def test_usual_names():
    config = RodimusConfig.from_dict(copy.deepcopy(RELEASED))
    assert (config.hidden_size, config.num_hidden_layers) == (2048, 24)
    assert (config.num_attention_heads, config.num_key_value_heads) == (16, 1)
    assert config.head_dim == 128
    assert config.sliding_window == 2049
    assert config.layer_types == ["hybrid_sliding"] * 24
    config = RodimusConfig.from_dict(golden_config("rodimus"))
    assert config.sliding_window is None
    assert config.layer_types == ["linear_attention"] * 3


def test_usual_names_can_be_given():
    config = RodimusConfig(hidden_size=256, num_hidden_layers=3)
    assert (config.d_model, config.n_layer) == (256, 3)
    saved = config.to_dict()
    assert saved["d_model"] == 256 and saved["n_layer"] == 3 and "hidden_size" not in saved


@pytest.mark.parametrize(
    "two", [{"d_model": 2048, "hidden_size": 64}, {"n_layer": 24, "num_hidden_layers": 2}]
)
def test_a_field_is_given_by_one_name(two):
    """A value that is the default was given all the same."""
    with pytest.raises(ValueError, match="are one field, got {} and {}".format(*two.values())):
        RodimusConfig(**two)
    assert RodimusConfig(n_layer=4, num_hidden_layers=4).n_layer == 4
    assert (RodimusConfig().d_model, RodimusConfig().n_layer) == (2048, 24)


@pytest.mark.parametrize(
    ("field", "value", "home"),
    [
        ("window_size", 128, "attn_cfg"),
        ("num_heads", 4, "attn_cfg"),
        ("rotary_emb_base", 5e5, "attn_cfg"),
        ("mem_size", 128, "mixer_cfg"),
        ("d_conv", 8, "mixer_cfg"),
    ],
)
def test_options_beside_their_dict_are_refused(field, value, home):
    with pytest.raises(ValueError, match=f"{field} belongs in {home}: expected {home}="):
        RodimusConfig(block_type="rodimus_plus", **{field: value})


def test_usual_names_can_be_assigned():
    config = RodimusConfig.from_dict(golden_config("rodimus_plus"))
    config.hidden_size, config.num_hidden_layers, config.sliding_window = 128, 5, 33
    assert (config.d_model, config.n_layer, config.attn_cfg["window_size"]) == (128, 5, 64)
    assert config.layer_types == ["hybrid_sliding"] * 5


def test_integers_of_numpy_become_those_of_python(tmp_path):
    """JSON has no others."""
    size = np.int64(32)
    mixer, attn = {"mem_size": size}, {"window_size": size, "num_heads": np.int32(2)}
    given = {"d_model": size, "num_hidden_layers": np.int8(2), "vocab_size": size}
    given["max_position_embeddings"] = size
    config = RodimusConfig("rodimus_plus", mixer_cfg=mixer, attn_cfg=attn, **given)
    config.sliding_window = config.num_attention_heads = np.int64(4)
    config.save_pretrained(tmp_path)
    again = RodimusConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert (again.d_model, again.n_layer, again.mem_size) == (32, 2, 32)
    assert (again.sliding_window, again.num_attention_heads, again.vocab_size) == (4, 4, 32)


def test_heads_follow_from_the_width():
    attn = {"num_heads": None, "num_heads_k": 1, "num_heads_v": None, "window_size": 16}
    config = RodimusConfig(block_type="rodimus_plus", d_model=512, attn_cfg=attn)
    assert (config.num_attention_heads, config.head_dim) == (4, 128)


def test_configs_share_nothing():
    given = {"mem_size": 16}
    first, second = RodimusConfig(mixer_cfg=given), RodimusConfig()
    first.mixer_cfg["mem_size"] = 8
    first.attn_cfg["window_size"] = 2
    assert given == {"mem_size": 16}
    assert RodimusConfig().mixer_cfg["mem_size"] == second.mixer_cfg["mem_size"] == 64
    assert RodimusConfig().attn_cfg["window_size"] == second.attn_cfg["window_size"] != 2


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configs_build(path):
    config = RodimusConfig.from_json_file(path)
    assert RodimusConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with torch.device("meta"):
        RodimusForCausalLM(config)


# --------------------------------------------------------------------------------- names of weights


@pytest.mark.parametrize("kind", ["rodimus", "rodimus_plus", "grouped"])
def test_saved_checkpoint_has_the_released_names(tmp_path, kind):
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in saved.items()}
    assert shapes == parameter_shapes(config_of(kind))
    again = RodimusForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_weights_stay_tied(block_type):
    model = RodimusForCausalLM.from_pretrained(GOLDENS / block_type)
    assert model.lm_head.weight is model.model.embeddings.weight
    assert model.get_input_embeddings() is model.model.embeddings
    assert model.get_output_embeddings() is model.lm_head


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_base_model_loads_a_causal_checkpoint(block_type):
    """The original loaded nothing here, silently."""
    model, info = RodimusModel.from_pretrained(GOLDENS / block_type, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = golden_weights(block_type)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[f"model.{name}"]), name


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_auto_classes(block_type):
    folder = GOLDENS / block_type
    assert type(AutoConfig.from_pretrained(folder)) is RodimusConfig
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is RodimusForCausalLM
    assert type(AutoModel.from_pretrained(folder)) is RodimusModel
    assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))) is (
        RodimusForCausalLM
    )


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_loading_in_bf16_keeps_residual_weights_in_fp32(block_type):
    model = RodimusForCausalLM.from_pretrained(GOLDENS / block_type, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        wide = name.endswith("residual_weight")
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name


def test_nothing_is_left_on_the_meta_device(tmp_path):
    """Buffers outside the checkpoint, like rotary frequencies, have their values after loading."""
    expected = golden_model("rodimus_plus")
    loaded = RodimusForCausalLM.from_pretrained(GOLDENS / "rodimus_plus")
    buffers = dict(loaded.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert all(not t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


def test_the_number_of_value_heads_stands_beside_that_of_all():
    attn = {"num_heads": 4, "num_heads_v": 1}
    named = {"block_type": "rodimus_plus", "d_model": 32, "attn_cfg": attn}
    assert RodimusConfig(**named, num_attention_heads=4).num_value_heads == 1
    assert RodimusConfig(**named, num_attention_heads=2).num_value_heads == 2


def test_a_token_is_learned_though_it_pads():
    fields = golden_config("rodimus") | {"pad_token_id": 2, "tie_word_embeddings": False}
    model = RodimusForCausalLM(RodimusConfig.from_dict(fields))
    weight = model.get_input_embeddings().weight
    assert weight[2].any()
    ids = torch.tensor([[5, 2, 7]])
    model(ids, labels=ids).loss.backward()
    assert weight.grad[2].any()


def test_sequence_classification():
    config = RodimusConfig.from_dict(golden_config("rodimus_plus") | {"pad_token_id": 0})
    config.num_labels = 3
    model = RodimusForSequenceClassification(config).eval()
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 3]])
    mask = (ids != 0).long()
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, 2:]).logits
    assert batch.shape == (2, 3)
    torch.testing.assert_close(batch[1:], alone, rtol=1e-5, atol=1e-5)
