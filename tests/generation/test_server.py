"""The server: the engine's own answers over HTTP, and an error in JSON for every mistake."""

import asyncio
import contextlib
import functools
import http.client
import json
import logging
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer, Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("tests.generation.serving")

from rodimus.generation import Engine, Request, SamplingParams, save_state
from rodimus.generation.engine import Delta, Generation, TokenLogprobs
from rodimus.generation.metrics import Metrics
from rodimus.generation.protocol import (
    Answer,
    ApiError,
    TokenText,
    parse_chat,
    parse_completion,
    parse_json,
)
from rodimus.generation.server import Service, _error, _EventStream, _Exchange, _Mail
from rodimus.generation.text import bytes_of_part
from rodimus.generation.worker import (
    MOST_FAILURES,
    EngineWorker,
    QueueFullError,
    WorkerStoppedError,
)
from rodimus.limits import Limits
from rodimus.options import parse
from tests import warm_python
from tests.generation.helpers import (
    END,
    begin_with,
    byte_tokenizer,
    cleaning_tokenizer,
    text_model,
    word_tokenizer,
)
from tests.generation.serving import NAME, serving, wait_until
from tests.model.helpers import build, config_of

ROOT = Path(__file__).parent.parent.parent
LIMITS = Limits(body_bytes=20_000, body_seconds=1, prompt_tokens=400, new_tokens=300, choices=6)
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
SAMPLED |= {"presence_penalty": 0.4, "frequency_penalty": 0.3}


@pytest.fixture(scope="module")
def server():
    with serving(limits=LIMITS, slots=4, prefill_chunk=64) as parts:
        yield parts


@pytest.fixture(scope="module")
def client(server):
    return server[0]


@pytest.fixture(scope="module")
def direct():
    """Text and tokens of one request in an engine of its own."""
    model, tokenizer = text_model(), byte_tokenizer()

    def generate(text, tokens=16, *, stop=(), **sampling):
        request = Request(tokenizer(text).input_ids, tokens, SamplingParams(**sampling), stop)
        return Engine(model, tokenizer, slots=1).generate([request])[0]

    return generate


