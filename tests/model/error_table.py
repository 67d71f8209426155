"""A plugin that prints, after the run, the measured error of every comparison with a bound.

A test reports through the ``measure`` fixture; the numbers travel with the test report, so the
table is whole when the suite runs in several processes.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import pytest

_measured: dict[str, dict[str, dict[str, tuple[float, float]]]] = defaultdict(dict)


@pytest.fixture
def measure(record_property) -> Callable[..., None]:
    """``measure(table, row, column, error, bound)``: assert the bound, print the error later."""

    def measure(table: str, row: str, column: str, error: float, bound: float) -> None:
        record_property("measured_error", [table, row, column, float(error), float(bound)])
        assert error <= bound, f"{row} ({column}): error {error:.3g} exceeds {bound:.3g}"

    return measure


def pytest_runtest_logreport(report):
    if report.when != "call":
        return
    for name, value in report.user_properties:
        if name != "measured_error":
            continue
        table, row, column, error, bound = value
        cells = _measured[table].setdefault(row, {})
        before = cells.get(column, (0.0, bound))[0]
        worst = error if math.isnan(error) else max(before, error)
        cells[column] = (worst, bound)


def pytest_terminal_summary(terminalreporter):
    for table, rows in sorted(_measured.items()):
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
