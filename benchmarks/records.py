"""Records of benchmarks: one JSON file per case, machine-written, with raw samples.

A record says what was asked (group, case, settings), where (machine, commit), and for every target
either what was measured or why it was not. Files are written whole or not at all.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rodimus.files import write_atomic

SCHEMA = "rodimus-bench/1"

RECORD_FIELDS = {
    "schema": str,
    "group": str,
    "case": str,
    "date": str,
    "settings": dict,
    "machine": dict,
    "ceilings": dict,
    "load": list,
    "warnings": list,
    "rows": list,
}

ROW_FIELDS = dict.fromkeys(("target", "family", "engine", "status"), str)

STATUSES = ("measured", "skipped")


class RecordError(ValueError):
    """A record that does not follow the schema; the message names the field."""


def make(
    group: str,
    case: str,
    *,
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    rows: list[dict[str, Any]],
    ceilings: Mapping[str, float] | None = None,
    load: tuple[float, float] = (0.0, 0.0),
    warnings: list[str] | None = None,
) -> dict[str, Any]:
    """A checked record of this moment.

    Args:
        group: What is measured, for instance ``decode``.
        case: One point of the group, for instance ``b1-t4096-bf16``; names the file.
        settings: dtype, batch, context, rounds, seed, scale and whatever else was asked.
        machine: From ``machine.describe``.
        rows: One per target; see ``skipped`` and ``check``.
        ceilings: From ``machine.ceilings``, in the same run.
        load: Cores that other programs kept busy before and during the benchmark.
        warnings: Disturbances, in words.
    """
    record = {
        "schema": SCHEMA,
        "group": group,
        "case": case,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": dict(settings),
        "machine": dict(machine),
        "ceilings": dict(ceilings or {}),
        "load": list(load),
        "warnings": list(warnings or []),
        "rows": rows,
    }
    check(record)
    return record


def row(target: str, family: str, engine: str, **fields: Any) -> dict[str, Any]:
    """The row of a target that was measured, with what was measured."""
    return {"target": target, "family": family, "engine": engine, "status": "measured", **fields}


def skipped(
    target: str, family: str, engine: str, reason: str, *, is_fault: bool = False
) -> dict[str, Any]:
    """The row of a target that could not be measured, and why; ``is_fault``: it is a model of ours
    and fails."""
    fault = {"fault": True} if is_fault else {}
    return row(target, family, engine, status="skipped", reason=reason, **fault)


def faults(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with models of ours, by target."""
    return [f"{row['target']}: {row['reason']}" for row in record["rows"] if row.get("fault")]


def measured(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a record that were measured."""
    return [row for row in record["rows"] if row["status"] == "measured"]


def model_of(target: str) -> str:
    """The model of a target: ``qwen2-1.5b`` of ``qwen2-1.5b/graph``."""
    return target.partition("/")[0]


def fastest(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The row of each model's fastest engine in a record."""
    best: dict[str, dict[str, Any]] = {}
    for row in measured(record):
        name = model_of(row["target"])
        if "median_ms" in row and (name not in best or row["median_ms"] < best[name]["median_ms"]):
            best[name] = row
    return best


def check(record: Mapping[str, Any]) -> None:
    """Raise RecordError, naming the field, unless the record follows the schema."""
    _check_fields(record, RECORD_FIELDS, "record")
    if record["schema"] != SCHEMA:
        raise RecordError(f"schema must be {SCHEMA!r}, got {record['schema']!r}")
    for row in record["rows"]:
        _check_fields(row, ROW_FIELDS, f"row of {row.get('target', '?')}")
        if row["status"] not in STATUSES:
            raise RecordError(
                f"status of {row['target']} must be one of {STATUSES}, got {row['status']!r}"
            )
        if row["status"] == "skipped" and not row.get("reason"):
            raise RecordError(f"{row['target']} is skipped without a reason")
    names = [row["target"] for row in record["rows"]]
    if len(set(names)) != len(names):
        raise RecordError(f"a target appears twice in {record['case']}: {names}")


def _check_fields(values: Mapping[str, Any], fields: Mapping[str, type], where: str) -> None:
    for name, kind in fields.items():
        if not isinstance(values.get(name), kind):
            raise RecordError(
                f"{where}: {name!r} must be {kind.__name__}, got {values.get(name)!r}"
            )


def path_of(record: Mapping[str, Any], folder: Path) -> Path:
    """Where a record lies in a folder of records."""
    return folder / f"{record['group']}-{record['case']}.json"


def write(record: Mapping[str, Any], folder: Path) -> Path:
    """Check a record and write it, atomically, over an older one of the same case."""
    check(record)
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(record, folder)
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, text)
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    """All records under a folder, checked, in the order of their paths.

    Raises:
        RecordError: a file is not a record; the message names it.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RecordError(f"{path.name} is not JSON: {error}") from error
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            continue
        check(record)
        found.append(record)
    return found
