"""The fused decode step: used by itself, equal to the modules, and out of the way of anything
attached to them."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from rodimus import modeling_rodimus
from rodimus.generation import Engine, Request
from rodimus_kernels import native
from tests.device import ON_BOTH, here
from tests.model.golden_data import l2_error, relative_max_error
from tests.model.helpers import exact_and_rounded, random_ids
from tests.model.ways import (
    BOUND,
    SHARE,
    full,
    in_pieces,
    padded_batch,
    positions_of,
    rows_alone,
)

pytestmark = ON_BOTH


@pytest.fixture(autouse=True)
def _native(device):
    """On a CPU they may be missing, on a GPU that is tested they must not."""
    problem = native.problem(device.type)
    if problem is not None and device.type == "cpu":
        pytest.skip(f"native operators: {problem}")
    native.require("decoding", device.type)


@pytest.fixture
def fused(monkeypatch):
    """Counts the tokens whose blocks ran as one call."""
    calls, step = [], modeling_rodimus.blocks_step
    count = lambda *args, **named: calls.append(1) or step(*args, **named)
    monkeypatch.setattr(modeling_rodimus, "blocks_step", count)
    return calls


def decode(model, ids, cache=None):
    """Logits of a prompt of 12 tokens, then of one token at a time, past the window."""
    return in_pieces(model, ids, [12] + [1] * (ids.shape[1] - 12), cache=cache)


def test_a_forward_mode_derivative_leaves_later_steps_fused(model, fused):
    ids = random_ids(1, 14)
    with torch.autograd.forward_ad.dual_level():
        expected = decode(model, ids)
        assert not fused
    assert relative_max_error(decode(model, ids), expected) < BOUND
    assert len(fused) == 2


@pytest.mark.parametrize("batch", [1, 3])
def test_fused_equals_the_forward(model, kind, fused, batch):
    ids = random_ids(batch, 40)
    assert relative_max_error(decode(model, ids), full(model, ids)) < BOUND
    assert len(fused) == 28


def test_greedy_tokens_are_those_of_the_modules(model, monkeypatch, fused):
    ids = random_ids(1, 12)
    make = lambda: model.generate(ids, max_new_tokens=40, do_sample=False)
    tokens = make()
    engine = Engine(model, slots=2, cuda_graphs=False)
    (generation,) = engine.generate([Request(ids[0].tolist(), 40)])
    assert len(fused) == 2 * 39
    monkeypatch.setattr(modeling_rodimus, "blocks_step", None)
    assert torch.equal(tokens, make()) and generation.tokens == tokens[0, 12:].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_of_autocast_is_gone_on_with_by_the_modules(model, dtype):
    """It holds taps in the dtype of the products."""
    ids, cache = random_ids(1, 14), DynamicCache(config=model.config)
    with torch.no_grad():
        with torch.autocast(ids.device.type, dtype):
            model(ids[:, :12], past_key_values=cache)
        found = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in (12, 13)]
    assert cache.get_seq_length() == 14
    assert relative_max_error(torch.cat(found, 1), full(model, ids)[:, 12:]) < 0.05


def test_what_another_thread_forgets_is_looked_for_again(model, monkeypatch, fused):
    """Between the look at the blocks and their weights."""
    ids = random_ids(1, 14)
    expected = decode(model, ids)
    unchanged = modeling_rodimus._Inspection.is_unchanged

    def and_gone(self):
        model.model._inspected = None
        return unchanged(self)

    monkeypatch.setattr(modeling_rodimus._Inspection, "is_unchanged", and_gone)
    assert torch.equal(decode(model, ids), expected) and len(fused) == 4


def test_a_recorded_step_is_fused(model, monkeypatch, fused):
    """While a CUDA graph is recorded, transformers calls it tracing: the engine's graphs would
    otherwise hold the modules."""
    ids, cache = random_ids(1, 13), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        model(ids[:, 12:], past_key_values=cache)
    assert len(fused) == 1


def test_a_recorded_step_does_not_look_at_a_mask(model, monkeypatch, fused):
    """A number asked of the device ends a recording."""
    ids, cache = random_ids(1, 13), StaticCache(config=model.config, max_cache_len=64)
    mask, position = torch.ones_like(ids), here(torch.tensor([[12]]))
    with torch.no_grad():
        model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for name in ("__bool__", "__int__", "item", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, None)
        given = {"attention_mask": mask, "position_ids": position}
        model(ids[:, 12:], past_key_values=cache, **given)
    assert len(fused) == 1


def test_outputs_captured_once_leave_later_steps_fused(model, fused):
    """transformers' hooks stay on the blocks, idle, once a hidden state was asked for."""
    ids, cache = random_ids(1, 14), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        seen = model(ids[:, 12:13], past_key_values=cache, output_hidden_states=True)
        assert len(seen.hidden_states) == model.config.n_layer + 1 and not fused
        model(ids[:, 13:], past_key_values=cache)
    assert len(fused) == 1


