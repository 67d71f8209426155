"""Targets are judged by the rounds of the records, losses first; nothing without a record is."""

import math
import random

import pytest

from benchmarks import docs, records, report, targets
from benchmarks.machine import folder_name
from benchmarks.targets import Target

GPU = {"name": "NVIDIA H200", "commit": "b" * 40}
CASE = "ddts-forward-b8"
STEADY = [0.2] * 9


def record(name, rows, machine=GPU, **settings):
    group, _, case = name.rpartition("-")
    rows = [records.row(target, *target.split("/"), **row) for target, row in rows.items()]
    return records.make(group, case, settings=settings, machine=machine, rows=rows)


def operator(samples, peer=(0.6,) * 9):
    return record(CASE, {"ours/x": {"samples_ms": samples}, "peer/y": {"samples_ms": list(peer)}})


def judged(target, *found):
    return targets.outcome(target, list(found))


def target(figure, goal, cases=((CASE,),)):
    return Target("NVIDIA_H200", "a case", figure, goal, cases)


@pytest.mark.parametrize(
    ("bound", "kind"), [(150, "missed"), (200, "met"), (199, "missed"), ("1,000", "met")]
)
def test_the_goal_decides(bound, kind):
    assert judged(target(targets.us("ours/x"), f"<= {bound} us"), operator(STEADY)).kind == kind


@pytest.mark.parametrize(
    ("sign", "bound", "kind"), [(">=", 3.0, "met"), (">", 3.0, "missed"), (">=", 3.1, "missed")]
)
def test_a_speedup_is_that_of_the_same_rounds(sign, bound, kind):
    samples = [0.25 * n for n in range(1, 10)]
    found = operator(samples, [3 * x for x in samples])
    outcome = judged(target(targets.speedup("ours/x", "peer/y"), f"{sign} {bound} times"), found)
    assert outcome.figure[:3] == (3.0, 3.0, 3.0)
    assert outcome.kind == kind


def test_a_median_that_meets_its_goal_in_some_rounds_only_is_open():
    spread = [0.1, 0.3, 0.19, 0.21, 0.2, 0.18, 0.22, 0.17, 0.23]
    case = target(targets.us("ours/x"), "<= 205 us")
    assert judged(case, operator(spread)).kind == "open"
    # the median itself does not meet it: the lucky rounds do not help
    assert judged(case._replace(goal="<= 195 us"), operator(spread)).kind == "missed"


def test_few_rounds_meet_nothing():
    case = target(targets.us("ours/x"), "<= 250 us")
    assert judged(case, operator(STEADY[:3], [0.6] * 3)).kind == "open"


@pytest.mark.parametrize(
    "found",
    [
        [],
        [record(CASE, {"peer/y": {"samples_ms": STEADY}})],
        [{**operator(STEADY), "machine": {"name": "Other GPU"}}],
        [
            {
                **operator(STEADY),
                "rows": [records.skipped("ours/x", "ours", "x", "does not fit")],
            }
        ],
    ],
    ids=["no record", "no row", "another machine", "skipped"],
)
def test_what_no_record_holds_is_not_measured(found):
    assert judged(target(targets.us("ours/x"), "<= 250 us"), *found).kind == "not measured"


def test_the_worst_case_counts_and_all_must_be_there():
    slow, fast = (
        record(f"decode-{name}", {"ours/x": {"samples": {"wall_ms": [8 * time] * 9}}}, steps=8)
        for name, time in (("slow", 2.0), ("fast", 1.0))
    )
    case = target(targets.ms("ours/x"), "<= 1.5 ms", (("decode-fast",), ("decode-slow",)))
    outcome = judged(case, slow, fast)
    assert outcome.kind == "missed" and outcome.figure.median == 2.0
    assert [r["case"] for r in outcome.records] == ["slow"]
    assert judged(case, fast).kind == "not measured"
    least = case._replace(goal=">= 1.5 ms")
    assert [r["case"] for r in judged(least, slow, fast).records] == ["fast"]


def test_backward_is_what_remains_of_both_passes():
    names = ("attention-training", "attention-forward")
    training, forward = (
        record(name, {"ours/x": {"samples_ms": [time] * 9}})
        for name, time in zip(names, (4.0, 1.0), strict=True)
    )
    case = target(targets.backward_us("ours/x"), "<= 3,000 us", (names,))
    outcome = judged(case, forward, training)
    assert outcome.kind == "met" and outcome.figure.median == 3000.0


LONG, SHORT = "decode-long", "decode-short"


def grown(long, short):
    """What records of two contexts say of a token's growth."""
    found = [
        record(name, {"ours/x": {"samples_ms": [*samples]}})
        for name, samples in ((LONG, long), (SHORT, short))
    ]
    return judged(target(targets.growth("ours/x"), "<= 3 %", ((LONG, SHORT),)), *found)


