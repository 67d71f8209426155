"""What every test gets: a device, a seed, no network (unless a checkpoint is named), and
uninitialised memory that shows."""

import os
import random

import numpy as np
import pytest
import torch

from tests.device import placed
from tests.interpreter import speed_up

pytest_plugins = ["tests.error_table"]

# both are read when the libraries are first imported, so they are set before any test module is
if "RODIMUS_CHECKPOINT" not in os.environ:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Autograd starts its threads at the first backward pass, one for each GPU, and fake tensors
    # pretend that there are some; after that a forked rank could not train.
    torch.ones((), requires_grad=True).backward()
    speed_up()


def pytest_addoption(parser):
    what = "tests of operators: check every load and store of Triton kernels in the interpreter"
    parser.addoption("--check-kernel-memory", action="store_true", help=what)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU, saying so, where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def device(request):
    """Where the test's models and tensors are: on the CPU, or where ``tests.device.ON_BOTH`` has
    them."""
    with placed(getattr(request, "param", "cpu")) as device:
        yield device


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Same numbers in every run, whatever the order or the worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _full_precision():
    """Comparisons in fp32 mean fp32: TF32 would hide an error of 1e-3."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory(request):
    """Operators must write their whole output, so under tests/kernels ``torch.empty`` returns NaN.

    torch fills fresh memory in its deterministic mode (``torch.utils.deterministic``);
    ``warn_only`` keeps operations without a deterministic form usable.
    """
    if not request.node.nodeid.startswith("tests/kernels/"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
