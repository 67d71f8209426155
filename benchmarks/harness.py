"""One run of whole-model benchmarks: models loaded once, targets in turn, a record per case.

The pytest files say what a target does; everything they share is here: which models can run, the
correctness check before any timing, rows with ratios and floors, and the record.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import machine, peers, records, timing

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

DISAGREEMENT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Relative error between decoding and prefilling above which a model is not timed."""

READ = "memory_read"
"""On a CPU timed in each round like a target: a read of more memory than a cache holds."""

MARGIN_BYTES = 2 * 10**9
"""Memory left free when a cache is filled at full scale."""

CALL_LIMIT_SECONDS = {"cpu": 30.0, "cuda": 10.0}
"""A target whose single call takes longer is skipped: a round would take the whole run."""

PREPARE_LIMIT_SECONDS = {"cpu": None, "cuda": 120.0}
"""A target that takes longer to be made, checked and compiled is skipped: the blocks of a model are
compiled one by one."""


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def skipped_row(label: str, engine: str, found: peers.Unavailable) -> dict[str, Any]:
    """The row of a model, or of a model in an engine, that could not be measured."""
    name = records.model_of(label)
    is_fault = name in peers.OURS and isinstance(found, peers.Fault)
    family = peers.entry(name).family
    return records.skipped(label, family, engine, str(found), is_fault=is_fault)


@dataclasses.dataclass
class Target:
    """One model in one engine, ready to be timed.

    Attributes:
        model: The model that runs.
        engine: One of the model's engines.
        call: What is timed.
        facts: Fields of the row that are known before timing.
        before: Called before each call, and not timed.
    """

    model: peers.Model
    engine: str
    call: Callable[[], object]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    before: Callable[[], object] | None = None

    @property
    def name(self) -> str:
        """``model/engine``."""
        return f"{self.model.name}/{self.engine}"

    def row(self, **fields: Any) -> dict[str, Any]:
        """The row of this target in a record."""
        known = {
            "dtype": dtype_name(self.model.dtype),
            "weight_bytes": self.model.weight_bytes,
            "token_bytes": self.model.token_bytes,
        }
        fields = {**known, **self.facts, **fields}
        return records.row(self.name, self.model.family, self.engine, **fields)


