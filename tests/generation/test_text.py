"""Text as it comes: the tokenizer's own decoding is the truth, cut before the first stop string."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rodimus.errors import InputError
from rodimus.generation import Engine, Request, SamplingParams
from rodimus.generation.text import TextStream, decode, encode, skipped_tokens
from tests.generation.helpers import (
    END,
    begin_with,
    byte_tokenizer,
    cleaning_tokenizer,
    greedy,
    prompts_of,
    text_model,
    word_tokenizer,
)
from tests.model.helpers import build, config_of

SAMPLES = [
    "plain text",
    "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600\U0001f600 end",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "",
]


def released(tokenizer, tokens, stop=()):
    """Text after each token, and at the end."""
    stream = TextStream(tokenizer, stop)
    seen = []
    for token in tokens:
        stream.push(token)
        seen.append(stream.text)
        if stream.stopped:
            break
    stream.finish()
    return [*seen, stream.text], stream.stopped


class Shouting(PreTrainedTokenizerFast):
    def decode(self, *args, **options):
        return super().decode(*args, **options).upper()


@pytest.mark.parametrize("skip", [True, False])
def test_decoding_is_the_tokenizers_own(skip):
    for tokenizer in (byte_tokenizer(), word_tokenizer(), cleaning_tokenizer()):
        ids = [*range(0, len(tokenizer), 3), *tokenizer.all_special_ids, 1]
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": False}
        assert decode(tokenizer, ids, skip_special_tokens=skip) == tokenizer.decode(ids, **options)


def test_a_tokenizer_that_decodes_otherwise_is_asked_itself():
    inside = byte_tokenizer().backend_tokenizer
    shouting, patched = Shouting(tokenizer_object=inside), byte_tokenizer()
    patched.decode = lambda *args, **options: "patched"
    ids = byte_tokenizer()("a word").input_ids
    assert [decode(x, ids) for x in (shouting, patched)] == ["A WORD", "patched"]
    # it may show its special tokens, and does not tidy up
    assert not skipped_tokens(patched) and skipped_tokens(shouting) == {256}
    inside = cleaning_tokenizer().backend_tokenizer
    shouting = Shouting(tokenizer_object=inside, clean_up_tokenization_spaces=True)
    assert decode(shouting, [0, 1]) == " ONE ."


def test_a_prompt_has_the_tokens_that_are_asked_for_and_the_model_knows():
    tokenizer = begin_with(byte_tokenizer(), 256)
    assert encode(tokenizer, "!", 257) == [256, 0]
    assert encode(tokenizer, "!", 256, add_special_tokens=False) == [0]
    with pytest.raises(InputError, match="gives token 256, and the model knows 256"):
        encode(tokenizer, "!", 256)


@pytest.mark.parametrize("text", SAMPLES)
def test_pieces_add_up_to_the_text_and_are_never_taken_back(text):
    tokenizer = byte_tokenizer()
    seen, _ = released(tokenizer, tokenizer(text).input_ids)
    assert seen[-1] == text
    for before, after in itertools.pairwise(seen):
        assert after.startswith(before) and text.startswith(before)


def test_bytes_that_are_no_text_come_out_as_the_tokenizer_decodes_them():
    tokenizer = byte_tokenizer()
    for seed in range(20):
        (tokens,) = prompts_of(120, seed=seed, vocab=256)
        seen, _ = released(tokenizer, tokens.tolist())
        assert seen[-1] == tokenizer.decode(tokens)
        assert all(after.startswith(before) for before, after in itertools.pairwise(seen))


def byte_fallback_tokenizer():
    """As those of Llama 2: a character that the vocabulary lacks is a token for each of its bytes,
    and a run of such tokens that is no text is a mark for each of them."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    letters = {letter: 256 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    backend = Tokenizer(models.BPE({**bytes_, **letters}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    "text",
    [*SAMPLES, "\U0001f600x", 12 * "\U0001f600" + " the end", "aa" + 9 * "é", "aaa" + 9 * "世"],
)
def test_characters_in_bytes_of_their_own(text):
    tokenizer = byte_fallback_tokenizer()
    tokens = tokenizer(text.lower()).input_ids
    assert tokenizer.decode(tokens) == text
    seen, _ = released(tokenizer, tokens)
    assert seen[-1] == text
    for before, after in itertools.pairwise(seen):
        assert after.startswith(before) and text.startswith(before)


