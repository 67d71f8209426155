"""A real checkpoint, on the GPU where there is one:

    RODIMUS_CHECKPOINT=FOLDER_OR_HUB_ID pytest -m released

The same on a small random export, whose text nobody would measure.
"""

import math
import os
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from rodimus import RodimusForCausalLM, modeling_rodimus
from rodimus.evaluation.documents import read
from rodimus.evaluation.likelihood import evaluate
from rodimus.export import export
from rodimus.generation import Engine, Request, state_bytes
from rodimus.loading import load_tokenizer
from tests.checkpoints import save_model, save_released_tokenizer
from tests.generation.helpers import greedy
from tests.kernels.device import DEVICE
from tests.model.helpers import cache_bytes

TEXT = """\
Water moves around the Earth in a cycle that has no beginning and no end. The sun warms the surface
of the sea, and some of the water evaporates into the air. Warm air rises, and as it rises it cools,
so the vapour in it condenses into tiny drops, which we see as clouds. The wind carries the clouds
over the land. When the drops grow too heavy to stay in the air, they fall as rain, or as snow where
it is cold. Some of the rain runs down the hills into streams, the streams join into rivers, and the
rivers flow back to the sea. Some of it sinks into the ground, where the roots of plants take it up,
and the plants give it back to the air through their leaves. The rest fills the cracks in the rock
and comes out again years later, in a spring at the foot of a hill.
No water is lost on the way: the same water has been used again and again for billions of years.
"""
# base models of this size are near 0.9; one wrong bias or gate more than doubles that
BITS_PER_BYTE = 1.2
TOKENS = 64


class Checkpoint(NamedTuple):
    """A model in float32, in which its forms give the same tokens, and how it was loaded."""

    name: str
    model: RodimusForCausalLM
    info: dict
    is_trained: bool

    def prompt(self) -> torch.Tensor:
        """The beginning of the text, ``[T]``."""
        tokenizer = load_tokenizer(self.name)
        return tokenizer(TEXT[:400], return_tensors="pt").input_ids[0]


@pytest.fixture(
    scope="module", params=["random", pytest.param("released", marks=pytest.mark.released)]
)
def checkpoint(request, tmp_path_factory):
    name, is_trained = os.environ.get("RODIMUS_CHECKPOINT"), request.param == "released"
    if not is_trained:
        root = tmp_path_factory.mktemp("released")
        save_model(root / "checkpoint")
        save_released_tokenizer(root / "checkpoint")
        name = str(export(root / "checkpoint", root / "export"))
    elif name is None:
        pytest.skip("RODIMUS_CHECKPOINT names no checkpoint")
    options = {"trust_remote_code": True, "dtype": torch.float32, "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(name, **options)
    model.generation_config.eos_token_id = None
    return Checkpoint(name, model.to(DEVICE if is_trained else "cpu").eval(), info, is_trained)


def test_every_weight_has_its_place(checkpoint):
    assert type(checkpoint.model) is RodimusForCausalLM
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(checkpoint.info[kind] for kind in kinds)


def test_generate_the_engine_and_the_modules_give_the_same_tokens(checkpoint, monkeypatch):
    model, prompt = checkpoint.model, checkpoint.prompt()
    tokens = greedy(model, prompt, TOKENS)
    assert len(tokens) == TOKENS
    request = Request(prompt, TOKENS, stop_tokens=())
    assert Engine(model, slots=2).generate([request])[0].tokens == tokens
    monkeypatch.setattr(modeling_rodimus, "blocks_step", None)
    assert greedy(model, prompt, TOKENS) == tokens


def test_bits_a_byte(checkpoint, tmp_path, measure):
    (tmp_path / "text.txt").write_text(TEXT)
    model = checkpoint.model
    tokenizer = lambda: load_tokenizer(checkpoint.name)
    documents = read(
        str(tmp_path / "text.txt"), tokenizer=tokenizer, vocab_size=model.config.vocab_size
    )
    found = evaluate(model, documents).summary()
    assert found["bytes"] == len(TEXT)
    bound = BITS_PER_BYTE if checkpoint.is_trained else math.inf
    column = "released" if checkpoint.is_trained else "random"
    measure("checkpoint: bits a byte", "a text of its own", column, found["bits_per_byte"], bound)


@torch.no_grad()
def test_bytes_of_the_state(checkpoint):
    model = checkpoint.model
    ids = checkpoint.prompt()[None].to(model.device)
    cache = model(ids, use_cache=True).past_key_values
    held = cache_bytes(cache)
    expected = state_bytes(model.config, torch.float32, tokens=ids.shape[1])
    assert {kind: held.get(kind, 0) for kind in expected} == expected
