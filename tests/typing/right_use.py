# this_file: tests/typing/right_use.py
"""What type checkers must know about decorated functions. Checked, never run."""

from __future__ import annotations

import abc
import datetime
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar, assert_type

from opero import (
    Orchestrator,
    OrchestratorConfig,
    RateLimiter,
    Receipt,
    RetryConfig,
    event_bus,
    failures,
    opero,
    operomap,
    orchestrate,
)
from opero.caching.function_cache import CacheInfo
from opero.concurrency import MapResult, get_parallel_executor, get_parallel_map_decorator
from opero.core import get_fallback_decorator, get_retry_decorator
from opero.core.decorated import Explanation
from opero.core.function import Stats
from opero.core.options import Options
from opero.events import CacheHit, Event, RetryScheduled
from opero.testing import capture_events, fake_clock, set_disabled
from opero.utils import ensure_async, run_async

T = TypeVar("T")


# --- functions ------------------------------------------------------------------------------------


@opero
def bare(x: int, y: str = "a", *rest: float, flag: bool = False, **more: str) -> list[int]:
    return [x]


@opero()
def empty(x: int) -> str:
    return str(x)


@opero(
    cache_ttl=datetime.timedelta(hours=1),
    cache_ignore=["x"],
    cache_max_bytes="64MB",
    retries=5,
    min_delay="100ms",
    retry_on=(ConnectionError, TimeoutError),
    retry_if_result=lambda result: not result,
    fallback_on=lambda error: isinstance(error, OSError),
    rate_limit=RateLimiter("100/minute"),
    secret=("x",),
    on_event=[print],
)
def with_options(x: int) -> str:
    return str(x)


@opero(retries=2)
async def coroutine(x: int) -> str:
    return str(x)


@opero
def generic(x: T, times: int) -> list[T]:
    return [x] * times


@opero
def same(x: T) -> T:
    return x


@opero
async def asame(x: T) -> list[T]:
    return [x]


@opero
def generator(n: int) -> Iterator[int]:
    yield n


@opero
async def async_generator(n: int) -> AsyncIterator[int]:
    yield n


@opero
def returns_awaitable(x: int) -> Awaitable[int]:
    return coroutine_of(x)


async def coroutine_of(x: int) -> int:
    return x


def check_functions() -> None:
    assert_type(bare(1, "b", 2.0, flag=True, other="c"), list[int])
    assert_type(bare(x=1), list[int])
    assert_type(empty(1), str)
    assert_type(with_options(1), str)
    assert_type(list(generator(1)), list[int])
    assert_type(generic("a", 2), list[str])
    assert_type(generic(1, times=2), list[int])
    assert_type(same("a"), str)
    assert_type(same(x=1), int)


async def check_coroutines() -> None:
    assert_type(await coroutine(1), str)
    assert_type(await asame(1), list[int])
    assert_type(await coroutine.call(1), Receipt[str])
    assert_type((await coroutine.call(x=1)).value, str)
    assert_type(await returns_awaitable(1), int)
    assert_type([item async for item in async_generator(1)], list[int])


def check_attributes() -> None:
    assert_type(bare.call(1, "b", flag=True), Receipt[list[int]])
    assert_type(bare.call(1).value, list[int])
    assert_type(bare.explain(), Explanation)
    assert_type(bare.stats, Stats)
    assert_type(bare.stats.calls, int)
    assert_type(bare.options, Options)
    assert_type(bare.options.retries, int)
    assert_type(bare.cache.info(), CacheInfo)
    assert_type(bare.cache.clear(), int)
    assert_type(bare.cache.invalidate(1), bool)
    assert_type(bare.with_options(retries=1)(1), list[int])
    assert_type(bare.__name__, str)


def takes_callable(fn: Callable[[int], str]) -> None: ...


def takes_async(fn: Callable[[int], Awaitable[str]]) -> None: ...


def check_use_as_a_callable() -> None:
    takes_callable(empty)
    takes_async(coroutine)
    takes_callable(Client("a").fetch)
    assert_type(list(map(empty, [1, 2])), list[str])
    functools.partial(bare, 1)


def check_other_callables() -> None:
    assert_type(opero(len)("abc"), int)
    assert_type(opero(retries=1)(str.upper)("a"), str)
    assert_type(opero(lambda: 1)(), int)
    assert_type(opero(functools.partial(empty, 1))(), str)
    assert_type(opero(Client)("a"), Client)
    assert_type(get_retry_decorator(retries=2)(len)("abc"), int)
    fetch = get_fallback_decorator(arg_fallback="x")(coroutine_of)
    fetches: Coroutine[Any, Any, int] = fetch(1)
    fetches.close()


# --- methods --------------------------------------------------------------------------------------


