"""Generation is O(1): bytes and time per token do not grow with the text, and nothing drifts."""

import time
from statistics import median

import pytest
import torch

from tests.model.golden_data import BLOCK_TYPES, golden_config, relative_max_error
from tests.model.helpers import build, cache_bytes, live_tensor_bytes, others_slow, random_ids
from tests.model.ways import in_pieces

TABLE = "long generation, against a fresh chunked prefill (max |a - b| / max |b|)"
BLOCK = 250


def tiny(block_type):
    """One layer of 16 channels: twenty thousand steps in seconds."""
    config = golden_config(block_type) | {"d_model": 16, "n_layer": 1}
    config["mixer_cfg"] |= {"mem_size": 8}
    if block_type == "rodimus_plus":
        config["attn_cfg"] |= {"num_heads": 2, "num_heads_v": 2}
    return build(config)


@pytest.mark.parametrize(
    ("tokens", "timed"), [(1_500, False), pytest.param(20_000, True, marks=pytest.mark.timing)]
)
@pytest.mark.parametrize("block_type", others_slow("rodimus_plus", BLOCK_TYPES), indirect=True)
@torch.no_grad()
def test_decoding_is_flat_in_memory_and_time(block_type, tokens, timed, measure):
    model = tiny(block_type)
    ids = random_ids(1, tokens)
    cache, logits, seconds, held, live = None, [], [], [], []
    for start in range(0, tokens, BLOCK):
        began = time.process_time()
        for t in range(start, start + BLOCK):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if t >= tokens - 50:
                logits.append(out.logits)
        seconds.append(time.process_time() - began)
        held.append(sum(cache_bytes(cache).values()))
        live.append(live_tensor_bytes())
    del out
    assert cache.get_seq_length() == tokens
    assert set(held) == {held[0]}
    assert max(live[2:-1]) <= live[1] + 65536
    # processor time of this process; the median forgives a noisy neighbour, growth is not noise
    third = len(seconds) // 3
    assert not timed or median(seconds[-third:]) < 1.5 * median(seconds[1 : 1 + third])
    assert all(layer.recurrent_states[0].isfinite().all() for layer in cache.layers)
    pieces = [512] * (tokens // 512) + [tokens % 512]
    expected = in_pieces(model, ids, [size for size in pieces if size])[:, -50:]
    error = relative_max_error(torch.cat(logits, 1), expected)
    measure(TABLE, f"{tokens} tokens one by one", block_type, error, 1e-5)


@torch.no_grad()
def test_bytes_of_a_longer_prompt(block_type):
    """A prompt of any length leaves a cache of the same size."""
    model = tiny(block_type)
    caches = (
        model(random_ids(1, length), use_cache=True).past_key_values for length in (20, 100, 1000)
    )
    assert len({sum(cache_bytes(cache).values()) for cache in caches}) == 1
