"""What the tests of operators compare with."""

import pytest
import torch

from rodimus_kernels.testing import assert_close, assert_within_budget, relative_error


def test_tensors_of_other_shapes_are_not_compared():
    """They may broadcast, and then nothing is wrong with them."""
    x, other = torch.ones(3, 2), torch.ones(1, 3, 2)
    for compare in (
        lambda: relative_error(x, other),
        lambda: assert_close({"x": x}, {"x": other}, 1.0),
        lambda: assert_within_budget("x", x, other, other),
        lambda: assert_within_budget("x", other, other, x),
    ):
        with pytest.raises(ValueError, match=r"expected shape \(1, 3, 2\), got \(3, 2\)"):
            compare()
