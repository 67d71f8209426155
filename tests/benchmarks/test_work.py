"""Bytes and operations of an operator, from what its record says or else from its shapes."""

import pytest

from benchmarks import records, report, work

FOUND = [r for r in records.read(report.HERE / "results") if r["group"].startswith(work.GROUPS)]
SHAPE = {"batch": 2, "context": 3, "dtype": "bfloat16"}
HEADS = {**SHAPE, "heads": 16, "head_dim": 8, "window": 2}
ITEMS = 2 * 3 * 8 * 2  # bytes of one head


def record(group, row=None, **settings):
    row = records.row("ours/x", "ours", "x", median_ms=0.5, **(row or {}))
    machine = {"name": "Test GPU"}
    return records.make(group, "b2", settings=settings, machine=machine, rows=[row])


@pytest.mark.parametrize(
    ("group", "settings", "expected"),
    [
        # each of 2 x 3 tokens writes and reads a state of 4 x 8, two operations an entry
        ("ddts-forward", {**SHAPE, "key_dim": 4, "value_dim": 8}, (None, 2 * 3 * 4 * 4 * 8)),
        ("ddts-training", {**SHAPE, "key_dim": 4, "value_dim": 8}, (None, 3 * 2 * 3 * 4 * 4 * 8)),
        ("ddts-step", {**SHAPE, "context": 1, "key_dim": 4, "value_dim": 8}, (None, 2 * 4 * 4 * 8)),
        # elementwise
        ("ddts-surroundings", {**SHAPE, "key_dim": 4, "value_dim": 8}, (None, None)),
        # 5 visible pairs a head and sequence; q, k, v and o
        ("attention-forward", HEADS, (49 * ITEMS, 2 * 16 * 2 * 2 * 8 * 5)),
        ("attention-training", HEADS, (131 * ITEMS, 2 * 16 * 7 * 2 * 8 * 5)),
        # a window of 2 rows, each of 17 heads
        ("attention-decode", HEADS, (2 * 2 * 17 * 8 * 2, 2 * 16 * 2 * 2 * 8 * 2)),
    ],
)
def test_shapes_say_what_a_run_has_to_do(group, settings, expected):
    made = record(group, **settings)
    assert work.of(made, made["rows"][0]) == expected


def test_what_the_row_says_is_taken():
    made = record("attention-decode", {"floor_bytes": 5, "flops": 7}, **HEADS)
    assert work.of(made, made["rows"][0]) == (5, 7)


def test_rates_follow_from_the_median():
    made = record("other", {"floor_bytes": 10**9, "flops": 10**12})
    assert work.rates(made, made["rows"][0]) == {"GBps": 2e3, "TFLOPs": 2e3}
    assert work.rates(made, {**made["rows"][0], "GBps": 1.0})["GBps"] == 1.0
    assert work.rates(record("other"), record("other")["rows"][0]) == {}


@pytest.mark.parametrize("found", FOUND, ids=lambda r: f"{r['group']}-{r['case']}")
def test_committed_rates_are_the_recorded_share_of_a_ceiling(found):
    """The floor of a record is its bytes at the copy rate, or its products at that of a GEMM."""
    is_product = found["group"] in ("attention-forward", "attention-training")
    rate, ceiling = ("TFLOPs", "gemm_TFLOPs") if is_product else ("GBps", "copy_GBps")
    for row in records.measured(found):
        share = work.rates(found, row)[rate] / found["ceilings"][ceiling]
        assert share == pytest.approx(row["floor_share"], rel=1e-9), row["target"]


def test_the_report_has_a_rate_of_every_operator():
    text = report.render(report.ordered(FOUND))
    for group in ("attention-decode", "attention-training", "ddts-forward", "ddts-step"):
        head = text.partition(f"\n## {group}\n\n")[2].partition("\n")[0]
        assert "| GBps | TFLOPs | floor_ms |" in head
    row = next(line for line in text.splitlines() if "| short_conv/triton |" in line)
    assert "| 3587 | 0.126 |" in row
