"""Two commits are timed in turn, each with its own package and the same benchmark."""

import subprocess

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
        compare.export("nowhere", tmp_path, native=False)


def test_an_exported_tree_runs_this_checkouts_benchmarks(tmp_path):
    (head,) = commits(1)
    tree = compare.export(head, tmp_path, native=False)
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


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_a_commit_that_decodes_wrongly_is_not_timed(error, monkeypatch, capsys):
    class Wrong:
        samples = ()

        def __init__(self, tree, options):
            self.tree = tree

        def answer(self):
            return {"place": str(self.tree), "disagreement": error}

        def close(self):
            pass

    monkeypatch.setattr(compare, "Worker", Wrong)
    assert compare.main([".", "."]) == 1
    assert "base: decoding differs from prefilling by" in capsys.readouterr().err
