# this_file: tests/caching/stores/test_conformance.py
"""What a cached function does on every store, sync and async."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from opero import clear_cache, opero
from opero.core import get_cache_context
from opero.errors import OperoUsageError, UnkeyableError
from opero.events import CacheSkipped

pytestmark = pytest.mark.internal


class Listener:
    """A function's listener."""

    def __init__(self) -> None:
        self.received: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.received.append(event)

    @property
    def skips(self) -> list[str]:
        return [event.reason for event in self.received if isinstance(event, CacheSkipped)]


class World:
    """What the functions below do; they close over nothing, because that would be part of their names."""

    body: Any = None
    calls: Any = None


def first(x: Any = 0) -> Any:
    World.calls.append(x)
    return World.body(x)


def second(x: Any = 0) -> Any:
    World.calls.append(x)
    return "second"


def keyword_only(*, a: int, b: int = 2) -> int:
    World.calls.append(a)
    return a + b


def slow(x: Any) -> list[Any]:
    World.calls.append(x)
    World.body(x)
    return [x]


async def aslow(x: Any) -> list[Any]:
    World.calls.append(x)
    await World.body(x)
    return [x]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The arguments of all calls that were made."""
    monkeypatch.setattr(World, "calls", made := [])
    return made


def make(face: Any, body: Any, backend: Any, **options: Any) -> tuple[Any, Listener]:
    """Return a cached function and its listener."""
    World.body = staticmethod(body)
    received = Listener()
    options = {"cache_namespace": "conformance", "retries": 0, "on_event": received, **options}
    return opero(cache_backend=backend, **options)(face.of(first)), received


@pytest.fixture(autouse=True)
def emptied():
    yield
    clear_cache("conformance", "memory")


VALUES = [
    None,
    0,
    False,
    "",
    float("nan"),
    2**100,
    b"\0",
    [],
    {"a": [1, (2, {3})], "b": None},
    {1, 2},
    frozenset({"x"}),
    np.arange(12.0).reshape(3, 4),
    np.float32(1.5),
    pd.DataFrame({"n": [1, 2], "t": ["a", None]}),
    ValueError("a result like any other"),
]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, pd.DataFrame):
        return bool(one.equals(other))
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other) and one.dtype == other.dtype)
    if isinstance(one, Exception):
        return repr(one) == repr(other)
    return type(one) is type(other) and (one == other or one != one)


def test_any_result_is_a_hit_the_second_time(face, backend, calls):
    f, received = make(face, VALUES.__getitem__, backend)
    for x, value in enumerate(VALUES):
        first, second = face.run(f, x), face.run(f, x)
        assert same(first, value)
        assert same(second, value)
        assert (len(calls), f.stats.hits) == (x + 1, x + 1), received.skips


def test_arguments_of_different_types_are_different_calls(face, backend, calls):
    f, _ = make(face, repr, backend)
    wanted = [1, True, 1.0, "1", b"1", (1,), [1], None]
    for _ in range(2):
        assert [face.run(f, x) for x in wanted] == [repr(x) for x in wanted]
    assert len(calls) == len(wanted)


def test_ways_to_write_a_call_are_one_call(face, backend, calls):
    f, _ = make(face, lambda x: x, backend)
    face.run(f), face.run(f, 0), face.run(f, x=0)
    assert len(calls) == 1


def test_keyword_only_functions_are_cached(face, backend, calls):
    g = opero(cache_backend=backend, cache_namespace="conformance")(face.of(keyword_only))
    assert face.run(g, a=1) == face.run(g, b=2, a=1) == 3
    assert len(calls) == 1


def test_callers_cannot_change_what_is_stored(face, backend, calls):
    f, _ = make(face, lambda x: {"list": [x]}, backend)
    for _ in range(3):
        got = face.run(f, 1)
        assert got == {"list": [1]}
        got["list"].append("x")
    assert len(calls) == 1


def test_an_entry_expires(face, backend, clock, calls):
    f, _ = make(face, lambda x: x, backend, cache_ttl=60)
    face.run(f, 1)
    clock.advance(59)
    face.run(f, 1)
    assert len(calls) == 1
    clock.advance(2)
    face.run(f, 1)
    assert len(calls) == 2


def test_a_failure_is_not_stored(face, backend, calls):
    def body(x: Any) -> Any:
        raise KeyError(x)

    f, _ = make(face, body, backend)
    for _ in range(2):
        with pytest.raises(KeyError):
            face.run(f, 1)
    assert len(calls) == 2


def test_a_result_that_cannot_be_stored_reaches_its_caller(face, backend, calls):
    f, received = make(face, lambda x: iter([x]), backend)
    assert [next(face.run(f, 1)) for _ in range(2)] == [1, 1]
    assert len(calls) == 2
    assert len(received.skips) == 1, "reported once"


def test_a_result_that_is_too_heavy_is_not_stored(face, backend, calls):
    if not isinstance(backend, str):
        pytest.skip("a user's store has bounds of its own")
    f, received = make(face, lambda x: b"x" * 5000, backend, cache_max_bytes=4000)
    face.run(f, 1), face.run(f, 1)
    assert len(calls) == 2
    assert "heavier than cache_max_bytes" in received.skips[0]


def test_management(face, backend, calls):
    f, _ = make(face, lambda x: x, backend)
    for x in (1, 2, 3):
        face.run(f, x)
    info = f.cache.info()
    assert (info.size, info.misses, info.hits) == (3, 3, 0)
    assert f.cache.invalidate(1) is True
    assert f.cache.invalidate(1) is False
    assert face.run(f.cache.refresh, 2) == 2
    assert len(calls) == 4
    face.run(f, 2)
    assert len(calls) == 4
    assert f.cache.clear() == 2
    assert f.cache.info().size == 0


def test_management_from_an_event_loop(face, backend, calls):
    f, _ = make(face, lambda x: x, backend)
    face.run(f, 1), face.run(f, 2)

    async def main() -> None:
        assert (await f.cache.ainfo()).size == 2
        assert await f.cache.ainvalidate(1) is True
        assert await f.cache.ainvalidate(x=1) is False
        assert await f.cache.aclear() == 1

    asyncio.run(main())


def test_info_names_bytes_and_backend(face, backend, calls):
    f, _ = make(face, lambda x: b"x" * 10_000, backend)
    face.run(f, 1), face.run(f, 1)
    info = f.cache.info()
    name = backend if backend == "memory" else type(backend).__name__
    if isinstance(backend, str) and backend != "memory":
        name = "disk" if backend.startswith("disk") else "redis"
        assert 10_000 < info.bytes < 11_000
    assert (info.backend, info.namespace, info.hits, info.misses) == (name, "conformance", 1, 1)


def test_keyword_only_functions_are_managed_by_keyword(face, backend, calls):
    f = opero(cache_backend=backend, cache_namespace="conformance")(face.of(keyword_only))
    assert (face.run(f, a=1), face.run(f, b=2, a=1)) == (3, 3)
    assert face.run(f.cache.refresh, a=1) == 3
    assert len(calls) == 2
    assert f.cache.invalidate(b=2, a=1) is True
    with pytest.raises(TypeError):
        f.cache.invalidate(1)


@dataclass(frozen=True)
class Shop:
    name: str

    @opero(cache_namespace="conformance")
    def price(self, x: Any) -> Any:
        World.calls.append(x)
        return [self.name, x]


def test_methods_are_managed_through_the_instance(backend, calls):
    Shop.price = Shop.__dict__["price"].with_options(cache_backend=backend)
    one, other = Shop("one"), Shop("other")
    assert (one.price(1), other.price(1), one.price(1)) == (["one", 1], ["other", 1], ["one", 1])
    assert calls == [1, 1]
    assert one.price.cache.refresh(1) == ["one", 1]
    assert one.price.cache.invalidate(1) is True
    assert one.price.cache.invalidate(1) is False
    assert other.price.call(1).source == "hit"
    with get_cache_context(backend, "conformance") as cache:
        cache.set(one.price.cache.key(2), "planted")
    assert (one.price(2), other.price(2)) == ("planted", ["other", 2])


def test_a_context_gets_sets_and_deletes_what_a_call_would(face, backend, clock, calls):
    f, _ = make(face, lambda x: [x], backend, cache_ttl=60)
    with get_cache_context(backend, "conformance") as cache:
        cache.set(f.cache.key(1), ["set"])
        assert face.run(f, 1) == ["set"]
        assert calls == []
        face.run(f, 2)
        assert cache.get(f.cache.key(x=2)) == [2]
        assert cache.delete(f.cache.key(2)) is True
        assert cache.get(f.cache.key(2), "gone") == "gone"
        cache.set(f.cache.key(3), None, ttl=10)
        clock.advance(11)
        assert f.cache.key(3) not in cache
        assert f.cache.key(1) in cache
        clock.advance(50)
        assert f.cache.key(1) not in cache, "the function's own ttl"


def test_a_context_of_an_event_loop_knows_calls_too(face, backend, calls):
    f, _ = make(face, lambda x: [x], backend)

    async def main() -> None:
        cache = get_cache_context(backend, "conformance")
        await cache.aset(f.cache.key(1), "set")
        assert await cache.aget(f.cache.key(1)) == "set"
        assert await cache.adelete(f.cache.key(1))

    asyncio.run(main())
    assert face.run(f, 1) == [1]


def test_a_context_refuses_calls_of_other_namespaces(backend):
    f = opero(cache_backend=backend, cache_namespace="conformance")(first)
    with pytest.raises(OperoUsageError, match="belongs to the namespace 'conformance'"):
        get_cache_context(backend, "elsewhere").get(f.cache.key(1))


def test_functions_do_not_share_entries(face, backend, calls):
    f, _ = make(face, lambda x: "f", backend)
    other = opero(cache_backend=backend, cache_namespace="conformance")(face.of(second))
    assert (face.run(f, 1), face.run(other, 1), face.run(f, 1)) == ("f", "second", "f")
    other.cache.clear()
    face.run(f, 1)
    assert len(calls) == 2


def test_a_namespace_is_cleared_alone(face, backend, calls):
    f, _ = make(face, lambda x: x, backend)
    g, _ = make(face, lambda x: x, backend, cache_namespace="conformance:2")
    face.run(f, 1), face.run(g, 1)
    clear_cache("conformance")
    face.run(f, 1), face.run(g, 1)
    assert (f.stats.hits, g.stats.hits) == (0, 1)
    clear_cache("conformance:2")


def test_a_version_starts_afresh(face, backend, calls):
    f, _ = make(face, lambda x: x, backend)
    face.run(f, 1), face.run(f.with_options(cache_version=2), 1), face.run(f, 1)
    assert len(calls) == 2


@dataclass(frozen=True)
class Model:
    name: str

    def ask(self, x: Any) -> Any:
        World.calls.append(x)
        return [self.name, x]


class Client:
    def ask(self, x: Any) -> Any:
        return x


def test_methods_of_instances_with_content_share(face, backend, calls):
    cached = opero(cache_backend=backend, cache_namespace="conformance")(face.of(Model.ask))
    for _ in range(2):
        assert face.run(cached, Model("a"), 1) == ["a", 1]
        assert face.run(cached, Model("b"), 1) == ["b", 1]
    assert len(calls) == 2


def test_an_instance_without_content_is_unkeyable_in_a_store_that_is_shared(face, place):
    asked = opero(cache_backend=place)(face.of(Client.ask))
    with pytest.raises(UnkeyableError, match="'self'"):
        face.run(asked, Client(), 1)


def test_threads_compute_a_missing_key_once(backend, calls):
    go = threading.Event()
    World.body = lambda x: go.wait(20)
    f = opero(cache_backend=backend, cache_namespace="conformance")(slow)
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(f(1))) for _ in range(20)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert got == [[1]] * 20
    assert len({id(one) for one in got}) == 20
    assert len(calls) == 1


def test_a_thousand_tasks_compute_a_missing_key_once(backend, calls):
    World.body = lambda x: asyncio.sleep(0.01)
    f = opero(cache_backend=backend, cache_namespace="conformance")(aslow)

    async def main() -> list[Any]:
        return await asyncio.gather(*(f(1) for _ in range(1000)))

    got = asyncio.run(main())
    assert got == [[1]] * 1000
    assert len({id(one) for one in got}) == 1000
    assert len(calls) == 1


def test_a_cancelled_task_leaves_the_key_to_others(backend, calls):
    begun = asyncio.Event()

    async def body(x: Any) -> None:
        begun.set()
        await asyncio.sleep(0.05 if len(calls) > 1 else 60)

    World.body = body
    f = opero(cache_backend=backend, cache_namespace="conformance")(aslow)

    async def main() -> Any:
        leader = asyncio.create_task(f(1))
        await begun.wait()
        follower = asyncio.create_task(f(1))
        await asyncio.sleep(0.01)
        leader.cancel()
        return await follower

    assert asyncio.run(main()) == [1]
    assert len(calls) == 2


@pytest.mark.parametrize("size", [1_000, 20_000_000])
def test_big_values(face, backend, size):
    if size > 10**6 and backend != "memory" and not isinstance(backend, str):
        pytest.skip("copied by opero alone")
    value = bytes(size)
    f, _ = make(face, lambda x: value, backend)
    assert face.run(f) == value
    assert face.run(f) == value
    assert f.stats.hits == 1


@pytest.mark.parametrize("kind", ["array", "frame"])
def test_big_arrays_and_frames(face, tmp_path, kind, calls):
    array = np.arange(4_000_000.0)
    value = array if kind == "array" else pd.DataFrame({"a": array, "b": array > 5})
    for backend in ("memory", f"disk:{tmp_path / 'cache'}"):
        f, _ = make(face, lambda x: value, backend)
        face.run(f)
        assert same(face.run(f), value)
        assert f.stats.hits == 1


def test_a_context_sets_gets_and_deletes(backend):
    with get_cache_context(backend, "conformance") as cache:
        cache.set(("EUR", "USD"), [1.08])
        assert cache.get(("EUR", "USD")) == [1.08]
        assert cache.get(("USD", "EUR"), "none") == "none"
        assert ("EUR", "USD") in cache
        assert get_cache_context(backend, "conformance").get(("EUR", "USD")) == [1.08]
        assert cache.delete(("EUR", "USD")) is True
        assert cache.delete(("EUR", "USD")) is False
        cache.set(1, None)
        assert 1 in cache
        assert cache.get(1, "none") is None
        assert cache.clear() == 1


def test_a_context_serves_event_loops(backend):
    async def main() -> None:
        cache = get_cache_context(backend, "conformance")
        await cache.aset("k", [1], ttl=60)
        (await cache.aget("k")).append(2)
        assert await cache.aget("k") == [1]
        assert await cache.aget("j", 5) == 5
        assert await cache.adelete("k")
        await cache.aset("k", None)
        assert await cache.aclear() == 1

    asyncio.run(main())


def test_what_a_context_holds_expires(backend, clock):
    cache = get_cache_context(backend, "conformance", cache_ttl=60)
    cache.set("a", 1)
    cache.set("b", 2, ttl=120)
    clock.advance(61)
    assert (cache.get("a"), cache.get("b")) == (None, 2)


def test_clear_cache_reaches_entries_of_functions_that_were_never_called_here(face, place, calls):
    f, _ = make(face, lambda x: x, place)
    face.run(f, 1), face.run(f, 2)
    del f
    assert clear_cache("conformance", place) == 2
    again, _ = make(face, lambda x: x, place)
    face.run(again, 1)
    assert calls == [1, 2, 1]


def test_the_event_loop_goes_on_while_a_store_takes_its_time(place, monkeypatch, calls):
    from opero.caching.stores import base as stores

    store = stores.open_store(stores.settle(place))
    if not store.blocking or hasattr(store, "aget"):
        pytest.skip("it has verbs of its own for event loops")
    loop_thread = threading.get_ident()
    seen: list[int] = []
    get, set_ = store.get, store.set
    monkeypatch.setattr(store, "get", lambda *a: (seen.append(threading.get_ident()), get(*a))[1])
    monkeypatch.setattr(store, "set", lambda *a: (seen.append(threading.get_ident()), set_(*a))[1])
    World.body = lambda x: asyncio.sleep(0)
    asyncio.run(opero(cache_backend=place)(aslow)(1))
    assert len(seen) >= 3
    assert loop_thread not in seen
