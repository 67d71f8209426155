"""Models of the engine's tests: both block types, and Rodimus+ with grouped heads."""

import pytest

from tests.model.helpers import KINDS, model_of


@pytest.fixture(params=KINDS)
def model(request):
    """A tiny fp32 model in eval mode; a window of 9 keys where it has one."""
    return model_of(request.param)


@pytest.fixture
def plus():
    """The tiny Rodimus+."""
    return model_of("rodimus_plus")
