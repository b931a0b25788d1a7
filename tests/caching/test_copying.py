# this_file: tests/caching/test_copying.py
"""Isolation of results."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import io
import pathlib
import re
import threading
import types
import typing
import uuid
import zoneinfo
from collections import deque
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tables import rows

from opero.caching.copying import Uncopyable, freeze, isolated

pytestmark = pytest.mark.internal


class Colour(enum.Enum):
    RED = 1


class Point(typing.NamedTuple):
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Fixed:
    name: str
    at: Point | None = None


@dataclasses.dataclass
class Loose:
    name: str


@dataclasses.dataclass(frozen=True)
class Shell:
    items: list


class Text(str):  # noqa: SLOT000 - as users write them
    pass


def thawed(value):
    stored, copier = freeze(value)
    return stored if copier is None else copier(stored)


@rows(
    "value",
    [
        None, True, 3, 2.5, 1j, "text", b"bytes", ..., range(3), (1, ("a", b"b")),
        frozenset({1, (2, 3)}),
        datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC), datetime.date(2024, 5, 1),
        datetime.timedelta(1), zoneinfo.ZoneInfo("UTC"), decimal.Decimal("1.5"), uuid.UUID(int=1),
        pathlib.Path("a/b"), pathlib.PureWindowsPath("c"), Colour.RED, Point(1, 2), Fixed("a"),
        Fixed("b", Point(1, 2)),
        Text("t"), re.compile("x"), len, freeze, int, np.float64(1.5), (),
    ],
)  # fmt: skip
def test_immutable_values_are_shared_at_no_cost(value):
    stored, copier = freeze(value)
    assert stored is value
    assert copier is None


@rows(
    "value",
    [
        {"id": 1, "name": "x", "tags": ["a", "b"]},
        [],
        [[1], [2], [3]],
        [{"a": 1}, {"a": 2}],
        [{"a": [1]}, {"a": [2]}],
        {"a": {"b": {"c": [1, {2}]}}, "d": ([],)},
        ([1], 2),
        {1, 2},
        {True: [1], "x": [2]},
        {(1, 2): [3]},
        bytearray(b"x"),
        {"at": datetime.date(2024, 1, 1), "list": [1]},
        [Fixed("a"), [1]],
        collections.OrderedDict(a=[1]),
        collections.defaultdict(list, a=[1]),
        collections.Counter("aab"),
        collections.deque([[1]], maxlen=3),
        Loose("a"),
        Shell([1]),
        [Loose("a")],
        types.SimpleNamespace(a=[1]),
    ],
)
def test_mutable_values_are_copied_equal_and_of_the_same_types(value):
    stored, copier = freeze(value)
    one, two = copier(stored), copier(stored)
    assert one == two == value == stored
    assert len({id(v) for v in (one, two, value, stored)}) == 4
    assert mutables(one).isdisjoint(mutables(two) | mutables(value) | mutables(stored))
    assert [type(v) for v in walk(one)] == [type(v) for v in walk(value)]


def walk(value):
    yield value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(key)
            yield from walk(item)
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        for item in value:
            yield from walk(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for item in vars(value).values():
            yield from walk(item)


def mutables(value) -> set[int]:
    kinds = (dict, list, set, bytearray, collections.deque, Loose, types.SimpleNamespace)
    return {id(v) for v in walk(value) if isinstance(v, kinds)}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_survives_and_shares_no_container(value):
    one, two = thawed(value), thawed(value)
    assert repr(one) == repr(two) == repr(value)
    assert mutables(one).isdisjoint(mutables(value))
    assert mutables(one).isdisjoint(mutables(two))


def test_one_object_in_two_places_stays_one_object():
    inner = [1]
    copy = thawed({"a": inner, "b": inner})
    assert copy["a"] is copy["b"] is not inner


def test_data_that_contains_itself_is_copied():
    loop: list = []
    loop.append(loop)
    copy = thawed(loop)
    assert copy[0] is copy is not loop


def test_large_immutable_parts_are_shared_by_all_copies():
    text = "x" * 10_000
    assert thawed({"text": text, "n": [1]})["text"] is text


def test_a_cached_property_of_a_frozen_dataclass_makes_it_mutable():
    value = Fixed("a")
    value.__dict__["extra"] = []
    assert thawed(value) is not value
    assert thawed(value).extra is not value.extra


def test_an_instance_of_a_tuple_subclass_with_attributes_is_copied():
    class Tagged(tuple):  # noqa: SLOT001 - its attributes are the point
        pass

    value = Tagged((1, 2))
    value.tags = []
    assert thawed(value).tags is not value.tags


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.arange(9)[::2]],
    ids=["plain", "fortran", "view"],
)
def test_arrays_are_copied_with_their_layout(array):
    for value in (array, {"a": array}):
        copy = thawed(value)
        found = copy["a"] if isinstance(copy, dict) else copy
        assert np.array_equal(found, array)
        assert not np.shares_memory(found, array)
        assert found.dtype == array.dtype
        assert np.argsort(found.strides).tolist() == np.argsort(array.strides).tolist()


def test_lists_inside_object_arrays_are_isolated():
    array = np.array([[1], None], dtype=object)
    copy = thawed(array)
    copy[0].append(2)
    assert array[0] == [1]


def test_lists_inside_cells_of_a_frame_are_isolated():
    frame = pd.DataFrame({"n": [1, 2], "tags": [["a"], ["b"]]})
    copy = thawed(frame)
    pd.testing.assert_frame_equal(copy, frame)
    copy.loc[0, "tags"].append("x")
    copy.loc[0, "n"] = 9
    assert frame.loc[0, "tags"] == ["a"]
    assert isolated(frame).loc[0, "n"] == 1


async def _coroutine():
    return 1


def test_awaitables_are_refused():
    coroutine = _coroutine()
    for value in (coroutine, asyncio.Future(loop=(loop := asyncio.new_event_loop()))):
        with pytest.raises(Uncopyable, match="only once"):
            freeze(value)
    coroutine.close()
    loop.close()


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    "make",
    [lambda: (n for n in ()), lambda: iter([1]), lambda: map(str, []), io.StringIO, io.BytesIO],
    ids=["generator", "iterator", "map", "text file", "file"],
)
def test_what_can_be_used_once_is_refused_even_if_nothing_is_copied(make, copy):
    with pytest.raises(Uncopyable, match="only once"):
        freeze(make(), copy=copy)


def test_an_iterator_inside_plain_data_is_refused():
    with pytest.raises(Uncopyable, match="list_iterator"):
        freeze({"rows": iter([1])})


def test_what_cannot_be_copied_is_refused_without_showing_it():
    class Stubborn:
        def __deepcopy__(self, memo):
            raise ValueError("secret content")

    with pytest.raises(Uncopyable, match="a lock, cannot be copied"):
        freeze(threading.Lock())
    with pytest.raises(Uncopyable, match=r"a Stubborn, cannot be copied \(ValueError\)"):
        freeze(Stubborn())


def test_a_copy_of_another_type_is_refused():
    class Shifty:
        def __deepcopy__(self, memo):
            return "something else"

    with pytest.raises(Uncopyable, match="is a str"):
        freeze(Shifty())


def test_sharing_on_request_copies_nothing():
    value = {"a": [1]}
    assert freeze(value, copy=False) == (value, None)
    assert freeze(value, copy=False)[0] is value


@pytest.mark.parametrize("value", [[io.BytesIO()], {"rows": iter([1])}, (1, (n for n in ()))])
def test_sharing_on_request_is_refused_for_what_holds_an_iterator_or_file(value):
    with pytest.raises(Uncopyable, match="only once"):
        freeze(value, copy=False)


def test_records_of_one_shape_share_one_plan():
    from opero.caching.copying import _plan

    shapes: dict = {}
    _plan([{"id": n, "tags": [n]} for n in range(1000)], set(), shapes)
    assert len(shapes) == 2


# --- what is still open ---------------------------------------------------------------------------


@pytest.fixture
def unread() -> Any:
    """A function that returns a new response whose body has not been read."""
    httpx = pytest.importorskip("httpx")

    def answer(_: Any) -> Any:
        return httpx.Response(200, content=iter([b"ab", b"c"]))

    client = httpx.Client(transport=httpx.MockTransport(answer))
    return lambda: client.send(client.build_request("GET", "http://x"), stream=True)


class Holder:
    def __init__(self, part: Any) -> None:
        self.part = part


class SlotHolder:
    __slots__ = ("empty", "part")

    def __init__(self, part: Any) -> None:
        self.part = part


class Page(NamedTuple):
    number: int
    part: Any


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    "within",
    [
        lambda it: it,
        lambda it: [it],
        lambda it: {"a": (it,)},
        Holder,
        lambda it: Holder([Holder(it)]),
        lambda it: Page(1, it),
        SlotHolder,
        lambda it: deque([it]),
        lambda it: MappingProxyType({"a": it}),
        lambda it: functools.partial(print, it),
        lambda it: np.array([it, None], dtype=object),
    ],
    ids=[
        *("itself", "list", "dict", "attribute", "deep", "named tuple", "slot", "deque", "mapping"),
        *("partial", "array"),
    ],
)
def test_unread_response_is_refused(unread: Any, within: Any, copy: bool) -> None:
    with pytest.raises(Uncopyable, match="only once"):
        freeze(within(unread()), copy=copy)


def test_response_that_was_read_is_copied(unread: Any) -> None:
    response = unread()
    response.read()
    stored, copier = freeze(response)
    assert copier(stored).content == b"abc"


class Stream:
    """A stream of a class of its own, which leaves the stream out of its copies."""

    closed = False

    def read(self) -> bytes:
        return b""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Response:
    """A response that says how it is copied, as that of requests does."""

    def __init__(self) -> None:
        self.raw = Stream()

    def __getstate__(self) -> dict[str, Any]:
        return {"raw": None}


@pytest.mark.parametrize("make", [Stream, Response, lambda: Holder(Response())])
def test_open_stream_that_a_copy_would_leave_out_is_refused(make: Any) -> None:
    with pytest.raises(Uncopyable, match="only once"):
        freeze(make())


def test_closed_stream_and_bytes_in_memory_are_copied() -> None:
    stream = Stream()
    stream.closed = True
    assert freeze(stream)[1] is not None
    stored, copier = freeze(Holder(io.BytesIO(b"abc")))
    assert copier(stored).part.read() == b"abc" == copier(stored).part.read()
