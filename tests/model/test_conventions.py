"""What the released configurations do not exercise, judged by the float64 oracle."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch

from rodimus import RodimusConfig, RodimusForCausalLM
from tests.device import ON_BOTH
from tests.model.golden_data import golden_config, l2_error, relative_max_error
from tests.model.helpers import build, oracle_of, random_ids
from tests.model.ways import in_pieces

TABLE = "conventions, against the float64 oracle"


@dataclass(frozen=True)
class Case:
    """Changes to a tiny golden configuration."""

    name: str
    block_type: str = "rodimus_plus"
    top: dict = field(default_factory=dict)
    mixer: dict = field(default_factory=dict)
    attn: dict = field(default_factory=dict)
    length: int = 24

    def config(self) -> dict:
        config = copy.deepcopy(golden_config(self.block_type)) | self.top
        config["mixer_cfg"] |= self.mixer
        config["attn_cfg"] |= self.attn
        return config


CASES = [
    Case("2 key heads", attn={"num_heads_k": 2}),
    Case("2 key heads, 2 value heads", attn={"num_heads_k": 2, "num_heads_v": 2}),
    Case("4 key heads", attn={"num_heads_k": 4}),
    Case("1 key head, 2 value heads", attn={"num_heads_v": 2}),
    Case("1 key head, 1 value head", attn={"num_heads_v": 1}),
    Case(
        "8 heads, 2 key heads, 4 value heads",
        attn={"num_heads": 8, "num_heads_k": 2, "num_heads_v": 4},
    ),
    Case(
        "number of heads from the width",
        top={"d_model": 256, "n_layer": 1},
        attn={"num_heads": None, "num_heads_v": 2},
    ),
    Case("rotary dim 8 of 16", attn={"rotary_emb_dim": 8}),
    Case("no rotary embedding", attn={"rotary_emb_dim": 0}),
    Case("rotary base 500", attn={"rotary_emb_base": 500.0}),
    Case("no window", attn={"window_size": None}),
    Case("window 0 means none", attn={"window_size": 0}),
    Case("window 2 sees two", attn={"window_size": 2}),
    Case("odd window 17 sees nine", attn={"window_size": 17}),
    Case("window wider than the text", attn={"window_size": 1000}),
    Case("ffn ratio 1.7", attn={"ffn_expand_ratio": 1.7}),
    Case("ffn ratio 1.01", attn={"ffn_expand_ratio": 1.01}),
    Case("scaled embedding", "rodimus", top={"use_scale_embedding": True}),
    Case("normed embedding", "rodimus", top={"use_norm_embedding": True}),
    Case(
        "scaled and normed embedding", top={"use_scale_embedding": True, "use_norm_embedding": True}
    ),
    Case("untied head", "rodimus", top={"tie_word_embeddings": False}),
    Case("untied head, plus", top={"tie_word_embeddings": False}),
    Case("expand ratio 1.3", "rodimus", mixer={"expand_ratio": 1.3}),
    Case("expand ratio 3", "rodimus", mixer={"expand_ratio": 3}),
    Case("memory 24", "rodimus", mixer={"mem_size": 24}),
    Case("gate rank 8", "rodimus", mixer={"input_gate_low_rank": 8}),
    Case("convolution of 2", "rodimus", mixer={"d_conv": 2}),
    Case("convolution of 6", "rodimus", mixer={"d_conv": 6}),
    Case("no lower bound on keys", "rodimus", mixer={"normalize_epsilon": None}),
    Case("keys below the lower bound", "rodimus", mixer={"normalize_epsilon": 30.0}),
    Case("norm epsilon 0.1", top={"norm_epsilon": 0.1}),
    Case("residual in the model's dtype", top={"residual_in_fp32": False}),
    Case("mode chunk", "rodimus", mixer={"mode": "chunk"}),
    Case("150 tokens, several chunks", "rodimus", length=150),
    Case("150 tokens, several windows", length=150),
]


@ON_BOTH
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_gradients_and_decoding(case, measure):
    config = case.config()
    model = build(config)
    oracle = oracle_of(model, config)
    ids = random_ids(2, case.length)
    expected = oracle(ids)
    out = model(ids, labels=ids)
    column = case.block_type
    measure(TABLE, case.name, column, relative_max_error(out.logits, expected), 1e-5)
    out.loss.backward()
    oracle.loss(ids, ids).backward()
    for name, parameter in model.named_parameters():
        error = l2_error(parameter.grad, oracle.weights[name].grad)
        measure(TABLE, f"{case.name}, gradients", column, error, 1e-4)
    sizes = [5, 1, 1, 3] + [1] * (case.length - 10)
    error = relative_max_error(in_pieces(model, ids, sizes), expected)
    measure(TABLE, f"{case.name}, cached", column, error, 1e-5)


def test_key_heads_interleave():
    """Query head i uses key head i % Hk: swapping the key heads swaps odd and even query heads."""
    config = Case("", attn={"num_heads_k": 2}).config()
    model = build(config)
    attn = model.model.layers[0].attn
    context = []
    attn.out_proj.register_forward_pre_hook(lambda module, args: context.append(args[0].detach()))
    model(random_ids(1, 12))
    with torch.no_grad():
        for projection in (attn.k_proj, attn.q_proj, attn.v_proj):
            width = 16
            heads = projection.weight.view(-1, width, 64)
            pairs = heads.view(-1, 2, width, 64).flip(1)
            projection.weight.copy_(pairs.reshape(projection.weight.shape))
    model(random_ids(1, 12))
    before, after = (x.unflatten(-1, (2, 2, 16)) for x in context)
    torch.testing.assert_close(after, before.flip(-2), rtol=1e-5, atol=1e-5)


@ON_BOTH
@pytest.mark.parametrize("epsilon", [None, 1e-5])
def test_zero_keys_write_nothing_and_stay_finite(epsilon):
    config = Case("", "rodimus", mixer={"normalize_epsilon": epsilon}).config()
    model = build(config)
    with torch.no_grad():
        for layer in model.model.layers:
            projection = layer.mixer.inner_mixer.in_proj.weight
            projection[projection.shape[0] // 2 :] = 0
    ids = random_ids(2, 24)
    out = model(ids, labels=ids, use_cache=True)
    assert all(not layer.recurrent_states[0].any() for layer in out.past_key_values.layers)
    out.loss.backward()
    assert out.logits.isfinite().all()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@ON_BOTH
@pytest.mark.parametrize("value", [-100.0, 100.0])
def test_gates_saturated_by_their_bias_stay_finite(value):
    """Selection gates at +-100: the original's gradients are infinite or NaN from -90 on."""
    config = Case("", "rodimus").config()
    model = build(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mixer.inner_mixer.mem_gate_proj.bias.fill_(value)
    ids = random_ids(2, 24)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("block_type", ["rodimus", "rodimus_plus"])
def test_dtype_of_the_residual_stream(block_type, in_fp32):
    model = build(Case("", block_type, top={"residual_in_fp32": in_fp32}).config())
    out = model.to(torch.bfloat16)(random_ids(1, 8), output_hidden_states=True)
    assert out.hidden_states[1].dtype == (torch.float32 if in_fp32 else torch.bfloat16)
    assert out.logits.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------- initial values


@pytest.fixture(scope="module", params=["rodimus", "rodimus_plus"])
def fresh(request):
    """A newly initialised model, wide enough for statistics."""
    torch.manual_seed(0)
    config = Case(
        "",
        request.param,
        top={"d_model": 256, "n_layer": 4, "vocab_size": 500, "tie_word_embeddings": False},
        attn={"num_heads": 2, "num_heads_k": 1, "num_heads_v": 2},
    ).config()
    return RodimusForCausalLM(RodimusConfig.from_dict(config))


def test_normal_initial_values(fresh):
    """N(0, 0.02); output projections divided once by sqrt(branches * layers)."""
    branches = 1 if fresh.config.block_type == "rodimus" else 3
    for name, weight in fresh.named_parameters():
        if not name.endswith(("embeddings.weight", "lm_head.weight", "fc.weight", "_proj.weight")):
            continue
        if "gate_proj" in name or "in_proj" in name:
            continue
        expected = 0.02 / math.sqrt(branches * 4) if "out_proj" in name else 0.02
        assert weight.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(weight.mean().item()) < 0.03 * expected * 4, name


def test_rescaling_can_be_switched_off():
    config = Case("", "rodimus", top={"rescale_prenorm_residual": False}).config()
    model = RodimusForCausalLM(RodimusConfig.from_dict(config))
    assert model.model.layers[0].mixer.out_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_uniform_initial_values_of_gates(fresh):
    """Xavier with gain 2^-2.5 for the projections inside the mixer."""
    for layer in fresh.model.layers:
        inner = layer.mixer.inner_mixer
        projections = (inner.in_proj, *list(inner.ch_gate_proj)[:2], inner.mem_gate_proj)
        for projection in projections:
            limit = 2**-2.5 * math.sqrt(6 / sum(projection.weight.shape))
            assert projection.weight.abs().max().item() <= limit
            assert projection.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)