def test_fused_in_a_static_cache(model, fused):
    ids = random_ids(1, 30)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert relative_max_error(decode(model, ids, cache), full(model, ids)) < BOUND
    assert len(fused) == 18


@pytest.mark.parametrize("make", [DynamicCache, partial(StaticCache, max_cache_len=64)])
def test_a_step_is_the_forward_of_one_token(model, fused, make):
    ids, caches = random_ids(2, 20), [make(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :12], past_key_values=cache)
        for at in range(12, 20):
            token, position = ids[:, at : at + 1], here(torch.full((2, 1), at))
            expected = model(token, past_key_values=caches[0]).logits
            assert torch.equal(model.step(token, position, caches[1]), expected)
    assert len(fused) == 2 * 8
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 20


@pytest.mark.parametrize("where", ["", "model", "model.layers.1.mixer"])
def test_a_step_leaves_what_is_attached_to_the_forward(model, where):
    ids, cache = random_ids(1, 13), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :12], past_key_values=cache)
        hook = model.get_submodule(where).register_forward_hook(lambda module, args, out: None)
        token = (ids[:, 12:], here(torch.tensor([[12]])), cache)
        assert model.step(*token) is None and cache.get_seq_length() == 12
        hook.remove()
        assert model.step(*token) is not None


def negate(module, args, output):
    output.logits.neg_()


class Wrapper(nn.Module):
    """A model around a model, which lends its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args, **named):
        output = self.inner(*args, **named)
        negate(self, args, output)
        return output


def test_the_engine_runs_the_model_it_was_given(model, fused):
    """Whatever a hook on it, or a model around it, does to the logits of the fused step."""
    request = Request(random_ids(1, 12)[0].tolist(), 9)
    run = lambda m: Engine(m, slots=1, cuda_graphs=False).generate([request])[0].tokens
    plain, wrapped = run(model), run(Wrapper(model))
    model.register_forward_hook(negate)
    assert plain != wrapped == run(model) and len(fused) == 3 * 8


def rows_of_different_lengths():
    """``(ids, mask) [4, 40]``: no padding, and padding before, behind and between seven tokens."""
    ids, mask = random_ids(4, 40), here(torch.ones(4, 40, dtype=torch.long))
    mask[1, :5] = mask[2, 4:7] = mask[3, 2:5] = 0
    return ids, mask


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_padding_is_in_no_ring(model, static, fused):
    ids, mask = rows_of_different_lengths()
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    logits = in_pieces(model, ids, [7] + [1] * 33, mask=mask, cache=cache)
    for row, real in enumerate(mask.bool()):
        expected = full(model, ids[row : row + 1, real])[0]
        assert relative_max_error(logits[row, real], expected) < BOUND
    assert len(fused) == 33


def test_padding_is_hidden_as_long_as_a_window_reaches_it(model, fused):
    """A step after 12 places sees those from the fifth on."""
    ids = random_ids(1, 13)
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    logits = in_pieces(model, ids, [12, 1], mask=mask)
    assert relative_max_error(logits[:, 5:], full(model, ids[:, 5:])) < BOUND
    assert len(fused) == 1


@torch.no_grad()
def test_a_layout_tells_which_new_tokens_are_padding(model, fused):
    """As the mask does that ``generate`` makes it of, for steps of a static cache."""
    ids, mask = padded_batch("left")
    cache, positions = StaticCache(config=model.config, max_cache_len=64), positions_of(mask)
    logits = [in_pieces(model, ids[:, :12], [12], cache=cache, mask=mask[:, :12])]
    for at in range(12, ids.shape[1]):
        new = slice(at, at + 1)
        embeds = model.get_input_embeddings()(ids[:, new])
        layout = model.create_masks_for_generate(model.config, embeds, mask[:, : at + 1], cache)
        given = {"attention_mask": layout, "position_ids": positions[:, new]}
        logits.append(model(ids[:, new], past_key_values=cache, **given).logits)
    logits = torch.cat(logits, dim=1)[mask.bool()]
    assert relative_max_error(logits, rows_alone(model, ids, mask)) < BOUND
    # the last two tokens, which alone are real in every row
    assert len(fused) == 2


@torch.no_grad()
@pytest.mark.parametrize("at", [8, 12, 30])
def test_padded_rows_are_put_in_order_and_selected(model, at, fused):
    """Between fused steps: before the padding leaves the window of nine keys, and behind."""
    ids, mask = rows_of_different_lengths()
    cache = DynamicCache(config=model.config)
    in_pieces(model, ids[:, :at], [7] + [1] * (at - 7), mask=mask[:, :at], cache=cache)
    rows = here(torch.tensor([2, 0, 3, 3, 1]))
    cache.batch_select_indices(rows)
    ids, mask = ids[rows], mask[rows]
    mask[1:3, at : at + 2] = 0  # new padding, behind tokens
    logits = []
    for end in (at + 1, *range(at + 4, 41)):
        new = slice(cache.get_seq_length(), end)
        out = model(ids[:, new], attention_mask=mask[:, :end], past_key_values=cache)
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for row, real in enumerate(mask.bool()):
        expected = full(model, ids[row : row + 1, real])[0]
        new = real[at:]
        assert relative_max_error(logits[row, new], expected[-int(new.sum()) :]) < BOUND
    # all but a step whose token is padding in some rows, and a piece of three tokens
    assert len(fused) == 33 - 1 - 3


@torch.no_grad()
def test_a_mask_that_a_step_left_out_is_heeded_again(model, fused, monkeypatch):
    """Without one padding is a token like all."""
    ids, mask = (x[1:2] for x in rows_of_different_lengths())

    def last_logits():
        cache = DynamicCache(config=model.config)
        for start, end, seen in ((0, 7, mask), (7, 8, None), (8, 9, mask)):
            seen = None if seen is None else seen[:, :end]
            out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache)
        return out.logits

    logits = last_logits()
    assert len(fused) == 2
    monkeypatch.setattr(modeling_rodimus, "blocks_step", None)
    assert relative_max_error(logits, last_logits()) < BOUND


class Adapter(nn.Module):
    """A linear layer with a low-rank branch beside it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(here(torch.randn(2, base.in_features)))
        self.up = nn.Parameter(here(torch.randn(base.out_features, 2)))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Rounded(nn.Linear):
    """A linear layer whose weight is stored in 8 bits."""

    def forward(self, x):
        scale = self.weight.abs().amax() / 127
        return x @ ((self.weight / scale).round() * scale).T


