"""The mixer's products may be joined; what is hooked or replaced in a layer keeps its say."""

import pytest
import torch
from torch import nn

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
