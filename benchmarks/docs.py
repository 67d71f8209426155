"""Tables and figures in README and docs/ that come from the committed records.

    python -m benchmarks.report --docs

A table stands below a line ``<!-- measured: NAME -->``, a figure of a sentence between
``<!--NAME-->`` and ``<!--/-->``. Both are computed here from ``results/NVIDIA_H200`` and
``results/AMD_EPYC`` and rewritten in place. Figures called ``run_*`` are machine, days, commit and
versions of the records behind a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from . import records, timing
from .bench_attention import flops
from .harness import READ
from .machine import RESULTS, ROOT
from .records import RecordError

GPU, CPU = "NVIDIA_H200", "AMD_EPYC"

TABLE = re.compile(r"(<!-- measured: ([a-z0-9_]+) -->\n)((?:\|.*\n)+)")
VALUE = re.compile(r"(<!--([a-z0-9_]+)-->)(.*?)(<!--/-->)")


class Run(NamedTuple):
    """Records of one machine whose names begin with one of the groups, and what ran beside us."""

    folder: str
    groups: tuple[str, ...]
    packages: tuple[str, ...]


class Table(NamedTuple):
    """A table: its rows, head included, and the groups of records that it is made of."""

    rows: Callable[[], Iterator[str]]
    folder: str
    groups: tuple[str, ...]


TABLES: dict[str, Table] = {}
VALUES: dict[str, Callable[[], str]] = {}

_GPU_PACKAGES = ("torch", "Triton", "transformers", "flash-linear-attention")
_CPU_PACKAGES = ("torch", "transformers", "rwkv", "llama-cpp-python")
_OPERATORS = ("torch", "Triton", "flash-linear-attention")
RUNS = {
    "run_gpu_models": Run(GPU, ("decode-b", "train-b"), _GPU_PACKAGES),
    "run_gpu_decode": Run(GPU, ("decode-b", "ddts-step", "attention-decode"), _GPU_PACKAGES),
    "run_gpu_train": Run(GPU, ("train-b",), _GPU_PACKAGES),
    "run_gpu_ddts": Run(
        GPU, ("ddts-forward", "ddts-training", "ddts-surroundings", "ddts-step"), _OPERATORS
    ),
    "run_gpu_attention": Run(
        GPU, ("attention-forward", "attention-training", "attention-decode"), _OPERATORS[:2]
    ),
    "run_cpu_models": Run(CPU, ("decode-b", "prefill-b"), _CPU_PACKAGES),
    "run_cpu_decode": Run(CPU, ("decode-b",), _CPU_PACKAGES),
    "run_cpu_int8": Run(CPU, ("decode-int8",), ("torch", "llama-cpp-python")),
    "run_cpu_quality": Run(CPU, ("quality",), _CPU_PACKAGES[:1]),
}


# ----------------------------------------------------------------------------------------------
# Documents
# ----------------------------------------------------------------------------------------------


def documents(root: Path = ROOT) -> list[Path]:
    """Every page that may hold a measured table or figure."""
    return [
        root / "README.md",
        root / "benchmarks" / "README.md",
        *sorted(root.glob("docs/**/*.md")),
    ]


def rewrite(text: str) -> str:
    """A document with every marked table and figure as the records say.

    Raises:
        RecordError: a marker names nothing that is computed here.
    """

    def table(found: re.Match) -> str:
        return found[1] + "".join(row + "\n" for row in _known(TABLES, found[2]).rows())

    def value(found: re.Match) -> str:
        return found[1] + _known(VALUES, found[2])() + found[4]

    return VALUE.sub(value, TABLE.sub(table, text))


def _known(registry: Mapping[str, Any], name: str) -> Any:
    if name not in registry:
        raise RecordError(f"expected one of {sorted(registry)}, got the marker {name!r}")
    return registry[name]


def update(root: Path = ROOT, *, write: bool = True) -> list[str]:
    """Rewrite the documents; the names of those that differed from the records.

    Args:
        root: Folder that holds README.md, benchmarks/ and docs/.
        write: False only compares.
    """
    changed = []
    for path in documents(root):
        old = path.read_text(encoding="utf-8")
        new = rewrite(old)
        if new != old:
            changed.append(path.relative_to(root).as_posix())
            if write:
                path.write_text(new, encoding="utf-8")
    return changed


def _table(*head: str, groups: tuple[str, ...], folder: str = GPU):
    """Register a generator of rows as the table of its name."""

    def register(rows: Callable[[], Iterator[str]]) -> Callable[[], Iterator[str]]:
        def whole() -> Iterator[str]:
            yield line(*head)
            yield "|" + "---|" * len(head)
            yield from rows()

        TABLES[rows.__name__] = Table(whole, folder, groups)
        return rows

    return register


def _value(figure: Callable[[], str]) -> Callable[[], str]:
    """Register a function as the figure of its name; a figure of one expression is added to
    ``VALUES`` at the end of its section."""
    VALUES[figure.__name__] = figure
    return figure


# ----------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------


def record(name: str, folder: str = GPU) -> dict[str, Any]:
    """A record by the name of its file."""
    return json.loads((RESULTS / folder / f"{name}.json").read_text(encoding="utf-8"))


class Rows(dict[str, dict[str, Any]]):
    """Measured rows of a record by target; a target that was not measured is an error of the
    record."""

    def __init__(self, name: str, rows: Iterable[dict[str, Any]]):
        self.name = name
        super().__init__((row["target"], row) for row in rows)

    def __missing__(self, target: str):
        raise RecordError(f"{self.name}: expected {target} to be measured, got {[*self]}")


def measured(name: str, folder: str = GPU) -> Rows:
    """Measured rows of a record."""
    return Rows(name, records.measured(record(name, folder)))


def run_of(run: Run) -> str:
    """Machine, days, commits and versions of the records of a run.

    Raises:
        RecordError: they are of several machines or versions.
    """
    machines, days, commits = set(), set(), {}
    for path in sorted((RESULTS / run.folder).glob("*.json")):
        if path.name.startswith(run.groups):
            found = json.loads(path.read_text(encoding="utf-8"))
            about = found["machine"]
            versions = (f"{name} {about['versions'][name.lower()]}" for name in run.packages)
            machines.add((about["name"], ", ".join(versions)))
            days.add(found["date"][:10])
            changed = " with changes" if about["dirty"] else ""
            commits[f"`{about['commit'][:12]}`{changed}"] = None
    if len(machines) != 1:
        raise RecordError(f"expected records of one machine and its versions, got {machines}")
    ((name, versions),) = machines
    day = min(days) if len(days) == 1 else f"{min(days)} to {max(days)}"
    commit = "commit " if len(commits) == 1 else "commits "
    return f"{name}, {day}, {commit}{' and '.join(commits)}, {versions}"


def _newest_commit() -> str:
    """The newest commit that has records of a GPU."""
    found = (record(path.stem) for path in (RESULTS / GPU).glob("*.json"))
    newest = max(found, key=lambda one: one["date"])
    return newest["machine"]["commit"][:12]


def copy_rate(cases: Iterable[str]) -> str:
    """TB/s of a copy in the runs of some records."""
    return span([record(case)["ceilings"]["copy_GBps"] / 1e3 for case in cases], ".2f")


def gemm_rate(cases: Iterable[str]) -> str:
    """TFLOP/s of a large product in the runs of some records."""
    return span(record(case)["ceilings"]["gemm_TFLOPs"] for case in cases)


VALUES |= {
    "gpu_commit": lambda: f"`{_newest_commit()}`",
    "later_commits": lambda: f"`git log {_newest_commit()}..`",
    **{name: partial(run_of, run) for name, run in RUNS.items()},
}


# ----------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------


def line(*cells: str) -> str:
    """A row of a Markdown table."""
    return ("| " + " | ".join(cells) + " |").replace("|  |", "| |")


def us(milliseconds: float) -> str:
    """Microseconds, three digits where they say something."""
    value = milliseconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def percent(share: float) -> str:
    """``44%``."""
    return f"{share:.0%}"


def span(values: Iterable[float], form: str = ".0f") -> str:
    """``53 to 87``; one number where all are written alike."""
    ordered = sorted(values)
    low, high = format(ordered[0], form), format(ordered[-1], form)
    return low if low == high else f"{low} to {high}"


def tokens_of(name: str) -> str:
    """``4,096`` of ``t4096``."""
    return f"{int(name[1:]):,}"


# ----------------------------------------------------------------------------------------------
# Decoding of whole models
# ----------------------------------------------------------------------------------------------

DECODE = (("b1", "t1024"), ("b1", "t4096"), ("b1", "t32768"), ("b1", "t131072"), ("b8", "t4096"))
DECODE += (("b64", "t1024"), ("b256", "t1024"))
CPU_CASES = {
    context: f"decode-b1-{context}-bfloat16" for context in ("t128", "t1024", "t4096", "t16384")
}
INT8_CASES = {context: f"decode-int8-b1-{context}-bfloat16" for context in ("t128", "t4096")}
OURS = {
    "rodimus-plus-1.6b/engine": "Rodimus+ 1.6B, engine",
    "rodimus-1.4b/engine": "Rodimus 1.4B, engine",
}
GPU_PEERS = {
    "qwen2-1.5b/graph": "Qwen2-1.5B, transformers static cache in a CUDA graph",
    "rwkv6-1.6b/graph": "RWKV6-1.6B, flash-linear-attention in a CUDA graph",
}
CPU_PEERS = {
    "qwen2-1.5b/llama.cpp": "Qwen2-1.5B, llama.cpp",
    "rwkv6-1.6b/llama.cpp": "RWKV6-1.6B, llama.cpp",
}
PLUS, PLAIN = OURS
DYNAMIC = "rodimus-plus-1.6b/dynamic"
SHORT = {
    "rodimus-plus-1.6b": "Rodimus+",
    "rodimus-1.4b": "Rodimus",
    "qwen2-1.5b": "Qwen2",
    "rwkv6-1.6b": "RWKV6",
}


def short(target: str) -> str:
    """``Qwen2`` of ``qwen2-1.5b/graph``."""
    return SHORT[target.partition("/")[0]]


def decoded(batch: str, context: str) -> tuple[dict[str, dict[str, Any]], int]:
    """Rows of a case of decoding on the GPU, and tokens a call."""
    name = f"decode-{batch}-{context}-bfloat16"
    return measured(name), record(name)["settings"]["steps"]


def fastest_of_peer(rows: Rows, target: str) -> dict[str, Any]:
    """The row of a peer.

    Raises:
        RecordError: another engine of it is faster, and the column's heading would not be true; or
            it was not measured.
    """
    row = rows[target]
    model = target.partition("/")[0]
    best = min(
        (t for t in rows if t.partition("/")[0] == model), key=lambda t: rows[t]["median_ms"]
    )
    if best != target:
        raise RecordError(f"expected {target} to be the fastest engine of {model}, got {best}")
    return row


@_table("", *OURS.values(), *GPU_PEERS.values(), groups=("decode-b",))
def readme_gpu():
    """ms/token at batch 1, tokens/s above, and the share of each model's bandwidth bound."""
    for batch, context in DECODE:
        rows, count = decoded(batch, context)
        chosen = [rows[target] for target in OURS]
        chosen += [fastest_of_peer(rows, target) for target in GPU_PEERS]
        one = batch == "b1"
        cells = (
            f"{row['median_ms'] / count:.2f}" if one else f"{row['tokens_per_s']:,.0f}"
            for row in chosen
        )
        shares = (f"({percent(row['floor_share'])})" for row in chosen)
        unit = "ms/token" if one else "tokens/s"
        title = f"{unit}, batch {batch[1:]} after {tokens_of(context)} tokens"
        yield line(title, *map(" ".join, zip(cells, shares, strict=True)))


