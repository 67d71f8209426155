"""Records to ``RESULTS.md`` and plots: what loses first, with the reason, then everything.

    python -m benchmarks.report [--results DIR] [--out DIR] [--docs] [--check]

With ``--docs`` also the measured tables and figures of README and docs/ (:mod:`benchmarks.docs`).
Nothing is typed by hand: the same records give the same text, byte for byte. Verdicts follow the
interval of the ratio, not its middle: where it encloses 1 nothing is claimed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import docs, peers, plots, records, tested, timing
from .records import RecordError, measured, model_of

HERE = Path(__file__).parent
Record = Mapping[str, Any]
Row = Mapping[str, Any]

# group: title, and what a call of it is
TIMED = {
    "decode": ("Decoding", "token"),
    "prefill": ("Prefill", "prompt"),
    "train": ("Training step", "step"),
}
ENOUGH_COVERAGE = 0.9
UNITS = ("B", "kB", "MB", "GB", "TB")


class Verdict(NamedTuple):
    """One of our targets against one baseline in one case."""

    machine: str
    group: str
    case: str
    ours: str
    baseline: str
    ratio: timing.Ratio
    reason: str

    @property
    def kind(self) -> str:
        """``loses``, ``wins``, or ``open`` where the interval encloses 1 or rests on few rounds."""
        if self.ratio.coverage < ENOUGH_COVERAGE:
            return "open"
        if self.ratio.high < 1:
            return "loses"
        return "wins" if self.ratio.low > 1 else "open"


# ----------------------------------------------------------------------------------------------
# Reading records
# ----------------------------------------------------------------------------------------------


def ordered(found: Iterable[Record]) -> list[Record]:
    """Records by machine, group, dtype, batch and context, whatever their files are called."""

    def key(record: Record) -> tuple:
        settings = record["settings"]
        place = (settings.get("batch", 0), settings.get("context", 0))
        names = (record["machine"]["name"], record["group"], str(settings.get("dtype")))
        return (*names, *place, record["case"])

    return sorted(found, key=key)


def fastest(record: Record) -> dict[str, Row]:
    """Each model's fastest engine in a record."""
    best: dict[str, Row] = {}
    for row in measured(record):
        name = model_of(row)
        if "median_ms" in row and (name not in best or row["median_ms"] < best[name]["median_ms"]):
            best[name] = row
    return best


def verdicts(found: Iterable[Record]) -> Iterator[Verdict]:
    """Our fastest engine of each model against each baseline's, in every timed case."""
    for record in (r for r in found if r["group"] in TIMED):
        best = fastest(record)
        for ours in (name for name in peers.OURS if name in best):
            for baseline in (name for name in peers.BASELINES if name in best):
                mine, theirs = best[ours], best[baseline]
                ratio = timing.ratio(
                    theirs["samples"]["wall_ms"],
                    mine["samples"]["wall_ms"],
                    record["settings"].get("sittings", ()),
                )
                yield Verdict(
                    record["machine"]["name"],
                    record["group"],
                    record["case"],
                    mine["target"],
                    theirs["target"],
                    ratio,
                    reason(mine, theirs),
                )


def reason(mine: Row, theirs: Row) -> str:
    """Why one row is slower or faster than another: its work, and how near it comes to the limit.

    What explains the verdict comes first: more work, or else the lower share of the limit.
    """
    if "moved_bytes" in mine:
        work, share, limit = "moved_bytes", "floor_share", "memory bandwidth"
        told = f"moves {size(mine[work])} per call against {size(theirs[work])}"
    else:
        work, share, limit = "flops", "share_of_gemm", "peak GEMM throughput"
        told = f"computes {mine[work] / 1e12:.3g} TFLOP per call against {theirs[work] / 1e12:.3g}"
    reached = f"reaches {mine[share]:.0%} of the {limit} against {theirs[share]:.0%}"
    slower = mine["median_ms"] > theirs["median_ms"]
    more = mine[work] > theirs[work]
    return f"{told}; {reached}" if slower == more else f"{reached}; {told}"


