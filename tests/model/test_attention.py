"""``rodimus_ska`` beside transformers' own attention: the same logits, and no mask of all pairs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM
from transformers.masking_utils import sliding_window_causal_mask_function

from rodimus import RodimusConfig, RodimusForCausalLM, attention
from tests.device import ON_BOTH, here
from tests.model.helpers import build, config_of, random_ids
from tests.model.ways import documents_alone, packed_positions

KINDS = ("rodimus_plus", "grouped")


@pytest.fixture
def no_square_mask(monkeypatch):
    """Fails where a mask of queries by keys is built."""

    def refuse(**sizes):
        raise AssertionError(f"a mask of {sizes['q_length']} by {sizes['kv_length']} was built")

    monkeypatch.setattr(attention, "sdpa_mask", refuse)


def assert_same(kind, run, others=("sdpa", "eager"), limit=1e-4):
    """What ``run`` gives for one model is the same in every implementation."""
    model = build(config_of(kind))
    model.set_attn_implementation(attention.NAME)
    ours = run(model)
    for name in others:
        model.set_attn_implementation(name)
        theirs = run(model)
        assert (ours - theirs).abs().max() < limit * theirs.abs().max(), name


@ON_BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_same_logits(kind, no_square_mask):
    ids = random_ids(2, 45)
    assert_same(kind, lambda model: model(ids).logits.detach())


@pytest.mark.slow
def test_same_logits_as_flex_attention(no_square_mask):
    # of 40 tokens torch 2.13's kernel for a CPU makes NaN now and then, with no model around it
    ids = random_ids(1, 64)
    with torch.no_grad():
        run = lambda model: model(ids, use_cache=False).logits
        assert_same("rodimus_plus", run, others=("flex_attention",))


@ON_BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_same_gradients(kind, no_square_mask):
    ids = random_ids(2, 45)

    def run(model):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model.get_input_embeddings().weight.grad.clone()

    assert_same(kind, run)


@ON_BOTH
def test_same_packed_rows(no_square_mask):
    ids = random_ids(2, 45)
    lengths = [(20, 25), (1, 44)]
    position_ids = torch.cat([packed_positions(row) for row in lengths])
    run = lambda model: model(ids, position_ids=position_ids, use_cache=False).logits.detach()
    assert_same("rodimus_plus", run)


@ON_BOTH
def test_same_packed_documents_by_boundaries(no_square_mask):
    ids = random_ids(1, 45)
    cu_seqlens = here(torch.tensor([0, 20, 20, 45], dtype=torch.int32))
    run = lambda model: model(ids, cu_seq_lens_q=cu_seqlens, use_cache=False).logits.detach()
    assert_same("rodimus_plus", run)


@ON_BOTH
@pytest.mark.parametrize("name", [attention.NAME, "sdpa", "eager"])
def test_packed_rows_without_a_window(name):
    config, lengths = config_of("rodimus_plus"), (20, 25)
    config["attn_cfg"] |= {"window_size": None}
    model, ids = build(config), random_ids(1, 45)
    model.set_attn_implementation(name)
    with torch.no_grad():
        logits = model(ids, position_ids=packed_positions(lengths), use_cache=False).logits
    expected = documents_alone(model, ids, lengths)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


@ON_BOTH
@pytest.mark.parametrize("pads", [(0, 7), (3, 7)])
def test_same_padded_prompt(pads, no_square_mask):
    ids = random_ids(2, 45)
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    run = lambda model: (model(ids, attention_mask=mask).logits * mask[..., None]).detach()
    assert_same("rodimus_plus", run)


@torch.no_grad()
def test_explicit_attention_is_of_the_precision_of_its_input():
    """The lowest float64, which hides a padded row from all, is no number in float32."""
    model = build(config_of("rodimus_plus")).double()
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    ways = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        ways[name] = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    torch.testing.assert_close(ways["eager"], ways["sdpa"], rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_logits_of_padding_do_not_depend_on_how_much_there_is():
    model = build(config_of("rodimus_plus"))
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long).tril()
    more = [torch.cat((x.new_zeros(2, 9), x), dim=1) for x in (ids, mask)]
    less = model(ids, attention_mask=mask, use_cache=False).logits
    same = model(more[0], attention_mask=more[1], use_cache=False).logits[:, 9:]
    torch.testing.assert_close(same, less, rtol=1e-5, atol=1e-5)


@ON_BOTH
def test_same_generation_past_the_window(no_square_mask):
    ids = random_ids(2, 13)
    run = lambda model: model.generate(ids, max_new_tokens=20, do_sample=False).float()
    assert_same("rodimus_plus", run)


@ON_BOTH
def test_same_generation_from_padded_prompts_and_in_a_static_cache():
    ids = random_ids(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert_same("rodimus_plus", lambda model: model.generate(ids, **padded).float())
    static = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    static["disable_compile"] = True
    for prompt in (ids, ids[:, :3]):
        assert_same("rodimus_plus", lambda model, x=prompt: model.generate(x, **static).float())


@ON_BOTH
def test_chunks_of_a_prompt(no_square_mask):
    ids = random_ids(2, 45)

    def run(model):
        cache, logits = None, []
        for chunk in ids.split(17, dim=1):
            output = model(chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits.detach())
        return torch.cat(logits, 1)

    assert_same("rodimus_plus", run)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_another_model_of_transformers(heads, window):
    """Where neighbours share a key head, as transformers groups them, and in each kind of cache."""
    size = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = MistralConfig(
        **size,
        num_attention_heads=4,
        num_key_value_heads=heads,
        sliding_window=window,
        initializer_range=0.2,
    )
    model, ids = MistralForCausalLM(config).eval(), random_ids(2, 13).cpu()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    logits, tokens = [], []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        padded = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits.append(torch.cat((padded, *model(ids, use_cache=False).logits)))
        for prompt, given in ((ids, mask), (ids[:, :3], mask[:, 4:7])):
            for cache in (None, "static"):
                options["cache_implementation"] = cache
                tokens.append(model.generate(prompt, attention_mask=given, **options))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    for theirs, ours in zip(tokens[:4], tokens[4:], strict=True):
        assert ours.equal(theirs)


def test_boundaries_without_waiting_for_the_device_are_the_same(monkeypatch):
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    window = sliding_window_causal_mask_function(3)
    short = attention._boundaries(3, 6, window, padding, "cpu")
    assert short.tolist() == [0, 1, 2, 6, 12, 15, 16, 17, 18]
    monkeypatch.setattr(attention, "is_tracing", lambda tensor: True)
    long = attention._boundaries(3, 6, window, padding, "cpu")
    assert long.tolist() == [*short.tolist(), *[18] * 10]


def test_shared_heads_are_read_once(monkeypatch):
    heads = []
    operator = attention.shared_key_attention

    def spy(q, k, v, **options):
        heads.append((q.shape[2], k.shape[2], v.shape[2]))
        return operator(q, k, v, **options)

    monkeypatch.setattr(attention, "shared_key_attention", spy)
    model = build(config_of("rodimus_plus"))
    model.set_attn_implementation(attention.NAME)
    model(random_ids(1, 9))
    count = model.config.num_attention_heads
    assert set(heads) == {(count, 1, count)}


def test_the_scale_is_the_callers():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, causal, scale=2.0).transpose(1, 2)
    for mask in (None, causal):
        found, _ = attention.attention_forward(nn.Module(), q, k, v, mask, scaling=2.0)
        torch.testing.assert_close(found, expected)


def test_dropout_is_refused_without_a_mask_of_all_pairs():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="'rodimus_ska' has no attention dropout, got 0.1"):
        attention.attention_forward(None, q, q, q, None, dropout=0.1)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert not attention.attention_forward(nn.Module(), q, q, q, mask, dropout=1.0)[0].any()


def test_weights_that_are_not_returned_are_said_to_be(monkeypatch):
    said = []
    monkeypatch.setattr(attention.logger, "warning_once", said.append)
    model, ids = build(config_of("rodimus_plus")), random_ids(1, 9)
    assert not model(ids).attentions and not said
    assert not model(ids, output_attentions=True).attentions
    assert all("'rodimus_ska' returns no attention weights" in line for line in said) and said


class TestDefault:
    """Who asks for nothing gets the operator, unless it cannot do what is configured."""

    def test_the_operator_unless_something_else_is_asked_for(self):
        config = config_of("rodimus_plus")
        assert build(config).config._attn_implementation == attention.NAME
        for name in ("sdpa", "eager"):
            chosen = RodimusForCausalLM._from_config(
                RodimusConfig.from_dict(config), attn_implementation=name
            )
            assert chosen.config._attn_implementation == name

    def test_attention_dropout_is_left_to_transformers(self):
        model = build(config_of("rodimus_plus") | {"attention_dropout": 0.5})
        assert model.config._attn_implementation == "sdpa"
        model.train()(random_ids(1, 9), use_cache=False)

    def test_asking_for_attentions_in_the_config_means_eager(self):
        config = RodimusConfig.from_dict(config_of("rodimus_plus"))
        config.output_attentions = True
        assert RodimusForCausalLM(config).config._attn_implementation == "eager"

    def test_attentions_are_those_of_the_rows_as_they_came(self):
        model, ids = build(config_of("rodimus_plus")), random_ids(2, 8)
        model.set_attn_implementation("eager")
        mask = torch.ones_like(ids)
        mask[0, 5:] = mask[1, 2:4] = 0
        with torch.no_grad():
            weights = model(ids, attention_mask=mask, output_attentions=True).attentions
            assert len(weights) == 2
            for row, kept in enumerate(mask.bool()):
                alone = model(ids[row : row + 1, kept], output_attentions=True).attentions
                for given, expected in zip(weights, alone, strict=True):
                    found = given[row][:, kept][:, :, kept]
                    torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-6)

    def test_the_choice_is_not_saved(self, tmp_path):
        build(config_of("rodimus_plus")).save_pretrained(tmp_path)
        assert "attn_implementation" not in (tmp_path / "config.json").read_text()
        load = RodimusForCausalLM.from_pretrained
        assert load(tmp_path).config._attn_implementation == attention.NAME
        explicit = load(tmp_path, attn_implementation="eager")
        assert explicit.config._attn_implementation == "eager"

    def test_without_the_package_it_is_sdpa(self, monkeypatch):
        monkeypatch.delitem(AttentionInterface._global_mapping, attention.NAME)
        assert build(config_of("rodimus_plus")).config._attn_implementation == "sdpa"
