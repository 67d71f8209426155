"""Tables and figures in README and docs/ that come from the committed records.

    python -m benchmarks.report --docs

A table stands below a line ``<!-- measured: NAME -->``, a figure of a sentence between
``<!--NAME-->`` and ``<!--/-->``. Both are computed here from ``results/NVIDIA_H200`` and
``results/AMD_EPYC`` and rewritten in place.

To add a figure, add an entry with its name to the dictionary of its section; to add a table, write
a function with its name that yields the head and then the rows, and list it in ``TABLES``. Figures
called ``run_*`` are machine, days, commit and versions of the records behind a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import mean, median
from typing import Any

from . import machine, records, targets, timing
from .bench_attention import flops
from .harness import READ
from .machine import RESULTS, ROOT
from .records import RecordError, model_of

GPU, CPU = "NVIDIA_H200", "AMD_EPYC"

TABLE = re.compile(r"(<!-- measured: ([a-z0-9_]+) -->\n)((?:\|.*\n)+)")
VALUE = re.compile(r"(<!--([a-z0-9_]+)-->)(.*?)(<!--/-->)")

Row = dict[str, Any]
Cells = Iterator[Sequence[str]]


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


def update(root: Path = ROOT, *, write: bool = True) -> list[str]:
    """Rewrite the documents; returns the names of those that differed from the records.

    Args:
        root: Folder that holds README.md, benchmarks/ and docs/.
        write: False only compares.
    """
    changed, texts = [], (tables(), figures())
    for path in documents(root):
        old = path.read_text(encoding="utf-8")
        new = rewrite(old, *texts)
        if new != old:
            changed.append(path.relative_to(root).as_posix())
            if write:
                path.write_text(new, encoding="utf-8")
    return changed


def rewrite(text: str, tables: Mapping[str, str], figures: Mapping[str, str]) -> str:
    """A document with every marked table and figure as the records say.

    Raises:
        RecordError: a marker names nothing that is computed here.
    """

    def known(texts: Mapping[str, str], name: str) -> str:
        if name not in texts:
            raise RecordError(f"expected one of {sorted(texts)}, got the marker {name!r}")
        return texts[name]

    text = TABLE.sub(lambda found: found[1] + known(tables, found[2]), text)
    return VALUE.sub(lambda found: found[1] + known(figures, found[2]) + found[4], text)


def tables() -> dict[str, str]:
    """Every table by its name, with one blank in an empty cell."""
    found = {}
    for name, rows in TABLES.items():
        head, *rest = rows()
        found[name] = "\n".join(table(head, rest)).replace("|  |", "| |")
    return found


def figures() -> dict[str, str]:
    """Every figure in a sentence by its name."""
    speeds = decoding() | decoding_on_cpu() | training() | operators()
    return runs() | goals() | speeds | exactness()


# ----------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table and a blank line; nothing if it has no rows."""
    first, *others = (f"| {' | '.join(row)} |" for row in (head, *rows))
    return [first, "|" + "---|" * len(head), *others, ""] if others else []


def us(milliseconds: float) -> str:
    """Microseconds, with one decimal below 100."""
    value = milliseconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def span(values: Iterable[Any], form: str = ".0f") -> str:
    """``53 to 87``; one number where all are written alike."""
    ordered = sorted(values)
    low, high = format(ordered[0], form), format(ordered[-1], form)
    return low if low == high else f"{low} to {high}"


# ----------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------

_GPU_PACKAGES = ("torch", "Triton", "transformers", "flash-linear-attention")
_CPU_PACKAGES = ("torch", "transformers", "rwkv", "llama-cpp-python")
_OPERATORS = ("torch", "Triton", "flash-linear-attention")
_DDTS = ("ddts-forward", "ddts-training", "ddts-surroundings", "ddts-step")
_ATTENTION = ("attention-forward", "attention-training", "attention-decode")
RUNS = {
    "run_gpu_models": (GPU, ("decode-b", "train-b"), _GPU_PACKAGES),
    "run_gpu_decode": (GPU, ("decode-b", "ddts-step", "attention-decode"), _GPU_PACKAGES),
    "run_gpu_train": (GPU, ("train-b",), _GPU_PACKAGES),
    "run_gpu_ddts": (GPU, _DDTS, _OPERATORS),
    "run_gpu_attention": (GPU, _ATTENTION, _OPERATORS[:2]),
    "run_cpu_models": (CPU, ("decode-b", "prefill-b"), _CPU_PACKAGES),
    "run_cpu_decode": (CPU, ("decode-b",), _CPU_PACKAGES),
    "run_cpu_int8": (CPU, ("decode-int8",), ("torch", "llama-cpp-python")),
    "run_cpu_int4": (CPU, ("decode-int4",), ("torch", "llama-cpp-python")),
    "run_cpu_quality": (CPU, ("quality",), _CPU_PACKAGES[:1]),
    "run_exactness": (CPU, ("tests-exactness",), _CPU_PACKAGES[:2]),
}
"""Folder, beginnings of the names of its records, and packages whose versions are listed."""


