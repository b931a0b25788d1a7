# this_file: tests/utils/test_exceptions.py
"""Exceptions are taken apart and made anew: for waiters, in pickles, in journals."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import threading
import traceback

import pytest

from opero.caching.single_flight import SharedFailure
from opero.concurrency.executors.encoding import dumps_with_errors
from opero.durable.values import keepable, pack_error, unpack_error
from opero.errors import ActivityError
from opero.utils.exceptions import copy_error

pytestmark = pytest.mark.internal


class CustomError(Exception):
    def __init__(self, code, *, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class SlottedError(Exception):
    __slots__ = ("empty", "extra", "none")


class SlottedOSError(OSError):
    __slots__ = ("extra",)

    def __init__(self, *, extra):
        super().__init__(2, "gone", "x.txt", None, "y.txt")
        self.extra = extra


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError


def slotted():
    error = SlottedError("x")
    error.extra = [1]
    error.none = None
    return error


def pickled(error):
    return pickle.loads(dumps_with_errors(error))


def journaled(error):
    assert keepable(error) is error
    return unpack_error(pack_error(error))


@pytest.mark.parametrize("carry", [copy_error, pickled, journaled])
@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (ValueError("a", 1), []),
        (KeyError("k"), []),
        (CustomError(5, detail="d"), ["code", "detail"]),
        (slotted(), ["extra", "none"]),
        (SlottedOSError(extra=[1]), ["errno", "filename", "filename2", "extra"]),
        (BlockingIOError(11, "later", 5), ["errno", "characters_written"]),
        (FrozenError(3), ["code"]),
        (FileNotFoundError(2, "gone", "x.txt"), ["errno", "strerror", "filename"]),
        (StopIteration(7), ["value"]),
        (ImportError("m", name="n", path="p"), ["name", "path"]),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), ["encoding", "object", "start", "reason"]),
        (SyntaxError("bad", ("f", 1, 2, "t")), ["lineno", "text"]),
        (AttributeError("a", name="n", obj=1), ["name", "obj"]),
        (ExceptionGroup("g", [ValueError()]), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_is_made_anew_with_all_that_it_carries(carry, error, attributes):
    made = carry(error)
    assert made is not error
    assert type(made) is type(error)
    assert str(made) == str(error)
    if isinstance(error, ExceptionGroup):
        assert repr(made.exceptions) == repr(error.exceptions)
    else:
        assert made.args == error.args
        left_out = _LEFT_OUT.get((carry, type(error)), ())
        assert [getattr(made, name, None) for name in attributes if name not in left_out] == [
            getattr(error, name) for name in attributes if name not in left_out
        ]


_LEFT_OUT = {
    # Python's own pickles go first, and leave these out.
    (pickled, SlottedError): ("extra", "none"),
    (pickled, AttributeError): ("name", "obj"),
    # Any object of the program's.
    (journaled, AttributeError): ("obj",),
}


@pytest.mark.parametrize("carry", [copy_error, pickled, lambda e: unpack_error(pack_error(e))])
def test_an_exception_without_a_text_is_made_anew(carry):
    made = carry(MuteError(3))
    assert (type(made), made.args) == (MuteError, (3,))


def test_for_an_exception_without_a_text_another_one_is_journaled():
    made = keepable(MuteError(3))
    assert type(made) is ActivityError
    assert str(made) == "MuteError: <str() raised RuntimeError>"


@pytest.mark.parametrize("carry", [pickled, journaled])
def test_what_cannot_be_carried_is_replaced_by_its_text(carry):
    error = FrozenError(threading.Lock())
    made = carry(error)
    assert (type(made), str(made), hasattr(made, "code")) == (FrozenError, str(error), False)


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
