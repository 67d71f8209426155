"""Tiny models and a tokenizer of bytes, for tests that generate text."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rodimus import RodimusConfig, RodimusForCausalLM
from rodimus.generation import Engine, Generation, Request
from tests.model.helpers import build, config_of

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ m['role']) }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
END = "<|end|>"

# the shapes of the released 1.6B model
RELEASED_PLUS = RodimusConfig(
    block_type="rodimus_plus",
    d_model=2048,
    n_layer=24,
    mixer_cfg={"mem_size": 64},
    attn_cfg={"window_size": 4096},
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, 0 to 255 in the alphabet's order, and 256 for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = chat_template
    return fast


def word_tokenizer() -> PreTrainedTokenizerFast:
    """As those of Llama 2: words begin with a blank, which the decoder takes from the first one."""
    words = [*(f"\u2581{word}" for word in ("one", "two", "three")), "\u2581", "s", "<0xC3>"]
    vocab = {word: i for i, word in enumerate(words)} | {"<s>": len(words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="s"))
    replace, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def cleaning_tokenizer() -> PreTrainedTokenizerFast:
    """As those of BERT's time: by default, decoding takes the blank before a full stop away."""
    backend = Tokenizer(models.WordLevel({" one": 0, " .": 1, " two": 2, "?": 3}, unk_token="?"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)


def begin_with(tokenizer: PreTrainedTokenizerFast, token: int) -> PreTrainedTokenizerFast:
    """Let a tokenizer put a token before every text, as many do; the tokenizer."""
    name = tokenizer.backend_tokenizer.id_to_token(token)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, token)]
    )
    return tokenizer


def text_model(kind: str = "rodimus_plus") -> RodimusForCausalLM:
    """A random model over the vocabulary of ``byte_tokenizer``, the same one every time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build(config_of(kind) | {"vocab_size": 257})


def prompts_of(*lengths: int, seed: int = 0, vocab: int = 97) -> list[Tensor]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


def alone(model, request: Request, **options) -> Generation:
    """The generation of one request in an engine of its own."""
    return Engine(model, slots=1, **options).generate([request])[0]


def greedy(model, prompt: Tensor, tokens: int) -> list[int]:
    """What ``model.generate`` continues the prompt with."""
    ids = prompt[None].to(model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return output[0, len(prompt) :].tolist()
