# this_file: tests/utils/test_exceptions.py
"""Copies of exceptions, one for each waiter."""

from __future__ import annotations

import dataclasses
import gc
import traceback

import pytest

from opero.caching.single_flight import SharedFailure
from opero.utils.exceptions import copy_error

pytestmark = pytest.mark.internal


class CustomError(Exception):
    def __init__(self, code, *, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class SlottedError(Exception):
    __slots__ = ("empty", "extra", "none")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


def slotted():
    error = SlottedError("x")
    error.extra = [1]
    error.none = None
    return error


@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (ValueError("a", 1), []),
        (KeyError("k"), []),
        (CustomError(5, detail="d"), ["code", "detail"]),
        (slotted(), ["extra", "none"]),
        (FrozenError(3), ["code"]),
        (FileNotFoundError(2, "gone", "x.txt"), ["errno", "strerror", "filename"]),
        (StopIteration(7), ["value"]),
        (ImportError("m", name="n", path="p"), ["name", "path"]),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), ["encoding", "object", "start", "reason"]),
        (SyntaxError("bad", ("f", 1, 2, "t")), ["lineno", "text"]),
        (AttributeError("a", name="n", obj=1), ["name", "obj"]),
        (ExceptionGroup("g", [ValueError()]), ["message", "exceptions"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_is_copied_with_all_that_it_carries(error, attributes):
    copy = copy_error(error)
    assert copy is not error
    assert type(copy) is type(error)
    assert copy.args == error.args
    assert str(copy) == str(error)
    for name in attributes:
        assert getattr(copy, name) == getattr(error, name)


def test_notes_cause_context_and_traceback_are_carried_over():
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner
    except ValueError as caught:
        caught.add_note("a note")
        error = caught
    copy = copy_error(error)
    copy.add_note("of the copy")
    assert error.__notes__ == ["a note"]
    assert copy.__notes__ == ["a note", "of the copy"]
    assert copy.__cause__ is error.__cause__
    assert copy.__context__ is error.__context__
    assert copy.__suppress_context__
    assert copy.__traceback__ is error.__traceback__


def test_suppressed_context_stays_suppressed_and_open_context_open():
    error = ValueError()
    error.__context__ = KeyError()
    assert not copy_error(error).__suppress_context__


def test_raising_a_copy_leaves_the_original_traceback_alone():
    try:
        raise ValueError
    except ValueError as caught:
        error = caught
    before = traceback.format_tb(error.__traceback__)
    with pytest.raises(ValueError):  # noqa: PT011 - it has no text
        raise copy_error(error)
    assert traceback.format_tb(error.__traceback__) == before


class StubbornError(Exception):
    def __new__(cls, *, need):
        return super().__new__(cls)

    def __init__(self, *, need):
        pass


class SingleError(Exception):
    _one = None

    def __new__(cls):
        cls._one = cls._one or super().__new__(cls)
        return cls._one


@pytest.mark.parametrize(
    "error", [StubbornError(need=1), SingleError()], ids=["needs arguments", "singleton"]
)
def test_an_exception_that_cannot_be_copied_is_itself(error):
    assert copy_error(error) is error


def test_copying_makes_no_cycle():
    gc.collect()
    gc.disable()
    try:
        error = SharedFailure(copy_error(ValueError("x")))
        del error
        assert gc.collect() == 0
    finally:
        gc.enable()
