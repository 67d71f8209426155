"""Names and sizes of flash-linear-attention's Rodimus, to ours and back."""

import pytest
import torch

from rodimus import RodimusConfig, RodimusForCausalLM, convert
from tests.model.golden_data import golden_config, golden_weights

# Parameters of fla 0.5.2's RodimusForCausalLM, one layer, and their shapes, for d_model 64,
# state 16, 4 heads, feed-forward 88 and 97 tokens; written down from its modules.
FLA_LAYER = {
    "mixer_norm.weight": (64,),
    "mixer.residual_weight": (128,),
    "mixer.gate_proj.weight": (128, 64),
    "mixer.up_proj.weight": (128, 64),
    "mixer.activation_norm.weight": (128,),
    "mixer.down_proj.weight": (64, 128),
    "mixer.short_conv.weight": (128, 1, 4),
    "mixer.short_conv.bias": (128,),
    "mixer.k_proj.weight": (16, 128),
    "mixer.q_proj.weight": (16, 128),
    "mixer.g_gate_proj.weight": (16, 128),
    "mixer.g_gate_proj.bias": (16,),
    "mixer.tau_gate_proj.weight": (16, 128),
    "mixer.tau_gate_proj.bias": (16,),
    "mixer.i_gate_proj.0.weight": (16, 128),
    "mixer.i_gate_proj.1.weight": (128, 16),
    "mixer.i_gate_proj.1.bias": (128,),
    "ska_attn_norm.weight": (64,),
    "ska_attn.q_proj.weight": (64, 64),
    "ska_attn.k_proj.weight": (16, 64),
    "ska_attn.v_proj.weight": (64, 64),
    "ska_attn.o_proj.weight": (64, 64),
    "mlp_norm.weight": (64,),
    "mlp.gate_proj.weight": (88, 64),
    "mlp.up_proj.weight": (88, 64),
    "mlp.down_proj.weight": (64, 88),
}
FLA_CONFIG = {
    "model_type": "rodimus",
    "block_type": "rodimus_plus",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "attn_mode": "chunk",
    "residual_in_fp32": True,
    "expand_ratio": 16,
    "conv_size": 4,
    "hidden_ratio": 4 / 3,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-5,
    "k_norm_eps": 1e-5,
    "attn": None,
    "ska_attn": {"num_heads": 4, "window_size": 9, "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


def test_names_and_shapes_are_those_of_fla():
    weights = golden_weights("rodimus_plus")
    fla = convert.weights_to_fla(weights)
    prefix = "model.layers.1."
    layer = {n.removeprefix(prefix): tuple(t.shape) for n, t in fla.items() if n.startswith(prefix)}
    assert layer == FLA_LAYER
    rest = {name for name in fla if ".layers." not in name}
    assert rest == {"model.embeddings.weight", "model.norm.weight"}


def test_round_trip_returns_every_tensor(block_type):
    """Also by way of a file, which has its tensors in the order of their names."""
    weights = golden_weights(block_type)
    back = convert.weights_from_fla(dict(sorted(convert.weights_to_fla(weights).items())))
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(back[name], tensor), name


def test_halves_go_where_fla_computes_with_them():
    """Which half is which is what no round trip can see."""
    weights = golden_weights("rodimus_plus")
    fla = convert.weights_to_fla(weights)
    ours = {name.removeprefix("model.layers.0."): tensor for name, tensor in weights.items()}
    halves = {
        "mixer.fc.weight": ("mixer.up_proj.weight", "mixer.gate_proj.weight"),
        "mixer.inner_mixer.in_proj.weight": ("mixer.q_proj.weight", "mixer.k_proj.weight"),
        "mixer.inner_mixer.mem_gate_proj.bias": (
            "mixer.g_gate_proj.bias",
            "mixer.tau_gate_proj.bias",
        ),
        "ffn.fc.weight": ("mlp.up_proj.weight", "mlp.gate_proj.weight"),
    }
    for name, (first, second) in halves.items():
        middle = ours[name].shape[0] // 2
        assert torch.equal(fla[f"model.layers.0.{first}"], ours[name][:middle])
        assert torch.equal(fla[f"model.layers.0.{second}"], ours[name][middle:])


def test_converted_model_computes_the_golden_logits():
    config, weights = golden_config("rodimus_plus"), golden_weights("rodimus_plus")
    converted = RodimusConfig(**convert.config_from_fla(FLA_CONFIG))
    model = RodimusForCausalLM(converted).eval()
    state = convert.weights_from_fla(convert.weights_to_fla(weights))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    original = RodimusForCausalLM(RodimusConfig(**config)).eval()
    original.load_state_dict(weights, strict=False)
    original.tie_weights()
    ids = torch.randint(0, 97, (2, 40))
    assert torch.equal(model(ids).logits, original(ids).logits)


def test_window_counts_visible_keys_in_fla():
    assert convert.config_from_fla(FLA_CONFIG)["attn_cfg"]["window_size"] == 16
    config = golden_config("rodimus_plus")
    assert convert.config_to_fla(config)["ska_attn"]["window_size"] == 9
    for none in (None, 0, -1):
        config["attn_cfg"]["window_size"] = none
        assert convert.config_to_fla(config)["ska_attn"]["window_size"] is None
    # 1 of theirs would be 0 of ours, which is no window
    one = FLA_CONFIG | {"ska_attn": FLA_CONFIG["ska_attn"] | {"window_size": 1}}
    with pytest.raises(ValueError, match="window_size must be None or at least 2 .* got 1"):
        convert.config_from_fla(one)


def test_config_round_trip_keeps_the_model(block_type):
    fields = golden_config(block_type)
    fields["mixer_cfg"]["d_conv"] = 3
    if block_type == "rodimus_plus":
        fields["attn_cfg"]["rotary_emb_base"] = 5e4
    config = RodimusConfig(**fields)
    there = convert.config_to_fla(config.to_dict())
    assert convert.is_fla_config(there) and not convert.is_fla_config(config.to_dict())
    back = RodimusConfig(**convert.config_from_fla(there))
    for field in ("block_type", "d_model", "n_layer", "vocab_size", "norm_epsilon"):
        assert getattr(back, field) == getattr(config, field)
    for field in ("mem_size", "expand_ratio", "d_conv", "normalize_epsilon"):
        assert back.mixer_cfg[field] == config.mixer_cfg[field]
    assert back.sliding_window == config.sliding_window
    if block_type == "rodimus_plus":
        assert back.attn_cfg["rotary_emb_base"] == 5e4
    one, two = (RodimusForCausalLM(c).state_dict() for c in (config, back))
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}


def test_absent_fields_have_the_defaults_of_fla():
    """transformers 4 leaves tied embeddings out of config.json; what is given wins."""
    least = {"hidden_size": 64, "ska_attn": {"num_heads": 4}}
    config = RodimusConfig(**convert.config_from_fla(least))
    assert (config.block_type, config.tie_word_embeddings) == ("rodimus_plus", True)
    assert (config.n_layer, config.vocab_size) == (24, 126464)
    assert (config.bos_token_id, config.eos_token_id) == (126080, 126081)
    assert (config.mem_size, config.sliding_window) == (64, 1024)
    for epsilon in ({}, {"k_norm_eps": None}):
        mixer = convert.config_from_fla(least | epsilon)["mixer_cfg"]
        assert (mixer["d_conv"], mixer["normalize_epsilon"]) == (4, 1e-12)
    given = {"hidden_size": 64, "block_type": "rodimus", "tie_word_embeddings": False}
    config = RodimusConfig(**convert.config_from_fla(given))
    assert (config.block_type, config.tie_word_embeddings) == ("rodimus", False)


def test_absent_fields_have_our_defaults_in_fla():
    fla = convert.config_to_fla({"block_type": "rodimus_plus", "d_model": 64})
    assert (fla["tie_word_embeddings"], fla["vocab_size"], fla["eos_token_id"]) == (False, 50277, 0)
    assert (fla["ska_attn"]["num_heads"], fla["ska_attn"]["window_size"]) == (1, 2049)
    for kept in (True, False):
        fla = convert.config_to_fla({"block_type": "rodimus", "residual_in_fp32": kept})
        assert fla["residual_in_fp32"] is fla["block_residual_in_fp32"] is kept


def test_feed_forward_width_given_directly():
    config = convert.config_from_fla(FLA_CONFIG | {"intermediate_size": 104})
    model = RodimusForCausalLM(RodimusConfig(**config))
    assert model.model.layers[0].ffn.fc.weight.shape[0] == 2 * 104


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attn": {"layers": [0], "num_heads": 4}}, "attn must be None"),
        ({"use_short_conv": False}, "use_short_conv must be True"),
        ({"ska_attn": {"num_heads": 4, "qk_norm": True}}, "ska_attn.qk_norm must be False"),
        ({"ska_attn": None}, "ska_attn.num_heads must be given"),
        ({"intermediate_size": 100}, "intermediate_size must be a multiple of 8 .* got 100"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_rodimus_does_not_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert.config_from_fla(FLA_CONFIG | change)


def test_what_fla_does_not_have_is_refused():
    config, weights = golden_config("rodimus_plus"), golden_weights("rodimus_plus")
    with pytest.raises(ValueError, match=r"mixer_cfg.expand_ratio must be 2 .* got 4"):
        convert.config_to_fla({**config, "mixer_cfg": {**config["mixer_cfg"], "expand_ratio": 4}})
    with pytest.raises(ValueError, match=r"attn_cfg.num_heads_k must be 1 .* got 2"):
        convert.config_to_fla({**config, "attn_cfg": {**config["attn_cfg"], "num_heads_k": 2}})
    with pytest.raises(ValueError, match="no counterpart of 'model.embed_norm.weight'"):
        convert.weights_to_fla(weights | {"model.embed_norm.weight": torch.ones(64)})


def test_missing_or_unknown_tensors_are_named():
    weights = golden_weights("rodimus_plus")
    fla = convert.weights_to_fla(weights)
    half = dict(fla)
    del half["model.layers.0.mixer.k_proj.weight"]
    with pytest.raises(ValueError, match=r"layers.0.*missing 'mixer.k_proj.weight'"):
        convert.weights_from_fla(half)
    with pytest.raises(ValueError, match=r"no counterpart of fla's 'model.layers.0.attn.wq'"):
        convert.weights_from_fla(fla | {"model.layers.0.attn.wq": torch.ones(1)})