class Client:
    def __init__(self, name: str) -> None:
        self.name = name

    @opero
    def fetch(self, x: int) -> str:
        return self.name * x

    @opero(retries=2)
    async def afetch(self, x: int) -> str:
        return self.name * x

    @opero
    @classmethod
    def make(cls, name: str) -> Client:
        return cls(name)

    @classmethod
    @opero
    def make_outside(cls, name: str) -> Client:
        return cls(name)

    @opero
    @classmethod
    async def amake(cls, name: str) -> Client:
        return cls(name)

    @opero
    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    @staticmethod
    @opero
    def double_outside(x: int) -> int:
        return 2 * x

    @property
    @opero
    def title(self) -> str:
        return self.name.title()


class Sub(Client):
    @opero
    def fetch(self, x: int) -> str:
        return super().fetch(x) + super().fetch.call(x).value


class Query:
    @opero
    def where(self, x: int, times: int = 1) -> Self:
        return self

    @opero(cache=False)
    async def awhere(self, x: int) -> Self:
        return self

    @opero
    def same(self, x: T) -> T:
        return x

    @opero
    async def asame(self, x: T) -> list[T]:
        return [x]

    @opero
    @classmethod
    def of(cls, x: int) -> Self:
        return cls()

    @classmethod
    @opero
    def of_outside(cls, x: int) -> Self:
        return cls()

    @get_retry_decorator(retries=1)
    def retried(self, x: int) -> Self:
        return self


class SubQuery(Query):
    @opero
    def where(self, x: int, times: int = 1, more: str = "") -> Self:
        return super().where(x, times)

    @opero
    @classmethod
    def of(cls, x: int) -> Self:
        return cls()


class Box(Generic[T]):
    @opero
    def put(self, x: T) -> list[T]:
        return [x]


class Abstract(abc.ABC):
    @opero
    @abc.abstractmethod
    def fetch(self, x: int) -> int: ...

    @opero
    @abc.abstractmethod
    async def afetch(self, x: int) -> int: ...


class Plain:
    def fetch(self, x: int) -> str:
        return ""