class TestCompletions:
    def test_a_prompt_gets_the_engines_text(self, client, direct):
        status, answer = client.complete("Hello", max_tokens=20, temperature=0, model=NAME)
        assert status == 200
        assert answer["object"] == "text_completion" and answer["model"] == NAME
        (choice,) = answer["choices"]
        expected = direct("Hello", 20)
        assert choice["text"] == expected.text
        assert choice["finish_reason"] == expected.finish_reason
        assert answer["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 20,
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def test_sampling_fields_reach_the_engine(self, client, direct):
        _, answer = client.complete("Hello", seed=7, max_tokens=30, **SAMPLED)
        assert answer["choices"][0]["text"] == direct("Hello", 30, seed=7, **SAMPLED).text
        fields = {"temperature": 0, "max_tokens": 5, "logit_bias": {"72": 100, "90": -100}}
        biased = direct("Hello", 5, logit_bias={72: 100, 90: -100}).text
        assert client.complete("Hello", **fields)[1]["choices"][0]["text"] == biased
        assert biased != direct("Hello", 5).text

    @pytest.mark.parametrize(
        "prompt, texts",
        [
            ("ab", ["ab"]),
            (["ab", "cd"], ["ab", "cd"]),
            ([65, 66], ["bc"]),
            ([[65, 66], [1]], ["bc", '"']),
        ],
        ids=["text", "texts", "tokens", "token lists"],
    )
    def test_prompts_come_in_four_shapes(self, client, direct, prompt, texts):
        assert byte_tokenizer().decode([65, 66]) == "bc" and byte_tokenizer().decode([1]) == '"'
        status, answer = client.complete(prompt, temperature=0)
        assert status == 200
        assert [c["text"] for c in answer["choices"]] == [direct(text).text for text in texts]
        assert [c["index"] for c in answer["choices"]] == list(range(len(texts)))

    def test_choices_of_a_seed_differ_and_are_reproducible(self, client):
        answers = [client.complete(["a", "b"], n=3, seed=0, max_tokens=30)[1] for _ in range(2)]
        texts = [[choice["text"] for choice in answer["choices"]] for answer in answers]
        assert texts[0] == texts[1] and len(set(texts[0])) == 6
        # any integer of 64 bits, modulo 2^63
        seeds = (2**63 - 1, -(2**63), -1, 0, 5)
        drawn = [client.complete("a", seed=seed, max_tokens=30) for seed in seeds]
        assert len({answer["choices"][0]["text"] for status, answer in drawn}) == 3
        assert answers[0]["usage"]["prompt_tokens"] == 2

    def test_choices_of_more_than_the_slots_read_their_prompts_once(self, server):
        client, service, _ = server
        stats = service.worker.engine.stats
        before = stats.prompt_tokens
        for n, prompts in ((6, ["Hello"]), (3, ["Hi", "there"])):
            _, answer = client.complete(prompts, n=n, seed=1, max_tokens=9)
            before += answer["usage"]["prompt_tokens"]
            assert stats.prompt_tokens == before
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0

    def test_stop_strings_end_the_text(self, client, direct):
        text = direct("Hello", 60).text
        stop = text[12:15]
        status, answer = client.complete("Hello", max_tokens=60, temperature=0, stop=stop)
        assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["text"] == text[: text.index(stop)]

    def test_top_k_of_minus_one_is_all(self, client, direct):
        options = {"seed": 7, "temperature": 0.9}
        _, answer = client.complete("Hello", max_tokens=30, top_k=-1, **options)
        assert answer["choices"][0]["text"] == direct("Hello", 30, **options).text

    @pytest.mark.parametrize("top_p", [0, 1e-300])
    def test_top_p_of_zero_is_the_likeliest_token(self, client, direct, top_p):
        status, answer = client.complete("Hello", max_tokens=30, temperature=2, top_p=top_p)
        assert status == 200 and answer["choices"][0]["text"] == direct("Hello", 30).text

    def test_tokens_end_the_text_beside_those_of_the_model(self, server, direct, monkeypatch):
        client, service, _ = server
        tokens = direct("Hello", 30).tokens
        first, later = tokens[0], next(token for token in tokens if token != tokens[0])
        monkeypatch.setattr(service.worker.engine, "end_tokens", [later])

        def made(**fields):
            _, answer = client.complete("Hello", max_tokens=30, temperature=0, **fields)
            return answer["usage"]["completion_tokens"]

        assert made() == made(stop_token_ids=[]) == tokens.index(later) + 1 > 1
        assert made(stop_token_ids=[first]) == made(stop_token_ids=[first], ignore_eos=True) == 1
        assert made(ignore_eos=True) == 30
        other = next(token for token in range(257) if token not in tokens)
        assert made(stop_token_ids=[other]) == made()

    def test_logprobs_have_one_entry_a_token(self, client):
        _, answer = client.complete("Hello", max_tokens=5, temperature=0, logprobs=2)
        logprobs = answer["choices"][0]["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == 5
        assert all(max(top.values()) <= 0 for top in logprobs["top_logprobs"])
        assert logprobs["token_logprobs"] == [max(top.values()) for top in logprobs["top_logprobs"]]

    @pytest.mark.parametrize("likeliest", [0, 1])
    def test_a_drawn_token_is_among_its_logprobs(self, client, likeliest):
        options = {"max_tokens": 12, "temperature": 2, "seed": 1, "logprobs": likeliest}
        _, answer = client.complete("Hello", **options)
        found = answer["choices"][0]["logprobs"]
        pairs = list(zip(found["tokens"], found["token_logprobs"], strict=True))
        tops = found["top_logprobs"]
        assert all(top[token] == own for (token, own), top in zip(pairs, tops, strict=True))
        # at this temperature most are not the likeliest
        assert likeliest == 0 or max(map(len, tops)) == 2

    @pytest.mark.parametrize("prompt", ["Hello", [39, 68, 75, 75, 78]], ids=["text", "tokens"])
    def test_echo_begins_with_the_prompt(self, client, direct, prompt):
        assert byte_tokenizer()("Hello").input_ids == [39, 68, 75, 75, 78]
        fields = {"max_tokens": 6, "temperature": 0, "echo": True}
        _, answer = client.complete(prompt, **fields)
        (choice,) = answer["choices"]
        assert choice["text"] == "Hello" + direct("Hello", 6).text and choice["logprobs"] is None
        assert answer["usage"]["completion_tokens"] == 6

    @pytest.mark.parametrize("made", [0, 6])
    @pytest.mark.parametrize("length", [1, 5, 150])
    def test_echo_scores_the_prompt(self, client, length, made):
        """What tools that rank given continuations ask for."""
        text = ("Hello, " * 30)[:length]
        fields = {"max_tokens": made, "temperature": 0, "echo": True, "logprobs": 2}
        (choice,) = client.complete(text, **fields)[1]["choices"]
        found, tokens = choice["logprobs"], byte_tokenizer()(text).input_ids
        assert choice["text"].startswith(text) and choice["finish_reason"] == "length"
        assert {len(values) for values in found.values()} == {length + made}
        assert found["text_offset"][: length + 1] == list(range(length + min(made, 1)))
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        model = text_model()
        with torch.no_grad():
            rows = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        own = [row[token].item() for row, token in zip(rows, tokens[1:], strict=False)]
        assert found["token_logprobs"][1:length] == pytest.approx(own, abs=1e-4)
        likeliest = [row.max().item() for row in rows[: length + made - 1]]
        tops = [max(top.values()) for top in found["top_logprobs"][1 : length + min(made, 1)]]
        assert tops == pytest.approx(likeliest, abs=1e-4)

    def test_an_echo_repeats_special_tokens_as_they_were_sent(self, client):
        """The text that follows begins behind them, though generated texts leave them out."""
        text = f"Hi{END}there"
        fields = {"max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 0}
        (choice,) = client.complete(text, **fields)[1]["choices"]
        assert choice["text"].startswith(text)
        assert choice["logprobs"]["tokens"][:4] == ["H", "i", END, "t"]
        assert choice["logprobs"]["text_offset"][-2] == len(text)
        tokens = byte_tokenizer()(text).input_ids
        (choice,) = client.complete(tokens, **fields)[1]["choices"]
        assert choice["text"].startswith("Hithere")
        assert choice["logprobs"]["text_offset"][-2] == len("Hithere")

    def test_text_goes_on_behind_an_echo_that_ends_within_a_character(self):
        half, _ = byte_tokenizer()("\u00e9").input_ids
        body = {"max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 0}
        with writing([0, 1]) as client:
            (choice,) = client.complete([2, half], **body)[1]["choices"]
        assert choice["text"] == '#\ufffd!"'
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]

    def test_an_echo_is_streamed_before_what_follows(self, client):
        body = {"prompt": ["Hello", "there"], "n": 2, "seed": 1, "max_tokens": 20, "echo": True}
        body["logprobs"] = 1
        _, answer = client.complete(**body)
        events = client.stream("/v1/completions", body)
        for choice in answer["choices"]:
            own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
            assert own[0]["text"] == body["prompt"][choice["index"] // 2]
            assert "".join(piece["text"] for piece in own) == choice["text"]
            for name, values in choice["logprobs"].items():
                pieces = (piece["logprobs"][name] for piece in own if piece["logprobs"])
                assert [value for piece in pieces for value in piece] == values

    def test_a_stream_is_the_same_text_in_pieces(self, client, direct):
        body = {"prompt": ["Hello", "there"], "max_tokens": 40, "temperature": 0}
        events = client.stream(
            "/v1/completions", body | {"stream_options": {"include_usage": True}}
        )
        *pieces, last = events
        for index, prompt in enumerate(body["prompt"]):
            own = [e["choices"][0] for e in pieces if e["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in own) == direct(prompt, 40).text
            assert [choice["finish_reason"] for choice in own][-1] == "length"
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 80
        assert all(piece["usage"] is None for piece in pieces)
        assert len({event["id"] for event in events}) == 1


def test_tokens_that_a_hook_rules_out_have_logprobs_that_are_json():
    model = text_model()
    others = torch.arange(2, 257)
    model.lm_head.register_forward_hook(lambda *x: x[-1].index_fill(-1, others, -math.inf))
    with serving(engine=Engine(model, byte_tokenizer())) as (client, _, _):
        _, answer = client.complete("x", max_tokens=2, logprobs=4)
        for top in answer["choices"][0]["logprobs"]["top_logprobs"]:
            assert sorted(top.values())[:2] == [-9999.0] * 2 and len(top) == 4
        _, answer = client.chat("x", max_tokens=2, logprobs=True, top_logprobs=4)
        for entry in answer["choices"][0]["logprobs"]["content"]:
            values = [top["logprob"] for top in entry["top_logprobs"]]
            assert values[2:] == [-9999.0] * 2


@pytest.mark.parametrize(
    ("tokenizer", "name"), [(word_tokenizer, " two"), (cleaning_tokenizer, " .")]
)
def test_tokens_have_the_blank_that_they_begin_with(tokenizer, name):
    """Which decoding leaves out of a first one, or by default before a full stop."""
    model = text_model()
    model.lm_head.register_forward_hook(lambda *x: x[-1].index_fill(-1, torch.tensor([1]), 1e4))
    with serving(engine=Engine(model, tokenizer())) as (client, _, _):
        _, answer = client.complete([0], max_tokens=2, logprobs=0)
        (choice,) = answer["choices"]
        assert choice["text"] == 2 * name and choice["logprobs"]["tokens"] == [name] * 2


@contextlib.contextmanager
def writing(tokens):
    """A client of a server whose model answers with these tokens of ``byte_tokenizer``."""
    model, left = text_model(), iter(tokens)
    model.lm_head.register_forward_hook(
        lambda *x: x[-1].index_fill(-1, torch.tensor([next(left)]), 1e4)
    )
    with serving(engine=Engine(model, byte_tokenizer())) as (client, _, _):
        yield client


class TestPartsOfCharacters:
    TEXT = "\u00e9 x\u20ac\x00~\u00ad\U0001f600!"
    IDS = byte_tokenizer()(TEXT).input_ids
    # a first half that nothing follows
    CUT = [*IDS, IDS[0], *IDS]

    @pytest.mark.parametrize("tokens", [IDS, CUT], ids=["whole", "cut"])
    def test_bytes_together_are_the_text(self, tokens):
        with writing(tokens) as client:
            _, answer = client.chat("Hi", max_tokens=len(tokens), temperature=0, logprobs=True)
        (choice,) = answer["choices"]
        data = bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"])
        assert data.decode(errors="replace") == choice["message"]["content"]

    @pytest.mark.parametrize("tokens", [IDS, CUT], ids=["whole", "cut"])
    def test_offsets_lead_to_the_tokens_in_the_text(self, tokens):
        end = byte_tokenizer().eos_token_id
        tokens = [tokens[0], tokens[1], end, *tokens[2:]]
        options = {"max_tokens": len(tokens), "temperature": 0, "logprobs": 0}
        body = {"prompt": "x", "ignore_eos": True} | options
        with writing(tokens * 2) as client:
            _, answer = client.post("/v1/completions", body)
            pieces = client.stream("/v1/completions", body)
        (choice,) = answer["choices"]
        names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        whole = [(x, at) for x, at in zip(names, offsets, strict=True) if x in " x\x00~!"]
        assert len(whole) == sum(choice["text"].count(x) for x in " x\x00~!") >= 5
        assert all(choice["text"][at] == name for name, at in whole)
        parts = [piece["choices"][0]["logprobs"] for piece in pieces]
        assert [at for part in parts if part for at in part["text_offset"]] == offsets

    def test_no_piece_of_a_stream_says_nothing(self):
        tokens = byte_tokenizer()("\U0001f600" * 3).input_ids
        body = {"prompt": "x", "max_tokens": len(tokens), "temperature": 0}
        with writing(tokens) as client:
            choices = [x["choices"][0] for x in client.stream("/v1/completions", body)]
        assert "".join(x["text"] for x in choices) == "\U0001f600" * 3
        assert all(x["text"] or x["finish_reason"] for x in choices)


def test_the_bytes_of_a_part_are_those_of_its_name():
    assert bytes_of_part("<0xC3>", "\ufffd") == b"\xc3"
    assert bytes_of_part("\u00c3", "\ufffd") == b"\xc3"
    # a tokenizer that writes characters as they are
    assert bytes_of_part("\u00c3", "\u00c3\ufffd") is None
    assert bytes_of_part("\u4e00", "\ufffd") is None


class TestChat:
    def test_messages_are_rendered_by_the_template(self, client, direct):
        status, answer = client.chat("Hi", max_completion_tokens=20, temperature=0)
        assert status == 200 and answer["object"] == "chat.completion"
        expected = direct("<user>Hi<assistant>", 20).text
        message = {"role": "assistant", "content": expected, "refusal": None}
        assert answer["choices"][0]["message"] == message

    def test_a_template_writes_all_special_tokens_itself(self):
        tokenizer = begin_with(byte_tokenizer(), 256)
        with serving(engine=Engine(text_model(), tokenizer)) as (client, _, _):
            one = {"max_tokens": 1}
            counts = (client.chat("Hi", **one), client.complete("<user>Hi<assistant>", **one))
        length = len("<user>Hi<assistant>")
        assert [x[1]["usage"]["prompt_tokens"] for x in counts] == [length, 1 + length]

    def test_content_may_be_text_parts(self, client, direct):
        parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0}
        status, answer = client.post("/v1/chat/completions", body | {"max_tokens": 20})
        assert status == 200
        expected = direct("<user>Hi<assistant>", 20).text
        assert answer["choices"][0]["message"]["content"] == expected

    @pytest.mark.parametrize("content", ["Ho", None])
    def test_an_assistants_message_goes_back_as_clients_read_it(self, client, direct, content):
        empty = dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "extra"))
        read = {"role": "assistant", "content": content, "annotations": [{}], **empty}
        body = {"messages": [MESSAGES[0], read], "temperature": 0, "max_tokens": 20}
        status, answer = client.post("/v1/chat/completions", body)
        assert status == 200
        expected = direct(f"<user>x<assistant>{content or ''}<assistant>", 20).text
        assert answer["choices"][0]["message"]["content"] == expected

    def test_names_and_ids_of_tools_reach_the_template(self):
        named = {"role": "user", "content": "x", "name": "bob"}
        tool = {"role": "tool", "content": "y", "tool_call_id": "1"}
        call = parse_chat({"messages": [named, tool]}, Limits())
        assert call.prompts == [[named, tool]]

    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_a_developer_is_the_system(self, client, direct, role):
        messages = [{"role": role, "content": "Be"}, {"role": "user", "content": "Hi"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 20}
        status, answer = client.post("/v1/chat/completions", body)
        assert status == 200
        assert (
            answer["choices"][0]["message"]["content"]
            == direct("<system>Be<user>Hi<assistant>", 20).text
        )

    def test_a_stream_opens_with_the_role(self, client, direct):
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 30, "temperature": 0}
        first, *pieces = client.stream("/v1/chat/completions", body)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
        assert text == direct("<user>Hi<assistant>", 30).text
        assert pieces[-1]["choices"][0]["finish_reason"] == "length"
        assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
        pieces = client.stream("/v1/chat/completions", body | {"n": 2})
        deltas = [(x["index"], x["delta"]) for piece in pieces for x in piece["choices"]]
        assert [index for index, delta in deltas if "role" in delta] == [0, 1]

    def test_the_end_alone_has_an_empty_delta(self):
        answer = Answer(NAME, parse_chat({"messages": MESSAGES}, Limits()), None)
        (choice,) = answer.piece(0, Delta([1], "", [], "stop"))["choices"]
        assert choice["delta"] == {} and choice["finish_reason"] == "stop"

    def test_logprobs_come_with_bytes(self, client):
        _, answer = client.chat("Hi", max_tokens=4, temperature=0, logprobs=True, top_logprobs=2)
        logprobs = answer["choices"][0]["logprobs"]
        content = logprobs["content"]
        assert set(logprobs) == {"content", "refusal"} and logprobs["refusal"] is None
        assert len(content) == 4 and all(len(entry["top_logprobs"]) == 2 for entry in content)
        for entry in content:
            assert bytes(entry["bytes"]).decode(errors="replace") in (entry["token"], "\ufffd")


def test_an_answer_of_no_stated_length_goes_as_far_as_the_engine_does():
    engine = Engine(text_model(), byte_tokenizer(), max_length=30)
    engine.end_tokens = ()
    with serving(engine=engine) as (client, _, _):
        _, answer = client.chat("Hi")
        prompt, total = (answer["usage"][f"{kind}_tokens"] for kind in ("prompt", "total"))
        assert total == 30 > prompt
        for field in ("max_tokens", "max_completion_tokens"):
            status, answer = client.chat("Hi", **{field: 30})
            message = f"the prompt has {prompt} tokens and {field} is 30: {prompt + 30} together"
            assert status == 400
            assert answer["error"]["message"] == f"{message}, expected at most 30"
            assert answer["error"]["param"] == field
        status, answer = client.chat("x" * 40)
        assert status == 400 and answer["error"]["param"] == "messages"
        _, answer = client.chat("Hi", max_tokens=30 - prompt)
        assert answer["usage"]["total_tokens"] == 30
        # the newer field takes precedence
        _, answer = client.chat("Hi", max_tokens=1, max_completion_tokens=2)
        assert answer["usage"]["completion_tokens"] == 2
        status, answer = client.chat("Hi", max_tokens=1, max_completion_tokens=30)
        assert status == 400 and answer["error"]["param"] == "max_completion_tokens"


def test_what_is_as_long_as_it_may_be_is_taken(client):
    body = {"prompt": "x" * LIMITS.prompt_tokens, "max_tokens": 1, "user": ""}
    body["user"] = "x" * (LIMITS.body_bytes - len(json.dumps(body)))
    head = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post("/v1/completions", body, **head)[0] == 200


def test_fields_may_be_at_their_bounds(client):
    fields = {"stop": ["a" * 256] * 16, "stop_token_ids": [0] * 16, "logprobs": 20, "max_tokens": 1}
    fields |= {"temperature": 2, "presence_penalty": -2, "frequency_penalty": 2, "best_of": 1}
    assert client.complete(["x"] * 6, **fields)[0] == 200
    assert client.complete("x", n=6, seed=2**63 - 1, **fields)[0] == 200


def test_fields_that_change_nothing_are_taken(client):
    fields = {"n": 2, "best_of": 2, "prediction": {"type": "content"}}
    status, _ = client.complete("x", max_tokens=1, prompt_cache_retention="24h", **fields)
    assert status == 200
    fields = {"reasoning_effort": "none", "verbosity": "medium", "function_call": "auto"}
    fields |= {"prompt_cache_options": {"mode": "explicit"}, "audio": None, "moderation": None}
    fields |= {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    assert client.chat("x", max_tokens=1, **fields)[0] == 200


def test_a_completion_of_no_stated_length_keeps_to_a_lower_limit():
    with serving(limits=Limits(new_tokens=8)) as (client, service, _):
        service.worker.engine.end_tokens = ()
        status, answer = client.complete("x")
        assert status == 200 and answer["usage"]["completion_tokens"] == 8


def test_messages_that_are_too_long_are_called_so(client):
    status, answer = client.chat("x" * 401)
    assert status == 400 and answer["error"]["param"] == "messages"


def test_an_end_token_that_the_model_does_not_know_ends_nothing():
    model, tokenizer = text_model(), byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|beyond|>"})
    assert tokenizer.eos_token_id == model.config.vocab_size
    with serving(engine=Engine(model, tokenizer)) as (client, _, _):
        assert client.complete("x", max_tokens=2)[0] == 200


def test_models_are_listed_and_found(client):
    status, answer = client.get("/v1/models")
    assert status == 200 and [model["id"] for model in answer["data"]] == [NAME]
    assert client.get("/v1/models/") == (200, answer)
    assert client.get(f"/v1/models/{NAME}") == (200, answer["data"][0])
    status, answer = client.get("/v1/models/other/one")
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert answer["error"]["type"] == "invalid_request_error"


def test_health_and_metrics(client):
    assert client.get("/health") == (200, {"status": "ok"})
    before = client.metric("rodimus_generated_tokens_total")
    client.complete("Hello", max_tokens=7, temperature=0)
    assert client.metric("rodimus_generated_tokens_total") == before + 7
    assert client.metric("rodimus_slots") == 4
    assert client.metric("rodimus_running_sequences") == 0
    assert client.metric("rodimus_unfinished_requests") == 0
    line = 'rodimus_http_requests_total{endpoint="completions",status="200"}'
    assert client.metric(line) >= 1
    assert client.metric("rodimus_time_to_first_token_seconds_count") >= 1
    line = 'rodimus_http_requests_total{endpoint="chat",status="400"}'
    assert client.chat()[0] == client.chat("x", temperature=-1)[0] == 400
    assert client.metric(line) >= 2


def test_metrics_are_those_of_the_engine():
    engine = Engine(text_model(), byte_tokenizer(), slots=2, recent_states=4)
    engine.add_prefix(engine.read([1, 2, 3]))
    for request in (Request([1, 2, 3, 4, 5], 4, stop_tokens=()), Request([9] * 7, 2)):
        engine.generate(request)
    # by the engine alone: the worker knows nothing of it
    engine.submit(Request([8], 50, stop_tokens=()))
    engine.step()
    told = Metrics(EngineWorker(engine)).text().decode().splitlines()
    found = dict(line.rsplit(" ", 1) for line in told if not line.startswith("#"))
    expected = {
        "slots": 2,
        "running_sequences": 1,
        "unfinished_requests": 0,
        "state_bytes": engine.states.nbytes,
        "recent_state_bytes": engine.prefixes.recent_bytes,
        "engine_steps_total": 3 + 1 + 1,
        "prompt_tokens_total": 2 + 7 + 1,
        "prefix_tokens_total": 3,
        "generated_tokens_total": 4 + 2 + 2,
        'finished_sequences_total{reason="length"}': 2,
    }
    assert {name: float(found[f"rodimus_{name}"]) for name in expected} == expected


def test_seconds_count_from_arrival_and_include_tokenising(monkeypatch):
    with serving() as (client, service, _):
        encode = service._encode
        slowly = lambda *asked: time.sleep(0.5) or encode(*asked)
        monkeypatch.setattr(service, "_encode", slowly)
        client.complete("Hello", max_tokens=2)
        for name in ("time_to_first_token", "generation"):
            assert client.metric(f"rodimus_{name}_seconds_sum") >= 0.5


def test_seconds_count_from_the_end_of_the_body(monkeypatch):
    with serving() as (client, service, _):
        body, times = service._body, []

        async def seen(request):
            found = await body(request)
            times.append(time.perf_counter())
            return found

        monkeypatch.setattr(service, "_body", seen)
        monkeypatch.setattr(service.metrics, "observe", lambda _, arrived: times.append(arrived))
        client.complete("Hello", max_tokens=2)
    assert len(times) == 2 and times == sorted(times)


LONG = {"prompt": "x" * 401}
MESSAGES = [{"role": "user", "content": "x"}]
BAD_COMPLETIONS = {
    "no prompt": ({}, "prompt must be"),
    "empty prompt": ({"prompt": ""}, "at least one token"),
    "empty list": ({"prompt": []}, "got an empty list"),
    "list in a list": ({"prompt": [["a"]]}, "prompt must be"),
    "mixed list": ({"prompt": ["a", 1]}, "got a list of 2 (a number, a string)"),
    "booleans": ({"prompt": [True, False]}, "prompt must be"),
    "empty tokens": ({"prompt": [[]]}, "at least one token"),
    "token too high": ({"prompt": [257]}, "tokens of prompt must be in [0, 257), got 257"),
    "token too low": ({"prompt": [-1]}, "got -1"),
    "token beyond int64": ({"prompt": [2**70]}, "tokens of prompt must be in"),
    "too long": (LONG, "the prompt has 401 tokens, expected at most 400"),
    "too many prompts": ({"prompt": ["a"] * 7}, "at most 6 prompts"),
    "lone surrogate": ({"prompt": "\ud800"}, "not valid JSON"),
    "max_tokens 0": ({"prompt": "x", "max_tokens": 0}, "max_tokens must be an integer in [1, 300]"),
    "max_tokens high": ({"prompt": "x", "max_tokens": 301}, "max_tokens must be"),
    "max_tokens text": ({"prompt": "x", "max_tokens": "9"}, "max_tokens must be"),
    "max_tokens float": ({"prompt": "x", "max_tokens": 1.5}, "max_tokens must be"),
    "temperature": ({"prompt": "x", "temperature": 2.1}, "temperature must be a number in [0, 2]"),
    "top_p": ({"prompt": "x", "top_p": -0.1}, "top_p must be a number in [0, 1], got -0.1"),
    "top_k": ({"prompt": "x", "top_k": -2}, "top_k must be an integer in [-1, "),
    "min_p": ({"prompt": "x", "min_p": True}, "min_p must be"),
    "penalty": ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty must be"),
    "seed": ({"prompt": "x", "seed": 2**63}, "seed must be"),
    "seed huge": ({"prompt": "x", "seed": 10**4000}, "seed must be"),
    "n": ({"prompt": ["x", "y"], "n": 4}, "n must be at most 6 together"),
    "logprobs": ({"prompt": "x", "logprobs": 21}, "logprobs must be an integer in [0, 20]"),
    "stop number": ({"prompt": "x", "stop": 5}, "stop must be"),
    "stop list": ({"prompt": "x", "stop": [5]}, "stop must be"),
    "stop empty": ({"prompt": "x", "stop": [""]}, "got a list of 1 (an empty string)"),
    "stop many": ({"prompt": "x", "stop": ["a"] * 17}, "got a list of 17 (a string)"),
    "stop long": ({"prompt": "x", "stop": "a" * 257}, "stop must be"),
    "stop ids number": ({"prompt": "x", "stop_token_ids": 5}, "stop_token_ids must be a list of"),
    "stop ids": ({"prompt": "x", "stop_token_ids": ["a"]}, "stop_token_ids must be a list of"),
    "stop ids many": (
        {"prompt": "x", "stop_token_ids": [0] * 17},
        "a list of at most 16 token ids",
    ),
    "stop id high": ({"prompt": "x", "stop_token_ids": [257]}, "must be in [0, 257), got 257"),
    "ignore_eos": ({"prompt": "x", "ignore_eos": 1}, "ignore_eos must be true or false"),
    "stream": ({"prompt": "x", "stream": "yes"}, "stream must be true or false"),
    "stream options": (
        {"prompt": "x", "stream_options": {"include_usage": True}},
        "stream_options needs stream = true",
    ),
    "stream options list": ({"prompt": "x", "stream": True, "stream_options": [1]}, "an object"),
    "unknown": ({"prompt": "x", "temprature": 1}, "did you mean 'temperature'?"),
    "unsupported": ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
    "echo": ({"prompt": "x", "echo": 1}, "echo must be true or false, got 1"),
    "no tokens": ({"prompt": "x", "max_tokens": 0}, "max_tokens must be an integer in [1, 300]"),
    "no tokens, no logprobs": (
        {"prompt": "x", "echo": True, "max_tokens": 0},
        "max_tokens must be an integer in [1, 300], got 0",
    ),
    "best_of": ({"prompt": "x", "n": 2, "best_of": 3}, "best_of must be n = 2"),
    "best_of text": ({"prompt": "x", "best_of": "all"}, "best_of must be n = 1"),
    "presence": ({"prompt": "x", "presence_penalty": 2.5}, "presence_penalty must be a number in"),
    "frequency": ({"prompt": "x", "frequency_penalty": "1"}, "frequency_penalty must be a number"),
    "bias": ({"prompt": "x", "logit_bias": 5}, "logit_bias must be an object of token ids and"),
    "bias token": ({"prompt": "x", "logit_bias": {"5": 1, "a": 1}}, "got 'a': 1"),
    "bias digit": ({"prompt": "x", "logit_bias": {"\u00b2": 1}}, "in [-100, 100], got '\u00b2': 1"),
    "bias digits": ({"prompt": "x", "logit_bias": {"9" * 5000: 1}}, f"got '{'9' * 20}': 1"),
    "bias high": (
        {"prompt": "x", "logit_bias": {"5": 101}},
        "numbers in [-100, 100], got '5': 101",
    ),
    "bias text": ({"prompt": "x", "logit_bias": {"5": "1"}}, "got '5': a string"),
    "bias low": ({"prompt": "x", "logit_bias": {"5": -101}}, "numbers in [-100, 100]"),
    "bias of none": ({"prompt": "x", "logit_bias": {"257": 1}}, "must be in [0, 257), got 257"),
}
BAD_CHATS = {
    "no messages": ({}, "messages must be"),
    "empty": ({"messages": []}, "at least one message"),
    "no object": ({"messages": ["x"]}, "messages[0] must be an object"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role must be a string"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be text"),
    "no content": ({"messages": [{"role": "user"}]}, "content must be text, got null"),
    "misspelt": (
        {"messages": [MESSAGES[0] | {"nmae": "y"}]},
        "unknown field 'messages[0].nmae', did you mean 'name'?",
    ),
    "name": ({"messages": [MESSAGES[0] | {"name": 5}]}, "messages[0].name must be a string"),
    "refusal": (
        {"messages": [{"role": "assistant", "refusal": "No."}]},
        "messages[0].refusal is not supported",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "must consist of text parts",
    ),
    "text of an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        "must consist of text parts",
    ),
    "part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "must consist of text parts",
    ),
    "role": ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role wizard"),
    "long role": ({"messages": [{"role": "w" * 999, "content": "x"}]}, "unknown role www"),
    "long field": ({"messages": MESSAGES, "x" * 999: 1}, "unknown field 'xxx"),
    "call": (
        {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "messages[1].tool_calls is not supported",
    ),
    "top_logprobs": ({"messages": MESSAGES, "top_logprobs": 2}, "needs logprobs = true"),
    "tools": (
        {"messages": MESSAGES, "tools": [{}]},
        "tools is not supported: leave it out or send []",
    ),
    "tool choice": (
        {"messages": MESSAGES, "tool_choice": "required"},
        'tool_choice is not supported: leave it out or send "none" or "auto"',
    ),
    "effort": ({"messages": MESSAGES, "reasoning_effort": "low"}, "reasoning_effort is not suppor"),
    "verbosity": ({"messages": MESSAGES, "verbosity": "low"}, 'leave it out or send "medium"'),
    "search": ({"messages": MESSAGES, "web_search_options": {}}, "search_options is not supported"),
    "audio": ({"messages": MESSAGES, "audio": {"voice": "x"}}, "audio is not supported: leave it"),
    "moderation": ({"messages": MESSAGES, "moderation": {}}, "moderation is not supported: leave"),
    "prompt": ({"messages": MESSAGES, "prompt": "x"}, "unknown field 'prompt'"),
}


class TestParsing:
    """What needs no server."""

    def test_what_is_left_out_or_null_is_the_default(self):
        nothing = dict.fromkeys(("temperature", "stop", "logit_bias", "max_tokens", "stream"))
        for fields in ({}, nothing):
            call = parse_completion({"prompt": "x", **fields}, LIMITS)
            assert call.options["sampling"] == SamplingParams(temperature=1.0)
            assert call.options["stop"] == () and call.length_field is None and not call.stream
            (request,) = call.requests([[1]], (), 4000)
            assert request.max_new_tokens == 16

    @pytest.mark.parametrize(
        "name, low, high",
        [
            *(("temperature", 0, 2), ("top_p", 0, 1), ("min_p", 0, 1), ("top_k", -1, 2**31)),
            *(("repetition_penalty", 0.01, 100), ("presence_penalty", -2, 2)),
            *(("frequency_penalty", -2, 2), ("seed", -(2**63), 2**63 - 1), ("n", 1, 6)),
            *(("max_tokens", 1, 300), ("max_completion_tokens", 1, 300)),
        ],
    )
    def test_numbers_may_be_as_low_and_as_high_as_refusals_say(self, name, low, high):
        is_chat = name.startswith("max")
        parse = parse_chat if is_chat else parse_completion
        body = {"messages": MESSAGES} if is_chat else {"prompt": "x"}
        for value in (low, high):
            parse(body | {name: value}, LIMITS)
        for value in (low - 1, high + 1):
            with pytest.raises(ApiError, match=rf"^{name} must be an? \w+ in \[{low}, {high}\],"):
                parse(body | {name: value}, LIMITS)

    def test_no_token_is_wanted_where_a_prompt_is_scored(self):
        body = {"prompt": "x", "echo": True, "logprobs": 0, "max_tokens": 0}
        assert parse_completion(body, LIMITS).options["max_new_tokens"] == 0

    def test_what_hides_the_length_of_pieces_is_ignored(self):
        options = {"include_usage": True, "include_obfuscation": False}
        call = parse_completion({"prompt": "x", "stream": True, "stream_options": options}, LIMITS)
        assert call.include_usage

    def test_refusals_name_code_and_field(self):
        with pytest.raises(ApiError) as refused:
            parse_json(b"{")
        assert refused.value.code == "invalid_json"
        with pytest.raises(ApiError, match="audio is not supported: leave it out$"):
            parse_chat({"messages": MESSAGES, "audio": {}}, LIMITS)
        with pytest.raises(ApiError) as refused:
            parse_chat({"messages": [MESSAGES[0] | {"nmae": "y"}]}, LIMITS)
        assert refused.value.param == "messages[0].nmae"

    def test_a_token_may_be_impossible_and_of_unknown_bytes(self):
        """Two tokens may have one name, which then is the chosen one's."""
        delta = Delta([5], "x", [TokenLogprobs(5, -math.inf, ((6, -0.5),))], None)
        token_text = lambda token: TokenText("x", None, True)
        call = parse_completion({"prompt": "x", "logprobs": 1}, LIMITS)
        answer = Answer(NAME, call, token_text)
        for _ in range(2):
            (choice,) = answer.piece(0, delta)["choices"]
            assert choice["logprobs"] == {
                "tokens": ["x"],
                "token_logprobs": [-9999.0],
                "top_logprobs": [{"x": -9999.0}],
                "text_offset": [0],
            }
        call = parse_chat({"messages": MESSAGES, "logprobs": True}, LIMITS)
        piece = Answer(NAME, call, token_text).piece(0, delta)
        (entry,) = piece["choices"][0]["logprobs"]["content"]
        assert (entry["logprob"], entry["bytes"]) == (-9999.0, None)
        assert piece["id"].startswith("chatcmpl-") and "usage" not in piece

    def test_a_stream_counts_the_prompt_of_its_choices_once(self):
        call = parse_chat({"messages": MESSAGES, "n": 2}, LIMITS)
        generations = [Generation(Request([1]), torch.tensor([1]), frozenset()) for _ in range(2)]
        assert Answer(NAME, call, None).closing(generations)["usage"]["prompt_tokens"] == 1


@pytest.fixture(scope="class")
def nothing_reaches_the_engine(server):
    client, service, _ = server
    finished = service.worker.engine.stats.finished
    wait_until(lambda: service.worker.unfinished == 0)
    before = dict(finished)
    yield
    assert service.worker.unfinished == 0 and finished == before
    assert client.complete("x")[0] == 200


@pytest.mark.usefixtures("nothing_reaches_the_engine")
class TestMistakes:
    def refused(self, status, answer, expected):
        assert status == expected
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(answer["error"]["message"]) <= 300
        return answer["error"]["message"]

    @pytest.mark.parametrize("body, message", BAD_COMPLETIONS.values(), ids=BAD_COMPLETIONS)
    def test_of_completions_are_400_and_say_why(self, client, body, message):
        assert message in self.refused(*client.post("/v1/completions", body), 400)

    @pytest.mark.parametrize(
        "body, field",
        [
            *(({"prompt": prompt}, "prompt") for prompt in ("", [257], [[1], [-1]])),
            ({"prompt": "x", "stop_token_ids": [257]}, "stop_token_ids"),
            ({"prompt": "x", "logit_bias": {"5": 1, "257": 1}}, "logit_bias"),
        ],
    )
    def test_of_tokens_name_their_field(self, client, body, field):
        status, answer = client.post("/v1/completions", body)
        assert field in self.refused(status, answer, 400) and answer["error"]["param"] == field

    @pytest.mark.parametrize("body, message", BAD_CHATS.values(), ids=BAD_CHATS)
    def test_of_chats_are_400_and_say_why(self, client, body, message):
        assert message in self.refused(*client.post("/v1/chat/completions", body), 400)

    @pytest.mark.parametrize(
        "body",
        [
            *(b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"prompt": "x", "user": NaN}'),
            *(b'{"prompt": "x", "top_p": 1e999}', b'{"prompt":' + b"[" * 9_000 + b"]" * 9_000),
            b'{"prompt": "x", "seed": ' + b"9" * 9_000 + b"}",
        ],
        ids=lambda body: body[:24].decode("latin-1"),
    )
    def test_of_json_are_400(self, client, body):
        self.refused(*client.post("/v1/completions", body), 400)

    def test_other_models_paths_methods_and_types_have_their_own_codes(self, client):
        status, answer = client.complete("x", model="gpt")
        assert self.refused(status, answer, 404) == "there is no model 'gpt' here, only 'tiny'"
        status, answer = client.complete("x", model=["gpt"])
        assert self.refused(status, answer, 404) == "model must be a string, got a list"
        for name in ("", "x" * 999):
            self.refused(*client.complete("x", model=name), 404)
        self.refused(*client.get("/v1/nothing"), 404)
        self.refused(*client.get("/v1/completions"), 405)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port)) as connection:
            connection.request("GET", "/v1/completions")
            assert connection.getresponse().headers["Allow"] == "POST"
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        self.refused(*client.post("/v1/completions", {"prompt": "x"}, **form), 415)

    def test_bodies_that_are_too_long_are_413(self, client):
        body = {"prompt": "x", "user": "x" * LIMITS.body_bytes}
        self.refused(*client.post("/v1/completions", body), 413)

    def test_a_body_that_says_it_is_too_long_is_413_before_it_comes(self, client):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {LIMITS.body_bytes + 1}\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 413")

    def test_a_body_longer_than_it_says_it_is_is_413(self, client):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(5):
                connection.sendall(b"1770\r\n" + b"x" * 6000 + b"\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 413")

    def test_a_body_that_does_not_come_is_408(self, client):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")

    def test_without_a_template_chats_are_400(self):
        with serving(engine=Engine(text_model(), byte_tokenizer(None))) as (client, _, _):
            assert "no chat template" in self.refused(*client.chat("x"), 400)


def test_headers_tell_clients_and_proxies_what_to_do():
    assert _error(ApiError(429, "full")).headers["Retry-After"] == "1"
    refusal = _error(ApiError(401, "no key")).headers
    assert refusal["WWW-Authenticate"] == "Bearer"
    assert refusal["Content-Type"] == "application/json"
    stream = _EventStream(None, None).headers
    assert stream["Cache-Control"] == "no-cache" and stream["X-Accel-Buffering"] == "no"
    assert stream["Content-Type"].startswith("text/event-stream")


def test_a_key_is_asked_for_where_there_is_one():
    with serving(api_key="secret") as (client, _, _):
        wrong = ("Bearer wrong", "Bearer \xe9", "Bearer", "secret", "Basic secret")
        for given in ({}, *({"Authorization": value} for value in wrong)):
            for answer in (
                client.get("/v1/models", **given),
                client.complete("x") if not given else client.get("/v1/models", **given),
            ):
                assert answer[0] == 401 and answer[1]["error"]["code"] == "invalid_api_key"
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):
            assert client.get("/v1/models", Authorization=f"{scheme} secret")[0] == 200
        assert client.get("/health")[0] == 200
        assert client.call("GET", "/metrics")[0] == 200


