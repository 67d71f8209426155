"""What ``make gpu`` runs, with an interpreter that only notes what it is asked."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine

PYTHON = """\
#!/bin/sh
echo "$*" >>"$0.log"
case "$*" in
*get_device_name*) echo "Some GPU" ;;
*"-k persistent"*) exit 1 ;;
*--bench-scale*) echo "$RODIMUS_BENCH_SECONDS" >>"$0.seconds" ;;
*benchmarks.quality*) exit ${QUALITY:-0} ;;
esac
"""


def timed(tmp_path, parts, **more):
    """The benchmarks' files of each command that times any, and how the script ended."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "RODIMUS_GPU_PARTS": parts, "OUT": str(tmp_path / "out"), **more}
    script = ["sh", str(machine.ROOT / ".ci" / "gpu"), str(python)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    asked = (tmp_path / "python.log").read_text().splitlines()
    runs = [line.split() for line in asked if "--bench-scale" in line]
    return [(files(run), "--bench-cold" in run) for run in runs], done


def files(words):
    prefix, suffix = "benchmarks/bench_", ".py"
    return [w[len(prefix) : -len(suffix)] for w in words if w.startswith(prefix)]


OPERATORS = ["ddts", "attention", "fused"]
COLD = (["ddts", "fused"], True)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [("tests", []), ("operators", [(OPERATORS, False), COLD])],
)
def test_where_the_persistent_kernel_fails_the_rest_is_timed(tmp_path, parts, expected):
    runs, done = timed(tmp_path, parts)
    assert done.returncode == 1 and "it is not timed" in done.stderr
    assert runs == expected


@pytest.mark.parametrize(("seconds", "colds"), [("", 1), ("500.5", 1), ("0.5", 0)])
def test_the_last_command_has_what_the_seconds_leave(tmp_path, seconds, colds):
    runs, done = timed(tmp_path, "operators", RODIMUS_BENCH_SECONDS=seconds)
    assert [is_cold for _, is_cold in runs] == [False] + [True] * colds
    told = (tmp_path / "python.seconds").read_text().split("\n")[:-1]
    assert told[0] == seconds and (not colds or told[1] == "" or 490 <= int(told[1]) <= 500)
    assert "awk" not in done.stderr and "integer" not in done.stderr


def test_models_alone_are_not_followed_by_operators(tmp_path):
    runs, done = timed(tmp_path, "models")
    models = ["decode", "train", "prefill", "memory", "engine", "serve", "long"]
    assert runs == [(models, False)] and done.returncode == 0


@pytest.mark.parametrize(("ended", "status"), [("0", 0), ("3", 0), ("1", 1)])
def test_quality_is_trained_where_it_is_asked_for_and_goes_on_in_the_next_call(
    tmp_path, ended, status
):
    more = {"RODIMUS_BENCH_SECONDS": "500", "QUALITY": ended}
    runs, done = timed(tmp_path, "quality", **more)
    assert runs == [] and done.returncode == status
    (asked,) = (
        line
        for line in (tmp_path / "python.log").read_text().splitlines()
        if "benchmarks.quality" in line
    )
    words = asked.split()
    assert words[2:7] == ["mqar", "passkey", "language", "--size", "gpu"]
    assert 490 <= int(words[words.index("--seconds") + 1]) <= 500
    assert words[words.index("--out") + 1] == str(tmp_path / "out")


def test_quality_is_not_trained_unasked(tmp_path):
    timed(tmp_path, "models")
    assert "benchmarks.quality" not in (tmp_path / "python.log").read_text()


@pytest.mark.slow
def test_its_tests_are_found_where_the_packages_of_the_extras_are_missing(tmp_path):
    """The script installs nothing, and one module that cannot be imported stops all tests."""
    needs = (need for need in importlib.metadata.requires("rodimus") if "extra ==" in need)
    extras = {re.match(r"[\w-]+", need)[0] for need in needs} - {"pytest"}
    found = [x for x in importlib.metadata.distributions() if x.name.replace("_", "-") in extras]
    left_out = {file.parts[0] for distribution in found for file in distribution.files}
    for path in Path(pytest.__file__).parent.parent.iterdir():
        if path.name not in left_out:
            (tmp_path / path.name).symlink_to(path)
    paths = os.pathsep.join(map(str, (tmp_path, machine.ROOT, machine.ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "tests"],
        cwd=machine.ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
