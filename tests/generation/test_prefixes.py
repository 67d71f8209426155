"""What sequences leave behind: later prompts start from it, and say what they would say anyway."""

from dataclasses import replace

import pytest
import torch

from rodimus.generation import Engine, Request, SamplingParams, state_bytes
from tests.generation.helpers import alone, greedy, prompts_of


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_the_next_turn_starts_where_the_last_one_ended(model, tokens):
    first, second = prompts_of(30, 7)
    engine = Engine(model, prefill_chunk=16, recent_states=2)
    (turn,) = engine.generate(Request(first, tokens))
    conversation = torch.cat((first, torch.tensor(turn.tokens), second))
    (answer,) = engine.generate(Request(conversation, 15))
    # the last token of an answer is chosen and not read
    assert answer.prefix_tokens == 30 + tokens - 1
    assert answer.tokens == greedy(model, conversation, 15)


def test_another_answer_starts_after_the_prompt(model):
    first, second = prompts_of(30, 7)
    engine = Engine(model, recent_states=2)
    engine.generate(Request(first, 9))
    conversation = torch.cat((first, second))
    (answer,) = engine.generate(Request(conversation, 15))
    assert answer.prefix_tokens == 30 and answer.tokens == greedy(model, conversation, 15)


def test_choices_of_one_prompt_read_it_once(model):
    (prompt,) = prompts_of(40)
    requests = [
        Request(prompt, 12, SamplingParams(temperature=1.0, seed=seed, repetition_penalty=1.3))
        for seed in range(5)
    ]
    engine = Engine(model, slots=3, prefill_chunk=16, recent_states=4)
    found = engine.generate(requests)
    assert engine.stats.prompt_tokens == 40 and engine.stats.prefix_tokens == 4 * 40
    assert [g.tokens for g in found] == [alone(model, request).tokens for request in requests]
    assert len({tuple(g.tokens) for g in found}) == 5


def choices_of(prompt, count, tokens=12):
    sampled = (SamplingParams(temperature=1.0, seed=seed) for seed in range(count))
    return [Request(prompt, tokens, sampling) for sampling in sampled]


@pytest.mark.parametrize("length", [7, 40])
def test_choices_that_wait_read_their_prompt_once_though_no_states_are_kept(model, length):
    first, second = prompts_of(length, 9)
    requests = [*choices_of(first, 5), *choices_of(second, 2), *choices_of(first, 1)]
    engine = Engine(model, slots=2, prefill_chunk=16)
    found = engine.generate(requests)
    # the last one comes after another prompt
    assert engine.stats.prompt_tokens == 2 * length + 9
    assert [g.prefix_tokens for g in found] == [0] + 4 * [length] + [0, 9, 0]
    assert [g.tokens for g in found] == [alone(model, request).tokens for request in requests]
    assert engine._shared is None and not list(engine.prefixes)


def test_the_state_of_choices_goes_with_the_last_that_waits(plus):
    engine = Engine(plus, slots=1)
    (running, *waiting) = (engine.prepare(x) for x in choices_of(prompts_of(9)[0], 3))
    for generation in (running, *waiting):
        generation.prompt = running.prompt
        engine.enqueue(generation)
    engine.step()
    assert engine._shared is not None
    for generation in waiting:
        engine.cancel(generation)
    assert engine._shared is None


def test_the_state_of_choices_goes_though_the_last_has_no_first_token(plus):
    engine = Engine(plus)
    requests = choices_of(prompts_of(9)[0], 2)
    overflows = SamplingParams(repetition_penalty=1e-39, logit_bias={int(requests[1].prompt[0]): 9})
    requests[1] = replace(requests[1], sampling=overflows)
    first, last = engine.generate(requests)
    assert (first.finish_reason, last.finish_reason) == ("length", "error")
    assert last.prefix_tokens == 9 and engine._shared is None