# the last byte of "à" is a blank in latin-1; variables hold other bytes as surrogates
@pytest.mark.parametrize("key", ["clé", "voilà", "\udcff"], ids=ascii)
def test_a_key_may_be_any_text(key):
    with serving(api_key=key) as (client, _, _):
        for given, status in ((key, 200), (key + "x", 401)):
            sent = {"Authorization": os.fsencode(f"Bearer {given}")}
            assert client.call("GET", "/v1/models", **sent)[0] == status


def test_the_key_in_the_environment_is_taken_without_blanks_and_never_empty(monkeypatch):
    from rodimus.errors import InputError
    from rodimus.generation.server import API_KEY_VARIABLE, _api_key

    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert _api_key() is None
    monkeypatch.setenv(API_KEY_VARIABLE, "secret\n")
    assert _api_key() == "secret"
    for blank in ("", " \n"):
        monkeypatch.setenv(API_KEY_VARIABLE, blank)
        with pytest.raises(InputError, match="is empty: unset it"):
            _api_key()


def endless(client, stream=True, **fields):
    """A connection that has asked for a long text, and got the beginning of the answer."""
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=20)
    body = {"prompt": "Hello", "max_tokens": 4000, "temperature": 0, "stream": stream, **fields}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


@pytest.fixture
def narrow():
    """A server of one slot where one request may wait."""
    engine = Engine(text_model(), byte_tokenizer(), slots=1)
    engine.end_tokens = ()
    with serving(engine=engine, max_waiting=1) as parts:
        yield parts


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(narrow, monkeypatch, stream):
    client, service, _ = narrow
    engine, logged = service.worker.engine, []
    log = lambda *message, **options: logged.append(message)
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", log)
    connections = [endless(client, stream)]
    wait_until(lambda: engine.running)
    connections.append(endless(client, stream=False))
    wait_until(lambda: service.worker.unfinished == 2)
    # the one that waits first, or it would get the slot and a token
    for unfinished in (1, 0):
        connections.pop().close()
        wait_until(lambda expected=unfinished: service.worker.unfinished == expected)
    assert engine.stats.finished == {"cancelled": 2}
    line = 'rodimus_http_requests_total{endpoint="completions",status="499"}'
    assert client.metric(line) == 2
    assert client.metric("rodimus_time_to_first_token_seconds_count") == 1
    assert client.metric("rodimus_generation_seconds_count") == 0
    assert client.complete("x", max_tokens=1)[0] == 200
    assert not logged


