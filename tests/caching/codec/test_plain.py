# this_file: tests/caching/codec/test_plain.py
"""Plain data comes back as it was, to the type and the bit, and nothing else is taken for plain."""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import fractions
import http
import ipaddress
import math
import pathlib
import re
import struct
import sys
import types
import uuid
import zoneinfo
from decimal import Decimal
from typing import Any, NamedTuple

import attrs
import msgpack
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.tables import rows

from opero.caching.codec import read_plain, write_plain
from opero.caching.keys import encode
from opero.caching.plain_types import NotPlain, Undecodable, make_instance

pytestmark = [pytest.mark.internal, pytest.mark.timeout(120)]


def back(value: Any) -> Any:
    message, buffers = write_plain(value)
    return read_plain(message, b"".join(buffers))


def same(one: Any, other: Any) -> bool:
    # Keys are equal exactly when content and types are, at every depth.
    return type(one) is type(other) and encode(one) == encode(other)


# fmt: off
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), st.floats(), st.binary(),
    st.text(st.characters()), st.text(st.characters(codec=None, categories=["Cs", "L"])), st.complex_numbers(),
    st.dates(), st.times(), st.timedeltas(), st.datetimes(timezones=st.none() | st.timezones()),
    st.decimals(allow_nan=False), st.fractions(), st.uuids(), st.ip_addresses(),
    st.just(...), st.just(NotImplemented),
)
# fmt: on
HASHABLE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=5,
)
VALUES = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=4) | st.binary().map(bytearray),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(collections.deque),
        st.dictionaries(HASHABLE, inner, max_size=4),
        st.dictionaries(HASHABLE, inner, max_size=4).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_written_is_read_with_its_types(value: Any) -> None:
    assert same(back(value), value)


# fmt: off
EXACT = [
    -0.0, math.inf, 2**63, 2**64, -(2**63) - 1, True, 1, "\ud800", b"\0" * 3, (), ((),), [()], {(): [()]},
    {1: {2: {3}}},
    {True: 1, "1": 2, b"1": 3, None: 4, (1, (2,)): 5, frozenset({1}): 6}, [bytearray(b"x"), b"x"],
    collections.Counter("hello"), collections.deque([1], maxlen=3), collections.OrderedDict(b=1, a=2),
    range(1, 10, 3), slice(1, None, "x"), Decimal("sNaN12"), Decimal("-0E+3"), fractions.Fraction(1, 3),
    dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    dt.timezone(dt.timedelta(hours=-3), "BRT"), dt.UTC, zoneinfo.ZoneInfo("Asia/Tokyo"),
    ipaddress.ip_network("2001:db8::/32"), ipaddress.ip_interface("fe80::1%eth0/64"),
    pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("C:\\x"), pathlib.Path("~/x"), uuid.UUID(int=5),
    np.float64(1.5), np.int8(-1), np.bool_(True), np.str_("x"), np.bytes_(b"x"), np.datetime64("2026-01-01", "D"),
    np.timedelta64("NaT", "ns"), [np.float32(2)], {np.int64(1): 2},
    np.arange(6, dtype=">i2").reshape(2, 3), np.array(5), np.zeros((0, 3)), np.array(["a", "bcd"]), np.array([b"a"]),
    np.array(["2026-01-01", "NaT"], "M8[s]"), np.array([True]), {"array": np.ones(3), "list": [np.zeros(2)]},
]
# fmt: on


@rows("value", EXACT)
def test_every_plain_type_comes_back(value: Any) -> None:
    assert same(back(value), value)


@given(
    hnp.arrays(
        st.sampled_from(["?", "i1", "<u8", ">f4", "c16", "M8[ms]", "U3", "S2"]),
        hnp.array_shapes(min_side=0),
    )
)
def test_arrays_come_back_bit_by_bit(array: Any) -> None:
    made = back(array)
    assert (made.dtype.str, made.shape, made.tobytes()) == (
        array.dtype.str,
        array.shape,
        array.tobytes(),
    )


def test_the_bits_of_a_nan_stay() -> None:
    odd = struct.unpack("<d", bytes.fromhex("010000000000f8ff"))[0]
    assert struct.pack("<d", back([odd])[0]).hex() == "010000000000f8ff"


def test_arrays_can_be_written_to_and_keep_their_layout() -> None:
    columns = back(np.asfortranarray(np.ones((2, 3))))
    columns[0, 0] = 5
    assert columns.flags.f_contiguous
    assert not columns.flags.c_contiguous
    assert back(np.arange(10)[::2]).tolist() == [0, 2, 4, 6, 8]


