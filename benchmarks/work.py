"""Bytes and operations that a run of an operator cannot avoid, and the rates that follow.

Rows of operators have them if their benchmark counts them. For older records and other rows they
follow from the shapes: each input read once and each output written once, in each direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from . import sizes

GROUPS = ("ddts-", "attention-")

Record = Mapping[str, Any]
Row = Mapping[str, Any]


class Work(NamedTuple):
    """Work of one run; None where it is not counted."""

    bytes: float | None
    flops: float | None


def of(record: Record, row: Row) -> Work:
    """What one run of a row has to do."""
    operator, _, what = record["group"].partition("-")
    count = {"ddts": _ddts, "attention": _attention}.get(operator)
    by_shape = count(what, record["settings"]) if count else Work(None, None)
    return Work(row.get("floor_bytes", by_shape.bytes), row.get("flops", by_shape.flops))


def rates(record: Record, row: Row) -> dict[str, float]:
    """``GBps`` and ``TFLOPs`` of a row's median, those of the two whose work is counted."""
    counted = zip(("GBps", "TFLOPs"), of(record, row), (1e6, 1e9), strict=True)
    return {
        name: row.get(name, count / row["median_ms"] / unit)
        for name, count, unit in counted
        if count is not None
    }


def _ddts(what: str, settings: Mapping[str, Any]) -> Work:
    """Operations of the recurrence; each entry of the state as ``sizes.sequence_flops`` counts it.
    The operators around it have no products that count."""
    passes = {"forward": 1, "step": 1, "training": 3}.get(what)
    if passes is None:
        return Work(None, None)
    tokens = settings["batch"] * settings["context"]
    return Work(None, passes * tokens * 4 * settings["key_dim"] * settings["value_dim"])


def _attention(what: str, settings: Mapping[str, Any]) -> Work:
    """Two products of each visible pair forward, five backward; one key head."""
    batch, length, heads = (settings[name] for name in ("batch", "context", "heads"))
    dim, window = settings["head_dim"], settings["window"]
    head_bytes = batch * dim * getattr(torch, settings["dtype"]).itemsize
    product = 2 * batch * heads * dim
    if what == "decode":
        return Work(window * (heads + 1) * head_bytes, 2 * product * window)
    inputs, output, pairs = 2 * heads + 1, heads, sizes.visible_pairs(length, window)
    if what == "forward":
        return Work((inputs + output) * length * head_bytes, 2 * product * pairs)
    # backward reads inputs and the output's gradient, and writes those of the inputs
    return Work((3 * inputs + 2 * output) * length * head_bytes, 7 * product * pairs)
