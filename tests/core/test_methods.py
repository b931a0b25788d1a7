# this_file: tests/core/test_methods.py
"""Decorated functions in class bodies: bound like methods, in any class, in any order of decorators."""

from __future__ import annotations

import abc
import asyncio
import copy
import dataclasses
import enum
import functools
import inspect
import pickle
import pydoc
import sys
import typing
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable
from unittest import mock

import attrs
import pydantic
import pytest

from opero import opero
from opero.errors import OperoUsageError
from opero.testing import flaky

quick = opero(cache=False, min_delay=0)

before_313 = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="class methods ask what is inside no more"
)
from_313 = pytest.mark.skipif(sys.version_info < (3, 13), reason="class methods ask what is inside")


class Client:
    """Has every kind of method."""

    def __init__(self, name: str = "a") -> None:
        self.name = name

    @quick
    def fetch(self, x: int, *, y: int = 0) -> tuple[str, int, int]:
        """Fetch it."""
        return self.name, x, y

    @quick
    async def afetch(self, x: int) -> tuple[str, int]:
        return self.name, x

    @quick
    def stream(self, n: int) -> Iterator[str]:
        yield from [self.name] * n

    @quick
    async def astream(self, n: int) -> AsyncIterator[str]:
        for _ in range(n):
            yield self.name

    @quick
    @classmethod
    def make(cls, name: str = "made") -> Client:
        """Make it."""
        return cls(name)

    @classmethod
    @quick
    def make_outside(cls, name: str = "made") -> Client:
        """Make it."""
        return cls(name)

    @quick
    @staticmethod
    def double(x: int) -> int:
        """Double it."""
        return 2 * x

    @staticmethod
    @quick
    def double_outside(x: int) -> int:
        """Double it."""
        return 2 * x

    @quick
    @classmethod
    async def amake(cls) -> Client:
        return cls("async")

    @quick
    @staticmethod
    async def adouble(x: int) -> int:
        return 2 * x

    @property
    @quick
    def title(self) -> str:
        """Title."""
        return self.name.title()

    @functools.cached_property
    @quick
    def heavy(self) -> list[str]:
        return [self.name]

    twice = functools.partialmethod(fetch, 2)

    again = fetch.with_options(retries=0)


class Sub(Client):
    @quick
    def fetch(self, x: int, *, y: int = 0) -> tuple[str, int, int]:
        name, x, y = super().fetch(x, y=y)
        return name + "!", x, y


client = Client("c")
CLASS_METHODS = ["make", "make_outside"]
STATIC_METHODS = ["double", "double_outside"]


# --- binding --------------------------------------------------------------------------------------


def test_a_method_sees_its_instance() -> None:
    assert client.fetch(1, y=2) == ("c", 1, 2)


def test_the_class_gives_the_plain_function() -> None:
    assert inspect.isfunction(Client.fetch)
    assert Client.fetch(client, 1) == ("c", 1, 0)


def test_an_async_method_sees_its_instance() -> None:
    assert asyncio.run(client.afetch(1)) == ("c", 1)


def test_generators_see_their_instance() -> None:
    async def collected() -> list[str]:
        return [item async for item in client.astream(2)]

    assert list(client.stream(2)) == ["c", "c"]
    assert asyncio.run(collected()) == ["c", "c"]


@pytest.mark.parametrize("name", CLASS_METHODS)
@pytest.mark.parametrize("owner", [Client, Sub, client, Sub()])
def test_a_class_method_sees_the_class_it_is_asked_of(name: str, owner: Any) -> None:
    cls = owner if isinstance(owner, type) else type(owner)
    assert type(getattr(owner, name)("x")) is cls
    assert getattr(owner, name)("x").name == "x"


@pytest.mark.parametrize("name", STATIC_METHODS)
@pytest.mark.parametrize("owner", [Client, client])
def test_a_static_method_sees_no_instance(name: str, owner: Any) -> None:
    assert getattr(owner, name)(4) == 8
    assert getattr(owner, name).call(4).value == 8


