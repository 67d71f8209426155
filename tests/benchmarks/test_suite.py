"""The whole-model benchmarks run at the tiny scale and write records that hold what they promise.

No assertion here is about a time: a shared machine has none that can be trusted.
"""

import os

import pytest
import torch

from benchmarks import bench_fused, harness, machine, peers, records, report, timing
from tests import warm_python

FILES = [
    "bench_decode.py",
    "bench_prefill.py",
    "bench_memory.py",
    "bench_train.py",
    "bench_engine.py",
    "bench_long.py",
]


OPERATORS = ["bench_ddts.py", "bench_attention.py", "bench_blocks.py", "bench_fused.py"]


def run(folder, *options, files=FILES):
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    arguments += [f"benchmarks/{name}" for name in files]
    arguments += ["--bench-out", str(folder), "--bench-rounds", "2", "-rs", *options]
    # whoever commits while this runs must not make the cases look new
    environment = {**os.environ, machine.COMMIT_VARIABLE: "smoke", "OMP_NUM_THREADS": "1"}
    # inside a worker of this suite pytest-benchmark would run every case once, untimed
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = warm_python.run(*arguments, cwd=machine.ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def found(folder):
    run(folder)
    return {(r["group"], r["case"]): r for r in records.read(folder)}


def test_every_group_has_its_records(found):
    assert {group for group, _ in found} == {
        "decode",
        "prefill",
        "memory",
        "train",
        "trainer",
        "engine",
        "engine-step",
        "long",
    }


def test_operators_are_measured_or_skipped_with_a_reason(tmp_path):
    run(tmp_path, files=OPERATORS)
    found = records.read(tmp_path)
    groups = {record["group"].partition("-")[0] for record in found}
    assert groups == {"ddts", "attention", "blocks", "fused"}
    for row in (row for record in found for row in record["rows"]):
        assert row["reason"] if row["status"] == "skipped" else row["floor_ms"] > 0, row["target"]
    measured = {row["target"] for r in found for row in r["rows"] if row["status"] == "measured"}
    assert {"ddts/eager", "sdpa/expanded", "blocks/reference"} <= measured
    fused = {f"{name}/{engine}" for name in bench_fused.OPERATORS for engine in ("auto", "torch")}
    assert fused <= measured


@pytest.mark.slow
def test_an_empty_cache_is_for_operators_alone(tmp_path):
    said = run(
        tmp_path, "--bench-cold", "-k", "swiglu or memory", files=["bench_fused.py", FILES[2]]
    )
    assert "the cache is emptied before operators alone" in said
    found = records.read(tmp_path)
    assert {r["case"] for r in found} == {"cold-b2-t20-bfloat16-swiglu"}
    assert {r["group"] for r in found} == {"fused-forward", "fused-training"}
    assert {r["settings"]["cache"] for r in found} == {"cold"}


@pytest.mark.slow
def test_8_bit_weights_are_timed_in_the_engines_that_read_them(tmp_path):
    pytest.importorskip("torchao")
    said = run(tmp_path, "--bench-weights", "int8", files=["bench_decode.py", "bench_prefill.py"])
    assert "quantised weights are timed in decoding on a CPU alone" in said
    found = records.read(tmp_path)
    assert {r["case"].partition("-")[0] for r in found} == {"int8"}
    assert {r["settings"]["weights"] for r in found} == {"int8"}
    measured = [row for r in found for row in r["rows"] if row["status"] == "measured"]
    assert {f"{name}/engine" for name in peers.OURS} <= {row["target"] for row in measured}
    assert {row["engine"] for row in measured} <= {"engine", peers.LLAMA_CPP}
    assert all(row["moved_bytes"] > row["token_bytes"] > 0 for row in measured)


def test_every_model_is_measured_or_skipped_with_a_reason(found):
    taking_part = dict.fromkeys(("engine", "engine-step"), [set(peers.OURS)])
    taking_part |= dict.fromkeys(("trainer", "long"), [{name} for name in peers.OURS])
    for record in found.values():
        names = {row["target"].partition("/")[0] for row in record["rows"]}
        everyone = {entry.name for entry in peers.CATALOGUE}
        assert names in taking_part.get(record["group"], [everyone])
        ours = [r for r in record["rows"] if r["target"].startswith(peers.OURS)]
        assert all(row["status"] == "measured" for row in ours), ours


def test_the_peers_of_transformers_need_nothing_that_is_not_here(found):
    """A call that our own code makes wrongly would read as a reason of theirs."""
    theirs = tuple(entry.name for entry in peers.CATALOGUE if entry.source == "transformers")
    for group in ("decode", "prefill", "train"):
        (record, *_) = (r for (g, _), r in found.items() if g == group)
        measured = {r["target"].partition("/")[0] for r in record["rows"] if "median_ms" in r}
        assert measured >= set(theirs), record["rows"]


def test_timed_rows_hold_raw_samples_and_ratios_to_the_baselines(found):
    for (group, _), record in found.items():
        rows = [row for row in record["rows"] if row["status"] == "measured"]
        for row in rows if group in ("decode", "prefill") else ():
            assert len(row["samples"]["wall_ms"]) == record["settings"]["rounds"] == 2
            median, low, high, coverage = row["ratio_to_qwen2-1.5b"]
            assert 0 < low <= median <= high and 0 < coverage < 1
            assert row["tokens_per_s"] > 0


def test_the_trainers_step_is_timed_beside_a_bare_one(found):
    records = [record for (group, _), record in found.items() if group == "trainer"]
    assert len(records) == len(peers.OURS)
    for record in records:
        bare, trainer = record["rows"]
        assert [row["engine"] for row in (bare, trainer)] == ["dynamic", "trainer"]
        assert bare["flops"] == trainer["flops"] and trainer["tokens_per_s"] > 0


def test_engine_rows_have_percentiles_of_every_request(found):
    (record,) = (r for (group, _), r in found.items() if group == "engine")
    for row in record["rows"]:
        assert len(row["samples"]["first_token_ms"]) == row["requests"] == 4
        assert 0 < row["first_token_p50_ms"] <= row["first_token_p99_ms"]
        assert 0 < row["between_tokens_p50_ms"] <= row["between_tokens_p99_ms"]


def test_decode_rows_passed_the_correctness_check_and_have_a_floor(found):
    for row in found["decode", "b1-t48-bfloat16"]["rows"]:
        if row["status"] == "measured":
            assert row["disagreement"] < 0.1 and row["floor_ms"] > 0


def test_memory_equals_the_formula_and_does_not_grow_for_recurrent_models(found):
    cases = [found["memory", "b1-t48-bfloat16"], found["memory", "b2-t96-bfloat16"]]
    for record in cases:
        for row in record["rows"]:
            if row["status"] == "measured":
                assert row["state_bytes"] == row["expected_bytes"]
    per_sequence = [
        {row["target"]: row.get("state_bytes", 0) / record["settings"]["batch"]}
        for record in cases
        for row in record["rows"]
        if row["target"] == "rodimus-1.4b/dynamic"
    ]
    assert per_sequence[0] == per_sequence[1]


def test_a_share_of_the_memory_rate_is_that_of_its_rounds(found):
    """The machine of the second round is half as fast: the share stays."""
    for record in (r for r in found.values() if r["group"] == "decode"):
        read = record["settings"][harness.READ]["samples"]["wall_ms"]
        assert len(read) == record["settings"]["rounds"] == 2
    cpu = torch.device("cpu")
    bench = harness.Bench("tiny", cpu, torch.float32, (), folder=None, rounds=2, load=0.0)
    turns = timing.RoundRobin({"model/engine": int, harness.READ: int}, cpu, "model/engine")
    columns = {"model/engine": (10.0, 20.0, 10.0), harness.READ: (2.0, 4.0, 2.0)}
    for name, times in columns.items():
        turns.samples[name] = [timing.Sample(x, x, None) for x in times]
    row = {"target": "model/engine", "median_ms": 10.0, "moved_bytes": 2 * bench._source.nbytes}
    bench._add_floor(row, turns, {})
    assert row["floor_share"] == pytest.approx(0.4) and row["floor_ms"] == pytest.approx(4.0)
    assert row["floor_share_range"] == pytest.approx([0.4, 0.4])


def test_a_target_that_takes_too_long_is_skipped(monkeypatch):
    monkeypatch.setitem(harness.CALL_LIMIT_SECONDS, "cpu", -1.0)
    cpu, names = torch.device("cpu"), ("qwen2-1.5b",)
    bench = harness.Bench("tiny", cpu, torch.float32, names, folder=None, rounds=1, load=0.0)
    slow = lambda model, engine: harness.Target(model, engine, int)
    ready, rows = bench.targets(slow, lambda model: model.engines[:2])
    assert not ready and all(row["reason"].startswith("too slow: one call took") for row in rows)


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [(KeyError("lost"), True), (torch.OutOfMemoryError("3 GB"), False)],
    ids=["fault", "memory"],
)
@pytest.mark.parametrize("name", ["rodimus-1.4b", "qwen2-1.5b"])
def test_a_fault_of_ours_fails_its_case_after_the_record(tmp_path, name, error, is_fault):
    """One of a peer is its reason alone; the case of ours is not done."""

    def prepare(model, engine):
        raise error

    cpu = torch.device("cpu")
    bench = harness.Bench("tiny", cpu, torch.float32, (name,), folder=tmp_path, rounds=1, load=0.0)
    for _ in range(2):
        _, (row,) = bench.targets(prepare, lambda model: model.engines[:1])
        assert row["reason"].startswith(type(error).__name__)
    rows = [row, measured("rwkv6-1.6b")]
    if is_fault and name in peers.OURS:
        with pytest.raises(peers.Fault, match=f"{name}/.*: KeyError: 'lost'"):
            bench.record("decode", "case", {}, rows)
    else:
        bench.record("decode", "case", {}, rows)
    assert (tmp_path / "decode-case.json").is_file()
    assert bench.done("decode", "case") != (is_fault and name in peers.OURS)