def test_a_full_queue_is_429_and_empties_again(narrow, monkeypatch):
    client, service, _ = narrow
    first = endless(client)
    wait_until(lambda: service.worker.unfinished == 1)
    with monkeypatch.context() as patch:
        # what cannot be taken is not tokenised
        patch.setattr(service, "_encode", None)
        assert client.complete("x", n=2)[0] == 429 and client.complete("x", n=3)[0] == 400
    waiting = endless(client, stream=False, max_tokens=3)
    wait_until(lambda: service.worker.unfinished == 2)
    status, answer = client.complete("x")
    assert status == 429
    assert (answer["error"]["type"], answer["error"]["code"]) == ("rate_limit_error", "queue_full")
    first.close()
    assert waiting.recv(100).startswith(b"HTTP/1.1 200")
    waiting.close()
    assert client.complete("x")[0] == 200


def test_a_stream_that_waits_gives_signs_of_life(narrow, monkeypatch):
    client, service, _ = narrow
    monkeypatch.setattr("rodimus.generation.server._QUIET_SECONDS", 0.05)
    first = endless(client)
    wait_until(lambda: service.worker.unfinished == 1)
    waiting = endless(client, max_tokens=3)
    answer = b""
    while answer.count(b": waiting\n\n") < 3:
        answer += waiting.recv(1000)
    first.close()
    while piece := waiting.recv(10_000):
        answer += piece
    assert b"data:" not in answer[: answer.index(b": waiting")] and b"data: [DONE]" in answer
    found = re.findall(r"^data: (\{.*\})$", answer.decode(), re.MULTILINE)
    text = "".join(json.loads(event)["choices"][0]["text"] for event in found)
    assert text == client.complete("Hello", max_tokens=3, temperature=0)[1]["choices"][0]["text"]


