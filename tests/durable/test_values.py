# this_file: tests/durable/test_values.py
"""Values in the journal keep value and type, or are refused by name."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import json
import math
import pathlib
import threading
import uuid
import zoneinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tables import rows

from opero.durable import register_type
from opero.durable.values import decode, encode
from opero.errors import UnserializableError

pytestmark = pytest.mark.internal


class Colour(enum.Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796 - an alias


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: tuple[int, ...] = ()


@dataclasses.dataclass
class Square:
    side: int

    def __post_init__(self) -> None:
        if self.side < 0:
            self.wrong = True

    @functools.cached_property
    def area(self) -> int:
        return self.side**2


@dataclasses.dataclass
class Checked:
    x: int

    def __post_init__(self) -> None:
        raise AssertionError("reading a value runs none of its code")


Pair = collections.namedtuple("Pair", "left right")  # noqa: PYI024 - the plain kind
ROME = zoneinfo.ZoneInfo("Europe/Rome")

VALUES = [
    None, True, 0, -1, 2**70, -(10**4000), 0.1, -0.0, math.inf, "", "é\ud800", b"\0\xff", bytearray(b"x"),
    (), (1, (2, [3])), [1, (2,)], {1, "a"}, frozenset({(1, 2)}), {}, {"a": [1]}, {"$": 1}, {1: "a", (2,): "b"},
    dt.date(2026, 2, 28), dt.time(1, 2, 3, 4), dt.timedelta(days=-1, microseconds=7),
    dt.datetime.fromisoformat("2026-01-01T01:01:01.000001"), dt.datetime(2026, 10, 25, 2, 30, tzinfo=ROME, fold=1),
    dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
    decimal.Decimal("1.10"), decimal.Decimal("NaN"), uuid.UUID(int=7), 1 + 2j, complex(-0.0, math.inf), range(1, 9, 2),
    pathlib.Path("a/b"), pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath("c:\\x"),
    Colour.RED, Rights.READ | Rights.WRITE, Rights(0), Point(1, (2, 3)), Pair(1, [2]),
]  # fmt: skip


def same(left: object, right: object) -> bool:
    return type(left) is type(right) and repr(left) == repr(right)


@rows("value", VALUES)
def test_value_and_type_come_back(value: object) -> None:
    assert same(decode(encode([value])), [value])


def test_not_a_number_comes_back() -> None:
    assert math.isnan(decode(encode(math.nan)))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(st.characters())
        | st.binary()
        | st.datetimes(timezones=st.none() | st.just(dt.UTC))
        | st.decimals(allow_nan=False)
        | st.uuids(),
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.text() | st.integers(), inner)
        ),
        max_leaves=20,
    )
)
def test_whatever_is_kept_comes_back(value: object) -> None:
    assert same(decode(encode(value)), value)


def test_the_journal_is_plain_json() -> None:
    json.loads(encode(VALUES), parse_constant=pytest.fail)


def test_order_of_a_dict_is_kept() -> None:
    assert list(decode(encode({"b": 1, "a": 2}))) == ["b", "a"]


class Strange(list):  # type: ignore[type-arg]
    pass


@dataclasses.dataclass
class Holder:
    inside: object


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (threading.Lock(), "result is a _thread.lock"),
        ({"a": [object()]}, "result['a'][0] is a builtins.object"),
        (Strange(), "Strange"),
        (Holder(object()), "result.inside is a builtins.object"),
        (dataclasses.make_dataclass("Local", ["x"])(1), "Local cannot be found by its name"),
        (print, "builtin_function_or_method"),
        (Square(-1), "Square with the attribute 'wrong' beside its fields"),
    ],
)
def test_what_cannot_be_kept_is_named(value: object, named: str) -> None:
    with pytest.raises(UnserializableError) as caught:
        encode(value, "result")
    assert named in str(caught.value)


def test_what_contains_itself_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(UnserializableError, match="contains itself"):
        encode(loop)


def test_a_cached_property_is_computed_again() -> None:
    square = Square(3)
    assert square.area == 9
    assert decode(encode(square)).area == 9


def test_reading_runs_no_code_of_the_class() -> None:
    made = object.__new__(Checked)
    made.x = 3
    assert decode(encode(made)).x == 3


def test_registered_types_come_back() -> None:
    class Celsius(complex):
        """A class that the journal does not know by itself."""

    register_type(Celsius, lambda value: value.real, Celsius)
    part = decode(encode({"part": Celsius(21.5)}))["part"]
    assert (type(part), part) == (Celsius, 21.5)


@pytest.mark.parametrize(
    "text",
    [
        '{"$": "data", "t": "gone.module:Point", "v": {}}',
        '{"$": "data", "t": "builtins:dict", "v": {}}',
        '{"$": "enum", "t": "os:system", "v": "x"}',
        '{"$": "type", "t": "gone:Type", "v": 1}',
    ],
)
def test_what_is_gone_is_named_and_nothing_else_is_made(text: str) -> None:
    with pytest.raises(UnserializableError):
        decode(text)
