# this_file: tests/composition/test_first_call.py
"""The first call of a cached function with fallback values: the same whether the wrapper makes it or the stages do."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Face

from opero import CircuitBreaker, ConcurrencyLimit, RateLimiter, opero
from opero.caching import lease

pytestmark = pytest.mark.internal

MODELS = ("a", "b")


@pytest.fixture(params=["by the wrapper", "by the stages"])
def maker(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A listener sends every call through the stages."""
    return {} if request.param == "by the wrapper" else {"on_event": lambda event: None}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Options for entries on disk; at the end of the test no caller has a lease any more."""
    # What the functions below close over has no content.
    monkeypatch.setattr("opero.core.cache.function_id", lambda info, version: info.qualname)
    yield {"cache_backend": f"disk:{tmp_path / 'cache'}"}
    assert not lease._renewer._held
    lease._renewer.flush()


@pytest.fixture(params=["memory", "disk"])
def options(request: pytest.FixtureRequest, maker: dict[str, Any]) -> dict[str, Any]:
    """The options of the function, with its entries in memory and on disk."""
    place = request.getfixturevalue("disk") if request.param == "disk" else {}
    return {"min_delay": 0, "retries": 1, "arg_fallback": "model", **maker, **place}


def called_once(face: Any, function: Any) -> Any:
    """The function after a call: it is known now that its results are no awaitables."""
    face.run(function, None)
    function.stats.reset()
    return function


def counted(function: Any) -> dict[str, float]:
    """What its counters say, but for the times."""
    return {
        name: n
        for name, n in function.stats.as_dict().items()
        if n and name not in ("slept", "waited")
    }


def test_another_value_follows_a_failed_first_call(face: Any, options: dict[str, Any]) -> None:
    def ask(x: Any, model: Any = MODELS) -> Any:
        if (x, model) == (1, "a"):
            raise ConnectionError
        return model

    f = called_once(face, opero(**options)(face.of(ask)))
    assert (face.run(f, 1), face.run(f, 1)) == ("b", "b")
    assert counted(f) == {"calls": 2, "failures": 1, "fallbacks": 1, "hits": 1, "misses": 1}


def test_another_attempt_follows_when_all_values_have_failed(
    face: Any, options: dict[str, Any]
) -> None:
    left = [ConnectionError("1"), ConnectionError("2"), None]

    def ask(x: Any, model: Any = MODELS) -> Any:
        error = None if x is None else left.pop(0)
        if error is not None:
            raise error
        return model

    f = called_once(face, opero(**options)(face.of(ask)))
    assert face.run(f, 1) == "a"
    assert counted(f) == {
        "calls": 3,
        "failures": 2,
        "fallbacks": 1,
        "misses": 1,
        "retries": 1,
    }


def test_a_failure_is_not_cached_and_blocks_no_later_call(
    face: Any, options: dict[str, Any]
) -> None:
    def ask(x: Any, model: Any = "a") -> Any:
        if x == 1:
            raise KeyError(model)
        return model

    f = called_once(face, opero(**{**options, "retries": 0})(face.of(ask)))
    for _ in range(2):
        with pytest.raises(KeyError):
            face.run(f, 1)
    assert counted(f) == {"calls": 2, "failures": 2, "gave_up": 2, "misses": 2}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_first_call_gives_everything_back(
    face: Any, options: dict[str, Any], error: type[BaseException]
) -> None:
    limit = ConcurrencyLimit(1)
    left: list[Any] = [error()]

    def ask(x: Any, model: Any = "a") -> Any:
        if x and left:
            raise left.pop()
        return model

    f = called_once(face, opero(concurrency=limit, **options)(face.of(ask)))
    with pytest.raises(error):
        face.run(f, 1)
    assert limit.in_flight == 0
    assert face.run(f, 1) == "a"
    assert counted(f) == {"calls": 2, "misses": 2}


def test_a_call_that_timed_out_keeps_its_permit_until_its_thread_is_done(
    options: dict[str, Any],
) -> None:
    limit, go = ConcurrencyLimit(2), threading.Event()

    @opero(**{**options, "timeout": 1.0, "concurrency": limit})
    def ask(x: Any, model: Any = MODELS) -> Any:
        if (x, model) == (1, "a"):
            assert limit.in_flight == 1
            go.wait(10)
        return model, limit.in_flight

    ask(None)
    ask.stats.reset()
    assert ask(1) == ("b", 2)
    assert (limit.in_flight, counted(ask)["failures"]) == (1, 1)
    go.set()
    while limit.in_flight:
        threading.Event().wait(0.001)


def test_each_caller_gets_a_copy(face: Any, options: dict[str, Any]) -> None:
    f = called_once(face, opero(**options)(face.of(lambda x, model=MODELS: [x, model])))
    for _ in range(3):
        found = face.run(f, 1)
        assert found == [1, "a"]
        found.clear()


def test_lists_are_keyed_by_content(face: Any, options: dict[str, Any]) -> None:
    f = called_once(face, opero(**options)(face.of(lambda x, model="m": model)))
    f = called_once(face, f)
    assert [face.run(f, [1, {"a": 2}], ["a", "b"]) for _ in range(2)] == ["a", "a"]
    assert face.run(f, [1, {"a": 3}], ["a", "b"]) == "a"
    assert counted(f) == {"calls": 2, "hits": 1, "misses": 2}


def test_no_values_are_an_error(face: Any, options: dict[str, Any]) -> None:
    f = called_once(face, opero(**options)(face.of(lambda x, model="m": model)))
    for _ in range(2):
        with pytest.raises(Exception, match="the list of values is empty"):
            face.run(f, 1, [])
    assert "calls" not in counted(f)


def test_a_call_without_a_slot_counts_one_miss(face: Any, options: dict[str, Any]) -> None:
    limiter = RateLimiter("20/s", burst=0)
    f = called_once(face, opero(rate_limit=limiter, **options)(face.of(lambda x, model="m": x)))
    began = time.monotonic()
    assert [face.run(f, n) for n in range(3)] == [0, 1, 2]
    assert counted(f) == {"calls": 3, "misses": 3}
    # On a machine that stands still, each call may come when its slot is free already.
    assert f.stats.waited > 0 or time.monotonic() - began > 0.1


def test_a_value_has_a_circuit_of_its_own(face: Any, options: dict[str, Any]) -> None:
    tried = []

    def ask(x: Any, model: Any = MODELS) -> Any:
        tried.append(model)
        if x and model == "a":
            raise ConnectionError
        return model

    breaker = CircuitBreaker(fail_max=1)
    f = called_once(face, opero(circuit_breaker=breaker, **options)(face.of(ask)))
    assert [face.run(f, n) for n in (1, 2)] == ["b", "b"]
    assert tried == ["a", "a", "b", "b"]
    assert breaker.state == "closed"


def test_what_is_invalidated_during_the_first_call_is_not_stored(
    face: Any, options: dict[str, Any]
) -> None:
    made: list[Any] = []

    def ask(x: Any, model: Any = "m") -> int:
        made.append(x)
        if len(made) == 2:
            f.cache.invalidate(x)
        return len(made)

    f = called_once(face, opero(**options)(face.of(ask)))
    assert [face.run(f, 1) for _ in range(3)] == [2, 3, 3]


def test_a_function_may_call_itself_with_the_same_arguments(options: dict[str, Any]) -> None:
    depth = []

    @opero(**options)
    def down(x: Any, model: Any = "m") -> int:
        depth.append(x)
        return len(depth) if x is None or len(depth) > 3 else down(x)

    down(None)
    assert down(1) == 4
    assert down(1) == 4


def together(function: Any, count: int, go: threading.Event) -> list[Any]:
    """What the function gives several threads at once; `go` is set when one computes and all others wait."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(function(1))
        except Exception as error:  # noqa: BLE001 - it is what the caller gets
            results.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    flights, end = function.__opero__.cache.single_flight._open, time.monotonic() + 100
    while sum(len(flight.waiters or ()) for flight in list(flights.values())) < count - 1:
        assert time.monotonic() < end
        time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join(10)
    return results


