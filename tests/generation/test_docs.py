"""Numbers in docs/generation.md: computed here, found there."""

import re
from pathlib import Path

import pytest

from rodimus import RodimusConfig
from rodimus.generation import state_bytes

ROOT = Path(__file__).parent.parent.parent
MODELS = {
    "Rodimus 1.4B": "rodimus_1b4",
    "Rodimus+ 130M": "rodimus_plus_130m",
    "Rodimus+ 340M": "rodimus_plus_340m",
    "Rodimus+ 1.6B": "rodimus_plus_1b6",
    "Rodimus+ 4B": "rodimus_plus_4b",
}
# longer than every window
LONG = 1_000_000
# a token of 28 layers with keys and values of 2 heads of 128 in bfloat16
GROWING = 28 * 2 * 2 * 128 * 2


def config_of(name: str) -> RodimusConfig:
    """A configuration of configs/model."""
    return RodimusConfig.from_json_file(ROOT / "configs" / "model" / f"{name}.json")


def row(label: str) -> str:
    """One row of the table."""
    config = config_of(MODELS[label])
    kinds = state_bytes(config, tokens=LONG)
    long, slot = sum(kinds.values()), sum(state_bytes(config).values())
    cells = [f"{size:,}" for size in (*kinds.values(), long, slot)]
    return f"| {label} | {' | '.join(cells)} |"


@pytest.fixture(scope="module")
def text():
    return (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("label", MODELS)
def test_the_table_states_the_bytes_of_the_formula(text, label):
    assert row(label) in text, f"expected the row {row(label)}"


def test_the_break_even_is_that_of_the_formula(text):
    flat = " ".join(text.split())
    assert f"keeps {GROWING:,} bytes a token" in flat
    for name in ("rodimus_plus_1b6", "rodimus_1b4"):
        tokens = sum(state_bytes(config_of(name), tokens=LONG).values()) // GROWING
        assert f"as large as {tokens:,}" in flat


def test_documented_options_exist(text):
    from rodimus.generation.server import _parser

    known = _parser().format_help()
    options = set(re.findall(r"(?<=[ `])--[a-z][a-z-]+", text)) - {"--seconds"}
    assert options and all(option in known for option in options), options
