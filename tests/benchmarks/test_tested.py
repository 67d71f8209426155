"""A run of tests becomes a record, and the report says what it found and of which commit."""

import math
import subprocess
import sys

import pytest

from benchmarks import machine, records, report, tested

MACHINE = {
    "name": "NVIDIA H200",
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"},
    "commit": "a" * 40,
    "dirty": False,
}
SUITE = """
import json

import pytest

@pytest.mark.parametrize("number", range(3))
def test_passes(number, record_property):
    for kind, error in {"all": 1e-7, "worst": abs(number - 1) * 1e-6}.items():
        record_property("measured_error", json.dumps(["logits", "cached", kind, error, 1e-5]))
    record_property("measured_error", json.dumps(["loss", "free", "all", 8.0, float("inf")]))

def test_fails(record_property):
    record_property("measured_error", json.dumps(["logits", "cached", "all", float("nan"), 1e-5]))
    assert False

@pytest.mark.skip
def test_is_skipped(): pass

@pytest.fixture
def broken():
    yield
    raise RuntimeError

def test_passes_and_breaks(broken): pass
"""


@pytest.fixture
def junit(tmp_path):
    """The report that pytest writes of ``SUITE``."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"--junitxml={tmp_path / 'tests.xml'}", "--rootdir", str(tmp_path), str(tmp_path)]
    subprocess.run(command, capture_output=True, cwd=tmp_path)
    return tmp_path / "tests.xml"


def test_what_passed_failed_and_was_skipped_is_counted(junit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "describe", lambda device: MACHINE)
    assert tested.main(["--out", str(tmp_path / "out"), str(junit)]) == 1
    (record,) = records.read(tmp_path / "out")
    (row,) = record["rows"]
    assert (row["target"], row["passed"], row["failed"], row["skipped"]) == ("tests", 3, 2, 1)
    assert row["failures"] == ["test_suite::test_fails", "test_suite::test_passes_and_breaks"]
    # of the tests that passed, and of errors that have a bound
    assert row["errors"] == {"logits": {"cached": {"all": [1e-7, 1e-5], "worst": [1e-6, 1e-5]}}}
    assert record["machine"] == MACHINE
    assert capsys.readouterr().out.startswith("wrote tests-gpu.json: 3 passed, 2 failed, 1 skipped")


def test_a_run_without_a_report_did_not_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "describe", lambda device: MACHINE)
    (tmp_path / "cut.xml").write_text("<testsuites><testsuite")
    for name in ("cut", "none"):
        assert tested.main(["--out", str(tmp_path), str(tmp_path / f"{name}.xml")]) == 1
        (record,) = records.read(tmp_path)
        told = f"0 passed, 0 failed, 0 skipped; {name}: no result: it crashed or was stopped"
        assert tested.told(record) == told


def record(*rows, case="gpu", **about):
    filled = [
        {"target": f"run{i}", "family": "tests", "engine": "pytest", "status": "measured", **row}
        for i, row in enumerate(rows)
    ]
    about = {**MACHINE, **about}
    return records.make("tests", case, settings={}, machine=about, rows=filled)


PASSED = {"passed": 900, "failed": 0, "skipped": 3, "seconds": 100.0, "failures": []}


def test_the_worst_of_several_errors_may_be_no_number():
    of = lambda *errors: tested.worst([("t", "r", "c", error, 1.0) for error in errors])
    assert of(0.25, 0.5, 0.125) == {"t": {"r": {"c": (0.5, 1.0)}}}
    for errors in ((math.nan, 0.5), (0.5, math.nan), (0.5, math.nan, 0.25)):
        assert math.isnan(of(*errors)["t"]["r"]["c"][0])


def test_the_report_tells_the_commit_whose_tests_ran():
    found = record(PASSED, {**PASSED, "passed": 100})
    text = report.render([found])
    assert (
        f"- NVIDIA H200: the gpu-marked tests of commit {'a' * 12}, {found['date']}, with torch"
        " 2.11.0, triton 3.6.0, transformers 5.17.0: 1000 passed, 0 failed, 6 skipped\n" in text
    )
    # and nothing else of the report is about them
    assert text.count("NVIDIA H200") == 1 and "## tests" not in text


def test_the_report_tells_which_tests_ran():
    found = record(PASSED, case="exactness", name="AMD EPYC", cpu="AMD EPYC", instructions="avx2")
    text = report.render([found])
    assert "- AMD EPYC (avx2): the tests that measure errors of commit aaaa" in text


def test_the_report_tells_failures_and_changed_files():
    failed = {**PASSED, "failed": 2, "failures": ["tests.a::b", "tests.a::c"]}
    text = report.render([record(failed, dirty=True)])
    assert f"commit {'a' * 12} + changes" in text
    assert "900 passed, 2 failed, 3 skipped; failed: tests.a::b, tests.a::c" in text
