# this_file: tests/core/test_stream.py
"""Generators and async generators: retried until the first item is out, and one call until the last."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import pytest

from opero import (
    CircuitBreaker,
    CircuitState,
    ConcurrencyLimit,
    RateLimiter,
    failures,
    opero,
    remaining,
)
from opero.errors import CallTimeoutError, DeadlineError, OperoUsageError
from opero.events import AttemptFailed, CallEnded, CallGaveUp, CallStarted, CallSucceeded
from opero.testing import FakeClock, capture_events, fake_clock, set_disabled

quick: dict[str, Any] = {"cache": False, "min_delay": 0}


class Driver:
    """Drives a generator step by step, whether it is asynchronous or not."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self.loop = asyncio.new_event_loop() if asynchronous else None

    def of(self, body: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Any]:
        """Return `body`, or an asynchronous generator function that does the same."""
        if not self.asynchronous:
            return body

        async def twin(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            inner = body(*args, **kwargs)
            step: Callable[[], Any] = lambda: next(inner)  # noqa: E731 - the step changes below
            while True:
                try:
                    item = step()
                except StopIteration:
                    return
                await asyncio.sleep(0)
                try:
                    sent = yield item
                except GeneratorExit:
                    inner.close()
                    raise
                except BaseException as thrown:  # noqa: BLE001 - the inner one decides
                    step = lambda thrown=thrown: inner.throw(thrown)  # noqa: E731
                else:
                    step = lambda sent=sent: inner.send(sent)  # noqa: E731

        twin.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]  # inspect reads it
        return twin

    def wait(self, awaitable: Any) -> Any:
        return self.loop.run_until_complete(awaitable) if self.loop else awaitable

    def send(self, stream: Any, value: Any = None) -> Any:
        return self.wait(stream.asend(value) if self.loop else stream.send(value))

    def throw(self, stream: Any, error: BaseException) -> Any:
        return self.wait(stream.athrow(error) if self.loop else stream.throw(error))

    def close(self, stream: Any) -> None:
        self.wait(stream.aclose() if self.loop else stream.close())

    def items(self, stream: Any) -> list[Any]:
        async def collect() -> list[Any]:
            return [item async for item in stream]

        return self.wait(collect()) if self.loop else list(stream)

    @property
    def end(self) -> type[Exception]:
        return StopAsyncIteration if self.loop else StopIteration


@pytest.fixture(params=["sync", "async"])
def driver(request: pytest.FixtureRequest) -> Any:
    driver = Driver(asynchronous=request.param == "async")
    yield driver
    if driver.loop:
        driver.loop.run_until_complete(driver.loop.shutdown_asyncgens())
        driver.loop.close()