def test_the_next_turn_reads_what_is_new_and_choices_one_prompt():
    with serving(recent_states=8, slots=2) as (client, service, _):
        turns = [{"role": "user", "content": "Hello, how are you?"}]
        fields = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
        url, stats = "/v1/chat/completions", service.worker.engine.stats
        _, first = client.post(url, {"messages": turns, "n": 5, **fields})
        assert stats.prompt_tokens == first["usage"]["prompt_tokens"]
        assert len({choice["message"]["content"] for choice in first["choices"]}) == 1
        turns += [first["choices"][0]["message"], {"role": "user", "content": "And now?"}]
        _, second = client.post(url, {"messages": turns, **fields})
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= first["usage"]["prompt_tokens"]
        assert stats.prompt_tokens == (
            first["usage"]["prompt_tokens"] + second["usage"]["prompt_tokens"] - cached
        )
        assert client.metric("rodimus_recent_state_bytes") > 0
    with serving(slots=2) as (client, service, _):
        _, fresh = client.post(url, {"messages": turns, **fields})
        assert fresh["choices"] == second["choices"]


def test_pages_of_other_origins_may_call_where_they_are_allowed():
    page = {"Origin": "http://localhost:3000"}
    asked = {**page, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    for origins, allowed in (((), None), ((page["Origin"],), page["Origin"]), (("*",), "*")):
        with serving(origins=origins, api_key="secret") as (client, _, _):
            connection = http.client.HTTPConnection("127.0.0.1", client.port)
            with contextlib.closing(connection):
                connection.request("OPTIONS", "/v1/completions", headers=asked)
                answer = connection.getresponse()
                answer.read()
                assert (answer.status == 200) == bool(origins)
                # an error too says who may read it
                connection.request("GET", "/v1/models", headers=page)
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 401
                assert answer.headers["Access-Control-Allow-Origin"] == allowed


def test_a_page_of_another_origin_may_read_of_a_defect():
    page = {"Origin": "http://localhost:3000", "Content-Type": "application/json"}
    with serving(origins=("*",)) as (client, service, _):
        service.worker.enqueue = None
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", '{"prompt": "x"}', page)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 500
            assert answer.headers["Access-Control-Allow-Origin"] == "*"


def test_shutting_down_waits_for_running_requests_and_takes_no_more(narrow):
    client, service, server = narrow
    engine = service.worker.engine
    running = endless(client, stream=False, max_tokens=150)
    wait_until(lambda: engine.running)
    server.should_exit = True
    answer = b""
    while piece := running.recv(10_000):
        answer += piece
    assert answer.startswith(b"HTTP/1.1 200") and b'"length"' in answer
    wait_until(lambda: not service.worker._thread.is_alive())
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", client.port), timeout=2).recv(1)


def test_what_still_runs_when_the_time_to_shut_down_is_over_is_503(narrow):
    client, service, server = narrow
    server.config.timeout_graceful_shutdown = 0.2
    whole = endless(client, stream=False)
    wait_until(lambda: service.worker.engine.running)
    stream = endless(client)
    half = socket.create_connection(("127.0.0.1", client.port), timeout=20)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    half.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    wait_until(lambda: len(server.server_state.tasks) == 3)
    server.should_exit = True
    for connection in (whole, half, stream):
        answer = b""
        while piece := connection.recv(10_000):
            answer += piece
        assert b'"the server is shutting down", "type": "server_error"' in answer
        assert answer.startswith(b"HTTP/1.1 503") or b"data: [DONE]" in answer
    # cancelled by the engine's thread, which may be in a step
    wait_until(lambda: service.worker.unfinished == 0)


def test_a_stream_that_nobody_reads_is_cancelled_without_a_traceback():
    async def cancelled():
        async def events():
            try:
                yield "data: x"
            finally:
                ends.append("events")

        async def send(message):
            if "body" in message:
                await asyncio.Event().wait()

        ends = []
        stream = _EventStream(events(), lambda: ends.append("stream"))
        task = asyncio.create_task(stream({}, None, send))
        await asyncio.sleep(0.01)
        task.cancel()
        await task
        return ends

    assert asyncio.run(cancelled()) == ["events", "stream"]


def test_a_stream_whose_client_left_before_it_began_has_ended():
    async def send(message):
        raise OSError

    async def left():
        exchange = _Exchange(worker, None, None)
        exchange.generations = worker.prepare([Request([1])])
        ended = functools.partial(service._stream_ended, "chat", exchange)
        await _EventStream(None, ended)({}, None, send)
        return exchange.generations

    worker = EngineWorker(Engine(text_model(), byte_tokenizer()))
    service = Service(worker, model_name=NAME)
    assert asyncio.run(left()) == worker._cancelled
    assert (
        b'rodimus_http_requests_total{endpoint="chat",status="499"} 1.0' in service.metrics.text()
    )


def test_a_stream_that_the_worker_cancels_ends_with_an_error(narrow):
    client, service, _ = narrow
    stream = endless(client)
    wait_until(lambda: service.worker.engine.running)
    service.worker.cancel(list(service.worker._listeners))
    answer = b""
    while piece := stream.recv(10_000):
        answer += piece
    assert b"the server is shutting down or has failed" in answer and b"cancelled" not in answer
    assert client.metric('rodimus_http_requests_total{endpoint="completions",status="503"}') == 1


def test_a_second_interrupt_ends_requests_though_closing_waits_for_them(narrow):
    """From Python 3.12.1 on a server's ``wait_closed`` does; here of every Python."""
    client, service, server = narrow

    async def wait_closed():
        while server.server_state.connections:
            await asyncio.sleep(0.01)

    server.servers[0].wait_closed = wait_closed
    server.config.timeout_graceful_shutdown = 60
    whole = endless(client, stream=False, max_tokens=4096)
    wait_until(lambda: service.worker.engine.running)
    for _ in range(2):
        server.handle_exit(signal.SIGINT, None)
        time.sleep(0.3)
    assert whole.recv(1000).startswith(b"HTTP/1.1 503")
    wait_until(lambda: not service.worker._thread.is_alive())


def fails(*args):
    raise RuntimeError("out of memory")


def test_a_step_that_fails_is_503_and_the_server_goes_on(monkeypatch, caplog):
    engine = Engine(text_model(), byte_tokenizer(), slots=2)
    with serving(engine=engine) as (client, service, server):
        status, expected = client.complete("x", temperature=0)
        assert status == 200
        # twice in a row, and again after a step that did not
        for failures in (1, MOST_FAILURES - 1, MOST_FAILURES - 1):
            with monkeypatch.context() as patch:
                patch.setattr(engine.decoder, "_forward", fails)
                for _ in range(failures):
                    status, answer = client.complete("x")
                    assert status == 503 and "a step of the engine failed" in str(answer)
            status, answer = client.complete("x", temperature=0)
            assert status == 200 and answer["choices"] == expected["choices"]
        assert client.get("/health")[0] == 200 and service.worker.unfinished == 0
        assert service.worker.failure is None and not server.should_exit
    assert "a step of the engine failed; what was under way has ended\nTraceback" in caplog.text


def test_a_server_whose_engine_has_stopped_is_503():
    with serving() as (client, service, _):
        service.worker.stop()
        status, answer = client.complete("x")
        assert status == 503 and answer["error"]["message"] == "the engine is not running"
        assert client.get("/health")[0] == 503


def test_an_engine_that_fails_on_and_on_ends_the_server(monkeypatch, caplog):
    engine = Engine(text_model(), byte_tokenizer(), slots=2)
    with serving(engine=engine) as (client, service, server):
        monkeypatch.setattr(engine.decoder, "_forward", fails)
        for _ in range(MOST_FAILURES):
            status, answer = client.complete("x")
            assert status == 503 and answer["error"]["type"] == "server_error"
        assert answer["error"]["message"] == "the server is shutting down or has failed"
        assert str(service.worker.failure) == "out of memory"
        assert service.worker.unfinished == 0 and not service.worker.accepts
        # sockets of tests stay open until the end
        wait_until(lambda: not server.servers[0].is_serving())
    assert "the engine failed; all its requests are given up\nTraceback" in caplog.text


@pytest.mark.parametrize("failure, status", [(None, 0), (RuntimeError(), 1)])
def test_the_command_ends_with_the_engines_status(monkeypatch, failure, status):
    from rodimus.generation import server

    worker = EngineWorker(Engine(text_model(), byte_tokenizer()))
    worker.failure = failure
    service = server.Service(worker, model_name=NAME)
    monkeypatch.setattr(server, "_service", lambda options: service)
    monkeypatch.setattr(server._Server, "run", lambda self: None)
    assert server.run(parse(["serve", "model", "--port", "0"])) == status


def test_an_engine_that_cannot_be_made_is_one_line(monkeypatch, tmp_path):
    from rodimus.errors import InputError
    from rodimus.generation import server

    def breaks(*arguments, **options):
        raise RuntimeError

    text_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(server, "Engine", breaks)
    with pytest.raises(InputError, match="RuntimeError"):
        server.run(parse(["serve", str(tmp_path), "--port", "0"]))


def test_a_defect_is_500_and_counted(monkeypatch, caplog):
    with serving() as (client, service, _):
        service.worker.enqueue = None
        status, answer = client.complete("x")
        assert status == 500 and answer["error"]["type"] == "server_error"
        line = 'rodimus_http_requests_total{endpoint="completions",status="500"}'
        assert client.metric(line) == 1
        assert "a request met a defect\nTraceback" in caplog.text
        monkeypatch.setattr(service.metrics, "text", fails)
        status, answer = client.get("/metrics")
        assert status == 500 and answer["error"]["type"] == "server_error"


def test_tokens_beyond_the_tokenizer_end_nobodys_answer():
    """One in Python decodes none of them."""
    model = build(config_of("rodimus_plus") | {"vocab_size": 512})
    with serving(engine=Engine(model, ByT5Tokenizer(), slots=2)) as (client, service, _):
        assert service._token_text(384) == ("", b"", False) != service._token_text(383)
        for prompt in ([500], [[1, 500], [500, 3]], [511]):
            for _ in range(MOST_FAILURES):
                asked = {"max_tokens": 3, "logprobs": 2, "ignore_eos": True}
                status, answer = client.complete(prompt, **asked)
                assert status == 200
                made = 3 * len(answer["choices"])
                assert answer["usage"]["completion_tokens"] == made > 0
        assert service.worker.accepts


class Panic(BaseException):
    """As tokenizers in Rust raise it: no ``Exception``."""


def test_a_panic_in_a_step_is_503_and_the_server_goes_on(monkeypatch):
    def panics(*arguments):
        raise Panic

    with serving() as (client, service, server):
        with monkeypatch.context() as patch:
            patch.setattr(service.worker.engine.decoder, "_forward", panics)
            assert client.complete("x")[0] == 503
        assert client.complete("x")[0] == 200
        monkeypatch.setattr(service.worker.engine.decoder, "_forward", panics)
        for _ in range(MOST_FAILURES):
            assert client.complete("x")[0] == 503
        wait_until(lambda: service.worker.failure is not None)

        def is_gone():
            try:
                assert client.get("/health")[0] == 503
            except OSError:
                return True

        wait_until(is_gone)


def test_tokens_that_have_no_text_end_their_own_answer_alone(monkeypatch):
    tokenizer = byte_tokenizer()
    engine = Engine(text_model(), tokenizer, slots=4)
    with serving(engine=engine) as (client, service, _):
        body = {"prompt": "Hello", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        _, expected = client.post("/v1/completions", body)
        decode = tokenizer.decode
        # of a prompt's last token alone: those of other requests are whole

        def panics(ids, **options):
            if list(ids) == tokenizer("~").input_ids:
                raise Panic
            return decode(ids, **options)

        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "decode", panics)
            other = endless(client, max_tokens=300)
            for _ in range(MOST_FAILURES + 1):
                status, answer = client.complete("x~", stop="never")
                assert status == 422 and answer["error"]["code"] == "generation_failed"
            answer = b""
            while piece := other.recv(10_000):
                answer += piece
        found = re.findall(r"^data: (\{.*\})$", answer.decode(), re.MULTILINE)
        text = "".join(json.loads(event)["choices"][0]["text"] for event in found)
        assert expected["choices"][0]["text"].endswith(text) and len(text) > 100
        assert service.worker.accepts and service.worker.failure is None


def test_a_defect_in_a_stream_is_an_event_and_counted(monkeypatch):
    with serving() as (client, service, _):
        monkeypatch.setattr(service, "_token_text", fails)
        body = {"prompt": "x", "logprobs": 1, "stream": True}
        with pytest.raises(http.client.IncompleteRead) as cut:
            client.call("POST", "/v1/completions", body)
        assert b'"the server has a defect", "type": "server_error"' in cut.value.partial
        line = 'rodimus_http_requests_total{endpoint="completions",status="500"}'
        assert client.metric(line) == 1


def test_prompts_are_checked_once_each_and_not_by_the_loop(monkeypatch):
    engine, seen = Engine(text_model(), byte_tokenizer()), []
    prepare = engine.prepare

    def watched(*args, **options):
        seen.append((threading.current_thread(), prepare(*args, **options)))
        return seen[-1][1]

    monkeypatch.setattr(engine, "prepare", watched)
    with serving(engine=engine) as (client, service, _):
        loops = []
        monkeypatch.setattr(
            service, "_check_model", lambda name: loops.append(threading.current_thread())
        )
        status, _ = client.complete([[1, 2], [3]], n=3, max_tokens=1)
    threads, generations = zip(*seen, strict=True)
    assert status == 200 and len(generations) == 6 and not {*loops} & {*threads}
    # the choices of a prompt share its tensor
    assert [len({id(g.prompt) for g in generations[i : i + 3]}) for i in (0, 3)] == [1, 1]


def test_a_request_that_is_cancelled_while_it_is_checked_is_not_queued(monkeypatch):
    engine = Engine(text_model(), byte_tokenizer())
    worker, prepare = EngineWorker(engine), engine.prepare
    entered, left = threading.Event(), threading.Event()

    def slow(*args, **options):
        entered.set()
        left.wait(20)
        return prepare(*args, **options)

    async def cancelled():
        exchange = _Exchange(worker, None, _Mail(asyncio.get_running_loop()))
        task = asyncio.create_task(exchange.submit([Request([1], 10**6)]))
        await asyncio.to_thread(entered.wait, 20)
        task.cancel()
        left.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(engine, "prepare", slow)
    worker.start()
    try:
        asyncio.run(cancelled())
        assert entered.is_set() and worker.unfinished == 0
    finally:
        worker.stop()


def test_a_model_that_cannot_continue_is_422(monkeypatch):
    engine = Engine(text_model(), byte_tokenizer(), slots=2)
    with serving(engine=engine) as (client, _, _):
        decode = engine.decoder._forward
        monkeypatch.setattr(engine.decoder, "_forward", lambda *a: decode(*a) * float("nan"))
        status, answer = client.complete("x")
        assert status == 422 and answer["error"]["code"] == "generation_failed"
        *_, last = client.stream("/v1/completions", {"prompt": "x"})
        assert last["error"]["code"] == "generation_failed"


def test_an_answer_without_a_first_token_has_no_time_to_it():
    model = text_model()
    model.lm_head.register_forward_hook(lambda *x: x[-1] * math.nan)
    with serving(engine=Engine(model, byte_tokenizer())) as (client, _, _):
        assert client.complete("x")[0] == 422
        assert client.metric("rodimus_time_to_first_token_seconds_count") == 0


def test_a_choice_that_fails_ends_its_stream_by_its_own_name():
    engine = Engine(text_model(), byte_tokenizer(), slots=2)
    engine.end_tokens = ()
    read = engine._read_chunk

    def breaks(tokens, cache, **options):
        if 1 in tokens:
            raise FloatingPointError("not finite")
        return read(tokens, cache, **options)

    engine._read_chunk = breaks
    with serving(engine=engine) as (client, service, _):
        *_, last = client.stream("/v1/completions", {"prompt": [[0], [1]], "max_tokens": 4000})
        assert last["error"]["code"] == "generation_failed"
        _, text = client.call("GET", "/metrics")
        assert b'status="422"} 1.0' in text and b'status="200"' not in text
        wait_until(lambda: service.worker.unfinished == 0)
        assert engine.stats.finished == {"error": 1, "cancelled": 1}


def test_a_step_wakes_the_event_loop_once_for_all_its_streams():
    engine = Engine(text_model(), byte_tokenizer(), slots=8)
    engine.end_tokens = ()
    with serving(engine=engine) as (client, service, _):
        loop, wakes, steps = service._mail._loop, [], []
        call, step = loop.call_soon_threadsafe, engine.step
        loop.call_soon_threadsafe = lambda *args: wakes.append(args[1]) or call(*args)
        engine.step = lambda *args: steps.append(len(engine.running)) or step(*args)
        body = {"prompt": [[i] for i in range(8)], "max_tokens": 50}
        client.stream("/v1/completions", body)
    together = [len(news) for news in wakes if isinstance(news, list)]
    assert max(together) == 8 and len(together) <= len(steps) + 1
    # a prompt's step brings two tokens
    assert sum(together) == 8 * 49


def test_news_for_a_loop_that_is_closed_go_nowhere():
    loop = asyncio.new_event_loop()
    loop.close()
    _Mail(loop).deliver()


class Connection:
    """One on which nothing comes."""

    async def receive(self):
        await asyncio.sleep(60)


def test_news_that_wait_for_the_loop_are_joined():
    entry = TokenLogprobs(5, -0.5, ())
    generations = [Generation(Request([1]), torch.tensor([1]), frozenset()) for _ in range(2)]
    for generation in generations:
        generation.finish_reason = "length"
    parts = [
        Delta([1], "a", [], None),
        Delta([2, 3], "", [entry], None),
        Delta([4], "bc", [entry], "length"),
    ]

    async def taken(parts):
        exchange = _Exchange(None, Connection(), None)
        exchange.generations = generations
        for part in parts:
            exchange.receive(generations[0], part)
        exchange.receive(generations[1], parts[-1])
        return [news async for news in exchange.news()]

    whole = Delta([1, 2, 3, 4], "abc", [entry, entry], "length")
    assert asyncio.run(taken(parts)) == [(generations[0], whole), (generations[1], parts[-1])]


def test_signs_of_life_are_few_and_nothing_goes_on_behind_an_answer(monkeypatch):
    monkeypatch.setattr("rodimus.generation.server._QUIET_SECONDS", 0.1)
    generation = Generation(Request([1]), torch.tensor([1]), frozenset())
    generation.finish_reason = "length"

    async def taken():
        exchange = _Exchange(None, Connection(), None)
        exchange.generations = [generation]
        last = (generation, Delta([1], "a", [], "length"))
        asyncio.get_running_loop().call_later(0.55, exchange.receive, *last)
        signs = [news async for news in exchange.news()].count(None)
        await asyncio.sleep(0.01)
        return signs, len(asyncio.all_tasks())

    signs, tasks = asyncio.run(taken())
    assert 1 <= signs <= 5 and tasks == 1


def test_news_put_off_the_next_sign_of_life():
    generation = Generation(Request([1]), torch.tensor([1]), frozenset())
    generation.finish_reason = "length"
    first, last = (Delta([1], "a", [], reason) for reason in (None, "length"))

    async def taken():
        exchange = _Exchange(None, Connection(), None)
        exchange.generations = [generation]
        exchange._last -= 1000
        exchange.receive(generation, first)
        asyncio.get_running_loop().call_later(0.05, exchange.receive, generation, last)
        return [news async for news in exchange.news()]

    assert asyncio.run(taken()) == [(generation, first), (generation, last)]


def test_a_client_that_reads_nothing_keeps_no_timer_busy(monkeypatch):
    monkeypatch.setattr("rodimus.generation.server._QUIET_SECONDS", 0.1)
    generation = Generation(Request([1]), torch.tensor([1]), frozenset())
    generation.finish_reason = "length"

    async def reminded():
        exchange, calls = _Exchange(None, Connection(), None), []
        exchange.generations = [generation]
        remind = exchange._changed.set
        monkeypatch.setattr(exchange._changed, "set", lambda: calls.append(remind()))
        async with contextlib.aclosing(exchange.news()) as news:
            assert await anext(news) is None
            await asyncio.sleep(0.35)
        return len(calls)

    assert 1 <= asyncio.run(reminded()) <= 5


class Watched:
    """Something that is called, which is written down before."""

    def __init__(self, whole, name, events):
        self.whole, self.name, self.events = whole, name, events

    def __call__(self, *arguments, **options):
        self.events.append(self.name)
        return self.whole(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self.whole, name)


class TestWorker:
    def test_requests_are_taken_all_or_none(self):
        engine = Engine(text_model(), byte_tokenizer(), slots=2)
        for most, told in ((0, "at least one token"), (-1, "max_waiting must be at least 0")):
            with pytest.raises(ValueError, match=told):
                EngineWorker(engine, max_waiting=most).prepare([Request([])])
        worker = EngineWorker(engine, max_waiting=1)
        assert not worker.accepts
        worker.start()
        try:
            with pytest.raises(ValueError, match="at most 3 texts can run or wait at once, got 4"):
                worker.submit([Request([1])] * 4, lambda *news: None)
            worker.submit([Request([1], 10**6)], lambda *news: None)
            with pytest.raises(QueueFullError, match="1 requests are running or waiting"):
                worker.submit([Request([1])] * 3, lambda *news: None)
            with pytest.raises(ValueError, match="at least one token"):
                worker.submit([Request([1]), Request([])], lambda *news: None)
            assert worker.unfinished == 1
        finally:
            worker.stop()
        with pytest.raises(WorkerStoppedError):
            worker.submit([Request([1])], lambda *news: None)

    def test_a_listener_that_fails_harms_no_other_request(self, caplog):
        worker = EngineWorker(Engine(text_model(), slots=2))
        worker.start()
        reasons = []

        def breaks(generation, delta):
            raise OSError("nobody is there")

        try:
            (broken,) = worker.submit([Request([1], 10**6, stop_tokens=())], breaks)
            wait_until(lambda: broken.finish_reason)
            request = Request([1], 20, stop_tokens=())
            worker.submit([request], lambda generation, delta: reasons.append(delta.finish_reason))
            wait_until(lambda: worker.unfinished == 0)
        finally:
            worker.stop()
        assert broken.finish_reason == "cancelled" and reasons[-1] == "length"
        assert "nobody is there" in caplog.text and worker.failure is None

    def test_what_waits_outlives_a_step_that_fails(self, monkeypatch):
        engine = Engine(text_model(), slots=1)
        worker, reasons, forward = EngineWorker(engine), [], engine.decoder._forward

        def breaks(batch):
            # arrives during the step
            worker.submit(requests[:1], listener)
            fails()

        broken = iter([breaks])
        listener = lambda generation, delta: reasons.append(delta.finish_reason)
        decode = lambda batch: next(broken, forward)(batch)
        monkeypatch.setattr(engine.decoder, "_forward", decode)
        requests = [Request([1], 9, stop_tokens=())] * 3
        worker.start()
        try:
            worker.submit(requests, listener)
            wait_until(lambda: worker.unfinished == 0)
        finally:
            worker.stop()
        assert [reason for reason in reasons if reason] == ["error", *["length"] * 3]

    def test_a_request_that_is_cancelled_as_it_arrives_never_runs(self):
        engine = Engine(text_model(), slots=2)
        worker, entered, left = EngineWorker(engine), threading.Event(), threading.Event()
        worker.start()
        try:
            holds = lambda *news: entered.set() or left.wait(20)
            worker.submit([Request([1], 3, stop_tokens=())], holds)
            assert entered.wait(20)
            (late,) = worker.submit([Request([2], 9, stop_tokens=())], lambda *news: None)
            worker.cancel([late])
            left.set()
            wait_until(lambda: worker.unfinished == 0)
        finally:
            worker.stop()
        assert late.finish_reason == "cancelled" and not late.tokens and not engine.has_work
        assert engine.stats.finished == {"length": 1, "cancelled": 1}

    @pytest.mark.parametrize("apart", [True, False])
    def test_news_are_told_while_a_device_computes_the_next(self, monkeypatch, apart):
        engine = Engine(text_model(), byte_tokenizer(), slots=2)
        engine._computes_apart = apart
        requests = [Request([i], 9, stop_tokens=()) for i in (1, 2)]
        expected = [Engine(text_model(), byte_tokenizer()).generate(x)[0] for x in requests]
        worker, events = EngineWorker(engine), []
        for name in ("sampler", "_accept"):
            call = getattr(engine, name)
            monkeypatch.setattr(engine, name, Watched(call, name, events))
        told = lambda generation, delta: events.append(f"told {generation.prompt[0]}")
        worker.start()
        try:
            generations = worker.submit(requests, told)
            wait_until(lambda: worker.unfinished == 0)
        finally:
            worker.stop()
        assert [(g.text, g.tokens) for g in generations] == [(g.text, g.tokens) for g in expected]
        # both prompts are read first
        launched, accepted, news = "sampler", "_accept", ["told 1", "told 2"]
        first = 2 * [launched, accepted] + [launched, accepted]
        later = [launched, *news, accepted] if apart else [*news, launched, accepted]
        assert events == first + 7 * later + news

    def test_news_are_told_though_the_next_step_fails(self, monkeypatch):
        engine, told = Engine(text_model(), slots=2), []
        worker, forward = EngineWorker(engine), engine.decoder._forward
        calls = iter([forward])
        monkeypatch.setattr(engine.decoder, "_forward", lambda n: next(calls, fails)(n))
        engine._computes_apart = True
        worker.start()
        try:
            requests = [Request([1], tokens, stop_tokens=()) for tokens in (2, 9)]
            worker.submit(requests, lambda generation, delta: told.append(delta))
            wait_until(lambda: worker.unfinished == 0)
        finally:
            worker.stop()
        assert [(len(x.tokens), x.finish_reason) for x in told] == [(2, "length"), (2, "error")]

    @pytest.mark.parametrize("stops", [False, True])
    def test_a_cancellation_that_fails_is_a_step_that_fails(self, monkeypatch, stops):
        """The state that it would leave behind finds no memory."""
        engine, told = Engine(text_model(), slots=2, recent_states=2), {}
        worker, read = EngineWorker(engine), engine.states.read
        calls = iter([fails])
        monkeypatch.setattr(engine.states, "read", lambda *x: next(calls, read)(*x))
        worker.start()
        try:
            requests = [Request([i], 10**6, stop_tokens=()) for i in range(3)]
            listener = lambda generation, delta: told.update({generation: delta.finish_reason})
            generations = worker.submit(requests, listener)
            wait_until(lambda: len(told) == 2)
            if not stops:
                worker.cancel([generations[0], generations[2]])
                wait_until(lambda: worker.unfinished == 0)
                assert worker.accepts
                (last,) = worker.submit([Request([1], 9, stop_tokens=())], listener)
                wait_until(lambda: worker.unfinished == 0)
                assert told[last] == "length"
        finally:
            worker.stop()
        assert [told[x] for x in generations] == ["cancelled", "error", "cancelled"]
        assert worker.failure is None and not engine.has_work and worker.unfinished == 0

    def test_stopping_tells_every_listener(self):
        worker = EngineWorker(Engine(text_model(), slots=1))
        worker.start()
        told = []
        requests = [Request([1], 10**6, stop_tokens=())] * 3
        listener = lambda _, delta: told.append((delta.finish_reason, worker.accepts))
        worker.submit(requests, listener)
        wait_until(lambda: told)
        worker.stop()
        # what came now would be told nothing any more
        assert [x for x in told if x[0]] == [("cancelled", False)] * 3
        assert worker.unfinished == 0 and not worker.engine.has_work


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], pytest.param([signal.SIGINT] * 2, marks=pytest.mark.slow)],
    ids=["term", "int"],
)
def test_the_command_serves_a_folder_with_a_prefix_until_it_is_told_to_stop(tmp_path, signals):
    model, tokenizer = text_model(), byte_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    prefix = tokenizer("You are a long system prompt. ").input_ids
    save_state(tmp_path / "prefix", Engine(model).read(prefix), model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [warm_python.executable(), "-m", "rodimus", "serve", str(tmp_path / "model")]
    options = ["--port", str(port), "--prefix", str(tmp_path / "prefix"), "--slots", "2"]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    process = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        from tests.generation.serving import Client

        client = Client(port)
        for _ in range(600):
            try:
                assert client.get("/health")[0] == 200
                break
            except OSError:
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
        text = "You are a long system prompt. And now?"
        status, answer = client.complete(text, temperature=0, max_tokens=12, model="model")
        assert status == 200
        expected = Engine(model, tokenizer).generate([Request(tokenizer(text).input_ids, 12)])[0]
        assert answer["choices"][0]["text"] == expected.text
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prefix)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            # a second signal comes while the first waits for this
            endless = {"prompt": "x", "ignore_eos": True, "max_tokens": 4096, "stream": True}
            head = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(endless), head)
            connection.getresponse().read(100)
            for number in signals:
                process.send_signal(number)
                time.sleep(0.5)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors and "Application shutdown complete" in errors


