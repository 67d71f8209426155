"""Every way of running equals one full forward in fp32; the table at the end has each error."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

import rodimus_kernels
from rodimus import modeling_rodimus
from rodimus_kernels import reference
from tests.device import ON_BOTH, here
from tests.model.golden_data import l2_error, relative_max_error
from tests.model.helpers import exact_and_rounded, oracle_of, random_ids
from tests.model.ways import (
    BOUND,
    PADDINGS,
    SHARE,
    TABLE,
    documents_alone,
    full,
    in_pieces,
    packed_positions,
    padded_batch,
    positions_of,
    rows_alone,
)

pytestmark = ON_BOTH

# --------------------------------------------------------------------------------- pieces, a cache


def test_full_forward_equals_the_oracle(model, config, kind, measure):
    ids = random_ids(2, 40)
    error = relative_max_error(full(model, ids), oracle_of(model, config)(ids))
    measure(TABLE, "full forward (against the float64 oracle)", kind, error, BOUND)


@pytest.mark.parametrize(
    "name, sizes",
    {
        "by 1 token": [1] * 40,
        "by 3 tokens": [3] * 13 + [1],
        "by 11 tokens, longer than the window": [11, 11, 11, 7],
        "prompt of 2, shorter than the convolution": [2] + [1] * 38,
        "prompt of 3, shorter than the convolution": [3] + [1] * 37,
        "prompt past the window": [25] + [1] * 15,
        "prompt as long as the window": [9] + [1] * 31,
        "mixed lengths": [5, 1, 1, 3, 9, 1, 8, 2, 10],
        "whole prompt": [40],
    }.items(),
)
def test_cached(model, kind, name, sizes, measure):
    ids = random_ids(2, 40)
    error = relative_max_error(in_pieces(model, ids, sizes), full(model, ids))
    measure(TABLE, f"cached, {name}", kind, error, BOUND)


def test_batch_equals_rows(model, kind, measure):
    ids = random_ids(5, 20)
    error = relative_max_error(
        full(model, ids).flatten(0, 1), rows_alone(model, ids, torch.ones_like(ids))
    )
    measure(TABLE, "batch against single rows", kind, error, BOUND)


# ----------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("positions", ["derived", "given"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_forward(model, kind, padding, positions, measure):
    ids, mask = padded_batch(padding)
    options = {"position_ids": positions_of(mask)} if positions == "given" else {}
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=False, **options).logits
    error = relative_max_error(logits[mask.bool()], rows_alone(model, ids, mask))
    measure(TABLE, f"{padding} padding, forward", kind, error, BOUND)


@pytest.mark.parametrize("positions", ["derived", "given"])
@pytest.mark.parametrize(
    "name, sizes",
    {
        "continued by 1": [24] + [1] * 8,
        "continued by 3": [24, 3, 3, 2],
        "in pieces": [5, 7, 12, 8],
        "by 2 tokens": [2] * 16,
        "by 1 token": [1] * 32,
    }.items(),
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_padded_cached(model, kind, padding, name, sizes, positions, measure):
    ids, mask = padded_batch(padding, tail=8)
    options = {"position_ids": positions_of(mask)} if positions == "given" else {}
    logits = in_pieces(model, ids, sizes, mask=mask, **options)
    error = relative_max_error(logits[mask.bool()], rows_alone(model, ids, mask))
    measure(TABLE, f"{padding} padding, {name}", kind, error, BOUND)


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_does_not_reach_the_gradients(model, kind, padding, measure):
    """Loss and gradients of a padded batch equal those of its rows run alone."""
    ids, mask = padded_batch(padding)
    labels = torch.where(mask.bool(), ids, -100)
    model.train()
    weight = weight_of_logits(model)
    rows = [row[real.bool()][None] for row, real in zip(ids, mask, strict=True)]
    sum((model(row).logits @ weight).sum() for row in rows).backward()
    expected = take_gradients(model)
    logits = model(ids, attention_mask=mask).logits
    (logits @ weight)[labels != -100].sum().backward()
    error = worst_gradient(take_gradients(model), expected)
    measure(TABLE, f"{padding} padding, gradients", kind, error, BOUND)


def weight_of_logits(model):
    """How much each logit counts in a sum of all."""
    generator = torch.Generator().manual_seed(0)
    return here(torch.randn(model.config.vocab_size, generator=generator))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_of_any_dtype(model, kind, dtype, measure):
    ids, mask = padded_batch("left")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask.to(dtype)).logits
    error = relative_max_error(logits[mask.bool()], rows_alone(model, ids, mask))
    measure(TABLE, f"left padding, {str(dtype).removeprefix('torch.')} mask", kind, error, BOUND)


def test_row_of_padding_alone_stays_finite(model):
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
        after = model(
            ids[:, :1],
            attention_mask=torch.cat((mask, mask[:, :1]), 1),
            past_key_values=out.past_key_values,
        )
    assert out.logits.isfinite().all() and after.logits.isfinite().all()


def test_hidden_states_keep_the_order_of_the_user(model, kind, measure):
    """Under right padding, every layer's states stand where the tokens stand."""
    ids, mask = padded_batch("right")
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for row, real in enumerate(mask.sum(-1).tolist()):
            alone = model(ids[row : row + 1, :real], output_hidden_states=True).hidden_states
            for state, expected in zip(states, alone, strict=True):
                error = relative_max_error(state[row, :real], expected[0])
                measure(TABLE, "right padding, hidden states", kind, error, BOUND)