@_table(
    *("batch", "context", "Rodimus+ 1.6B", "its tokens/s", "Rodimus 1.4B", "RWKV6-1.6B"),
    "Qwen2-1.5B",
    groups=("decode-b",),
)
def decode():
    """ms a token of every sequence, and the bandwidth bound."""
    for batch, context in DECODE:
        rows, count = decoded(batch, context)
        plus, *others = (
            f"{rows[target]['median_ms'] / count:.2f} ({rows[target]['floor_ms'] / count:.2f})"
            for target in (PLUS, PLAIN, "rwkv6-1.6b/graph", "qwen2-1.5b/graph")
        )
        speed = f"{rows[PLUS]['tokens_per_s']:,.0f}"
        yield line(batch[1:], tokens_of(context), plus, speed, *others)


@_table("", "Rodimus+ 1.6B", "Rodimus 1.4B", "Qwen2-1.5B (transformers)", groups=("decode-b",))
def caches():
    """ms/token by what keeps the state; a star where samples lie far apart.

    A static cache outside a graph is not shown: that of Rodimus+ was rewritten after the records.
    """
    rows, count = decoded("b1", "t4096")
    engines = {
        "dynamic": "`DynamicCache`",
        "graph": "static cache, captured CUDA graph",
        "engine": "engine",
    }

    def cell(model: str, engine: str) -> str:
        row = rows.get(f"{model}/{engine}")
        star = " *" if row and row["noisy"] else ""
        return f"{row['median_ms'] / count:.2f}{star}" if row else "-"

    for engine, title in engines.items():
        models = "rodimus-plus-1.6b", "rodimus-1.4b", "qwen2-1.5b"
        yield line(title, *(cell(model, engine) for model in models))


