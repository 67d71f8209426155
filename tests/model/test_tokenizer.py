"""The released tokenizer layout loads without its code; the chat format is the published one."""

import json

import pytest
import torch
from jinja2 import TemplateError
from transformers import TOKENIZER_MAPPING, AutoTokenizer, PreTrainedTokenizerFast, pipeline

import rodimus
from tests.checkpoints import save_model, save_plain_tokenizer, save_released_tokenizer


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint folder in the released layout."""
    folder = tmp_path_factory.mktemp("released")
    save_model(folder)
    save_released_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(released):
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(released)


@pytest.mark.parametrize("trust", [None, False, True])
def test_loads_whatever_is_trusted(released, trust):
    """Asked for remote code, transformers would run the folder's, which cannot be imported."""
    tokenizer = AutoTokenizer.from_pretrained(released, trust_remote_code=trust)
    assert isinstance(tokenizer, rodimus.RodimusTokenizer)
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    assert (tokenizer.bos_token, tokenizer.gmask_token) == ("<|startoftext|>", "[gMASK]")


def test_registered_again_it_is_registered_once():
    """Every model that is loaded registers the package."""
    before = len(TOKENIZER_MAPPING)
    rodimus.register()
    assert len(TOKENIZER_MAPPING) == before


def test_tokens_are_those_of_the_file(released, tokenizer):
    """A class with a constructor is rebuilt by transformers from the vocabulary without merges."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(released / "tokenizer.json"))
    for text in ("hello world", "def f(x):\n    return x", "<role>HUMAN</role>über"):
        ids = tokenizer(text).input_ids
        assert ids == plain.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("hello").input_ids) == 1


def test_saved_again_it_needs_no_code(released, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()
    assert (tmp_path / "chat_template.jinja").is_file()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("hello world").input_ids == tokenizer("hello world").input_ids
    assert again.chat_template == tokenizer.chat_template
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["padding_side"] == "left"
    # as where this package is not installed
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (plain.padding_side, plain.pad_token) == ("left", "<|endoftext|>")


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["hello", "hello world"], padding=True, return_tensors="pt")
    assert batch.attention_mask.tolist()[0][0] == 0
    assert set(batch) == {"input_ids", "attention_mask"}


CHATS = {
    "one question": (
        [("user", "q")],
        "<role>HUMAN</role>q<role>ASSISTANT</role>",
    ),
    "system first": (
        [("system", "S"), ("user", "q")],
        "<role>SYSTEM</role>S<role>HUMAN</role>q<role>ASSISTANT</role>",
    ),
    "an empty system text is left out": (
        [("system", ""), ("user", "q")],
        "<role>HUMAN</role>q<role>ASSISTANT</role>",
    ),
    "turns": (
        [("user", "a"), ("assistant", "b"), ("user", "c")],
        "<role>HUMAN</role>a<role>ASSISTANT</role>b<role>HUMAN</role>c<role>ASSISTANT</role>",
    ),
    "tool": (
        [("user", "a"), ("assistant", "b"), ("tool", "t")],
        "<role>HUMAN</role>a<role>ASSISTANT</role>b<role>OBSERVATION</role>t<role>ASSISTANT</role>",
    ),
    "published names of the roles": (
        [("HUMAN", "a"), ("ASSISTANT", "b"), ("OBSERVATION", "t")],
        "<role>HUMAN</role>a<role>ASSISTANT</role>b<role>OBSERVATION</role>t<role>ASSISTANT</role>",
    ),
    "spaces and newlines stay": (
        [("user", "  a\n\n b ")],
        "<role>HUMAN</role>  a\n\n b <role>ASSISTANT</role>",
    ),
}


def messages(chat):
    """``(role, content)`` pairs as transformers wants them."""
    return [{"role": role, "content": content} for role, content in chat]


@pytest.mark.parametrize("name", CHATS)
def test_chat_format(tokenizer, name):
    chat, expected = CHATS[name]
    rendered = tokenizer.apply_chat_template(
        messages(chat), tokenize=False, add_generation_prompt=True
    )
    assert rendered == expected
    without = tokenizer.apply_chat_template(messages(chat), tokenize=False)
    assert without + "<role>ASSISTANT</role>" == rendered


def test_content_in_parts(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert rendered == "<role>HUMAN</role>ab"


def test_unknown_role_is_named(tokenizer):
    with pytest.raises(TemplateError, match="got 'critic'"):
        tokenizer.apply_chat_template(messages([("critic", "x")]), tokenize=False)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
NOT_TEXT = {
    "content must be text, got 'image'": {"content": [{"type": "image", "url": "a.png"}]},
    "no place for tool_calls": {"content": "", "tool_calls": [CALL]},
}


@pytest.mark.parametrize("message", NOT_TEXT)
def test_what_the_format_has_no_place_for_is_an_error(tokenizer, message):
    """Left out, the model would answer to something else."""
    with pytest.raises(TemplateError, match=message):
        tokenizer.apply_chat_template([{"role": "assistant", **NOT_TEXT[message]}], tokenize=False)


def test_tools_are_an_error_and_none_are_not(tokenizer):
    chat, expected = CHATS["one question"]
    options = {"tokenize": False, "add_generation_prompt": True}
    for none in (None, []):
        rendered = tokenizer.apply_chat_template(messages(chat), tools=none, **options)
        assert rendered == expected
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(TemplateError, match="no place for tools"):
        tokenizer.apply_chat_template(messages(chat), tools=tools, **options)
    said = [{"role": "assistant", "content": "b", "tool_calls": None}]
    rendered = tokenizer.apply_chat_template(said, tokenize=False)
    assert rendered == "<role>ASSISTANT</role>b"


def test_assistant_mask_covers_the_replies(tokenizer):
    encoded = tokenizer.apply_chat_template(
        messages([("user", "hello"), ("assistant", "hello world")]),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    mask = torch.tensor(encoded["assistant_masks"]).bool()
    ids = torch.tensor(encoded["input_ids"])
    assert tokenizer.decode(ids[mask]) == "hello world"


def test_pipeline_generates(released):
    generator = pipeline("text-generation", model=str(released), trust_remote_code=True)
    outputs = generator("hello", max_new_tokens=3, do_sample=False)
    assert outputs[0]["generated_text"].startswith("hello")


def test_plain_tokenizer_keeps_its_class(tmp_path):
    save_model(tmp_path)
    save_plain_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert not isinstance(tokenizer, rodimus.RodimusTokenizer)
    assert tokenizer.chat_template is None
    assert len(tokenizer("hello").input_ids) == 1
