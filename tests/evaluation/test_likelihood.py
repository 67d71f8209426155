"""Loss of documents in pieces and in packed rows equals one pass over each alone."""

import math

import numpy as np
import pytest
import torch

from rodimus import RodimusForCausalLM
from rodimus.evaluation import likelihood
from rodimus.evaluation.documents import Document
from rodimus.evaluation.likelihood import evaluate
from tests.checkpoints import tiny_config
from tests.device import ON_BOTH, here
from tests.model.helpers import cache_bytes

pytestmark = ON_BOTH


@pytest.fixture(params=["rodimus", "rodimus_plus"])
def model(request):
    torch.manual_seed(0)
    model = RodimusForCausalLM(tiny_config(request.param)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # wide, so that tokens differ in likelihood
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return here(model)


def document(length, seed=0):
    ids = np.random.default_rng(seed).integers(0, 300, length)
    return Document(ids, 3.0 * length)


def losses(model, ids):
    """Loss of every token but the first, by the model's own logits in one pass."""
    with torch.no_grad():
        logits = model(here(torch.from_numpy(ids))[None]).logits[0, :-1].cpu()
    return torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(ids[1:]), reduction="none"
    ).numpy()


@pytest.mark.parametrize("size", [7, 64, 199, 200])
def test_pieces_equal_one_pass(model, size):
    one = document(200)
    tally = evaluate(model, [one], tokens_at_once=size)
    assert (tally.tokens, tally.documents, tally.n_bytes) == (199, 1, 600.0)
    assert tally.nats == pytest.approx(losses(model, one.ids).sum(dtype=float), rel=1e-5)


def test_packed_rows_equal_each_document_alone(model):
    several = [document(length, seed) for seed, length in enumerate([3, 40, 1, 150, 2, 30, 12])]
    alone = [losses(model, one.ids) for one in several]
    summary = evaluate(model, several, tokens_at_once=100).summary()
    expected = np.concatenate(alone).astype(float)
    assert summary["tokens"] == len(expected) == 231
    assert summary["documents"] == 7
    assert summary["loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert summary["perplexity"] == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert summary["bits_per_byte"] == pytest.approx(expected.sum() / math.log(2) / 714, rel=1e-5)


def test_buckets_are_means_over_their_tokens(model):
    several = [document(100, 1), document(256, 2), document(600, 3)]
    alone = [losses(model, one.ids) for one in several]
    summary = evaluate(model, several, tokens_at_once=256).summary()
    rows = [(row["from"], row["below"], row["tokens"]) for row in summary["by_position"]]
    assert rows == [(0, 128, 99 + 2 * 127), (128, 256, 256), (256, 512, 256), (512, 1024, 88)]
    second = np.concatenate([nats[127:255] for nats in alone[1:]])
    assert summary["by_position"][1]["loss"] == pytest.approx(second.mean(), rel=1e-5)
    rows = [(row["from"], row["documents"], row["tokens"]) for row in summary["by_length"]]
    assert rows == [(0, 1, 99), (256, 1, 255), (512, 1, 599)]
    for row, nats in zip(summary["by_length"], alone, strict=True):
        assert row["loss"] == pytest.approx(nats.mean(), rel=1e-5)
        # three bytes a token
        bits = nats.sum(dtype=float) / math.log(2) / (3 * (len(nats) + 1))
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_memory_does_not_grow_with_the_document(model, monkeypatch):
    seen, forward = [], model.base_model.forward

    def watched(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.append((out.last_hidden_state.shape[1], cache_bytes(out.past_key_values)))
        return out

    monkeypatch.setattr(model.base_model, "forward", watched)
    evaluate(model, [document(400)], tokens_at_once=50)
    assert [tokens for tokens, _ in seen] == [50] * 7 + [49]
    assert len({tuple(sizes.items()) for _, sizes in seen}) == 1


def test_logits_are_made_a_few_rows_at_a_time_and_their_losses_not_rounded(model, monkeypatch):
    one, seen, head = document(20), [], model.bfloat16().get_output_embeddings()
    monkeypatch.setattr(likelihood, "_LOGITS", 3 * head.weight.shape[0] + 1)
    head.register_forward_hook(lambda module, args, logits: seen.append(logits.float().cpu()))
    tally = evaluate(model, [one])
    assert list(map(len, seen)) == [3] * 6 + [1]
    labels = torch.from_numpy(one.ids[1:])
    nats = torch.nn.functional.cross_entropy(torch.cat(seen), labels, reduction="sum").item()
    assert tally.nats == pytest.approx(nats, rel=1e-6)


def test_a_row_is_filled_and_no_longer_than_asked(model, monkeypatch):
    seen, forward = [], model.base_model.forward

    def watched(input_ids, **options):
        seen.append(input_ids.shape[1])
        return forward(input_ids, **options)

    monkeypatch.setattr(model.base_model, "forward", watched)
    evaluate(model, [document(length) for length in (30, 30, 20, 41, 60)], tokens_at_once=60)
    assert seen == [60, 20, 41, 60]


def test_no_document_is_begun_past_the_limit(model):
    """Two in rows, 98 predicted tokens, and 50 that wait for theirs."""
    tally = evaluate(model, [document(50, s) for s in range(9)], tokens_at_once=60, max_tokens=148)
    assert (tally.documents, tally.tokens) == (3, 147)
