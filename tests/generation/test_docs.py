"""Numbers in docs/generation.md: computed here, found there."""

import re
from pathlib import Path

import pytest
import torch

from rodimus import RodimusConfig, cli
from rodimus.generation import StateLayout, state_bytes
from tests.generation import int8_errors

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
KV_CACHE = 28 * 2 * 2 * 128 * 2


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


def int8_row(label: str) -> str:
    """One row of the table of 8-bit values."""
    config = config_of(MODELS[label])
    kinds = state_bytes(config, tokens=LONG)
    cells = []
    for window_dtype in (None, torch.int8):
        layout = StateLayout.of(config, torch.bfloat16, window_dtype=window_dtype)
        (layers, _, row), dtype = layout.slot_shapes()["window"]
        read = layers * layout.kept_rows(LONG) * row * dtype.itemsize
        whole = kinds["recurrent"] + kinds["convolution"] + read
        slot = sum(state_bytes(config, window_dtype=window_dtype).values())
        cells.append((row * dtype.itemsize, slot, whole // KV_CACHE))
    pairs = zip(*cells, strict=True)
    return f"| {label} | " + " | ".join(f"{size:,}" for pair in pairs for size in pair) + " |"


@pytest.fixture(scope="module")
def text():
    return (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("label", MODELS)
def test_the_table_states_the_bytes_of_the_formula(text, label):
    assert row(label) in text, f"expected the row {row(label)}"


@pytest.mark.parametrize("label", [label for label in MODELS if "+" in label])
def test_the_table_of_8_bit_values_states_the_bytes_of_the_formula(text, label):
    row = int8_row(label)
    assert row in text, f"expected the row {row}"
    if label == "Rodimus+ 1.6B":
        assert f"| {label} with 8-bit values | {row.split()[-2]} tokens |" in text


def test_the_errors_of_8_bit_values_are_those_that_are_printed(text):
    """To a fifth, shares of tokens to two in a hundred: sums are added in another order
    elsewhere."""
    for row in (row for table in int8_errors.tables() for row in table):
        name, *printed = row.strip("|").split("|")
        (line,) = [line for line in text.splitlines() if line.startswith(f"|{name}|")]
        for got, cell in zip(printed, line.strip("|").split("|")[1:], strict=True):
            near = {"abs": 2} if "%" in got else {"rel": 0.2}
            number = lambda text: float(text.strip(" %"))
            assert number(cell) == pytest.approx(number(got), **near), row


def test_the_break_even_is_that_of_the_formula(text):
    flat = " ".join(text.split())
    assert f"keeps {KV_CACHE:,} bytes per token" in flat
    for label in ("Rodimus+ 1.6B", "Rodimus 1.4B"):
        tokens = sum(state_bytes(config_of(MODELS[label]), tokens=LONG).values()) // KV_CACHE
        assert f"| {label} | {tokens:,} tokens |" in text


def test_readme_says_the_same_of_memory():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    kept = {
        label: sum(state_bytes(config_of(MODELS[label]), tokens=LONG).values())
        for label in ("Rodimus 1.4B", "Rodimus+ 1.6B")
    }
    plain, plus = kept.values()
    assert f"| Rodimus 1.4B | {plain / 1e6:.1f} MB at any length |" in readme
    assert f"| Rodimus+ 1.6B | {plus / 1e6:.0f} MB once past the window |" in readme
    int8 = int8_row("Rodimus+ 1.6B").split()[-2]
    assert f"up to {plus // KV_CACHE:,} tokens ({int8} with the engine's 8-bit values)" in readme


def test_documented_options_exist(text, capsys):
    assert cli.main(["serve", "--help"]) == 0
    known = capsys.readouterr().out
    of_other_programs = {"--seconds", "--model"}
    options = set(re.findall(r"(?<=[ `])--[a-z][a-z-]+", text)) - of_other_programs
    assert options and all(option in known for option in options), options