def test_order_of_keys_stays() -> None:
    assert list(back({"b": 1, "a": (), "c": 2})) == ["b", "a", "c"]


def test_large_buffers_stand_behind_the_message() -> None:
    value = {"image": b"x" * 100_000, "vector": np.ones(10_000), "note": (b"y" * 20_000,)}
    message, buffers = write_plain(value)
    assert len(message) < 200
    assert buffers[0] is value["image"]
    assert same(read_plain(message, b"".join(buffers)), value)


class Text(str):
    __slots__ = ()


Dict = type("Dict", (dict,), {})
Float = type("Float", (float,), {})
Date = type("Date", (dt.date,), {})
Impostor = type("date", (), {"__module__": "datetime"})
itself: list[Any] = []
itself.append(itself)
deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]


class Colour(enum.IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Order:
    item: str
    tags: list[Any] = dataclasses.field(default_factory=list)
    total: Decimal = Decimal(0)


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    name: str
    at: Point


@attrs.define(slots=False)
class City:
    name: str
    people: int = 0


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Links(pydantic.BaseModel):
    home: pydantic.HttpUrl
    other: pydantic.AnyUrl
    seen: dt.datetime


class Root(pydantic.RootModel[list[Links]]):
    pass


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    id: uuid.UUID
    order: Order | None = None
    parts: list[Model] = []
    hidden: int = pydantic.Field(default=0, exclude=True)
    _seen: int = pydantic.PrivateAttr(default=0)


model = Model(
    id=uuid.UUID(int=1),
    order=Order("a", ["b"]),
    parts=[Model(id=uuid.UUID(int=2), more=(1,))],
    hidden=5,
)
model._seen = 7

OBJECTS = [
    Colour.RED,
    http.HTTPMethod.GET,
    Rights.READ,
    Rights.READ | Rights.WRITE,
    Point(1, 2),
    Order("a", [1], Decimal(2)),
    Place("b", Point(3, 4)),
    [Place("c", Point(5, 6))] * 2,
    {Place("d", Point(7, 8)): Colour.RED},
    model,
    City("Rome", 3),
    Root([Links(home="https://x.y", other="ftp://a/b?c", seen="2026-01-02T03:04:05.6+05:30")]),
]


@pytest.mark.parametrize("value", OBJECTS, ids=repr)
def test_objects_come_back_field_by_field(value: Any) -> None:
    made = back(value)
    assert type(made) is type(value)
    assert made == value
    assert back(made) == value


def test_a_model_comes_back_with_what_is_beside_its_fields() -> None:
    made = back(model)
    assert made._seen == 7
    assert made.hidden == 5
    assert made.parts[0].more == (1,)
    assert made.model_fields_set == model.model_fields_set
    assert type(made.order) is Order


def test_a_field_that_is_newer_than_the_entry_has_its_default() -> None:
    head = [msgpack.ExtType(61, b""), f"{__name__}:Order"]
    assert read_plain(msgpack.packb([*head, {"item": "x"}]), b"") == Order("x", [], Decimal(0))
    for fields in ({}, {"item": "x", "colour": 1}):
        with pytest.raises(Undecodable, match=r"field"):
            read_plain(msgpack.packb([*head, fields]), b"")


def test_a_field_of_a_model_that_is_newer_than_the_entry_has_its_default() -> None:
    class Grown(pydantic.BaseModel):
        size: int
        unit: str = "m"
        notes: list[str] = pydantic.Field(default_factory=list)

    made = make_instance(Grown, {"size": 1}, Grown.__pydantic_fields__)
    assert vars(made) == {"size": 1, "unit": "m", "notes": []}


def test_no_module_is_imported_for_an_object() -> None:
    for name, why in (
        ("turtle:Turtle", "not loaded"),
        ("os:Gone", "any more"),
        ("os:path.join", "any more"),
    ):
        message = msgpack.packb([msgpack.ExtType(61, b""), name, {}])
        with pytest.raises(Undecodable, match=why):
            read_plain(message, b"")
    assert "turtle" not in sys.modules
    with pytest.raises(Undecodable, match="no dataclass"):
        read_plain(msgpack.packb([msgpack.ExtType(61, b""), "pathlib:PurePath", {}]), b"")


class OwnWays(Order):
    def __reduce__(self) -> Any:
        return Order, ("x",)


@dataclasses.dataclass
class Ended:
    path: str

    def __del__(self) -> None: ...


@dataclasses.dataclass
class Slotted:
    __slots__ = ("path", "size")
    path: str


class Unset(pydantic.BaseModel):
    path: str
    size: int = 1


def slotted() -> Slotted:
    made = Slotted("x")
    made.size = 1
    return made


def unset() -> Unset:
    made = Unset(path="x", size=2)
    del made.size
    return made


def extra() -> Order:
    order = Order("x")
    order.more = 1  # type: ignore[attr-defined]
    return order


# fmt: off
NOT_PLAIN = [
    OwnWays("x"), Ended("x"), extra(), slotted(), unset(), Unset.model_construct(),
    dataclasses.make_dataclass("Local", ["a"])(1),
    object(), int, len, ValueError("x"), memoryview(b"x"), Text("x"), re.compile("x"), types.SimpleNamespace(a=1),
    Dict(a=1), Float(1), Date(2026, 1, 1), Impostor(), msgpack.ExtType(1, b""), msgpack.Timestamp(1),
    collections.UserDict(a=1),
    collections.defaultdict(list), dt.datetime(2026, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})()), itself, deep,
    np.array([None]), np.zeros(1, "i4,f4"), np.ma.array([1]), np.zeros(1, "g"), np.longdouble(1),
    np.zeros(1, np.dtype("i4", metadata={"a": 1})),
]
# fmt: on


