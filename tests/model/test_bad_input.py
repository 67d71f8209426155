"""Bad input is refused before work starts, with what was expected and what came."""

import contextlib
import copy
import re
import shutil

import pytest
import torch
from transformers import DynamicCache, StaticCache

from rodimus import RodimusConfig, RodimusForCausalLM, configuration_rodimus
from tests.model.golden_data import GOLDENS, golden_config, relative_max_error
from tests.model.helpers import oracle_of, random_ids
from tests.model.ways import full

# ---------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_type": "mamba"}, "block_type.*rodimus_plus.*'mamba'"),
        ({"d_model": 0}, "d_model.*positive.*0"),
        ({"n_layer": -1}, "n_layer.*positive.*-1"),
        ({"vocab_size": 2.5}, "vocab_size.*2.5"),
        ({"mixer_cfg": {"mem_size": 0}}, "mem_size.*positive.*0"),
        ({"mixer_cfg": {"mem_size": "64"}}, "mem_size.*'64'"),
        ({"mixer_cfg": {"d_conv": 0}}, "d_conv.*positive.*0"),
        ({"mixer_cfg": {"expand_ratio": -2}}, "expand_ratio.*positive.*-2"),
        ({"mixer_cfg": {"mem_sise": 16}}, "mem_sise.*mem_size"),
        ({"mixer_cfg": {"expand_ratio": float("nan")}}, "expand_ratio.*positive.*nan"),
        ({"mixer_cfg": {"input_gate_low_rank": None}}, "input_gate_low_rank.*at least 1.*None"),
        ({"mixer_cfg": {"input_gate_low_rank": "low"}}, "input_gate_low_rank.*'low'"),
        ({"mixer_cfg": {"normalize_epsilon": -1.0}}, "normalize_epsilon.*at least 0.*-1"),
        ({"norm_epsilon": "1e-5"}, "norm_epsilon.*number.*'1e-5'"),
        ({"norm_epsilon": -1}, "norm_epsilon.*at least 0.*-1"),
        ({"initializer_range": -0.02}, "initializer_range.*at least 0.*-0.02"),
        ({"dropout": 1.5}, "dropout.*from 0 to 1.*1.5"),
        ({"attention_dropout": 2}, "attention_dropout.*from 0 to 1.*2"),
        ({"attn_cfg": {"rotary_emb_base": 0}}, "rotary_emb_base.*positive.*0"),
        ({"attn_cfg": {"rotary_emb_base": "1e4"}}, "rotary_emb_base.*'1e4'"),
        ({"attn_cfg": {"rotary_emb_dim": "8"}}, "rotary_emb_dim.*integer.*'8'"),
        ({"attn_cfg": {"num_heads": 5}}, "d_model.*divisible.*64.*5"),
        ({"attn_cfg": {"num_heads_k": 3}}, "num_heads.*divisible.*num_heads_k.*4.*3"),
        ({"attn_cfg": {"num_heads_v": 3}}, "num_heads.*divisible.*num_heads_v.*4.*3"),
        ({"attn_cfg": {"rotary_emb_dim": 7}}, "rotary_emb_dim.*even.*7"),
        ({"attn_cfg": {"rotary_emb_dim": 18}}, "rotary_emb_dim.*16.*18"),
        ({"attn_cfg": {"window_size": 1}}, "window_size.*1"),
        ({"attn_cfg": {"window_size": -5}}, "window_size.*-5"),
        ({"attn_cfg": {"window_size": "all"}}, "window_size.*'all'"),
        ({"attn_cfg": {"window_size": False}}, "window_size.*False"),
        ({"attn_cfg": {"rotary_emb_dim": False}}, "rotary_emb_dim.*integer.*False"),
        ({"attn_cfg": {"ffn_expand_ratio": 0}}, "ffn_expand_ratio.*positive.*0"),
        ({"attn_cfg": {"rotary_emb_interleaved": True}}, "rotary_emb_interleaved.*True"),
        ({"attn_cfg": {"softmax_scale": "norm"}}, "softmax_scale.*'norm'"),
        ({"residual_in_fp32": "false"}, "residual_in_fp32.*True or False.*'false'"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings.*True or False.*None"),
        ({"use_norm_embedding": 1}, "use_norm_embedding.*True or False.*1"),
        ({"mixer_cfg": [64]}, r"mixer_cfg.*dict.*\[64\]"),
        ({"attn_cfg": "auto"}, "attn_cfg.*dict.*'auto'"),
        ({"head_dim": 99}, "head_dim.*16.*99"),
        ({"hidden_size": 99}, "d_model and hidden_size are one.*64 and 99"),
        ({"num_hidden_layers": 99}, "n_layer and num_hidden_layers are one.* and 99"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_configuration(change, message):
    fields = golden_config("rodimus_plus")
    for name, value in change.items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        RodimusConfig.from_dict(fields)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5e5}},
    ],
)
def test_names_of_positions_that_are_not_read_are_said(given, monkeypatch):
    warnings = []
    monkeypatch.setattr(configuration_rodimus.logger, "warning_once", warnings.append)
    RodimusConfig.from_dict(golden_config("rodimus_plus"))
    assert not warnings
    RodimusConfig.from_dict(golden_config("rodimus_plus") | given)
    (name,) = given
    assert len(warnings) == 1 and name in warnings[0] and "rotary_emb_base" in warnings[0]


