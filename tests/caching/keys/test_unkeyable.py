# this_file: tests/caching/keys/test_unkeyable.py
"""What has no key, and how that is reported."""

from __future__ import annotations

import dataclasses
import enum
import functools
import io
import socket
import struct
import sys
import threading
import types
import typing
import weakref
import zoneinfo
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pydantic
import pytest
from tests.caching.keys.entries import entry
from tests.tables import rows

from opero.errors import UnkeyableError


@dataclasses.dataclass
class Point:
    x: int
    y: int


@attrs.define
class Pair:
    left: int
    right: int
    memo: str = attrs.field(default="", eq=False)


class Model(pydantic.BaseModel):
    name: str
    tags: list[str] = []


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Plain:
    """Declares no content."""

    def method(self) -> None:
        """Do nothing."""

    @classmethod
    def build(cls) -> None:
        """Do nothing."""


def function() -> None:
    """Do nothing, importably."""


def nameless_module() -> Any:
    module = types.ModuleType("nowhere")
    del module.__name__
    return module


def of_unhashable_type() -> Any:
    return OfUnhashableType()


def distance_in(unit: str) -> type[Any]:
    @dataclasses.dataclass
    class Distance:
        value: int

        def __str__(self) -> str:
            return f"{self.value} {unit}"

    return Distance


def reason(value: Any) -> str:
    """Return why an argument has no key, without the ways out."""
    with pytest.raises(UnkeyableError) as caught:
        entry(value)
    text = str(caught.value)
    assert text.startswith("entry(): the argument 'value' cannot be part of a cache key: ")
    return text.partition("cache key: ")[2].partition(". Leave it out")[0]


def test_error_says_where_and_what_but_never_the_value() -> None:
    assert reason({"cfg": {"client": threading.Lock()}}) == (
        "value.cfg.client is _thread.lock, which has no content to build a key from"
    )


LOCK = threading.Lock()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ([1, (2, LOCK)], "[1][1]"),
        ([0] * 30 + [LOCK], "[30]"),
        ({"me@home.test": LOCK}, ".<str key>"),
        ({5: LOCK}, ".<int key>"),
        ({LOCK: 5}, ".<lock key>"),
        ({1, LOCK}, ".<element>"),
        (Point(1, LOCK), ".y"),  # type: ignore[arg-type]
        (Pair(1, LOCK), ".right"),
        (Model.model_construct(name=LOCK), ".name"),
        (OrderedDict(client=LOCK), ".client"),
        (deque([LOCK]), "[0]"),
        (defaultdict(lambda: 0), ".default_factory"),
        (functools.partial(print, LOCK), ".args[0]"),
        (functools.partial(lambda: 0), ".func"),
        (Plain().method, ".__self__"),
        (np.array([1, LOCK], dtype=object), "[2][1]"),
        (types.SimpleNamespace(a=LOCK), ".a"),
    ],
)
def test_path_leads_to_the_part_without_content(value: Any, path: str) -> None:
    assert reason(value).startswith(f"value{path} is ")


def make_local() -> Any:
    def local() -> None:
        """Be defined inside a function."""

    return local


class LocalMaker:
    class Nested:
        """Importable by its qualified name."""


class Slots:
    __slots__ = ("x",)


ZONE_FILE = b"TZif" + bytes(16) + struct.pack(">6L", 0, 0, 0, 0, 1, 4) + bytes(6) + b"UTC\0"

UNKEYABLE: dict[str, typing.Callable[[], Any]] = {
    "lambda": lambda: lambda: 0,
    "local function": make_local,
    "local class": lambda: distance_in("m"),
    "lock": threading.Lock,
    "thread": threading.Thread,
    "generator": lambda: (n for n in ()),
    "iterator": lambda: iter([1]),
    "zip": lambda: zip([1], [2], strict=True),
    "module without a place": lambda: types.ModuleType("nowhere"),
    "module without a name": nameless_module,
    "object": object,
    "plain instance": Plain,
    "slots instance": Slots,
    "weakref": lambda: weakref.ref(Plain),
    "weak proxy": lambda: weakref.proxy(function),
    "exception": lambda: ValueError("a"),
    "zone from a file": lambda: zoneinfo.ZoneInfo.from_file(io.BytesIO(ZONE_FILE)),
    "renamed function": lambda: types.FunctionType(function.__code__, {}, "function"),
    "frame": sys._getframe,
    "code": lambda: function.__code__,
    "numpy generator": lambda: np.random.default_rng(0),
    "of a type without a hash": of_unhashable_type,
    "raising": lambda: Raising(0),
    "released view": lambda: (view := memoryview(b"a"), view.release())[0],
}


REASONS: dict[str, str] = {
    "of a type without a hash": f"{__name__}.OfUnhashableType, which could not be read (TypeError)",
    "raising": f"{__name__}.Raising, which could not be read (OSError)",
    "iterator": "list_iterator, which has no content to build a key from",
    "module without a place": "module, which cannot be imported by its name",
    "module without a name": "module, which cannot be imported by its name",
    "zone from a file": "zoneinfo.ZoneInfo, which has no key: it was read from a file",
}


