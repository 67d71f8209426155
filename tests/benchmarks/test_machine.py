"""A record says where it was made and what disturbed it, and nothing private."""

import getpass
import json
import os
import platform
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import machine

CPU = torch.device("cpu")


def test_description_names_hardware_versions_and_commit():
    about = machine.describe(CPU)
    assert about["name"] and about["cores"] >= 1 and about["commit"]
    text = json.dumps(about)
    assert platform.node() not in text
    assert str(machine.ROOT) not in text and f"/{getpass.getuser()}/" not in text


def test_records_of_earlier_runs_are_no_change_of_the_code(monkeypatch, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    record, code = tmp_path / "benchmarks" / "results" / "a.json", tmp_path / "code.py"
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        record.write_text("1")
        code.write_text("1")
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    record.write_text("2")
    assert machine.commit()["dirty"] is False
    changed = []
    for text in ("2", "3", "2"):
        code.write_text(text)
        changed.append(machine.commit())
    assert all(about["dirty"] for about in changed)
    assert machine.are_alike(changed[0], changed[2])
    assert not machine.are_alike(changed[0], changed[1]), "two edits are two codes"


def test_a_copy_without_git_takes_its_commit_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "_output", lambda command: "")
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc123")
    assert machine.commit() == {"commit": "abc123", "dirty": None}


def test_a_busy_machine_is_reported_with_its_load():
    cores = os.cpu_count()
    busy = lambda *loads: [w for w in machine.disturbances(*loads) if "busy" in w]
    (before,), (during,) = busy(0.6 * cores), busy(0.0, 0.6 * cores)
    assert f"took {0.6 * cores:.1f} of {cores} cores before the start" in before
    assert f"took {0.6 * cores:.1f} of {cores} cores beside the benchmark" in during
    assert not busy(0.01 * cores, 0.01 * cores)


def test_the_load_is_that_of_other_programs(monkeypatch, tmp_path):
    """Of 10 seconds 9 are of programs, 2 the host took; 3 are this one's, 1 its children's."""
    clock, own, ticks = [100.0], [0.0, 0.0, 0.0, 0.0], os.sysconf("SC_CLK_TCK")

    def everyone(*seconds):
        numbers = " ".join(str(int(x * ticks)) for x in seconds)
        (tmp_path / "stat").write_text(f"cpu  {numbers} 0 0\ncpu0 1 2 3\n")

    monkeypatch.setattr(machine, "SYSTEM_TIMES", tmp_path / "stat")
    monkeypatch.setattr(machine.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(machine.os, "times", lambda: (*own, clock[0]))
    everyone(50, 1, 20, 900, 7, 1, 1, 3)  # user, nice, system, idle, waiting, irq, softirq, stolen
    others = machine.Others()
    clock[0], own[:] = 110.0, [2.0, 1.0, 0.5, 0.5]
    everyone(54, 3, 22, 909, 8, 1.5, 1.5, 5)
    assert others.cores() == pytest.approx((9 + 2 - 4) / 10)
    others.start()
    clock[0] = 120.0
    assert others.cores() == 0.0
    monkeypatch.setattr(machine, "SYSTEM_TIMES", tmp_path / "missing")
    assert machine.Others().cores() == 0.0


def test_a_program_beside_this_one_is_seen():
    code = "import time; end = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    others = machine.Others()
    with subprocess.Popen([sys.executable, "-c", code]):
        time.sleep(1.5)
        assert others.cores() > 0.2


def test_processors_of_one_name_are_told_apart_by_what_they_can(tmp_path, monkeypatch):
    """A virtual machine may hide the model; sittings of two processors are not one record."""
    facts, found = tmp_path / "cpuinfo", []
    monkeypatch.setattr(machine, "CPU_FACTS", facts)
    for flags in ("fpu avx avx2", "fpu avx2 avx512f avx512_bf16"):
        facts.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n")
        found.append(machine.describe(CPU))
    assert [machine.told(about) for about in found] == [
        "Some CPU (avx2)",
        "Some CPU (avx2 avx512f avx512_bf16)",
    ]
    assert machine.are_alike(found[0], found[0]) and not machine.are_alike(*found)
    # older records do not say, and of a GPU its host's are not told
    assert machine.told({"name": "Some CPU", "cpu": "Some CPU"}) == "Some CPU"
    assert machine.told({**found[0], "name": "Some GPU"}) == "Some GPU"


@pytest.mark.parametrize(
    "listed, driver",
    [
        ("GPU-a, 580.1, 1980 MHz, 2619 MHz, 40, 700 W, 0x0\nGPU-b, 580.2, 345 MHz", "580.2"),
        # part of a GPU has a UUID of its own: that of the whole is known where it is the only one
        ("GPU-c, 580.3, 1980 MHz", "580.3"),
        ("GPU-a, 580.1, 1980 MHz\nGPU-c, 580.3, 1980 MHz", None),
        ("", None),
    ],
)
def test_the_state_is_that_of_the_gpu_that_torch_uses(monkeypatch, listed, driver):
    """The first that the driver lists may be another, by CUDA_VISIBLE_DEVICES."""
    properties = lambda device: SimpleNamespace(uuid="b")
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(machine, "_output", lambda command: listed)
    found = machine.gpu_state(torch.device("cuda", 0))
    assert found.get("driver") == driver
    assert "GPU-" not in json.dumps(found)


def test_missing_native_operators_are_reported(monkeypatch):
    """They make a token of ours twice as slow, and a ratio meaningless."""
    monkeypatch.setattr(machine.native, "problem", lambda kind: f"{kind}: not built")
    (warning,) = [w for w in machine.disturbances(0.1) if "native operators" in w]
    assert "not built" in warning
    monkeypatch.setattr(machine.native, "problem", lambda kind: None)
    assert not [w for w in machine.disturbances(0.1) if "native operators" in w]


def test_ceilings_are_positive():
    found = machine.ceilings(CPU, torch.float32, quick=True)
    assert set(found) == {"copy_GBps", "read_GBps", "gemv_GBps", "gemm_TFLOPs"}
    assert all(value > 0 for value in found.values())


def test_a_machine_name_becomes_a_folder_name():
    assert machine.folder_name("NVIDIA H200 A/B") == "NVIDIA_H200_A_B"
