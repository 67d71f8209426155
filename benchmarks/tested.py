"""Turns JUnit reports of test runs on this machine into one record, for ``RESULTS.md``.

    python -m benchmarks.tested [--out DIR] RUN.xml [RUN.xml ...]

``make gpu`` calls it. A missing report is a run that crashed or was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from . import machine, records

GROUP = "tests"
OUTCOMES = ("passed", "failed", "skipped")


def row(report: Path) -> dict[str, Any]:
    """What one run of pytest found: counts of ``OUTCOMES``, seconds, and names of failed tests.

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
    )


def _outcome(case: ElementTree.Element) -> str:
    found = {child.tag for child in case}
    if found & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in found else "passed"


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the record; 1 if a test failed or a run has no result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", metavar="RUN.xml")
    parser.add_argument("--out", type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    about = machine.describe(machine.device())
    own = machine.RESULTS / machine.folder_name(about["name"])
    rows = [row(report) for report in options.reports]
    record = records.make(GROUP, "gpu", settings={"marked": "gpu"}, machine=about, rows=rows)
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
