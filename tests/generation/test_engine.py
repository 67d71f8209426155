"""The engine: ``model.generate`` is the truth of its tokens, and nobody's neighbours matter."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rodimus.generation import Engine, Request, SamplingParams
from rodimus.generation.engine import Delta
from tests.device import ON_BOTH, here
from tests.generation.helpers import (
    END,
    alone,
    byte_tokenizer,
    greedy,
    prompts_of,
    text_model,
)
from tests.model.helpers import build, config_of, live_tensor_bytes, model_of

SAMPLED = SamplingParams(temperature=0.8, top_k=20, top_p=0.95, repetition_penalty=1.1, seed=5)


def tokens_of(generations) -> list[list[int]]:
    return [generation.tokens for generation in generations]


@ON_BOTH
def test_greedy_tokens_equal_generate_past_the_window_and_across_chunks(model):
    prompts = prompts_of(1, 3, 9, 20, 77, 130)
    expected = [greedy(model, prompt, 25) for prompt in prompts]
    engine = Engine(model, slots=3, prefill_chunk=16)
    assert tokens_of(engine.generate([Request(p, 25) for p in prompts])) == expected
    assert not engine.running and not engine.has_work


def test_a_generation_shows_what_it_has_produced():
    engine = Engine(text_model(), byte_tokenizer(), slots=1)
    generation = engine.submit(Request([5, 6], 3))
    assert repr(generation) == "<Generation '', 0 tokens, finish_reason=None>"
    while engine.has_work:
        engine.step()
    shown = f"<Generation {generation.text!r}, 3 tokens, finish_reason='length'>"
    assert repr(generation) == shown


@ON_BOTH
def test_tokens_do_not_depend_on_neighbours(model):
    """Requests come and go at every step, are cancelled, and differ in every parameter."""
    prompts = prompts_of(*(1 + 7 * i % 30 for i in range(12)))
    requests = [
        Request(p, 6 + 5 * i % 17, SAMPLED if i % 2 else SamplingParams())
        for i, p in enumerate(prompts)
    ]
    expected = [alone(model, request, prefill_chunk=8).tokens for request in requests]
    engine = Engine(model, slots=4, prefill_chunk=8)
    generations, doomed = [], []
    for i, request in enumerate(requests):
        generations.append(engine.submit(request))
        doomed.append(engine.submit(Request(prompts[i - 3], 9, SAMPLED)))
        engine.step()
        if i % 2:
            engine.cancel(doomed[i // 2])
    while engine.has_work:
        engine.step()
    assert tokens_of(generations) == expected
    assert {g.finish_reason for g in doomed} <= {"cancelled", "length"}


@ON_BOTH
def test_the_seed_decides_the_text(plus):
    (prompt,) = prompts_of(5)
    texts = {
        tuple(alone(plus, Request(prompt, 20, SamplingParams(1.0, seed=seed))).tokens)
        for seed in (1, 1, 2, 3)
    }
    assert len(texts) == 3


@ON_BOTH
def test_a_finished_sequence_frees_its_slot_at_once(plus):
    engine = Engine(plus, slots=2)
    short, *rest = (
        engine.submit(Request(p, n)) for p, n in zip(prompts_of(4, 4, 4), (2, 9, 9), strict=True)
    )
    # two were read, one got its second token, which is its last
    assert engine.step() == [short, rest[0]]
    assert short.finish_reason == "length" and engine.running == rest[:1]
    # news are told of all that got a token, and of nobody else
    assert set(engine.step()) == set(rest)
    assert engine.running == rest


@ON_BOTH
def test_memory_is_made_once(model):
    engine = Engine(model, slots=3)
    tensors = (engine.states.recurrent, engine.states.convolution, engine.states.ring)
    addresses = [x.data_ptr() for x in tensors]
    engine.generate([Request(p, 30) for p in prompts_of(3, 70, 20, 9)])
    after = (engine.states.recurrent, engine.states.convolution, engine.states.ring)
    assert [x.data_ptr() for x in after] == addresses


def test_no_forward_reads_more_than_a_chunk(plus):
    """Nor makes more logits than the next token needs."""
    lengths, scored = [], []
    plus.model.embeddings.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    plus.lm_head.register_forward_hook(lambda m, args, out: scored.append(out.shape[1]))
    engine = Engine(plus, prefill_chunk=16)
    engine.generate([Request(p, 5) for p in prompts_of(100, 7, 8, 33)])
    engine.read(prompts_of(40)[0])
    assert max(lengths) == 16 and max(scored) == 1


@ON_BOTH
def test_running_sequences_wait_for_one_chunk_at_most(plus):
    engine = Engine(plus, prefill_chunk=8)
    first = engine.submit(Request(prompts_of(4)[0], 50))
    engine.step()
    engine.submit(Request(prompts_of(40)[0], 5))
    for step in range(5):
        engine.step()
        assert len(first.tokens) == 3 + step


def test_news_are_told_before_prompts_are_read_and_while_tokens_alone_are_computed(
    plus, monkeypatch
):
    """On a device that computes while the host goes on."""
    engine, events = Engine(plus, slots=2, prefill_chunk=4), []
    engine._computes_apart = True
    for owner, name in ((engine, "_read_chunk"), (engine.decoder, "_forward")):
        call = getattr(owner, name)
        watched = lambda *x, name=name, call=call, **y: events.append(name) or call(*x, **y)
        monkeypatch.setattr(owner, name, watched)

    def step():
        events.clear()
        engine.step(lambda: events.append("told"))
        return list(events)

    first, second, third = (engine.prepare(Request(p, 9)) for p in prompts_of(3, 6, 3))
    engine.enqueue(first)
    assert step() == ["told", "_read_chunk", "_forward"]
    engine.enqueue(second)
    for _ in range(2):
        assert step() == ["told", "_read_chunk", "_forward"]
    # which finds no slot
    engine.enqueue(third)
    assert step() == ["_forward", "told"]
    for generation in (first, second, third):
        engine.cancel(generation)
    assert step() == ["told"]


class Forwards(list):
    """The sizes ``(B, T)`` of what a model reads, single tokens aside."""

    def __init__(self, model):
        hook = lambda module, args, out: self.append(tuple(out.shape[:2]))
        model.model.embeddings.register_forward_hook(hook)

    def of_prompts(self):
        return [size for size in self if size[1] > 1]


class TestReadingTogether:
    """Short prompts that wait are read in one forward, and say what they would say alone."""

    @ON_BOTH
    @pytest.mark.parametrize("lengths", [(5,) * 6, (9, 7, 8, 2, 9, 9), (1, 1, 2, 40, 38, 3)])
    def test_tokens_are_those_of_each_prompt_alone(self, model, lengths):
        prompts = prompts_of(*lengths)
        engine = Engine(model, slots=6, prefill_chunk=128)
        found = engine.generate([Request(p, 25) for p in prompts])
        assert tokens_of(found) == [greedy(model, p, 25) for p in prompts]
        # padding is not counted
        assert engine.stats.prompt_tokens == sum(lengths)

    @pytest.mark.parametrize("seed", range(4))
    def test_tokens_do_not_depend_on_who_came_at_the_same_time(self, model, seed):
        lengths = torch.randint(1, 30, (24,), generator=torch.Generator().manual_seed(seed))
        prompts = prompts_of(*lengths.tolist(), seed=seed)
        requests = [
            Request(p, 1 + 3 * i % 20, SAMPLED if i % 2 else SamplingParams())
            for i, p in enumerate(prompts)
        ]
        expected = [alone(model, request).tokens for request in requests]
        engine, sizes = Engine(model, slots=7, prefill_chunk=64), Forwards(model)
        assert tokens_of(engine.generate(requests)) == expected
        # not all sizes of a forward are those of one prompt
        assert max(batch for batch, _ in sizes.of_prompts()) > 1

    def test_states_are_those_of_each_prompt_alone(self, model):
        prompts, model = prompts_of(12, 9, 2, 6, 5), model.double()
        sizes = Forwards(model)
        # the first token is the last: nothing is decoded
        requests = [Request(p, 1, keep_state=True) for p in prompts]
        together = Engine(model, slots=5).generate(requests)
        assert sizes == [(2, 12), (1, 2), (2, 6)]
        for found, request in zip(together, requests, strict=True):
            expected = alone(model, request).state
            for name in ("recurrent", "convolution", "window"):
                part, other = getattr(found.state, name), getattr(expected, name)
                torch.testing.assert_close(part, other, rtol=1e-12, atol=1e-12)
            assert found.state.tokens.equal(request.prompt)

    def test_the_chunk_and_the_slots_bound_a_forward(self, plus):
        sizes = Forwards(plus)
        engine = Engine(plus, slots=30, prefill_chunk=60)
        engine.generate([Request(p, 1) for p in prompts_of(*[10] * 8, *[2] * 20)])
        # all 60 places, then the same in the next step, and never more than 16
        assert sizes == [(6, 10), (2, 10), (16, 2), (4, 2)]
        sizes.clear()
        Engine(plus, slots=3).generate([Request(p, 2) for p in prompts_of(*[10] * 5)])
        assert sizes.of_prompts() == [(3, 10), (2, 10)]

    def test_running_sequences_wait_for_one_chunk_of_many_prompts(self, plus):
        engine, sizes = Engine(plus, slots=8, prefill_chunk=20), Forwards(plus)
        first = engine.submit(Request(prompts_of(4)[0], 50))
        engine.step()
        for prompt in prompts_of(9, 9, 9, 9, 9):
            engine.submit(Request(prompt, 20))
        for step in range(3):
            engine.step()
            assert len(first.tokens) == 3 + step
        assert sizes.of_prompts() == [(1, 4), (2, 9), (2, 9), (1, 9)]

    def test_padding_is_little(self, plus):
        sizes = Forwards(plus)
        Engine(plus, slots=8).generate([Request(p, 1) for p in prompts_of(8, 5, 8, 2, 30, 2, 3)])
        assert sizes == [(3, 8), (1, 2), (1, 30), (2, 3)]

    def test_narrow_dtypes_of_a_cpu_know_no_neighbours(self, plus):
        """Not to the last bit."""
        plus, prompts = plus.bfloat16(), prompts_of(8, 8, 7)
        requests = [Request(p, 1, keep_state=True) for p in prompts]
        sizes = Forwards(plus)
        found = Engine(plus, slots=3).generate(requests)
        assert sizes == [(1, 8), (1, 8), (1, 7)]
        for generation, request in zip(found, requests, strict=True):
            assert generation.state.recurrent.equal(alone(plus, request).state.recurrent)

    def test_a_prompt_waits_for_the_state_that_another_leaves(self, plus):
        first, rest = prompts_of(12, 3)
        longer = torch.cat((first, rest))
        requests = [Request(first, 6), Request(longer, 6), Request(prompts_of(9, seed=3)[0], 6)]
        engine = Engine(plus, slots=3, recent_states=4)
        found = engine.generate(requests)
        assert [g.prefix_tokens for g in found] == [0, 12, 0]
        assert tokens_of(found) == [alone(plus, request).tokens for request in requests]

    @pytest.mark.parametrize("broken", [0, 1, 2])
    def test_one_that_breaks_the_model_fails_alone(self, plus, broken):
        with torch.no_grad():
            plus.model.embeddings.weight[7] = float("nan")
        plus.lm_head.weight = nn.Parameter(plus.lm_head.weight.nan_to_num(0.0))
        prompts = [[1, 2, 3], [4, 5, 6], [8, 9, 10]]
        expected = tokens_of(Engine(plus).generate([Request(p, 9) for p in prompts]))
        prompts[broken][1] = 7
        found = Engine(plus).generate([Request(p, 9) for p in prompts])
        assert "NaN" in found.pop(broken).error
        del expected[broken]
        assert tokens_of(found) == expected

    def test_nobody_fails_for_a_forward_that_breaks(self, plus):
        prompts = prompts_of(4, 4, 4)
        expected = [greedy(plus, p, 1) for p in prompts]
        plus.lm_head.register_forward_hook(lambda *x: x[-1] * (1 if len(x[-1]) < 2 else torch.nan))
        sizes = Forwards(plus)
        found = Engine(plus).generate([Request(p, 1) for p in prompts])
        assert tokens_of(found) == expected
        assert sizes == [(3, 4), (1, 4), (1, 4), (1, 4)]
        # whoever came first still is
        assert sorted(found, key=lambda generation: generation.started) == found
        sizes.clear()
        # and nobody who came later is drawn in
        assert (
            tokens_of(Engine(plus, slots=2).generate([Request(p, 1) for p in prompts])) == expected
        )
        assert sizes == [(2, 4), (1, 4), (1, 4), (1, 4)]

    def test_logits_ruled_out_by_a_hook_break_nothing(self, plus):
        banned = torch.arange(50, 97)
        plus.lm_head.register_forward_hook(lambda *x: x[-1].index_fill(-1, banned, -torch.inf))
        sizes = Forwards(plus)
        found = Engine(plus).generate([Request(p, 5) for p in prompts_of(4, 4, 4)])
        assert sizes.of_prompts() == [(3, 4)] and max(map(max, tokens_of(found))) < 50

    def test_a_step_that_fails_over_them_ends_them_and_not_those_that_wait(self, plus):
        engine, prompts = Engine(plus, slots=4, prefill_chunk=20), prompts_of(9, 9, 9)
        read = engine._read_chunk
        engine._read_chunk = lambda *args, **options: 1 / 0
        generations = [engine.submit(Request(p, 9)) for p in prompts]
        with pytest.raises(ZeroDivisionError):
            engine.step()
        assert [g.finish_reason for g in generations] == ["error", "error", None]
        engine._read_chunk = read
        while engine.has_work:
            engine.step()
        assert generations[2].tokens == greedy(plus, prompts[2], 9)


class TestEnd:
    def test_an_end_token_ends_the_text_and_is_its_last_token(self, plus):
        (prompt,) = prompts_of(6)
        tokens = greedy(plus, prompt, 20)
        end = tokens[7]
        expected = tokens[: tokens.index(end) + 1]
        # also where it is the last that may be
        for most in (20, len(expected)):
            found = alone(plus, Request(prompt, most, stop_tokens=(end,)))
            assert found.tokens == expected and found.finish_reason == "stop"

    def test_the_models_own_end_tokens_are_the_default(self, plus):
        (prompt,) = prompts_of(6)
        tokens = greedy(plus, prompt, 20)
        plus.generation_config.eos_token_id = [tokens[5], 96]
        assert alone(plus, Request(prompt, 20)).tokens == greedy(plus, prompt, 20)
        assert len(alone(plus, Request(prompt, 20, stop_tokens=())).tokens) == 20
        plus.generation_config.eos_token_id = [0, 96, 97, -1]
        assert Engine(plus).end_tokens == [0, 96]

    def test_one_token_may_be_all(self, plus):
        (prompt,) = prompts_of(6)
        found = alone(plus, Request(prompt, 1))
        assert found.tokens == greedy(plus, prompt, 1) and found.finish_reason == "length"
        assert found.state is None

    def test_cancelling_ends_a_request_wherever_it_is(self, plus):
        engine = Engine(plus, slots=1, prefill_chunk=4)
        running, reading, waiting, kept = (
            engine.submit(Request(p, n))
            for p, n in zip(prompts_of(3, 20, 3, 3), (50, 5, 5, 5), strict=True)
        )
        engine.step()
        engine.cancel(waiting)
        engine.cancel(running)
        assert engine.step() == [waiting, running]
        engine.cancel(reading)
        engine.cancel(reading)
        assert not engine.running
        while engine.has_work:
            engine.step()
        assert [g.finish_reason for g in (running, reading, waiting)] == ["cancelled"] * 3
        assert kept.tokens == greedy(plus, kept.prompt, 5)
        assert engine.stats.finished == {"cancelled": 3, "length": 1}
        # of the one that was being read no more than a chunk
        assert engine.stats.prompt_tokens == 3 + 4 + 3 and not reading.tokens

    def test_leaving_a_stream_cancels_it(self, plus):
        engine = Engine(plus)
        for delta in engine.stream(Request(prompts_of(3)[0], 50)):
            assert len(delta.tokens) == 2
            break
        assert not engine.has_work and engine.stats.finished == {"cancelled": 1}


@ON_BOTH
def test_a_stream_yields_each_token_once_while_others_run(plus):
    first, second = prompts_of(5, 9)
    engine = Engine(plus, slots=2, prefill_chunk=4)
    other = engine.submit(Request(second, 15))
    deltas = list(engine.stream(Request(first, 10)))
    # none while prompts are read
    assert all(delta.tokens for delta in deltas)
    assert [t for delta in deltas for t in delta.tokens] == greedy(plus, first, 10)
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    while engine.has_work:
        engine.step()
    assert other.tokens == greedy(plus, second, 15)


@ON_BOTH
def test_logprobs_are_those_of_the_full_forward(plus):
    (prompt,) = prompts_of(12)
    found = alone(plus, Request(prompt, 8, SAMPLED, logprobs=3))
    ids = here(torch.cat((prompt, torch.tensor(found.tokens))))
    with torch.no_grad():
        expected = plus(ids[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    assert [entry.token for entry in found.logprobs] == found.tokens
    for entry, row in zip(found.logprobs, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
    # whatever others ask for
    asked = [
        Request(p, 4, SamplingParams(logit_bias={token: 100}), logprobs=most)
        for p, token, most in zip(prompts_of(4, 4, 4, 4), range(4), (1, None, 20, 0), strict=True)
    ]
    many = Engine(plus, slots=4).generate(asked)
    for request, x in zip(asked, many, strict=True):
        most, expected = request.logprobs, alone(plus, request).logprobs
        assert [entry.token for entry in x.logprobs] == ([] if most is None else x.tokens)
        for entry, other in zip(x.logprobs, expected, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert len(entry.top) == most
            assert [token for token, _ in entry.top] == [token for token, _ in other.top]


@ON_BOTH
@pytest.mark.parametrize("new_tokens", [0, 1, 6])
@pytest.mark.parametrize("chunk", [5, 512])
def test_prompt_logprobs_are_those_of_the_full_forward(plus, chunk, new_tokens):
    """Of prompts in chunks, of several in one forward, and of one of whose beginning there is a
    state."""
    prompts = prompts_of(12, 11, 9, 70, 1)
    prompts.append(torch.cat((prompts[0], prompts[2])))
    engine = Engine(plus, slots=3, prefill_chunk=chunk, recent_states=4)
    engine.add_prefix(engine.read(prompts[0].tolist()))
    found = engine.generate([Request(p, new_tokens, prompt_logprobs=3) for p in prompts])
    for prompt, generation in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = plus(here(prompt)[None]).logits[0].log_softmax(-1)[:-1]
        entries = generation.prompt_logprobs
        assert [entry.token for entry in entries] == prompt[1:].tolist()
        for entry, row in zip(entries, expected, strict=True):
            assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
            assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
        assert generation.tokens == (greedy(plus, prompt, new_tokens) if new_tokens else [])
        assert (generation.finish_reason, generation.error) == ("length", None)
    assert engine.stats.prefix_tokens == 0 and not engine.has_work


@ON_BOTH
@pytest.mark.parametrize("new_tokens", [1, 6])
def test_choices_of_a_scored_prompt_read_it_once(plus, new_tokens):
    """If they ask for the same scores; one that asks for others reads it again."""
    (prompt,) = prompts_of(12)
    engine = Engine(plus, slots=2, recent_states=1)
    asked = [3, 3, 3, 0, None, 3]
    found = engine.generate([Request(prompt, new_tokens, prompt_logprobs=n) for n in asked])
    assert [x.prefix_tokens for x in found] == [0, 12, 12, 0, 12, 0]
    (expected,) = Engine(plus).generate(Request(prompt, new_tokens, prompt_logprobs=3))
    for n, choice in zip(asked, found, strict=True):
        scores = [] if n is None else expected.prompt_logprobs
        assert choice.prompt_logprobs == [replace(x, top=x.top[:n]) for x in scores]
        assert choice.tokens == expected.tokens
    found = engine.generate([Request(prompt, 0, prompt_logprobs=3)] * 2)
    assert [x.prefix_tokens for x in found] == [0, 12]
    assert all(x.prompt_logprobs == expected.prompt_logprobs for x in found)


@ON_BOTH
def test_a_scored_prompt_leaves_its_state(plus):
    (prompt,) = prompts_of(12)
    engine = Engine(plus, recent_states=1)
    (scored,) = engine.generate(Request(prompt, 0, prompt_logprobs=0, keep_state=True))
    assert scored.tokens == [] and all(entry.top == () for entry in scored.prompt_logprobs)
    assert scored.state.tokens.tolist() == prompt.tolist()
    (continued,) = engine.generate(Request(torch.cat((prompt, prompt)), 5))
    assert continued.prefix_tokens == 12
    assert continued.tokens == greedy(plus, torch.cat((prompt, prompt)), 5)


@ON_BOTH
@pytest.mark.parametrize("together", [1, 2])
def test_a_prompt_that_has_no_finite_score_is_an_error(plus, together):
    prompts = prompts_of(12, 11)
    marked, spoiled = prompts[0][3].item(), []
    prompts[1][prompts[1] == marked] += 1
    plus.model.embeddings.register_forward_pre_hook(
        lambda module, args: spoiled.append((args[0] == marked).any(-1)[:, None, None])
    )
    plus.lm_head.register_forward_hook(
        lambda module, args, logits: logits.masked_fill(spoiled[-1], torch.nan)
    )
    requests = [Request(p, 0, prompt_logprobs=0) for p in prompts[:together]]
    broken, *others = Engine(plus).generate(requests)
    assert broken.finish_reason == "error" and "NaN or infinity" in broken.error
    assert all(len(other.prompt_logprobs) == 10 for other in others)


@ON_BOTH
def test_what_the_model_makes_of_padding_is_no_score(plus):
    prompts = prompts_of(12, 11)
    padding = torch.zeros(2, 12, 1, dtype=torch.bool)
    padding[1, 0] = True
    plus.lm_head.register_forward_hook(
        lambda module, args, logits: logits.masked_fill(here(padding), torch.nan)
    )
    # recorded steps would have no such padding
    engine = Engine(plus, cuda_graphs=False)
    found = engine.generate([Request(p, 0, prompt_logprobs=0) for p in prompts])
    assert [len(x.prompt_logprobs) for x in found] == [11, 10]
    assert [x.finish_reason for x in found] == ["length", "length"]


@ON_BOTH
def test_hooks_and_adapters_take_part(model):
    """Every linear layer gets a low-rank update by a hook, as an adapter would."""

    def adapt(module, args, output):
        return output + 0.05 * torch.roll(output, 1, -1)

    (prompt,) = prompts_of(20)
    plain = greedy(model, prompt, 30)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(adapt)
    adapted = greedy(model, prompt, 30)
    assert adapted != plain
    assert alone(model, Request(prompt, 30)).tokens == adapted


@ON_BOTH
def test_a_model_without_a_window_needs_a_limit_and_keeps_it():
    config = config_of("rodimus_plus")
    config["attn_cfg"] |= {"window_size": None}
    model = build(config)
    with pytest.raises(ValueError, match="expected max_length, got None"):
        Engine(model)
    engine = Engine(model, max_length=70, prefill_chunk=16)
    prompts = prompts_of(5, 50)
    found = tokens_of(engine.generate([Request(p, 20) for p in prompts]))
    assert found == [greedy(model, p, 20) for p in prompts]
    with pytest.raises(ValueError, match="71 together, expected at most 70"):
        engine.submit(Request(prompts[1], 21))


@ON_BOTH
def test_bfloat16_runs_with_a_float32_state(plus):
    engine = Engine(plus.to(torch.bfloat16), slots=2)
    found = engine.generate([Request(p, 12) for p in prompts_of(20, 3)])
    assert [len(g.tokens) for g in found] == [12, 12]
    assert engine.states.recurrent.dtype == torch.float32
    assert engine.states.ring.dtype == engine.states.convolution.dtype == torch.bfloat16


@ON_BOTH
def test_an_engine_made_in_inference_mode_runs_in_any(model):
    """The mode is a thread's own: a worker's thread has another."""
    penalised = SamplingParams(repetition_penalty=1.3, presence_penalty=0.5)
    requests = [Request(prompts_of(20)[0], 9, x) for x in (penalised, SamplingParams())]
    expected = tokens_of(Engine(model).generate(requests))
    with torch.inference_mode():
        engine = Engine(model, slots=2, recent_states=2)
        assert tokens_of(engine.generate(requests)) == expected
    assert tokens_of(engine.generate(requests)) == expected


def test_torchs_default_device_changes_nothing():
    model, (prompt, other) = model_of("rodimus"), prompts_of(20, 30)
    requests = [Request(prompt, 9, logprobs=1, keep_state=True), Request(other, 9)]
    expected = tokens_of(Engine(model).generate(requests))
    with torch.device("meta"):
        engine = Engine(model, slots=2, recent_states=2)
        first, second = engine.generate(requests)
        assert tokens_of([first, second]) == expected
        engine.add_prefix(first.state)
        (longer,) = engine.generate(Request([*prompt.tolist(), *first.tokens], 1))
    assert first.prompt.device.type == first.state.tokens.device.type == "cpu"
    assert longer.prefix_tokens == len(prompt) + 8


@ON_BOTH
@pytest.mark.parametrize("row", [0, 1])
def test_a_broken_sequence_ends_alone(model, row):
    first, second = prompts_of(5, 8)
    expected = greedy(model, second, 20)
    engine = Engine(model, slots=2)
    requests = [Request(second, 20)]
    requests.insert(row, Request(first, 20, logprobs=1))
    generations = [engine.submit(request) for request in requests]
    broken, healthy = generations[row], generations[1 - row]
    engine.step()
    engine.states.recurrent[:, row] = float("nan")
    while engine.has_work:
        engine.step()
        # a graph of more rows may run a row that has ended
        assert (engine.decoder.tokens >= 0).all()
    assert (broken.finish_reason, broken.error) == (
        "error",
        "the model's logits hold NaN or infinity",
    )
    assert healthy.tokens == expected
    # no token is reported for it, and none counted
    assert len(broken.logprobs) == len(broken.tokens) < 20
    assert engine.stats.generated_tokens == 20 + len(broken.tokens)
    # and the slot it leaves is as good as new
    assert engine.generate([Request(second, 20)])[0].tokens == expected


@ON_BOTH
def test_a_prompt_that_breaks_the_model_fails_alone(plus):
    with torch.no_grad():
        plus.model.embeddings.weight[7] = float("nan")
    plus.lm_head.weight = nn.Parameter(plus.lm_head.weight.nan_to_num(0.0))
    engine = Engine(plus, slots=2)
    broken, healthy = engine.generate(
        [Request(torch.tensor([3, 7, 5]), 5), Request(np.array([3, 4, 5]), 5)]
    )
    assert broken.finish_reason == "error" and healthy.finish_reason == "length"
    assert "NaN" in broken.error
    assert list(engine.stream(Request([7], 5))) == [Delta([], "", [], "error")]


def test_the_only_token_comes_before_the_end(plus):
    (found,) = Engine(plus).generate(Request([1], 1))
    assert found.submitted <= found.started <= found.finished


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([]), "at least one token"),
        (Request([1, 97]), r"tokens of the prompt must be in \[0, 97\), got 97"),
        (Request([1, -1]), r"got -1"),
        (Request([1, 1.5]), "a list of token ids"),
        (Request([1], max_new_tokens=0), "max_new_tokens must be an integer .* got 0"),
        (Request([1], max_new_tokens=2.5), "max_new_tokens must be an integer .* got 2.5"),
        (Request(5), "a list of token ids, got int"),
        (Request("def f"), "a list of token ids, got str: the engine has no tokenizer"),
        (Request(b"def f"), "a list of token ids, got bytes"),
        (Request([1], max_new_tokens=True), "max_new_tokens must be an integer .* got True"),
        (Request([1], sampling={"temperature": 1}), "sampling must be SamplingParams, got dict"),
        (
            Request([1], sampling=SamplingParams(logit_bias={300: 1})),
            "tokens of logit_bias must be",
        ),
        (Request([1], stop="ab"), "stop must be a tuple of strings, got the string 'ab'"),
        (Request([1], stop=(5,)), r"stop must be a tuple of strings, got \(5,\)"),
        (Request([1], stop=None), "stop must be a tuple of strings, got None"),
        (Request([1], stop_tokens=5), "stop_tokens must be a list of token ids, got int"),
        (Request([1], stop_tokens="ab"), "stop_tokens must be a list of token ids, got str"),
        (Request([1], stop_tokens=("a",)), "stop_tokens must be a list .* got str in it"),
        (Request([1], stop_tokens=(97,)), r"tokens of stop_tokens must be in \[0, 97\), got 97"),
        (Request([1], logprobs=1.5), r"logprobs must be an integer in \[0, 20\], got 1.5"),
        (Request([1], logprobs=True), r"logprobs must be an integer in \[0, 20\], got True"),
        (Request([[1, 2]]), r"got list in it: give one row of a batch, as in input_ids\[0\]"),
        (Request({"input_ids": [1]}), "the prompt must be a list of token ids, got dict"),
        ([1, 2], r"expected a Request or text, got list: .* Request\(ids\)"),
        ("def f", "a list of token ids, got str: the engine has no tokenizer"),
        (Request([1], logprobs=21), r"logprobs must be an integer in \[0, 20\], got 21"),
        (Request([1], stop=("x",)), "no tokenizer in the engine"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_that_cannot_be_served_are_refused(plus, request_, message):
    engine = Engine(plus)
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert not engine.has_work


def test_an_empty_stop_string_is_refused():
    engine = Engine(text_model(), byte_tokenizer())
    with pytest.raises(ValueError, match="strings that are not empty, got an empty string"):
        engine.prepare(Request([1], stop=("a", "")))


@pytest.mark.parametrize("options", [{}, {"return_tensors": "pt"}], ids=["lists", "tensors"])
def test_what_a_tokenizer_returns_is_no_list_of_texts(options):
    """Its keys are texts."""
    tokenizer = byte_tokenizer()
    engine = Engine(text_model(), tokenizer)
    with pytest.raises(ValueError, match="expected a Request or text, got BatchEncoding"):
        engine.generate(tokenizer("x", **options))
    with pytest.raises(ValueError, match="a list of token ids, got BatchEncoding"):
        engine.generate(Request(tokenizer("x", **options)))


def test_a_tokenizer_is_not_named(plus):
    with pytest.raises(ValueError, match="must be one of transformers, got the name 'folder'"):
        Engine(plus, "folder")


def test_a_prompt_may_be_text():
    model, tokenizer = text_model(), byte_tokenizer()
    texts = ["def f", "\u00e4 b"]
    ids = [tokenizer(text).input_ids for text in texts]
    engine = Engine(model, tokenizer, slots=2)
    expected = tokens_of(engine.generate([Request(x, 6) for x in ids]))
    assert tokens_of(engine.generate([Request(x, 6) for x in texts])) == expected
    whole = tokens_of(engine.generate(Request(x) for x in ids))
    assert tokens_of(engine.generate(texts)) == whole and len(whole[0]) == 128
    for one in (texts[0], Request(texts[0])):
        assert tokens_of(engine.generate(one)) == whole[:1]
    streamed = [t for delta in engine.stream(texts[1]) for t in delta.tokens]
    assert streamed == whole[1]
    generation = engine.submit(texts[0])
    assert generation.prompt.tolist() == ids[0]
    engine.cancel(generation)
    assert engine.read(texts[1]).tokens.tolist() == ids[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the prompt has no tokens"),
        ("a\udcff", "no UTF-8 text at character 1"),
        (END, "token 256, and the model knows 250"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(text, message):
    engine = Engine(build(config_of("rodimus_plus") | {"vocab_size": 250}), byte_tokenizer())
    with pytest.raises(ValueError, match=message):
        engine.generate([text])
    assert not engine.has_work


def test_numbers_of_numpy_are_numbers(plus):
    request = Request([np.int64(3), 5], np.int64(4), SamplingParams(top_k=np.int64(3)))
    assert alone(plus, request).tokens == greedy(plus, torch.tensor([3, 5]), 4)


def test_narrow_integers_of_numpy_do_not_overflow(plus):
    (prompt,) = prompts_of(200)
    engine = Engine(plus, slots=np.int8(2), prefill_chunk=np.int8(100))
    (done,) = engine.generate([Request(prompt, np.int8(4))])
    assert done.tokens == greedy(plus, prompt, 4)


def test_a_wrong_request_among_others_begins_none(plus):
    engine = Engine(plus)
    with pytest.raises(ValueError, match="at least one token"):
        engine.generate([Request([1], 5), Request([])])
    assert not engine.has_work


@ON_BOTH
def test_an_interrupt_leaves_nothing_behind(plus):
    engine, requests = Engine(plus, slots=2), [Request(p, 9) for p in prompts_of(4, 5, 6)]
    decode, calls = engine.decoder, []

    def interrupted(rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(rows)

    interrupted.tokens, interrupted.follow_model = decode.tokens, decode.follow_model
    engine.decoder = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests)
    assert not engine.has_work
    assert tokens_of(engine.generate(requests)) == [
        greedy(plus, request.prompt, 9) for request in requests
    ]


def test_an_interrupt_leaves_nothing_behind_though_a_cancellation_fails(plus, monkeypatch):
    """The state that it would leave behind finds no memory."""
    engine = Engine(plus, slots=2, recent_states=2)
    step, errors = engine.step, iter([None, KeyboardInterrupt])

    def interrupted():
        step()
        if error := next(errors):
            raise error

    def finds_none(*_):
        raise MemoryError

    monkeypatch.setattr(engine, "step", interrupted)
    monkeypatch.setattr(engine.states, "read", finds_none)
    with pytest.raises(MemoryError):
        engine.generate([Request(p, 9) for p in prompts_of(4, 5, 6)])
    assert not engine.has_work and engine.stats.finished == {"cancelled": 2, "error": 1}


@pytest.mark.parametrize("part", ["decode", "sample", "read", "enter", "start"])
def test_a_failed_step_ends_what_was_under_way(plus, monkeypatch, part):
    """A token of theirs may be missing; what waited is served as if nothing had been."""
    engine = Engine(plus, slots=2)
    foreign = [engine.submit(Request(p, 30)) for p in prompts_of(4, 5)]
    for _ in range(5):
        engine.step()
    if part in ("read", "enter", "start"):
        engine.cancel(foreign[1])
    waiting = [Request(p, 9) for p in prompts_of(6, 7)]
    owner, name = {
        "decode": (engine, "decoder"),
        "sample": (engine, "sampler"),
        "read": (engine, "_read_chunk"),
        "enter": (engine.states, "write"),
        "start": (engine, "_start_reading"),
    }[part]
    with monkeypatch.context() as patch:
        whole = getattr(owner, name)

        def fails(*arguments, **named):
            whole(*arguments, **named)
            raise MemoryError

        broken = Broken(whole, fails) if part in ("decode", "sample") else fails
        patch.setattr(owner, name, broken)
        later = [engine.submit(request) for request in waiting]
        with pytest.raises(MemoryError):
            while engine.has_work:
                engine.step()
    assert foreign[0].finish_reason == "error" and "failed" in foreign[0].error
    while engine.has_work:
        engine.step()
    for request, generation in zip(waiting, later, strict=True):
        if generation.finish_reason != "error":
            assert generation.tokens == greedy(plus, request.prompt, 9)
    assert later[1].finish_reason == "length"
    assert tokens_of(engine.generate(waiting)) == [greedy(plus, r.prompt, 9) for r in waiting]


class Broken:
    """An object whose call fails after it has done its work."""

    def __init__(self, whole, call):
        self._whole, self._call = whole, call

    def __call__(self, *arguments, **named):
        return self._call(*arguments, **named)

    def __getattr__(self, name):
        return getattr(self._whole, name)


@pytest.mark.parametrize("name", ["slots", "prefill_chunk", "max_length"])
@pytest.mark.parametrize("value", [0, 1.5, "2", True, 2**63])
def test_an_engine_needs_at_least_one_of_each(plus, name, value):
    message = f"{name} must be an integer of at least 1, below 2^63, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine(plus, **{name: value})


def test_a_model_that_was_moved_needs_another_engine(plus):
    model = copy.deepcopy(plus)
    engine = Engine(model)
    model.bfloat16()
    with pytest.raises(ValueError, match=r"is torch.bfloat16 on cpu now, .* torch.float32 on cpu"):
        engine.generate(Request([1, 2], 3))
    assert Engine(model).generate(Request([1, 2], 3))[0].finish_reason


def test_weights_must_be_in_one_place(plus):
    model = copy.deepcopy(plus)
    model.model.layers[1].to("meta")
    with pytest.raises(ValueError, match="on one device, got cpu and meta"):
        Engine(model)
    with pytest.raises(ValueError, match="on the meta device, where weights have no values: load"):
        Engine(model.to("meta"))


def test_a_request_does_not_look_at_every_weight(plus, monkeypatch):
    engine = Engine(plus)
    monkeypatch.setattr(plus, "parameters", lambda: pytest.fail("as a large model has hundreds"))
    assert not engine.prepare(Request([1, 2], 3)).tokens


def test_an_engine_takes_its_model_out_of_training(plus):
    Engine(plus.train())
    assert not any(module.training for module in plus.modules())


def test_an_engine_needs_a_language_model(plus):
    size = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(**size, **heads))
    for wrong in (plus.model, other, nn.Linear(2, 2), byte_tokenizer()):
        with pytest.raises(ValueError, match=f"language model, got {type(wrong).__name__}"):
            Engine(wrong)


@pytest.mark.slow
def test_nothing_grows_over_a_hundred_thousand_tokens(plus):
    """One sequence of 100,000 tokens holds the tensors it held after 1,000."""
    engine = Engine(plus, slots=1)
    generation = engine.submit(Request(prompts_of(20)[0], 100_000, stop_tokens=()))
    held = {}
    while engine.has_work:
        engine.step()
        if len(generation.tokens) in (1_000, 50_000, 99_999):
            tensors = (engine.states.recurrent, engine.states.convolution, engine.states.ring)
            held[len(generation.tokens)] = live_tensor_bytes(), *(x.data_ptr() for x in tensors)
    assert len(generation.tokens) == 100_000 and generation.finish_reason == "length"
    assert len(set(held.values())) == 1, held


def test_a_stream_refuses_its_request_at_once(plus):
    engine = Engine(plus)
    with pytest.raises(ValueError, match="at least one token"):
        engine.stream(Request([]))
    assert not engine.has_work