@pytest.mark.parametrize("name", ["rodimus-1.4b", "qwen2-1.5b"])
def test_ours_that_decodes_wrongly_is_no_skipped_row(monkeypatch, name):
    monkeypatch.setattr(peers, "disagreement", lambda *_: 0.5)
    cpu = torch.device("cpu")
    bench = harness.Bench("tiny", cpu, torch.float32, (name,), folder=None, rounds=1, load=0.0)
    for _ in range(2):
        _, (row,) = bench.targets(None, lambda model: model.engines[:1])
        assert row["reason"].startswith("wrong: decoding differs")
        assert row.get("fault", False) == (name in peers.OURS)


def test_the_last_target_is_skipped_where_memory_does_not_suffice_for_all():
    cpu, names = torch.device("cpu"), ("rodimus-plus-1.6b", "qwen2-1.5b", "rodimus-1.4b")
    bench = harness.Bench("tiny", cpu, torch.float32, names, folder=None, rounds=2, load=0.0)
    resident = []

    def needs_memory(name):
        if name not in resident:
            resident.append(name)
        if len(resident) > 2:
            resident.clear()
            raise torch.OutOfMemoryError

    make = lambda model, engine: harness.Target(model, engine, lambda: needs_memory(model.name))
    targets = [make(bench.model(name), "dynamic") for name in names]
    skipped = []
    turns, rounds, _ = bench._settled(targets, skipped, 2)
    assert rounds == 2 and list(turns.targets) == [f"{name}/dynamic" for name in names[:2]]
    (row,) = skipped
    assert row["target"] == "rodimus-1.4b/dynamic"
    assert row["reason"] == "out of memory beside rodimus-plus-1.6b/dynamic, qwen2-1.5b/dynamic"