# ----------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes in the decimal unit that leaves one to three digits before the point."""
    for unit in UNITS:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{1000 * count:.0f} {unit}"


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """A Markdown table and a blank line."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def interval(ratio: Iterable[float]) -> str:
    """``1.24x (1.20 .. 1.31)``."""
    median, low, high, _ = ratio
    return f"{median:.2f}x ({low:.2f} .. {high:.2f})"


def render(found: list[Record], pictures: Mapping[str, str] | None = None) -> str:
    """The whole of ``RESULTS.md``.

    Args:
        found: Records in a stable order.
        pictures: Title and relative path of each.
    """
    lines = [
        "# Benchmark results",
        "",
        "Generated by `python -m benchmarks.report` from the records beside this file; never",
        "edited by hand. Weights are random, shapes are the published ones. Models are interleaved",
        "in one process. A ratio is the median of the rounds' ratios, with the interval that",
        "covers that median at 95 % (given enough rounds). Where a case was timed in several runs",
        "some time apart, the interval holds 95 % of all their rounds. Above 1 ours is faster.",
        "",
        "The bandwidth bound is the time to read weights, state and KV cache once. Where a record",
        "holds a memory read interleaved with the models, shares are of its bandwidth; all others",
        "are of rates measured once per run. On a machine whose speed changes in between they are",
        "off, even past 100 %.",
        "",
        "Engines: `dynamic` and `static` are the caches of transformers, `graph` is the static",
        "cache (of RWKV6 its own cache) in a captured CUDA graph, `engine` is this package's,",
        "`package` is the Python package `rwkv`, `own` is flash-linear-attention without a graph.",
        "`llama.cpp` runs on the CPU only. vLLM and SGLang were not measured.",
        "",
    ]
    groups: dict[str, list[Record]] = {}
    for record in found:
        groups.setdefault(record["group"], []).append(record)
    tests = groups.pop(tested.GROUP, [])
    found = [record for record in found if record["group"] in groups]
    lines += _machines(found, tests)
    lines += _verdict_section(found)
    for title, path in (pictures or {}).items():
        lines += [f"![{title}]({path})", ""]
    for group, (title, unit) in TIMED.items():
        lines += _timed_section(title, unit, groups.pop(group, []))
    lines += _memory_section(groups.pop("memory", []))
    lines += _quality_section(groups.pop("quality", []))
    for group in sorted(groups):
        lines += _other_section(group, groups[group])
    lines += _skipped_section(found)
    return "\n".join(lines).rstrip("\n") + "\n"


def _commit(about: Mapping[str, Any]) -> str:
    """The commit a record was made of, short, and whether files had changed since."""
    return about.get("commit", "unknown")[:12] + (" + changes" if about.get("dirty") else "")


def _machines(found: list[Record], tests: list[Record]) -> Iterator[str]:
    yield "## Where and when"
    yield ""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in found:
        about = record["machine"]
        versions = about.get("versions", {})
        used = f"torch {versions.get('torch')}, transformers {versions.get('transformers')}"
        key = about["name"], str(about.get("threads")), used, _commit(about)
        groups.setdefault(key, []).append(record)
    rows = []
    for key, members in sorted(groups.items()):
        loads = [x for record in members for x in record["load"]]
        dates = sorted(record["date"] for record in members)
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} .. {dates[-1]}"
        rows.append([*key, when, f"{min(loads):.1f} .. {max(loads):.1f}", str(len(members))])
    head = ["machine", "threads", "versions", "commit", "dates", "load", "records"]
    yield from table(head, rows)
    for record in tests:
        about, versions = record["machine"], record["machine"].get("versions", {})
        names = ("torch", "triton", "transformers")
        used = ", ".join(f"{name} {versions.get(name)}" for name in names)
        tests_of = f"{about['name']}: the gpu-marked tests of commit {_commit(about)}"
        yield f"- {tests_of}, {record['date']}, with {used}: {tested.told(record)}"
    disturbed: dict[tuple[str, str], list[str]] = {}
    for record in found:
        for warning in record["warnings"]:
            cases = disturbed.setdefault((record["machine"]["name"], warning), [])
            cases.append(f"{record['group']} {record['case']}")
    for (machine, warning), cases in disturbed.items():
        yield f"- {machine}: {warning}: {', '.join(cases)}"
    if tests or disturbed:
        yield ""


def _verdict_section(found: list[Record]) -> Iterator[str]:
    every = list(verdicts(found))
    titles = {
        "loses": "Where Rodimus loses",
        "open": "Where nothing can be claimed",
        "wins": "Where Rodimus wins",
    }
    for kind, title in titles.items():
        chosen = [v for v in every if v.kind == kind]
        memory = _memory_verdicts(found, kind)
        if not chosen and not memory:
            continue
        yield f"## {title}"
        yield ""
        yield from table(
            ["case", "ours", "against", "ratio", "why"],
            [
                [
                    f"{v.group} {v.case}, {v.machine}",
                    v.ours,
                    v.baseline,
                    interval(v.ratio),
                    v.reason,
                ]
                for v in chosen
            ]
            + memory,
        )


def _memory_verdicts(found: list[Record], kind: str) -> list[list[str]]:
    """Rows for state sizes: exact numbers, so every one is a win or a loss."""
    rows = []
    for record in (r for r in found if r["group"] == "memory"):
        states = {model_of(row): row for row in measured(record)}
        for ours in (name for name in peers.OURS if name in states):
            for baseline in (name for name in peers.BASELINES if name in states):
                mine, theirs = states[ours]["state_bytes"], states[baseline]["state_bytes"]
                if (mine > theirs) != (kind == "loses") or kind == "open":
                    continue
                why = "keys and values of the window" if states[ours]["cached_bytes"] else "state"
                rows.append(
                    [
                        f"memory {record['case']}, {record['machine']['name']}",
                        ours,
                        baseline,
                        f"{theirs / mine:.2f}x (exact)",
                        f"{size(mine)}, most of it {why}, against {size(theirs)}",
                    ]
                )
    return rows


def _timed_section(title: str, unit: str, found: list[Record]) -> Iterator[str]:
    if not found:
        return
    yield f"## {title}"
    yield ""
    for record in found:
        yield f"### {record['case']}, {record['machine']['name']}"
        yield ""
        rows, steps = [], record["settings"].get("steps", 1)
        timed = [row for row in measured(record) if "median_ms" in row]
        for row in sorted(timed, key=lambda row: row["median_ms"]):
            median, low, high = (
                _ms(row, name, steps) for name in ("median_ms", "p20_ms", "p80_ms")
            )
            rows.append(
                [
                    row["target"],
                    f"{median} ({low} .. {high})" + " noisy" * row["noisy"],
                    _ms(row, "median_cpu_ms", steps),
                    f"{row['tokens_per_s']:.4g}",
                    *(_ratio(row, name) for name in peers.BASELINES),
                    _share(row, steps),
                ]
            )
        head = ["model / engine", f"ms/{unit} (p20 .. p80)", "CPU ms", "tokens/s"]
        head += [f"faster than {name}" for name in peers.BASELINES]
        head += ["of the hardware bound"]
        yield from table(head, rows)
        for row in measured(record):
            yield from _step(row)


def _step(row: Row) -> Iterator[str]:
    """The bytes that one call needs besides the weights, and where its time goes."""
    if "step_bytes" in row:
        yield f"{row['target']} allocates {size(row['step_bytes'])} in a step, gradients included."
        yield ""
    if "kernels" not in row:
        return
    if "idle_ms" in row:
        yield (
            f"Its kernels take {row['kernels_ms']:.4g} ms; the device idles {row['idle_ms']:.3g} ms"
            " between the first and the last."
        )
        yield ""
    yield from table(
        [f"kernels of {row['target']}", "launches", "ms", "of all kernels"],
        [
            [f"`{k['name'][:60]}`", str(k["launches"]), f"{k['ms']:.3g}", f"{k['share']:.0%}"]
            for k in row["kernels"]
        ],
    )


def _ms(row: Row, name: str, steps: int) -> str:
    return f"{row[name] / steps:.4g}" if name in row else ""


def _ratio(row: Row, baseline: str) -> str:
    """By the wall, and by CPU time, which other programs on the machine disturb less."""
    if f"ratio_to_{baseline}" not in row:
        return ""
    by_cpu = row[f"cpu_ratio_to_{baseline}"][0]
    return f"{interval(row[f'ratio_to_{baseline}'])}, CPU {by_cpu:.2f}x"


def _share(row: Row, steps: int) -> str:
    if "floor_share" in row:
        return f"{row['floor_share']:.0%} (bound {_ms(row, 'floor_ms', steps)} ms)"
    if "share_of_gemm" in row:
        return f"{row['share_of_gemm']:.0%} of peak GEMM throughput"
    return ""


def _memory_section(found: list[Record]) -> Iterator[str]:
    if not found:
        return
    yield "## Memory"
    yield ""
    yield "Bytes kept between two tokens, counted on the tensors and equal to the formula."
    yield ""
    rows = []
    for record in found:
        for row in measured(record):
            rows.append(
                [
                    record["case"],
                    record["machine"]["name"],
                    row["target"],
                    size(row["weight_bytes"]),
                    size(row["state_bytes"]),
                    size(row["recurrent_bytes"]),
                    size(row["cached_bytes"]),
                    size(row["step_bytes"]) if "step_bytes" in row else "",
                    str(row.get("largest_batch_computed", "")),
                ]
            )
    head = ["case", "machine", "model / engine", "weights", "state", "recurrent", "keys, values"]
    yield from table([*head, "step besides", "largest batch (computed)"], rows)


def _numbers(name: str) -> tuple[list[int], str]:
    """Order of tests: by the lengths in their names."""
    return [int(number) for number in re.findall(r"\d+", name)], name


def _quality_section(found: list[Record]) -> Iterator[str]:
    if not found:
        return
    yield "## Quality"
    yield ""
    for record in found:
        yield f"### {record['case']}, {record['machine']['name']}"
        yield ""
        if record["settings"].get("note"):
            yield record["settings"]["note"]
            yield ""
        rows = measured(record)
        names = sorted({name for row in rows for name in row["scores"]}, key=_numbers)
        yield from table(
            ["model", "parameters", "state bytes per layer", "best learning rate", "seeds", *names],
            [
                [
                    row["target"],
                    str(row["parameters"]),
                    str(row["state_bytes"]),
                    f"{row['lr']:.1e}",
                    str(row["seeds"]),
                    *(_score(row["scores"].get(name)) for name in names),
                ]
                for row in rows
            ],
        )


def _score(values: list[float] | None) -> str:
    """Mean of the seeds with the range where there are several."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ({min(values):.3f} .. {max(values):.3f})"


