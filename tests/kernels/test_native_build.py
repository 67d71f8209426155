"""Building and loading the native operators: what is missing is said, what is stale is refused."""

import errno
import itertools
import logging
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

import rodimus_kernels as rk
from rodimus_kernels import build, native
from tests import warm_python

LIBRARY = build.PACKAGE / build.LIBRARIES["cpu"]
built = pytest.mark.skipif(not LIBRARY.is_file(), reason="the native operators are not built")
problem = native.problem.__wrapped__


@pytest.fixture(autouse=True)
def no_switches(monkeypatch):
    """Whoever runs the tests may have set some for the library that they test."""
    for name in (
        "RODIMUS_BUILD_CPU",
        "RODIMUS_BUILD_CUDA",
        "RODIMUS_CUDA_ARCHS",
        "CXX",
        "CUDA_HOME",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder without libraries."""
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    return tmp_path


@built
def test_a_library_carries_the_digest_of_its_sources():
    assert build.recorded_digest(LIBRARY) == build.digest(build.sources())


@built
def test_a_library_of_other_sources_is_refused(monkeypatch, caplog):
    monkeypatch.setattr(build, "digest", lambda folder: "0" * 16)
    with caplog.at_level(logging.WARNING):
        reason = problem("cpu")
    assert "built from other sources" in reason and "rodimus_kernels build" in reason
    assert "native operators are not used" in caplog.text


@built
def test_an_installed_library_without_sources_is_used(monkeypatch):
    monkeypatch.setattr(build, "sources", lambda: None)
    assert problem("cpu") is None


def test_a_damaged_library_is_refused(package, caplog):
    (package / LIBRARY.name).write_bytes(b"no library")
    assert "cannot be loaded" in problem("cpu")
    assert "native operators are not used" in caplog.text


def test_without_a_library_an_explicit_choice_says_how_to_build_it(package, monkeypatch):
    monkeypatch.setattr(native, "problem", problem)
    monkeypatch.setattr(native, "is_available", lambda device_type: problem(device_type) is None)
    x, weight = torch.randn(2, 4), torch.randn(4)
    with pytest.raises(ImportError, match=r"rms_norm\(impl='native'\).*rodimus_kernels build"):
        rk.rms_norm(x, weight, impl="native")
    assert torch.equal(rk.rms_norm(x, weight), rk.rms_norm(x, weight, impl="reference"))


@pytest.fixture
def missing(package, monkeypatch):
    """The library is not there, and nobody has been told yet."""
    monkeypatch.setattr(native, "problem", problem)
    native._say_if_not_built.cache_clear()
    yield
    native._say_if_not_built.cache_clear()


def decode():
    """One token by an operator, and one by whole blocks."""
    with torch.no_grad():
        rk.linear(torch.randn(2, 4), torch.randn(3, 4))
        assert not rk.can_fuse_block(2, torch.randn(2, 4))


def test_a_missing_library_is_said_once_and_only_where_a_token_waits(missing, caplog):
    with torch.no_grad():
        rk.rms_norm(torch.randn(2, 4), torch.randn(4))
    rk.linear(torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    rk.can_fuse_block(1, torch.randn(1, 4, requires_grad=True))
    rk.linear(torch.randn(9, 4), torch.randn(3, 4))
    assert not caplog.records
    decode()
    decode()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "decoding on cpu is slower" in record.message
    assert "python -m rodimus_kernels build" in record.message


def test_whole_blocks_say_it_too(missing, caplog):
    assert not rk.can_fuse_block(1, torch.randn(1, 4))
    assert "decoding on cpu is slower" in caplog.text


def test_who_wants_no_library_is_not_told(missing, monkeypatch, caplog):
    monkeypatch.setenv("RODIMUS_BUILD_CPU", "0")
    decode()
    assert not caplog.records


def test_a_compiled_step_says_it_and_does_not_break(missing, caplog):
    torch.compiler.reset()
    compiled = torch.compile(rk.linear, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(torch.randn(2, 4), torch.randn(3, 4))
    assert [r.name for r in caplog.records].count("rodimus_kernels.native") == 1


def test_other_devices_have_none():
    assert problem("meta") == "there are none for device 'meta'"


def test_any_change_of_a_source_changes_the_digest(tmp_path):
    folder = shutil.copytree(build.sources(), tmp_path / "csrc")
    before = build.digest(folder)
    assert before == build.digest(build.sources())
    for path in list(folder.rglob("*.*")):
        text = path.read_text()
        path.write_text(text + " ")
        assert build.digest(folder) != before, path
        path.write_text(text)
    assert build.digest(folder) == before


@pytest.mark.parametrize("kind", build.LIBRARIES)
def test_absent_compilers_are_said(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    lines = build.build(tmp_path)
    assert lines["cpu"].startswith("skipped: no C++17 compiler was found")
    assert lines["cuda"].startswith("skipped: nvcc was not found")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(f"RODIMUS_BUILD_{kind.upper()}", "1")
    with pytest.raises(RuntimeError, match=f"RODIMUS_BUILD_{kind.upper()}=1, but"):
        build.build(tmp_path)
    monkeypatch.setattr(sys, "argv", ["build"])
    monkeypatch.setattr(build, "build", partial(build.build, tmp_path))
    with pytest.raises(SystemExit, match=f"native operators: RODIMUS_BUILD_{kind.upper()}=1, but"):
        build.main()


@pytest.mark.parametrize("kind, variable", [("cpu", "CXX"), ("cuda", "CUDA_HOME")])
def test_a_compiler_that_is_named_and_not_there_is_an_error(tmp_path, monkeypatch, kind, variable):
    """Beside one that works, too: nobody names one to build nothing, or with another."""
    monkeypatch.setenv("RODIMUS_BUILD_CPU" if kind == "cuda" else "RODIMUS_BUILD_CUDA", "0")
    monkeypatch.setenv(variable, str(tmp_path))
    lines = build.build(tmp_path)
    assert lines[kind].startswith(f"failed: {variable} must name"), lines
    assert lines[kind].endswith(f"got {str(tmp_path)!r}") and not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["build"])
    monkeypatch.setattr(build, "build", lambda force: lines)
    with pytest.raises(SystemExit) as stopped:
        build.main()
    assert stopped.value.code == 1


def test_a_report_without_nvcc_says_why_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["build", "--report"])
    with pytest.raises(SystemExit, match=r"native operators \(cuda\): nvcc was not found"):
        build.main()


def test_a_compiler_may_be_named_from_here(tmp_path, monkeypatch):
    """It is run in the folder of the sources."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own++").symlink_to(shutil.which("true"))
    monkeypatch.setenv("CXX", "./own++")
    assert build._cxx() == str(tmp_path / "own++")


