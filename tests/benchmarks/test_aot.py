"""Kernels are compiled for GPUs that are not here, whose limits are known, and kept to them."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from benchmarks import aot, machine

SHARED = aot.SHARED_LIMIT[86]
WITHIN = aot.Usage("case", "kernel", 86, 4, 255, aot.STACK_LIMIT, SHARED, False)


def test_an_architecture_without_a_limit_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(aot, "table", lambda *_, **__: pytest.fail("compiled"))
    monkeypatch.setattr("sys.argv", ["aot", "--arch", "123"])
    with pytest.raises(SystemExit):
        aot.main()
    assert "80, 86, 90, 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("over", "fault"),
    [
        ({}, ""),
        ({"stack": aot.STACK_LIMIT + 1}, f"stack over {aot.STACK_LIMIT}"),
        ({"shared": SHARED + 1}, f"shared memory over {SHARED}"),
        ({"shared": SHARED + 1, "arch": 90}, ""),
        ({"narrow": True}, "wgmma of 8 columns"),
    ],
)
def test_a_kernel_over_a_limit_is_told_and_fails_the_command(monkeypatch, capsys, over, fault):
    usage = WITHIN._replace(**over)
    assert usage.fault == fault
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(aot, "table", lambda *_, **__: iter([WITHIN, usage]))
    monkeypatch.setattr("sys.argv", ["aot"])
    assert aot.main() == bool(fault)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith(f"KiB  {fault}")
    assert lines[3].endswith(f": 2 kernels, {int(bool(fault))} over a limit")


def test_every_kernel_compiles_for_an_h200_within_its_limits():
    """In the configurations of the models, and in a process of its own: this one may interpret."""
    # with Triton 3.6 dkv spills 232 bytes, as docs/kernels/shared_key_attention.md says
    pytest.importorskip("triton", minversion="3.9")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", "90"]
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sources = (machine.ROOT / "kernels" / "rodimus_kernels").rglob("*.py")
    definition = r"^@triton\.jit.*\ndef (\w+_kernel)\("
    kernels = {
        name
        for path in sources
        for name in re.findall(definition, path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(kernels) > 20
    assert kernels == set(re.findall(r"^  sm_90 +(\w+)", done.stdout, re.MULTILINE))
