# this_file: tests/caching/stores/test_redis_maps.py
"""Maps whose cache is a Redis server: a real one, which is asked about many items at once, and dies in the middle."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.crowd import Crowd

from opero import operomap
from opero.caching import lease
from opero.events import CacheSkipped

if TYPE_CHECKING:
    from tests.redis_server import RedisServer

pytestmark = pytest.mark.internal

MODES = ["thread", "process", "async", "async_process"]


class Commands:
    """How often the server was given each command since this was made."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        server.do("CONFIG", "RESETSTAT")

    def __call__(self, name: str) -> int:
        reported = self._server.do("INFO", "commandstats")
        assert isinstance(reported, dict)
        return int(reported.get(f"cmdstat_{name}", {}).get("calls", 0))


def note(folder: str, x: int) -> None:
    with (Path(folder) / "calls").open("a") as file:
        file.write(f"{x}\n")


def noted(folder: Path) -> list[int]:
    path = folder / "calls"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(x: int, folder: str) -> list[int]:
    note(folder, x)
    return [x]


async def awork(x: int, folder: str) -> list[int]:
    note(folder, x)
    return [x]


def mapped(mode: str, server: RedisServer, **options: Any) -> Any:
    given = {"retries": 0, "workers": 2, "cache_ignore": ("folder",), **options}
    body = awork if "async" in mode else work
    return operomap(mode=mode, cache_backend=server.url, **given)(body)


def run(f: Any, *given: Any) -> Any:
    reported = f(*given)
    return asyncio.run(reported) if asyncio.iscoroutine(reported) else reported


@pytest.mark.parametrize("mode", MODES)
def test_hits_are_looked_up_together_and_never_dispatched(
    mode: str, server: RedisServer, tmp_path: Path
) -> None:
    f = mapped(mode, server)
    assert run(f, range(0, 400, 2), str(tmp_path)) == [[x] for x in range(0, 400, 2)]
    result = run(f.map, range(400), str(tmp_path))
    assert result.values == [[x] for x in range(400)]
    assert (result.hits, sorted(noted(tmp_path))) == (200, list(range(400)))
    lease._renewer.flush()
    asked = Commands(server)
    assert run(f.map, range(400), str(tmp_path)).hits == 400
    assert (asked("get"), asked("eval"), asked("set")) == (0, 0, 0)  # hits need no leases either
    assert asked("mget") <= 40
    assert len(noted(tmp_path)) == 400


@pytest.mark.parametrize("mode", MODES)
def test_results_are_stored_while_the_map_goes_on(
    mode: str, server: RedisServer, tmp_path: Path
) -> None:
    stored: list[int] = []

    def saw(one: Any) -> None:
        stored.append(len(list(server.do("KEYS", "opero:cache:*"))))  # type: ignore[call-overload]

    run(mapped(mode, server, on_result=saw, chunksize=1), range(40), str(tmp_path))
    assert all(count > done for done, count in enumerate(stored))
    assert stored[0] < 40


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_dies_costs_results_in_the_cache_and_nothing_else(
    mode: str, own_server: RedisServer, tmp_path: Path
) -> None:
    items = range(400)  # more than are looked up ahead
    skipped: list[str] = []

    def hear(event: object) -> None:
        if isinstance(event, CacheSkipped):
            skipped.append(event.reason)

    def saw(one: Any) -> None:
        if one.index == 20:
            own_server.kill()

    f = mapped(mode, own_server, on_event=hear, chunksize=1, on_result=saw)
    result = run(f.map, items, str(tmp_path))
    assert sorted(result.values) == [[x] for x in items]
    assert sorted(noted(tmp_path)) == list(items)
    assert any("the store could not be read" in reason for reason in skipped)
    assert any("its result could not be stored" in reason for reason in skipped)


def test_a_slow_server_does_not_hold_up_the_event_loop(
    own_server: RedisServer, tmp_path: Path
) -> None:
    f = mapped("async", own_server)

    async def main() -> int:
        await f(range(10), str(tmp_path))
        own_server.freeze()
        turns = 0
        mapping = asyncio.ensure_future(f.map(range(20), str(tmp_path)))
        while not mapping.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert [value for (value,) in (await mapping).values] == list(range(20))
        return turns

    try:
        # The server is given a second to answer; the loop must not notice.
        assert asyncio.run(main()) > 20
    finally:
        own_server.thaw()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_of_leases(mode: str, server: RedisServer, tmp_path: Path) -> None:
    run(mapped(mode, server), range(100), str(tmp_path))
    Crowd.wait_for(lambda: server.do("KEYS", "opero:lease:*") == [])