def test_a_median_that_was_timed_by_itself_widens_the_interval():
    steady, spread = [102.0] * 9, [100.0] * 5 + [98.0] * 2 + [104.0] * 2
    assert grown(steady, [100.0] * 9).figure[:3] == pytest.approx((2.0, 2.0, 2.0))
    outcome = grown(steady, spread)
    assert outcome.figure[:3] == pytest.approx((2.0, 100 * (102 / 104 - 1), 100 * (102 / 98 - 1)))
    assert outcome.kind == "open" and outcome.figure.coverage >= 0.95


def test_two_records_enclose_their_growth_as_often_as_they_say():
    draw = random.Random(0)
    rounds = lambda middle: [middle * math.exp(draw.gauss(0, 0.01)) for _ in range(15)]
    held = [grown(rounds(102.0), rounds(100.0)).figure for _ in range(500)]
    covered = sum(low <= 2.0 <= high for _, low, high, _ in held) / len(held)
    assert covered >= held[0].coverage >= 0.95


def test_the_speedup_of_a_backward_is_as_uncertain_as_both_forwards():
    names = ("attention-training", "attention-forward")
    times = {"training": (4.0, 8.0), "forward": (1.0, 2.0)}
    found = [
        record(
            f"attention-{what}",
            {
                name: {"samples_ms": [time] * 7 + [time * x for x in (0.9, 0.9, 1.1, 1.1)]}
                if what == "forward"
                else {"samples_ms": [time] * 11}
                for name, time in zip(("ours/x", "peer/y"), times[what], strict=True)
            },
        )
        for what in times
    ]
    case = target(targets.backward_speedup("ours/x", "peer/y"), ">= 1.9 times", (names,))
    figure = judged(case, *found).figure
    assert figure[:3] == pytest.approx((2.0, (8 - 2.2) / (4 - 0.9), (8 - 1.8) / (4 - 1.1)))


def test_the_bound_of_a_round_is_that_of_the_memory_in_it():
    read = {"bytes": 10**9, "samples": {"wall_ms": [10.0, 20.0] * 5}}
    row = {"moved_bytes": 2 * 10**9, "samples": {"wall_ms": [25.0, 50.0] * 5}}
    found = record(CASE, {"ours/x": row}, memory_read=read)
    case = target(targets.over_bound("ours/x"), "<= 1.15 times")
    assert judged(case, found).figure[:3] == (1.25, 1.25, 1.25)


def test_the_hosts_time_of_a_step_is_what_its_kernels_leave():
    # the kernels of a call, which is two steps
    row = {"kernels_ms": 3.0, "samples": {"step": [2.0] * 9, "model": [1.0] * 9}}
    host = target(targets.host_us("ours/greedy"), "<= 50 us")
    assert judged(host, record(CASE, {"ours/greedy": row}, steps=2)).figure[:3] == (500.0,) * 3
    del row["kernels_ms"]
    assert judged(host, record(CASE, {"ours/greedy": row}, steps=2)).kind == "not measured"


NAME = "rodimus-plus-1.6b"


def counted(case, **fields):
    return record(case, {f"{NAME}/dynamic": fields, "qwen2-1.5b/dynamic": dict.fromkeys(fields, 9)})


def test_bytes_are_held_to_the_formula_without_an_interval():
    case = target(targets.over_formula(NAME), "<= 1 times", (("memory-a",), ("memory-b",)))
    equal = counted("memory-a", state_bytes=100, expected_bytes=100)
    for kept, kind in ((100, "met"), (101, "missed"), (99, "missed")):
        other = counted("memory-b", state_bytes=kept, expected_bytes=100)
        outcome = judged(case, equal, other)
        assert outcome.kind == kind and outcome.figure.low == outcome.figure.high
    assert judged(case, equal).kind == "not measured"


def test_a_state_that_grows_misses_its_goal():
    case = target(targets.state_growth(NAME), "<= 0 %", (("memory-long", "memory-short"),))
    short = counted("memory-short", state_bytes=100)
    for kept, percent, kind in ((100, 0.0, "met"), (103, 3.0, "missed")):
        outcome = judged(case, short, counted("memory-long", state_bytes=kept))
        assert outcome.kind == kind and outcome.figure.median == pytest.approx(percent)


@pytest.mark.parametrize(
    ("of_plan", "kind"), [(1.09, "met"), (1.2, "missed"), (0.92, "met"), (0.9, "missed")]
)
def test_the_peak_of_training_is_held_to_its_plan(of_plan, kind):
    case = target(targets.over_plan(NAME), "<= 1.1 times", (("long-a",),))
    found = counted("long-a", of_plan=of_plan)
    assert judged(case, found).kind == kind
    found["rows"].append(records.skipped(f"{NAME}/trainer-full", "f", "trainer-full", "no room"))
    assert judged(case, found).kind == kind


