"""The state: bytes by formula, snapshots, prefixes."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from rodimus import RodimusConfig
from rodimus.generation import Engine, Request, SamplingParams, StateLayout, save_state, state_bytes
from rodimus.generation.state import SequenceState
from rodimus_kernels.testing import relative_error
from tests.generation.helpers import RELEASED_PLUS, alone, greedy, prompts_of
from tests.model.helpers import cache_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_take_the_bytes_of_the_formula(model, dtype):
    engine = Engine(model.to(dtype), slots=3)
    expected = state_bytes(model.config, dtype)
    assert engine.states.nbytes == 3 * sum(expected.values())
    assert engine.states.recurrent.nbytes == 3 * expected["recurrent"]
    assert engine.states.convolution.nbytes == 3 * expected["convolution"]
    assert engine.states.ring.nbytes == 3 * expected["window"]


@pytest.mark.parametrize("length", [1, 5, 8, 9, 10, 40])
def test_snapshots_and_caches_take_the_bytes_of_the_formula(model, length):
    (prompt,) = prompts_of(length)
    expected = state_bytes(model.config, torch.float32, tokens=length)
    assert Engine(model).read(prompt).nbytes == sum(expected.values())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt[None], past_key_values=cache, use_cache=True)
    held = cache_bytes(cache)
    assert {kind: held.get(kind, 0) for kind in expected} == expected


def test_the_formula_gives_the_released_models_sizes_by_hand():
    found = state_bytes(RELEASED_PLUS, tokens=100_000)
    assert found == {
        "recurrent": 24 * 64 * 4096 * 4,
        "convolution": 24 * 4096 * 4 * 2,
        "window": 24 * 2048 * (128 + 2048) * 2,
    }
    assert state_bytes(RELEASED_PLUS)["window"] == 24 * 2112 * (128 + 2048) * 2
    assert state_bytes(RELEASED_PLUS, tokens=0)["window"] == 0
    assert state_bytes(RELEASED_PLUS, torch.float64)["recurrent"] == 24 * 64 * 4096 * 8
    assert StateLayout.of(RELEASED_PLUS, torch.bfloat16).window == 2049
    endless = RodimusConfig.from_dict(RELEASED_PLUS.to_dict() | {"attn_cfg": {"window_size": None}})
    assert state_bytes(endless, max_length=4096)["window"] == 24 * 4096 * (128 + 2048) * 2


@pytest.mark.parametrize("length", [1, 8, 9, 10, 64, 70, 200])
def test_a_slot_gives_back_what_was_written(model, length):
    (prompt,) = prompts_of(length)
    engine = Engine(model, slots=3)
    state = engine.read(prompt)
    engine.states.ring.fill_(float("nan"))
    engine.states.write(1, state)
    engine.states.move(1, 2)
    for slot in (1, 2):
        found = engine.states.read(slot, prompt)
        for name in ("tokens", "recurrent", "convolution", "window"):
            assert torch.equal(getattr(found, name), getattr(state, name)), (slot, name)
        assert engine.states.positions[slot] == length
        assert engine.states.ring[:, slot].isfinite().all()


def test_a_padded_row_leaves_the_state_of_its_prompt_alone(model):
    prompts = prompts_of(3, 6)
    ids = torch.stack([torch.nn.functional.pad(prompt, (6 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(6) >= 6 - len(prompt) for prompt in prompts]).long()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    for row, prompt in enumerate(prompts):
        found = SequenceState.from_cache(cache, prompt, row)
        expected = Engine(model).read(prompt)
        for name in ("recurrent", "convolution", "window"):
            assert getattr(found, name).shape == getattr(expected, name).shape
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_a_state_goes_to_a_device_without_its_tokens(plus):
    moved = Engine(plus).read([1, 2, 3]).to("meta")
    assert moved.recurrent.is_meta and moved.convolution.is_meta and moved.window.is_meta
    assert moved.tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize("length", [1, 3, 9, 40])
def test_a_snapshot_continues_in_a_cache_of_transformers(model, length):
    (prompt,) = prompts_of(length + 12)
    state = Engine(model, prefill_chunk=8).read(prompt[:length])
    engine = Engine(model)
    cache = state.to_cache(model.config, engine.layout)
    assert cache.get_seq_length() == length
    with torch.no_grad():
        actual = model(prompt[None, length:], past_key_values=cache, use_cache=True).logits
        expected = model(prompt[None]).logits[:, length:]
    # fp32 rounding in another order: 1.1e-6 measured at most
    assert relative_error(actual, expected) < 1e-5
    # the cache is a copy: it can be made again, also after steps that write in place
    stepped, again = (state.to_cache(model.config, engine.layout) for _ in "ab")
    for tensor in (state.recurrent, state.convolution, state.window):
        tensor.zero_()
    with torch.no_grad():
        for token in prompt[length : length + 3]:
            model(token[None, None], past_key_values=stepped, use_cache=True)
        repeated = model(prompt[None, length:], past_key_values=again, use_cache=True).logits
    assert torch.equal(actual, repeated)


def test_prompts_start_from_the_longest_stored_prefix(model):
    (prompt,) = prompts_of(60)
    engine = Engine(model, slots=2, prefill_chunk=16)
    for length in (10, 30, 60):
        engine.add_prefix(engine.read(prompt[:length]))
    engine.add_prefix(engine.read(prompts_of(20, seed=9)[0]))
    found = engine.generate([Request(prompt[:n], 20) for n in (5, 10, 25, 45, 60)])
    assert [g.prefix_tokens for g in found] == [0, 0, 10, 30, 30]
    assert [g.tokens for g in found] == [greedy(model, prompt[:n], 20) for n in (5, 10, 25, 45, 60)]
    assert engine.stats.prefix_tokens == 70
    assert engine.stats.prompt_tokens == 5 + 10 + 25 + 45 + 60 - 70


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_a_conversation_goes_on_from_the_state_it_left(model, tokens):
    first, second = prompts_of(30, 7)
    engine = Engine(model, prefill_chunk=16)
    turn = engine.generate([Request(first, tokens, keep_state=True)])[0]
    assert torch.equal(turn.state.tokens, torch.cat((first, torch.tensor(turn.tokens[:-1]).long())))
    engine.add_prefix(turn.state)
    conversation = torch.cat((first, torch.tensor(turn.tokens), second))
    answer = engine.generate([Request(conversation, 15)])[0]
    assert answer.prefix_tokens == 30 + tokens - 1
    assert answer.tokens == greedy(model, conversation, 15)


def test_the_penalty_counts_tokens_of_a_prefix(plus):
    (prompt,) = prompts_of(40)
    sampling = SamplingParams(repetition_penalty=1.5)
    engine = Engine(plus)
    engine.add_prefix(engine.read(prompt[:39]))
    found = engine.generate([Request(prompt, 15, sampling)])[0]
    assert found.prefix_tokens == 39
    assert found.tokens == alone(plus, Request(prompt, 15, sampling)).tokens


def test_a_prefix_of_other_shapes_is_refused(plus):
    from tests.model.helpers import model_of

    state = Engine(model_of("rodimus")).read([1, 2, 3])
    with pytest.raises(ValueError, match="recurrent of the state must be torch.float32 of shape"):
        Engine(plus).add_prefix(state)


def test_a_prefix_of_another_dtype_is_refused(plus):
    state = Engine(plus).read([1, 2, 3])
    engine = Engine(plus.to(torch.bfloat16))
    with pytest.raises(ValueError, match="must be torch.bfloat16 .*, got torch.float32"):
        engine.add_prefix(state)


def test_a_state_that_lost_its_window_is_refused(plus, tmp_path):
    engine = Engine(plus)
    state = engine.read(prompts_of(40)[0])
    state = replace(state, window=state.window[:, :0])
    with pytest.raises(ValueError, match="window of the state must be"):
        engine.add_prefix(state)
    with pytest.raises(ValueError, match="window of the state must be"):
        save_state(tmp_path / "x", state, plus)
