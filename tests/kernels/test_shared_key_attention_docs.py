"""Numbers in docs/kernels/shared_key_attention.md: computed here, found there."""

from pathlib import Path

import pytest

from rodimus import RodimusConfig
from rodimus.generation import state_bytes

ROOT = Path(__file__).parent.parent.parent
# bytes of a number in bfloat16
ITEM = 2
# Qwen/Qwen2-1.5B, config.json: 28 layers, 2 key-value heads of 128
QWEN2 = 28 * 2 * 2 * 128 * ITEM
CONTEXTS = (512, 2048, 4096, 8192, 16384, 32768)


@pytest.fixture(scope="module")
def text():
    path = ROOT / "docs" / "kernels" / "shared_key_attention.md"
    return " ".join(path.read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def config():
    return RodimusConfig.from_json_file(ROOT / "configs" / "model" / "rodimus_plus_1b6.json")


def token_bytes(config, key_heads):
    """Keys and values of one token in all layers."""
    heads = key_heads + config.num_value_heads
    return config.n_layer * heads * config.head_dim * ITEM


def row(config, context):
    """Megabytes after a context: window, whole state, the same model with a key head per query
    head and the same window, Qwen2-1.5B."""
    kinds = state_bytes(config, tokens=context)
    full = kinds["window"] * token_bytes(config, config.num_attention_heads)
    sizes = (
        kinds["window"],
        sum(kinds.values()),
        full / token_bytes(config, config.num_key_value_heads),
        context * QWEN2,
    )
    return f"| {context:,} | " + " | ".join(f"{size / 1e6:.1f}" for size in sizes) + " |"


def test_bytes_a_token(text, config):
    ours, full = (
        token_bytes(config, heads)
        for heads in (config.num_key_value_heads, config.num_attention_heads)
    )
    assert f"| Rodimus+ 1.6B, 1 key head and 16 value heads | {ours:,} |" in text
    assert f"| the same with 16 key heads | {full:,} |" in text
    assert f"| Qwen2-1.5B, 2 key-value heads | {QWEN2:,} |" in text
    assert f"{ours / QWEN2:.1f} times" in text and f"{1 - ours / full:.0%} less" in text


@pytest.mark.parametrize("context", CONTEXTS)
def test_megabytes_after_a_context(text, config, context):
    assert row(config, context) in text, f"expected {row(config, context)}"


def test_break_even(text, config):
    whole = sum(state_bytes(config, tokens=10**6).values())
    tokens = -(-whole // QWEN2)
    assert f"from {tokens:,} tokens on" in text, f"expected from {tokens:,} tokens on"