def test_a_second_run_measures_nothing_again(folder, found):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    output = run(folder)
    assert "recorded for this commit" in output
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_run_without_seconds_left_starts_nothing(tmp_path):
    output = run(tmp_path, "--bench-seconds", "1e-9")
    assert "run again to continue" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_takes_longest_comes_last(tmp_path):
    files = ["bench_serve.py", "bench_decode.py", "bench_fused.py"]
    said = run(tmp_path, "--collect-only", "-k", "loss or serve or decode", files=files)
    names = [line.rpartition("_")[2] for line in said.splitlines() if "::" in line]
    order = [name.partition("[")[0] for name in names]
    assert order == ["fused"] * 2 + ["decode"] * 2 + ["serve"] * 2


def test_an_empty_number_of_seconds_is_no_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("RODIMUS_BENCH_SECONDS", "")
    assert "1 test collected" in run(tmp_path, "--collect-only", "-k", "64", files=FILES[1:2])


@pytest.mark.slow
def test_a_second_sitting_is_added_to_the_first(tmp_path):
    options = ("--bench-sittings", "2", "--bench-models", "rodimus-1.4b,qwen2-1.5b")
    found, decoding = [], ["bench_decode.py"]
    for _ in range(2):
        run(tmp_path, *options, files=decoding)
        found.append({r["case"]: r for r in records.read(tmp_path)})
    first, second = (next(iter(each.values())) for each in found)
    assert (first["settings"]["sittings"], second["settings"]["sittings"]) == ([2], [2, 2])
    for before, after in zip(first["rows"], second["rows"], strict=True):
        assert before["status"] == after["status"]
        if before["status"] == "skipped":
            # llama.cpp is no dependency
            assert before["engine"] == peers.LLAMA_CPP
            continue
        assert after["samples"]["wall_ms"][:2] == before["samples"]["wall_ms"]
        assert len(after["samples"]["wall_ms"]) == 4
        low, high = after["ratio_to_qwen2-1.5b"][1:3]
        # the baseline's own ratio is 1 in every round
        assert low < high or after["target"].startswith("qwen2")
    assert "recorded for this commit" in run(tmp_path, *options, files=decoding)