@pytest.mark.parametrize("name, key", [("attn_cfg", "window_size"), ("mixer_cfg", "mem_size")])
def test_options_that_replace_others_unasked(name, key):
    """Transformers assigns what from_pretrained is given, so nothing completes it."""
    with pytest.raises(ValueError, match=rf"{name} lacks .*'\w+'.* config.{name}\['{key}'\] = 16"):
        RodimusForCausalLM.from_pretrained(GOLDENS / "rodimus_plus", **{name: {key: 16}})
    config = RodimusConfig.from_pretrained(GOLDENS / "rodimus_plus")
    getattr(config, name)[key] = 16
    config.check()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_from_pretrained_names_a_file_that_is_missing(tmp_path, missing):
    (other,) = {"config.json", "model.safetensors"} - {missing}
    shutil.copyfile(GOLDENS / "rodimus_plus" / other, tmp_path / other)
    with pytest.raises(OSError, match=missing):
        RodimusForCausalLM.from_pretrained(tmp_path)


def test_configuration_of_flash_linear_attention():
    """The same model_type, other names and meanings: refused by name, not read as defaults."""
    fields = {
        "model_type": "rodimus",
        "attn_mode": "chunk",
        "block_type": "rodimus_plus",
        "expand_ratio": 64,
        "hidden_size": 2048,
        "input_gate_low_rank": "auto",
        "k_norm_eps": None,
        "num_hidden_layers": 24,
        "ska_attn": {"num_heads": 16, "qkv_bias": False, "window_size": 2048},
        "use_short_conv": True,
    }
    with pytest.raises(ValueError, match="flash-linear-attention.*convert"):
        RodimusConfig.from_dict(fields)


# ---------------------------------------------------------------------------------------- forward


