"""Metadata of the distribution: what it is called, what it needs, which folders it takes.

Two packages are installed: ``rodimus`` (model, generation, training) and ``rodimus_kernels``
(operators), which lives in ``kernels/``. That folder is a plain directory and never a package: a
package of that name would hide HuggingFace's ``kernels``.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

TEST = ["pytest>=8", "pytest-xdist>=3.6", "pytest-benchmark>=5.1", "parameterized>=0.9"]
DEV = [*TEST, "ruff>=0.17", "build>=1.2"]
TRAIN = ["matplotlib>=3.9", "rich>=13"]
BENCH = ["pytest-benchmark>=5.1", "matplotlib>=3.9"]
SERVE = ["transformers[serving]>=5.17,<6"]


def version() -> str:
    """The one place that states the version is ``rodimus/__init__.py``."""
    text = (HERE / "rodimus" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


setup(
    name="rodimus",
    version=version(),
    description="Rodimus and Rodimus+ language models: exact, fast, constant memory per token",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["rodimus", "rodimus.*"]) + find_packages("kernels"),
    package_dir={"rodimus": "rodimus", "rodimus_kernels": "kernels/rodimus_kernels"},
    package_data={"rodimus": ["*.jinja", "py.typed"], "rodimus_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "safetensors>=0.5",
        "numpy>=1.26",
        "jinja2>=3.1",
        "tyro>=1.0",
        "triton>=3.6; sys_platform == 'linux'",
    ],
    extras_require={"dev": sorted({*DEV, *TRAIN}), "train": TRAIN, "bench": BENCH, "serve": SERVE},
    entry_points={"console_scripts": ["rodimus=rodimus.cli:main"]},
)