@pytest.mark.parametrize("records", [False, True], ids=["", "recorded"])
@pytest.mark.parametrize("prompt", [5, 20])
def test_hidden_states_of_padding_after_cached_tokens(model, kind, prompt, records, measure):
    """A padded turn continues a cache: all layers' states stand where its tokens stand, and the
    tokens after it see none of the padding; also while the past is recorded for a rollback."""
    # the convolution behind one or two tokens reaches over the padding
    turns = ("1" * 6, "1" * 4 + "00", "010010", "000100")
    rows = [[1] * prompt + [int(bit) for bit in turn] + [1] * 3 for turn in turns]
    mask = here(torch.tensor(rows))
    ids = random_ids(*mask.shape)
    cache = DynamicCache(config=model.config)
    if records and hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    states = []
    with torch.no_grad():
        for piece in (slice(0, prompt), slice(prompt, prompt + 6), slice(prompt + 6, None)):
            out = model(
                ids[:, piece],
                attention_mask=mask[:, : piece.stop],
                past_key_values=cache,
                output_hidden_states=True,
            )
            states.append(torch.stack(out.hidden_states))
        states = torch.cat(states, 2)
        for row, real in enumerate(mask.bool()):
            alone = model(ids[row][real][None], output_hidden_states=True).hidden_states
            error = relative_max_error(states[:, row][:, real], torch.stack(alone)[:, 0])
            measure(TABLE, "padding after cached tokens, hidden states", kind, error, BOUND)


# ----------------------------------------------------------------------------------------- packing

LENGTHS = (1, 13, 2, 3, 20, 1)


def packing_options(name):
    boundaries = here(torch.tensor((0, *LENGTHS)).cumsum(0).int())
    longest = max(LENGTHS)
    return {
        "position_ids": {"position_ids": packed_positions(LENGTHS)},
        "cu_seq_lens_q": {
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        },
        "cu_seqlens": {"cu_seqlens": boundaries},
        "position_ids and cu_seq_lens_q": {
            "position_ids": packed_positions(LENGTHS),
            "cu_seq_lens_q": boundaries,
        },
    }[name]