@rows("name", REASONS)
def test_the_error_names_the_type_and_the_reason(name: str) -> None:
    assert reason(UNKEYABLE[name]()) == REASONS[name]


@rows("make", UNKEYABLE.values())
def test_what_has_no_content_has_no_key(make: typing.Callable[[], Any]) -> None:
    value = make()
    assert not reason(value).startswith("value")
    assert reason({"deep": [value]})


def test_open_resources_have_no_key(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as file, socket.socket() as sock:
        for value in (file, sock):
            with pytest.raises(UnkeyableError):
                entry(value)


def test_a_nested_class_is_importable_by_its_qualified_name() -> None:
    assert entry(LocalMaker.Nested) != entry(LocalMaker)


def test_a_name_that_leads_elsewhere_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    original = function
    monkeypatch.setattr(sys.modules[__name__], "function", print)
    with pytest.raises(UnkeyableError, match="imported"):
        entry(original)


def test_a_bound_method_of_a_value_with_content_is_keyed_by_it() -> None:
    assert entry(Point(1, 2).__eq__) == entry(Point(1, 2).__eq__)
    assert entry(Colour.RED.__hash__) != entry(Colour.BLUE.__hash__)


def test_a_foreign_function_bound_by_hand_is_keyed_by_itself() -> None:
    bound = types.MethodType(function, Point(1, 2))
    assert entry(bound) != entry(types.MethodType(function, Point(1, 3)))
    with pytest.raises(UnkeyableError):
        entry(types.MethodType(lambda self: self, Point(1, 2)))


def test_an_impostor_bound_by_hand_has_no_key() -> None:
    def impostor(self: Point, other: object) -> bool:
        return self is other

    impostor.__name__ = "__eq__"
    with pytest.raises(UnkeyableError):
        entry(types.MethodType(impostor, Point(1, 2)))


def contains_itself(kind: str) -> Any:
    if kind == "list":
        box: list[Any] = []
        box.append(box)
        return box
    if kind == "dict":
        table: dict[Any, Any] = {}
        table["self"] = table
        return table
    if kind == "dict with int keys":
        numbered: dict[Any, Any] = {}
        numbered[1] = numbered
        return numbered
    if kind == "dataclass":
        point = Point(1, 2)
        point.y = point  # type: ignore[assignment]
        return point
    if kind == "array":
        holder = np.empty(1, dtype=object)
        holder[0] = holder
        return holder
    return functools.reduce(lambda inner, _: [inner], range(10_000), [])


@pytest.mark.parametrize(
    "kind", ["list", "dict", "dict with int keys", "dataclass", "array", "ten thousand lists"]
)
def test_endless_and_very_deep_values_have_no_key(kind: str) -> None:
    with pytest.raises(
        UnkeyableError,
        match=r"(list|dict|Point|tuple), which is nested deeper than 100 levels, or contains itself",
    ) as caught:
        entry(contains_itself(kind))
    assert len(str(caught.value)) < 500


def test_values_as_deep_as_allowed_have_a_key() -> None:
    deep = functools.reduce(lambda inner, _: {"k": [inner]}, range(49), 1)
    assert entry(deep)
    with pytest.raises(UnkeyableError):
        entry([deep])


def test_a_stack_that_is_almost_full_is_no_recursion_error() -> None:
    value = functools.reduce(lambda inner, _: [inner], range(50), [])
    keyable: list[bool] = []

    def fill() -> None:
        try:
            fill()
        except RecursionError:
            # Where not even `encode` can be called, its caller sees that itself and tries again.
            try:
                entry(value)
                keyable.append(True)
            except UnkeyableError:
                keyable.append(False)
            raise

    with pytest.raises(RecursionError):
        fill()
    assert set(keyable) == {True, False}


class Broken:
    """Raises whatever is asked of it, and claims to be a str."""

    @property
    def __class__(self) -> Any:
        return str

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __hash__(self) -> int:
        return 1

    def __len__(self) -> int:
        raise RuntimeError


class UnhashableType(type):
    def __eq__(cls, other: object) -> bool:
        return cls is other

    __hash__ = None  # type: ignore[assignment]


class OfUnhashableType(metaclass=UnhashableType):
    """Its class cannot be looked up in a table."""


@dataclasses.dataclass
class Raising:
    x: int = 0

    def __getattribute__(self, name: str) -> Any:
        raise OSError(name)


@pytest.mark.parametrize("make", [Broken, OfUnhashableType, Raising])
def test_hostile_objects_are_unkeyable(make: type[Any]) -> None:
    for value in (make(), ({"a": make()},)):
        with pytest.raises(UnkeyableError):
            entry(value)


def test_a_hostile_subclass_is_read_through_its_base() -> None:
    class Hostile(dict[str, int]):
        def __iter__(self) -> Any:
            raise RuntimeError

        keys = values = items = copy = __len__ = __getitem__ = __iter__  # type: ignore[assignment]

    assert entry(Hostile(a=1)) == entry(Hostile(a=1))
    assert entry(Hostile(a=1)) != entry(Hostile(a=2))


def test_interrupts_pass_through() -> None:
    @dataclasses.dataclass
    class Interrupting:
        x: int = 0

        def __getattribute__(self, name: str) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        entry(Interrupting())