def record(name: str, folder: str = GPU) -> dict[str, Any]:
    """A record by the name of its file."""
    return json.loads((RESULTS / folder / f"{name}.json").read_text(encoding="utf-8"))


def records_of(folder: str, groups: str | tuple[str, ...]) -> list[dict[str, Any]]:
    """Records whose names begin with one of the groups, in the order of their names."""
    names = sorted(path.stem for path in (RESULTS / folder).glob("*.json"))
    return [record(name, folder) for name in names if name.startswith(groups)]


class Case(dict[str, Row]):
    """Measured rows of a record by target; for a target that was not measured, RecordError."""

    def __init__(self, name: str, folder: str = GPU):
        self.name, self.record = name, record(name, folder)
        self.settings = self.record["settings"]
        super().__init__((row["target"], row) for row in records.measured(self.record))

    def __missing__(self, target: str):
        raise RecordError(f"{self.name}: expected {target} to be measured, got {[*self]}")

    def token_ms(self, target: str, key: str = "median_ms") -> float:
        """Milliseconds per token; a call decodes several."""
        return self[target][key] / self.settings["steps"]


def runs() -> dict[str, str]:
    newest = max(records_of(GPU, ""), key=lambda found: found["date"])["machine"]["commit"][:12]
    return {
        "gpu_commit": f"`{newest}`",
        "later_commits": f"`git log {newest}..`",
        **{name: run_of(*run) for name, run in RUNS.items()},
    }


def run_of(folder: str, groups: tuple[str, ...], packages: tuple[str, ...]) -> str:
    """Machine, days, commits and versions of records.

    Raises:
        RecordError: they are of several machines or versions.
    """
    machines, days, commits = set(), set(), {}
    for found in records_of(folder, groups):
        about = found["machine"]
        versions = (f"{name} {about['versions'][name.lower()]}" for name in packages)
        machines.add((machine.told(about), ", ".join(versions)))
        days.add(found["date"][:10])
        changed = " with changes" if about["dirty"] else ""
        commits[f"`{about['commit'][:12]}`{changed}"] = None
    if len(machines) != 1:
        raise RecordError(f"expected records of one machine and its versions, got {machines}")
    ((name, versions),) = machines
    commit = "commit " if len(commits) == 1 else "commits "
    return f"{name}, {span(days, '')}, {commit}{' and '.join(commits)}, {versions}"


def goals() -> dict[str, str]:
    """How many targets are met, and the outcomes of those for a token on the CPU."""
    every = targets.outcomes(records.read(RESULTS))

    def told(outcome: targets.Outcome) -> str:
        context = outcome.target.name.removeprefix(targets.OVER_BOUND + ", ")
        measured = f" ({outcome.figure.median:.2f})" if outcome.figure else ""
        return f"{outcome.kind} {context}{measured}"

    on_cpu = (outcome for outcome in every if outcome.target.name.startswith(targets.OVER_BOUND))
    return {"targets": targets.counts(every), "targets_cpu": ", ".join(map(told, on_cpu))}


def copy_rate(cases: Iterable[Case]) -> str:
    """TB/s of a copy in the runs of some cases."""
    return span((case.record["ceilings"]["copy_GBps"] / 1e3 for case in cases), ".2f")


def gemm_rate(cases: Iterable[Case]) -> str:
    """TFLOP/s of a large product in the runs of some cases."""
    return span(case.record["ceilings"]["gemm_TFLOPs"] for case in cases)


# ----------------------------------------------------------------------------------------------
# Decoding on a GPU
# ----------------------------------------------------------------------------------------------

