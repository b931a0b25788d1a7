# this_file: tests/test_errors.py
"""The tree of exceptions."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
from tests.tables import rows

from opero import errors
from opero.errors import OperoError, OperoUsageError, OperoWarning, did_you_mean

pytestmark = pytest.mark.internal

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and value.__module__ == errors.__name__
    # No caller ever sees it: a signal between stages.
    if value is not errors.Rejected
]


@rows("cls", CLASSES)
def test_every_class_is_public_and_documented(cls: type) -> None:
    assert cls.__name__ in errors.__all__
    assert cls.__doc__


@rows("cls", [c for c in CLASSES if c is not OperoWarning])
def test_every_error_can_be_caught_as_an_opero_error(cls: type) -> None:
    assert issubclass(cls, OperoError)


@rows("cls", CLASSES)
def test_the_drawn_tree_is_the_real_one(cls: type) -> None:
    drawn = re.search(rf"\b{cls.__name__}\b( \(([^)]*)\))?", errors.__doc__ or "")
    assert drawn
    bases = {base.strip() for base in (drawn[2] or "").split(",")} - {""}
    foreign = {b.__name__ for b in cls.__bases__ if b.__module__ == "builtins"}
    assert bases == foreign - {"Exception", "UserWarning"}


def test_a_usage_error_is_caught_either_way() -> None:
    for kind in (TypeError, ValueError, OperoError):
        with pytest.raises(kind):
            raise OperoUsageError("x")


def test_a_deadline_error_is_a_timeout() -> None:
    assert issubclass(errors.DeadlineError, TimeoutError)


def test_a_warning_is_no_error() -> None:
    assert issubclass(OperoWarning, UserWarning)
    assert not issubclass(OperoWarning, OperoError)


@pytest.mark.parametrize("cls", [OperoError, OperoUsageError, errors.RefusalError])
def test_errors_survive_pickle_and_copy(cls: type[Exception]) -> None:
    error = cls("what happened")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is cls
        assert str(again) == "what happened"


@pytest.mark.parametrize(
    ("wrong", "known", "hint"),
    [
        ("retires", ["retries", "cache"], " Did you mean 'retries'?"),
        ("x", ["retries"], ""),
        ("x", [], ""),
        ("", ["retries"], ""),
    ],
)
def test_the_nearest_name_is_proposed_if_it_is_near(
    wrong: str, known: list[str], hint: str
) -> None:
    assert did_you_mean(wrong, known) == hint
