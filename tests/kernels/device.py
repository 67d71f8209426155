"""Where the operators are tested: on the GPU where there is one, else on the CPU."""

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TRITON_MARKS = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
"""Marks of a test that runs Triton kernels; without a GPU they run in the interpreter."""


def triton_module(name: str) -> ModuleType:
    """A module of kernels, imported; the test is skipped where triton itself is missing."""
    pytest.importorskip("triton")
    return importlib.import_module(name)
