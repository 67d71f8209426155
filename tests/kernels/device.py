"""Where the operators are tested: on the GPU where there is one, else on the CPU."""

import importlib.util

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TRITON_MARKS = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
"""Marks of a test that runs Triton kernels; without a GPU they run in the interpreter."""
