"""The docstring of an operator names what its ``impl=`` accepts."""

import inspect
import re
import sys

import pytest

import rodimus_kernels

OPERATORS = [
    function
    for name in rodimus_kernels.__all__
    if "impl" in inspect.signature(function := getattr(rodimus_kernels, name)).parameters
]


def table_of(operator) -> dict[str, str]:
    """The dispatch table that the operator loads from."""
    known = vars(sys.modules[operator.__module__])
    used = [known.get(name) for name in operator.__code__.co_names]
    (table,) = (value for value in used if isinstance(value, dict))
    return table


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_impl_names_are_listed(operator):
    entry = re.search(r"^ +impl: (.+?)\n\n", inspect.getdoc(operator), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r'``"(\w+)"``', entry[1])) == {"auto", *table_of(operator)}
