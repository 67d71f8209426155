"""What gets installed: the two packages and their data, without a compiler."""

import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide HuggingFace's `kernels`"
    assert sysconfig.get_python_version() >= "3.11"
