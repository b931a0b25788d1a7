# this_file: tests/durable/test_failures.py
"""Errors come back from the journal with their type."""

from __future__ import annotations

import asyncio
import io
import threading
from email.message import Message
from typing import Any
from urllib.error import HTTPError

import pytest

from opero.durable.values import keepable, message_of, pack_error, unpack_error
from opero.errors import ActivityError, CircuitOpenError

pytestmark = pytest.mark.internal


class OddError(Exception):
    def __init__(self, *, code: int, response: object) -> None:
        super().__init__(f"code {code}", response)
        self.code = code
        self.response = response


def test_type_arguments_attributes_and_notes_come_back() -> None:
    error = OddError(code=7, response="gone")
    error.add_note("while testing")
    back: Any = unpack_error(pack_error(error))
    assert (type(back), back.args, back.code, back.__notes__) == (
        OddError, ("code 7", "gone"), 7, ["while testing"]
    )  # fmt: skip


def test_what_cannot_be_kept_is_left_out_but_the_type_stays() -> None:
    error = OddError(code=7, response=threading.Lock())
    assert keepable(error) is error
    back: Any = unpack_error(pack_error(error))
    assert (type(back), back.code, hasattr(back, "response")) == (OddError, 7, False)
    assert "code 7" in str(back)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("k"),
        FileNotFoundError(2, "gone", "f"),
        CircuitOpenError("api", 3.0),
        TimeoutError(),
    ],
)
def test_common_errors_read_the_same(error: Exception) -> None:
    back = unpack_error(pack_error(error))
    assert (type(back), str(back), repr(back)) == (type(error), str(error), repr(error))


def test_an_http_error_of_urllib_comes_back_without_its_body() -> None:
    error = HTTPError("http://localhost/", 404, "gone", Message(), io.BytesIO(b"body"))
    with error:
        back: Any = unpack_error(pack_error(keepable(error)))
    assert (type(back), back.code, str(back)) == (HTTPError, 404, str(error))
    assert not hasattr(back, "__notes__")


def test_number_of_an_os_error_comes_back() -> None:
    back = unpack_error(pack_error(FileNotFoundError(2, "gone", "f")))
    assert isinstance(back, FileNotFoundError)
    assert (back.errno, back.filename) == (2, "f")


def test_another_error_stands_for_one_that_no_name_leads_to() -> None:
    class LocalError(Exception):
        pass

    error = LocalError("here")
    stand_in = keepable(error)
    assert (type(stand_in), str(stand_in)) == (ActivityError, "LocalError: here")
    assert type(unpack_error(pack_error(stand_in))) is ActivityError


def test_group_comes_back_with_its_members() -> None:
    group = ExceptionGroup("several", [ValueError("x"), ExceptionGroup("more", [KeyError("k")])])
    assert keepable(group) is group
    back = unpack_error(pack_error(group))
    assert (type(back), str(back), repr(back)) == (ExceptionGroup, str(group), repr(group))


def test_member_of_a_group_that_cannot_be_rebuilt_is_replaced_in_the_first_run() -> None:
    class LocalError(Exception):
        pass

    group = ExceptionGroup("several", [ValueError("x"), LocalError("here")])
    kept = keepable(group)
    assert isinstance(kept, ExceptionGroup)
    assert [type(member) for member in kept.exceptions] == [ValueError, ActivityError]
    assert repr(unpack_error(pack_error(kept))) == repr(kept)


def behind(error: BaseException | None) -> list[Any]:
    """What is behind an error: the links to it, types and texts."""
    found: list[Any] = []
    while error is not None:
        found.append((type(error), str(error), error.__suppress_context__))
        error = error.__context__ if error.__cause__ is None else error.__cause__
    return found


@pytest.mark.parametrize("explicit", [False, True])
def test_errors_behind_an_error_come_back_as_the_first_run_has_them(explicit: bool) -> None:
    class LocalError(Exception):
        pass

    first: BaseException = asyncio.CancelledError("stop")
    for one in (KeyError("k"), LocalError("here"), ValueError("x"), TimeoutError()):
        setattr(one, "__cause__" if explicit else "__context__", first)
        first = one
    kept = keepable(first)
    assert kept is first
    assert behind(unpack_error(pack_error(kept))) == behind(kept)
    assert [kind for kind, *_ in behind(kept)] == [
        TimeoutError, ValueError, ActivityError, KeyError, asyncio.CancelledError
    ]  # fmt: skip


def test_circles_of_errors_end() -> None:
    member, cause = ValueError("x"), KeyError("k")
    group = ExceptionGroup("several", [member])
    member.__context__ = group
    cause.__cause__ = cause.__context__ = member
    group.__cause__ = cause
    assert str(unpack_error(pack_error(keepable(member)))) == "x"
    assert repr(unpack_error(pack_error(keepable(group)))) == repr(group)


class TalkativeError(Exception):
    def __init__(self, response: object) -> None:
        super().__init__(response)
        self.response = response

    def __str__(self) -> str:
        return f"answered {self.response!r}"[:12]


def test_error_whose_message_would_change_is_replaced_in_the_first_run() -> None:
    error = TalkativeError(threading.Lock())
    stand_in = keepable(error)
    assert type(stand_in) is ActivityError
    assert str(unpack_error(pack_error(stand_in))) == str(stand_in)


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        (pack_error(ValueError("bad")), "ValueError: bad"),
        (pack_error(ValueError()), "ValueError"),
        ("as is", "as is"),
        ('{"damaged', '{"damaged'),
        ('{"type": 1}', '{"type": 1}'),
        (None, None),
    ],
)
def test_message_of_a_packed_error(text: str | None, reported: str | None) -> None:
    assert message_of(text) == reported


@pytest.mark.parametrize("text", ['{"damaged', "[]", '{"type": "builtins:dict", "notes": []}'])
def test_damaged_error_is_an_activity_error(text: str) -> None:
    assert isinstance(unpack_error(text), ActivityError)