@pytest.mark.parametrize(
    "page", ["http://a.org/", "http://A.org", "a.org", "http://a.org/x", "http://a.org ", ""]
)
def test_an_origin_that_no_browser_sends_is_refused(page, tmp_path):
    """Said before the model is loaded: there is none."""
    from rodimus.errors import InputError
    from rodimus.generation import server

    options = parse(
        ["serve", str(tmp_path), "--port=0", "--allow-origin=*", f"--allow-origin={page}"]
    )
    with pytest.raises(InputError, match=f"--allow-origin .* got '{page}'$"):
        server.run(options)


def test_the_options_of_the_command_reach_what_they_are_about(tmp_path, monkeypatch):
    from rodimus.generation.server import API_KEY_VARIABLE, _check_origins, _service

    text_model().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)

    def service(*options):
        return _service(parse(["serve", str(tmp_path), *options]))

    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    default = service()
    assert default.limits == Limits() and default.api_key is None
    assert default.worker.engine.layout.window_dtype is None
    assert default.worker.engine.prefixes.recent == 8 and not default.origins
    # another number each, so that none can be taken for another
    numbers = ["--slots=2", "--max-waiting=3", "--prefill-chunk=5", "--max-prompt-tokens=7"]
    numbers += ["--max-new-tokens=11", "--max-choices=13", "--max-body-bytes=17"]
    numbers += ["--recent-states=19", "--max-length=23"]
    pages = ["http://localhost:3000", "https://example.org", "http://[::1]:8080", "null", "app://x"]
    origins = [f"--allow-origin={page}" for page in pages]
    _check_origins([*pages, "*"])
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    told = service("--name=it", "--window-dtype=int8", *numbers, *origins)
    engine = told.worker.engine
    assert told.model_name == "it" and told.api_key == "secret"
    assert engine.layout.window_dtype == torch.int8
    assert (engine.slots, told.worker.max_waiting, engine.prefill_chunk) == (2, 3, 5)
    assert engine.prefixes.recent == 19 and told.origins == pages
    assert engine.max_length == 23 and default.worker.engine.max_length is None
    assert told.limits == Limits(prompt_tokens=7, new_tokens=11, choices=13, body_bytes=17)