def attach_hook(mixer):
    mixer.inner_mixer.in_proj.register_forward_hook(lambda module, args, out: 2 * out)


def attach_input_hook(mixer):
    mixer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))


def attach_adapter(mixer):
    mixer.out_proj = Adapter(mixer.out_proj)


def attach_quantiser(mixer):
    mixer.fc.__class__ = Rounded


def attach_bias(mixer):
    mixer.out_proj.bias = nn.Parameter(here(torch.randn(mixer.out_proj.out_features)))


def attach_forward(mixer):
    own = mixer.fc.forward
    mixer.fc.forward = lambda x: 2 * own(x)


def attach_compiled_call(mixer):
    own = mixer.fc.forward
    mixer.fc._compiled_call_impl = lambda x: 2 * own(x)


@pytest.mark.parametrize(
    "attach",
    [
        attach_compiled_call,
        attach_hook,
        attach_input_hook,
        attach_adapter,
        attach_quantiser,
        attach_bias,
        attach_forward,
    ],
)
def test_what_is_attached_takes_part(model, fused, attach):
    ids, before = random_ids(1, 30), None
    cache = DynamicCache(config=model.config)
    # as after a compiled call was taken back
    model.model.layers[1].mixer.fc._compiled_call_impl = None
    before = in_pieces(model, ids[:, :14], [12, 1, 1], cache=cache)
    used = len(fused)
    torch.manual_seed(0)
    attach(model.model.layers[1].mixer)
    logits, expected = decode(model, ids), full(model, ids)
    assert used and len(fused) == used
    assert relative_max_error(logits, expected) < BOUND
    assert relative_max_error(before, expected[:, :14]) > 1e-3


def test_any_head_takes_part(model, fused):
    """A head with a bias, an adapter, or no weight at all."""
    ids, head = random_ids(1, 20), model.lm_head
    biased = here(nn.Linear(head.in_features, head.out_features))
    for other in (biased, Adapter(head), nn.Identity()):
        model.lm_head = other
        assert relative_max_error(decode(model, ids), full(model, ids)) < BOUND
    assert fused


