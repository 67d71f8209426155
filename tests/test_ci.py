"""What continuous integration runs, with commands that only note what they are asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "run"
STEPS = ["make -j2 install native", "make test", "ruff check", "ruff format --check"]
COMMAND = """\
#!/bin/sh
asked="$(basename "$0") $*"
echo "$asked $RODIMUS_BUILD_CPU" >>"$LOG"
test "$asked" != "$FAILS"
"""


@pytest.mark.parametrize("fails", [*STEPS, "nothing"])
def test_every_step_runs_and_any_that_fails_is_told(tmp_path, fails):
    script, log = tmp_path / ".ci" / "run", tmp_path / "log"
    for command in (tmp_path / ".venv" / "bin" / "ruff", tmp_path / "bin" / "make"):
        command.parent.mkdir(parents=True)
        command.write_text(COMMAND)
        command.chmod(0o755)
    script.parent.mkdir()
    shutil.copy(SCRIPT, script)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment |= {"LOG": str(log), "FAILS": fails, "RODIMUS_BUILD_CPU": "auto"}
    done = subprocess.run([script], env=environment, timeout=60)
    assert done.returncode == (fails != "nothing")
    # the operators of the CPU must be there for the tests
    assert log.read_text().splitlines() == [f"{step} 1" for step in STEPS]


PYTHON = """\
#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) shift $(($# - 3)) && [ "$1" = -c ] && cp "$2" "$LOG" && echo "$3" >>"$LOG" ;;
    *'m.requires("torch")'*) exit "$REQUIRES_NONE" ;;
    *'m.version("torch")'*) echo "torch==2.14.1" ;;
esac
"""


@pytest.mark.parametrize("requires_none", [0, 1])
def test_no_constraint_contradicts_the_torch_that_is_asked_for(tmp_path, requires_none):
    """It may be another than that of the constraints; for GPUs it requires a Triton, else none."""
    shutil.copytree(SCRIPT.parent, tmp_path / ".ci")
    free = "torchao==0.18.0\ntriton-extras==1.0\n"
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\ntriton==3.9.0\n" + free)
    python, log, folder = (tmp_path / name for name in ("python", "log", "made"))
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "LOG": str(log)}
    environment["REQUIRES_NONE"] = str(requires_none)
    command = [tmp_path / ".ci" / "venv", folder, "torch>=2.14"]
    subprocess.run(command, env=environment, timeout=60, check=True)
    assert log.read_text() == free + "torch>=2.14\n"
    # what is installed later keeps the torch that is there
    made = free + "torch==2.14.1\n" + "triton==3.9.0\n" * requires_none
    assert (folder / "constraints.txt").read_text() == made