@dataclasses.dataclass
class Bench:
    """Settings of a run and what it has loaded.

    Attributes:
        scale: ``tiny`` or ``full``.
        device, dtype: Of every model.
        names: Models of the catalogue that take part.
        folder: Where records go; None writes none.
        kept: Folder of earlier records; a case of this commit in it is not measured again.
        rounds: Timed rounds of a case; warm-up has at most as many, on a GPU twice as many.
        load: Cores that other programs kept busy before the run.
        deadline: ``time.monotonic()`` after which no further case starts.
        case_seconds: A case gets fewer rounds, but at least six, if it would take longer than this.
        again: Measure even cases that have a record.
        weight_dtype: What ``peers.load`` rounds the matrices of linear layers to.
        sittings: Each run is one sitting; a case whose record has fewer is timed again, and its
            rounds are added.
        cold: Empty the cache before each call of an operator.
    """

    scale: str
    device: torch.device
    dtype: torch.dtype
    names: tuple[str, ...]
    folder: Path | None
    rounds: int
    load: float
    kept: Path | None = None
    deadline: float = float("inf")
    case_seconds: float = float("inf")
    again: bool = False
    sittings: int = 1
    weight_dtype: str | None = None
    cold: bool = False
    models: dict[str, peers.Model | peers.Unavailable] = dataclasses.field(default_factory=dict)
    checked: dict[str, float | peers.Unavailable] = dataclasses.field(default_factory=dict)
    # the commit of the imported code, whatever is committed while it runs
    commit: dict[str, Any] = dataclasses.field(default_factory=lambda: machine.commit())
    _ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    # counts since the run began or the last record was made
    _others: machine.Others = dataclasses.field(default_factory=machine.Others)

    @property
    def ceilings(self) -> dict[str, float]:
        """The machine's ceilings, measured once in this run."""
        if not self._ceilings:
            quick = self.scale == "tiny"
            self._ceilings = machine.ceilings(self.device, self.dtype, quick=quick)
        return self._ceilings

    def case(self, batch: int, length: int) -> str:
        """Name of a case, and of its file: ``b1-t4096-bfloat16``, with quantised
        weights ``int8-b1-t4096-bfloat16``, with an empty cache ``cold-b1-t4096-bfloat16``."""
        kind = f"{self.weight_dtype}-" if self.weight_dtype else ""
        kind += "cold-" * self.cold
        return f"{kind}b{batch}-t{length}-{dtype_name(self.dtype)}"

    def model(self, name: str) -> peers.Model:
        """A model with random weights, loaded at its first use.

        Raises:
            peers.Unavailable: it cannot be loaded here.
        """
        if name not in self.models:
            try:
                # weights made in inference mode could never be trained
                with torch.inference_mode(False):
                    what = name, self.scale, self.dtype, self.device
                    self.models[name] = peers.guarded(
                        lambda: peers.load(*what, weight_dtype=self.weight_dtype)
                    )
            except peers.Unavailable as reason:
                self.models[name] = reason.copy()
        found = self.models[name]
        if isinstance(found, peers.Unavailable):
            raise found.copy()
        return found

    def done(self, group: str, case: str, names: Iterable[str] = ()) -> bool:
        """Whether the case has a record of this code and machine already, with a row (measured or
        skipped) of every named model and with enough sittings."""
        for record in self._recorded(group, case):
            sittings = record["settings"].get("sittings")
            enough = sittings is None or len(sittings) >= self.sittings
            if enough and {*names} <= {records.model_of(row["target"]) for row in record["rows"]}:
                return True
        return False

    def _recorded(self, group: str, case: str) -> list[dict[str, Any]]:
        """Records of this machine, versions and code in which anything was measured and no model of
        ours failed; none if everything is to be measured again."""
        here = machine.describe(self.device) | self.commit
        folders = {self.folder, self.kept} if not self.again else set()
        return [
            r
            for folder in folders
            if folder is not None and folder.is_dir()
            for r in records.read(folder)
            if (r["group"], r["case"]) == (group, case)
            and machine.are_alike(here, r["machine"])
            and records.measured(r)
            and not records.faults(r)
        ]

    def targets(
        self,
        prepare: Callable[[peers.Model, str], Target],
        engines: Callable[[peers.Model], tuple[str, ...]] = lambda model: model.engines,
    ) -> tuple[list[Target], list[dict[str, Any]]]:
        """Every model in every engine that can do a case, and rows of those that cannot.

        Args:
            prepare: Makes a target, which is called once untimed, so that failures happen here.
            engines: The engines of a model that take part.
        """
        ready, rows = [], []
        for name in self.names:
            try:
                model = self.model(name)
                if not (taking_part := engines(model)):
                    raise peers.Unavailable("none of its engines does this")
            except peers.Unavailable as reason:
                rows.append(skipped_row(name, "any", reason))
                continue
            for engine in taking_part:
                label = f"{name}/{engine}"
                try:
                    ready.append(
                        peers.guarded(
                            lambda m=model, e=engine: self._prepared(prepare, m, e),
                            PREPARE_LIMIT_SECONDS[self.device.type],
                        )
                    )
                except peers.Unavailable as reason:
                    # what failed or was interrupted would fail again
                    self.checked.setdefault(label, reason.copy())
                    rows.append(skipped_row(label, engine, reason))
        return ready, rows

    def _prepared(
        self, prepare: Callable[[peers.Model, str], Target], model: peers.Model, engine: str
    ) -> Target:
        """A target that is correct and fast enough; on a GPU its first call compiles. An engine
        that is not one of the model's own is checked as the model's first."""
        self._check(model, engine if engine in model.engines else model.engines[0])
        target = prepare(model, engine)
        limit = CALL_LIMIT_SECONDS[self.device.type]
        for _ in range(2 if self.device.type == "cuda" else 1):
            if target.before is not None:
                target.before()
            start = time.monotonic()
            target.call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
            if seconds <= limit:
                return target
        raise peers.Unavailable(f"too slow: one call took {seconds:.0f} s, limit {limit:.0f} s")

    def _check(self, model: peers.Model, engine: str) -> None:
        """Raise Unavailable unless the engine's decoding agrees with its prefill of the same
        tokens, a recorded step with the plain one, and the logits with those of other code."""
        label = f"{model.name}/{engine}"
        if label not in self.checked:
            self.checked[label] = peers.guarded(lambda: self._disagreement(model, engine))
        error = self.checked[label]
        if isinstance(error, peers.Unavailable):
            raise error.copy()
        limit = DISAGREEMENT_LIMITS[self.dtype]
        if not error <= limit:
            raise peers.Fault(
                f"wrong: decoding differs from prefilling by {error:.1e}, limit {limit:.0e}"
            )

    def _disagreement(self, model: peers.Model, engine: str) -> float:
        """Relative error between decoding and prefilling, after the other comparisons."""
        ids = peers.random_tokens(1, 20, model)
        error = peers.disagreement(model.session(engine, 1, 32), ids)
        if engine in peers.RECORDED:
            peers.require_replay(model, ids, engine)
        if engine == peers.LLAMA_CPP:
            # both engines round, independently: errors of 0.12 (rwkv) and 0.06 in bfloat16,
            # against float32 with the same weights
            peers.require_same_logits(model, ids, 2 * DISAGREEMENT_LIMITS[self.dtype])
        return error

    def require_room(self, model: peers.Model, batch: int, context: int) -> None:
        """Raise Unavailable if the state at a context does not fit into free memory."""
        needed = model.expected_state(batch, context).total
        free = machine.memory_bytes(self.device)
        if self.scale == "full" and needed + MARGIN_BYTES > free:
            raise peers.Unavailable(
                f"state of {needed / 1e9:.1f} GB does not fit, {free / 1e9:.1f} GB are free"
            )

    def interleave(
        self,
        benchmark: Any,
        group: str,
        case: str,
        settings: Mapping[str, Any],
        targets: list[Target],
        skipped: list[dict[str, Any]],
        *,
        tokens: int,
        rounds: int | None = None,
    ) -> dict[str, Any]:
        """Time targets in turn, add what earlier sittings found, and write the record.

        Args:
            benchmark, targets, skipped, tokens, rounds: As in ``time_targets``.
            group, case, settings: As in ``records.make``.
        """
        earlier = None
        if self.sittings > 1:
            found = [r for r in self._recorded(group, case) if "sittings" in r["settings"]]
            earlier = max(found, key=lambda r: len(r["settings"]["sittings"]), default=None)
        rows, used = self.time_targets(
            benchmark, targets, skipped, tokens=tokens, rounds=rounds, earlier=earlier
        )
        if len(used.get("sittings", ())) < 2:
            # the earlier record had other targets: nothing of it is in the rows
            earlier = None
        benchmark.group = f"{group} {case}"
        return self.record(group, case, {**used, **settings}, rows, earlier)

    def time_targets(
        self,
        benchmark: Any,
        targets: list[Target],
        skipped: list[dict[str, Any]],
        *,
        tokens: int,
        rounds: int | None = None,
        earlier: dict[str, Any] | None = None,
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows of all targets, and the rounds that were run.

        Args:
            benchmark: The fixture of pytest-benchmark; it times the focus of each round.
            targets, skipped: From ``targets``; the first target is the focus.
            tokens: Tokens that one call consumes or produces.
            rounds: Timed rounds; by default those of the run.
            earlier: Record of earlier sittings; ignored if it has other targets.
        """
        rounds = rounds or self.rounds
        if not targets:
            return skipped, {"rounds": 0, "warm_up_rounds": 0}
        turns, rounds, warm_up = self._settled(targets, skipped, rounds)
        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(turns.time_focus, setup=turns.time_others, rounds=rounds)
        finally:
            gc.enable()
        used = {"rounds": rounds, "warm_up_rounds": warm_up}
        if self.sittings > 1:
            earlier = _join(turns, earlier)
            used["sittings"] = turns.sittings
        if READ in turns.targets:
            used[READ] = {"bytes": self._source.nbytes, "samples": _rounded(turns, READ)}
        references = _best_baselines(targets, turns)
        rows = [_timed_row(target, turns, references, tokens) for target in targets]
        for row in rows:
            self._add_floor(row, turns, self._rates(earlier))
        return rows + skipped, used

    def _settled(
        self, targets: list[Target], skipped: list[dict[str, Any]], rounds: int
    ) -> tuple[timing.RoundRobin, int, int]:
        """The turns after warm-up, the rounds to time and the rounds of warm-up.

        Each target has run alone before; if memory does not suffice for all of them together, the
        last ones are skipped.
        """
        while True:
            calls = {target.name: target.call for target in targets}
            if self.device.type == "cpu" and any("moved_bytes" in x.facts for x in targets):
                calls[READ] = lambda: self._source.sum()
            before = {target.name: target.before for target in targets if target.before}
            turns = timing.RoundRobin(calls, self.device, focus=targets[0].name, before=before)
            try:
                return turns, *turns.settle(rounds, self.case_seconds)
            except torch.OutOfMemoryError:
                if len(targets) == 1:
                    raise
            last = targets.pop()
            reason = f"out of memory beside {', '.join(target.name for target in targets)}"
            skipped.append(records.skipped(last.name, last.model.family, last.engine, reason))
            del calls, before, turns, last
            gc.collect()
            torch.cuda.empty_cache()

    def _rates(self, earlier: dict[str, Any] | None) -> dict[str, float]:
        """The machine's ceilings, as means over all sittings if there are earlier ones."""
        if earlier is None:
            return self.ceilings
        count = len(earlier["settings"]["sittings"])
        before = earlier["ceilings"]
        return {k: (count * before[k] + v) / (count + 1) for k, v in self.ceilings.items()}

    @functools.cached_property
    def _source(self) -> torch.Tensor:
        """The tensor that each round reads, to measure the memory rate at that moment."""
        return torch.ones(machine.read_elements(self.device, quick=self.scale == "tiny"))

    def _add_floor(
        self, row: dict[str, Any], turns: timing.RoundRobin, rates: Mapping[str, float]
    ) -> None:
        """Add how near a row comes to this machine's memory or matrix rate, whichever it counts. On
        a CPU the memory rate is that of each round."""
        seconds = row["median_ms"] / 1e3
        if "moved_bytes" in row and READ in turns.targets:
            parts = row["moved_bytes"] / self._source.nbytes
            reads, calls = turns.column(READ), turns.column(row["target"])
            shares = [parts * read / call for read, call in zip(reads, calls, strict=True)]
            row["floor_ms"] = parts * turns.summary(READ).median
            row["floor_share"], *row["floor_share_range"] = timing.summarize(shares)
        elif "moved_bytes" in row:
            row["floor_ms"] = row["moved_bytes"] / rates["copy_GBps"] / 1e6
            row["floor_share"] = row["floor_ms"] / row["median_ms"]
        if "flops" in row:
            row["TFLOPs"] = row["flops"] / seconds / 1e12
            row["share_of_gemm"] = row["TFLOPs"] / rates["gemm_TFLOPs"]

    def record(
        self,
        group: str,
        case: str,
        settings: Mapping[str, Any],
        rows: list[dict[str, Any]],
        earlier: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Make a record of this run and of earlier sittings. It is written if the run has a folder
        and anything was measured: a fault of the GPU must not replace an earlier record.

        Raises:
            peers.Fault: a model of ours fails or is wrong; the record with the others is written.
        """
        load = self.load, self._others.cores()
        self._others.start()
        warnings = machine.disturbances(*load)
        if earlier is not None:
            load = tuple(map(max, load, earlier["load"]))
            warnings = list(dict.fromkeys((*earlier["warnings"], *warnings)))
        record = records.make(
            group,
            case,
            settings={
                "scale": self.scale,
                "dtype": dtype_name(self.dtype),
                "seed": peers.SEED,
                **({"weights": self.weight_dtype} if self.weight_dtype else {}),
                **({"cache": "cold"} if self.cold else {}),
                **settings,
            },
            machine=machine.describe(self.device) | self.commit,
            ceilings=self._rates(earlier),
            load=load,
            warnings=warnings,
            rows=rows,
        )
        if self.folder is not None and records.measured(record):
            records.write(record, self.folder)
        if faults := records.faults(record):
            raise peers.Fault("; ".join(faults))
        return record

    @property
    def few_rounds(self) -> int:
        """Rounds for calls that take seconds: a third of the run's."""
        return max(self.rounds // 3, min(self.rounds, 6))

    def out_of_time(self) -> bool:
        """Whether the run's seconds are spent."""
        return time.monotonic() > self.deadline


def _join(turns: timing.RoundRobin, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """Put the samples of earlier sittings before those just taken; returns their record, or None if
    it has other targets, so that this sitting is the first."""
    found = {row["target"]: row for row in (earlier or {"rows": []})["rows"] if "samples" in row}
    if earlier is not None and READ in earlier["settings"]:
        found[READ] = earlier["settings"][READ]
    if set(found) != set(turns.samples):
        turns.add_earlier([], dict.fromkeys(turns.samples, []))
        return None
    samples = {
        name: [timing.Sample(*times) for times in zip(*_columns(row), strict=True)]
        for name, row in found.items()
    }
    turns.add_earlier(earlier["settings"]["sittings"], samples)
    return earlier


def _clocks(turns: timing.RoundRobin, name: str) -> dict[str, list[float]]:
    """The samples of a target by the clocks that the machine has."""
    columns = {clock: turns.column(name, clock) for clock in timing.Sample._fields}
    return {clock: column for clock, column in columns.items() if column[0] is not None}


def _rounded(turns: timing.RoundRobin, name: str) -> dict[str, list[float]]:
    """What ``_clocks`` returns, rounded for a record."""
    return {clock: [round(x, 6) for x in column] for clock, column in _clocks(turns, name).items()}


def _columns(row: dict[str, Any]) -> list[list[float | None]]:
    """The samples of a row by clock; None where the machine lacks one."""
    count = len(row["samples"]["wall_ms"])
    return [row["samples"].get(clock, [None] * count) for clock in timing.Sample._fields]


def _best_baselines(targets: list[Target], turns: timing.RoundRobin) -> dict[str, str]:
    """The fastest engine of each baseline that runs; ratios are taken to it."""
    best: dict[str, str] = {}
    for name in peers.BASELINES:
        engines = [target.name for target in targets if target.model.name == name]
        if engines:
            best[name] = min(engines, key=lambda label: turns.summary(label).median)
    return best


def _timed_row(
    target: Target, turns: timing.RoundRobin, references: Mapping[str, str], tokens: int
) -> dict[str, Any]:
    clocks = _clocks(turns, target.name)
    wall = turns.summary(target.name)
    ratios = {
        f"{kind}ratio_to_{name}": list(
            timing.ratio(turns.column(label, clock), clocks[clock], turns.sittings)
        )
        for name, label in references.items()
        for kind, clock in (("", "wall_ms"), ("cpu_", "cpu_ms"))
        # CPU time is counted in ticks, and a short call may take less than one
        if all(clocks[clock])
    }
    medians = {
        f"median_{clock}": turns.summary(target.name, clock).median
        for clock in clocks
        if clock != "wall_ms"
    }
    return target.row(
        samples=_rounded(turns, target.name),
        **wall.in_ms(),
        p99_ms=timing.quantile(turns.column(target.name), 0.99),
        noisy=wall.noisy,
        tokens_per_s=1e3 * tokens / wall.median,
        **medians,
        **ratios,
    )
