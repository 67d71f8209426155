"""Records are whole, checked, and say why something was not measured."""

import json

import pytest

from benchmarks import records

ROW = {"target": "a", "family": "f", "engine": "e", "status": "measured", "median_ms": 1.0}


def record(**changes):
    parts = {"settings": {}, "machine": {"name": "m"}, "rows": [ROW]}
    return records.make("decode", "b1", **{**parts, **changes})


def test_a_written_record_is_read_back_equal(tmp_path):
    written = record(warnings=["machine busy"], load=(1.0, 2.0))
    path = records.write(written, tmp_path / "machine")
    assert path.name == "decode-b1.json"
    assert records.read(tmp_path) == [written]


def test_a_failed_write_keeps_the_old_record(tmp_path):
    path = records.write(record(), tmp_path)
    before = path.read_text()
    broken = {**record(), "ceilings": {"copy_GBps": float("nan")}}
    with pytest.raises(ValueError):
        records.write(broken, tmp_path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_skipped_row_needs_its_reason():
    reason = "rwkv is not installed"
    assert records.skipped("a", "f", "e", reason)["reason"] == reason
    with pytest.raises(records.RecordError, match="a is skipped without a reason"):
        record(rows=[records.skipped("a", "f", "e", "")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": None}, "'settings'"),
        ({"schema": "other/1"}, "schema must be"),
        ({"rows": [{"target": "a"}]}, "row of a: 'family'"),
        ({"rows": [{**ROW, "status": "lost"}]}, "status of a must be one of"),
        ({"rows": [ROW, ROW]}, "appears twice"),
    ],
)
def test_a_record_that_breaks_the_schema_is_refused(changes, message):
    with pytest.raises(records.RecordError, match=message):
        records.check({**record(), **changes})


def test_other_json_files_are_left_alone_and_broken_ones_named(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"triton": "3.9"}))
    assert records.read(tmp_path) == []
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(records.RecordError, match=r"broken\.json is not JSON"):
        records.read(tmp_path)