DECODE = ((1, 1024), (1, 4096), (1, 32768), (1, 131072), (8, 4096), (64, 1024), (256, 1024))
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
QWEN2, RWKV6 = GPU_PEERS
DYNAMIC = "rodimus-plus-1.6b/dynamic"
SHORT = {
    "rodimus-plus-1.6b": "Rodimus+",
    "rodimus-1.4b": "Rodimus",
    "qwen2-1.5b": "Qwen2",
    "rwkv6-1.6b": "RWKV6",
}


def short(target: str) -> str:
    """``Qwen2`` of ``qwen2-1.5b/graph``."""
    return SHORT[model_of(target)]


def decoded(batch: int, context: int) -> Case:
    """A case of decoding on the GPU."""
    return Case(f"decode-b{batch}-t{context}-bfloat16")


def compared(case: Case, peers: Iterable[str]) -> list[Row]:
    """Rows of ours and of peers.

    Raises:
        RecordError: another engine of a peer is faster, so the column's heading would be wrong, or
            a target was not measured.
    """
    rows, best = [case[target] for target in (*OURS, *peers)], records.fastest(case.record)
    for peer in peers:
        if (fastest := best[model_of(peer)]["target"]) != peer:
            raise RecordError(f"expected {peer} to be the fastest engine, got {fastest}")
    return rows


def readme_gpu() -> Cells:
    """ms/token at batch 1, else tokens/s, and the share of each model's bandwidth bound."""
    yield "", *OURS.values(), *GPU_PEERS.values()
    for batch, context in DECODE:
        case = decoded(batch, context)
        unit, cells = "ms/token" if batch == 1 else "tokens/s", []
        for row in compared(case, GPU_PEERS):
            each, per_s = case.token_ms(row["target"]), row["tokens_per_s"]
            speed = f"{each:.2f}" if batch == 1 else f"{per_s:,.0f}"
            cells.append(f"{speed} ({row['floor_share']:.0%})")
        yield f"{unit}, batch {batch} after {context:,} tokens", *cells


def decode() -> Cells:
    """ms per token of every sequence, and the bandwidth bound."""
    yield (
        *("batch", "context", "Rodimus+ 1.6B", "its tokens/s", "Rodimus 1.4B", "RWKV6-1.6B"),
        "Qwen2-1.5B",
    )
    for batch, context in DECODE:
        case = decoded(batch, context)
        plus, *others = (
            f"{case.token_ms(target):.2f} ({case.token_ms(target, 'floor_ms'):.2f})"
            for target in (PLUS, PLAIN, RWKV6, QWEN2)
        )
        yield str(batch), f"{context:,}", plus, f"{case[PLUS]['tokens_per_s']:,.0f}", *others


def caches() -> Cells:
    """ms/token by what keeps the state; a star marks noisy samples.

    A static cache outside a graph is not shown: Rodimus+'s was rewritten after the records.
    """
    yield "", "Rodimus+ 1.6B", "Rodimus 1.4B", "Qwen2-1.5B (transformers)"
    case = decoded(1, 4096)
    engines = {
        "dynamic": "`DynamicCache`",
        "graph": "static cache, captured CUDA graph",
        "engine": "engine",
    }

    def cell(target: str) -> str:
        if target not in case:
            return "-"
        return f"{case.token_ms(target):.2f}" + " *" * case[target]["noisy"]

    for engine, title in engines.items():
        yield title, *(cell(f"{model_of(target)}/{engine}") for target in (PLUS, PLAIN, QWEN2))


def faster_peers() -> str:
    """Cases in which a peer is faster than one of ours, and by what factor."""
    found = []
    for batch, context in DECODE:
        rows = decoded(batch, context)
        for peer in GPU_PEERS:
            factors = {name: rows[name]["median_ms"] / rows[peer]["median_ms"] for name in OURS}
            slower = [f"{x:.2f} times {short(name)}" for name, x in factors.items() if x > 1]
            if slower:
                found.append(f"{short(peer)} at batch {batch} ({', '.join(slower)})")
    return " and ".join(found) or "none"


def decoding() -> dict[str, str]:
    case, long = decoded(1, 4096), decoded(1, 131072)
    engine, dynamic = case.token_ms(PLUS), case.token_ms(DYNAMIC)
    bound = case.token_ms(PLUS, "floor_ms")
    cases = [decoded(*case) for case in DECODE]
    shares = lambda target: span((case[target]["floor_share"] for case in cases), ".0%")
    return {
        "engine_ms": f"{engine:.2f}",
        "dynamic_ms": f"{dynamic:.2f}",
        "engine_speedup": f"{dynamic / engine:.1f}",
        "bound_ms": f"{bound:.2f}",
        "bound_share": f"{bound / engine:.0%}",
        "long_context_cost": f"{long.token_ms(PLUS) / engine - 1:.1%}",
        "qwen2_shares": shares(QWEN2),
        "rwkv6_shares": shares(RWKV6),
        "copy_rate_decode": copy_rate(cases),
        "faster_peers": faster_peers(),
    }