@rows("wrap", [lambda v: v, lambda v: [v], lambda v: {"a": v}, lambda v: (1, v)])
@rows("value", NOT_PLAIN)
def test_everything_else_is_not_plain(value: Any, wrap: Any) -> None:
    with pytest.raises(NotPlain):
        write_plain(wrap(value))


def read_hostile(message: bytes, behind: bytes) -> None:
    """Read what another program wrote: plain data, or an error of whatever kind."""
    try:
        value = read_plain(message, behind)
    except Exception:  # noqa: BLE001 - as `read_plain` says
        return
    write_plain(value)


@given(st.binary(max_size=60), st.binary(max_size=5))
def test_garbage_is_plain_data_or_an_error(message: bytes, behind: bytes) -> None:
    read_hostile(message, behind)


@given(VALUES, st.data())
def test_a_changed_message_is_plain_data_or_an_error(value: Any, data: Any) -> None:
    message = bytearray(write_plain(value)[0])
    place = data.draw(st.integers(0, len(message) - 1))
    message[place] ^= data.draw(st.integers(1, 255))
    read_hostile(bytes(message), b"")


FORGED: dict[str, Any] = {
    "objects instead of numbers": [msgpack.ExtType(50, b""), "|O", [1], False, 0, 8],
    "a dtype of fields": [msgpack.ExtType(50, b""), "i4,f4", [1], False, 0, 8],
    "more than there is": [msgpack.ExtType(50, b""), "<f8", [10**9], False, 0, 8],
    "a buffer elsewhere": [msgpack.ExtType(0, b""), 5, 100],
    "a mark of nothing": [msgpack.ExtType(49, b"")],
    "a mark within": [1, msgpack.ExtType(1, b"")],
    "a mark alone": msgpack.ExtType(1, b""),
    "a mark that holds something": [msgpack.ExtType(1, b"x"), 1],
    "a key that cannot be one": {"a": 1},
    "a bytearray of a number": [msgpack.ExtType(6, b""), 2_000_000_000],
    "a deque of a range": [msgpack.ExtType(11, b""), [msgpack.ExtType(7, b""), 0, 10**12, 1], 0],
    "a dict of pairs": [msgpack.ExtType(12, b""), [[1, 2]]],
    "a date of texts": [msgpack.ExtType(22, b""), "2026", 1, 1],
    "a shape of texts": [msgpack.ExtType(50, b""), "<f8", ["1"], False, 0, 8],
    "a shape below zero": [msgpack.ExtType(50, b""), "<f8", [-1, -1], False, 0, 8],
    "one buffer for two": [[msgpack.ExtType(0, b""), 0, 8], [msgpack.ExtType(0, b""), 0, 8]],
    "a form of a class": [msgpack.ExtType(60, b""), "os:environ", None, None],
    "a zone by path": [msgpack.ExtType(25, b""), "../../etc/passwd"],
}


@pytest.mark.parametrize("what", FORGED)
def test_forged_messages_are_refused(what: str) -> None:
    message = b"\x81\x90\x01" if what == "a key that cannot be one" else msgpack.packb(FORGED[what])
    with pytest.raises(Exception):  # noqa: B017, PT011 - of whatever kind, as documented
        read_plain(message, b"12345678")


def test_numpy_is_not_imported_for_data_without_arrays() -> None:
    import subprocess

    code = (
        "import sys; from opero.caching.codec import Coder; c = Coder();"
        "c.decode(b''.join(c.encode({'a': (1,)}, b'k')), b'k');"
        "print([m for m in ('numpy', 'pickle', 'hmac', 'uuid', 'platformdirs') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
