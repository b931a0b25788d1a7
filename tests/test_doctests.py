# this_file: tests/test_doctests.py
"""Every example in a docstring runs and gives what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import opero

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(opero.__path__, "opero.")
    if not module.name.endswith(("__main__", "_version"))
)


@pytest.mark.parametrize("name", ["opero", *MODULES])
def test_examples_run(name: str) -> None:
    # `opero.decorators.opero` is a module and, as an attribute of its package, a function.
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    found = [
        example
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(found) > 30
