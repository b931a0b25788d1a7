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


@pytest.fixture(scope="module")
def examples() -> list[doctest.DocTest]:
    """The docstrings that have examples."""
    finder = doctest.DocTestFinder()
    # `opero.decorators.opero` is a module and, as an attribute of its package, a function.
    modules = [importlib.import_module(name) for name in ("opero", *MODULES)]
    return [test for module in modules for test in finder.find(module) if test.examples]


def test_examples_run(examples: list[doctest.DocTest]) -> None:
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    runner = doctest.DocTestRunner(optionflags=options)  # prints what fails
    assert [test.name for test in examples if runner.run(test).failed] == []


def test_there_are_examples(examples: list[doctest.DocTest]) -> None:
    assert sum(len(test.examples) for test in examples) > 30