class Decorating(Plain):
    # pyright lets nothing but functions override a plain method.
    @opero
    def fetch(self, x: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ""


class Concrete(Abstract):
    @opero
    def fetch(self, x: int) -> int:
        return x

    @opero
    async def afetch(self, x: int) -> int:
        return x


def check_type_variables_of_methods(query: Query, sub: SubQuery) -> None:
    assert_type(query.where(1), Query)
    assert_type(sub.where(1, more="a"), SubQuery)
    assert_type(sub.where.call(1), Receipt[SubQuery])
    assert_type(sub.retried(1), SubQuery)
    assert_type(query.same(1), int)
    assert_type(query.same.call("a"), Receipt[str])
    assert_type(Query.of(1), Query)
    assert_type(sub.of(1), SubQuery)
    assert_type(SubQuery.of_outside(1), SubQuery)
    assert_type(Box[int]().put(1), list[int])


async def check_type_variables_of_async_methods(sub: SubQuery) -> None:
    assert_type(await sub.awhere(1), SubQuery)
    assert_type(await sub.asame(1), list[int])
    assert_type(await sub.asame.call(1), Receipt[list[int]])


def check_methods(client: Client, sub: Sub) -> None:
    assert_type(client.fetch(1), str)
    assert_type(client.fetch(x=1), str)
    assert_type(sub.fetch(1), str)
    assert_type(Client.fetch(client, 1), str)
    assert_type(Client.fetch(sub, 1), str)
    assert_type(client.fetch.call(1), Receipt[str])
    assert_type(Client.fetch.call(client, 1), Receipt[str])
    assert_type(client.fetch.with_options(retries=1)(1), str)
    assert_type(client.fetch.explain(), Explanation)
    assert_type(client.fetch.cache.invalidate(1), bool)
    assert_type(client.title, str)


async def check_async_methods(client: Client) -> None:
    assert_type(await client.afetch(1), str)
    assert_type(await client.afetch.call(1), Receipt[str])
    assert_type(await Client.afetch(client, 1), str)
    assert_type(await Client.amake("a"), Client)
    assert_type(await client.amake.call("a"), Receipt[Client])


def check_class_methods(client: Client, sub: Sub) -> None:
    assert_type(Client.make("a"), Client)
    assert_type(Client.make_outside("a"), Client)
    assert_type(Sub.make("a"), Client)
    assert_type(client.make("a"), Client)
    assert_type(sub.make_outside("a"), Client)
    assert_type(Client.make.call("a"), Receipt[Client])


def check_static_methods(client: Client) -> None:
    assert_type(Client.double(1), int)
    assert_type(Client.double_outside(1), int)
    assert_type(client.double(1), int)
    assert_type(client.double_outside(1), int)
    assert_type(client.double.call(1), Receipt[int])


class Fetches(Protocol):
    def fetch(self, x: int) -> str: ...


def check_protocols(client: Client) -> Fetches:
    return client


# --- the rest of the front door -------------------------------------------------------------------


def received(event: Event) -> None:
    if isinstance(event, RetryScheduled):
        assert_type(event.delay, float)
        assert_type(event.function, str)


def check_events() -> None:
    with event_bus.subscribe(received, types=[CacheHit]) as subscription:
        subscription.cancel()
    with capture_events(CacheHit) as events:
        assert_type(events, list[Event])
    RetryScheduled(function="f", attempt=2, delay=0.5)


def check_helpers(error: Exception) -> None:
    assert_type(failures(error), list[BaseException])
    assert_type(run_async(coroutine_of(1)), int)
    with fake_clock() as clock, set_disabled():
        assert_type(clock.elapsed, float)


async def check_async_helpers() -> None:
    assert_type(await ensure_async(len)("abc"), int)


# --- maps -----------------------------------------------------------------------------------------


@operomap
def mapped(x: int, k: str = "a", *, flag: bool = False) -> str:
    return k


@operomap(mode="async", workers=8, max_errors=0.1, on_error="skip", chunksize=5)
async def amapped(x: int, k: str = "a") -> str:
    return k


class Mapping:
    @operomap
    def fetch(self, x: int, k: str = "a") -> str:
        return k

    @operomap(workers=2)
    async def afetch(self, x: int) -> str:
        return ""

    @operomap
    @classmethod
    def of_class(cls, x: int, k: str = "a") -> str:
        return k

    @operomap
    @classmethod
    async def aof_class(cls, x: int) -> str:
        return ""


@operomap(
    mode="async_process", executor=None, checkpoint="run.db", item_key=str, memory_limit="2GB"
)
async def elsewhere(x: int) -> bytes:
    return b""


@get_parallel_map_decorator(mode="process")
def alone(x: int, k: str = "a") -> str:
    return k


def length(x: str) -> int:
    return len(x)


async def alength(x: str) -> int:
    return len(x)


async def check_executors() -> None:
    run = get_parallel_executor(workers=2)
    assert_type(run(length, ["a"]), list[int])
    assert_type(await run(alength, ["a"]), list[int])
    assert_type(run.stream(length, ["a"]), Iterator[int])
    assert_type(run.stream(alength, ["a"]), AsyncIterator[int])
    assert_type(run.map(length, ["a"]), MapResult[int])
    assert_type(await run.map(alength, ["a"]), MapResult[int])
    assert_type(alone([1], "b"), list[str])
    assert_type(await elsewhere([1]), list[bytes])


async def numbers() -> AsyncIterator[int]:
    yield 1


def check_maps(client: Mapping) -> None:
    assert_type(mapped([1, 2]), list[str])
    assert_type(mapped(iter([1]), "b", flag=True), list[str])
    assert_type(mapped.stream([1]), Iterator[str])
    assert_type(mapped.map([1]), MapResult[str])
    assert_type(mapped.map([1]).values, list[str])
    assert_type(mapped.one(1), str)
    assert_type(mapped.one.call(1), Receipt[str])
    assert_type(mapped.explain(), Explanation)
    assert_type(mapped.stats, Stats)
    assert_type(client.fetch([1], "b"), list[str])
    assert_type(client.fetch.map([1]), MapResult[str])
    assert_type(client.fetch.stream([1]), Iterator[str])
    assert_type(Mapping.of_class([1], "b"), list[str])
    assert_type(client.of_class.map([1]), MapResult[str])


async def check_async_maps(client: Mapping) -> None:
    assert_type(await amapped([1, 2]), list[str])
    assert_type(await amapped(numbers(), "b"), list[str])
    assert_type(amapped.stream(numbers()), AsyncIterator[str])
    assert_type(await amapped.map([1]), MapResult[str])
    assert_type(await amapped.one(1), str)
    assert_type(await client.afetch([1]), list[str])
    assert_type(await client.afetch.map([1]), MapResult[str])
    assert_type(await Mapping.aof_class([1]), list[str])


# --- orchestrators --------------------------------------------------------------------------------


@orchestrate
def orchestrated(x: int, y: str = "a") -> str:
    return y


@orchestrate(config=OrchestratorConfig(retry_config=RetryConfig(max_attempts=2)))
async def aorchestrated(x: int) -> str:
    return ""


class Orchestrating:
    @orchestrate
    def fetch(self, x: int) -> str:
        return ""

    @orchestrate()
    async def afetch(self, x: int) -> str:
        return ""


def check_orchestrated(client: Orchestrating) -> None:
    assert_type(orchestrated(1, y="b"), str)
    assert_type(orchestrated.process(1, 2), list[str])
    assert_type(orchestrated.orchestrator, Orchestrator)
    assert_type(client.fetch(1), str)
    assert_type(client.fetch.process(1), list[str])


async def check_async_orchestrated(client: Orchestrating) -> None:
    assert_type(await aorchestrated(1), str)
    assert_type(await aorchestrated.process(1), list[str])
    assert_type(await client.afetch(1), str)
    assert_type(await client.afetch.process(1), list[str])