def test_endless_bytes_that_are_no_text_are_released():
    tokenizer = byte_fallback_tokenizer()
    seen, _ = released(tokenizer, [0xF0] * 1000)
    assert seen[-1] == "\ufffd" * 1000 and len(seen[-2]) >= 700


@pytest.mark.parametrize(
    "stop, expected",
    [
        (("xyz",), "one two aab aac three"),
        ((" three",), "one two aab aac"),
        (("aac",), "one two aab "),
        (("two aab aac three!", "aab a"), "one two "),
        (("b", "ab"), "one two a"),
        (("e",), "on"),
        (("one",), ""),
        (("ee?", "thr\u00e9"), "one two aab aac three"),
    ],
)
def test_text_ends_before_the_first_stop_string(stop, expected):
    tokenizer = byte_tokenizer()
    seen, stopped = released(tokenizer, tokenizer("one two aab aac three").input_ids, stop)
    assert seen[-1] == expected
    assert stopped == (expected != "one two aab aac three")
    assert all(expected.startswith(text) for text in seen)


def test_a_stop_string_may_be_complete_only_when_nothing_follows():
    """A character that has begun could still become another."""
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["b\ufffd"])
    for token in tokenizer("ab\u00e9").input_ids[:3]:
        stream.push(token)
        assert not stream.stopped
    stream.finish()
    assert stream.stopped and stream.text == "a"
    model, tokens = text_model(), itertools.cycle(tokenizer("ab\u00e9").input_ids[:3])
    model.lm_head.register_forward_hook(
        lambda *x: x[-1].index_fill(-1, torch.tensor([next(tokens)]), 1e4)
    )
    engine = Engine(model, tokenizer)
    (found,) = engine.generate(Request([1], 3, stop=("b\ufffd",)))
    assert (found.text, found.finish_reason) == ("a", "stop")
    found = engine.submit(Request([1], 4, stop=("b\ufffd",)))
    while len(found.tokens) < 3:
        engine.step()
    engine.cancel(found)
    assert (found.text, found.finish_reason) == ("a", "cancelled")


def test_the_engine_stops_at_a_string_that_spans_tokens():
    model, tokenizer = text_model(), byte_tokenizer()
    (prompt,) = prompts_of(10, vocab=257)
    whole = tokenizer.decode(greedy(model, prompt, 60))
    stop = whole[20:24]
    engine = Engine(model, tokenizer)
    deltas = list(engine.stream(Request(prompt, 60, stop=(stop, "never there"), stop_tokens=())))
    text = "".join(delta.text for delta in deltas)
    assert text == whole[: whole.index(stop)] and deltas[-1].finish_reason == "stop"
    assert sum(len(delta.tokens) for delta in deltas) < 60


def test_an_end_token_is_not_part_of_the_text():
    model, tokenizer = text_model(), byte_tokenizer()
    (prompt,) = prompts_of(10, vocab=257)
    tokens = greedy(model, prompt, 12)
    request = Request(prompt, 12, SamplingParams(), stop_tokens=(tokens[6],))
    found = Engine(model, tokenizer).generate([request])[0]
    assert found.tokens == tokens[: tokens.index(tokens[6]) + 1]
    assert found.text == tokenizer.decode(found.tokens[:-1])


@pytest.mark.parametrize("every", [3, 50, 1000])
def test_looking_seldom_gives_the_same_text(every):
    """Tokens between two looks are decoded together; bytes that are no text among them."""
    tokenizer = byte_tokenizer()
    (tokens,) = prompts_of(200, vocab=256)
    tokens = [*tokenizer(SAMPLES[1]).input_ids, *tokens.tolist()]
    stream, seen = TextStream(tokenizer), ""
    for i, token in enumerate(tokens):
        stream.push(token)
        if i % every == 0:
            assert stream.text.startswith(seen)
            seen = stream.text
    stream.finish()
    assert stream.text.startswith(seen) and stream.text == tokenizer.decode(tokens)