def test_threads_share_one_first_call(options: dict[str, Any]) -> None:
    go = threading.Event()

    @opero(**options)
    def ask(x: Any, model: Any = MODELS) -> list[Any]:
        assert x is None or go.wait(10)
        return [x, model]

    ask(None)
    ask.stats.reset()
    results = together(ask, 4, go)
    assert results == [[1, "a"]] * 4
    assert len({id(found) for found in results}) == 4
    assert counted(ask) == {"calls": 1, "misses": 1, "shared": 3}


def test_threads_share_the_failure_of_all_values(options: dict[str, Any]) -> None:
    go = threading.Event()

    @opero(**{**options, "retries": 0})
    def ask(x: Any, model: Any = MODELS) -> Any:
        assert x is None or go.wait(10)
        if x:
            raise ConnectionError(model)

    ask(None)
    ask.stats.reset()
    results = together(ask, 3, go)
    assert [repr(error) for error in results] == ["ConnectionError('b')"] * 3
    assert len({id(error) for error in results}) == 3
    assert (ask.stats.calls, ask.stats.misses, ask.stats.shared) == (2, 1, 2)


def test_a_fresh_entry_on_disk_is_a_hit(disk: dict[str, Any]) -> None:
    f = called_once(face := Face(asynchronous=False), opero(**disk)(lambda x: [x]))
    assert [face.run(f, 1) for _ in range(3)] == [[1]] * 3
    assert (f.call(1).source, counted(f)) == ("hit", {"calls": 1, "hits": 3, "misses": 1})


