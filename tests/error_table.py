"""A plugin that prints, after the run, the measured error of every comparison with a bound.

A test reports through the ``measure`` fixture; the numbers travel with the test report, so the
table is whole when the suite runs in several processes, and a JUnit report holds them, from which
``benchmarks.tested`` makes a record.
"""

import json
from collections.abc import Callable

import pytest

from benchmarks.tested import ERROR, worst

_measured = []


def pytest_addoption(parser):
    parser.addoption("--measuring", action="store_true", help="only tests that measure an error")


def pytest_collection_modifyitems(config, items):
    if config.getoption("measuring"):
        others = [item for item in items if "measure" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "measure" in item.fixturenames]


@pytest.fixture
def measure(record_property) -> Callable[..., None]:
    """``measure(table, row, column, error, bound)``: assert the bound, print the error later."""

    def measure(table: str, row: str, column: str, error: float, bound: float) -> None:
        record_property(ERROR, json.dumps([table, row, column, float(error), float(bound)]))
        assert error <= bound, f"{row} ({column}): error {error:.3g} exceeds {bound:.3g}"

    return measure


def pytest_runtest_logreport(report):
    if report.when == "call":
        _measured.extend(json.loads(told) for name, told in report.user_properties if name == ERROR)


def pytest_terminal_summary(terminalreporter):
    for table, rows in sorted(worst(_measured).items()):
        terminalreporter.section(table)
        columns = sorted({column for cells in rows.values() for column in cells})
        width = max(len(row) for row in rows)
        terminalreporter.write_line(
            " " * width + "".join(f"  {column:>14}" for column in columns) + "       bound"
        )
        for row, cells in sorted(rows.items()):
            figures = (f"{cells[c][0]:.1e}" if c in cells else "-" for c in columns)
            bound = max(bound for _, bound in cells.values())
            terminalreporter.write_line(
                row.ljust(width) + "".join(f"  {text:>14}" for text in figures) + f"  {bound:10.0e}"
            )