def _token(context: str, target: str, key: str = "median_ms") -> float:
    """Milliseconds a token at batch 1."""
    rows, count = decoded("b1", context)
    return rows[target][key] / count


@_value
def faster_peers():
    """Cases in which a peer is faster than one of ours, and by what factor."""
    found = []
    for batch, context in DECODE:
        rows, _ = decoded(batch, context)
        for peer in GPU_PEERS:
            factors = {name: rows[name]["median_ms"] / rows[peer]["median_ms"] for name in OURS}
            slower = [f"{x:.2f} times {short(name)}" for name, x in factors.items() if x > 1]
            if slower:
                found.append(f"{short(peer)} at batch {batch[1:]} ({', '.join(slower)})")
    return " and ".join(found) or "none"


def _span_of_shares(target: str) -> str:
    shares = [decoded(*case)[0][target]["floor_share"] for case in DECODE]
    return span(shares, ".0%")


VALUES |= {
    "engine_ms": lambda: f"{_token('t4096', PLUS):.2f}",
    "dynamic_ms": lambda: f"{_token('t4096', DYNAMIC):.2f}",
    "engine_speedup": lambda: f"{_token('t4096', DYNAMIC) / _token('t4096', PLUS):.1f}",
    "bound_ms": lambda: f"{_token('t4096', PLUS, 'floor_ms'):.2f}",
    "bound_share": lambda: percent(_token("t4096", PLUS, "floor_ms") / _token("t4096", PLUS)),
    "long_context_cost": lambda: f"{_token('t131072', PLUS) / _token('t4096', PLUS) - 1:.1%}",
    "qwen2_shares": lambda: _span_of_shares("qwen2-1.5b/graph"),
    "rwkv6_shares": lambda: _span_of_shares("rwkv6-1.6b/graph"),
    "copy_rate_decode": lambda: copy_rate(f"decode-{b}-{t}-bfloat16" for b, t in DECODE),
}