def test_initial_biases_of_gates(fresh):
    """Slow decay: softplus(bias) is log-uniform in [1e-3, 0.1], the temper in (1/16, 0.9)."""
    inner = [layer.mixer.inner_mixer for layer in fresh.model.layers]
    select, temper = torch.stack([i.mem_gate_proj.bias.detach() for i in inner]).chunk(2, -1)
    select = torch.nn.functional.softplus(select)
    assert 1e-3 * 0.999 <= select.min() < 4e-3 and 0.04 < select.max() <= 0.1 * 1.001
    assert select.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.5)
    temper = torch.sigmoid(temper)
    assert 1 / 16 * 0.999 <= temper.min() < 0.15 and 0.8 < temper.max() <= 0.9 * 1.001
    assert all(not i.ch_gate_proj[1].bias.any() for i in inner)


def test_initial_values_of_convolution_and_norms(fresh):
    for name, parameter in fresh.named_parameters():
        if "conv1d" in name:
            assert 0.45 < parameter.abs().max() <= 0.5, name
            assert parameter.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1), name
        elif "norm" in name or name.endswith("residual_weight"):
            assert (parameter == 1).all(), name


def test_initial_values_follow_the_seed():
    config = RodimusConfig.from_dict(Case("").config())
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(RodimusForCausalLM(config).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])