def test_changed_weights_are_seen(model, fused):
    """Nothing is copied: a weight changed between two tokens counts from the next one on."""
    ids = random_ids(1, 30)
    decode(model, ids)
    with torch.no_grad():
        model.model.layers[0].mixer.fc.weight.mul_(1.5)
    assert relative_max_error(decode(model, ids), full(model, ids)) < BOUND and fused


@pytest.mark.parametrize(
    "where", ["mixer_norm.eps", "mixer.act_norm.eps", "mixer.inner_mixer.normalize_epsilon"]
)
def test_numbers_of_a_block_are_seen(model, fused, where):
    """Those of one block alone are left to the modules, those of all blocks are told to the
    step."""
    ids, (part, _, name) = random_ids(1, 30), where.rpartition(".")
    before, used, layers = decode(model, ids), len(fused), model.model.layers
    setattr(layers[-1].get_submodule(part), name, 50.0)
    logits = decode(model, ids)
    assert relative_max_error(logits, full(model, ids)) < BOUND < relative_max_error(before, logits)
    assert len(fused) == used > 0
    for part in layers.modules():
        if hasattr(part, name):
            setattr(part, name, 50.0)
    assert relative_max_error(decode(model, ids), full(model, ids)) < BOUND
    assert len(fused) == 2 * used


def replace_parameter(linear):
    linear.weight = nn.Parameter(1.5 * linear.weight)


def replace_data(linear):
    linear.weight.data = 1.5 * linear.weight.data


def replace_layer(linear):
    linear.weight.data = 1.5 * linear.weight.data.double()
    linear.float()


@pytest.mark.parametrize("replace", [replace_parameter, replace_data, replace_layer])
def test_replaced_weights_are_seen(model, fused, replace):
    ids = random_ids(1, 30)
    before = decode(model, ids)
    mixer, used = model.model.layers[1].mixer, len(fused)
    replace(mixer.fc)
    replace(mixer.inner_mixer.short_conv["conv1d"])
    logits = decode(model, ids)
    assert relative_max_error(logits, full(model, ids)) < BOUND < relative_max_error(before, logits)
    assert len(fused) == 2 * used > 0


def test_a_weight_that_a_step_cannot_take_is_left_to_the_modules(model, fused):
    ids = random_ids(1, 30)
    decode(model, ids)
    used = len(fused)
    model.double()
    assert (
        relative_max_error(decode(model, ids), full(model, ids)) < BOUND and len(fused) == used > 0
    )


def swap_blocks(model):
    model.layers[0], model.layers[-1] = model.layers[-1], model.layers[0]


def swap_list(model):
    model.layers = nn.ModuleList(reversed(model.layers))


@pytest.mark.parametrize("replace", [swap_blocks, swap_list])
def test_replaced_blocks_are_seen(model, fused, replace):
    ids = random_ids(1, 30)
    before, used = decode(model, ids), len(fused)
    replace(model.model)
    for i, block in enumerate(model.model.layers):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = i
    logits = decode(model, ids)
    assert relative_max_error(logits, full(model, ids)) < BOUND < relative_max_error(before, logits)
    assert len(fused) == 2 * used > 0


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_model_steps_with_its_own_weights(model, fused, copy_of):
    ids = random_ids(1, 30)
    expected = decode(model, ids)
    other, used = copy_of(model), len(fused)
    with torch.no_grad():
        model.model.layers[0].mixer.fc.weight.mul_(1.5)
    assert torch.equal(decode(other, ids), expected) and len(fused) == 2 * used > 0


def test_gradients_and_batches_too_large_for_a_cpu_use_the_modules(model, fused, device):
    ids = random_ids(33, 14)
    decode(model, ids)
    assert len(fused) == (0 if device.type == "cpu" else 2)
    fused.clear()
    cache = model(ids[:1, :12], use_cache=True).past_key_values
    out = model(ids[:1, 12:13], past_key_values=cache, use_cache=True)
    assert out.logits.requires_grad and not fused


def test_bf16_is_as_near_to_float64_as_roundings_allow(model, config, fused):
    # of one sequence the error is up to 1.27 times the oracle's, of a few together it is alike
    ids, model = random_ids(8, 40), model.to(torch.bfloat16)
    exact, allowed = exact_and_rounded(model, config, ids)
    assert l2_error(decode(model, ids), exact) < SHARE * allowed
    assert len(fused) == 28
