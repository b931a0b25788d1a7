# this_file: tests/concurrency/test_map_events.py
"""Events of a map: its progress, its end, and that it stands."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from opero import RateLimiter, operomap
from opero.concurrency.executors.base import Batch
from opero.concurrency.report import Progress
from opero.events import MapProgress, MapWaiting
from opero.events.bus import Emitter
from opero.events.messages import describe_event
from opero.testing import FakeClock, capture_events

pytestmark = pytest.mark.internal


def events_of(run: Any) -> list[Any]:
    with capture_events(MapProgress) as sent:
        run()
    return sent


@pytest.mark.parametrize("mode", ["thread", "async", "process"])
def test_map_progress_ends_with_the_final_counts(mode: Any, face: Any) -> None:
    def fetch(x: int) -> float:
        return 1 / x

    made = operomap(mode=mode, workers=2, retries=0, on_error="skip")(face.of(fetch))
    last = events_of(lambda: face.run(made, [1, 2, 0, 1]))[-1]
    assert (last.done, last.total, last.failed, last.finished) == (4, 4, 1, True)
    assert last.name.endswith("fetch")
    assert last.seconds >= 0
    last = events_of(lambda: face.run(made, [1, 2]))[-1]
    assert (last.done, last.cached) == (2, 2)


def test_map_progress_of_a_generator_has_no_total() -> None:
    made = operomap(mode="thread", cache=False)(abs)
    last = events_of(lambda: list(made.stream(iter(range(5)))))[-1]
    assert (last.done, last.total, last.finished) == (5, None, True)


def test_map_progress_of_an_asynchronous_map() -> None:
    @operomap(cache=False)
    async def fetch(x: int) -> int:
        return x

    async def main() -> list[int]:
        return [x async for x in fetch.stream(range(3))]

    assert events_of(lambda: asyncio.run(main()))[-1].done == 3


def test_a_map_that_fails_says_how_far_it_got() -> None:
    @operomap(mode="thread", sequential=True, retries=0, cache=False)
    def fetch(x: int) -> float:
        return 1 / x

    def run() -> None:
        with pytest.raises(ZeroDivisionError):
            fetch([1, 0, 2])

    last = events_of(run)[-1]
    assert (last.failed, last.finished) == (1, True)


def progress_of(total: int) -> Progress:
    return Progress(Emitter("fetch"), total, on_result=None, bar=None, keeps=False)


def test_events_come_now_and_then_and_not_with_every_item(clock: FakeClock) -> None:
    with capture_events(MapProgress) as sent:
        progress = progress_of(100)
        for done in range(100):
            clock.advance(0.03)
            progress.add(Batch([done], [done], [done]))
        progress.close()
    assert 20 < len(sent) < 40
    assert [e.done for e in sent] == sorted(e.done for e in sent)
    assert (sent[-1].done, sent[-1].finished) == (100, True)


def test_a_map_that_stands_for_a_minute_says_so_once(clock: FakeClock) -> None:
    with capture_events(MapWaiting) as sent:
        progress = progress_of(100)
        progress.add(Batch([0], [0], [0]))
        for _ in range(300):
            clock.advance(0.5)
            progress.tick()
    (event,) = sent
    assert (event.done, event.total, event.seconds) == (1, 100, 60)


def test_a_map_that_will_stand_for_long_says_so_at_once(clock: FakeClock) -> None:
    with capture_events(MapWaiting) as sent:
        progress = Progress(
            Emitter("fetch"),
            None,
            on_result=None,
            bar=None,
            keeps=False,
            waits_for=lambda: ("limit: next in 23 h", 82_800.0),
        )
        clock.advance(0.5)
        progress.tick()
        clock.advance(90)
        progress.tick()
    (event,) = sent
    assert event.reason == "limit: next in 23 h"
    assert describe_event(event) == (
        30,
        "fetch: the map stands at 0 items, limit: next in 23 h after 0.500 s",
    )


def test_without_listeners_nothing_is_sent_and_nothing_ticks() -> None:
    assert progress_of(1).interval is None


def test_a_map_whose_quota_is_used_up_says_for_how_long_at_once() -> None:
    @operomap(workers=2, cache=False, retries=0, rate_limit=RateLimiter("2/day", burst=0))
    async def fetch(x: int) -> int:
        return x

    async def main() -> list[Any]:
        with capture_events(MapWaiting) as sent:
            running = asyncio.ensure_future(fetch.map(range(3)))
            async with asyncio.timeout(10):
                while not sent:  # noqa: ASYNC110 - the map sends it
                    await asyncio.sleep(0.05)
            running.cancel()
            await asyncio.wait({running})
        return sent

    (event,) = asyncio.run(main())
    assert (event.done, event.total, event.reason) == (2, 3, "limit: next in 24 h")
