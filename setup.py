"""Metadata of the distribution: its name, its requirements and the folders it contains.

Two packages are installed: ``rodimus`` (model, generation, training) and ``rodimus_kernels``
(operators), which lives in ``kernels/``. That folder is a plain directory and never a package: a
package of that name would hide HuggingFace's ``kernels``.
"""

import importlib.util
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel, get_platform
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "pytest-benchmark>=5.1",
    "parameterized>=0.9",
    "accelerate>=1.1",
    "peft>=0.17",
    "torchao>=0.18",
    "gguf>=0.17",
    "pyarrow>=18",
]
DEV = [*TEST, "ruff>=0.17", "build>=1.2"]
TRAIN = ["matplotlib>=3.9", "rich>=13"]
BENCH = [
    "pytest>=8",
    "pytest-benchmark>=5.1",
    "matplotlib>=3.9",
    "rwkv>=0.8.32",
    "gguf>=0.17",
    "torchao>=0.18",
]
SERVE = ["starlette>=0.40", "uvicorn>=0.30", "prometheus-client>=0.20"]


def version() -> str:
    """Reads the version from ``rodimus/__init__.py``, the only place that states it."""
    text = (HERE / "rodimus" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def builder():
    """The module that builds ``csrc/``, loaded by its path because its package imports torch."""
    path = HERE / "kernels" / "rodimus_kernels" / "build.py"
    spec = importlib.util.spec_from_file_location("rodimus_kernels_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Builds the modules, and adds the native operators: sources, and what can be built here."""

    def run(self):
        super().run()
        build = builder()
        package = build.PACKAGE
        if not self.editable_mode:
            package = Path(self.build_lib, "rodimus_kernels")
            # remove what an earlier build left there, so that it is not packed
            shutil.rmtree(package / "csrc", ignore_errors=True)
            for name in build.LIBRARIES.values():
                (package / name).unlink(missing_ok=True)
            shutil.copytree(HERE / "csrc", package / "csrc")
        for kind, line in build.build(package).items():
            print(f"native operators ({kind}): {line}")


class BdistWheel(bdist_wheel):
    """A wheel for one platform when it holds native operators, and for every Python either way."""

    def get_tag(self):
        package = Path(self.get_finalized_command("build_py").build_lib, "rodimus_kernels")
        if any((package / name).is_file() for name in builder().LIBRARIES.values()):
            self.root_is_pure = False
            return "py3", "none", get_platform(self.bdist_dir).replace("-", "_").replace(".", "_")
        return super().get_tag()


setup(
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    name="rodimus",
    version=version(),
    description="Rodimus and Rodimus+ language models: exact, fast, constant memory per token",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=[
        "language model",
        "linear attention",
        "recurrent",
        "pytorch",
        "triton",
        "transformers",
    ],
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2410.06577"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["rodimus", "rodimus.*"]) + find_packages("kernels"),
    package_dir={"rodimus": "rodimus", "rodimus_kernels": "kernels/rodimus_kernels"},
    package_data={"rodimus": ["*.jinja", "py.typed"], "rodimus_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        # its minor versions change what generate() and a model pass to each other: 5.24 renamed the
        # cache argument, without which every token is wrong and there is no error
        "transformers>=5.17,<5.25",
        "safetensors>=0.5",
        "numpy>=1.26",
        "jinja2>=3.1",
        "tyro>=1.0",
        "triton>=3.6; sys_platform == 'linux'",
    ],
    extras_require={
        "dev": sorted({*DEV, *TRAIN, *SERVE}),
        "train": TRAIN,
        "bench": BENCH,
        "serve": SERVE,
    },
    entry_points={"console_scripts": ["rodimus=rodimus.cli:main"]},
)