@_table(
    *("context", *OURS.values(), *CPU_PEERS.values(), "speedup over Qwen2", "over RWKV6"),
    groups=("decode-b",),
    folder=CPU,
)
def readme_cpu():
    """ms/token and the share of each model's bandwidth bound; ratios of Rodimus+."""
    for context, case in CPU_CASES.items():
        rows = measured(case, CPU)
        chosen = [rows[target] for target in OURS]
        chosen += [fastest_of_peer(rows, target) for target in CPU_PEERS]
        cells = (f"{row['median_ms']:.0f} ({percent(row['floor_share'])})" for row in chosen)
        yield line(tokens_of(context), *cells, *(_speedup(chosen[0], peer) for peer in CPU_PEERS))


def _gigabytes(case: str, field: str) -> str:
    """``3.3 GB of Rodimus+, ...``."""
    rows = measured(case, CPU)
    targets = (PLUS, *CPU_PEERS)
    return ", ".join(f"{rows[t][field] / 1e9:.1f} GB of {short(t)}" for t in targets)


@_value
def cpu_undecided():
    """Where a peer is not slower than Rodimus+ in all but a few rounds: its contexts."""
    found = []
    for peer in CPU_PEERS:
        ratio = f"ratio_to_{peer.partition('/')[0]}"
        lows = {context: measured(case, CPU)[PLUS][ratio][1] for context, case in CPU_CASES.items()}
        contexts = [tokens_of(context) for context, low in lows.items() if low <= 1]
        if contexts:
            found.append(f"{short(peer)} after {', '.join(contexts)} tokens")
    return "; ".join(found) or "none"


