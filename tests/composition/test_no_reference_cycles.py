# this_file: tests/composition/test_no_reference_cycles.py
"""Arguments die with the traceback, without the garbage collector: opero adds no circle."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from opero import opero
from opero.events import CallGaveUp, event_bus

if TYPE_CHECKING:
    from opero.testing import FakeClock

quick: dict[str, Any] = {"cache": False, "min_delay": 0}


def let_fail(face: Any, begin: Callable[..., Any], *args: Any) -> None:
    """Call and forget the error in the task: `asyncio.run` makes a circle of its own."""

    async def in_a_task() -> None:
        with contextlib.suppress(ConnectionError):
            await begin(*args)

    if face.asynchronous:
        asyncio.run(in_a_task())
        return
    with contextlib.suppress(ConnectionError):
        begin(*args)


def returns_awaitable(work: Callable[..., Any], big: Any) -> Any:
    return work(big)


class Big:
    """Stands for an argument that takes memory."""


@pytest.fixture(autouse=True)
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def ends(*outcomes: Any) -> Callable[[Big, Any], Any]:
    """A body that ends in the given ways, one after the other and again from the start."""
    turn = 0

    def body(big: Big, model: Any = None) -> Any:
        nonlocal turn
        outcome = outcomes[turn % len(outcomes)]
        turn += 1
        if isinstance(outcome, type):
            raise outcome
        return outcome

    return body


bad = ConnectionError
ways: list[Any] = [
    pytest.param({}, ends("fine"), id="success"),
    pytest.param({}, ends(bad), id="failure"),
    pytest.param({}, ends(bad, bad, "fine"), id="success after failures"),
    pytest.param({"retries": 0}, ends(bad), id="failure without retries"),
    pytest.param({"retry_on": KeyError}, ends(bad), id="failure that is not retried"),
    pytest.param({"arg_fallback": "model"}, ends(bad), id="failure of every value"),
    pytest.param({"arg_fallback": "model"}, ends(bad, "fine"), id="success of the second value"),
    pytest.param({"retry_if_result": lambda r: True}, ends("", bad), id="rejected"),
    pytest.param(
        {"retry_if_result": lambda r: not r}, ends("", "fine"), id="success after rejected"
    ),
    pytest.param({"stop": lambda s: s.attempt_number > 2}, ends(bad), id="failure ended by stop"),
    pytest.param({"rate_limit": 1e6}, ends(bad, bad, "fine"), id="success through the limiter"),
    pytest.param(
        {"cache": True, "cache_key": lambda *a, **k: 1}, ends(bad), id="failure in a flight"
    ),
]


@pytest.mark.parametrize(("options", "body"), ways)
@pytest.mark.parametrize("way", ["plain", "call"])
def test_arguments_are_freed(face: Any, options: dict[str, Any], body: Any, way: str) -> None:
    fetch = opero(**{**quick, **options})(face.of(body))
    begin = fetch if way == "plain" else fetch.call

    def use() -> weakref.ref[Big]:
        big = Big()
        let_fail(face, begin, big, [1, 2])
        return weakref.ref(big)

    assert use()() is None


@pytest.mark.parametrize(("options", "body"), ways[1:4])
def test_arguments_of_methods_are_freed(options: dict[str, Any], body: Any) -> None:
    class Client:
        @opero(**{**quick, **options})
        def fetch(self, big: Big) -> Any:
            return body(big)

    def use() -> list[weakref.ref[Any]]:
        client, big = Client(), Big()
        for begin in (client.fetch, client.fetch.call):
            with contextlib.suppress(ConnectionError):
                begin(big)
        return [weakref.ref(client), weakref.ref(big)]

    assert [ref() for ref in use()] == [None, None]


def test_arguments_of_nested_functions_are_freed(face: Any) -> None:
    inner = opero(retries=1, **quick)(ends(bad))
    outer = opero(retries=1, **quick)(face.of(lambda big: [inner(big)]))

    def use() -> weakref.ref[Big]:
        big = Big()
        let_fail(face, outer, big)
        return weakref.ref(big)

    assert use()() is None


def test_arguments_are_freed_while_listeners_are_there(face: Any) -> None:
    fetch = opero(retries=1, **quick)(face.of(ends(bad)))

    def use() -> weakref.ref[Big]:
        big = Big()
        with event_bus.subscribe(lambda event: None):
            let_fail(face, fetch, big)
        return weakref.ref(big)

    assert use()() is None


def test_arguments_live_as_long_as_the_error_that_is_kept() -> None:
    fetch = opero(retries=1, **quick)(ends(bad))

    def use() -> tuple[weakref.ref[Big], BaseException]:
        big = Big()
        try:
            fetch(big)
        except ConnectionError as error:
            return weakref.ref(big), error
        raise AssertionError

    ref, error = use()
    assert ref() is not None
    del error
    assert ref() is None


def test_what_a_listener_keeps_is_the_listeners(face: Any) -> None:
    kept: list[Any] = []
    fetch = opero(retries=1, **quick)(face.of(ends(bad)))

    def use() -> weakref.ref[Big]:
        big = Big()
        with event_bus.subscribe(kept.append, [CallGaveUp]):
            let_fail(face, fetch, big)
        return weakref.ref(big)

    ref = use()
    kept.clear()
    assert ref() is None


def test_arguments_of_a_cancelled_call_are_freed() -> None:
    @opero(cache=False, min_delay=20, max_delay=20)
    async def paused(big: Big) -> None:
        raise ConnectionError

    async def asleep(big: Big) -> None:
        await asyncio.sleep(20)

    async def use(way: Any) -> weakref.ref[Big]:
        big = Big()
        task = asyncio.ensure_future(way(big))
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        # Not awaited: a frame that names a task and gets its error is a circle already.
        await asyncio.wait([task])
        assert task.cancelled()
        del task
        return weakref.ref(big)

    async def main() -> None:
        for way in (asleep, paused, paused.call):
            ref = await use(way)
            assert ref() is None

    asyncio.run(main())


@pytest.mark.parametrize("outcomes", [(bad,), (bad, "fine")], ids=["failure", "success"])
def test_arguments_of_a_function_that_returns_awaitables_are_freed(
    clock: FakeClock, outcomes: Any
) -> None:
    inner = ends(*outcomes)

    async def work(big: Big) -> Any:
        return inner(big)

    fetch = opero(cache=False)(functools.partial(returns_awaitable, work))

    async def use() -> weakref.ref[Big]:
        big = Big()
        for begin in (fetch, fetch.call):
            with contextlib.suppress(ConnectionError):
                await begin(big)
        return weakref.ref(big)

    assert asyncio.run(use())() is None


def test_arguments_of_a_generator_are_freed() -> None:
    @opero(**quick)
    def stream(big: Big, box: list[int]) -> Any:
        box.append(1)
        if len(box) < 3:
            raise ConnectionError
        yield 1
        raise OSError

    def use() -> weakref.ref[Big]:
        big = Big()
        with pytest.raises(OSError, match="1 item of the stream had come"):
            list(stream(big, []))
        return weakref.ref(big)

    assert use()() is None
