"""Two commits are timed in turn, each with its own package and the same benchmark."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import compare, machine, records


def commits(count):
    command = ["git", "-C", str(machine.ROOT), "rev-list", f"--max-count={count}", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode or len(run.stdout.split()) < count:
        pytest.skip("needs the history of the checkout")
    return run.stdout.split()


@pytest.mark.slow
def test_a_commit_is_compared_with_its_predecessor(tmp_path, capsys):
    head, base = commits(2)
    options = ["--scale", "tiny", "--context", "32", "--rounds", "3", "--out", str(tmp_path)]
    options.append("--no-native")
    assert compare.main([base, head, *options]) == 0
    assert "head is" in capsys.readouterr().out
    (record,) = records.read(tmp_path)
    first, second = record["rows"]
    assert first["faster_than_base"][:3] == [1.0, 1.0, 1.0]
    assert len(first["samples"]["wall_ms"]) == len(second["samples"]["wall_ms"]) == 3
    assert (record["settings"]["base"], record["settings"]["head"]) == (base, head)


def test_an_unknown_commit_is_named(tmp_path):
    commits(1)
    with pytest.raises(ValueError, match="no commit 'nowhere'"):
        compare.export("nowhere", tmp_path, build_native=False)


def test_an_exported_tree_runs_this_checkouts_benchmarks(tmp_path):
    (head,) = commits(1)
    tree = compare.export(head, tmp_path, build_native=False)
    assert (tree / "rodimus" / "__init__.py").exists()
    assert not (tree / "benchmarks").exists()


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_not_a_time(capsys):
    (head,) = commits(1)
    options = ["--scale", "tiny", "--context", "32", "--rounds", "1", "--engine", "warp"]
    assert compare.main([head, head, *options]) == 1
    assert "ended with status" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "name the commit"), (["HEAD", "--rounds", "0"], "must be at least 1")],
)
def test_bad_arguments_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "built"), [([], True), (["--native"], True), (["--no-native"], False)]
)
def test_native_operators_of_one_commit_alone_are_no_difference_between_two(
    options, built, monkeypatch, capsys
):
    """The checkout has them: so shall the exported tree, and where it has not nothing is timed."""
    asked = []

    class Fake:
        samples = ()

        def __init__(self, tree, _):
            self.tree = tree

        def answer(self):
            here = self.tree == machine.ROOT
            return {"place": str(self.tree), "disagreement": 0.0, "native": here}

        def close(self):
            pass

    def export(commit, folder, build_native):
        asked.append(build_native)
        return machine.ROOT if commit == "." else folder

    monkeypatch.setattr(compare, "Worker", Fake)
    monkeypatch.setattr(compare, "export", export)
    monkeypatch.setattr(compare.native, "is_available", lambda device: True)
    assert compare.main(["HEAD", ".", *options]) == 1
    assert "got none in base; --native" in capsys.readouterr().err
    assert set(asked) == {built}


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_a_commit_that_decodes_wrongly_is_not_timed(error, monkeypatch, capsys):
    class Wrong:
        samples = ()

        def __init__(self, tree, options):
            self.tree = tree

        def answer(self):
            return {"place": str(self.tree), "disagreement": error, "native": False}

        def close(self):
            pass

    monkeypatch.setattr(compare, "Worker", Wrong)
    assert compare.main([".", "."]) == 1
    assert "base: decoding differs from prefilling by" in capsys.readouterr().err


STEADY = [2.0, 2.02, 1.98, 2.01, 1.99, 2.0, 2.03, 1.97, 2.0]
"""Their median is 2, its interval 1.98 to 2.02."""


def write(folder, case, commit="a" * 40, **targets):
    """A record of a target's rounds in milliseconds."""
    rows = [
        records.row(f"{name}/x", name, "x", samples_ms=samples) for name, samples in targets.items()
    ]
    about = {"name": "Test GPU", "commit": commit, "versions": {"torch": "2"}}
    made = records.make("decode", case, rows=rows, settings={"batch": 1}, machine=about)
    records.write(made, folder)


@pytest.fixture
def sets(tmp_path):
    """Two folders of records: a case in both, one that is the same, one in each alone."""
    base, head = tmp_path / "base", tmp_path / "head"
    half, double = ([factor * x for x in STEADY] for factor in (0.5, 2))
    write(base, "b1", ours=STEADY, lost=STEADY, even=STEADY, gone=STEADY)
    write(head, "b1", "b" * 40, ours=half, lost=double, even=STEADY[::-1])
    write(base, "old", ours=STEADY)
    write(head, "new", ours=STEADY)
    write(base, "same", ours=STEADY)
    (head / "decode-same.json").write_bytes((base / "decode-same.json").read_bytes())
    return [str(base), str(head)]


def told(capsys):
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_two_sets_of_records_are_compared_with_intervals(sets, capsys):
    assert compare.main(["--records", *sets]) == 0
    # from one median's interval to the other's: the two share no round
    assert told(capsys) == [
        "Test GPU: decode-b1, commit aaaaaaaaaaaa, then bbbbbbbbbbbb",
        "lost/x 2 ms 4 ms 0.500x as fast (0.490 .. 0.510) slower",
        "even/x 2 ms 2 ms 1.000x as fast (0.980 .. 1.020) open",
        "ours/x 2 ms 1 ms 2.000x as fast (1.960 .. 2.040) faster",
        "in one set only: decode-b1 gone/x, decode-new ours/x, decode-old ours/x",
        "the same in both: 1 record",
    ]


@pytest.mark.parametrize(("percent", "status"), [("90", 1), ("110", 0)])
def test_what_is_slower_by_more_than_allowed_fails(sets, percent, status, capsys):
    assert compare.main(["--records", *sets, "--fail", percent]) == status


def test_few_rounds_claim_nothing(tmp_path, capsys):
    for name, factor in (("base", 1), ("head", 9)):
        write(tmp_path / name, "b1", ours=[factor * x for x in STEADY[:3]])
    sets = [str(tmp_path / name) for name in ("base", "head")]
    assert compare.main(["--records", *sets, "--fail", "5"]) == 0
    assert told(capsys)[1].endswith("open")


def test_other_versions_are_told(sets, capsys):
    path = Path(sets[1]) / "decode-b1.json"
    path.write_text(path.read_text().replace('"torch": "2"', '"torch": "3"'))
    assert compare.main(["--records", *sets]) == 0
    assert told(capsys)[0].endswith("then bbbbbbbbbbbb; torch 2, then 3")


def test_records_of_a_commit_are_compared_with_those_of_the_checkout(capsys):
    (head,) = commits(1)
    assert compare.main(["--records", head]) == 0
    assert "the same in both:" in capsys.readouterr().out


def test_a_set_that_is_neither_folder_nor_commit_is_named(sets, capsys):
    assert compare.main(["--records", sets[0], "nowhere"]) == 1
    assert "neither a folder nor a commit with records: 'nowhere'" in capsys.readouterr().err


def test_sets_that_share_nothing_are_an_error(sets, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert compare.main(["--records", sets[0], str(tmp_path / "empty")]) == 1
    assert "no records" in capsys.readouterr().err
