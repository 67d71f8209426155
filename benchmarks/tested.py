"""Turns JUnit reports of test runs on this machine into one record, for ``RESULTS.md`` and README.

    python -m benchmarks.tested [--case CASE] [--out DIR] RUN.xml [RUN.xml ...]

``make gpu`` and ``make exactness`` call it. A missing report is a run that crashed or was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import machine, records

GROUP = "tests"
CASES = {"gpu": "the gpu-marked tests", "exactness": "the tests that measure errors"}
OUTCOMES = ("passed", "failed", "skipped")
ERROR = "measured_error"
"""Property of a test: JSON of the table, row and column of an error, the error and its bound."""

Errors = dict[str, dict[str, dict[str, tuple[float, float]]]]


def worst(measured: Iterable[tuple[str, str, str, float, float]]) -> Errors:
    """``(error, bound)`` by table, row and column; of several errors the largest, or NaN if one is
    NaN."""
    found: Errors = {}
    for table, row, column, error, bound in measured:
        cells = found.setdefault(table, {}).setdefault(row, {})
        before, _ = cells.get(column, (0.0, bound))
        cells[column] = (error if math.isnan(error) else max(before, error), bound)
    return found


def row(report: Path) -> dict[str, Any]:
    """What one run of pytest found: counts of ``OUTCOMES``, seconds, names of failed tests, and the
    errors that passed tests compared with a bound.

    Args:
        report: JUnit XML; its name without the suffix names the run.
    """
    try:
        suites = list(ElementTree.parse(report).iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return records.skipped(report.stem, GROUP, "pytest", "no result: it crashed or was stopped")
    cases = [case for suite in suites for case in suite.iter("testcase")]
    counts = Counter(map(_outcome, cases))
    return records.row(
        *(report.stem, GROUP, "pytest"),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        seconds=round(sum(float(suite.get("time", 0)) for suite in suites), 1),
        failures=[_name(case) for case in cases if _outcome(case) == "failed"],
        errors=worst(
            (*cell, error, bound)
            for case in cases
            if _outcome(case) == "passed"
            for *cell, error, bound in _measured(case)
            if math.isfinite(bound)
        ),
    )


def _outcome(case: ElementTree.Element) -> str:
    found = {child.tag for child in case}
    if found & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in found else "passed"


def _measured(case: ElementTree.Element) -> Iterator[tuple[str, str, str, float, float]]:
    for told in case.iter("property"):
        if told.get("name") == ERROR:
            yield json.loads(told.get("value"))


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the record; 1 if a test failed or a run has no result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", metavar="RUN.xml")
    parser.add_argument("--case", choices=CASES, default="gpu", help="what ran")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    about = machine.describe(machine.device())
    own = machine.RESULTS / machine.folder_name(about["name"])
    rows = [row(report) for report in options.reports]
    record = records.make(GROUP, options.case, settings={}, machine=about, rows=rows)
    path = records.write(record, options.out or own)
    print(f"wrote {path.name}: {told(record)}")
    return int(any(found.get("failed", 1) for found in rows))


def told(record: dict[str, Any]) -> str:
    """``120 passed, 1 failed, 3 skipped; persistent: no result: ...; failed: tests.a::b``."""
    rows = record["rows"]
    totals = (f"{sum(found.get(outcome, 0) for found in rows)} {outcome}" for outcome in OUTCOMES)
    parts = [", ".join(totals)]
    parts += [f"{found['target']}: {found['reason']}" for found in rows if "reason" in found]
    failures = [name for found in rows for name in found.get("failures", ())]
    parts += [f"failed: {', '.join(failures)}"] if failures else []
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
