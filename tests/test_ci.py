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
