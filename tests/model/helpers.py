"""Tiny models with the golden weights or lively random ones, on the running test's device."""

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache

from rodimus import RodimusConfig, RodimusForCausalLM
from rodimus.modeling_rodimus import CACHE_NAME
from tests.device import here
from tests.model.golden_data import golden_config, golden_weights, l2_error
from tests.model.oracle import Oracle, RoundedOracle

KINDS = ("rodimus", "rodimus_plus", "grouped")


def others_slow(quick: str, names: Iterable[str]) -> list:
    """Parameters of a test that takes seconds: all but one are left to the slow tests."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


ONE_KIND = pytest.mark.parametrize("kind", others_slow("rodimus_plus", KINDS), indirect=True)
"""Mark of a test whose other models are left to the slow tests."""
# How transformers says that a static cache is not rolled back: before 5.24 none was.
NO_ROLLBACK = "Static cache" if CACHE_NAME == "past_key_values" else "can be cropped"


def build(config: dict, weights: dict[str, Tensor] | None = None) -> RodimusForCausalLM:
    """A model in eval mode that stops at no token; lively random weights where none are given."""
    model = RodimusForCausalLM(RodimusConfig.from_dict(config))
    if weights is None:
        enliven(model)
    else:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
        model.tie_weights()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return here(model).eval()


def enliven(model: RodimusForCausalLM, seed: int = 0) -> None:
    """Move every parameter far from its initial value, so that none can be swapped or forgotten."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if "embeddings" in name or "lm_head" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 2:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.add_(0.3 * noise)


def golden_model(block_type: str) -> RodimusForCausalLM:
    return build(golden_config(block_type), golden_weights(block_type))


def config_of(kind: str) -> dict:
    """The config dict of a tiny model: a block type, or ``grouped`` for what releases leave unused.

    ``grouped`` is Rodimus+ with fewer value and key heads than query heads, RoPE on half of each
    head, a scaled and normed embedding, its own head, and no lower bound on the norm of keys.
    """
    if kind != "grouped":
        return golden_config(kind)
    config = golden_config("rodimus_plus")
    config["attn_cfg"] |= {"num_heads_k": 2, "num_heads_v": 2, "rotary_emb_dim": 8}
    config["attn_cfg"] |= {"rotary_emb_base": 500.0, "ffn_expand_ratio": 1.7}
    del config["mixer_cfg"]["normalize_epsilon"]
    return config | {
        "tie_word_embeddings": False,
        "use_scale_embedding": True,
        "use_norm_embedding": True,
    }


def model_of(kind: str) -> RodimusForCausalLM:
    """The tiny model of ``config_of(kind)``, with golden weights where there are some."""
    return build(config_of(kind)) if kind == "grouped" else golden_model(kind)


def oracle_of(model: RodimusForCausalLM, config: dict) -> Oracle:
    return Oracle(config, dict(model.named_parameters()))


@torch.no_grad()
def exact_and_rounded(model: RodimusForCausalLM, config: dict, ids: Tensor) -> tuple[Tensor, float]:
    """Logits of a model in bf16 as float64 has them, and the ``l2_error`` that bf16 has to make."""
    weights = dict(model.named_parameters())
    exact = Oracle(config, weights)(ids)
    return exact, l2_error(RoundedOracle(config, weights)(ids), exact)


def random_ids(batch: int, length: int, *, seed: int = 1, vocab: int = 97) -> Tensor:
    """Token ids >= 3: none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return here(torch.randint(3, vocab, (batch, length), generator=generator))


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Bytes of a cache by what they hold: ``recurrent``, ``convolution``, ``window``, ``other``.
    What a view keeps alive counts as a whole."""
    names = {
        "recurrent_states": "recurrent",
        "conv_states": "convolution",
        **dict.fromkeys(("keys", "values", "_keys", "_values", "ring"), "window"),
    }
    sizes: dict[str, int] = {}
    for layer in cache.layers:
        for name, value in vars(layer).items():
            kind = names.get(name, "other")
            for tensor in _tensors(value):
                sizes[kind] = sizes.get(kind, 0) + tensor.untyped_storage().nbytes()
    return {kind: size for kind, size in sizes.items() if size}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def live_tensor_bytes() -> int:
    """Bytes of every tensor the interpreter can still reach."""
    gc.collect()
    tensors = (found for found in gc.get_objects() if type(found) is torch.Tensor)
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
