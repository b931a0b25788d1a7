# this_file: tests/decorators/test_cached_maps.py
"""Maps and the cache: stores that take their time, expired results, renewal."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opero import operomap
from opero.testing import fake_clock

RAN: list[int] = []
"""Items that ran: a closure over it would be another function with each item, as stores see it."""
DOWN: list[int] = []


def doubled(x: int) -> int:
    RAN.append(x)
    if x in DOWN:
        raise OSError(x)
    return 2 * x


@pytest.fixture(autouse=True)
def clean() -> None:
    RAN.clear()
    DOWN.clear()


class SlowStore:
    """A user's store that blocks, and notes in which threads."""

    blocking = True

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.threads: set[int] = set()
        self.reads = 0

    def get(self, key: str) -> Any:
        self.threads.add(threading.get_ident())
        self.reads += 1
        time.sleep(0.002)
        return self.kept.get(key)

    def set(self, key: str, value: Any, ttl: float | None = None) -> None:
        self.threads.add(threading.get_ident())
        self.kept[key] = value

    def delete(self, key: str) -> bool:
        return self.kept.pop(key, None) is not None

    def clear(self, prefix: str = "") -> int:
        return len(self.kept)


class Face:
    """A sync or async map, which waits for its end."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def of(self, body: Any, **options: Any) -> Any:
        given = {"mode": "thread" if self.kind == "sync" else "async", "retries": 0, **options}
        if self.kind == "sync":
            return operomap(**given)(body)

        async def twin(x: Any) -> Any:
            return body(x)

        twin.__qualname__ = body.__qualname__
        return operomap(**given)(twin)

    def run(self, begin: Any, items: Any) -> Any:
        if self.kind == "sync":
            return begin(items)

        async def main() -> Any:
            found = await begin(items)
            await asyncio.sleep(0.01)  # what is renewed behind the scenes is a task of this loop
            return found

        return asyncio.run(main())


@pytest.fixture(params=["sync", "async"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    return Face(request.param)


def test_a_store_that_blocks_is_asked_once_for_each_item_and_never_by_the_loop(face: Face) -> None:
    store = SlowStore()
    double = face.of(doubled, cache_backend=store)
    assert face.run(double, [1, 2, 1, 3]) == [2, 4, 2, 6]
    assert sorted(RAN) == [1, 2, 3]
    assert store.reads <= 4
    assert face.run(double, [3, 4]) == [6, 8]
    assert len(RAN) == 4
    assert (threading.get_ident() in store.threads) is (face.kind == "sync")


class PatientStore(SlowStore):
    """Each read waits until the event loop has turned twice meanwhile."""

    turns = 0
    in_vain = 0

    def get(self, key: str) -> Any:
        awaited, end = self.turns + 2, time.monotonic() + 60
        while self.turns < awaited and not self.in_vain:
            self.in_vain += time.monotonic() > end
            time.sleep(0.0005)
        return super().get(key)


def test_an_event_loop_goes_on_while_a_store_is_asked() -> None:
    store = PatientStore()

    async def fetch(x: int) -> int:
        return x

    async def main() -> None:
        mapping = asyncio.ensure_future(operomap(cache_backend=store, workers=2)(fetch)(range(50)))
        while not mapping.done():
            store.turns += 1
            await asyncio.sleep(0)
        assert await mapping == list(range(50))

    asyncio.run(main())
    assert not store.in_vain, "the event loop stood still"


def test_results_on_disk_are_not_computed_again(face: Face, tmp_path: Path) -> None:
    for _ in range(2):
        mapped = face.of(doubled, cache_backend=f"disk:{tmp_path}")
        assert face.run(mapped, range(20)) == [2 * x for x in range(20)]
    assert len(RAN) == 20


@pytest.mark.parametrize("backend", ["memory", "disk"])
def test_expired_results_stand_in_for_failures(face: Face, backend: str, tmp_path: Path) -> None:
    where = backend if backend == "memory" else f"disk:{tmp_path}"
    mapped = face.of(doubled, cache_backend=where, cache_ttl=60, cache_stale_ttl=600)
    with fake_clock() as clock:
        face.run(mapped, [1, 2])
        clock.advance(100)
        DOWN.extend([1, 3])
        result = face.run(mapped.map, [1, 2, 3, 1])
        assert result.by_index() == {0: 2, 1: 4, 3: 2}
        assert [failure.index for failure in result.failures] == [2]
        assert (result.stale, result.hits) == (2, 0)
        assert face.run(mapped.map, [1]).stale == 1, "it has just failed, so it is not tried again"
        clock.advance(1000)
        assert not face.run(mapped.map, [1]).ok


def test_old_results_are_renewed_behind_the_scenes(face: Face) -> None:
    ran: list[int] = []
    renewed = threading.Event()

    def fetch(x: int) -> int:
        ran.append(x)
        if len(ran) > 1:
            renewed.set()
        return len(ran)

    mapped = face.of(fetch, cache_ttl=100, cache_refresh=0.5)
    with fake_clock() as clock:
        assert face.run(mapped, [1]) == [1]
        clock.advance(60)
        assert face.run(mapped, [1]) == [1], "the old one is served at once"
        assert renewed.wait(20)
        for _ in range(500):
            if mapped.cache.info().size == 1 and face.run(mapped, [1]) == [2]:
                break
            time.sleep(0.005)
        assert face.run(mapped, [1]) == [2]
    assert len(ran) == 2


def test_two_maps_at_once_share_what_a_slow_store_does_not_have() -> None:
    store, ran = SlowStore(), []
    gate = threading.Barrier(2)

    def fetch(x: int) -> int:
        ran.append(x)
        time.sleep(0.02)
        return x

    mapped = operomap(mode="thread", cache_backend=store)(fetch)

    def one() -> None:
        gate.wait()
        assert mapped(range(10)) == list(range(10))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ran) == list(range(10))


def test_a_stale_answer_reaches_all_that_share_the_call(face: Face) -> None:
    failing = False

    def fetch(x: int) -> int:
        if failing:
            raise OSError
        return x

    mapped = face.of(fetch, cache_ttl=60, cache_stale_ttl=600)
    with fake_clock() as clock:
        face.run(mapped, [5])
        clock.advance(100)
        failing = True
        assert face.run(mapped, [5, 5, 5]) == [5, 5, 5]
    assert mapped.stats.stale == 3
