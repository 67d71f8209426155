"""Measured tables and figures in README and docs/ are what the committed records say, rounded.

``python -m benchmarks.report --docs`` rewrites those that a failing test prints.
"""

import json
import re
import shutil

import pytest

from benchmarks import docs, records, report, targets
from benchmarks.records import RecordError

PAGES = {path.relative_to(docs.ROOT).as_posix(): path for path in docs.documents()}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
TABLES = [(page, name) for page, text in TEXTS.items() for _, name, _ in docs.TABLE.findall(text)]
FIGURES = {
    (page, name): None for page, text in TEXTS.items() for _, name, *_ in docs.VALUE.findall(text)
}


@pytest.fixture(scope="module")
def tables():
    return docs.tables()


@pytest.fixture(scope="module")
def figures():
    return docs.figures()


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_a_table_is_what_the_records_say(page, name, tables):
    found = {marked: rows for _, marked, rows in docs.TABLE.findall(TEXTS[page])}
    assert found[name] == tables[name], "expected\n" + tables[name]


@pytest.mark.parametrize(("page", "name"), FIGURES)
def test_a_figure_is_what_the_records_say(page, name, figures):
    found = {text for _, marked, text, _ in docs.VALUE.findall(TEXTS[page]) if marked == name}
    assert found == {figures[name]}


def test_every_table_and_figure_stands_somewhere(tables, figures):
    assert sorted(name for _, name in TABLES) == sorted(tables), "each table once"
    assert {name for _, name in FIGURES} == set(figures)


