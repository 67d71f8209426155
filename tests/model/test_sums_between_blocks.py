"""A block's last sum may be taken by the next norm, where nobody looks at the stream between."""

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from rodimus import RodimusModel
from rodimus.modeling_rodimus import RodimusBlock
from tests.model.golden_data import BLOCK_TYPES
from tests.model.helpers import model_of, random_ids


@pytest.fixture(params=BLOCK_TYPES)
def model(request):
    return model_of(request.param)


@pytest.fixture
def left(monkeypatch):
    """Sums are left wherever they may be; the list of blocks that left theirs."""
    calls, unsummed = [], RodimusBlock.forward_unsummed

    def counted(self, stream, branch, *args, **kwargs):
        stream, branch = unsummed(self, stream, branch, *args, **kwargs)
        calls.append(self)
        return stream, branch

    monkeypatch.setattr(RodimusBlock, "forward_unsummed", counted)
    monkeypatch.setattr(
        RodimusModel,
        "_sums_in_norms",
        lambda self, stream, layout: layout.order is None and self._blocks_are_plain(stream),
    )
    return calls


def one_by_one(monkeypatch):
    monkeypatch.setattr(RodimusModel, "_sums_in_norms", lambda self, stream, layout: False)


def outcome(model, ids, **options):
    model.zero_grad()
    out = model(ids, labels=ids, **options)
    out.loss.backward()
    return out.logits.detach(), {name: x.grad.clone() for name, x in model.named_parameters()}


def calls_of_blocks(model, monkeypatch):
    """The blocks that are called as modules."""
    calls, forward = [], RodimusBlock.forward
    counted = lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs)
    monkeypatch.setattr(RodimusBlock, "forward", counted)
    return calls


def test_sums_left_to_the_next_norm_are_the_same(model, left, monkeypatch):
    ids, called = random_ids(2, 20), calls_of_blocks(model, monkeypatch)
    logits, grads = outcome(model, ids)
    assert len(left) == len(model.model.layers) and not called
    one_by_one(monkeypatch)
    plain_logits, plain = outcome(model, ids)
    assert called and torch.equal(logits, plain_logits)
    torch.testing.assert_close(grads, plain, rtol=1e-4, atol=1e-6)


def test_transforms_of_torch_func_find_the_same_gradients(model, left):
    ids, weights = random_ids(2, 20), dict(model.named_parameters())
    options = {"labels": ids, "use_cache": False}
    loss = lambda weights: torch.func.functional_call(model, weights, (ids,), options).loss
    found = torch.func.grad(loss)(weights)
    _, expected = outcome(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_continued_from_a_cache(model, left, monkeypatch):
    ids, logits = random_ids(2, 20), []
    for _ in range(2):
        with torch.no_grad():
            cache = model(ids[:, :12], use_cache=True).past_key_values
            logits.append(model(ids[:, 12:], past_key_values=cache).logits)
        one_by_one(monkeypatch)
    assert left and torch.equal(*logits)


def test_hidden_states_are_the_streams_between_blocks(model, left, monkeypatch):
    ids, states = random_ids(2, 20), []
    for _ in range(2):
        with torch.no_grad():
            states.append(model(ids, output_hidden_states=True).hidden_states)
        one_by_one(monkeypatch)
    assert len(states[0]) == len(model.model.layers) + 1
    assert all(map(torch.equal, *states))


def test_padding_keeps_blocks_whole(model, left, monkeypatch):
    called = calls_of_blocks(model, monkeypatch)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:] = 0
    with torch.no_grad():
        model(random_ids(2, 20), attention_mask=mask)
    assert len(called) == len(model.model.layers)


def attach_hook(model):
    model.model.layers[1].mixer_norm.register_forward_hook(lambda module, args, y: 2 * y)


def attach_final_hook(model):
    model.model.norm_f.register_forward_hook(lambda module, args, y: 2 * y)


def attach_backward_hook(model):
    model.model.layers[1].register_full_backward_hook(lambda module, dx, dy: None)


def replace_final_norm(model):
    model.model.norm_f = torch.nn.Sequential(model.model.norm_f)


def checkpoint(model):
    model.train().gradient_checkpointing_enable()


def compile_block(model):
    model.model.layers[0].compile(backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        attach_hook,
        attach_final_hook,
        attach_backward_hook,
        replace_final_norm,
        checkpoint,
        compile_block,
    ],
    ids=lambda change: change.__name__,
)
def test_whatever_is_attached_keeps_its_say(model, left, monkeypatch, change):
    change(model)
    called = calls_of_blocks(model, monkeypatch)
    ids = random_ids(2, 20)
    model(ids, labels=ids).loss.backward()
    assert len(called) >= len(model.model.layers)


def test_a_global_hook_sees_every_block(model, left):
    seen, ids = [], random_ids(2, 20)
    handle = register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(ids)
    finally:
        handle.remove()
    assert set(model.model.layers) <= set(seen)


def test_a_called_block_does_not_call_what_wraps_its_other_method(model):
    """FSDP wraps both: inside of the one the other would gather and free the weights again."""

    def refuse(*args, **kwargs):
        raise AssertionError("the wrapped method is called")

    ids = random_ids(2, 20)
    logits = model(ids).logits
    for block in model.model.layers:
        block.forward_unsummed = refuse
    assert torch.equal(model(ids).logits, logits)