def test_no_tokens(model):
    with pytest.raises(ValueError, match="at least one token.*0"):
        model(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one token.*0"):
        model(inputs_embeds=torch.zeros(2, 0, 64))


@pytest.mark.parametrize("shape", [(7,), (2, 7, 1), ()], ids=str)
def test_tokens_of_a_wrong_shape(model, shape):
    ids = torch.zeros(shape, dtype=torch.long)
    got = re.escape(str(list(shape)))
    with pytest.raises(ValueError, match=rf"input_ids must have shape \[B, T\], got {got}"):
        model(ids)
    got = re.escape(str([*shape, 64]))
    with pytest.raises(ValueError, match=rf"inputs_embeds must .* \[B, T, 64\], got {got}"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match=r"inputs_embeds must .* \[B, T, 64\], got \[2, 7, 63\]"):
        model(inputs_embeds=torch.zeros(2, 7, 63))


def test_ids_and_embeddings(model):
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("shape", [(2, 5), (3, 7), (2, 8), (7,), (2, 7, 7)], ids=str)
def test_mask_of_a_wrong_shape(model, shape):
    expected = r"attention_mask must have shape (\(2, 7\)|\[B, cached \+ T\]).*got"
    with pytest.raises(ValueError, match=expected):
        model(random_ids(2, 7), attention_mask=torch.ones(shape))


def test_a_mask_of_a_wrong_length_is_named_by_generate(model):
    """Not the positions, which transformers counts by it."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"attention_mask must .* \(2, 7\).*got \(2, 6\)"):
        model.generate(random_ids(2, 7), attention_mask=mask, max_new_tokens=1)


@pytest.mark.parametrize(
    "row", [[1, 1, 1, 2, 2, 3, 3], [0, 0, 0, 0, -1e9, -1e9, -1e9]], ids=["documents", "added"]
)
def test_mask_of_other_values(model, row):
    mask = torch.tensor([row, row])
    came = f"{mask.min().item()} to {mask.max().item()}"
    with pytest.raises(ValueError, match=f"hold 0 and 1, got values from {came}; position_ids"):
        model(random_ids(2, 7), attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_of_queries_by_keys(model, dtype):
    """Attention alone could follow it: the state would carry on what it forbids."""
    mask = torch.zeros(2, 1, 7, 7, dtype=dtype)
    with pytest.raises(ValueError, match="queries by keys.*recurrence.*cu_seqlens"):
        model(random_ids(2, 7), attention_mask=mask)


@pytest.mark.parametrize("length", [3, 9, 11])
def test_mask_of_a_wrong_shape_with_a_cache(model, length):
    """With a cache the mask covers the cached tokens too: 7 and 3 make 10."""
    cache = model(random_ids(2, 7), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask.*10.*got"):
        model(random_ids(2, 3), attention_mask=torch.ones(2, length), past_key_values=cache)


@pytest.mark.parametrize("shape", [(1, 6), (3, 7), (7, 2)], ids=str)
def test_positions_of_a_wrong_shape(model, shape):
    with pytest.raises(ValueError, match="position_ids.*got"):
        model(random_ids(2, 7), position_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
@pytest.mark.parametrize(
    "boundaries",
    [[0, 5, 3, 12], [0, 5, 11], [0, 5, 13], [1, 5, 12], [0], [[0, 12]], [0.0, 5.0, 12.0]],
    ids=str,
)
def test_boundaries_that_are_none(model, name, boundaries):
    """From 0 to the length, never falling, integers, one dimension."""
    with pytest.raises(ValueError, match=f"{name}|cu_seqlens"):
        model(random_ids(1, 12), use_cache=False, **{name: torch.tensor(boundaries)})


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
def test_boundaries_with_a_batch(model, name):
    with pytest.raises(ValueError, match="batch.*1.*2"):
        model(random_ids(2, 6), use_cache=False, **{name: torch.tensor([0, 6])})


def test_documents_by_their_numbers_alone(model):
    with pytest.raises(ValueError, match="seq_idx.*position_ids or cu_seqlens"):
        model(random_ids(1, 6), seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]]))


def test_two_caches_are_refused(model):
    """generate() of a transformers that calls it otherwise makes one beside the user's."""
    one, other = (model(random_ids(2, 7), use_cache=True).past_key_values for _ in range(2))
    with pytest.raises(ValueError, match="expected one cache, got cache and past_key_values"):
        model(random_ids(2, 1), cache=one, past_key_values=other)


def test_a_cache_is_refused_where_blocks_run_twice(model):
    """Only where there is a backward pass: TRL generates from models in training mode."""
    ids, options = random_ids(2, 7), {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    model.train()
    model.gradient_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="expected no cache with gradient checkpointing"):
        model(ids, cache=cache)
    assert torch.equal(model.generate(ids, **options), expected)
    assert model.eval()(ids, cache=cache).logits.requires_grad


def test_blocks_of_other_classes_take_a_cache_in_training(model):
    """They need not know of gradient checkpointing."""

    class Other(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs)

    model.model.layers = torch.nn.ModuleList(map(Other, model.model.layers))
    cache = DynamicCache(config=model.config)
    model.train()(random_ids(2, 7), cache=cache)
    assert cache.get_seq_length() == 7


def test_packing_with_a_cache(model):
    cache = model(random_ids(1, 7), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cu_seqlens.*cache|cache.*cu_seqlens"):
        model(random_ids(1, 6), past_key_values=cache, cu_seqlens=torch.tensor([0, 2, 6]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_decode_state_is_reported(model, value):
    """A state that is not finite would poison every later token: the step says so instead."""
    cache = model(random_ids(2, 7), use_cache=True).past_key_values
    cache.layers[1].recurrent_states[0][1, 0, 3, 2] = value
    with pytest.raises(FloatingPointError, match="state of layer 1 holds NaN"):
        model(random_ids(2, 1), past_key_values=cache, use_cache=True)


def test_a_state_that_breaks_within_a_prompt_is_reported(model):
    embeds = model.get_input_embeddings()(random_ids(1, 5)).detach()
    embeds[:, 2:] = float("nan")
    with pytest.raises(FloatingPointError, match="state of layer 0 holds NaN"):
        model(inputs_embeds=embeds, use_cache=True)


def test_training_does_not_look_at_the_state(model):
    """A scaler of losses skips such a step, and on a GPU the look would wait for the device."""
    model.train()
    cache = model(random_ids(2, 7), use_cache=True).past_key_values
    cache.layers[1].recurrent_states[0].data[1, 0, 3, 2] = float("nan")
    assert not model(random_ids(2, 3), past_key_values=cache).logits.isfinite().all()


def test_labels_of_a_wrong_shape(model):
    with pytest.raises(ValueError, match="labels.*got"):
        model(random_ids(2, 7), labels=random_ids(2, 6))


def test_cache_of_another_batch(model):
    cache = model(random_ids(2, 7), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cache.*2.*3"):
        model(random_ids(3, 1), past_key_values=cache)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind_of_cache", [DynamicCache, StaticCache])
@torch.no_grad()
def test_reset_cache_of_another_batch(model, batch, kind_of_cache):
    """A reset keeps the tensors; one row would be broadcast over them."""
    room = {"max_cache_len": 64} if kind_of_cache is StaticCache else {}
    cache = kind_of_cache(config=model.config, **room)
    model(random_ids(2, 7), past_key_values=cache)
    cache.reset()
    with pytest.raises(ValueError, match=f"cache.*2.*{batch}"):
        model(random_ids(batch, 7), past_key_values=cache)
    again = model(random_ids(2, 7), past_key_values=cache).logits
    assert relative_max_error(again, full(model, random_ids(2, 7))) < 1e-5


@pytest.mark.parametrize("sizes", [[12], [6, 1], [3, 4]], ids=str)
@torch.no_grad()
def test_static_cache_with_too_little_room(model, kind, sizes):
    """Only a window needs room; tokens it should see would be missing in silence."""
    cache = StaticCache(config=model.config, max_cache_len=6)
    *before, last = (random_ids(2, size) for size in sizes)
    for ids in before:
        model(ids, past_key_values=cache)
    refused = pytest.raises(ValueError, match=f"room for 6 tokens.*{sum(sizes)}.*max_cache_len")
    with contextlib.nullcontext() if kind == "rodimus" else refused:
        model(last, past_key_values=cache)


@pytest.mark.parametrize("cache", [(), ((torch.zeros(1), torch.zeros(1)),)], ids=["empty", "pair"])
def test_keys_and_values_in_a_tuple(model, cache):
    with pytest.raises(ValueError, match="cache.*tuple.*DynamicCache"):
        model(random_ids(1, 3), past_key_values=cache)


def test_cache_of_another_model(model, kind):
    """A cache with fewer layers than the model."""
    config = copy.deepcopy(model.config)
    config.n_layer = 1
    with pytest.raises(ValueError, match="cache.*layers.*1"):
        model(random_ids(2, 7), past_key_values=DynamicCache(config=config), use_cache=True)


def test_there_is_no_longest_prompt(model, config):
    """``max_position_embeddings`` is where training stopped, not a limit: 64 here."""
    ids = random_ids(1, 150)
    assert relative_max_error(full(model, ids), oracle_of(model, config)(ids)) < 1e-5
