"""Sampling: transformers' processors are the truth of the filters, integers that of the numbers."""

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rodimus.generation.sampling import (
    MAX_SEED,
    Sampler,
    SamplingParams,
    draw,
    keep_top_p,
    penalise_repetition,
    token_logprobs,
    uniform,
)

VOCAB = 300
GRID = [
    SamplingParams(temperature, top_k, top_p, min_p, penalty)
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.3, 1.0, 1.7), (0, 5, 400), (1.0, 0.9, 0.2, 0.0), (0.0, 0.1), (1.0, 1.3)
    )
]


def processors(params: SamplingParams) -> LogitsProcessorList:
    """What ``model.generate`` applies for the same parameters, in its order."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    return chain


def test_filters_equal_transformers_for_mixed_rows_in_one_batch():
    logits = 3 * torch.randn(len(GRID), VOCAB)
    prompts = torch.randint(VOCAB, (len(GRID), 20))
    sampler = Sampler(len(GRID), VOCAB)
    for row, params in enumerate(GRID):
        sampler.place(row, params, prompts[row])
    plan = sampler.plan(0, len(GRID))
    assert plan.drawing.tolist() == list(range(len(GRID)))
    actual = plan.filters(penalise_repetition(logits, sampler.seen, plan.penalty)).softmax(-1)
    for row, params in enumerate(GRID):
        expected = processors(params)(prompts[row : row + 1], logits[row : row + 1]).softmax(-1)
        assert torch.equal(actual[row] > 0, expected[0] > 0), params
        torch.testing.assert_close(actual[row], expected[0], rtol=1e-5, atol=1e-7)


def test_parameters_are_copied_to_the_device_once(monkeypatch):
    """Not for every token: there a copy waits. Rows that change are noticed."""
    sampler, logits = Sampler(4, VOCAB), torch.randn(4, VOCAB)
    mixed = [
        SamplingParams(temperature=1, top_k=5, min_p=0.1, seed=1),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.8, repetition_penalty=1.2, seed=2),
        SamplingParams(presence_penalty=1, logit_bias={3: 1}),
    ]
    for row, params in enumerate(mixed):
        sampler.place(row, params, torch.tensor([1, 2]))
    sampler(logits)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", None)
        sampler(logits)
    sampler.move(2, 0)
    assert sampler.plan(0, 2).drawing.tolist() == [0] and sampler.plan(0, 2).penalty is not None
    sampler.place(0, SamplingParams(), torch.tensor([1]))
    assert set(sampler.plan(0, 2)) == {None}


def test_a_nucleus_wider_than_the_head_is_found_by_sorting():
    scores = torch.stack((0.01 * torch.randn(5000), 8 * torch.randn(5000)))
    share = torch.tensor([0.9, 0.9], dtype=torch.float64)
    kept = keep_top_p(scores, share)
    expected = TopPLogitsWarper(0.9)(None, scores)
    assert torch.equal(kept.isfinite(), expected.isfinite())
    assert kept[0].isfinite().sum() > 1024 > kept[1].isfinite().sum()


def test_greedy_takes_the_first_of_the_likeliest():
    logits = torch.zeros(2, VOCAB, dtype=torch.bfloat16)
    logits[0, [7, 9]] = 4
    assert Sampler(2, VOCAB)(logits).tolist() == [7, 0]


def test_numbers_equal_splitmix64():
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for seed, counter in itertools.product((0, 1, 12345, MAX_SEED), (0, 1, 99_999)):
        bits = mix((mix(seed) + (counter + 1) * 0x9E3779B97F4A7C15) & mask)
        actual = uniform(torch.tensor([seed]), torch.tensor([counter])).item()
        assert actual == (bits >> 16) / 2**48


def test_numbers_are_uniform_and_streams_are_unrelated():
    counter = torch.arange(100_000)
    streams = [uniform(torch.full_like(counter, seed), counter) for seed in (0, 1, 2)]
    for numbers in streams:
        counts = torch.histc(numbers.float(), 100, 0, 1)
        # chi-squared with 99 degrees of freedom: above 160 once in 10,000 streams
        assert ((counts - 1000) ** 2 / 1000).sum() < 160
    correlation = torch.corrcoef(torch.stack([*streams, streams[0].roll(1)]))
    assert (correlation - torch.eye(4)).abs().max() < 0.015


def test_draws_follow_the_probabilities_and_never_take_probability_zero():
    probability = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    scores = probability.log().expand(50_000, -1)
    numbers = uniform(torch.zeros(50_000, dtype=torch.long), torch.arange(50_000))
    tokens = draw(scores, numbers)
    frequency = tokens.bincount(minlength=6) / 50_000
    assert torch.equal(frequency > 0, probability > 0)
    assert (frequency - probability).abs().max() < 0.01
    edges = torch.tensor([0.0, 1 - 2.0**-48], dtype=torch.float64)
    assert draw(scores[:2], edges).tolist() == [1, 4]
    # where the probabilities add up to less than 1, too
    scores = torch.randn(300, 40).index_fill(1, torch.tensor([39]), float("-inf"))
    assert draw(scores, edges[1].expand(300)).max() < 39


def test_penalties_of_counts_and_bias_follow_openais_formula():
    """Of the tokens of the continuation, not of the prompt, each row by its own numbers."""
    rows = [
        SamplingParams(presence_penalty=0.7, frequency_penalty=-0.1),
        SamplingParams(),
        SamplingParams(frequency_penalty=0.4, logit_bias={5: -100, 7: 1.5}),
        SamplingParams(repetition_penalty=1.5, presence_penalty=-0.5, logit_bias=[(9, 1)]),
    ]
    few, prompt = 12, torch.tensor([1, 2, 2])
    sampler = Sampler(len(rows), few)
    for row in range(len(rows)):
        sampler.place(row, SamplingParams(presence_penalty=1), prompt)
    sampler(torch.zeros(len(rows), few))
    for row, params in enumerate(rows):
        sampler.place(row, params, prompt)
    written: list[list[int]] = [[] for _ in rows]
    for step in range(30):
        if step == 20:
            # the last sequence takes the place of the first
            sampler.move(3, 0)
            rows[0], written[0] = rows.pop(), written.pop()
        logits = torch.randn(len(rows), few)
        for row, (token, params) in enumerate(zip(sampler(logits).tolist(), rows, strict=True)):
            scores, told = logits[row].tolist(), dict(params.logit_bias)
            for j in range(few):
                scores[j] += told.get(j, 0)
                if j in (*prompt.tolist(), *written[row]):
                    by = params.repetition_penalty
                    scores[j] *= by if scores[j] < 0 else 1 / by
                count = written[row].count(j)
                scores[j] -= params.frequency_penalty * count
                scores[j] -= params.presence_penalty * (count > 0)
            assert token == scores.index(max(scores)), (step, row)
            written[row].append(token)


@pytest.mark.parametrize("params", GRID[::7], ids=str)
def test_a_row_draws_the_same_alone_and_in_any_company(params):
    counted = {"presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {4: 2}}
    params = SamplingParams(**{**vars(params), "seed": 11, **counted})
    prompt, steps = torch.randint(VOCAB, (5,)), torch.randn(30, VOCAB)
    alone = Sampler(1, VOCAB)
    alone.place(0, params, prompt)
    expected = [alone(logits[None]).item() for logits in steps]

    crowd = Sampler(4, VOCAB)
    for row, other in enumerate((GRID[-1], params, GRID[20], SamplingParams())):
        crowd.place(row, other, prompt)
    row, actual = 1, []
    for step, logits in enumerate(steps):
        if step == 12:
            crowd.move(1, 0)
            row = 0
        batch = torch.randn(4 if step < 20 else 2, VOCAB)
        batch[row] = logits
        actual.append(crowd(batch)[row].item())
    assert actual == expected


def test_without_a_seed_texts_differ():
    sampler = Sampler(8, VOCAB)
    for row in range(8):
        sampler.place(row, SamplingParams(temperature=1.0), torch.tensor([1]))
    tokens = torch.stack([sampler(torch.zeros(8, VOCAB)) for _ in range(4)], 1)
    assert len({tuple(row) for row in tokens.tolist()}) == 8


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_is_reported_and_harms_no_other(broken):
    params = SamplingParams(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, seed=1)
    logits = torch.randn(3, VOCAB)
    outcomes = []
    for value in (0.5, broken):
        sampler = Sampler(3, VOCAB)
        for row in range(3):
            sampler.place(row, params, torch.tensor([1]))
        logits[1, 5] = value
        outcomes.append(sampler(logits).tolist())
    whole, damaged = outcomes
    assert damaged[1] == -1 and damaged[::2] == whole[::2]


def test_temperatures_near_zero_do_not_overflow():
    sampler = Sampler(1, VOCAB)
    sampler.place(0, SamplingParams(temperature=1e-60, seed=3), torch.tensor([1]))
    logits = 1e10 * torch.randn(1, VOCAB)
    assert sampler(logits).item() == logits.argmax().item()


def test_tokens_are_chosen_in_float32_whatever_the_dtype_of_logits():
    params, logits = SamplingParams(0.7, top_p=0.9), torch.randn(50, VOCAB).bfloat16()
    found = []
    for given in (logits, logits.float()):
        sampler = Sampler(50, VOCAB)
        for row in range(50):
            sampler.place(row, replace(params, seed=row), torch.tensor([1]))
        found.append(sampler(given).tolist())
    assert found[0] == found[1]


def test_numbers_of_any_kind_mean_the_same_whatever_the_default_dtype():
    kinds = {"temperature": Fraction(4, 5), "top_k": np.int8(90), "repetition_penalty": 1.3}
    params = SamplingParams(**kinds, top_p=Fraction(9, 10))
    logits = torch.randn(VOCAB).expand(50, VOCAB)

    def drawn(params):
        sampler = Sampler(50, VOCAB)
        for row in range(50):
            sampler.place(row, replace(params, seed=row), torch.arange(60))
        return sampler(logits).tolist()

    expected = drawn(SamplingParams(0.8, 90, 0.9, repetition_penalty=1.3))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert drawn(params) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_logprobs_are_those_of_the_model():
    logits = torch.randn(2, VOCAB)
    chosen, values, ids = token_logprobs(logits, torch.tensor([3, 4]), top=5)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(chosen, torch.stack((expected[0, 3], expected[1, 4])))
    torch.testing.assert_close(values, expected.gather(1, ids))
    assert ids[0].tolist() == logits[0].topk(5).indices.tolist()
    # of a vocabulary of fewer tokens than are asked for, all
    assert token_logprobs(logits[:, :4], torch.tensor([3, 0]), top=5)[2].shape == (2, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": 100.1},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": -0.1},
        {"top_p": None},
        {"top_p": 1.5},
        {"min_p": -1.0},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 100.1},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.5},
        {"presence_penalty": 2.1},
        {"presence_penalty": -2.1},
        {"frequency_penalty": "1"},
    ],
    ids=str,
)
def test_parameters_outside_their_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    "bias, message",
    [
        (5, "logit_bias must map tokens to numbers, got 5"),
        ({5}, "logit_bias must map tokens to numbers"),
        ({-1: 1.0}, "a token of logit_bias must be at least 0, got -1"),
        ({"7": 1.0}, "a token of logit_bias must be an integer"),
        ({7: 101}, r"logit_bias of token 7 must be in \[-100, 100\], got 101"),
        ({7: None}, "logit_bias of token 7 must be a number"),
    ],
    ids=str,
)
def test_a_wrong_bias_is_refused(bias, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(logit_bias=bias)