# ----------------------------------------------------------------------------------------------
# Decoding and prefill on a CPU
# ----------------------------------------------------------------------------------------------


def cpu_cases() -> dict[int, Case]:
    """Cases of decoding on the CPU by their context."""
    return {n: Case(f"decode-b1-t{n}-bfloat16", CPU) for n in (128, 1024, 4096, 16384)}


def quantized_cases(bits: int) -> dict[int, Case]:
    """Cases of decoding with weights of so many bits."""
    return {n: Case(f"decode-int{bits}-b1-t{n}-bfloat16", CPU) for n in (128, 4096)}


def ratio(row: Row, peer: str) -> list[float]:
    """How much faster a row is than a peer: median, interval, coverage."""
    return row[f"ratio_to_{model_of(peer)}"]


def speedup(row: Row, peer: str) -> str:
    """``1.53 (1.40 to 2.57)``."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*ratio(row, peer))


def read_rates(case: Case) -> list[float]:
    """GB/s of the memory read that was timed in every round."""
    read = case.settings[READ]
    return [read["bytes"] / wall / 1e6 for wall in read["samples"]["wall_ms"]]


def readme_cpu() -> Cells:
    """ms/token and the share of each model's bandwidth bound; ratios of Rodimus+."""
    yield "context", *OURS.values(), *CPU_PEERS.values(), "speedup over Qwen2", "over RWKV6"
    for context, case in cpu_cases().items():
        rows = compared(case, CPU_PEERS)
        cells = (f"{row['median_ms']:.0f} ({row['floor_share']:.0%})" for row in rows)
        yield f"{context:,}", *cells, *(speedup(rows[0], peer) for peer in CPU_PEERS)


def tokens_of_cpu() -> Cells:
    """A token's time and that of the bytes it needs, at the memory rate of the same rounds."""
    yield (
        *("context", "read, GB/s", "Rodimus+ 1.6B, bound", "ms", "share"),
        *("Rodimus 1.4B, bound", "ms", "share"),
    )
    for context, case in cpu_cases().items():
        cells = []
        for row in (case[target] for target in OURS):
            low, high = row["floor_share_range"]
            cells += [f"{row['floor_ms']:.1f}", f"{row['median_ms']:.1f}"]
            cells.append(f"{row['floor_share']:.0%} ({low:.0%} to {high:.0%})")
        yield f"{context:,}", f"{median(read_rates(case)):.1f}", *cells


def int8_tokens_of_cpu() -> Cells:
    return quantized_tokens(8)


def int4_tokens_of_cpu() -> Cells:
    return quantized_tokens(4)


def quantized_tokens(bits: int) -> Cells:
    """ms/token with weights of so many bits and the share of each model's bandwidth bound."""
    yield (
        *("context", "read, GB/s", "Rodimus+ 1.6B", "Rodimus 1.4B"),
        *(f"Qwen2-1.5B, Q{bits}_0", f"RWKV6-1.6B, Q{bits}_0"),
        *("speedup over Qwen2", "over RWKV6"),
    )
    for context, case in quantized_cases(bits).items():
        rows = [case[target] for target in (*OURS, *CPU_PEERS)]
        cells = (f"{row['median_ms']:.1f} ({row['floor_share']:.0%})" for row in rows)
        ratios = (speedup(rows[0], peer) for peer in CPU_PEERS)
        yield f"{context:,}", f"{median(read_rates(case)):.1f}", *cells, *ratios


def cpu_undecided() -> str:
    """Peers that are not slower than Rodimus+ in all but a few rounds, with their contexts."""
    found = []
    for peer in CPU_PEERS:
        lows = {context: ratio(case[PLUS], peer)[1] for context, case in cpu_cases().items()}
        contexts = [f"{context:,}" for context, low in lows.items() if low <= 1]
        if contexts:
            found.append(f"{short(peer)} after {', '.join(contexts)} tokens")
    return "; ".join(found) or "none"