def test_equal_prompts_of_others_are_read_again(plus):
    """Nobody is to find out by the time what others ask."""
    engine = Engine(plus, slots=1)
    found = [engine.submit(request) for request in choices_of(prompts_of(9)[0], 2)]
    while engine.has_work:
        engine.step()
    assert [g.prefix_tokens for g in found] == [0, 0] and engine.stats.prompt_tokens == 18


def test_a_prompt_that_answered_with_one_token_is_not_read_again(model):
    (prompt,) = prompts_of(20)
    engine = Engine(model, recent_states=2)
    first, again = (engine.generate(Request(prompt, 1, keep_state=True))[0] for _ in "ab")
    assert again.tokens == first.tokens and again.prefix_tokens == 20
    assert torch.equal(again.state.recurrent, first.state.recurrent)


@pytest.mark.parametrize("chunk", [16, 64])
def test_what_a_state_stands_for_is_not_read_and_takes_no_room_in_a_step(plus, chunk):
    first, second = prompts_of(12, 14)
    engine = Engine(plus, slots=2, prefill_chunk=chunk)
    engine.add_prefix(engine.read(second[:12]))
    generations = [engine.submit(Request(prompt, 9)) for prompt in (first, second)]
    engine.step()
    assert len(engine.running) == 2 and [x.prefix_tokens for x in generations] == [0, 12]


def test_the_least_recently_used_states_go(model):
    prompts = prompts_of(10, 11, 12)
    engine = Engine(model, recent_states=4)

    def read(prompt):
        """How much of a prompt was read before; leaves two states."""
        return engine.generate(Request(prompt, 5))[0].prefix_tokens

    assert [read(prompt) for prompt in prompts[:2]] == [0, 0]
    assert read(prompts[0]) == 10 and read(prompts[2]) == 0
    kept = [len(state.tokens) for state in engine.prefixes]
    assert kept == [10, 14, 12, 16]
    assert read(prompts[1]) == 0
    dtype = model.dtype
    expected = sum(
        sum(state_bytes(model.config, dtype, tokens=len(state.tokens)).values())
        for state in engine.prefixes
    )
    assert engine.prefixes.recent_bytes == expected and len(list(engine.prefixes)) == 4


def test_a_state_from_which_longer_prompts_start_counts_as_used(model):
    shared, *others = prompts_of(10, 11, 12)
    engine = Engine(model, recent_states=3)

    def read(*parts):
        """As above; leaves one state."""
        return engine.generate(Request(torch.cat(parts), 1))[0].prefix_tokens

    assert [read(shared), read(others[0]), read(shared, torch.tensor([1]))] == [0, 0, 10]
    assert [read(others[1]), read(shared, torch.tensor([2]))] == [0, 10]


def test_a_prompt_read_before_stays_so_where_a_sequence_ends_with_its_tokens(model):
    (prompt,) = prompts_of(10)
    engine = Engine(model, recent_states=4)
    longer = torch.cat((prompt, torch.tensor(greedy(model, prompt, 1))))
    engine.generate(Request(longer, 3))
    # reads the prompt and its first token, and chooses the second
    engine.generate(Request(prompt, 2))
    (again,) = engine.generate(Request(longer, 3))
    assert again.prefix_tokens == 11 and again.tokens == greedy(model, longer, 3)


def test_a_state_that_was_added_stays(model):
    (prompt,) = prompts_of(10)
    engine = Engine(model, recent_states=1)
    engine.add_prefix(engine.read(prompt[:6]))
    for other in prompts_of(9, 8, seed=3):
        engine.generate(Request(other, 5))
    assert engine.generate(Request(prompt, 5))[0].prefix_tokens == 6


def test_what_is_kept_is_a_copy_without_padding(model):
    """Of prompts that were read together, and whose slots have others since."""
    *prompts, later = prompts_of(4, 3, 7)
    engine = Engine(model, slots=2, recent_states=20)
    turns = engine.generate([Request(prompt, 9) for prompt in prompts])
    engine.generate([Request(later, 9), Request(later.flip(0), 9)])
    for prompt, turn in zip(prompts, turns, strict=True):
        for told in ([], turn.tokens):
            conversation = torch.cat((prompt, prompt.new_tensor(told), later))
            (answer,) = engine.generate(Request(conversation, 15))
            assert answer.prefix_tokens == len(prompt) + max(len(told) - 1, 0)
            assert answer.tokens == greedy(model, conversation, 15)


