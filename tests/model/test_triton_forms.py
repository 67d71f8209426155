"""The model with the operators that it takes on a GPU: here Triton's interpreter runs them, so that
what lies between them (views, saved tensors, recomputation) is tested without one."""

import sys
from copy import deepcopy

import pytest
import torch

from rodimus.train.parallel import checkpoint_activations
from rodimus_kernels import implementations_used
from tests.model.helpers import build, config_of, others_slow, random_ids

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
# a block of Rodimus+ holds all of one of Rodimus
KINDS = [pytest.param("rodimus", marks=pytest.mark.slow), "rodimus_plus"]
LENGTH = 24
INPUTS = {
    "packed": {"position_ids": torch.cat([torch.arange(18), torch.arange(LENGTH - 18)])[None]},
    "padded": {"attention_mask": (torch.arange(LENGTH) >= 5).long()[None]},
}
CHECKPOINTING = {
    "transformers": lambda model: model.gradient_checkpointing_enable(),
    "selective": lambda model: checkpoint_activations(model, "selective"),
}


@pytest.fixture
def choose_triton(monkeypatch):
    """Has ``auto`` choose, from its call on, what it would on a GPU."""

    def choose():
        for name, module in list(sys.modules.items()):
            if name.startswith("rodimus_kernels.") and hasattr(module, "runs_triton"):
                monkeypatch.setattr(module, "runs_triton", lambda device: True)

    return choose


def one_layer(kind):
    return build(config_of(kind) | {"n_layer": 1}).train()


def figures(model, ids, **options):
    """The loss over the tokens that are none of padding, and all gradients."""
    labels, valid = ids.clone(), options.get("attention_mask", torch.ones_like(ids)).bool()
    labels[~valid] = -100
    loss = model(ids, labels=labels, use_cache=False, loss_only=True, **options).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach()} | dict(
        zip(names, torch.autograd.grad(loss, parameters), strict=True)
    )


def error(got, exact):
    """The largest relative error of a tensor, by its norm."""
    return max(float((got[n].double() - x).norm() / x.norm()) for n, x in exact.items())


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind, inputs, choose_triton):
    """As close to float64 as those of the torch forms, but for sums in another order."""
    ids, options = random_ids(1, LENGTH), INPUTS[inputs]
    model = one_layer(kind)
    exact = figures(deepcopy(model).double(), ids, **options)
    bound = 4 * error(figures(model, ids, **options), exact)
    choose_triton()
    found = {}
    used = implementations_used(lambda: found.update(figures(model, ids, **options)))
    assert error(found, exact) < bound
    names = {"triton_conv", "triton_gates", "triton_chunk", "triton_input_gate", "triton_norm"}
    names |= {"triton_cross_entropy"}
    if kind == "rodimus_plus":
        names |= {"triton_attention", "triton_rope", "triton_swiglu"}
    assert names <= {name.partition(":")[0].rpartition(".")[2] for name in used}


@pytest.mark.parametrize("how", others_slow("selective", CHECKPOINTING))
@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_no_gradient(kind, how, choose_triton):
    choose_triton()
    ids, model = random_ids(1, LENGTH), one_layer(kind)
    expected = figures(model, ids)
    CHECKPOINTING[how](model)
    found = figures(model, ids)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