PACKINGS = ["position_ids", "cu_seq_lens_q", "cu_seqlens", "position_ids and cu_seq_lens_q"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed(model, kind, packing, measure):
    ids = random_ids(1, sum(LENGTHS))
    with torch.no_grad():
        logits = model(ids, use_cache=False, **packing_options(packing)).logits
    error = relative_max_error(logits, documents_alone(model, ids, LENGTHS))
    measure(TABLE, f"packed by {packing}", kind, error, BOUND)


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_gradients(model, kind, packing, measure):
    """Nothing of one document reaches the gradients of another."""
    ids = random_ids(1, sum(LENGTHS))
    model.train()
    weight = weight_of_logits(model)
    sum((model(piece).logits @ weight).sum() for piece in ids.split(LENGTHS, 1)).backward()
    expected = take_gradients(model)
    logits = model(ids, use_cache=False, **packing_options(packing)).logits
    (logits @ weight).sum().backward()
    error = worst_gradient(take_gradients(model), expected)
    measure(TABLE, f"packed by {packing}, gradients", kind, error, BOUND)


def test_packed_batch(model, kind, measure):
    """Rows packed differently, by position_ids."""
    rows = (LENGTHS, (40,), (9, 1, 1, 11, 18), (1,) * 40)
    ids = random_ids(len(rows), 40)
    positions = torch.cat([packed_positions(lengths) for lengths in rows])
    with torch.no_grad():
        logits = model(ids, position_ids=positions, use_cache=False).logits
    pieces = zip(ids, rows, strict=True)
    expected = torch.cat([documents_alone(model, row[None], lengths) for row, lengths in pieces])
    measure(
        TABLE, "packed by position_ids, batch", kind, relative_max_error(logits, expected), BOUND
    )


def test_rows_packed_alike(model):
    """One row of positions may serve them all."""
    ids = random_ids(3, sum(LENGTHS))
    with torch.no_grad():
        logits = model(ids, position_ids=packed_positions(LENGTHS), use_cache=False).logits
    assert relative_max_error(logits, documents_alone(model, ids, LENGTHS)) < BOUND


# ---------------------------------------------------------------------------- arguments of forward


def test_inputs_embeds(model, kind, measure):
    ids = random_ids(2, 20)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    before = embedded.detach().clone()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    measure(TABLE, "inputs_embeds", kind, relative_max_error(logits, full(model, ids)), BOUND)
    logits.sum().backward()
    assert embedded.grad.isfinite().all() and torch.equal(embedded.detach(), before)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5, 19])], ids=["1", "3", "indices"])
def test_logits_to_keep(model, kind, keep, measure):
    ids = random_ids(2, 20)
    with torch.no_grad():
        logits = model(ids, logits_to_keep=keep).logits
    expected = full(model, ids)
    expected = expected[:, -keep:] if isinstance(keep, int) else expected[:, keep]
    measure(TABLE, "logits_to_keep", kind, relative_max_error(logits, expected), BOUND)


def test_base_model(model, kind, measure):
    ids = random_ids(2, 20)
    with torch.no_grad():
        logits = model.lm_head(model.model(ids).last_hidden_state)
    measure(TABLE, "base model and head", kind, relative_max_error(logits, full(model, ids)), BOUND)


# ---------------------------------------------------------------------------------------- training


def take_gradients(model):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    model.zero_grad(set_to_none=True)
    return gradients


def worst_gradient(gradients, expected):
    return max(l2_error(gradients[name], expected[name]) for name in expected)


def loss_and_gradients(model, **options):
    ids = random_ids(2, 24)
    labels = ids.masked_fill(random_ids(2, 24, seed=9) < 20, -100)
    loss = model(ids, labels=labels, **options).loss
    loss.backward()
    return loss.detach(), take_gradients(model)


