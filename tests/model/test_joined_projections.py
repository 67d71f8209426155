"""The mixer's products may be joined; what is hooked or replaced in a layer keeps its say."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rodimus import modeling_rodimus
from rodimus.modeling_rodimus import RodimusInnerMixer
from tests.model.helpers import model_of

SUBMODULES = ("in_proj", "mem_gate_proj", "ch_gate_proj", "ch_gate_proj.0", "ch_gate_proj.1")


@pytest.fixture
def model():
    return model_of("rodimus").train()


def loss_and_gradients(model):
    tokens = torch.arange(40).view(2, 20) % model.config.vocab_size
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters()}


def join(monkeypatch):
    monkeypatch.setattr(
        RodimusInnerMixer, "_joins_weights", lambda self, x: self._projections_are_plain()
    )


def test_joined_products_are_the_same_products(model, monkeypatch):
    loss, grads = loss_and_gradients(model)
    join(monkeypatch)
    calls = []
    monkeypatch.setattr(nn.Linear, "forward", _counting(nn.Linear.forward, calls))
    joined_loss, joined = loss_and_gradients(model)
    inner = model.model.layers[0].mixer.inner_mixer
    assert not any(layer is inner.in_proj for layer in calls)
    torch.testing.assert_close(joined_loss, loss)
    torch.testing.assert_close(joined, grads, rtol=1e-4, atol=1e-7)


def _counting(forward, calls):
    def counted(self, x):
        calls.append(self)
        return forward(self, x)

    return counted


@pytest.mark.parametrize("name", SUBMODULES)
def test_a_hook_on_a_projection_is_called(model, monkeypatch, name):
    join(monkeypatch)
    plain, _ = loss_and_gradients(model)
    layer = model.model.layers[0].mixer.inner_mixer.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, y: 2 * y)
    hooked, _ = loss_and_gradients(model)
    handle.remove()
    assert hooked != plain
    assert loss_and_gradients(model)[0] == plain


@pytest.mark.parametrize("name", SUBMODULES)
def test_a_replaced_projection_is_called(model, monkeypatch, name):
    join(monkeypatch)
    plain, _ = loss_and_gradients(model)
    inner = model.model.layers[0].mixer.inner_mixer
    inner.set_submodule(name, Doubled(inner.get_submodule(name)))
    assert loss_and_gradients(model)[0] != plain


class Doubled(nn.Module):
    """What an adapter does: a module of its own around the layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


# what meets in one gradient of the layer's input
SUMMED = ("mixer.fc", "attn.q_proj", "attn.k_proj", "attn.v_proj")


@pytest.fixture
def plus():
    return model_of("rodimus_plus").train()


def sum_in_products(monkeypatch):
    monkeypatch.setattr(modeling_rodimus, "_sums_in_products", modeling_rodimus._are_products)


def test_gradients_summed_in_products_are_the_same(plus, monkeypatch):
    loss, grads = loss_and_gradients(plus)
    sum_in_products(monkeypatch)
    calls = []
    monkeypatch.setattr(nn.Linear, "forward", _counting(nn.Linear.forward, calls))
    summed_loss, summed = loss_and_gradients(plus)
    block = plus.model.layers[0]
    assert not any(layer is block.get_submodule(name) for layer in calls for name in SUMMED)
    torch.testing.assert_close(summed_loss, loss)
    torch.testing.assert_close(summed, grads, rtol=1e-4, atol=1e-6)


def test_summed_products_are_counted(plus, monkeypatch):
    counted = []
    for change in (lambda monkeypatch: None, sum_in_products):
        change(monkeypatch)
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(plus)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


def test_a_frozen_projection_gets_no_gradient(plus, monkeypatch):
    sum_in_products(monkeypatch)
    attention = plus.model.layers[1].attn
    attention.k_proj.requires_grad_(False)
    tokens = torch.arange(20).view(1, 20)
    plus(tokens, labels=tokens).loss.backward()
    assert attention.k_proj.weight.grad is None and attention.q_proj.weight.grad is not None


def test_products_under_autocast_are_left_to_it(plus, monkeypatch):
    sum_in_products(monkeypatch)
    tokens = torch.arange(20).view(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = plus(tokens, labels=tokens).loss
    loss.backward()
    assert all(torch.isfinite(x.grad).all() for x in plus.parameters())


@pytest.mark.parametrize("name", SUMMED)
def test_a_hook_on_a_summed_projection_is_called(plus, monkeypatch, name):
    sum_in_products(monkeypatch)
    plain, _ = loss_and_gradients(plus)
    layer = plus.model.layers[0].get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, y: 2 * y)
    hooked, _ = loss_and_gradients(plus)
    handle.remove()
    assert hooked != plain
    assert loss_and_gradients(plus)[0] == plain


@pytest.mark.parametrize("name", SUMMED)
def test_a_bias_of_a_summed_projection_is_added(plus, monkeypatch, name):
    layer = plus.model.layers[0].get_submodule(name)
    layer.bias = nn.Parameter(torch.randn(layer.out_features))
    biased, _ = loss_and_gradients(plus)
    sum_in_products(monkeypatch)
    assert loss_and_gradients(plus)[0] == biased


@pytest.mark.parametrize("name", SUMMED)
def test_a_replaced_summed_projection_is_called(plus, monkeypatch, name):
    sum_in_products(monkeypatch)
    plain, _ = loss_and_gradients(plus)
    block = plus.model.layers[0]
    block.set_submodule(name, Doubled(block.get_submodule(name)))
    assert loss_and_gradients(plus)[0] != plain


def test_a_large_input_asks_first_whether_the_layers_are_plain(model):
    """What stands in a layer's place may have no weight to compare with."""
    inner = model.model.layers[0].mixer.inner_mixer
    large = SimpleNamespace(is_cuda=True, numel=lambda: 5 * inner.in_proj.weight.numel())
    assert inner._joins_weights(large)
    inner.in_proj = Doubled(inner.in_proj)
    assert not inner._joins_weights(large)