class Source:
    """Counts its starts; fails before the first item as often as the test says."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.starts = 0
        self.closed = 0
        self.received: list[Any] = []

    def __call__(self, *items: Any) -> Generator[Any, Any, Any]:
        self.starts += 1
        if self.starts <= self.failures:
            raise ConnectionError(f"start {self.starts}")
        try:
            for item in items:
                if isinstance(item, Exception):
                    raise item
                try:
                    self.received.append((yield item))
                except LookupError as error:
                    self.received.append(type(error))
        finally:
            self.closed += 1

    def body(self) -> Callable[..., Generator[Any, Any, Any]]:
        def stream(*items: Any) -> Generator[Any, Any, Any]:
            return (yield from self(*items))

        return stream


def test_kind_and_signature_stay() -> None:
    def numbers(start: int, *, step: int = 1) -> Generator[int, None, None]:
        yield start

    async def anumbers(start: int) -> AsyncGenerator[int, None]:
        yield start

    assert inspect.isgeneratorfunction(opero(numbers))
    assert inspect.isasyncgenfunction(opero(anumbers))
    assert inspect.signature(opero(numbers)) == inspect.signature(numbers)


def test_nothing_starts_before_the_first_item_is_asked_for(driver: Driver) -> None:
    source = Source()
    stream = opero(**quick)(driver.of(source.body()))(1)
    assert source.starts == 0
    driver.close(stream)
    assert source.starts == 0


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_it_is_retried_before_the_first_item(
    driver: Driver, clock: FakeClock, failures: int
) -> None:
    source = Source(failures)
    fetch = opero(cache=False)(driver.of(source.body()))
    assert driver.items(fetch(1, 2, 3)) == [1, 2, 3]
    assert source.starts == failures + 1
    assert len(clock.sleeps) == failures
    assert fetch.stats.calls == failures + 1


def test_it_gives_up_like_any_function(driver: Driver) -> None:
    source = Source(failures=99)
    with pytest.raises(ConnectionError, match=r"start 4\n.*gave up after 4 attempts, 4 calls"):
        driver.items(opero(**quick)(driver.of(source.body()))(1))


def test_an_error_after_the_first_item_is_not_retried(driver: Driver) -> None:
    source = Source()
    stream = opero(**quick)(driver.of(source.body()))(1, OSError("torn"), 3)
    assert driver.send(stream) == 1
    with pytest.raises(OSError, match="torn") as caught:
        driver.send(stream)
    assert (source.starts, source.closed) == (1, 1)
    assert caught.value.__notes__[0].endswith("failed after 1 item of the stream")
    with pytest.raises(driver.end):
        driver.send(stream)


def test_an_empty_generator_is_a_success(driver: Driver) -> None:
    source = Source()
    fetch = opero(**quick)(driver.of(source.body()))
    assert driver.items(fetch()) == []
    assert (source.starts, fetch.stats.failures) == (1, 0)


def test_the_returned_value_comes_through() -> None:
    @opero(**quick)
    def counted(n: int) -> Generator[int, None, str]:
        yield from range(n)
        return f"{n} items"

    def consumer(n: int) -> Generator[int, None, str]:
        return (yield from counted(n))

    for n in (0, 2):
        stream = consumer(n)
        assert list(itertools.islice(stream, n)) == list(range(n))
        with pytest.raises(StopIteration) as end:
            next(stream)
        assert end.value.value == f"{n} items"


def test_sent_values_come_through(driver: Driver) -> None:
    source = Source(failures=1)
    stream = opero(**quick)(driver.of(source.body()))(1, 2)
    assert driver.send(stream) == 1
    assert driver.send(stream, "one") == 2
    with pytest.raises(driver.end):
        driver.send(stream, "two")
    assert source.received == ["one", "two"]


def test_a_thrown_error_reaches_the_generator_that_may_go_on(driver: Driver) -> None:
    source = Source()
    stream = opero(**quick)(driver.of(source.body()))(1, 2)
    assert driver.send(stream) == 1
    assert driver.throw(stream, KeyError("handled inside")) == 2
    assert source.received == [KeyError]


def test_a_thrown_error_that_is_not_handled_comes_back(driver: Driver) -> None:
    source = Source()
    stream = opero(**quick)(driver.of(source.body()))(1, 2)
    driver.send(stream)
    error = OSError("not handled")
    with pytest.raises(OSError, match="not handled") as caught:
        driver.throw(stream, error)
    assert caught.value is error
    assert source.closed == 1


def test_closing_closes_the_generator(driver: Driver) -> None:
    source = Source()
    stream = opero(**quick)(driver.of(source.body()))(1, 2)
    driver.send(stream)
    driver.close(stream)
    assert source.closed == 1
    driver.close(stream)
    assert source.closed == 1


def test_a_generator_that_refuses_to_close_says_so(driver: Driver) -> None:
    def stubborn() -> Generator[int, None, None]:
        try:
            yield 1
        finally:
            yield 2

    stream = opero(**quick)(driver.of(stubborn))()
    assert driver.send(stream) == 1
    with pytest.raises(RuntimeError, match="generator ignored GeneratorExit"):
        driver.close(stream)


def test_a_generator_that_is_dropped_is_closed() -> None:
    source = Source()
    stream = opero(**quick)(source.body())(1, 2)
    next(stream)
    gc.disable()
    try:
        del stream
        assert source.closed == 1
    finally:
        gc.enable()


def test_leaving_an_async_loop_early_closes_the_generator() -> None:
    source = Source()

    @opero(**quick)
    async def stream() -> AsyncGenerator[int, None]:
        for item in source(1, 2, 3):
            yield item

    async def main() -> None:
        it = stream()
        async for _ in it:
            break
        await it.aclose()

    asyncio.run(main())
    gc.collect()
    assert source.closed == 1


def test_cancelling_while_an_item_is_made_reaches_the_generator() -> None:
    seen: list[str] = []

    @opero(**quick)
    async def stream() -> AsyncGenerator[int, None]:
        try:
            yield 1
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def main() -> None:
        it = stream()
        assert await anext(it) == 1
        task = asyncio.ensure_future(anext(it))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == ["cancelled"]


def test_fallback_values_are_tried_until_one_gives_an_item(driver: Driver) -> None:
    started = []

    def body(model: str) -> Generator[str, None, None]:
        started.append(model)
        if model == "bad":
            raise ConnectionError
        yield model
        raise OSError("after the first item")

    it = opero(arg_fallback="model", **quick)(driver.of(body))(["bad", "good"])
    assert driver.send(it) == "good"
    with pytest.raises(OSError, match="after the first item"):
        driver.send(it)
    assert started == ["bad", "good"]


def test_switched_off_there_is_one_start(driver: Driver) -> None:
    source = Source(failures=1)
    with set_disabled(), pytest.raises(ConnectionError):
        driver.items(opero(cache=False)(driver.of(source.body()))(1))
    assert source.starts == 1


def test_a_receipt_holds_the_stream_and_how_it_started(driver: Driver) -> None:
    source = Source(failures=1)
    receipt = driver.wait(opero(**quick)(driver.of(source.body())).call(1, 2))
    assert (receipt.calls, receipt.attempts, len(receipt.errors)) == (2, 2, 1)
    assert driver.send(receipt.value) == 1
    assert driver.send(receipt.value, "one") == 2
    with pytest.raises(driver.end):
        driver.send(receipt.value, "two")
    assert source.received == ["one", "two"]


def test_a_receipts_stream_passes_on_errors_and_closing(driver: Driver) -> None:
    source = Source()
    fetch = opero(**quick)(driver.of(source.body()))
    stream = driver.wait(fetch.call(1, 2)).value
    assert driver.send(stream) == 1
    assert driver.throw(stream, KeyError()) == 2
    driver.close(stream)
    assert (source.received, source.closed) == ([KeyError], 1)


def test_it_is_never_cached_though_the_cache_is_on_by_default(driver: Driver) -> None:
    source = Source()
    fetch = opero(driver.of(source.body()))
    assert driver.items(fetch(1)) == driver.items(fetch(1)) == [1]
    assert source.starts == 2


@pytest.mark.parametrize(
    "options",
    [{"cache": True}, {"cache_ttl": 5}, {"cache_maxsize": 3}, {"cache_key": lambda *a: 1}],
    ids=lambda options: next(iter(options)),
)
def test_asking_for_the_cache_is_an_error_at_decoration(
    driver: Driver, options: dict[str, Any]
) -> None:
    with pytest.raises(OperoUsageError, match="is a generator, and what it yields is never cached"):
        opero(**options)(driver.of(Source().body()))


def test_judging_results_is_an_error_at_decoration(driver: Driver) -> None:
    with pytest.raises(OperoUsageError, match="is a generator and has no single result"):
        opero(retry_if_result=lambda r: True)(driver.of(Source().body()))


# --- one call until the last item -----------------------------------------------------------------


def numbers(count: int = 3, error: BaseException | None = None) -> Generator[int, None, str]:
    yield from range(count)
    if error is not None:
        raise error
    return "end"


@pytest.fixture(params=["read", "torn", "closed", "collected"])
def ending(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def end(driver: Driver, decorated: Any, ending: str) -> None:
    """Read a stream of three items in one of four ways."""
    stream = decorated(3, ConnectionError("torn") if ending == "torn" else None)
    assert driver.send(stream) == 0
    if ending == "read":
        assert driver.items(stream) == [1, 2]
    elif ending == "torn":
        with pytest.raises(ConnectionError):
            driver.items(stream)
    elif ending == "closed":
        driver.close(stream)
    else:
        del stream
        gc.collect()
        if driver.loop is not None:  # its hooks close what was collected
            for _ in range(3):
                driver.wait(asyncio.sleep(0))


def test_a_stream_holds_its_permit_to_the_end(driver: Driver, ending: str) -> None:
    limit = ConcurrencyLimit(1)
    decorated = opero(concurrency=limit, **quick)(driver.of(numbers))
    stream = decorated()
    driver.send(stream)
    assert not limit.try_acquire()
    driver.items(stream)
    assert limit.try_acquire()
    limit.release()
    end(driver, decorated, ending)
    assert limit.try_acquire()
    limit.release()


def test_a_breaker_counts_a_stream_by_its_end(driver: Driver, ending: str) -> None:
    breaker = CircuitBreaker(fail_max=3)
    decorated = opero(circuit_breaker=breaker, **quick)(driver.of(numbers))
    for _ in range(3):
        end(driver, decorated, ending)
    assert (breaker.state is CircuitState.OPEN) == (ending == "torn")


def test_a_dropped_probe_gives_its_permit_back(driver: Driver) -> None:
    with fake_clock() as clock:
        breaker = CircuitBreaker(fail_max=1, reset_timeout=5)
        decorated = opero(circuit_breaker=breaker, **quick)(driver.of(numbers))
        end(driver, decorated, "torn")
        clock.advance(6)
        end(driver, decorated, "closed")
        end(driver, decorated, "read")
        assert breaker.state is CircuitState.CLOSED


def test_counters_and_events_come_with_the_end(driver: Driver, ending: str) -> None:
    decorated = opero(**quick)(driver.of(numbers))
    kinds = (CallStarted, CallSucceeded, AttemptFailed, CallGaveUp, CallEnded)
    with capture_events(*kinds) as seen:
        end(driver, decorated, ending)
    names = [type(event).__name__ for event in seen]
    expected = {
        "read": ["CallStarted", "CallSucceeded", "CallEnded"],
        "torn": ["CallStarted", "AttemptFailed", "CallGaveUp", "CallEnded"],
    }.get(ending, ["CallStarted", "CallEnded"])
    assert names == expected
    ended: Any = seen[-1]
    assert isinstance(ended.error, ConnectionError) == (ending == "torn")
    torn = int(ending == "torn")
    stats = decorated.stats
    assert (stats.calls, stats.failures, stats.gave_up) == (1, torn, torn)


def test_a_torn_stream_says_how_many_items_came_and_what_failed_before(driver: Driver) -> None:
    starts: list[int] = []

    def body() -> Generator[int, None, None]:
        starts.append(1)
        if len(starts) == 1:
            raise TimeoutError("at first")
        yield 1
        yield 2
        raise ConnectionError("torn")

    stream = opero(**quick)(driver.of(body))()
    with pytest.raises(ConnectionError) as caught:
        driver.items(stream)
    note = caught.value.__notes__[0]
    assert "2 calls" in note
    assert "2 items of the stream had come" in note
    assert [type(e) for e in failures(caught.value)] == [TimeoutError, ConnectionError]


def test_no_other_value_is_tried_after_the_first_item(driver: Driver) -> None:
    def body(model: Any = ("a", "b")) -> Generator[int, None, None]:
        yield 1
        raise ConnectionError(model)

    stream = opero(arg_fallback="model", **quick)(driver.of(body))()
    with pytest.raises(ConnectionError, match="a"):
        driver.items(stream)


class ThrottledError(Exception):
    status_code = 429
    retry_after = 20


def test_a_torn_stream_gives_its_cost_back_and_pauses_its_limiter(driver: Driver) -> None:
    limiter = RateLimiter(cap=100, cost=10)
    stream = opero(rate_limit=limiter, **quick)(driver.of(numbers))
    with fake_clock():
        for error, spent in ((ValueError(), 10), (ThrottledError(), 10)):
            with pytest.raises(type(error)):
                driver.items(stream(2, error))
            assert limiter.spent == spent
        assert limiter.paused == 20


def test_a_value_whose_stream_was_throttled_cools_down(driver: Driver) -> None:
    asked: list[str] = []

    def body(model: Any = ("a", "b")) -> Generator[int, None, None]:
        asked.append(model)
        yield 1
        if model == "a":
            raise ThrottledError

    stream = opero(arg_fallback="model", **quick)(driver.of(body))
    with fake_clock(), pytest.raises(ThrottledError):
        driver.items(stream())
    assert driver.items(stream()) == [1]
    assert asked == ["a", "b"]


def test_a_deadline_ends_a_stream_whose_items_come_without_a_wait(driver: Driver) -> None:
    with fake_clock() as clock:
        body = ((clock.advance(4), n)[1] for n in itertools.count())
        source = driver.of(lambda: (yield from body))
        stream = opero(deadline=10, retries=0, cache=False)(source)()
        with pytest.raises(DeadlineError):
            driver.items(stream)


def slow(pauses: list[float]) -> Callable[..., Any]:
    async def body() -> AsyncGenerator[int, None]:
        for n, pause in enumerate(pauses):
            await asyncio.sleep(pause)
            yield n

    return body


def slow_thread(pauses: list[float]) -> Callable[..., Any]:
    def body() -> Generator[int, None, None]:
        for n, pause in enumerate(pauses):
            time.sleep(pause)
            yield n

    return body


@pytest.mark.parametrize(
    ("options", "pauses", "count", "error"),
    [
        ({"timeout": 0.4}, [0.0, 0.0, 30.0], 2, CallTimeoutError),
        ({"timeout": 1.0}, [0.13] * 8, 8, None),
        ({"timeout": 30, "idle_timeout": 0.4}, [0.5, 0.0, 30.0], 2, CallTimeoutError),
        ({"idle_timeout": 0.4}, [0.5, 0.0], 2, None),
        ({"deadline": 0.25, "timeout": 30}, [0.1] * 9, None, DeadlineError),
    ],
    ids=["stalls", "steady", "idle", "slow start", "deadline"],
)
def test_limits_of_time(
    driver: Driver, options: dict[str, Any], pauses: list[float], count: int | None, error: Any
) -> None:
    make = slow if driver.loop else slow_thread
    stream = opero(cache=False, retries=0, **options)(make(pauses))()
    seen: list[int] = []

    async def collect() -> None:
        async for item in stream:
            seen.append(item)  # noqa: PERF401 - what came before the error counts

    def read() -> None:
        if driver.loop:
            driver.wait(collect())
        else:
            for item in stream:
                seen.append(item)  # noqa: PERF402 - what came before the error counts

    began = time.monotonic()
    if error is None:
        read()
    else:
        with pytest.raises(error):
            read()
    assert time.monotonic() - began < 20
    assert count is None or len(seen) == count


def test_a_deadline_ends_with_its_stream_and_does_not_reach_the_consumer(driver: Driver) -> None:
    inner: list[float | None] = []

    def body() -> Generator[int, None, None]:
        for n in range(2):
            inner.append(remaining())
            yield n

    stream = opero(deadline=60, **quick)(driver.of(body))()
    driver.send(stream)
    assert remaining() is None
    driver.items(stream)
    assert remaining() is None
    assert all(left is not None and left <= 60 for left in inner)


def test_a_receipt_holds_a_stream_that_may_be_dropped_unread(driver: Driver) -> None:
    limit = ConcurrencyLimit(1)
    decorated = opero(concurrency=limit, **quick)(driver.of(numbers))
    receipt = driver.wait(decorated.call())
    assert driver.items(receipt.value) == [0, 1, 2]
    receipt = driver.wait(decorated.call())
    del receipt
    gc.collect()
    assert limit.try_acquire()


def test_idle_timeout_is_for_generators() -> None:
    with pytest.raises(OperoUsageError, match="idle_timeout=5: fetch"):

        @opero(idle_timeout=5)
        def fetch() -> int:
            return 1


@pytest.mark.parametrize("option", ["timeout", "idle_timeout", "deadline"])
def test_without_an_event_loop_of_asyncio_a_limited_stream_refuses_before_it_begins(
    option: str,
) -> None:
    begun = []

    @opero(**{option: 5})
    async def numbers() -> AsyncGenerator[int]:
        begun.append(True)
        yield 1

    async def consume() -> None:
        async for _ in numbers():
            pass

    # As another event loop would begin it.
    with pytest.raises(OperoUsageError, match="needs a running asyncio event loop"):
        consume().send(None)
    gc.collect()
    assert begun == []