def cpu_rounds() -> str:
    """``one run of 15 rounds``, or ``2 or 3 runs of 15 rounds each``."""
    every = [case.settings["sittings"] for case in cpu_cases().values()]
    (rounds,) = {rounds for runs in every for rounds in runs}
    counts = sorted({len(runs) for runs in every})
    if counts == [1]:
        return f"one run of {rounds} rounds"
    return f"{' or '.join(map(str, counts))} runs of {rounds} rounds each"


def cpu_reproduced() -> str:
    """``23 of 24``: median ratios of a case's last run inside the interval of all earlier runs."""
    inside = []
    rounded = (case for bits in (8, 4) for case in quantized_cases(bits).values())
    for case in (*cpu_cases().values(), *rounded):
        earlier = case.settings["sittings"][:-1]
        before = sum(earlier)
        if not before:
            continue
        for ours, peer in product(OURS, CPU_PEERS):
            mine, theirs = (case[target]["samples"]["wall_ms"] for target in (ours, peer))
            held = timing.ratio(theirs[:before], mine[:before], earlier)
            last = timing.ratio(theirs[before:], mine[before:])
            inside.append(held.low <= last.median <= held.high)
    return f"{sum(inside)} of {len(inside)}"


def medians_of_runs(case: Case, samples: list[float]) -> list[float]:
    """The median of each run of a case; ``samples`` holds one run after the other."""
    rest = iter(samples)
    return [median(islice(rest, rounds)) for rounds in case.settings["sittings"]]


