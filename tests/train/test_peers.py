"""Peers of Rodimus: packed, in pieces, initialised, trained, resumed and exported like it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rodimus import cli
from rodimus.loading import load_model
from rodimus.peers import PEERS
from rodimus.train.initialize import initialize, template
from tests.train.ranks import metrics, train

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300, "intermediate_size": 48}
HEADS = {"gla": {"num_heads": 2}, "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2}}


def fields(kind):
    return {"model_type": kind, **SIZES, **HEADS[kind], "tie_word_embeddings": True}


@pytest.fixture(params=PEERS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    config_class, model_class = PEERS[kind]
    model = model_class(config_class.from_dict(fields(kind)))
    initialize(model, template(model), seed=0)
    return model.double()


def states(model, ids, **kwargs):
    with torch.no_grad():
        return model.base_model(input_ids=ids, **{"use_cache": False, **kwargs})


def test_packed_documents_equal_each_alone(model):
    ids = torch.randint(0, 300, (1, 50))
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    packed = states(model, ids, position_ids=positions).last_hidden_state
    alone = [states(model, part).last_hidden_state for part in ids.split([20, 30], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-12)


def test_pieces_equal_one_pass(model):
    ids = torch.randint(0, 300, (2, 50))
    whole = states(model, ids).last_hidden_state
    first = states(model, ids[:, :31], use_cache=True)
    second = states(model, ids[:, 31:], past_key_values=first.past_key_values, use_cache=True)
    pieces = torch.cat([first.last_hidden_state, second.last_hidden_state], 1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)


def test_states_of_a_gla_are_written_where_the_caller_keeps_them():
    config_class, model_class = PEERS["gla"]
    model, states = model_class(config_class(**fields("gla"))), {}
    with torch.no_grad():
        model.model(torch.tensor([[1, 2, 3]]), cache=states, use_cache=True)
    assert sorted(states) == [0, 1]


def test_loss_is_the_sum_over_labels_and_the_z_term_counts(model):
    ids, labels = torch.randint(0, 300, (2, 2, 20))
    labels[0, :5] = -100
    arguments = {"position_ids": torch.arange(20).expand(2, -1), "shift_labels": labels}
    out = model(ids, **arguments, num_items_in_batch=7, z_loss=0.1, loss_only=True)
    with torch.no_grad():
        logits = model.lm_head(states(model, ids).last_hidden_state)
    expected = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="sum") / 7
    z = (logits.logsumexp(-1).square() * (labels >= 0)).sum() / 7
    torch.testing.assert_close(out.cross_entropy, expected)
    torch.testing.assert_close(out.loss.detach(), expected + 0.1 * z)


def test_initial_weights_need_no_memory_of_the_constructor(kind):
    """Built on meta, filled with NaN, then made from the seed: every buffer and weight."""
    config_class, model_class = PEERS[kind]
    config = config_class.from_dict(fields(kind))
    direct = model_class(config)
    with torch.device("meta"):
        model = model_class(config)
    units = template(model)
    model.to_empty(device="cpu").tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    initialize(model, units, seed=0)
    for (name, made), usual in zip(model.named_parameters(), direct.parameters(), strict=True):
        assert made.std().item() == pytest.approx(usual.std().item(), rel=0.2), name
    for made, usual in zip(model.buffers(), direct.buffers(), strict=True):
        assert torch.equal(made, usual)


def test_trained_resumed_exported_and_evaluated(kind, config_file, tmp_path, packed, capsys):
    (tmp_path / "model.json").write_text(json.dumps(fields(kind)))
    run = tmp_path / "run"
    options = ("--train.ac", "full", "--train.steps", 12, "--checkpoint.every", 6)
    options += ("--eval.sample-prompt", "w1", "--eval.sample-tokens", 2)
    assert train(2, config_file, *options) == [0, 0]
    loss = metrics(run, "loss")
    assert loss[12] < loss[1] - 0.3
    assert set(train(1, config_file, *options, "--checkpoint.resume", 6)) == {0}
    assert metrics(run, "loss")[12] == pytest.approx(loss[12], rel=1e-5)

    shared = ("--parallel.context-parallel", 2, "--train.micro-batch", 4)
    assert set(train(2, config_file, *options, *shared)) == {2}

    assert cli.main(["eval", str(run), str(packed), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["data"][0]
    assert result["loss"] < loss[1]
    ids = torch.arange(20)[None]
    expected = states(load_model(run), ids).last_hidden_state
    assert torch.equal(states(load_model(run / "export"), ids).last_hidden_state, expected)
    assert cli.main(["generate", str(run), "--prompt", "w1"]) == 2
    assert "expected a Rodimus language model" in capsys.readouterr().err
    if kind == "qwen2":
        plain = AutoModelForCausalLM.from_pretrained(run / "export")
        assert type(plain).__module__.startswith("transformers.")
        assert torch.equal(states(plain, ids).last_hidden_state, expected)


def test_logits_are_those_of_the_loss(model):
    """What lm-evaluation-harness asks of a model."""
    ids, labels = torch.randint(0, 300, (2, 2, 20))
    loss = model(
        ids,
        position_ids=torch.arange(20).expand(2, -1),
        shift_labels=labels,
        num_items_in_batch=40,
        loss_only=True,
    ).loss
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