def test_async_class_and_static_methods_are_awaited() -> None:
    assert asyncio.run(Client.amake()).name == "async"
    assert asyncio.run(client.adouble(4)) == 8


def test_super_reaches_the_method_of_the_base_class() -> None:
    assert Sub("s").fetch(1) == ("s!", 1, 0)


def test_a_property_may_stand_above() -> None:
    assert client.title == "C"
    assert Client.title.__doc__ == "Title."


def test_a_cached_property_may_stand_above() -> None:
    assert client.heavy is client.heavy


def test_a_partial_method_may_be_made_of_it() -> None:
    assert client.twice(y=5) == ("c", 2, 5)  # type: ignore[call-arg]


def test_a_property_below_is_refused_with_the_fix() -> None:
    with pytest.raises(OperoUsageError, match="write @property above @opero"):
        opero(property(lambda self: 1))  # type: ignore[arg-type]


def test_a_method_from_a_local_class_is_one_too() -> None:
    class Local:
        @quick
        def fetch(self) -> Local:
            return self

    local = Local()
    assert local.fetch() is local
    assert local.fetch.call().value is local


def test_a_method_put_into_a_class_later_binds_too() -> None:
    class Later:
        pass

    def fetch(self: Any) -> Any:
        return self

    Later.fetch = quick(fetch)  # type: ignore[attr-defined]
    later = Later()
    assert later.fetch() is later  # type: ignore[attr-defined]


# --- opero's own attributes -----------------------------------------------------------------------


