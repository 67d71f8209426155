"""How threads share the steps of one call, compiled by itself to be watched for data races."""

import subprocess
from pathlib import Path

import pytest

from rodimus_kernels import build

TEAM = Path(__file__).parent / "team"
# How a thread that comes late is late on every machine: between seeing a step and being counted in.
COUNTED_IN = "inside_.fetch_add(1);"
LATE = f"std::this_thread::sleep_for(std::chrono::microseconds(50)); {COUNTED_IN}"


def report(compiler, flags, sources, folder):
    """What the program prints with these sources of csrc."""
    program = folder / "team"
    command = [compiler, "-std=c++17", "-O2", "-pthread", f"-I{TEAM}", f"-I{sources}", *flags]
    subprocess.run([*command, TEAM / "main.cpp", "-o", program], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120)
    return ran.stdout + ran.stderr


def changed(folder, *changes):
    """Sources of the team with lines of them replaced."""
    source = (build.sources() / "cpu/threads.h").read_text()
    for line, other in changes:
        assert line in source
        source = source.replace(line, other)
    (folder / "cpu").mkdir()
    (folder / "cpu/threads.h").write_text(source)
    return folder


@pytest.mark.parametrize("changes", [[], [(COUNTED_IN, LATE)]], ids=["as_it_is", "late"])
def test_threads_share_the_steps_of_one_call(compiler, sanitizer, tmp_path, changes):
    assert report(compiler, sanitizer, changed(tmp_path, *changes), tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, without",
    [
        ("if (open_.load() == step) work(member), done = step;", "work(member), done = step;"),
        ("for (Patience patience; inside_.load();) patience.wait();", ""),
        ("std::min(begin + chunk_, part.end)", "begin + chunk_"),
    ],
    ids=["a_closed_step", "no_wait", "beyond_the_end"],
)
def test_a_fault_of_the_team_is_noticed(compiler, sanitizer, tmp_path, line, without):
    if not sanitizer:
        pytest.skip("the thread sanitizer does not work here")
    sources = changed(tmp_path, (COUNTED_IN, LATE), (line, without))
    assert report(compiler, sanitizer, sources, tmp_path) != ""
