# this_file: tests/caching/codec/test_coder.py
"""What is stored is read under its own key only, whole and unchanged, and by its own codec."""

from __future__ import annotations

import json
import pickle
from threading import Lock
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opero.caching.codec import Coder
from opero.caching.plain_types import Undecodable, Unencodable

pytestmark = pytest.mark.internal

OPENED: list[str] = []


class Point:
    """No plain data: it has its own way to be pickled."""

    def __init__(self, x: int, y: Any = None) -> None:
        self.x, self.y = x, y

    def __reduce__(self) -> Any:
        return Point, (self.x, self.y)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and (self.x, self.y) == (other.x, other.y)

    def __repr__(self) -> str:
        return f"Point({self.x!r}, {self.y!r})"

    __hash__ = None  # type: ignore[assignment]


def leave_trace() -> None:
    OPENED.append("opened")


class Trap:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> Any:
        return leave_trace, ()


class Json:
    """A user's codec."""

    def encode(self, value: Any) -> bytes:
        return json.dumps(value).encode()

    def decode(self, data: bytes) -> Any:
        return json.loads(data)


def blob(coder: Coder, value: Any, context: bytes = b"key") -> bytes:
    return b"".join(coder.encode(value, context))


VALUES = [
    None,
    {"id": 1, "tags": ("a", b"b")},
    Point(1, [2]),
    ValueError("x", 1),
    b"x" * 100_000,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back(value: Any) -> None:
    coder = Coder()
    made = coder.decode(blob(coder, value), b"key")
    assert type(made) is type(value)
    assert repr(made) == repr(value)


def test_frames_come_back() -> None:
    import pandas as pd

    frame = pd.DataFrame({"a": [1.5, 2.5], "b": ["x", None]})
    coder = Coder()
    made = coder.decode(blob(coder, frame), b"key")
    pd.testing.assert_frame_equal(made, frame)
    made.loc[0, "a"] = 5.0  # it can be written to


@pytest.mark.parametrize("value", [(1, "a"), Point(1)], ids=["plain", "signed"])
def test_an_entry_counts_for_its_own_key_only(value: Any) -> None:
    coder = Coder()
    with pytest.raises(Undecodable):
        coder.decode(blob(coder, value, b"a"), b"b")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from([(1, "a"), Point(1), b"x" * 20_000]), st.data())
def test_a_change_of_any_byte_is_noticed(value: Any, data: Any) -> None:
    coder = Coder()
    whole = bytearray(blob(coder, value))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Undecodable):
        coder.decode(bytes(whole), b"key")


@pytest.mark.parametrize("value", [(1, "a"), Point(1)], ids=["plain", "signed"])
def test_every_shorter_or_longer_entry_is_noticed(value: Any) -> None:
    coder = Coder()
    whole = blob(coder, value)
    for size in range(len(whole)):
        with pytest.raises(Undecodable):
            coder.decode(whole[:size], b"key")
    with pytest.raises(Undecodable):
        coder.decode(whole + b"\0", b"key")


@given(st.binary(max_size=100))
def test_garbage_is_no_entry(data: bytes) -> None:
    with pytest.raises(Undecodable):
        Coder().decode(data, b"key")


@pytest.mark.parametrize("head", [b"", b"s", b"s" + b"\0" * 32, b"p", b"p\0\0\0\0", b"u\0\0\0\0"])
def test_no_pickle_is_opened_that_we_did_not_sign(head: bytes) -> None:
    OPENED.clear()
    for codec in ("auto", "plain"):
        with pytest.raises(Undecodable):
            Coder(codec).decode(head + pickle.dumps(Trap()), b"key")
    assert OPENED == []


def test_our_own_pickles_are_opened() -> None:
    OPENED.clear()
    coder = Coder()
    coder.decode(blob(coder, Trap()), b"key")
    assert OPENED == ["opened"]


def test_a_pickle_that_does_not_open_is_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    coder = Coder()
    stored = blob(coder, Point(1))
    monkeypatch.delitem(globals(), "Point")
    with pytest.raises(Undecodable, match="AttributeError"):
        coder.decode(stored, b"key")


@pytest.mark.parametrize(
    "value", [lambda: 1, (n for n in ()), Lock()], ids=["lambda", "generator", "lock"]
)
def test_what_cannot_be_pickled_is_named_without_its_content(value: Any) -> None:
    with pytest.raises(Unencodable, match=r"its result \(\w+\) cannot be pickled \(\w+\)"):
        Coder().encode(value, b"key")


def test_plain_never_pickles() -> None:
    with pytest.raises(Unencodable, match="Point"):
        Coder("plain").encode(Point(1), b"key")
    with pytest.raises(Undecodable):
        Coder("plain").decode(blob(Coder(), Point(1)), b"key")


class TestUsersCodec:
    def test_it_makes_and_reads_the_bytes(self) -> None:
        coder = Coder(Json())
        stored = blob(coder, {"a": [1]})
        assert stored.endswith(b'{"a": [1]}')
        assert coder.decode(stored, b"key") == {"a": [1]}

    def test_what_it_refuses_is_not_stored(self) -> None:
        with pytest.raises(Unencodable, match="cache_codec raised TypeError"):
            Coder(Json()).encode({1, 2}, b"key")

    def test_what_is_not_bytes_is_not_stored(self) -> None:
        codec = Json()
        codec.encode = json.dumps  # type: ignore[method-assign]
        with pytest.raises(Unencodable, match="cache_codec"):
            Coder(codec).encode(1, b"key")

    def test_it_never_sees_what_it_has_not_written(self) -> None:
        coder = Coder(Json())
        for stored in (blob(Coder(), 1), blob(coder, 1, b"another"), blob(coder, 1) + b" "):
            with pytest.raises(Undecodable):
                coder.decode(stored, b"key")
        with pytest.raises(Undecodable):
            Coder().decode(blob(coder, 1), b"key")

    def test_what_it_cannot_read_is_no_entry(self) -> None:
        coder = Coder(Json())
        stored = blob(coder, 1)
        coder._codec.decode = lambda data: 1 / 0  # type: ignore[union-attr]
        with pytest.raises(Undecodable, match="ZeroDivisionError"):
            coder.decode(stored, b"key")
