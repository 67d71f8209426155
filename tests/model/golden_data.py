"""The golden data, and how far a tensor is from it."""

import json
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rodimus_kernels.testing import relative_error
from tests.device import here

GOLDENS = Path(__file__).parents[1] / "goldens"
BLOCK_TYPES = ("rodimus", "rodimus_plus")


def golden_tensors(block_type: str, name: str = "golden_fp32") -> dict[str, Tensor]:
    """Tensors of one golden file; shared, so they must not be written to."""
    return {key: here(tensor) for key, tensor in _read(block_type, name).items()}


@cache
def _read(block_type, name):
    return load_file(GOLDENS / block_type / f"{name}.safetensors")


def golden_notes(block_type: str, name: str = "golden_fp32") -> dict:
    return json.loads((GOLDENS / block_type / f"{name}.json").read_text())


def golden_weights(block_type: str) -> dict[str, Tensor]:
    """Parameters by their released names; tied, so without ``lm_head.weight``."""
    return golden_tensors(block_type, "model")


def golden_config(block_type: str) -> dict:
    return json.loads((GOLDENS / block_type / "config.json").read_text())


def exact(x: Tensor) -> Tensor:
    """The same numbers in float64 on the CPU, without a gradient."""
    return x.detach().cpu().double()


def relative_max_error(actual: Tensor, expected: Tensor) -> float:
    """``max |a - b| / max |b|`` in float64; infinite where the shapes differ, NaN for a NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = exact(actual), exact(expected)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def max_error(actual: Tensor, expected: Tensor) -> float:
    """``max |a - b|`` in float64; infinite where the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return (exact(actual) - exact(expected)).abs().max().item()


def l2_error(actual: Tensor, expected: Tensor) -> float:
    """``|a - b| / |b|`` in the Euclidean norm; ``|a - b|`` where b is zero."""
    return relative_error(exact(actual), exact(expected))