class Fixture:
    """What a benchmark uses of pytest-benchmark's fixture."""

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def sit(folder, names, load=0.0, copy_rate=10.0, kept=None):
    """One sitting of two rounds; its record."""
    cpu = torch.device("cpu")
    run = {"rounds": 2, "load": load, "kept": kept}
    bench = harness.Bench("tiny", cpu, torch.float32, names, folder, **run)
    bench.sittings, bench._ceilings = 3, {"copy_GBps": copy_rate}
    make = lambda model: harness.Target(model, "dynamic", int)
    targets = [make(bench.model(name)) for name in names]
    asked = {"targets": targets, "skipped": [], "tokens": 1}
    return bench.interleave(Fixture(), "decode", "case", {}, **asked)


def test_nothing_stays_of_sittings_with_other_targets(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "smoke")
    sit(tmp_path, ("qwen2-1.5b", "rodimus-1.4b"), load=9.0)
    record = sit(tmp_path, ("rodimus-1.4b",), copy_rate=100.0)
    assert record["settings"]["sittings"] == [2]
    assert record["ceilings"] == {"copy_GBps": 100.0}
    assert not any("took 9.0" in warning for warning in record["warnings"])


def test_the_record_with_most_sittings_is_continued(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "smoke")
    names, folders = ("rodimus-1.4b",), [tmp_path / name for name in "ab"]
    for folder in (folders[0], *2 * folders[1:]):
        sit(folder, names)
    for folder in folders:
        (kept,) = {*folders} - {folder}
        with monkeypatch.context() as patched:
            patched.setattr(records, "write", lambda *_: None)
            assert sit(folder, names, kept=kept)["settings"]["sittings"] == [2, 2, 2]


def test_a_record_tells_of_the_busiest_of_its_sittings(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "smoke")
    taken = [0.9 * machine.os.cpu_count(), 0.0]
    monkeypatch.setattr(machine.Others, "cores", lambda others: taken.pop(0))
    busiest = taken[0]
    for _ in range(2):
        record = sit(tmp_path, ("rodimus-1.4b",))
        assert record["load"] == [0.0, busiest]
        assert [w for w in record["warnings"] if f"took {busiest:.1f}" in w]
    assert record["settings"]["sittings"] == [2, 2] and not taken


@pytest.mark.slow
def test_sittings_of_other_threads_or_versions_are_not_joined(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "smoke")
    names, about = ("rodimus-1.4b",), machine.describe(torch.device("cpu"))
    here = machine.commit()
    for other in ({}, {"threads": 77}, {"versions": {"torch": "1.0"}}, {"dirty": True}):
        sit(tmp_path, names)
        assert sit(tmp_path, names)["settings"]["sittings"] == [2, 2]
        with monkeypatch.context() as patched:
            patched.setattr(machine, "describe", lambda device, other=other: about | other)
            patched.setattr(machine, "commit", lambda other=other: here | other)
            joined = [2] if other else [2, 2, 2]
            assert sit(tmp_path, names)["settings"]["sittings"] == joined
        records.path_of({"group": "decode", "case": "case"}, tmp_path).unlink()


