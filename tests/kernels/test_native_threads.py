"""How threads share the steps of one call, compiled by itself to be watched for data races."""

import subprocess
from pathlib import Path

import pytest

from rodimus_kernels import build

TEAM = Path(__file__).parent / "team"


@pytest.fixture(scope="module")
def compiler():
    try:
        return build._cxx()
    except build.Unavailable as reason:
        pytest.skip(f"nothing can be compiled: {reason}")


@pytest.fixture(scope="module")
def sanitizer(compiler, tmp_path_factory):
    """The flag that reports data races, or none where it does not work."""
    empty = tmp_path_factory.mktemp("sanitizer") / "empty.cpp"
    empty.write_text("int main() {}")
    program, flag = empty.with_suffix(""), "-fsanitize=thread"
    built = subprocess.run([compiler, flag, empty, "-o", program], capture_output=True)
    return [flag] if not built.returncode and not subprocess.run([program]).returncode else []


def report(compiler, flags, sources, folder):
    """What the program prints with these sources of csrc."""
    program = folder / "team"
    command = [compiler, "-std=c++17", "-O2", "-pthread", f"-I{TEAM}", f"-I{sources}", *flags]
    subprocess.run([*command, TEAM / "main.cpp", "-o", program], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120)
    return ran.stdout + ran.stderr


def test_threads_share_the_steps_of_one_call(compiler, sanitizer, tmp_path):
    assert report(compiler, sanitizer, build.sources(), tmp_path) == ""


@pytest.mark.parametrize(
    "line, without",
    [
        ("if (open_.load() == step) work(member), done = step;", "work(member), done = step;"),
        ("for (Patience patience; inside_.load();) patience.wait();", ""),
        ("std::min(begin + chunk_, part.end)", "begin + chunk_"),
    ],
)
def test_a_fault_of_the_team_is_noticed(compiler, sanitizer, tmp_path, line, without):
    if not sanitizer:
        pytest.skip("the thread sanitizer does not work here")
    source = (build.sources() / "cpu/threads.h").read_text()
    assert line in source
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/threads.h").write_text(source.replace(line, without))
    assert report(compiler, sanitizer, tmp_path, tmp_path) != ""
