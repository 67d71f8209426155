"""A record says where it was made and what disturbed it, and nothing private."""

import getpass
import json
import platform
import subprocess

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
    code.write_text("2")
    assert machine.commit()["dirty"] is True


def test_a_copy_without_git_takes_its_commit_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "_output", lambda command: "")
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "abc123")
    assert machine.commit() == {"commit": "abc123", "dirty": None}


def test_a_busy_machine_is_reported_with_its_load():
    (warning,) = [w for w in machine.disturbances(3.5) if "busy" in w]
    assert "load average 3.5" in warning
    assert not [w for w in machine.disturbances(0.1) if "busy" in w]


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