def test_of_a_scored_prompt_only_the_last_logits_are_kept(plus):
    engine = Engine(plus, recent_states=2)
    engine.generate(Request(prompts_of(30)[0], 2, prompt_logprobs=0))
    (logits,) = (x.logits for x in engine.prefixes._left if x.logits is not None)
    assert logits.untyped_storage().nbytes() == logits.nbytes == 4 * plus.config.vocab_size


def test_nothing_is_kept_unless_asked_for(model):
    engine = Engine(model)
    (prompt,) = prompts_of(10)
    for _ in "ab":
        assert engine.generate(Request(prompt, 5))[0].prefix_tokens == 0
    assert not list(engine.prefixes) and engine.prefixes.recent_bytes == 0


def test_states_are_forgotten_with_the_model_that_read(plus):
    (prompt,) = prompts_of(10)
    engine = Engine(plus, recent_states=4)
    engine.add_prefix(engine.read(prompt[:5]))
    engine.generate(Request(prompt, 5))
    with torch.no_grad():
        plus.lm_head.weight.neg_()
    engine.prefixes.clear()
    (found,) = engine.generate(Request(prompt, 5))
    assert found.prefix_tokens == 0 and found.tokens == greedy(plus, prompt, 5)


def test_broken_sequences_leave_nothing(plus):
    """The first token breaks the state, the prompt was whole."""
    (prompt,) = prompts_of(10)
    engine = Engine(plus, recent_states=4)
    generation = engine.submit(Request(prompt, 9))
    engine.step()
    engine.states.recurrent[:, 0] = float("nan")
    while engine.has_work:
        engine.step()
    assert generation.finish_reason == "error"
    assert [len(state.tokens) for state in engine.prefixes] == [10]
    (again,) = engine.generate(Request(prompt, 9))
    assert again.prefix_tokens == 10 and again.tokens == greedy(plus, prompt, 9)


def test_a_prompt_without_a_first_token_leaves_nothing(plus):
    engine = Engine(plus, recent_states=4)
    plus.lm_head.register_forward_hook(lambda module, args, logits: logits * torch.nan)
    (broken,) = engine.generate(Request(prompts_of(10)[0], 9, keep_state=True))
    assert broken.finish_reason == "error" and broken.state is broken.started is None
    assert not list(engine.prefixes)


def test_a_step_that_fails_over_a_prompt_read_before_ends_it_once(plus, monkeypatch):
    (prompt,) = prompts_of(10)
    engine = Engine(plus, recent_states=2)
    engine.generate(Request(prompt, 5))
    with monkeypatch.context() as patch:
        patch.setattr(engine.states, "write", lambda *_: 1 / 0)
        lost = engine.submit(Request(prompt, 5))
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert lost.finish_reason == "error" and not engine.has_work
    assert engine.generate(Request(prompt, 5))[0].tokens == greedy(plus, prompt, 5)


def test_a_state_of_an_8_bit_window_goes_on(plus):
    first, second = prompts_of(60, 7)
    engine = Engine(plus, window_dtype=torch.int8, recent_states=2)
    (turn,) = engine.generate(Request(first, 20))
    conversation = torch.cat((first, torch.tensor(turn.tokens), second))
    (answer,) = engine.generate(Request(conversation, 15))
    engine = Engine(plus, window_dtype=torch.int8)
    (same,) = engine.generate(Request(first, 20, keep_state=True))
    engine.add_prefix(same.state)
    assert answer.prefix_tokens == 79
    assert answer.tokens == engine.generate(Request(conversation, 15))[0].tokens


def test_a_count_of_states_is_checked(plus):
    with pytest.raises(ValueError, match="recent_states must be an integer of at least 0"):
        Engine(plus, recent_states=-1)
