# this_file: tests/concurrency/test_news.py
"""Listeners hear how far a map has got."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from opero import event_bus, operomap
from opero.concurrency import news
from opero.concurrency.news import News
from opero.events import MapProgress
from opero.events.bus import Emitter
from opero.testing import FakeClock, capture_events


def told_of(run: Any) -> list[Any]:
    with capture_events(MapProgress) as told:
        run()
    return told


@pytest.mark.parametrize("mode", ["thread", "async", "process"])
def test_the_last_event_tells_how_it_ended(mode: Any, face: Any) -> None:
    def fetch(x: int) -> float:
        return 1 / x

    made = operomap(mode=mode, workers=2, retries=0, on_error="skip")(face.of(fetch))
    last = told_of(lambda: face.run(made, [1, 2, 0, 1]))[-1]
    assert (last.done, last.total, last.failed, last.finished) == (4, 4, 1, True)
    assert last.name.endswith("fetch")
    assert last.seconds >= 0
    last = told_of(lambda: face.run(made, [1, 2]))[-1]
    assert (last.done, last.cached) == (2, 2)


def test_nobody_knows_how_long_a_generator_is() -> None:
    made = operomap(mode="thread", cache=False)(abs)
    last = told_of(lambda: list(made.stream(iter(range(5)))))[-1]
    assert (last.done, last.total, last.finished) == (5, None, True)


def test_an_asynchronous_map_tells_it_too() -> None:
    @operomap(cache=False)
    async def fetch(x: int) -> int:
        return x

    async def main() -> list[int]:
        return [x async for x in fetch.stream(range(3))]

    assert told_of(lambda: asyncio.run(main()))[-1].done == 3


def test_a_map_that_fails_says_how_far_it_got() -> None:
    @operomap(mode="thread", sequential=True, retries=0, cache=False)
    def fetch(x: int) -> float:
        return 1 / x

    def run() -> None:
        with pytest.raises(ZeroDivisionError):
            fetch([1, 0, 2])

    last = told_of(run)[-1]
    assert (last.failed, last.finished) == (1, True)


def test_events_come_now_and_then_and_not_with_every_item(clock: FakeClock) -> None:
    with capture_events(MapProgress) as told:
        made = News(Emitter("fetch"), 100, None)
        for done in range(1, 101):
            clock.advance(0.03)
            made.show(done, failed=0, hits=0, resumed=0)
        made.close()
    assert 20 < len(told) < 40
    assert [e.done for e in told] == sorted(e.done for e in told)
    assert (told[-1].done, told[-1].finished) == (100, True)


def test_nothing_is_made_while_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "News", None)
    assert operomap(mode="thread", cache=False)(abs)([-1]) == [1]
    with event_bus.subscribe(print, types=[MapProgress]), pytest.raises(TypeError):
        operomap(mode="thread", cache=False)(abs)([-1])