def test_call_sees_the_instance() -> None:
    assert client.fetch.call(1, y=2).value == ("c", 1, 2)
    assert Client.fetch.call(client, 1).value == ("c", 1, 0)
    assert asyncio.run(client.afetch.call(1)).value == ("c", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("owner", [Client, Sub, client])
def test_call_of_a_class_method_sees_the_class(owner: Any) -> None:
    assert owner.make.call("x").value.name == "x"


@before_313
def test_call_of_a_class_method_from_outside_sees_the_class() -> None:
    assert Client.make_outside.call("x").value.name == "x"


@from_313
def test_call_of_a_class_method_from_outside_names_the_order_that_works() -> None:
    assert not hasattr(Client.make_outside, "call")
    with pytest.raises(AttributeError, match="write @opero above @classmethod"):
        Client.make_outside.call  # noqa: B018 - what is tested


@pytest.mark.parametrize("name", ["fetch", "afetch", *CLASS_METHODS, *STATIC_METHODS])
@pytest.mark.parametrize("owner", [Client, client])
def test_explain_stats_and_options_are_the_functions(name: str, owner: Any) -> None:
    method = getattr(owner, name)
    assert str(method.explain()).startswith(f"{name}(")
    assert method.stats is getattr(Client, name).stats
    assert method.options.cache is False


@pytest.mark.parametrize("name", ["fetch", "make"])
def test_with_options_stays_bound(name: str) -> None:
    other = getattr(client, name).with_options(retries=7)
    assert other.options.retries == 7
    assert type(other) is type(getattr(client, name))
    result = other("x")
    assert result == ("c", "x", 0) if name == "fetch" else result.name == "x"


def test_a_method_made_with_other_options_in_the_class_body_is_a_method() -> None:
    assert client.again(1) == ("c", 1, 0)
    assert client.again.call(1).value == ("c", 1, 0)
    assert client.again.options.retries == 0


def test_the_cache_of_a_method_knows_the_instance() -> None:
    class Counter:
        def __init__(self) -> None:
            self.calls = 0

        @opero
        def next(self, x: int) -> int:
            self.calls += 1
            return self.calls

    one, two = Counter(), Counter()
    assert (one.next(1), one.next(1), two.next(1)) == (1, 1, 1)
    assert one.next.cache.invalidate(1)
    assert not one.next.cache.invalidate(1)
    assert (one.next(1), two.next(1)) == (2, 1)
    assert one.next.cache.refresh(1) == 3
    assert one.next(1) == 3
    assert one.next.cache.info().size == 2
    assert repr(one.next.cache) == repr(Counter.next.cache)
    assert one.next.cache.clear() == 2


def test_instances_do_not_share_cached_results() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        @opero
        def hello(self) -> str:
            return self.name

    assert [Named(n).hello() for n in "abcabc"] == list("abcabc")


def test_an_instance_is_not_kept_alive() -> None:
    class Freed:
        @opero
        def fetch(self, x: int) -> int:
            return x

    freed = Freed()
    freed.fetch(1)
    gone = weakref.ref(freed)
    del freed
    assert gone() is None


# --- what a bound method is -----------------------------------------------------------------------


def test_bound_methods_are_equal_if_function_and_instance_are() -> None:
    assert client.fetch == client.fetch
    assert hash(client.fetch) == hash(client.fetch)
    assert client.fetch != Client("c").fetch
    assert client.fetch != client.afetch
    assert client.fetch != Client.fetch
    assert client.fetch != 5
    assert len({client.fetch, client.fetch, client.again}) == 2


def test_its_repr_is_that_of_a_method() -> None:
    class Shown:
        def __repr__(self) -> str:
            return "<shown>"

        @quick
        def fetch(self) -> None: ...

    assert repr(Shown().fetch).endswith("Shown.fetch of <shown>>")
    assert repr(Shown().fetch).startswith("<bound method ")


def test_it_is_a_method_to_inspect() -> None:
    assert inspect.ismethod(client.fetch)
    assert inspect.isroutine(client.fetch)
    assert client.fetch.__self__ is client
    assert client.fetch.__func__ is Client.fetch
    assert Client.make.__self__ is Client


@pytest.mark.parametrize(
    ("name", "of_class", "of_instance"),
    [
        ("fetch", "(self, x: 'int', *, y: 'int' = 0)", "(x: 'int', *, y: 'int' = 0)"),
        ("afetch", "(self, x: 'int')", "(x: 'int')"),
        ("make", "(name: 'str' = 'made')", "(name: 'str' = 'made')"),
        ("make_outside", "(name: 'str' = 'made')", "(name: 'str' = 'made')"),
        ("double", "(x: 'int')", "(x: 'int')"),
        ("double_outside", "(x: 'int')", "(x: 'int')"),
    ],
)
def test_the_signature_is_without_what_is_bound(name: str, of_class: str, of_instance: str) -> None:
    shown = [
        str(inspect.signature(getattr(owner, name))).split(" -> ")[0] for owner in (Client, client)
    ]
    assert shown == [of_class, of_instance]


@pytest.mark.parametrize("owner", [Client, client])
@pytest.mark.parametrize(
    ("name", "doc"),
    [("fetch", "Fetch it."), *((n, "Make it.") for n in CLASS_METHODS)]
    + [(n, "Double it.") for n in STATIC_METHODS],
)
def test_names_docs_hints_and_source_are_the_functions(owner: Any, name: str, doc: str) -> None:
    method = getattr(owner, name)
    assert method.__doc__ == inspect.getdoc(method) == doc
    assert method.__name__ == name
    assert method.__qualname__ == f"Client.{name}"
    assert method.__module__ == __name__
    assert f"def {name}(" in inspect.getsource(method)
    assert "return" in typing.get_type_hints(method)


@pytest.mark.parametrize("owner", [Client, client])
@pytest.mark.parametrize("name", ["afetch", "amake", "adouble"])
def test_a_coroutine_function_is_one_wherever_it_is_asked(owner: Any, name: str) -> None:
    assert inspect.iscoroutinefunction(getattr(owner, name))


@pytest.mark.parametrize("owner", [Client, client])
@pytest.mark.parametrize("name", ["fetch", *CLASS_METHODS, *STATIC_METHODS])
def test_a_plain_function_is_none(owner: Any, name: str) -> None:
    method = getattr(owner, name)
    assert not inspect.iscoroutinefunction(method)
    assert not inspect.isgeneratorfunction(method)


@pytest.mark.parametrize("owner", [Client, client])
def test_generator_functions_are_some_wherever_they_are_asked(owner: Any) -> None:
    assert inspect.isgeneratorfunction(owner.stream)
    assert inspect.isasyncgenfunction(owner.astream)


def test_help_shows_the_users_docs() -> None:
    text = pydoc.render_doc(Client, renderer=pydoc.plaintext)
    assert "Fetch it." in text
    assert "fetch(self, x: 'int', *, y: 'int' = 0)" in text
    assert "opero" not in text


def test_it_pickles_by_name() -> None:
    again = pickle.loads(pickle.dumps(client.fetch))
    assert again(1) == ("c", 1, 0)
    assert again.__func__ is Client.fetch
    assert pickle.loads(pickle.dumps(Client.fetch)) is Client.fetch
    assert pickle.loads(pickle.dumps(Client.make))("p").name == "p"
    assert pickle.loads(pickle.dumps(Client.double_outside))(2) == 4


def test_a_method_of_the_base_class_pickles_as_such() -> None:
    of_base = super(Sub, Sub("s")).fetch
    assert pickle.loads(pickle.dumps(of_base))(1) == ("s", 1, 0)


def test_a_method_with_other_options_does_not_pickle_as_the_original() -> None:
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(client.fetch.with_options(retries=7))


def test_a_deep_copy_is_bound_to_the_copied_instance() -> None:
    copied_client, copied_method = copy.deepcopy([client, client.fetch])  # type: ignore[misc]
    assert copied_method.__self__ is copied_client is not client


def test_a_weak_method_reaches_it_while_the_instance_lives() -> None:
    owner = Client("w")
    weak = weakref.WeakMethod(owner.fetch)  # type: ignore[arg-type]
    method = weak()
    assert method is not None
    assert method(1) == ("w", 1, 0)
    del method, owner
    assert weak() is None


# --- mocks ----------------------------------------------------------------------------------------


def test_a_method_can_be_patched_and_comes_back() -> None:
    before = vars(Client)["fetch"]
    with mock.patch.object(Client, "fetch", return_value=5):
        assert client.fetch(1) == 5
    assert vars(Client)["fetch"] is before


def test_a_method_can_be_patched_with_its_signature() -> None:
    with mock.patch.object(Client, "fetch", autospec=True, return_value=5) as fake:
        assert client.fetch(1) == 5
        with pytest.raises(TypeError):
            client.fetch(1, 2, 3)  # type: ignore[call-arg]
    fake.assert_called_once_with(client, 1)


def test_a_class_can_be_specified_automatically() -> None:
    fake = mock.create_autospec(Client)
    fake().fetch(1, y=2)
    fake().fetch.assert_called_once_with(1, y=2)
    with pytest.raises(TypeError):
        fake().fetch()


# --- classes of all sorts -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["above", "below"])
def test_an_abstract_method_stays_abstract_down_the_line(order: str) -> None:
    def fetch(self: object) -> int: ...

    fetch.__qualname__ = "Base.fetch"
    made = (
        abc.abstractmethod(quick(fetch)) if order == "above" else quick(abc.abstractmethod(fetch))
    )
    base = abc.ABCMeta("Base", (), {"fetch": made})
    middle = abc.ABCMeta("Middle", (base,), {})
    leaf = abc.ABCMeta("Leaf", (middle,), {"fetch": quick(lambda self: 1)})
    for abstract in (base, middle):
        with pytest.raises(TypeError, match="abstract"):
            abstract()
    assert leaf().fetch() == 1


def test_abstract_class_and_static_methods_stay_abstract() -> None:
    class Base(abc.ABC):
        @quick
        @classmethod
        @abc.abstractmethod
        def make(cls) -> Base: ...

        @quick
        @staticmethod
        @abc.abstractmethod
        def double(x: int) -> int: ...

    assert Base.__abstractmethods__ == {"make", "double"}


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    scale: ClassVar[int] = 2

    @opero(min_delay=0)
    def scaled(self, by: int) -> int:
        return self.x * by


@dataclasses.dataclass(slots=True)
class Slotted:
    x: int

    @quick
    def scaled(self, by: int) -> int:
        return self.x * by


@attrs.define
class Defined:
    x: int

    @quick
    def scaled(self, by: int) -> int:
        return self.x * by


class Pair(NamedTuple):
    x: int

    @quick
    def scaled(self, by: int) -> int:
        return self.x * by


class Model(pydantic.BaseModel):
    x: int

    @quick
    def scaled(self, by: int) -> int:
        return self.x * by

    @quick
    @classmethod
    def make(cls) -> Model:
        return cls(x=1)

    @classmethod
    @quick
    def make_outside(cls) -> Model:
        return cls(x=1)

    @quick
    @staticmethod
    def double(x: int) -> int:
        return 2 * x


@pytest.mark.parametrize("cls", [Point, Slotted, Defined, Pair, Model])
def test_a_class_with_fields_may_have_decorated_methods(cls: Any) -> None:
    made = cls(x=3)
    assert made.scaled(2) == 6
    assert made.scaled.call(by=3).value == 9


def test_methods_are_no_fields() -> None:
    assert [f.name for f in dataclasses.fields(Point)] == ["x"]
    assert [f.name for f in attrs.fields(Defined)] == ["x"]
    assert Pair._fields == ("x",)
    assert list(Model.model_fields) == ["x"]


def test_a_pydantic_model_may_have_class_and_static_methods() -> None:
    assert Model.make().x == Model.make_outside().x == 1
    assert Model.double(2) == 4
    assert Model(x=2).model_dump() == {"x": 2}


def test_equal_frozen_instances_share_cached_results() -> None:
    Point(5).scaled(7)
    hits = Point.scaled.stats.hits
    assert Point(5).scaled(7) == 35
    assert Point.scaled.stats.hits == hits + 1


def test_a_method_of_an_enum_is_no_member() -> None:
    class Color(enum.Enum):
        RED = 1

        @quick
        def shout(self) -> str:
            return self.name + "!"

        @quick
        @classmethod
        def first(cls) -> Color:
            return next(iter(cls))

    assert list(Color) == [Color.RED]
    assert Color.RED.shout() == "RED!"
    assert Color.first() is Color.RED


def test_a_protocol_sees_decorated_methods() -> None:
    @runtime_checkable
    class Fetches(Protocol):
        @quick
        def fetch(self, x: int) -> int: ...

    assert isinstance(client, Fetches)
    assert not isinstance(object(), Fetches)


def test_slots_leave_room_for_methods() -> None:
    class Tight:
        __slots__ = ("x",)

        @quick
        def fetch(self) -> int:
            return 5

    assert Tight().fetch() == 5


def test_a_method_is_retried_with_its_instance() -> None:
    fail_once = flaky(lambda self: self.name, failures=1)

    class Shaky:
        name = "s"

        @quick
        def fetch(self) -> str:
            return str(fail_once(self))

    assert Shaky().fetch() == "s"


def test_a_method_takes_fallback_values() -> None:
    class Chat:
        @opero(cache=False, arg_fallback="model", retries=0)
        def ask(self, prompt: str, model: object = ("big", "small")) -> object:
            if model == "big":
                raise ConnectionError
            return model

    assert Chat().ask("hi") == "small"
    assert Chat().ask("hi", ["big", "own"]) == "own"
    assert Chat().ask.call("hi").fallback == "small"