def test_absent_torch_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "_cxx", lambda: "g++")
    monkeypatch.setenv("RODIMUS_BUILD_CUDA", "0")
    lines = build.build(tmp_path)
    assert "torch is not installed where the build runs" in lines["cpu"]
    assert lines["cuda"] == "skipped: RODIMUS_BUILD_CUDA=0"


def test_a_failing_compiler_does_not_stop_an_installation(tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no space left")

    monkeypatch.setattr(build, "_build_cpu", fail)
    monkeypatch.setenv("RODIMUS_BUILD_CUDA", "0")
    assert build.build(tmp_path, force=True)["cpu"] == "failed: no space left"


def make_any(folder, scratch, library, mark):
    library.write_bytes(b"a library")


def test_a_failing_nvcc_leaves_the_library_of_the_cpu_and_fails_the_command(tmp_path, monkeypatch):
    """Which is how it fails continuous integration, and no installation."""

    def fail(*arguments):
        raise RuntimeError("kernels.cu(1): error")

    monkeypatch.setattr(build, "_build_cpu", make_any)
    monkeypatch.setattr(build, "_build_cuda", fail)
    lines = build.build(tmp_path, force=True)
    assert lines == {"cpu": "built", "cuda": "failed: kernels.cu(1): error"}
    assert [path.name for path in tmp_path.iterdir()] == [LIBRARY.name]
    monkeypatch.setattr(sys, "argv", ["build"])
    monkeypatch.setattr(build, "build", lambda force: lines)
    with pytest.raises(SystemExit) as stopped:
        build.main()
    assert stopped.value.code == 1


def test_two_builds_at_once_do_not_meet(tmp_path, monkeypatch):
    """The other one, of another process, ends before this one renames what it wrote."""
    monkeypatch.setattr(build, "_build_cpu", make_any)
    monkeypatch.setenv("RODIMUS_BUILD_CUDA", "0")
    copy, processes = shutil.copyfile, itertools.count(1)
    monkeypatch.setattr(build.os, "getpid", lambda: next(processes))

    def copy_first(source, target):
        copy(source, target)
        monkeypatch.setattr(build.shutil, "copyfile", copy)
        assert build.build(tmp_path, force=True)["cpu"] == "built"

    monkeypatch.setattr(build.shutil, "copyfile", copy_first)
    assert build.build(tmp_path, force=True)["cpu"] == "built"
    assert [path.name for path in tmp_path.iterdir()] == [LIBRARY.name]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(build, "_build_cpu", make_any)
    monkeypatch.setattr(build.shutil, "copyfile", fail)
    monkeypatch.setenv("RODIMUS_BUILD_CUDA", "0")
    line = build.build(tmp_path, force=True)["cpu"]
    assert line.startswith("failed: [Errno 28] No space left on device")
    assert not list(tmp_path.iterdir())


def test_switches_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("RODIMUS_BUILD_CPU", "yes")
    with pytest.raises(RuntimeError, match="RODIMUS_BUILD_CPU must be auto, 0 or 1, got 'yes'"):
        build.build(tmp_path)


@built
def test_what_is_up_to_date_is_not_built_again(tmp_path, monkeypatch):
    shutil.copyfile(LIBRARY, tmp_path / LIBRARY.name)
    monkeypatch.setenv("RODIMUS_BUILD_CUDA", "0")
    monkeypatch.setattr(build, "_build_cpu", None)
    assert build.build(tmp_path)["cpu"] == "up to date"


def test_other_gpu_architectures_build_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RODIMUS_BUILD_CPU", "0")
    monkeypatch.setattr(build, "_nvcc", lambda: "nvcc")
    library, made = tmp_path / build.LIBRARIES["cuda"], []
    current = build.digest(build.sources())

    def make(folder, scratch, built, mark):
        made.append(build.cuda_archs("nvcc"))
        built.write_bytes(
            f"RODIMUS-SOURCES:{current}\0RODIMUS-ARCHS:{';'.join(made[-1])}\0".encode()
        )

    monkeypatch.setattr(build, "_build_cuda", make)
    for archs, line in (("90a", "built"), ("90a", "up to date"), ("80,90a", "built")):
        monkeypatch.setenv("RODIMUS_CUDA_ARCHS", archs)
        assert build.build(tmp_path)["cuda"] == line
    assert made == [["90a"], ["80", "90a"]] and build.recorded_archs(library) == "80;90a"
    # without a compiler it is all there can be
    monkeypatch.setattr(build, "_nvcc", unavailable)
    monkeypatch.setenv("RODIMUS_CUDA_ARCHS", "100")
    assert build.build(tmp_path)["cuda"] == "up to date"


@pytest.mark.parametrize("home", ["12.1", "11.8"])
def test_a_toolkit_that_is_too_old_is_said(tmp_path, monkeypatch, home):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {home}, V{home}.105'")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("RODIMUS_BUILD_CPU", "0")
    line = build.build(tmp_path / "out", force=True)["cuda"]
    assert line == f"skipped: expected nvcc of CUDA 12.2 or newer, got {home}: {nvcc.resolve()}"


def unavailable():
    raise build.Unavailable("no nvcc")


@pytest.mark.parametrize("archs", ["sm_90", "90a;", "9.0", "native"])
def test_gpu_architectures_are_checked(tmp_path, monkeypatch, archs):
    monkeypatch.setenv("RODIMUS_BUILD_CPU", "0")
    monkeypatch.setenv("RODIMUS_CUDA_ARCHS", archs)
    monkeypatch.setattr(build, "_nvcc", lambda: "nvcc")
    with pytest.raises(RuntimeError, match="must be like"):
        build.cuda_archs("nvcc")


def test_ptx_is_of_no_single_architecture():
    """PTX of compute_90a runs on 9.0 alone."""
    assert build.nvcc_flags(["80", "90a"])[-1] == "arch=compute_90,code=compute_90"


def test_what_is_loaded_is_printed():
    """In a process of its own, as a user would ask."""
    done = warm_python.run("-m", "rodimus_kernels")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    devices = [line.partition(": ")[0] for line in lines]
    assert devices == [f"native operators, {kind}" for kind in build.LIBRARIES]


def test_the_command_that_builds_says_nothing_else():
    """What README names first must not begin with a warning."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "rodimus_kernels", "build"],
        capture_output=True,
        text=True,
        env=os.environ | {"RODIMUS_BUILD_CPU": "0", "RODIMUS_BUILD_CUDA": "0"},
        cwd=build.PACKAGE.parent,
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert run.stdout.count("native operators (") == 2
