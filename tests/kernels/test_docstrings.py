"""Public functions have types, and their docstrings name what ``impl=`` accepts."""

import inspect
import re
import sys

import pytest

import rodimus_kernels

FUNCTIONS = [
    value
    for name in rodimus_kernels.__all__
    if inspect.isfunction(value := getattr(rodimus_kernels, name))
]
OPERATORS = [x for x in FUNCTIONS if "impl" in inspect.signature(x).parameters]
by_name = {"ids": lambda function: function.__name__}


def table_of(operator) -> dict[str, str]:
    """The dispatch table that the operator loads from."""
    known = vars(sys.modules[operator.__module__])
    used = [known.get(name) for name in operator.__code__.co_names]
    (table,) = (value for value in used if isinstance(value, dict))
    return table


@pytest.mark.parametrize("function", FUNCTIONS, **by_name)
def test_types_are_given(function):
    signature = inspect.signature(function)
    given = [x.annotation for x in signature.parameters.values()] + [signature.return_annotation]
    assert inspect.Signature.empty not in given


@pytest.mark.parametrize("operator", OPERATORS, **by_name)
def test_impl_names_are_listed(operator):
    entry = re.search(r"^ +impl: (.+?)\n\n", inspect.getdoc(operator), re.DOTALL | re.MULTILINE)
    assert set(re.findall(r'``"(\w+)"``', entry[1])) == {"auto", *table_of(operator)}