class Counting:
    """A tokenizer that counts how often it decodes, and how many tokens at most."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls, self.most = tokenizer, 0, 0

    def decode(self, ids, **options):
        self.calls, self.most = self.calls + 1, max(self.most, len(ids))
        return self.tokenizer.decode(ids, **options)

    def __call__(self, *arguments, **options):
        return self.tokenizer(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


# in the alphabet's order: bytes of no text, and of half a character
STRAYS = {"text": [], "no text": [187], "half a character": [172, 253]}


@pytest.mark.parametrize("stop", [(), ("never",)], ids=["no stop strings", "stop strings"])
@pytest.mark.parametrize("stray", STRAYS.values(), ids=STRAYS)
@pytest.mark.parametrize("nothing", [256, 400], ids=["ends of text", "ids without a token"])
def test_a_run_of_tokens_without_text_costs_a_few_decodings_each(nothing, stray, stop):
    tokenizer = Counting(byte_tokenizer())
    assert tokenizer.convert_tokens_to_ids(END) == 256 and tokenizer.decode([187]) == "\ufffd"
    tokens = tokenizer("exactly twenty bytes").input_ids + stray + [nothing] * 2000 + [246, 222]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    if nothing == 256 and stray == STRAYS["half a character"]:
        assert expected == "exactly twenty bytes\U0001f600"
    stream = TextStream(tokenizer, stop)
    for token in tokens:
        tokenizer.calls = tokenizer.most = 0
        stream.push(token)
        text = stream.text
        assert tokenizer.calls <= 10 and tokenizer.most < 600
        assert nothing != 256 or expected.startswith(text)
    stream.finish()
    if nothing == 256 or stray != STRAYS["half a character"]:
        assert stream.text == expected


@pytest.mark.parametrize("stray", STRAYS.values(), ids=STRAYS)
def test_a_long_text_read_at_its_end_is_decoded_once(stray):
    tokenizer = Counting(byte_tokenizer())
    tokens = prompts_of(2000, vocab=94)[0].tolist() + [256] * 9 + stray + [256] * 9
    stream = TextStream(tokenizer)
    for token in tokens:
        stream.push(token)
    tokenizer.calls = 0
    stream.finish()
    assert stream.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert tokenizer.calls == 2


@pytest.mark.parametrize("ends", range(4))
def test_a_character_that_has_begun_is_held_back_though_a_stray_byte_is_near(ends):
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a" * 600).input_ids + STRAYS["no text"] + tokenizer("aa").input_ids
    character = tokenizer("\U0001f600").input_ids
    stream = TextStream(tokenizer)
    for token in tokens + character[:ends]:
        stream.push(token)
    assert stream.text == "a" * 600 + "\ufffdaa"
    for token in character[ends:]:
        stream.push(token)
        assert stream.text in ("a" * 600 + "\ufffdaa", "a" * 600 + "\ufffdaa\U0001f600")
    assert stream.text.endswith("\U0001f600")


ONE, TWO, THREE, BLANK, S, BYTE, BEGIN = range(7)


@pytest.mark.parametrize(
    "prompt",
    [[BEGIN, ONE], [ONE, BEGIN], [ONE, BYTE], [ONE, BLANK], [BEGIN]],
    ids=["word", "special", "part of a character", "blank", "no word"],
)
@pytest.mark.parametrize("tokens", [[TWO, S, THREE], [S, TWO], [BLANK, TWO], [BEGIN, BLANK, TWO]])
def test_a_prompt_and_its_continuation_make_the_text_of_both(prompt, tokens):
    tokenizer = word_tokenizer()
    assert tokenizer.decode([TWO, S]) == "twos" and tokenizer.decode([ONE, TWO]) == "one two"
    stream = TextStream(tokenizer, prompt=prompt)
    for token in tokens:
        stream.push(token)
    stream.finish()
    before, both = (
        tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + tokens)
    )
    assert before + stream.text == both


def test_bytes_go_on_from_a_prompt_that_ends_within_a_character():
    tokenizer = byte_tokenizer()
    first, second = tokenizer("\u00e9").input_ids
    stream = TextStream(tokenizer, prompt=[0, first])
    for token in (second, 1):
        stream.push(token)
    assert stream.text == '\ufffd"' == tokenizer.decode([second, 1])


def test_blanks_before_a_full_stop_stay():
    tokenizer = cleaning_tokenizer()
    assert tokenizer.decode([0, 1]) == " one."
    stream = TextStream(tokenizer, prompt=[0, 1])
    for token in (2, 1):
        stream.push(token)
    assert stream.text == " two ."


def test_the_engine_continues_the_prompts_text():
    model, tokenizer = text_model(), word_tokenizer()
    model.lm_head.register_forward_hook(lambda *x: x[-1].index_fill(-1, torch.tensor([TWO]), 1e4))
    prompt = torch.tensor([BEGIN, ONE])
    for stop, text in (((), " two two two"), ((" two two",), "")):
        request = Request(prompt, 3, stop=stop)
        assert Engine(model, tokenizer).generate(request)[0].text == text


class Panic(BaseException):
    """As tokenizers in Rust raise it: no ``Exception``."""


class Refusing(Counting):
    """A tokenizer that decodes all tokens but one."""

    def __init__(self, token, error):
        super().__init__(byte_tokenizer())
        self.token, self.failure = token, error

    def decode(self, ids, **options):
        if self.token in ids:
            raise self.failure
        return super().decode(ids, **options)


@pytest.mark.parametrize("error", [KeyError("no such token"), Panic("no such token")])
@pytest.mark.parametrize("stop", [(), ("never",)], ids=["no stop strings", "stop strings"])
@pytest.mark.parametrize("place", ["prompt", "middle", "end"])
def test_a_sequence_whose_tokens_have_no_text_ends_alone(place, stop, error):
    model, healthy = text_model(), [1, 2]
    (tokens,) = (g.tokens for g in Engine(model).generate(Request([3, 4], 9)))
    token = {"prompt": 4, "middle": tokens[4], "end": tokens[-1]}[place]
    end = tokens.index(token) + 1 if place != "prompt" else 1
    engine = Engine(model, Refusing(token, error), slots=2)
    expected = Engine(model).generate(Request(healthy, 9))[0].tokens
    assert token not in expected
    requests = [Request(healthy, 9), Request([3, 4], end, stop=stop)]
    whole, broken = engine.generate(requests)
    assert (whole.tokens, whole.finish_reason) == (expected, "length")
    assert broken.finish_reason == "error" and "no such token" in broken.error
    assert broken.tokens == tokens[:end]
    # nobody looks at a text without stop strings before its end
    assert broken.text == (byte_tokenizer().decode(tokens[: end - 1]) if stop else "")


def test_tokens_that_the_tokenizer_does_not_know_have_no_text():
    model = build(config_of("rodimus_plus") | {"vocab_size": 260})
    engine = Engine(model, Refusing(258, KeyError("no such token")))
    (found,) = engine.generate(Request([258], 3, SamplingParams(logit_bias={258: 100})))
    assert found.tokens == [258] * 3
    assert (found.text, found.finish_reason) == ("", "length")


def test_a_sequence_whose_text_was_asked_for_in_vain_ends_with_its_next_token():
    model = text_model()
    tokens = Engine(model).generate(Request([3, 4], 20))[0].tokens
    engine = Engine(model, Refusing(tokens[3], KeyError("no such token")))
    deltas = list(engine.stream(Request([3, 4], 20)))
    assert deltas[-1].finish_reason == "error" and len(deltas) < 6
    assert "".join(x.text for x in deltas) == byte_tokenizer().decode(tokens[:3])


def test_a_cancelled_sequence_whose_tokens_have_no_text_is_cancelled():
    model = text_model()
    token = Engine(model).generate(Request([3, 4], 1))[0].tokens[0]
    engine = Engine(model, Refusing(token, KeyError("no such token")))
    generation = engine.submit(Request([3, 4], 20))
    engine.step()
    engine.cancel(generation)
    assert (generation.finish_reason, generation.error) == ("cancelled", None)
    assert engine.stats.finished == {"cancelled": 1}


def test_text_grows_no_further_after_an_error():
    stream = TextStream(Refusing(1, KeyError("no such token")), stop=["##"])
    for token in (0, 2, 1):
        stream.push(token)
    stream.finish()
    assert stream.text == "!" and isinstance(stream.error, KeyError)


def test_a_tokenizer_is_interrupted_as_anything_is():
    with pytest.raises(KeyboardInterrupt):
        Engine(text_model(), Refusing(4, KeyboardInterrupt())).generate(Request([3, 4], 9))
