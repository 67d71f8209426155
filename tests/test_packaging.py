"""What gets built and installed: both packages and their data, by every way of installing."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import rodimus
from rodimus.modeling_rodimus import TRANSFORMERS_VERSIONS

ROOT = Path(__file__).parent.parent
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "data", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)
# Installing must not need a compiler: these fail when they are called.
ENVIRONMENT = os.environ | {"CC": "false", "CXX": "false", "PIP_NO_INPUT": "1"}


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that must succeed."""
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
    process = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout, so that building leaves nothing in it."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "rodimus", ignore=IGNORED)


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """``(wheel, sdist)``; the wheel is built from the sdist, as an installer would."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def environment(folder: Path, requirement: str | Path, *options: str) -> Path:
    """A virtual environment with one thing installed; all else comes from this interpreter."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    # a path file appends: what is installed here stays first, and editable hooks there stay silent
    (Path(site) / "outer.pth").write_text(sysconfig.get_path("purelib"))
    run(
        *(sys.executable, "-m", "pip", "-q", "--python", python, "install"),
        *("--no-deps", "--no-index", "--no-build-isolation", *options, requirement),
        cwd=folder,
    )
    return python


def python_files(folder: Path) -> set[str]:
    """The modules of a package, relative to the folder it is in."""
    return {str(path.relative_to(folder.parent)) for path in folder.rglob("*.py")}


@pytest.mark.slow
def test_wheel_holds_both_packages_and_nothing_else(checkout, built):
    wheel, _ = built
    assert wheel.name == f"rodimus-{rodimus.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {"rodimus/chat_template.jinja", "rodimus/py.typed", "rodimus_kernels/py.typed"}
    modules = python_files(checkout / "rodimus")
    modules |= python_files(checkout / "kernels" / "rodimus_kernels")
    sources = (path for path in (checkout / "csrc").rglob("*") if path.is_file())
    data |= {f"rodimus_kernels/{path.relative_to(checkout)}" for path in sources}
    assert {name for name in names if ".dist-info/" not in name} == modules | data


@pytest.mark.slow
def test_metadata_of_the_wheel(built):
    archive = zipfile.ZipFile(built[0])
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    classifiers = set(metadata.get_all("Classifier"))
    assert {"Programming Language :: Python :: 3 :: Only", "Typing :: Typed"} <= classifiers
    # the expression above stands for it, and packaging tools refuse both
    assert not [line for line in classifiers if line.startswith("License ::")]
    assert "linear attention" in metadata["Keywords"].split(",")
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    names = {"torch", "transformers", "safetensors", "numpy", "jinja2", "tyro", "triton"}
    assert {r.name for r in required if "extra" not in str(r.marker)} == names


@pytest.mark.slow
def test_sdist_can_test_and_build_itself(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "LICENSE"} <= names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"} <= names
    assert {"tests/test_packaging.py", "kernels/rodimus_kernels/reference.py"} <= names
    assert {f"configs/{path.relative_to(ROOT / 'configs')}" for path in configs()} <= names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def configs() -> list[Path]:
    """The files people edit."""
    return [path for path in (ROOT / "configs").rglob("*") if path.suffix in (".json", ".toml")]


@pytest.mark.slow
def test_installed_wheel_works(built, tmp_path):
    python = environment(tmp_path / "venv", built[0])
    code = "import rodimus, rodimus_kernels; print(rodimus.__file__, rodimus_kernels.__file__)"
    files = run(python, "-c", code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(tmp_path) for file in files)
    report = run(python, "-m", "rodimus.env", cwd=tmp_path)
    assert "ddts_step" in report and "fails" not in report
    command = python.parent / "rodimus"
    assert f"rodimus {rodimus.__version__}" in run(command, "--version", cwd=tmp_path)
    code = "from rodimus.export import code_files; print(all(s.is_file() for s, _ in code_files()))"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "True"


@pytest.mark.slow
def test_editable_install_works(checkout, tmp_path):
    python = environment(tmp_path / "venv", checkout, "-e")
    code = "import rodimus, rodimus_kernels; print(rodimus.__file__, rodimus_kernels.__file__)"
    files = run(python, "-c", code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(checkout) for file in files)


def test_constraints_pin_what_ci_runs():
    """Every line an exact version, torch without a build tag, and all of them distinct."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line.split("==") for line in text.splitlines() if not line.startswith("#")]
    assert all(len(pin) == 2 and "+" not in pin[1] for pin in pins)
    versions = {name.lower(): version for name, version in pins}
    assert len(versions) == len(pins)
    tested = {"torch": "2.13.0", "transformers": "5.24.0", "triton": "3.9.0"}
    assert versions | tested == versions


def test_the_range_of_transformers_is_that_of_the_model():
    """What pip keeps to, the model warns of, and the documents say."""
    first, last = TRANSFORMERS_VERSIONS
    (required,) = re.findall(r'"transformers(>.*)"', (ROOT / "setup.py").read_text("utf-8"))
    major, minor = last.split(".")
    assert SpecifierSet(required) == SpecifierSet(f">={first},<{major}.{int(minor) + 1}")
    for document in ("README.md", "CHANGELOG.md", "docs/checkpoints.md"):
        assert f"{first} to {last}" in (ROOT / document).read_text("utf-8"), document


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\S+)$", text, re.MULTILINE)
    assert versions[0] == rodimus.__version__ and len(set(versions)) == len(versions)


def test_metadata_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project) == {"build-system", "tool"}
