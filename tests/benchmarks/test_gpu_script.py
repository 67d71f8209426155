"""What ``make gpu`` runs, with an interpreter that only notes what it is asked."""

import os
import subprocess

import pytest

from benchmarks import machine

OPERATORS = ("ddts", "attention", "fused")
PYTHON = """\
#!/bin/sh
echo "$*" >>"$0.log"
case "$*" in
*get_device_name*) echo "Some GPU" ;;
*"-k persistent"*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("parts", "timed"),
    [("tests", []), ("operators", [f"benchmarks/bench_{x}.py" for x in OPERATORS])],
)
def test_where_the_persistent_kernel_fails_the_rest_is_timed(tmp_path, parts, timed):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "RODIMUS_GPU_PARTS": parts, "OUT": str(tmp_path / "out")}
    script = ["sh", str(machine.ROOT / ".ci" / "gpu"), str(python)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "it is not timed" in done.stderr
    asked = (tmp_path / "python.log").read_text().splitlines()
    runs = [line.split() for line in asked if "--bench-scale" in line]
    assert [[word for word in run if word.startswith("bench")] for run in runs] == (
        [timed] if timed else []
    )
