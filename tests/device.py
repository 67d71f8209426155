"""Where tests of whole models run: on the CPU, on a GPU, or on both."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import torch

_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
ON_BOTH = pytest.mark.parametrize("device", ["cpu", _GPU], indirect=True)
"""Mark of a test that runs on the CPU and on a GPU."""
ON_GPU = pytest.mark.parametrize("device", [_GPU], indirect=True)
"""Mark of one that runs on a GPU alone."""

Placed = TypeVar("Placed", torch.Tensor, torch.nn.Module)
_places = [torch.device("cpu")]


def here(x: Placed) -> Placed:
    """A tensor or model on the running test's device. Under a default device of torch's, what the
    package makes on the wrong one would go unseen."""
    return x.to(_places[-1])


@contextmanager
def placed(device: str) -> Iterator[torch.device]:
    """Within it, ``here`` is that device."""
    _places.append(torch.device(device))
    try:
        yield _places[-1]
    finally:
        _places.pop()
