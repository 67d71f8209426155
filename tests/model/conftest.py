"""Three tiny models: the two block types with golden weights, and Rodimus+ with grouped heads."""

import pytest

from tests.model.golden_data import BLOCK_TYPES
from tests.model.helpers import KINDS, config_of, model_of


@pytest.fixture(params=BLOCK_TYPES)
def block_type(request) -> str:
    return request.param


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def config(kind) -> dict:
    """The released-format config dict of ``model``."""
    return config_of(kind)


@pytest.fixture
def model(kind):
    """A fresh fp32 model in eval mode: 2 or 3 layers, d_model 64, a window of 9 keys."""
    return model_of(kind)