def test_the_page_tells_a_count_without_an_interval_and_why_nothing_can_be_measured(monkeypatch):
    made = {"counted": (targets.state_growth(NAME), "<= 0 %", (("memory-a", "memory-a"),))}
    made["no reference"] = (None, ">= 1.5 times", ())
    named = [Target("NVIDIA_H200", name, *rest) for name, rest in made.items()]
    monkeypatch.setattr(targets, "TARGETS", named)
    found = counted("memory-a", state_bytes=100, expected_bytes=100, **MEMORY)
    text = report.render([found])
    assert "| met | counted | <= 0 % | 0 |  | NVIDIA H200 | memory-a, memory-a |" in text
    assert "| no reference | >= 1.5 times |  |  |  | none: the first loop was of" in text


MEMORY = {"weight_bytes": 1, "recurrent_bytes": 1, "cached_bytes": 1}


def test_model_flops_are_a_share_of_the_data_sheet():
    row = {"flops": 989e9, "samples": {"wall_ms": [2.0] * 9}}
    found = record(CASE, {"ours/x": row}, batch=2, context=50)
    assert judged(target(targets.mfu("ours/x"), ">= 50 %"), found).figure.median == 50.0
    assert judged(target(targets.tokens_per_s("ours/x"), "> 1 tokens/s"), found).figure[0] == 5e4


def test_what_is_missed_stands_first_and_what_is_met_last(monkeypatch):
    spread = [0.1, 0.3, 0.19, 0.21, 0.2, 0.18, 0.22, 0.17, 0.23]
    time, cases = targets.us("ours/x"), ((CASE,),)
    made = {
        "met": target(time, "<= 1,000 us", cases),
        "not measured": target(None, "<= 1 us", ()),
        "missed": target(time, "<= 100 us", cases),
        "open": target(time, "<= 205 us", cases),
    }
    named = [case._replace(name=name) for name, case in made.items()]
    monkeypatch.setattr(targets, "TARGETS", named)
    found = [outcome.target.name for outcome in targets.outcomes([operator(spread)])]
    assert found == ["missed", "open", "not measured", "met"]
    assert targets.counts(targets.outcomes([operator(spread)])) == (
        "1 of 4 are met, 1 missed, 1 open and 1 not measured"
    )


def test_the_page_lists_every_target_before_losses_and_wins_against_peers():
    found = records.read(report.HERE / "results")
    text = report.render(report.ordered(found))
    section = text[text.index("## Targets") : text.index("## Where Rodimus loses")]
    rows = [
        x for x in section.splitlines() if x.startswith(tuple(f"| {k} |" for k in targets.KINDS))
    ]
    assert len(rows) == len(targets.TARGETS)
    for row, outcome in zip(rows, targets.outcomes(found), strict=True):
        assert f"| {outcome.target.name} | {outcome.target.goal} |" in row


def test_records_of_another_machine_have_no_targets():
    found = [record("other-case", {"a/b": {"samples_ms": STEADY}}, {"name": "Test GPU"})]
    assert "## Targets" not in report.render(found)


def test_every_target_whose_records_exist_is_measured():
    names = [(target.machine, target.name) for target in targets.TARGETS]
    assert len(set(names)) == len(names)
    found = records.read(report.HERE / "results")
    recorded = {(folder_name(r["machine"]["name"]), f"{r['group']}-{r['case']}") for r in found}
    for outcome in targets.outcomes(found):
        machine, *_, cases = outcome.target
        wanted = {(machine, name) for case in cases for name in case}
        is_recorded = bool(wanted) and wanted <= recorded
        assert is_recorded == (outcome.kind != "not measured"), outcome.target.name


def test_operators_in_turn_are_all_there():
    rows = {name: {"samples_ms": [0.125] * 9} for name in ("ours/x", "peer/y")}
    sum_of_two = target(targets.together_us("ours/x", "peer/y"), "<= 250 us")
    assert judged(sum_of_two, record(CASE, rows)).figure.median == 250.0
    del rows["ours/x"]
    assert judged(sum_of_two, record(CASE, rows)).kind == "not measured"


def test_the_readme_counts_them():
    found = [outcome.kind for outcome in targets.outcomes(records.read(report.HERE / "results"))]
    told = docs.figures()["targets"]
    assert f"{found.count('met')} of {len(found)} are met" in told
    assert f"{found.count('missed')} missed" in told
    assert f"{found.count('not measured')} not measured" in told