def measured(name):
    """A row that says no more than that its model was measured."""
    row = {"target": f"{name}/dynamic", "family": "f", "engine": "dynamic", "status": "measured"}
    return row | {"samples": {"wall_ms": [1.0, 1.0]}}


def test_a_case_in_which_nothing_was_measured_keeps_the_record_before_it(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "smoke")
    failed = [records.skipped("rodimus-1.4b", "rodimus", "any", "CUDA error: illegal access")]
    bench = harness.Bench("tiny", torch.device("cpu"), torch.float32, (), tmp_path, 2, 0.0)
    bench.record("decode", "case", {}, failed)
    assert not list(tmp_path.iterdir()) and not bench.done("decode", "case")
    bench.record("decode", "case", {}, [measured("rodimus-1.4b")])
    bench.record("decode", "case", {}, failed)
    assert bench.done("decode", "case") and records.measured(*records.read(tmp_path))


def test_a_record_of_fewer_models_is_not_that_of_the_case(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "smoke")
    bench = harness.Bench("tiny", torch.device("cpu"), torch.float32, (), tmp_path, 2, 0.0)
    rows = [measured("rodimus-1.4b"), records.skipped("rwkv6-1.6b", "rwkv6", "any", "no rwkv")]
    bench.record("decode", "case", {}, rows)
    assert bench.done("decode", "case", ("rodimus-1.4b", "rwkv6-1.6b"))
    assert not bench.done("decode", "case", ("rodimus-1.4b", "qwen2-1.5b"))


def test_a_model_without_an_engine_for_a_case_has_a_row(tmp_path):
    names = ("qwen2-1.5b",)
    bench = harness.Bench("tiny", torch.device("cpu"), torch.float32, names, None, 1, 0.0)
    ready, (row,) = bench.targets(None, lambda model: ())
    assert not ready and row["reason"] == "none of its engines does this"


def test_a_record_without_a_measured_row_is_no_record_of_the_case(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "smoke")
    bench = harness.Bench("tiny", torch.device("cpu"), torch.float32, (), tmp_path, 2, 0.0)
    record = bench.record("decode", "case", {}, [])
    records.write(record, tmp_path)
    assert not bench.done("decode", "case")


@pytest.mark.parametrize("other", [{"threads": 77}, {"versions": {"torch": "1.0"}}], ids=str)
def test_a_record_of_other_threads_or_versions_is_measured_again(tmp_path, monkeypatch, other):
    bench = harness.Bench("tiny", torch.device("cpu"), torch.float32, (), tmp_path, 2, 0.0)
    bench.record("decode", "case", {}, [measured("rodimus-1.4b")])
    assert bench.done("decode", "case")
    about = machine.describe(torch.device("cpu")) | other
    monkeypatch.setattr(machine, "describe", lambda device: about)
    assert not bench.done("decode", "case")


def test_a_commit_during_a_run_is_not_that_of_its_records(tmp_path, monkeypatch):
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "first")
    bench = harness.Bench("tiny", torch.device("cpu"), torch.float32, (), tmp_path, 2, 0.0)
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "second")
    record = bench.record("decode", "case", {}, [measured("rodimus-1.4b")])
    assert record["machine"]["commit"] == "first"
    assert bench.done("decode", "case")


def test_a_clock_that_begins_at_zero_is_a_clock():
    """CPU time is counted in steps that a short call may not reach."""
    cpu = torch.device("cpu")
    bench = harness.Bench("tiny", cpu, torch.float32, ("qwen2-1.5b",), None, rounds=2, load=0.0)
    target = harness.Target(bench.model("qwen2-1.5b"), "dynamic", int)
    turns = timing.RoundRobin({target.name: int}, cpu, target.name)
    turns.samples[target.name] = [timing.Sample(1.0, x, None) for x in (0.0, 1.0, 1.0)]
    row = harness._timed_row(target, turns, {"qwen2-1.5b": target.name}, tokens=1)
    assert row["samples"]["cpu_ms"] == [0.0, 1.0, 1.0] and row["median_cpu_ms"] == 1.0
    assert "ratio_to_qwen2-1.5b" in row and "median_device_ms" not in row
    assert "cpu_ratio_to_qwen2-1.5b" not in row, "nothing is so many times zero"
    assert report._ratio(row, "qwen2-1.5b") == "1.00x (1.00 .. 1.00)"
