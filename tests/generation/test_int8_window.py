"""An engine whose windows have 8-bit values: bytes, snapshots, neighbours, and what it computes."""

import pytest
import torch

from rodimus.generation import (
    Engine,
    Request,
    SamplingParams,
    SequenceState,
    StateLayout,
    load_state,
    save_state,
    state_bytes,
)
from rodimus.generation import state as state_module
from rodimus_kernels import shared_key_attention_step
from rodimus_kernels.reference import dequantize_values, quantize_values
from rodimus_kernels.testing import relative_error
from tests.device import ON_BOTH
from tests.generation.helpers import RELEASED_PLUS, alone, prompts_of
from tests.model.helpers import model_of

INT8 = {"window_dtype": torch.int8}


@pytest.fixture(params=["rodimus_plus", "grouped"])
def model(request):
    """A tiny fp32 model with a window of 9 keys."""
    return model_of(request.param)


@ON_BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_take_the_bytes_of_the_formula(model, dtype):
    states = Engine(model.to(dtype), slots=3, **INT8).states
    expected = state_bytes(model.config, dtype, **INT8)
    assert states.nbytes == 3 * sum(expected.values())
    assert states.ring.nbytes == 3 * expected["window"]
    assert states.ring.dtype == torch.uint8 and states.ring.shape[-1] % 16 == 0
    # a state file is the same whatever wrote it
    plain = state_bytes(model.config, dtype, tokens=50)
    assert state_bytes(model.config, dtype, tokens=50, **INT8) == plain


def test_the_formula_gives_the_released_models_sizes_by_hand():
    assert state_bytes(RELEASED_PLUS, **INT8)["window"] == 24 * 2112 * (256 + 2048 + 32)
    # keys of 4 bytes
    assert state_bytes(RELEASED_PLUS, torch.float32, **INT8)["window"] == 24 * 2112 * (
        512 + 2048 + 32
    )


def rounded(layout: StateLayout, state: SequenceState) -> SequenceState:
    """The state with the values of its window rounded to 8 bits."""
    keys, values, _ = layout.parts(state.window)
    values = dequantize_values(*quantize_values(values), values.dtype)
    window = torch.cat((keys.flatten(-2), values.flatten(-2)), -1)
    return SequenceState(state.tokens, state.recurrent, state.convolution, window)


@ON_BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [1, 8, 9, 64, 70, 200])
def test_a_snapshot_holds_rounded_values_and_written_back_gives_the_same_bytes(
    model, length, dtype, device
):
    (prompt,) = prompts_of(length)
    given = Engine(model).read(prompt)
    layout = StateLayout.of(model.config, dtype, **INT8)
    states = state_module.SlotStates(layout, 3, device)
    given = SequenceState(
        prompt, given.recurrent, given.convolution.to(dtype), given.window.to(dtype)
    )
    # in every floating dtype the bits of a NaN
    states.ring.fill_(255)
    states.write(0, given)
    fresh = state_module.SlotStates(layout, 1, device)
    fresh.write(0, given)
    assert torch.equal(states.ring[:, 0], fresh.ring[:, 0])
    found = states.read(0, prompt)
    expected = rounded(layout, given)
    for name in ("tokens", "recurrent", "convolution", "window"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    states.write(1, found)
    states.move(1, 2)
    assert torch.equal(states.ring[:, 1], states.ring[:, 0])
    assert torch.equal(states.ring[:, 2], states.ring[:, 0])
    states.clear()
    assert not states.ring.any()


@ON_BOTH
def test_decoding_equals_a_plain_window_of_rounded_values(model, monkeypatch):
    """Every token's logits, past the window; float64, so that no value falls to another step."""
    model = model.double()
    ids = prompts_of(60)[0]
    # a recorded step would not be the one that is replaced
    options = {"slots": 1, "cuda_graphs": False}
    int8, plain = Engine(model, **options, **INT8), Engine(model, **options)
    state = int8.read(ids[:20])
    int8.states.write(0, state)
    plain.states.write(0, rounded(int8.layout, state))

    def logits(engine):
        found = []
        for token in ids[20:]:
            engine.decoder.tokens[0] = token
            found.append(engine.decoder(1))
        return torch.cat(found)

    def attend_rounded(q, k, v, *arguments, **named):
        v = dequantize_values(*quantize_values(v), v.dtype)
        return shared_key_attention_step(q, k, v, *arguments, **named)

    with torch.no_grad():
        actual = logits(int8)
        monkeypatch.setattr(state_module, "shared_key_attention_step", attend_rounded)
        expected = logits(plain)
    # measured: 5e-16 at most
    assert relative_error(actual, expected) < 1e-13


@ON_BOTH
def test_tokens_do_not_depend_on_neighbours(model):
    prompts = prompts_of(*(1 + 7 * i % 30 for i in range(8)))
    sampled = SamplingParams(temperature=0.8, top_p=0.95, seed=5)
    requests = [
        Request(p, 6 + 5 * i % 17, sampled if i % 2 else SamplingParams())
        for i, p in enumerate(prompts)
    ]
    expected = [alone(model, request, prefill_chunk=8, **INT8).tokens for request in requests]
    engine = Engine(model, slots=3, prefill_chunk=8, **INT8)
    assert [generation.tokens for generation in engine.generate(requests)] == expected


@ON_BOTH
def test_a_conversation_goes_on_from_its_state_in_either_engine(model, tmp_path):
    # the window is longer than what follows the state
    first, second = prompts_of(30, 1)
    turn = Engine(model, **INT8).generate([Request(first, 12, keep_state=True)])[0]
    save_state(tmp_path / "x", turn.state, model)
    conversation = torch.cat((first, torch.tensor(turn.tokens), second))
    request = Request(conversation, 15)
    for options in (INT8, {}):
        engine = Engine(model, **options)
        engine.add_prefix(load_state(tmp_path / "x", model))
        answer = engine.generate([request])[0]
        assert answer.prefix_tokens == 41
        # what was rounded moves no logit so far that another token is the likeliest
        assert answer.tokens == alone(model, request, **options).tokens


@ON_BOTH
def test_a_broken_window_ends_its_sequence_alone(model):
    first, second = prompts_of(5, 8)
    expected = alone(model, Request(second, 20), **INT8).tokens
    engine = Engine(model, slots=2, **INT8)
    broken, healthy = engine.submit(Request(first, 20)), engine.submit(Request(second, 20))
    engine.step()
    # one scale of one value head of the newest token
    scales = engine.layout.parts(engine.states.ring[:, 0])[2]
    scales[1, engine.states.positions[0] - 1, 0] = torch.nan
    while engine.has_work:
        engine.step()
    assert broken.finish_reason == "error" and healthy.tokens == expected
    assert engine.generate([Request(second, 20)])[0].tokens == expected


def test_what_cannot_be_kept_is_refused(model):
    with pytest.raises(ValueError, match="window_dtype must be None or torch.int8, got torch.floa"):
        Engine(model, window_dtype=torch.float16)
    with pytest.raises(ValueError, match="expected window_dtype None, got torch.int8"):
        Engine(model_of("rodimus"), **INT8)
