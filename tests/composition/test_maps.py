# this_file: tests/composition/test_maps.py
"""Maps together with the other stages, in every mode."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.map_mode import MapMode

from opero import CircuitBreaker, RateLimiter, deadline, failures, operomap
from opero.errors import CircuitOpenError
from opero.testing import fake_clock

MODES = [
    ("sync", "thread"),
    ("sync", "process"),
    ("async", "async"),
    ("async", "thread"),
    ("async", "process"),
    ("async", "async_process"),
]
HERE = [("sync", "thread"), ("async", "async")]


@pytest.fixture(params=MODES, ids="-".join)
def mode(request: pytest.FixtureRequest) -> MapMode:
    kind, mode = request.param
    return MapMode(kind, mode=mode, workers=2)


@pytest.fixture(params=HERE, ids="-".join)
def here(request: pytest.FixtureRequest) -> MapMode:
    kind, mode = request.param
    return MapMode(kind, mode=mode, workers=2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # Other tests leave idle threads in this process, with which opero would not fork it.
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        yield


def test_coroutines_that_finish_in_another_order_keep_their_places() -> None:
    async def last_first(x: int) -> int:
        for _ in range(3 - x):
            await asyncio.sleep(0)
        return -x

    mapped = operomap(mode="async_process", workers=1, chunksize=4, cache=False)(last_first)
    assert asyncio.run(mapped(range(4))) == [0, -1, -2, -3]


def test_a_long_pause_gives_worker_and_slot_to_others(mode: MapMode, tmp_path: Path) -> None:
    def work(x: int) -> int:
        if x == 0 and not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            raise OSError
        return x

    order: list[int] = []
    mapped = mode.of(
        work,
        workers=1,
        retries=1,
        min_delay=0.5,
        **mode.at_once(1),
        on_result=lambda one: order.append(one.index),
    )
    assert mode.run(mapped(range(4))) == [0, 1, 2, 3]
    assert order[-1] == 0


def test_every_stage_at_once(mode: MapMode, tmp_path: Path) -> None:
    def work(x: int, key: str) -> tuple[int, str]:
        if key == "spent" or (x == 3 and not (tmp_path / "tried").exists()):
            (tmp_path / "tried").touch()
            raise OSError(key)
        return x, key

    mapped = mode.of(
        work,
        cache=True,
        retries=2,
        min_delay=0,
        arg_fallback="key",
        rate_limit=1000,
        **mode.at_once(2),
        circuit_breaker=CircuitBreaker(fail_max=100),
        timeout=20,
        deadline=60,
    )
    expected = [(x, "live") for x in (1, 2, 3, 1)]
    assert mode.run(mapped([1, 2, 3, 1], ["spent", "live"])) == expected
    calls, hits = mapped.stats.calls, mapped.stats.hits
    assert calls >= 2 * 3
    assert mode.run(mapped([3, 2], ["spent", "live"])) == [(3, "live"), (2, "live")]
    assert (mapped.stats.calls, mapped.stats.hits) == (calls, hits + 2)


def test_the_errors_of_all_attempts_come_with_the_last(mode: MapMode) -> None:
    def fail(x: int) -> int:
        raise KeyError(x)

    (failure,) = mode.run(mode.of(fail, retries=2, min_delay=0).map([5])).failures
    assert [repr(error) for error in failures(failure.error)] == ["KeyError(5)"] * 3
    assert "gave up after 3 attempts" in failure.error.__notes__[0]


def test_a_deadline_of_each_item_travels(mode: MapMode) -> None:
    def fail(x: int) -> int:
        raise OSError(x)

    result = mode.run(mode.of(fail, retries=50, min_delay=0.2, jitter=False, deadline=0.3).map([1]))
    assert 1 <= result.failures[0].attempts <= 2
    assert "deadline" in str(result.failures[0].error.__notes__).lower()


def test_a_deadline_around_the_map_bounds_its_pauses(mode: MapMode) -> None:
    def fail(x: int) -> int:
        raise OSError(x)

    def begin() -> Any:
        with deadline(5):
            return mode.run(mode.of(fail, retries=3, min_delay=60, max_delay=60).map([1, 2]))

    began = time.monotonic()
    if mode.kind == "sync":
        result = begin()
    else:

        async def main() -> Any:
            with deadline(5):
                return await mode.of(fail, retries=3, min_delay=60, max_delay=60).map([1, 2])

        result = asyncio.run(main())
    assert [failure.attempts for failure in result.failures] == [1, 1]
    assert time.monotonic() - began < 30


def test_an_open_circuit_ends_the_rest_quickly(here: MapMode) -> None:
    ran = []

    def fail(x: int) -> int:
        ran.append(x)
        raise OSError(x)

    breaker = CircuitBreaker(fail_max=3, reset_timeout=60)
    result = here.run(
        here.of(fail, workers=1, chunksize=1, retries=0, circuit_breaker=breaker).map(range(50))
    )
    assert len(ran) == 3
    kinds = [type(failure.error) for failure in result.failures]
    assert kinds == [OSError] * 3 + [CircuitOpenError] * 47


def test_a_pause_that_the_service_asks_for_holds_for_all_items(here: MapMode) -> None:
    class BusyError(Exception):
        headers: ClassVar = {"Retry-After": "5"}

    asked: list[float] = []

    with fake_clock() as clock:

        def fetch(x: int) -> int:
            asked.append(clock.monotonic())
            if len(asked) == 1:
                raise BusyError
            return x

        mapped = here.of(fetch, workers=1, retries=1, rate_limit=RateLimiter(1000))
        assert here.run(mapped(range(3))) == [0, 1, 2]
    assert all(at - asked[0] >= 5 for at in asked[1:])


def test_a_signal_ends_a_map_with_what_is_done(mode: MapMode) -> None:
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        mapped = mode.of(
            lambda x: time.sleep(0.005) or x,
            stop_token=stop,
            chunksize=1,
            on_result=lambda one: one.index == 3 and os.kill(os.getpid(), signal.SIGTERM),
        )
        result = mode.run(mapped.map(range(5_000)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.status == "cancelled"
    assert 4 <= result.done < 1_000
    assert result.by_index() == {n: n for n in result.indices}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("options", [{}, {"timeout": 60}], ids=["plain", "timeout"])
def test_a_forked_child_that_returns_from_an_item_ends(options: dict[str, Any]) -> None:
    def work(x: int) -> int:
        child = os.fork()
        if child:
            end = time.monotonic() + 60
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                if time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    raise AssertionError("the child waits for other items")
                time.sleep(0.001)
        return x

    mapped = MapMode("sync", mode="thread", workers=2, retries=0, **options).of(work)
    assert mapped([1, 2]) == [1, 2]