def test_an_expired_entry_on_disk_is_a_miss(disk: dict[str, Any]) -> None:
    f = called_once(face := Face(asynchronous=False), opero(cache_ttl=0.05, **disk)(lambda x: x))
    assert face.run(f, 1) == 1
    time.sleep(0.06)
    assert face.run(f, 1) == 1
    assert counted(f) == {"calls": 2, "misses": 2}


def test_a_result_that_is_stored_between_look_and_lease_is_served(
    disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(x: Any) -> Any:
        return made.append(x)

    made: list[Any] = []
    f, other = opero(**disk)(work), opero(**disk)(work)
    store = f.__opero__.cache.store.backend
    f(0)
    acquire = store.acquire

    def late(*args: Any) -> Any:
        monkeypatch.setattr(store, "acquire", acquire)
        other(1)
        lease._renewer.flush()
        time.sleep(lease._GATHER)
        return acquire(*args)

    monkeypatch.setattr(store, "acquire", late)
    f(1)
    assert (made, f.stats.hits, f.stats.misses) == ([0, 1], 1, 1)


@pytest.mark.parametrize("granted", [True, False], ids=["lent", "not lent"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_caller_whose_lease_fails_leaves_nothing_behind(
    disk: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    granted: bool,
) -> None:
    f = called_once(face := Face(asynchronous=False), opero(**disk)(lambda x: x))
    store = f.__opero__.cache.store.backend
    acquire = store.acquire

    def failing(*args: Any) -> bool:
        assert not granted or all(acquire(*args))
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(store, "acquire", failing)
        if error is OSError:
            assert face.run(f, 1) == 1  # a store that lends no lease keeps no caller waiting
        else:
            with pytest.raises(error):
                face.run(f, 1)
    lease._renewer.flush()
    assert (face.run(f, 1), face.run(f, 2), len(f.__opero__.cache.single_flight)) == (1, 2, 0)


def test_a_store_that_breaks_costs_no_result(
    disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    f = called_once(face := Face(asynchronous=False), opero(**disk)(lambda x: x))

    def broken(*args: Any) -> Any:
        raise OSError("gone")

    for name in ("get", "set", "acquire"):
        monkeypatch.setattr(f.__opero__.cache.store.backend, name, broken)
    assert [face.run(f, 1) for _ in range(2)] == [1, 1]
    assert counted(f) == {"calls": 2, "misses": 2}


def test_a_lease_of_another_caller_is_waited_for(disk: dict[str, Any]) -> None:
    go = threading.Event()

    def work(x: Any) -> Any:
        assert not x or go.wait(10)
        return made.append(x)

    made: list[Any] = []
    f, other = opero(**disk)(work), opero(**disk)(work)
    for each in (f, other):
        each(0)
    leader = threading.Thread(target=f, args=(1,))
    leader.start()
    while not f.stats.misses > 1:
        time.sleep(0.001)
    waiter = threading.Thread(target=other, args=(1,))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    go.set()
    for thread in (leader, waiter):
        thread.join(10)
    assert (made.count(1), other.stats.hits) == (1, 2)


def test_cancelled_leader_hands_over_to_a_waiter(options: dict[str, Any]) -> None:
    limit = ConcurrencyLimit(2)
    began: list[Any] = []
    started = asyncio.Event()

    @opero(concurrency=limit, **options)
    async def ask(x: Any, model: Any = MODELS) -> Any:
        began.append(model)
        started.set()
        if len(began) == 1:
            await asyncio.sleep(30)
        return model

    async def main() -> Any:
        leader = asyncio.create_task(ask(1))
        await started.wait()
        waiters = [asyncio.create_task(ask(1)) for _ in range(2)]
        await asyncio.sleep(0.01)
        leader.cancel()
        return await asyncio.gather(leader, *waiters, return_exceptions=True)

    cancelled, *values = asyncio.run(main())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert (values, began, limit.in_flight) == (["a", "a"], ["a", "a"], 0)


def test_a_coroutine_that_is_dropped_in_its_first_call_blocks_no_caller(
    options: dict[str, Any],
) -> None:
    waits = [True]

    @opero(**options)
    async def ask(x: Any, model: Any = MODELS) -> Any:
        if waits:
            await asyncio.sleep(30)
        return model

    async def drop() -> None:
        running = ask(1)
        task = asyncio.create_task(asyncio.sleep(30))
        running.send(None)
        running.close()
        task.cancel()

    asyncio.run(drop())
    waits.clear()
    assert asyncio.run(asyncio.wait_for(ask(1), 10)) == "a"


def test_two_functions_that_want_each_others_results_do_not_hang(options: dict[str, Any]) -> None:
    @opero(**options)
    async def left(x: int, model: Any = "m") -> int:
        await asyncio.sleep(0.01)
        return 1 if x == 0 else await right(0) + await right(x)

    @opero(**options)
    async def right(x: int, model: Any = "m") -> int:
        await asyncio.sleep(0.01)
        return 1 if x == 0 else await left(0) + 1

    async def main() -> Any:
        return await asyncio.wait_for(asyncio.gather(left(1), right(1), left(1)), 10)

    assert asyncio.run(main()) == [3, 2, 3]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals between threads")
@pytest.mark.parametrize("place", ["store", "limiter"])
def test_ctrl_c_while_another_thread_has_the_lock_is_no_other_error(place: str) -> None:
    limiter = RateLimiter("1000/s")

    @opero(rate_limit=limiter)
    def fetch(n: int) -> int:
        return n

    fetch(0)
    lock = (fetch.__opero__.cache.store if place == "store" else limiter.state)._lock
    main, ended = threading.get_ident(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            time.sleep(0.02)
            signal.pthread_kill(main, signal.SIGINT)
            ended.wait(10)

    def call() -> None:
        holder.start()
        held.wait(10)
        fetch(1)

    held, holder = threading.Event(), threading.Thread(target=hold)
    with pytest.raises(KeyboardInterrupt):
        call()
    ended.set()
    holder.join()
    assert fetch(1) == 1