def test_a_model_of_the_hub_is_called_by_its_name_there():
    from rodimus.generation.server import _name_of

    assert _name_of("owner/Rodimus") == _name_of("owner/Rodimus@v1.0") == "owner/Rodimus"


def test_the_command_warns_where_others_can_reach_it_without_a_key(monkeypatch, caplog):
    from rodimus.generation import server

    service = server.Service(
        EngineWorker(Engine(text_model(), byte_tokenizer())), model_name=NAME, api_key="secret"
    )
    listening = []
    monkeypatch.setattr(server, "_service", lambda options: service)
    monkeypatch.setattr(server._Server, "run", lambda self: None)
    create = lambda address, family: listening.append((*address, family)) or socket.socket()
    monkeypatch.setattr(socket, "create_server", create)
    for key, host, warned in (
        ("x", "::", 0),
        (None, "::1", 0),
        (None, "localhost", 0),
        (None, "0.0.0.0", 1),
    ):
        service.api_key = key
        server.run(parse(["serve", "model", "--host", host]))
        assert caplog.text.count(f"serving on {host} without an API key") == warned
    server.run(parse(["serve", "model"]))
    assert caplog.text.count("without an API key") == 1
    four, six = socket.AF_INET, socket.AF_INET6
    hosts = [("::", six), ("::1", six), ("localhost", four), ("0.0.0.0", four)]
    hosts.append(("127.0.0.1", four))
    assert listening == [(host, 8000, family) for host, family in hosts]