def decoding_on_cpu() -> dict[str, str]:
    cases, (qwen2, rwkv6) = cpu_cases(), CPU_PEERS
    prefill = Case("prefill-b1-t512-bfloat16", CPU)[DYNAMIC]

    def gigabytes(case: Case, field: str) -> str:
        """``3.3 GB of Rodimus+, ...``."""
        targets = (PLUS, *CPU_PEERS)
        return ", ".join(f"{case[t][field] / 1e9:.1f} GB of {short(t)}" for t in targets)

    def rates(cases: dict[int, Case]) -> str:
        """GB/s that the machine read: the range of the runs' medians."""
        return span(x for case in cases.values() for x in medians_of_runs(case, read_rates(case)))

    def milliseconds(*targets: str) -> str:
        """Milliseconds per token: the range of the runs' medians."""
        walls = [(c, c[t]["samples"]["wall_ms"]) for t in targets for c in cases.values()]
        return span(x for case, samples in walls for x in medians_of_runs(case, samples))

    def speedups(cases: dict[int, Case], peer: str) -> str:
        """``1.10 after 128 tokens, 1.32 after 4,096``."""
        first, *rest = (f"{ratio(c[PLUS], peer)[0]:.2f} after {n:,}" for n, c in cases.items())
        return ", ".join((f"{first} tokens", *rest))

    rounded = {}
    for bits in (8, 4):
        found = quantized_cases(bits)
        rounded |= {
            f"int{bits}_bytes": gigabytes(found[128], "token_bytes"),
            f"int{bits}_rates": rates(found),
            f"int{bits}_speedup_qwen2": speedups(found, qwen2),
            f"int{bits}_speedup_rwkv6": speedups(found, rwkv6),
        }
    return rounded | {
        "cpu_rounds": cpu_rounds(),
        "cpu_reproduced": cpu_reproduced(),
        "cpu_undecided": cpu_undecided(),
        # everything that a token moves at the shortest context
        "cpu_bytes": gigabytes(cases[128], "moved_bytes"),
        "cpu_rates": rates(cases),
        "cpu_ours_ms": milliseconds(PLUS),
        "cpu_peers_ms": milliseconds(*CPU_PEERS),
        "cpu_prefill_qwen2": speedup(prefill, qwen2),
        "cpu_prefill_rwkv6": speedup(prefill, rwkv6),
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
BACKWARD = {"shared_key_attention_dkv_kernel": 4, "shared_key_attention_dq_kernel": 3}
"""Kernels of attention's backward, and the GEMMs of visible pairs that each computes."""


def trained(case: str) -> Case:
    """A case of the training step."""
    return Case(f"train-{case}-bfloat16")


def readme_train() -> Cells:
    """tokens/s, and the share of the peak GEMM throughput."""
    yield "rows", *TRAINED.values()
    for case, tokens in TRAIN_CASES.items():
        cells = (
            f"{row['tokens_per_s']:,.0f} ({row['share_of_gemm']:.0%})" if row else "not measured"
            for row in map(trained(case).get, TRAINED)
        )
        yield tokens, *cells


def train() -> Cells:
    yield "rows", "model", "ms", "tokens/s", "TFLOP/s", "of peak GEMM throughput", "GB"
    for case, tokens in TRAIN_CASES.items():
        rows = trained(case)
        for target, title in TRAINED.items():
            if target not in rows:
                yield tokens, title, *["not measured"] * 5
                continue
            row = rows[target]
            spread = f"{row['median_ms']:.0f} ({row['p20_ms']:.0f} to {row['p80_ms']:.0f})"
            rates = f"{row['tokens_per_s']:,.0f}", f"{row['TFLOPs']:.0f}"
            share, memory = f"{row['share_of_gemm']:.0%}", f"{row['step_bytes'] / 1e9:.1f}"
            yield tokens, title, spread, *rates, share, memory


def train_kernels() -> Cells:
    yield "kernel", "launches", "ms", "of all kernels"
    for kernel in trained("b4-t4096")[DYNAMIC]["kernels"]:
        times = f"{kernel['ms']:.1f}", f"{kernel['share']:.1%}"
        yield f"`{kernel['name']}`", str(kernel["launches"]), *times


def training() -> dict[str, str]:
    profiled, long = map(trained, TRAIN_CASES)
    step = profiled[DYNAMIC]
    kernels = {kernel["name"]: kernel for kernel in step["kernels"]}
    first = step["kernels"][0]
    kernels_ms = first["ms"] / first["share"]
    rwkv6_walls = long["rwkv6-1.6b/own"]["samples"]["wall_ms"]

    def of_gemm_rate(name: str) -> str:
        """Share of the peak GEMM throughput that a kernel reaches in its GEMMs."""
        forward = flops("forward", 4, 4096, 128, 2049)
        least_ms = BACKWARD[name] / 2 * forward / profiled.record["ceilings"]["gemm_TFLOPs"] / 1e9
        return f"{least_ms * kernels[name]['launches'] / kernels[name]['ms']:.0%}"

    return {
        "gemm_rate_train": gemm_rate((profiled, long)),
        "kernels_ms": f"{kernels_ms:.0f}",
        # tokens per second if a step took as long as its kernels
        "kernels_alone": f"{4 * 4096 / kernels_ms * 1e3:,.0f}",
        "unexplained_ms": f"{step['median_ms'] - kernels_ms:.0f}",
        "other_kernels": f"{1 - sum(kernel['share'] for kernel in step['kernels']):.0%}",
        "step_range_ms": span(step["samples"]["wall_ms"]),
        "rwkv6_step_spread_ms": f"{max(rwkv6_walls) - min(rwkv6_walls):.0f}",
        "attention_backward_ms": f"{sum(kernels[name]['ms'] for name in BACKWARD):.0f}",
        "dkv_rate": of_gemm_rate("shared_key_attention_dkv_kernel"),
        "dq_rate": of_gemm_rate("shared_key_attention_dq_kernel"),
    }


# ----------------------------------------------------------------------------------------------
# Operators
# ----------------------------------------------------------------------------------------------

LAYERS = 24
SHAPES = {"b8-t4096": "8 x 4,096 tokens", "b1-t32768": "1 x 32,768 tokens"}
PASSES = {"forward": "forward", "training": "forward and backward"}
DDTS_CASES, ATTENTION_CASES = "ddts-{}-{}-bfloat16-v4096", "attention-{}-{}-bfloat16"
STEP_CASES = {n: f"attention-decode-b{n}-t2112-bfloat16" for n in (1, 8, 64, 256)}
ATTENTION = ("triton/expanded", "flex/expanded", "flex/repeated", "sdpa/expanded", "sdpa/repeated")
FLEX_SDPA = ("`flex`, in place", "`flex`, copied", "`sdpa`, in place", "`sdpa`, copied")
GEMMS_US = 43.8
"""Time of a block's linear layers at one row on the H200, as a chain of graph nodes; measured by
hand, not in the records."""


def passes(names: str) -> dict[str, Case]:
    """Cases of both passes over both shapes by their titles."""
    return {
        f"{title}, {tokens}": Case(names.format(what, shape))
        for what, title in PASSES.items()
        for shape, tokens in SHAPES.items()
    }


def ddts() -> Cells:
    yield "", "bound", "measured", "bound / measured", "`chunk_gla` of fla", "fla / measured"
    for title, case in passes(DDTS_CASES).items():
        ours, peer = case["ddts/triton_chunk"], case["chunk_gla/fla"]
        times = us(ours["floor_ms"]), us(ours["median_ms"]), f"{ours['floor_share']:.0%}"
        yield title, *times, us(peer["median_ms"]), f"{peer['median_ms'] / ours['median_ms']:.2f}"


def surroundings() -> Cells:
    """Operators around the mixer; their total is computed from sums of rounds, as in the target."""
    yield "", "bound", "measured", "bound / measured", "`reference`"
    case = Case("ddts-surroundings-b8-t4096-bfloat16-v4096")
    names = [row["family"] for row in case.values() if row["engine"] == "triton"]
    cells = lambda bound, ours, torch: (us(bound), us(ours), f"{bound / ours:.0%}", us(torch))
    for name in names:
        ours, torch = (case[f"{name}/{engine}"] for engine in ("triton", "reference"))
        yield f"`{name}`", *cells(ours["floor_ms"], ours["median_ms"], torch["median_ms"])
    bound = sum(case[f"{name}/triton"]["floor_ms"] for name in names)
    together = (
        median(targets.together_us(*(f"{name}/{engine}" for name in names))(case.record)) / 1e3
        for engine in ("triton", "reference")
    )
    yield "together", *cells(bound, *together)


def steps() -> Cells:
    """One token in one layer, by implementation."""
    yield "operator, sequences", "bound", "CUDA", "Triton"
    cases = [("ddts_step", f"ddts-step-b{n}-t1-bfloat16-v4096", "ddts_step", n) for n in (1, 256)]
    cases += [("shared_key_attention_step", case, "step", n) for n, case in STEP_CASES.items()]
    for name, case, family, batch in cases:
        native, triton = (Case(case)[f"{family}/{impl}"] for impl in ("native", "triton"))
        times = us(native["floor_ms"]), us(native["median_ms"]), us(triton["median_ms"])
        yield f"`{name}`, {batch}", *times


def attention() -> Cells:
    yield "", "bound", "`triton`", "bound / `triton`", *FLEX_SDPA
    for title, case in passes(ATTENTION_CASES).items():
        ours, *others = (us(case[name]["median_ms"]) for name in ATTENTION)
        row = case[ATTENTION[0]]
        yield title, us(row["floor_ms"]), ours, f"{row['floor_share']:.0%}", *others


def attention_bytes() -> Cells:
    yield "", "`triton`", *FLEX_SDPA
    for what, title in PASSES.items():
        case = Case(ATTENTION_CASES.format(what, "b8-t4096"))
        yield title, *(f"{case[name]['peak_bytes'] / 1e6:,.0f}" for name in ATTENTION)


def attention_bounds() -> Cells:
    yield "", "bound", "measured", "bound / measured"
    for what in ("forward", "backward"):
        for shape, tokens in SHAPES.items():
            forward, training = attention_passes(shape)
            bound, time = forward["floor_ms"], forward["median_ms"]
            if what == "backward":
                bound, time = training["floor_ms"] - bound, training["median_ms"] - time
            yield f"{what}, {tokens}", us(bound), us(time), f"{bound / time:.0%}"
    for batch, case in STEP_CASES.items():
        row = Case(case)["step/native"]
        title = f"step at a full window, {batch} sequence{'s' if batch > 1 else ''}"
        bound, time = row["floor_ms"], row["median_ms"]
        yield title, us(bound), us(time), f"{bound / time:.0%}"


def attention_passes(shape: str) -> list[Row]:
    """Our rows of the forward pass, and of forward and backward."""
    return [Case(ATTENTION_CASES.format(what, shape))[ATTENTION[0]] for what in PASSES]


def operators() -> dict[str, str]:
    step = Case(STEP_CASES[1])["step/native"]
    time, bound = step["median_ms"], step["floor_ms"]
    forward, both = attention_passes("b8-t4096")
    backward_ms = both["median_ms"] - forward["median_ms"]
    scan = Case(DDTS_CASES.format("forward", "b8-t4096"))["ddts/triton_chunk"]
    # a token's time without the linear layers and the attention steps of its blocks
    rest_ms = decoded(1, 4096).token_ms(PLUS) - LAYERS * (GEMMS_US / 1e3 + time)
    return {
        "ddts_bound_us": us(scan["floor_ms"]),
        "copy_rate_ddts": copy_rate(passes(DDTS_CASES).values()),
        "copy_rate_attention": copy_rate(map(Case, STEP_CASES.values())),
        "gemm_rate_attention": gemm_rate(passes(ATTENTION_CASES).values()),
        # seven GEMMs at this share of the peak GEMM throughput; forward's bound counts two
        "attention_backward_rate": f"{3.5 * forward['floor_ms'] / backward_ms:.0%}",
        "attention_step_us": us(time),
        "attention_step_bound_us": us(bound),
        "attention_steps_ms": f"{LAYERS * time:.2f}",
        "attention_steps_bound_ms": f"{LAYERS * bound:.2f}",
        "other_kernels_of_token_ms": f"{rest_ms:.2f}",
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


def quality() -> Cells:
    yield (
        *("", "recall, 8 pairs in 64", "passkey in 128, trained to 32"),
        *("bits/byte, rows of 128", "bits/byte, rows of 512, trained on 128"),
    )
    for variant, title in VARIANTS.items():
        cells = []
        for case, test in QUALITY:
            row = Case(f"quality-{case}", CPU).get(variant)
            scores = row["scores"][test] if row else []
            cells.append(
                f"{mean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})" if scores else "-"
            )
        yield title, *cells


# ----------------------------------------------------------------------------------------------
# Errors that tests measure
# ----------------------------------------------------------------------------------------------

GOLDENS = "largest error per golden group"
WAYS = "ways of running, against one full forward (max |a - b| / max |b|)"
ERRORS = {
    "logits vs. the original implementation, max absolute error": (
        GOLDENS,
        "greedy13.logits full forward",
    ),
    "the same, token by token": (GOLDENS, "greedy13.logits cached"),
    "gradients vs. the original implementation, max relative L2 error of a parameter": (
        GOLDENS,
        "T40.grad (relative L2)",
    ),
    "token-by-token decoding vs. one full forward, max relative error": (
        WAYS,
        "cached, by 1 token",
    ),
    "padding between turns, then decoding, vs. the unpadded rows, max relative error": (
        WAYS,
        "interior padding, continued by 1",
    ),
    "assisted generation (the state rolls back) vs. one full forward, max relative error": (
        WAYS,
        "generate, assisted",
    ),
}


DDTS_ERRORS = "DDTS: values and gradients against float64 (relative error in the Frobenius norm)"
ATTENTION_ERRORS = (
    "attention: values and gradients in float32 against float64 (relative, Frobenius norm)"
)


def measured_errors(table: str) -> dict[str, dict[str, list[float]]]:
    """``[error, bound]`` by row and column."""
    (run,) = records.measured(record("tests-exactness", CPU))
    return run["errors"][table]


def scientific(value: float) -> str:
    """``9.9e-6``."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def with_bounds(rows: Mapping[str, Mapping[str, list[float]]], titles: Mapping[str, str]) -> Cells:
    """Errors by row, in columns with titles, and the bound of each row."""
    yield "", *titles.values(), "tolerance"
    for name, cells in rows.items():
        errors = (scientific(cells[title][0]) if title in cells else "-" for title in titles)
        bound = scientific(max(bound for _, bound in cells.values()))
        yield name, *errors, bound.replace(".0e", "e")


def readme_exactness() -> Cells:
    found = {
        f"{title} (`{row}`)": measured_errors(table)[row] for title, (table, row) in ERRORS.items()
    }
    return with_bounds(found, {"rodimus": "Rodimus", "rodimus_plus": "Rodimus+"})


def ddts_errors() -> Cells:
    every = ("reference", "eager", "triton_chunk")
    return with_bounds(measured_errors(DDTS_ERRORS), {impl: f"`{impl}`" for impl in every})


def attention_errors() -> Cells:
    every = ("sdpa", "triton")
    return with_bounds(measured_errors(ATTENTION_ERRORS), {impl: f"`{impl}`" for impl in every})


def exactness() -> dict[str, str]:
    strained = measured_errors(GOLDENS)["strong.logits"]
    both = (scientific(strained[name][0]) for name in ("rodimus", "rodimus_plus"))
    return {"strained_logits": " and ".join(both)}


TABLES = {
    rows.__name__: rows
    for rows in (
        *(readme_gpu, decode, caches, readme_cpu),
        *(tokens_of_cpu, int8_tokens_of_cpu, int4_tokens_of_cpu),
        *(readme_train, train, train_kernels, ddts, surroundings, steps),
        *(attention, attention_bytes, attention_bounds, quality),
        *(readme_exactness, ddts_errors, attention_errors),
    )
}
