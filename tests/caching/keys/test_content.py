# this_file: tests/caching/keys/test_content.py
"""Which arguments share an entry of a cache, and which have one of their own."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import functools
import ipaddress
import math
import pathlib
import re
import struct
import sys
import types
import typing
import zoneinfo
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any, Literal, NamedTuple

import attrs
import numpy as np
import pandas as pd
import pydantic
from tests.caching.keys.entries import entry
from tests.tables import rows


@dataclasses.dataclass
class Point:
    x: int
    y: int


@dataclasses.dataclass
class Size:
    x: int
    y: int


@dataclasses.dataclass
class Noted:
    x: int
    note: str = dataclasses.field(default="", compare=False)


class Labelled(Point):
    """Adds an attribute without being a dataclass itself."""

    def __init__(self, x: int, y: int, label: str) -> None:
        super().__init__(x, y)
        self.label = label


@attrs.define
class Pair:
    left: int
    right: int
    memo: str = attrs.field(default="", eq=False)


class Model(pydantic.BaseModel):
    name: str
    tags: list[str] = []


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    name: str
    _seen: int = pydantic.PrivateAttr(default=0)


class Settings(pydantic.BaseModel):
    url: pydantic.HttpUrl
    secret: pydantic.SecretStr


class Row(NamedTuple):
    x: int
    y: int


class Cell(NamedTuple):
    x: int
    y: int


class Text(str):  # noqa: SLOT000 - the attributes are the point
    """A str with room for attributes."""


class Loud(str):
    """A str that lies about itself in every way it can."""

    __slots__ = ()

    def __str__(self) -> str:
        return "LOUD"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


class Slotted(list[int]):
    __slots__ = ("unit",)


class Listing(list[int]):
    """A list subclass."""


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Shade(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    A = "a"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Action(enum.Enum):
    UP = enum.member(lambda text: text.upper())
    DOWN = enum.member(lambda text: text.lower())


T = typing.TypeVar("T")
U = typing.TypeVar("U")


class Plain:
    """Declares no content."""

    def method(self) -> None:
        """Do nothing."""

    @classmethod
    def build(cls) -> None:
        """Do nothing."""


def function() -> None:
    """Do nothing, importably."""


def distance_in(unit: object) -> type[Any]:
    @dataclasses.dataclass
    class Distance:
        value: int

        def __str__(self) -> str:
            return f"{self.value} {unit}"

    return Distance


def weight_in(unit: str) -> type[Any]:
    class Weight(float):
        label = unit

    return Weight


def tally_in(seen: Any, note: str = "") -> type[Any]:
    class Tally(float):
        __doc__ = note
        values = seen

    return Tally


def described_in(unit: str, kind: Any) -> type[Any]:
    class Described(float):
        label = kind(lambda *_: unit)

    return Described


def late_in(unit: str) -> type[Any]:
    absent = unit

    class Late(float):
        def text(self) -> str:
            return absent + unit  # noqa: F821 - a cell that is empty is the point

    del absent
    return Late


def size_in(*numbers: int) -> Any:
    class Size(enum.Enum):
        SMALL = numbers

    return Size.SMALL


def price_in(rates: tuple[float, ...], rounding: Any) -> type[Any]:
    @dataclasses.dataclass(frozen=True)
    class Price:
        value: float
        allowed = rates

        def total(self) -> Any:
            return rounding(self.value * rates[0])

    return Price


class SecretZone(dt.tzinfo):
    """A zone whose rule cannot be seen in the offset of one moment."""

    def __init__(self, summer: int) -> None:
        self.summer = summer

    def utcoffset(self, moment: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(hours=self.summer if moment is not None and moment.month == 7 else 0)

    def tzname(self, _: dt.datetime | None) -> str:
        return "Local"

    dst = utcoffset


class Zone(dt.tzinfo):
    """A zone that no database knows, with one name for all its offsets."""

    def __init__(self, hours: int) -> None:
        self.hours = hours

    def utcoffset(self, _: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(hours=self.hours)

    def tzname(self, _: dt.datetime | None) -> str:
        return "Local"

    dst = utcoffset


def aware(hour: int, zone: dt.tzinfo, fold: int = 0) -> dt.datetime:
    return dt.datetime(2024, 10, 27, hour, 30, tzinfo=zone, fold=fold)


BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
ROME = zoneinfo.ZoneInfo("Europe/Rome")
NAN_WITH_PAYLOAD = struct.unpack("<d", bytes.fromhex("010000000000f8ff"))[0]


NEW_YEAR = dt.datetime(2024, 1, 1)  # noqa: DTZ001 - a time without a zone is a value too

ALL_DIFFERENT: dict[str, list[Any]] = {
    "byte order": [np.array([1.5, 2], ">f8"), np.array([1.5, 2], "<f8")],
    "byte order of fields": [np.array([(1, "a")], ">i4,>U1"), np.array([(1, "a")], "<i4,<U1")],
    "byte order of columns": [
        *(pd.DataFrame({"x": np.array([1, 2], order)}) for order in (">i4", "<i4"))
    ],
    "byte order of series": [pd.Series(np.array([1], ">f8")), pd.Series(np.array([1], "<f8"))],
    "byte order of dtypes": [np.dtype(">i4"), np.dtype("<i4")],
    "classes of a factory": [
        price_in((1.0, 2.0), math.floor)(3),
        price_in((1.5, 2.0), math.floor)(3),
        price_in((1.0, 2.0), math.ceil)(3),
    ],
    "rules of zones": [NEW_YEAR.replace(tzinfo=SecretZone(n)) for n in (1, 2)],
    "modules": [math, sys, "math", math.floor],
    "unions": [
        int | None,
        int | str,
        str | int,
        list[int | None],
        int,
        Literal["a"],
        Literal["b"],
    ],
    "ones": [
        1,
        True,
        1.0,
        "1",
        b"1",
        1 + 0j,
        decimal.Decimal(1),
        np.int64(1),
        np.float64(1),
        np.True_,
    ],
    "zeros": [
        0,
        False,
        0.0,
        -0.0,
        "",
        b"",
        None,
        0j,
        complex(0.0, -0.0),
        (),
        [],
        {},
        set(),
        frozenset(),
    ],
    "big ints": [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 2**70_000, 2**70_000 + 1],
    "text": ["a", "a\0", "\ud800", "é", "e\u0301", b"a", bytearray(b"a"), memoryview(b"a")],
    "views": [
        memoryview(b"abcdef"),
        memoryview(b"abcdef").cast("B", (2, 3)),
        memoryview(b"abcdef").cast("B", (3, 2)),
        memoryview(b"abcdef").cast("B", (6, 1)),
        memoryview(b"abcdef").cast("H"),
        memoryview(b"abcdef").cast("b"),
    ],
    "framing": [["a", "b"], ["ab"], ["a", ["b"]], [["a"], "b"], ["a", "b", ""], [["a", "b"]]],
    "sequences": [
        [1, 2],
        (1, 2),
        deque([1, 2]),
        deque([1, 2], 5),
        {1, 2},
        frozenset({1, 2}),
        [2, 1],
    ],
    "same numbers": [range(1, 3), array("i", [1, 2]), array("b", [1, 2]), slice(1, 2), Row(1, 2)],
    "mappings": [
        {"a": 1},
        OrderedDict(a=1),
        defaultdict(int, a=1),
        defaultdict(list, a=1),
        Counter(a=1),
        types.MappingProxyType({"a": 1}),
        types.SimpleNamespace(a=1),
        [("a", 1)],
    ],
    "ordered": [OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)],
    "dict keys": [{1: "x"}, {True: "x"}, {1.0: "x"}, {"1": "x"}, {None: "x"}, {(1,): "x"}],
    "swapped": [{"a": "b"}, {"b": "a"}, {"a": "b", "c": "d"}, {"a": "d", "c": "b"}],
    "packed": [
        list(range(20)),
        [*range(19), True],
        [float(n) for n in range(20)],
        tuple(range(20)),
    ],
    "packed text": [["a"] * 20, ["a"] * 19 + ["aa"], ["a"] * 18 + ["aa"], ["aa"] + ["a"] * 18],
    "packed zeros": [[0.0] * 20, [0.0] * 19 + [-0.0], [0.0] * 19 + [math.nan], [0] * 20],
    "subclasses": ["a", Text("a"), Loud("a"), Word.A],
    "overridden": [Loud("a"), Loud("b")],
    "lists": [[1], Listing([1]), Listing([2]), Listing()],
    "named tuples": [Row(1, 2), Cell(1, 2), (1, 2), Row(2, 1)],
    "enums": [Colour.RED, Colour.BLUE, Shade.RED, 1, Level.ONE, "RED"],
    "enums without plain values": [Action.UP, Action.DOWN],
    "flags": [Right.READ, Right.WRITE, Right.READ | Right.WRITE, Right(0)],
    "dataclasses": [Point(1, 2), Size(1, 2), Point(2, 1), {"x": 1, "y": 2}, Labelled(1, 2, "a")],
    "dataclass subclass": [Labelled(1, 2, "a"), Labelled(1, 2, "b"), Labelled(3, 2, "a")],
    "fields that are not set": [Model.model_construct(), Model.model_construct(name="a")],
    "classes of one factory": [distance_in("m")(1), distance_in("ft")(1)],
    "attributes of local classes": [weight_in("g")(1), weight_in("lb")(1), weight_in("g")(2)],
    **{
        f"what each {kind.__name__} closes over": [described_in(unit, kind)(1) for unit in "gt"]
        for kind in (property, classmethod, staticmethod)
    },
    "what methods close over beside an empty cell": [late_in(unit)(1) for unit in "gt"],
    "local enums": [size_in(1, 2), size_in(1, 3)],
    "dates of one factory": [distance_in(dt.date(2026, 1, day))(1) for day in (1, 2)],
    "attrs": [Pair(1, 2), Pair(2, 1), (1, 2)],
    "pydantic": [Model(name="a"), Model(name="a", tags=["b"]), {"name": "a", "tags": []}],
    "pydantic extras": [Open(name="a"), Open.model_validate({"name": "a", "extra": 1})],
    "settings": [
        Settings(url="http://a.test", secret="s"),
        Settings(url="http://a.test", secret="t"),
        Settings(url="http://b.test", secret="s"),
    ],
    "paths": [
        pathlib.PurePosixPath("a"),
        pathlib.PureWindowsPath("a"),
        Path("a"),
        pathlib.PurePosixPath("/a"),
        "a",
    ],
    "decimals": [
        decimal.Decimal(t) for t in ("1.0", "1.00", "-0", "0", "1E+1", "10", "NaN", "Infinity")
    ],
    "dates": [dt.date(2024, 1, 1), NEW_YEAR, pd.Timestamp(NEW_YEAR), dt.time(0)],
    "same instant": [
        aware(1, dt.UTC),
        aware(2, dt.timezone(dt.timedelta(hours=1))),
        aware(2, dt.timezone(dt.timedelta(hours=1), "CET")),
        aware(2, BERLIN, fold=1),
        aware(2, ROME, fold=1),
        aware(1, zoneinfo.ZoneInfo("UTC")),
    ],
    "fold": [aware(2, BERLIN), aware(2, BERLIN, fold=1), dt.time(2), dt.time(2, fold=1)],
    "offset": [aware(2, Zone(1)), aware(2, Zone(2))],
    "zones": [
        dt.UTC,
        BERLIN,
        ROME,
        dt.timezone(dt.timedelta(hours=1)),
        dt.timezone(dt.timedelta(hours=1), "CET"),
        "Europe/Berlin",
    ],
    "addresses": [
        *map(ipaddress.ip_address, ("10.0.0.0", "::10.0.0.0", "fe80::1", "fe80::1%eth0")),
        *map(ipaddress.ip_network, ("10.0.0.0/8", "10.0.0.0/9", "::/8")),
        *map(ipaddress.ip_interface, ("10.0.0.0/8", "10.0.0.1/8", "::1/8")),
        10 << 24,
    ],
    "patterns": [re.compile("a"), re.compile("a", re.IGNORECASE), re.compile(b"a")],
    "callables": [
        function,
        len,
        print,
        str.upper,
        str.lower,
        dict.fromkeys,
        Plain,
        Point,
        Plain.method,
        Plain.build,
        Point(1, 2).__eq__,
        Point(1, 3).__eq__,
        "a".upper,
        "b".upper,
        np.sin,
        np.mean,
        functools.partial(int),
        functools.partial(int, base=2),
        functools.partial(int, "2"),
    ],
    "hints": [
        list[int],
        list[str],
        list,
        typing.Optional[str],  # noqa: UP045 - the old spelling is a class of its own before 3.14
        int | None,
        typing.Literal[1],
        typing.Literal[True],
        typing.Annotated[int, "a"],
        typing.Annotated[int, "b"],
        typing.Any,
        T,
        U,
    ],
    "singletons": [None, ..., NotImplemented, "..."],
}


@rows("values", ALL_DIFFERENT.values())
def test_values_of_different_content_or_type_have_different_keys(values: list[Any]) -> None:
    assert len({entry(value) for value in values}) == len(values)


@rows("values", ALL_DIFFERENT.values())
@rows(
    "wrap",
    [lambda v: [v], lambda v: ({"k": v},), lambda v: Point(v, 0), lambda v: {1: [v]}],
)
def test_values_differ_at_every_depth(values: list[Any], wrap: Any) -> None:
    assert len({entry(wrap(value)) for value in values}) == len(values)


SAME: dict[str, tuple[Any, Any]] = {
    "dict order": ({"a": 1, "b": [2]}, {"b": [2], "a": 1}),
    "mixed dict order": ({1: "a", "1": "b", None: "c"}, {None: "c", "1": "b", 1: "a"}),
    "set order": ({0, 8}, {8, 0}),
    "mixed set order": ({1, "a", (2,)}, {(2,), "a", 1}),
    "counter order": (Counter("abb"), Counter("bba")),
    "nan": (math.nan, float("-nan")),
    "nan payload": ([math.nan], [NAN_WITH_PAYLOAD]),
    "nan in complex": (complex(math.nan, 1), complex(NAN_WITH_PAYLOAD, 1)),
    "nan keys": ({float("nan"): 1, float("nan"): 2}, {float("nan"): 2, float("nan"): 1}),
    "nan in arrays": (np.array([1, math.nan]), np.array([1, NAN_WITH_PAYLOAD])),
    "nan in complex arrays": (np.array([math.nan * 1j]), np.array([-math.nan * 1j])),
    "uncompared field": (Noted(1, "a"), Noted(1, "b")),
    "attrs eq=False": (Pair(1, 2, "a"), Pair(1, 2, "b")),
    "pydantic default": (Model(name="a"), Model(name="a", tags=[])),
    "one factory twice": (distance_in("m")(1), distance_in("m")(1)),
    "what grows in a factory": (distance_in(["m"])(1), distance_in(["ft"])(1)),
    "what changes in a factory": (distance_in(deque("m"))(1), distance_in(deque("f"))(1)),
    "lambdas in a factory": (distance_in(lambda: 0)(1), distance_in(lambda: 0)(1)),
    "what grows in a local class": (tally_in(["m"])(1), tally_in(["ft"])(1)),
    "notes of a local class": (tally_in("m", "one")(1), tally_in("m", "two")(1)),
    "path spelling": (Path("a//b/."), Path("a/b")),
    "strides": (np.arange(6).reshape(2, 3).T, np.array([[0, 3], [1, 4], [2, 5]])),
    "slices": (np.arange(10)[::-2], np.array([9, 7, 5, 3, 1])),
    "union and optional": (int | None, typing.Optional[int]),  # noqa: UP045 - the old spelling
    "read-only": (np.arange(3), np.frombuffer(np.arange(3).tobytes(), dtype=np.arange(3).dtype)),
    "noncontiguous view": (memoryview(b"abcdef")[::2], memoryview(memoryview(b"abcdef")[::2])),
}


@rows(("left", "right"), SAME.values())
def test_equal_content_has_one_key(left: Any, right: Any) -> None:
    assert entry(left) == entry(right)
    assert entry([left]) == entry([right])


def test_shared_parts_and_equal_copies_have_one_key() -> None:
    shared = ["a"]
    assert entry([shared, shared]) == entry([["a"], ["a"]])


def test_interned_and_fresh_strings_have_one_key() -> None:
    assert entry(["ab", "ab"]) == entry(["".join(iter("ab")), "xab"[1:]])


def test_attributes_of_a_builtin_subclass_count() -> None:
    left, right = Text("a"), Text("a")
    left.mark = 1  # type: ignore[attr-defined]
    assert entry(left) != entry(right)


def test_slots_of_a_builtin_subclass_count() -> None:
    left, right, empty = Slotted([1]), Slotted([1]), Slotted([1])
    left.unit, right.unit = "m", "ft"
    assert len({entry(value) for value in (left, right, empty)}) == 3


def test_private_attributes_of_a_model_count_as_in_its_equality() -> None:
    left, right = Open(name="a"), Open(name="a")
    right._seen = 1
    assert left != right
    assert entry(left) != entry(right)


def test_decimals_do_not_depend_on_the_context() -> None:
    value = decimal.Decimal("1E+30")
    before = entry(value)
    with decimal.localcontext() as context:
        context.capitals = 0
        assert entry(value) == before


def test_moving_an_item_of_an_ordered_dict_changes_its_key() -> None:
    ordered = OrderedDict(a=1, b=2)
    before = entry(ordered)
    ordered.move_to_end("a")
    assert entry(ordered) != before


def test_the_script_has_one_name_in_parent_and_spawned_worker() -> None:
    parent = type("Job", (Text,), {"__module__": "__main__"})
    worker = type("Job", (Text,), {"__module__": "__mp_main__"})
    assert entry(parent("a")) == entry(worker("a"))