def test_the_command_keeps_connections_longer_than_clients_do():
    from rodimus.generation.server import _config

    config = _config(None, parse(["serve", "model", "--shutdown-seconds", "7"]))
    assert config.timeout_keep_alive > 60 and config.timeout_graceful_shutdown == 7


def test_the_model_has_its_folders_name_from_inside_too(tmp_path, monkeypatch):
    from rodimus.generation.server import _service

    folder = tmp_path / "model"
    text_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    monkeypatch.chdir(folder)
    for path in (".", "../model/"):
        assert _service(parse(["serve", path])).model_name == "model"


def test_the_command_refuses_what_is_wrong_in_one_line(tmp_path, capsys):
    from rodimus.errors import InputError
    from rodimus.generation.server import run

    def main(words):
        return run(parse(["serve", *words]))

    model, tokenizer = text_model(), byte_tokenizer()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no tokenizer"):
        main([str(tmp_path)])
    tokenizer.save_pretrained(tmp_path)
    text_model("rodimus").save_pretrained(tmp_path / "rodimus")
    tokenizer.save_pretrained(tmp_path / "rodimus")
    with pytest.raises(InputError, match="no attention window whose values could be int8"):
        main([str(tmp_path / "rodimus"), "--window-dtype", "int8"])
    with pytest.raises(InputError, match="name is no UTF-8 text"):
        main([str(tmp_path), "--name", "a\udcff"])
    with pytest.raises(InputError, match="cannot be read"):
        main([str(tmp_path), "--prefix", str(tmp_path / "nothing")])
    with pytest.raises(InputError, match="--device must be cpu"):
        main([str(tmp_path), "--device", "abacus"])
    for option, wrong in (("--port", 99999), ("--slots", 0), ("--max-length", -5)):
        with pytest.raises(SystemExit):
            main([str(tmp_path), option, str(wrong)])
        assert f"argument {option}: must be" in capsys.readouterr().err
    peer = Qwen2Config(hidden_size=32, num_hidden_layers=1, vocab_size=96)
    Qwen2ForCausalLM(peer).save_pretrained(tmp_path / "peer")
    tokenizer.save_pretrained(tmp_path / "peer")
    with pytest.raises(InputError, match="expected a Rodimus language model, .* is a Qwen2"):
        main([str(tmp_path / "peer")])
    assert END in tokenizer.get_vocab()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for host, reason in (("127.0.0.1", "Address already in use"), ("no host", "")):
            with pytest.raises(InputError, match=f"^cannot listen: {reason}.*'{host}', {port}"):
                main([str(tmp_path / "nothing"), "--host", host, "--port", port])
    for host in ("\u00e4..", "\udcff"):
        message = f"cannot listen: encoding of hostname failed ({host!r})"
        with pytest.raises(InputError, match=re.escape(message)):
            main([str(tmp_path / "nothing"), "--host", host])