@pytest.mark.parametrize(
    "name, options",
    {"with use_cache": {"use_cache": True}, "with loss_only": {"loss_only": True}}.items(),
)
def test_training_forward(model, kind, name, options, measure):
    model.train()
    expected = loss_and_gradients(model, use_cache=False)
    actual = loss_and_gradients(model, **options)
    error = max(relative_max_error(actual[0], expected[0]), worst_gradient(actual[1], expected[1]))
    measure(TABLE, f"training {name}, loss and gradients", kind, error, BOUND)


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 1, 1]], ids=str)
def test_gradients_through_cached_steps(model, kind, sizes, measure):
    """Tokens one at a time with gradients: those of the full forward, from prompt to last step."""
    ids = random_ids(2, 30)
    weight = here(torch.randn(2, 4, model.config.vocab_size))
    (model(ids, use_cache=False).logits[:, 26:] * weight).sum().backward()
    expected = take_gradients(model)
    cache = model(ids[:, :26], use_cache=True).past_key_values
    logits = [
        model(piece, past_key_values=cache).logits for piece in ids[:, 26:].split(sizes, dim=1)
    ]
    (torch.cat(logits, 1) * weight).sum().backward()
    error = worst_gradient(take_gradients(model), expected)
    measure(TABLE, "cached steps, gradients", kind, error, BOUND)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, kind, reentrant, measure):
    model.train()
    expected = loss_and_gradients(model, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    actual = loss_and_gradients(model)
    error = max(relative_max_error(actual[0], expected[0]), worst_gradient(actual[1], expected[1]))
    name = f"gradient checkpointing, {'' if reentrant else 'not '}reentrant"
    measure(TABLE, f"{name}, loss and gradients", kind, error, BOUND)


def test_gradient_checkpointing_recomputes(model):
    """It is not a flag without effect: each block runs a second time in the backward."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    loss_and_gradients(model)
    assert len(calls) == 2


@pytest.mark.parametrize("loss_only", [False, True])
def test_gradients_of_each_sample(model, kind, loss_only, measure):
    """By ``torch.func``, as influence functions and private training take them."""
    ids, parameters = random_ids(3, 24)[:, None], dict(model.named_parameters())

    def loss(parameters, ids):
        options = {"labels": ids, "use_cache": False, "loss_only": loss_only}
        return torch.func.functional_call(model, parameters, (ids,), options).loss

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    worst = 0.0
    for row, sample in enumerate(ids):
        model(sample, labels=sample).loss.backward()
        expected = take_gradients(model)
        rows = {name: gradient[row] for name, gradient in found.items()}
        worst = max(worst, worst_gradient(rows, expected))
    measure(TABLE, "gradients of each sample", kind, worst, BOUND)


@pytest.mark.parametrize("loss_only", [False, True])
def test_loss_over_several_batches(model, loss_only):
    """``num_items_in_batch``: unequal parts of a batch add up to the loss of the whole."""
    ids = random_ids(4, 24)
    labels = ids.masked_fill(random_ids(4, 24, seed=9) < 50, -100)
    whole = model(ids, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    for count in (items, items.item()):
        parts = [
            model(ids[s], labels=labels[s], num_items_in_batch=count, loss_only=loss_only).loss
            for s in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_only", [False, True])
def test_shift_labels(model, loss_only):
    """Labels already shifted, as sequence-parallel and packing loaders give them."""
    ids = random_ids(2, 24)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = model(ids, labels=ids).loss
    actual = model(ids, shift_labels=shifted, loss_only=loss_only).loss
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_loss_only_gives_no_logits(model):
    ids = random_ids(2, 24)
    out = model(ids, labels=ids, loss_only=True)
    assert out.logits is None and out.loss.ndim == 0


def test_z_loss(model):
    """``z_loss * mean(logsumexp(logits)^2)`` over the tokens that count."""
    ids = random_ids(2, 24)
    out = model(ids, labels=ids)
    penalty = out.logits[:, :-1].float().logsumexp(-1).square().mean()
    for loss_only in (False, True):
        actual = model(ids, labels=ids, z_loss=0.1, loss_only=loss_only).loss
        torch.testing.assert_close(actual, out.loss + 0.1 * penalty, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------------------- bf16

BF16_TABLE = "bf16, L2 error against float64 over that of bf16's roundings"


@pytest.mark.parametrize("way", ["full forward", "cached"])
def test_bf16_is_as_near_to_float64_as_roundings_allow(model, config, kind, way, measure):
    ids, model = random_ids(2, 40), model.to(torch.bfloat16)
    exact, allowed = exact_and_rounded(model, config, ids)
    run = {"full forward": full, "cached": partial(in_pieces, sizes=[7] + [1] * 33)}[way]
    measure(BF16_TABLE, way, kind, l2_error(run(model, ids), exact) / allowed, SHARE)


def test_bf16_keeps_its_state_in_fp32(model):
    cache = DynamicCache(config=model.config)
    in_pieces(model.to(torch.bfloat16), random_ids(2, 8), [6, 1, 1], cache=cache)
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in cache.layers)


@pytest.fixture
def definitions(model, monkeypatch):
    """Lets the model run on the definitions of all operators, in plain torch."""

    def use():
        names = set(rodimus_kernels.__all__) & set(vars(reference))
        for name in names & set(vars(modeling_rodimus)):
            monkeypatch.setattr(modeling_rodimus, name, getattr(reference, name))
        model.set_attn_implementation("eager")

    return use


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_gradients_in_bf16(model, config, kind, autocast, definitions, device, measure):
    """As near to float64 as those of the definitions: root mean square over the parameters, each
    relative to its own gradient."""
    model = model.train() if autocast else model.to(torch.bfloat16).train()
    ids, oracle = random_ids(2, 24), oracle_of(model, config)
    oracle.loss(ids, ids).backward()

    def error():
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found = take_gradients(model)
        errors = [l2_error(found[name], weight.grad) for name, weight in oracle.weights.items()]
        return sum(error**2 for error in errors) ** 0.5

    own = error()
    definitions()
    name = f"gradients{', autocast' if autocast else ''}, over those of the definitions"
    measure(BF16_TABLE, name, kind, own / error(), SHARE)