@pytest.mark.parametrize("page", PAGES)
def test_every_marker_is_well_formed(page):
    text = TEXTS[page]
    tables, figures = docs.TABLE.findall(text), docs.VALUE.findall(text)
    assert text.count("<!-- measured:") == len(tables)
    assert text.count("<!--/-->") == len(figures)
    assert len(re.findall(r"<!--\w+-->", text)) == len(figures)
    # a line that begins with a comment is HTML, not Markdown
    assert not re.findall(r"^\W*<!--\w+-->", text, re.MULTILINE)


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_machine_day_commit_and_versions_stand_beside_a_table(page, name, monkeypatch):
    """The page names the run of every record that the table reads."""
    named = [docs.RUNS[run] for where, run in FIGURES if where == page and run in docs.RUNS]
    real, read = docs.record, []
    noted = lambda case, folder=docs.GPU: read.append((folder, case)) or real(case, folder)
    monkeypatch.setattr(docs, "record", noted)
    list(docs.TABLES[name]())
    assert read
    for folder, case in read:
        assert any(folder == at and case.startswith(groups) for at, groups, _ in named), case


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The documents and records in another folder."""
    for page, text in TEXTS.items():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(text, encoding="utf-8")
    shutil.copytree(docs.RESULTS, tmp_path / "results")
    monkeypatch.setattr(docs, "RESULTS", tmp_path / "results")
    return tmp_path


def test_update_mends_what_was_edited_by_hand(copy):
    assert docs.update(copy) == []
    page = copy / "README.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(docs.VALUE.sub(r"\g<1>42\g<4>", text), encoding="utf-8")
    assert docs.update(copy, write=False) == ["README.md"]
    assert docs.update(copy) == ["README.md"] and page.read_text(encoding="utf-8") == text


def test_a_better_record_needs_no_other_words(copy):
    """Half the time for every row of ours: documents change in markers alone."""
    engine_ms = lambda: docs.figures()["engine_ms"]
    before = float(engine_ms())
    for path in (copy / "results").glob("*/decode-b*.json"):
        found = json.loads(path.read_text())
        for row in found["rows"]:
            if row["status"] == "measured" and row["target"].startswith("rodimus"):
                row["median_ms"] /= 2
        path.write_text(json.dumps(found))
    assert {"README.md", "docs/generation.md"} <= set(docs.update(copy))
    strip = lambda text: docs.VALUE.sub("", docs.TABLE.sub("", text))
    for page, text in TEXTS.items():
        assert strip((copy / page).read_text(encoding="utf-8")) == strip(text)
    assert f"<!--engine_ms-->{engine_ms()}<!--/-->" in (copy / "README.md").read_text()
    assert float(engine_ms()) < before


def test_a_heading_that_names_a_slower_engine_is_an_error(copy):
    path = copy / "results" / docs.GPU / "decode-b1-t4096-bfloat16.json"
    found = json.loads(path.read_text())
    for row in found["rows"]:
        if row["target"] == "qwen2-1.5b/static":
            row["median_ms"] = 1.0
    path.write_text(json.dumps(found))
    with pytest.raises(RecordError, match="expected qwen2-1.5b/graph to be the fastest"):
        docs.update(copy)


def test_what_surrounds_ddts_takes_as_long_on_its_page_as_among_the_targets():
    outcome = next(
        outcome
        for outcome in targets.outcomes(records.read(docs.RESULTS))
        if outcome.target.name == "convolution, gates and norm of DDTS"
    )
    *_, (name, _, ours, *_) = docs.surroundings()
    assert (name, ours) == ("together", docs.us(outcome.figure.median / 1e3))


@pytest.mark.parametrize("target", [*docs.OURS, *docs.GPU_PEERS])
def test_a_target_that_was_not_measured_is_named(copy, target):
    path = copy / "results" / docs.GPU / "decode-b1-t4096-bfloat16.json"
    found = json.loads(path.read_text())
    found["rows"] = [row for row in found["rows"] if row["target"] != target]
    path.write_text(json.dumps(found))
    with pytest.raises(RecordError, match=f"{path.stem}: expected {target} to be measured"):
        docs.update(copy)


def test_records_of_two_versions_are_an_error(copy):
    path = copy / "results" / docs.GPU / "train-b4-t4096-bfloat16.json"
    found = json.loads(path.read_text())
    found["machine"]["versions"]["torch"] = "9.9"
    path.write_text(json.dumps(found))
    with pytest.raises(RecordError, match="one machine and its versions"):
        docs.update(copy)


def test_records_of_two_commits_are_both_named(copy):
    path = copy / "results" / docs.GPU / "train-b4-t4096-bfloat16.json"
    found = json.loads(path.read_text())
    before, found["machine"]["commit"] = found["machine"]["commit"], "f" * 40
    path.write_text(json.dumps(found))
    assert f"commits `{before[:12]}` and `ffffffffffff`" in docs.runs()["run_gpu_models"]


def test_ratios_of_the_last_run_are_counted_where_those_before_it_had_them(copy):
    count = lambda: [int(x) for x in docs.cpu_reproduced().split(" of ")]
    inside, of = count()
    path = copy / "results" / docs.CPU / "decode-int8-b1-t128-bfloat16.json"
    found = json.loads(path.read_text())
    last = found["settings"]["sittings"][-1]
    for row in found["rows"]:
        if row["target"] == "qwen2-1.5b/llama.cpp":
            walls = row["samples"]["wall_ms"]
            walls[-last:] = [10 * wall for wall in walls[-last:]]
    path.write_text(json.dumps(found))
    assert count() == [inside - 2, of], "against two models of ours"
    # a single run has none before it
    found["settings"]["sittings"] = [sum(found["settings"]["sittings"])]
    path.write_text(json.dumps(found))
    assert count()[1] == of - 4


def test_a_marker_of_nothing_is_an_error():
    with pytest.raises(RecordError, match="the marker 'speed'"):
        docs.rewrite("<!--speed-->1<!--/-->", {}, {"rate": "2"})


def test_no_case_is_lost_where_no_peer_is_faster(monkeypatch):
    rows = {target: {"median_ms": 1.0} for target in docs.OURS}
    rows |= {target: {"median_ms": 2.0} for target in docs.GPU_PEERS}
    monkeypatch.setattr(docs, "decoded", lambda *case: rows)
    assert docs.faster_peers() == "none"
    rows["rwkv6-1.6b/graph"]["median_ms"] = 0.5
    assert docs.faster_peers().startswith("RWKV6 at batch 1 (2.00 times Rodimus+, 2.00 times")


def test_the_command_checks_the_documents(monkeypatch, capsys):
    monkeypatch.setattr(docs, "update", lambda write: ["README.md"])
    assert report.main(["--check"]) == 0
    assert report.main(["--check", "--docs"]) == 1
    assert "README.md is not what the records say" in capsys.readouterr().out