def _speedup(row: Mapping[str, Any], peer: str) -> str:
    """``1.53 (1.40 to 2.57)``."""
    middle, low, high, _ = row[f"ratio_to_{peer.partition('/')[0]}"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def read_rates(case: str) -> list[float]:
    """GB/s of the read that took its turn in every round."""
    read = record(case, CPU)["settings"][READ]
    return [read["bytes"] / wall / 1e6 for wall in read["samples"]["wall_ms"]]


@_table(
    *("context", "read, GB/s", "Rodimus+ 1.6B, bound", "ms", "share"),
    *("Rodimus 1.4B, bound", "ms", "share"),
    groups=("decode-b",),
    folder=CPU,
)
def tokens_of_cpu():
    """A token against the bytes it needs, at the memory's rate of the same rounds."""
    for context, case in CPU_CASES.items():
        rows = measured(case, CPU)
        cells = []
        for target in OURS:
            row = rows[target]
            low, high = row["floor_share_range"]
            cells += [f"{row['floor_ms']:.1f}", f"{row['median_ms']:.1f}"]
            cells.append(f"{percent(row['floor_share'])} ({percent(low)} to {percent(high)})")
        yield line(tokens_of(context), f"{median(read_rates(case)):.1f}", *cells)


@_table(
    *("context", "read, GB/s", "Rodimus+ 1.6B", "Rodimus 1.4B"),
    *("Qwen2-1.5B, Q8_0", "RWKV6-1.6B, Q8_0", "speedup over Qwen2", "over RWKV6"),
    groups=("decode-int8",),
    folder=CPU,
)
def int8_tokens_of_cpu():
    """ms/token with 8-bit weights and the share of each model's bandwidth bound."""
    for context, case in INT8_CASES.items():
        rows = measured(case, CPU)
        chosen = [rows[target] for target in (*OURS, *CPU_PEERS)]
        cells = (f"{row['median_ms']:.1f} ({percent(row['floor_share'])})" for row in chosen)
        ratios = (_speedup(chosen[0], peer) for peer in CPU_PEERS)
        yield line(tokens_of(context), f"{median(read_rates(case)):.1f}", *cells, *ratios)


def _int8_speedups(peer: str) -> str:
    """``1.10 after 128 tokens, 1.32 after 4,096``."""
    found = []
    for context, case in INT8_CASES.items():
        row = measured(case, CPU)[PLUS]
        found.append(f"{row[f'ratio_to_{peer}'][0]:.2f} after {tokens_of(context)}")
    return found[0] + " tokens, " + ", ".join(found[1:])


def _rates(cases: Iterable[str]) -> str:
    """GB/s that the machine read, by the median of a run."""
    return span(rate for case in cases for rate in _medians_of_runs(case, read_rates(case)))


def _cpu_run_medians(target: str) -> list[float]:
    """Milliseconds a token in each run at each context."""
    walls = {case: measured(case, CPU)[target]["samples"]["wall_ms"] for case in CPU_CASES.values()}
    return [wall for case, samples in walls.items() for wall in _medians_of_runs(case, samples)]


def _runs(case: str) -> list[int]:
    """Rounds of each run of a case."""
    return record(case, CPU)["settings"]["sittings"]


def _medians_of_runs(case: str, samples: list[float]) -> list[float]:
    """The median of each run of a case, whose samples follow each other."""
    rest = iter(samples)
    return [median(islice(rest, rounds)) for rounds in _runs(case)]


@_value
def cpu_rounds():
    """``one run of 15 rounds``, or ``2 or 3 runs of 15 rounds each``."""
    every = [_runs(case) for case in CPU_CASES.values()]
    (rounds,) = {rounds for runs in every for rounds in runs}
    counts = sorted({len(runs) for runs in every})
    if counts == [1]:
        return f"one run of {rounds} rounds"
    return f"{' or '.join(map(str, counts))} runs of {rounds} rounds each"


@_value
def cpu_reproduced():
    """``23 of 24``: median ratios of a case's last run inside the interval of those before it."""
    inside = []
    for case in (*CPU_CASES.values(), *INT8_CASES.values()):
        earlier = _runs(case)[:-1]
        before = sum(earlier)
        if not before:
            continue
        for ours, peer in product(OURS, CPU_PEERS):
            mine, theirs = (measured(case, CPU)[x]["samples"]["wall_ms"] for x in (ours, peer))
            held = timing.ratio(theirs[:before], mine[:before], earlier)
            last = timing.ratio(theirs[before:], mine[before:])
            inside.append(held.low <= last.median <= held.high)
    return f"{sum(inside)} of {len(inside)}"


def _prefill_speedup(peer: str) -> str:
    return _speedup(measured("prefill-b1-t512-bfloat16", CPU)[DYNAMIC], peer)


VALUES |= {
    # of a token at the shortest context: all that moves, and weights alone
    "cpu_bytes": lambda: _gigabytes(CPU_CASES["t128"], "moved_bytes"),
    "int8_bytes": lambda: _gigabytes(INT8_CASES["t128"], "token_bytes"),
    "cpu_rates": lambda: _rates(CPU_CASES.values()),
    "int8_rates": lambda: _rates(INT8_CASES.values()),
    "int8_speedup_qwen2": lambda: _int8_speedups("qwen2-1.5b"),
    "int8_speedup_rwkv6": lambda: _int8_speedups("rwkv6-1.6b"),
    "cpu_ours_ms": lambda: span(_cpu_run_medians(PLUS)),
    "cpu_peers_ms": lambda: span(x for peer in CPU_PEERS for x in _cpu_run_medians(peer)),
    "cpu_prefill_qwen2": lambda: _prefill_speedup("qwen2-1.5b"),
    "cpu_prefill_rwkv6": lambda: _prefill_speedup("rwkv6-1.6b"),
}


# ----------------------------------------------------------------------------------------------
# Training step
# ----------------------------------------------------------------------------------------------

TRAIN_CASES = {"b4-t4096": "4 x 4,096", "b1-t16384": "1 x 16,384"}
TRAINED = {
    "rodimus-plus-1.6b/dynamic": "Rodimus+ 1.6B",
    "rodimus-1.4b/dynamic": "Rodimus 1.4B",
    "qwen2-1.5b/dynamic": "Qwen2-1.5B",
    "rwkv6-1.6b/own": "RWKV6-1.6B",
}


@_table("rows", *TRAINED.values(), groups=("train-b",))
def readme_train():
    """tokens/s, and the share of the peak GEMM throughput."""
    for case, tokens in TRAIN_CASES.items():
        rows = measured(f"train-{case}-bfloat16")
        found = map(rows.get, TRAINED)
        cells = (
            f"{row['tokens_per_s']:,.0f} ({percent(row['share_of_gemm'])})"
            if row
            else "not measured"
            for row in found
        )
        yield line(tokens, *cells)


@_table(
    *("rows", "model", "ms", "tokens/s", "TFLOP/s", "of peak GEMM throughput", "GB"),
    groups=("train-b",),
)
def train():
    for case, tokens in TRAIN_CASES.items():
        rows = measured(f"train-{case}-bfloat16")
        for target, title in TRAINED.items():
            if target not in rows:
                yield line(tokens, title, *["not measured"] * 5)
                continue
            row = rows[target]
            spread = f"{row['median_ms']:.0f} ({row['p20_ms']:.0f} to {row['p80_ms']:.0f})"
            rates = f"{row['tokens_per_s']:,.0f}", f"{row['TFLOPs']:.0f}"
            memory = f"{row['step_bytes'] / 1e9:.1f}"
            yield line(tokens, title, spread, *rates, percent(row["share_of_gemm"]), memory)


@_table("kernel", "launches", "ms", "of all kernels", groups=("train-b",))
def train_kernels():
    for kernel in training_row()["kernels"]:
        name, time = f"`{kernel['name']}`", f"{kernel['ms']:.1f}"
        yield line(name, str(kernel["launches"]), time, f"{kernel['share']:.1%}")


def training_row() -> dict[str, Any]:
    """The step of Rodimus+ that was profiled."""
    return measured("train-b4-t4096-bfloat16")[DYNAMIC]


def _kernel_sum() -> float:
    """Milliseconds of all kernels of that step."""
    first = training_row()["kernels"][0]
    return first["ms"] / first["share"]


BACKWARD = {"shared_key_attention_dkv_kernel": 4, "shared_key_attention_dq_kernel": 3}
"""Kernels of attention's backward, and the GEMMs of visible pairs that each makes."""


def _of_gemm_rate(kernel: str) -> float:
    """Share of the peak GEMM throughput at which a kernel of the step makes its GEMMs."""
    (found,) = [k for k in training_row()["kernels"] if k["name"] == kernel]
    forward = flops("forward", 4, 4096, 128, 2049)
    rate = record("train-b4-t4096-bfloat16")["ceilings"]["gemm_TFLOPs"]
    least_ms = BACKWARD[kernel] / 2 * forward / rate / 1e9
    return least_ms * found["launches"] / found["ms"]


def _step_walls(case: str, target: str) -> list[float]:
    """Milliseconds of each timed step."""
    return measured(f"train-{case}-bfloat16")[target]["samples"]["wall_ms"]


@_value
def rwkv6_step_spread_ms():
    walls = _step_walls("b1-t16384", "rwkv6-1.6b/own")
    return f"{max(walls) - min(walls):.0f}"


@_value
def attention_backward_ms():
    kernels = training_row()["kernels"]
    return f"{sum(kernel['ms'] for kernel in kernels if kernel['name'] in BACKWARD):.0f}"


VALUES |= {
    "gemm_rate_train": lambda: gemm_rate(f"train-{case}-bfloat16" for case in TRAIN_CASES),
    "kernels_ms": lambda: f"{_kernel_sum():.0f}",
    # tokens a second if a step took as long as its kernels
    "kernels_alone": lambda: f"{4 * 4096 / _kernel_sum() * 1e3:,.0f}",
    "unexplained_ms": lambda: f"{training_row()['median_ms'] - _kernel_sum():.0f}",
    "step_range_ms": lambda: span(_step_walls("b4-t4096", DYNAMIC)),
    "dkv_rate": lambda: percent(_of_gemm_rate("shared_key_attention_dkv_kernel")),
    "dq_rate": lambda: percent(_of_gemm_rate("shared_key_attention_dq_kernel")),
    "other_kernels": lambda: percent(1 - sum(x["share"] for x in training_row()["kernels"])),
}


# ----------------------------------------------------------------------------------------------
# Operators
# ----------------------------------------------------------------------------------------------

LAYERS = 24
SHAPES = {"b8-t4096": "8 x 4,096 tokens", "b1-t32768": "1 x 32,768 tokens"}
PASSES = {"forward": "forward", "training": "forward and backward"}
ATTENTION = ("triton/expanded", "flex/expanded", "flex/repeated", "sdpa/expanded", "sdpa/repeated")
STEP_CASES = {n: f"attention-decode-b{n}-t2112-bfloat16" for n in (1, 8, 64, 256)}


@_table(
    *("", "bound", "measured", "bound / measured", "`chunk_gla` of fla", "fla / measured"),
    groups=("ddts-forward", "ddts-training"),
)
def ddts():
    for what, title in PASSES.items():
        for shape, tokens in SHAPES.items():
            rows = measured(f"ddts-{what}-{shape}-bfloat16-v4096")
            ours, peer = rows["ddts/triton_chunk"], rows["chunk_gla/fla"]
            ratio = peer["median_ms"] / ours["median_ms"]
            times = us(ours["floor_ms"]), us(ours["median_ms"]), percent(ours["floor_share"])
            yield line(f"{title}, {tokens}", *times, us(peer["median_ms"]), f"{ratio:.2f}")


@_table("", "bound", "measured", "plain torch", groups=("ddts-surroundings",))
def surroundings():
    rows = measured("ddts-surroundings-b8-t4096-bfloat16-v4096")
    names = [row["family"] for row in rows.values() if row["engine"] == "triton"]
    for name in names:
        ours, torch = rows[f"{name}/triton"], rows[f"{name}/reference"]
        times = us(ours["floor_ms"]), us(ours["median_ms"]), us(torch["median_ms"])
        yield line(f"`{name}`", *times)
    total = lambda key, engine: us(sum(rows[f"{name}/{engine}"][key] for name in names))
    bound, ours = total("floor_ms", "triton"), total("median_ms", "triton")
    yield line("together", bound, ours, total("median_ms", "reference"))


@_table("operator, sequences", "bound", "CUDA", "Triton", groups=("ddts-step", "attention-decode"))
def steps():
    """One token in one layer, by implementation."""
    cases = [("ddts_step", f"ddts-step-b{n}-t1-bfloat16-v4096", "ddts_step", n) for n in (1, 256)]
    for batch, case in STEP_CASES.items():
        cases.append(("shared_key_attention_step", case, "step", batch))
    for name, case, family, batch in cases:
        native, triton = (measured(case)[f"{family}/{impl}"] for impl in ("native", "triton"))
        times = us(native["floor_ms"]), us(native["median_ms"]), us(triton["median_ms"])
        yield line(f"`{name}`, {batch}", *times)


def _attention_step() -> dict[str, Any]:
    return measured(STEP_CASES[1])["step/native"]


GEMMS_US = 43.8
"""Of a block's linear layers at one row on the H200, as a chain of graph nodes; by hand, beside the
records."""


@_value
def other_kernels_of_token_ms():
    """What is left of a token beside the linear layers and the attention step of its blocks."""
    blocks = LAYERS * (GEMMS_US / 1e3 + _attention_step()["median_ms"])
    return f"{_token('t4096', PLUS) - blocks:.2f}"


_FLEX_SDPA = ("`flex`, in place", "`flex`, copied", "`sdpa`, in place", "`sdpa`, copied")


@_table(
    *("", "bound", "`triton`", "bound / `triton`", *_FLEX_SDPA),
    groups=("attention-forward", "attention-training"),
)
def attention():
    for what, title in PASSES.items():
        for shape, tokens in SHAPES.items():
            rows = measured(f"attention-{what}-{shape}-bfloat16")
            ours = rows[ATTENTION[0]]
            times = [us(rows[name]["median_ms"]) for name in ATTENTION]
            share = percent(ours["floor_share"])
            yield line(f"{title}, {tokens}", us(ours["floor_ms"]), times[0], share, *times[1:])


@_table("", "`triton`", *_FLEX_SDPA, groups=("attention-forward", "attention-training"))
def attention_bytes():
    for what, title in PASSES.items():
        rows = measured(f"attention-{what}-b8-t4096-bfloat16")
        yield line(title, *(f"{rows[name]['peak_bytes'] / 1e6:,.0f}" for name in ATTENTION))


@_table(
    *("", "bound", "measured", "bound / measured"),
    groups=("attention-forward", "attention-training", "attention-decode"),
)
def attention_bounds():
    for what in ("forward", "backward"):
        for shape, tokens in SHAPES.items():
            forward, training = _attention_passes(shape)
            bound, time = forward["floor_ms"], forward["median_ms"]
            if what == "backward":
                bound, time = training["floor_ms"] - bound, training["median_ms"] - time
            yield line(f"{what}, {tokens}", us(bound), us(time), percent(bound / time))
    for batch, case in STEP_CASES.items():
        row = measured(case)["step/native"]
        title = f"step at a full window, {batch} sequence{'s' if batch > 1 else ''}"
        bound, time = row["floor_ms"], row["median_ms"]
        yield line(title, us(bound), us(time), percent(bound / time))


def _attention_passes(shape: str) -> list[dict[str, Any]]:
    return [measured(f"attention-{what}-{shape}-bfloat16")["triton/expanded"] for what in PASSES]


@_value
def attention_backward_rate():
    """Seven GEMMs at this share of the peak GEMM throughput; forward's bound counts two."""
    forward, training = _attention_passes("b8-t4096")
    return percent(3.5 * forward["floor_ms"] / (training["median_ms"] - forward["median_ms"]))


def _sequence_cases(name: str) -> list[str]:
    return [name.format(what, shape) for what in PASSES for shape in SHAPES]


VALUES |= {
    "ddts_bound_us": lambda: us(
        measured("ddts-forward-b8-t4096-bfloat16-v4096")["ddts/triton_chunk"]["floor_ms"]
    ),
    "copy_rate_ddts": lambda: copy_rate(_sequence_cases("ddts-{}-{}-bfloat16-v4096")),
    "copy_rate_attention": lambda: copy_rate(STEP_CASES.values()),
    "gemm_rate_attention": lambda: gemm_rate(_sequence_cases("attention-{}-{}-bfloat16")),
    "attention_step_us": lambda: us(_attention_step()["median_ms"]),
    "attention_step_bound_us": lambda: us(_attention_step()["floor_ms"]),
    "attention_steps_ms": lambda: f"{LAYERS * _attention_step()['median_ms']:.2f}",
    "attention_steps_bound_ms": lambda: f"{LAYERS * _attention_step()['floor_ms']:.2f}",
}


# ----------------------------------------------------------------------------------------------
# Quality of small models
# ----------------------------------------------------------------------------------------------

QUALITY = (
    ("mqar-cpu-n16", "64/8"),
    ("passkey-cpu", "128"),
    ("language-cpu", "val at 128"),
    ("language-cpu", "val at 512"),
)
VARIANTS = {
    "rodimus": "Rodimus",
    "gla": "GLA",
    "mamba2": "Mamba2",
    "rwkv6": "RWKV6",
    "none": "no gate",
    "rodimus_plus": "Rodimus+",
    "attention": "attention",
}


@_table(
    *("", "recall, 8 pairs in 64", "passkey in 128, trained to 32"),
    *("bits/byte, rows of 128", "bits/byte, rows of 512, trained on 128"),
    groups=("quality",),
    folder=CPU,
)
def quality():
    for variant, title in VARIANTS.items():
        cells = []
        for case, test in QUALITY:
            row = measured(f"quality-{case}", CPU).get(variant)
            scores = row["scores"][test] if row else []
            cells.append(
                f"{mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})" if scores else "-"
            )
        yield line(title, *cells)
