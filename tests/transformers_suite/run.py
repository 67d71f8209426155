"""Hold the model to transformers' own tests: ModelTesterMixin, GenerationTesterMixin, CausalLM.

    python -m tests.transformers_suite.run --source PATH/TO/transformers

The tests are transformers' and no part of this project, and its packages carry only some of them:
``--source`` names a checkout of its repository, best at the tag of the installed version.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[2]
SUITE = Path(__file__).with_name("suite.py")


def version_of(source: Path) -> str:
    """The version that a checkout of transformers states."""
    needed = ("src/transformers/__init__.py", "tests/generation/test_utils.py")
    for name in needed:
        if not (source / name).is_file():
            raise SystemExit(f"{source} is no checkout of transformers: it has no {name}")
    return re.search(r'__version__ = "(.+)"', (source / needed[0]).read_text())[1]


def main() -> int:
    """Run the suite; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="checkout of transformers")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    source, installed = options.source.resolve(), transformers.__version__
    print(f"tests of transformers {version_of(source)}, installed {installed}", flush=True)
    # the checkout first: its package is called tests, too; its sources stay off the path
    paths = [str(source), str(ROOT), str(ROOT / "kernels")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    quiet = ["-q", "-rf", "--disable-warnings", "--show-capture=no", "-p", "no:cacheprovider"]
    alone = ["-c", os.devnull, "--noconftest", "--rootdir", str(source), "--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *quiet, *alone, str(SUITE), *options.arguments]
    return subprocess.run(command, cwd=source, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
