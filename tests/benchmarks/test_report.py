"""The report says what the records say: losses first, and the same bytes every time."""

import pytest

from benchmarks import plots, records, report

MACHINE = {"name": "Test CPU", "threads": 1, "versions": {"torch": "2"}, "commit": "a" * 40}


def row(target, times, **fields):
    return {
        "target": target,
        "family": "f",
        "engine": target.partition("/")[2],
        "status": "measured",
        "samples": {"wall_ms": times, "cpu_ms": times},
        "median_ms": sorted(times)[len(times) // 2],
        "p20_ms": min(times),
        "p80_ms": max(times),
        "median_cpu_ms": times[0],
        "noisy": False,
        "tokens_per_s": 1.0,
        "moved_bytes": 3_000_000_000,
        "floor_ms": 1.0,
        "floor_share": 0.5,
        **fields,
    }


def decode(case, ours, qwen2, *, batch=1, context=128, **fields):
    """A record of ours against Qwen2: nine rounds each."""
    rows = [
        row("rodimus-plus-1.6b/dynamic", ours, **fields),
        row("qwen2-1.5b/static", qwen2),
        records.skipped("rwkv6-1.6b", "rwkv6", "any", "rwkv is not installed"),
    ]
    settings = {"batch": batch, "context": context, "dtype": "bfloat16", "scale": "full"}
    return records.make("decode", case, settings=settings, machine=MACHINE, rows=rows)


SLOW, EVEN, FAST = [12.0] * 9, [8.0, 12.0, 9.0, 11.0, 10.0, 9.5, 10.5, 8.5, 12.5], [5.0] * 9
PEER = [10.0] * 9


@pytest.fixture
def found():
    return [
        decode("lost", SLOW, PEER, context=128, moved_bytes=4_000_000_000),
        decode("even", EVEN, PEER, context=1024),
        decode("won", FAST, PEER, context=4096),
    ]


def test_losses_stand_before_wins_and_have_a_reason(found):
    text = report.render(found)
    order = [text.index(t) for t in ("loses", "nothing can be claimed", "Where Rodimus wins")]
    assert order == sorted(order)
    lost = next(line for line in text.splitlines() if line.startswith("| decode lost"))
    assert "0.83x (0.83 .. 0.83)" in lost
    assert (
        "moves 4 GB per call against 3 GB; reaches 50% of the memory bandwidth against 50%" in lost
    )


def test_an_interval_that_encloses_one_claims_nothing(found):
    kinds = {verdict.case: verdict.kind for verdict in report.verdicts(found)}
    assert kinds == {"lost": "loses", "even": "open", "won": "wins"}


def test_few_rounds_claim_nothing():
    (verdict,) = report.verdicts([decode("short", FAST[:3], PEER[:3])])
    assert verdict.ratio.median == 2.0 and verdict.kind == "open"


def test_ours_is_compared_with_the_peers_fastest_engine(found):
    faster = row("qwen2-1.5b/dynamic", [4.0] * 9)
    record = {**found[2], "rows": [*found[2]["rows"], faster]}
    (verdict,) = report.verdicts([record])
    assert verdict.baseline == "qwen2-1.5b/dynamic" and verdict.kind == "loses"


def test_ours_is_compared_by_the_engine_and_not_by_the_luckiest_of_its_caches(found):
    """Of equal ones the fastest was lucky: its interval would claim what no other does."""
    lucky = row("rodimus-plus-1.6b/dynamic", [x - 0.1 for x in PEER])
    even = row("rodimus-plus-1.6b/engine", EVEN)
    record = {**found[1], "rows": [lucky, even, *found[1]["rows"][1:]]}
    (verdict,) = report.verdicts([record])
    assert verdict.ours == "rodimus-plus-1.6b/engine" and verdict.kind == "open"


def test_skipped_models_are_listed_with_their_reason(found):
    text = report.render(found)
    assert "| rwkv6-1.6b | rwkv is not installed | Test CPU |" in text


def test_warnings_of_a_busy_machine_are_shown(found):
    warning = "machine busy: other programs took 1.0 of 2 cores"
    busy = [{**record, "warnings": [warning]} for record in found[:2]]
    assert f"- Test CPU: {warning}: decode lost, decode even\n" in report.render(busy)


def test_memory_losses_are_exact():
    def state(target, size):
        counts = {"state_bytes": size, "recurrent_bytes": size, "cached_bytes": 0}
        return row(target, [1.0], weight_bytes=1, **counts)

    rows = [state("rodimus-1.4b/dynamic", 200), state("qwen2-1.5b/dynamic", 100)]
    settings = {"batch": 1, "context": 1024}
    record = records.make("memory", "m", settings=settings, machine=MACHINE, rows=rows)
    text = report.render([record])
    assert "0.50x (exact)" in text and "Where Rodimus wins" not in text


def test_the_same_records_give_the_same_bytes(found, tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    for record in found:
        records.write(record, results)
    written = []
    for name in ("first", "second"):
        out = tmp_path / name
        out.mkdir()
        assert report.main(["--results", str(results), "--out", str(out)]) == 0
        written.append({p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert written[0] == written[1]
    assert "RESULTS.md" in written[0] and "decode_latency.png" in written[0]


def test_check_tells_an_edited_report(found, tmp_path, capsys):
    results = tmp_path / "results"
    for record in found:
        records.write(record, results)
    arguments = ["--results", str(results), "--out", str(tmp_path)]
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    path = tmp_path / "RESULTS.md"
    path.write_text(path.read_text().replace("0.83x", "1.83x"))
    assert report.main([*arguments, "--check"]) == 1
    assert "not what the records say" in capsys.readouterr().out


def test_other_groups_show_the_numbers_that_they_have():
    fields = {"first_token_p50_ms": 12.5, "requests": 4}
    record = {**decode("b1", FAST, PEER), "group": "engine"}
    record["rows"] = [{**records.skipped("x", "f", "e", "no"), "status": "measured", **fields}]
    text = report.render([record])
    assert "| case | machine | target | requests | first_token_p50_ms |" in text
    assert "| b1 | Test CPU | x | 4 | 12.5 |" in text


def recall(mem_size):
    scores = {"1024/256": [0.5, 0.7], "512/128": [1.0, 1.0]}
    counts = {"parameters": 10, "state_bytes": 4 * mem_size, "lr": 3e-3, "seeds": 2}
    quality = row("rodimus", [1.0], scores=scores, **counts)
    settings = {"shape": {"mem_size": mem_size}, "note": "Columns: length/pairs."}
    case = f"mqar-gpu-n{mem_size}"
    return records.make("quality", case, settings=settings, machine=MACHINE, rows=[quality])


def test_quality_shows_the_mean_and_range_of_the_seeds():
    text = report.render([recall(16)])
    # short lengths first
    assert "| 2 | 1.000 (1.000 .. 1.000) | 0.600 (0.500 .. 0.700) |" in text
    assert "Columns: length/pairs." in text


def test_recall_is_drawn_beside_the_papers_curve(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.names([recall(16)]) == {}
    chosen = plots.draw_all([recall(16), recall(64)], tmp_path)
    assert list(chosen.values()) == ["plots/Test_CPU/recall.png"]
    assert (tmp_path / "plots/Test_CPU/recall.png").stat().st_size > 10_000


def test_attention_has_no_state_to_expand():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    attention = {**recall(64), "case": "mqar-gpu-attention"}
    attention["rows"] = [{**attention["rows"][0], "target": "attention"}]
    plots.recall([recall(16), recall(64), attention], axes)
    level = next(line for line in axes.lines if line.get_label() == "attention")
    assert list(level.get_ydata()) == [0.6, 0.6] and list(level.get_xdata()) == [0, 1]
    assert [list(x.get_xdata()) for x in axes.lines if x.get_label() == "rodimus"] == [[16, 64]]


def test_numbers_of_engine_server_and_largest_batch_have_columns():
    fields = ("model_ms", "beside_model_ms", "host_ms", "largest_batch", "batch_without_room")
    fields += ("first_token_p95_ms", "between_tokens_p95_ms")
    rows = [row("rodimus-1.4b/any", PEER, **dict.fromkeys(fields, 12.5))]
    about = {"settings": {}, "machine": MACHINE, "rows": rows}
    text = report.render([records.make("engine-step", "b64", **about)])
    head = next(line for line in text.splitlines() if "host_ms" in line)
    assert {*fields} <= {cell.strip() for cell in head.split("|")}


def test_machines_do_not_share_a_picture(found):
    elsewhere = [{**r, "machine": {**r["machine"], "name": "Other GPU"}} for r in found]
    drawn = list(plots.pictures(found + elsewhere))
    assert [p.path for p in drawn] == [
        "plots/Other_GPU/decode_latency.png",
        "plots/Test_CPU/decode_latency.png",
    ]
    for picture in drawn:
        assert len({record["machine"]["name"] for record in picture.records}) == 1


def test_no_records_is_an_error_that_says_what_to_run(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "make bench" in capsys.readouterr().err


def test_cases_are_ordered_by_context_not_by_name():
    def case(context):
        return decode(f"b1-t{context}", FAST, PEER, context=context)

    contexts = [r["settings"]["context"] for r in report.ordered(map(case, (1024, 128, 4096)))]
    assert contexts == [128, 1024, 4096]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (3_214_190_592, "3.21 GB"), (2e15, "2000 TB")],
)
def test_sizes_are_short(count, text):
    assert report.size(count) == text


def test_memory_crossover_is_the_published_configurations():
    # 24 layers keep 2048 tokens of 17 heads of 128, and states; Qwen2 keeps 28672 bytes a token
    kept = 24 * (2048 * 17 * 128 * 2 + 4096 * (64 * 4 + 4 * 2))
    assert plots.crossover() == kept // 28672 + 1 == 8366


def test_committed_report_is_what_the_committed_records_say():
    if not (report.HERE / "RESULTS.md").exists():
        pytest.skip("no report in this checkout yet")
    assert report.main(["--check"]) == 0


def test_a_training_step_tells_its_longest_kernels_and_its_memory():
    kernels = [{"name": "gemm" * 40, "launches": 24, "ms": 12.345, "share": 0.5}]
    found = {"kernels": kernels, "kernels_ms": 24.69, "idle_ms": 4.5}
    trained = row("rodimus-plus-1.6b/dynamic", PEER, **found, step_bytes=40_000_000_000)
    settings = {"batch": 4, "context": 4096, "dtype": "bfloat16"}
    record = records.make("train", "b4", settings=settings, machine=MACHINE, rows=[trained])
    text = report.render([record])
    assert "rodimus-plus-1.6b/dynamic allocates 40 GB in a step" in text
    assert f"| `{'gemm' * 15}` | 24 | 12.3 | 50% |" in text


@pytest.mark.parametrize(("floor", "drawn"), [(4.0, True), (6.0, False)])
def test_a_floor_that_was_undercut_is_not_drawn(floor, drawn):
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    plots.decode_latency([decode("won", FAST, PEER, floor_ms=floor)], axes)
    assert ("memory floor" in axes.get_title()) == drawn
    assert len(axes.lines) == (4 if drawn else 2)
    # in black and white only the marker tells whose a floor is
    markers = [line.get_marker() for line in axes.lines]
    assert markers == ["o", "^"] * (len(markers) // 2)


@pytest.mark.parametrize(("faster", "told"), [(1.05, False), (1.5, True)])
def test_contexts_timed_at_other_rates_are_not_to_be_compared(faster, told):
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    found = [decode("a", FAST, PEER), decode("b", FAST, PEER, context=1024)]
    for record, time in zip(found, (10.0, 10.0 / faster), strict=True):
        read = {"bytes": 4 * 10**8, "samples": {"wall_ms": [time] * 3}}
        record["settings"]["memory_read"] = read
    plots.decode_latency(found, axes)
    assert ("memory read 40 to 60 GB/s: compare at one context" in axes.get_title()) == told


def test_a_picture_shows_one_dtype():
    """A line through bfloat16 and float32 would show the dtype, not the axis."""
    read = lambda time: {"bytes": 10**9, "samples": {"wall_ms": [time] * 3}}
    whole = [decode(f"b{n}", FAST, PEER, batch=n, context=4096) for n in (1, 2)]
    others = [decode(f"o{n}", [x / 9 for x in FAST], PEER, batch=n, context=4096) for n in (1, 3)]
    for time, record in zip((9.0, 9.0, 1.0, 1.0), whole + others, strict=True):
        record["settings"]["memory_read"] = read(time)
    for record in others:
        record["settings"]["dtype"] = "float32"
    throughput = lambda found: plots._measured(found, "decode", "batch", "tokens_per_s")
    latency = lambda found: plots._measured(found, "decode", "context", "median_ms", batch=1)
    for what in (throughput, latency, plots._read_rates, plots.names):
        assert what(whole[:1] + others) == what(whole[:1])


def operator(group, ours_ms, other_ms, **settings):
    """A record of ours in two forms, of flash-linear-attention's, and of other bytes."""
    times = {"ddts/triton": ours_ms, "ddts/native": 9.0, "x/fla": other_ms}
    # what reads other bytes, and what is written to be read
    times |= {"step-int8/native": 0.1, "ddts/reference": 0.1}
    rows = [
        row(
            *(target, [time]),
            family=target.partition("/")[0],
            median_ms=time,
            floor_bytes=10**9,
            floor_share=0.25 / time,
        )
        for target, time in times.items()
    ]
    settings = {"batch": 8, "context": 4, "key_dim": 10**4, "value_dim": 10**4, **settings}
    settings.setdefault("dtype", "bfloat16")
    ceilings = {"copy_GBps": 4000.0, "gemm_TFLOPs": 800.0}
    case = f"b{settings['batch']}"
    about = {"settings": settings, "machine": MACHINE, "ceilings": ceilings}
    return records.make(group, case, rows=rows, **about)


def test_operators_stand_below_the_roof_of_their_run():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    found = [operator("ddts-forward", 1.0, 2.0), operator("ddts-training", 4.0, 8.0, batch=2)]
    plots.roofline(found, axes)
    roof, *points = axes.lines
    # 12.8 operations a byte forward and 9.6 with backward; the roof bends at 200
    assert [200.0, 800.0] in [list(place) for place in roof.get_xydata()]
    places = [x for line in points for x in line.get_xydata()[0]]
    assert places == pytest.approx([12.8, 12.8, 12.8, 6.4, 9.6, 2.4, 9.6, 1.2])
    # in black and white: a marker for each operator, and only ours is filled
    assert [line.get_marker() for line in points] == ["o", "o", "s", "s"]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False, True] * 2
    assert "4,000 GB/s" in axes.get_title() and "800 TFLOP/s" in axes.get_title()


def test_the_share_of_the_roof_is_that_of_the_fastest_of_each_side(tmp_path):
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    found = [operator("ddts-step", 0.5, 2.0), operator("fused-training", 1.0, 0.5)]
    found += [operator("attention-decode", 1.0, 2.0, cache="cold")]
    plots.roof(found, axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "DDTS step, 8 sequences",
        # of those around the mixers a record says whose row it is
        "ddts and backward, 8 x 4",
        "x and backward, 8 x 4",
    ]
    *points, _ = axes.lines
    places = [
        (round(x), y, line.get_markerfacecolor() == "white")
        for line in points
        for x, y in line.get_xydata()
    ]
    assert places == [(50, 0, False), (12, 0, True), (25, 1, False), (50, 2, True)]
    assert "plots/Test_CPU/roof.png" in plots.names(found).values()
    # where the loss and the norms were timed anew, what surrounds DDTS is not told twice
    twice = [operator(f"{group}", 1.0, 2.0) for group in ("ddts-surroundings", "fused-forward")]
    assert [name for name, _ in plots._shares(twice)] == ["ddts, 8 x 4", "x, 8 x 4"]
    sizes = [operator("ddts-step", 1.0, 2.0, batch=batch) for batch in (256, 64, 8)]
    assert [name for name, _ in plots._shares(sizes)] == [
        f"DDTS step, {batch} sequences" for batch in (8, 64, 256)
    ]


def test_a_picture_says_where_and_when_its_records_were_made(found, tmp_path, monkeypatch):
    for record, day in zip(found, (1, 3, 2), strict=True):
        record["date"] = f"2026-01-0{day} 10:00 UTC"
    later = {**found[0], "group": "other", "date": "2026-02-01 10:00 UTC"}
    (picture,) = plots.pictures([*found, later])
    assert picture.made == "Test CPU, 2026-01-01 to 2026-01-03"
    assert next(plots.pictures(found[::2])).made.endswith(", 2026-01-01 to 2026-01-02")
    pyplot, drawn = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(pyplot, "close", lambda made: drawn.append(made.axes[0].get_title()))
    plots.draw_all(found, tmp_path)
    assert drawn[0].endswith("\nTest CPU, 2026-01-01 to 2026-01-03")


def test_a_picture_shows_the_engine_and_not_the_luckiest_of_our_caches(found):
    """As the tables do; of a peer it shows the fastest."""
    rows = [row("rodimus-plus-1.6b/engine", [6.0]), row("qwen2-1.5b/dynamic", [4.0])]
    record = {**found[2], "rows": [*found[2]["rows"], *rows]}
    drawn = plots._measured([record], "decode", "context", "median_ms")
    assert drawn == {"rodimus-plus-1.6b": {4096: 6.0}, "qwen2-1.5b": {4096: 4.0}}


def test_throughput_is_drawn_where_most_batches_were_timed(found):
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    some = [decode(f"c{n}", FAST, PEER, batch=n, context=4096) for n in (1, 8)]
    most = [decode(f"d{n}", FAST, PEER, batch=n, context=1024) for n in (1, 64, 256)]
    plots.decode_throughput(some + most, axes)
    assert "after 1,024 tokens" in axes.get_title()
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 64, 256]] * 2
    assert plots._most_batches(some + most[:2]) == 4096
    assert list(plots.names(some).values()) == ["plots/Test_CPU/decode_throughput.png"]


def test_long_rows_have_a_picture_that_begins_at_zero():
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    found = [decode(f"b{n}", FAST, PEER, context=n) for n in (4096, 65536)]
    found = [{**record, "group": "long"} for record in found]
    assert list(plots.names(found).values()) == ["plots/Test_CPU/long_rows.png"]
    plots.long_rows(found, axes)
    assert axes.get_ylim()[0] == 0 < 1.0 < axes.get_ylim()[1]
    assert list(axes.lines[0].get_xdata()) == [4096, 65536]


def test_the_roofline_is_a_picture_where_operators_were_timed(found):
    found += [operator("ddts-forward", 1.0, 2.0)]
    assert "plots/Test_CPU/roofline.png" not in plots.names(found).values()
    found += [operator("ddts-forward", 1.0, 2.0, batch=1)]
    assert "plots/Test_CPU/roofline.png" in plots.names(found).values()
    whole = [operator("ddts-forward", 1.0, 2.0, dtype=dtype) for dtype in ("bfloat16", "float32")]
    whole += [operator("ddts-forward", 1.0, 2.0, batch=1, cache="cold")]
    assert [*plots.names(whole).values()] == ["plots/Test_CPU/roof.png"]
    # of elementwise operators no products are counted
    for record in found:
        record["group"] = record["group"].replace("ddts-forward", "ddts-surroundings")
    assert "plots/Test_CPU/roofline.png" not in plots.names(found).values()
    assert "plots/Test_CPU/roof.png" in plots.names(found).values()