# numbers of operators and of the engine, in the order of their columns
_NUMBERS = (
    *("median_ms", "p20_ms", "p80_ms", "GBps", "TFLOPs", "floor_ms", "floor_share"),
    *("tokens_per_s", "requests"),
    *(f"{name}_p{p}_ms" for name in ("first_token", "between_tokens") for p in (50, 90, 99)),
)


def _other_section(group: str, found: list[Record]) -> Iterator[str]:
    """Records of operators and of the engine: every number that some row of the group has."""
    yield f"## {group}"
    yield ""
    every = [(record, row) for record in found for row in measured(record)]
    fields = [name for name in _NUMBERS if any(name in row for _, row in every)]
    rows = []
    for record, row in every:
        numbers = [f"{row[name]:.4g}" if name in row else "" for name in fields]
        rows.append([record["case"], record["machine"]["name"], row["target"], *numbers])
    yield from table(["case", "machine", "target", *fields], rows)


def _skipped_section(found: list[Record]) -> Iterator[str]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for record in found:
        for row in record["rows"]:
            if row["status"] == "skipped":
                key = (row["target"], row["reason"], record["machine"]["name"])
                reasons.setdefault(key, []).append(f"{record['group']} {record['case']}")
    if not reasons:
        return
    yield "## Not measured, and why"
    yield ""
    yield from table(
        ["model / engine", "reason", "machine", "cases"],
        [[*key, ", ".join(cases)] for key, cases in sorted(reasons.items())],
    )


def main(arguments: list[str] | None = None) -> int:
    """Write ``RESULTS.md`` and with ``--docs`` the documentation, or with ``--check`` tell whether
    they are what the records say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--docs", action="store_true", help="README and docs/ as well")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    path = options.out / "RESULTS.md"
    try:
        found = ordered(records.read(options.results))
        if not found:
            raise RecordError(f"no records under {options.results.name}: run `make bench` first")
        if options.check:
            same = path.read_text(encoding="utf-8") == render(found, plots.names(found))
            stale = [] if same else [path.name]
            stale += docs.update(write=False) if options.docs else []
            for name in stale:
                print(f"{name} is not what the records say")
            return 1 if stale else 0
        text = render(found, plots.draw_all(found, options.out))
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.name} from {len(found)} records")
        for name in docs.update() if options.docs else ():
            print(f"rewrote the measured parts of {name}")
    except (RecordError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
