# this_file: tests/caching/stores/test_lease.py
"""Of several processes that miss one key, one computes. Real processes, really killed, on each store."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from tests.crowd import Crowd

from opero import opero
from opero.core import get_cache_context
from opero.errors import DeadlineError
from opero.events import CacheSkipped

if TYPE_CHECKING:
    from tests.conftest import Face

SYNC = """
@opero(**options)
def f(x):
    note("call")
    time.sleep(0.4)
    return [x]
ready()
print(f(1))
"""
ASYNC = """
@opero(**options)
async def f(x):
    note("call")
    await asyncio.sleep(0.4)
    return [x]
async def main():
    return await asyncio.gather(*(f(1) for _ in range(50)))
ready()
print(asyncio.run(main())[-1])
"""


@pytest.mark.parametrize(
    ("place", "body", "count"),
    [("disk", SYNC, 3), ("redis", ASYNC, 2)],
    ids=["disk-sync", "redis-async"],
    indirect=["place"],
)
def test_processes_that_miss_together_make_one_call(crowd: Crowd, body: str, count: int) -> None:
    crowd.start(body, count)
    crowd.go()
    assert crowd.outputs() == ["[1]"] * count
    assert crowd.calls() == 1


def test_a_killed_leader_delays_the_others_by_seconds(crowd: Crowd) -> None:
    (leader,) = crowd.start(f"short_leases()\n{SYNC.replace('0.4', '100')}")
    crowd.go()
    crowd.wait_for(lambda: crowd.calls() == 1)
    crowd.start(SYNC, 2)
    leader.send_signal(signal.SIGKILL)
    assert crowd.outputs()[1:] == ["[1]"] * 2
    assert crowd.calls() == 2


MANY = """
@opero(**options)
def f(x):
    note(f"key {x}")
    time.sleep(0.002)
    return [x]
@opero(**options)
async def g(x):
    note(f"key a{x}")
    await asyncio.sleep(0.002)
    return [x]
async def main():
    assert await asyncio.gather(*(g(n) for n in range(200))) == [[n] for n in range(200)]
ready()
assert [f(n) for n in range(200)] == [[n] for n in range(200)]
asyncio.run(main())
print("done")
"""


def test_two_processes_with_many_keys_make_one_call_a_key(crowd: Crowd) -> None:
    crowd.start(MANY, 2)
    crowd.go()
    assert crowd.outputs() == ["done"] * 2
    assert crowd.calls("key ") == crowd.kinds("key ") == 400


RECURSION = """
@opero(**options)
def even(n):
    note("even")
    time.sleep(0.05)
    return True if n == 0 else odd(n - 1)

@opero(**options)
def odd(n):
    note("odd")
    time.sleep(0.05)
    return False if n == 0 else even(n - 1)

ready()
print(even(6) if int(turn) % 2 else not odd(6))
"""


def test_recursion_across_two_functions_and_crossing_leaders_end(crowd: Crowd) -> None:
    crowd.start(RECURSION, 2)
    crowd.go()
    assert crowd.outputs() == ["True"] * 2


def test_a_process_that_ends_leaves_no_lease_behind(crowd: Crowd) -> None:
    crowd.start(SYNC)
    crowd.go()
    crowd.outputs()
    crowd.start("ready()\n" + SYNC.replace("ready()", "f.cache.clear(); began = time.monotonic()"))
    assert crowd.outputs() == ["[1]"] * 2
    assert crowd.calls() == 2


class World:
    """What the functions below do; they close over nothing, because that would be part of their names."""

    calls: int
    running: int
    most: int
    body: Any
    value: Any


@pytest.fixture(autouse=True)
def world() -> type[World]:
    World.calls = World.running = World.most = 0
    World.body = None
    return World


def work(x: int) -> Any:
    World.calls += 1
    World.running += 1
    World.most = max(World.most, World.running)
    try:
        return World.body(x) if World.body else 2 * x
    finally:
        World.running -= 1


async def slow(x: int) -> int:
    World.calls += 1
    await asyncio.sleep(60 if World.calls == 1 else 0)
    return x


class _Gate:
    """An event that a thread may set for a loop."""

    opened = False

    async def wait(self) -> None:
        while not self.opened:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)


async def promised(x: int) -> int:
    World.calls += 1
    turn = World.calls
    await World.body.wait()
    return turn


def promise(x: int) -> Any:
    async def keep() -> int:
        World.calls += 1
        await World.body.wait()
        return x

    return keep()


class Busy:
    """A thread that has just begun to compute `work(1)`."""

    def __init__(self, face: Face, f: Any) -> None:
        self.let_go = threading.Event()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=face.run, args=(f, 1))

    def _wait(self, x: int) -> int:
        self._begun.set()
        assert self.let_go.wait(10)
        return 2 * x

    def __enter__(self) -> Self:
        World.body = self._wait
        self._thread.start()
        assert self._begun.wait(10)
        return self

    def __exit__(self, *failure: object) -> None:
        self.let_go.set()
        self._thread.join()


class TestInOneProcess:
    """Two wrappers of one function share entries and leases, but no flights: like two processes."""

    @pytest.fixture
    def options(self, place: str) -> dict[str, Any]:
        return {"cache_backend": place, "cache_namespace": "lease", "retries": 0}

    def test_a_deadline_ends_the_wait(self, face: Face, options: dict[str, Any]) -> None:
        body = face.of(work)
        with Busy(face, opero(**options)(body)):
            other = opero(**options, deadline=0.6)(body)
            with pytest.raises(DeadlineError, match="another caller's result"):
                face.run(other, 1)
        assert World.calls == 1

    def test_an_old_result_stands_in_when_the_deadline_ends_the_wait(
        self, face: Face, options: dict[str, Any]
    ) -> None:
        body = face.of(work)
        options |= {"cache_ttl": 0.05, "cache_stale_ttl": 60}
        face.run(opero(**options)(body), 1)
        time.sleep(0.06)
        with Busy(face, opero(**options)(body)):
            other = opero(**options, deadline=0.6)(body)
            receipt = face.run(other.call, 1)
        assert (receipt.value, receipt.source) == (2, "stale")

    def test_a_plain_call_does_not_wait_for_a_task_of_the_loop_around_it(
        self, options: dict[str, Any]
    ) -> None:
        """As when the first call of a plain function shows that it returns awaitables."""

        async def main() -> list[int]:
            World.body = asyncio.Event()
            World.body.set()
            first, second = opero(**options)(promise), opero(**options)(promise)
            await first(0)
            World.body.clear()
            leading = asyncio.create_task(first(1))
            while World.calls < 2:  # noqa: ASYNC110 - a global tells, not an event
                await asyncio.sleep(0.01)
            following = asyncio.create_task(second(1))
            while World.calls < 3:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
            World.body.set()
            return await asyncio.gather(leading, following)

        assert asyncio.run(main()) == [1, 1]

    def test_it_finds_what_another_process_has_computed(
        self, face: Face, options: dict[str, Any]
    ) -> None:
        body = face.of(work)
        with Busy(face, opero(**options)(body)) as busy:
            threading.Timer(0.2, busy.let_go.set).start()
            receipt = face.run(opero(**options)(body).call, 1)
        assert (receipt.value, receipt.source, World.calls) == (2, "hit", 1)

    def test_a_call_that_leads_already_never_waits(
        self, face: Face, options: dict[str, Any]
    ) -> None:
        body = face.of(work)
        again = opero(**options)(body)

        def once_more(x: int) -> Any:
            World.body = None
            if not face.asynchronous:
                return again(x)
            with ThreadPoolExecutor() as pool:  # with the context, as in a task
                return pool.submit(copy_context().run, face.run, again, x).result()

        World.body = once_more
        assert face.run(opero(**options)(body), 1) == 2
        assert World.calls == 2

    @pytest.mark.parametrize("outcome", ["a failure", "one that cannot be stored", "a heavy one"])
    def test_callers_that_waited_for_nothing_do_not_wait_for_each_other(
        self, options: dict[str, Any], outcome: str
    ) -> None:
        options["cache_max_bytes"] = 1000

        def body(x: int) -> Any:
            time.sleep(0.3)
            if outcome == "a failure":
                raise KeyError(x)
            return bytes(5000) if outcome == "a heavy one" else iter([x])

        def run() -> None:
            with contextlib.suppress(KeyError):
                opero(**options)(work)(1)

        World.body = body
        threads = [threading.Thread(target=run) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert World.calls == 6
        assert World.most > 2  # one leads, then the other five

    def test_an_event_loop_goes_on_while_it_waits(self, options: dict[str, Any]) -> None:
        async def main() -> int:
            waiting = asyncio.create_task(opero(**options)(promised)(1))
            turns = 0
            while turns < 20 and not waiting.done():
                await asyncio.sleep(0.01)
                turns += 1
            waiting.cancel()
            return turns

        async def lead() -> None:
            await opero(**options)(promised)(1)

        def body() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(lead())

        World.body = let_go = _Gate()
        leading = threading.Thread(target=body)
        leading.start()
        Crowd.wait_for(lambda: World.calls)
        assert asyncio.run(main()) == 20
        let_go.opened = True
        leading.join()
        assert World.calls == 1


# --- leases of other processes, as they lie on disk -----------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a disk cache, with a database in it."""
    get_cache_context(f"disk:{tmp_path / 'cache'}").set("made", True)
    return tmp_path / "cache"


def execute(folder: Path, statement: str, *arguments: object) -> list[Any]:
    with sqlite3.connect(folder / "cache.db") as connection:
        found = connection.execute(statement, arguments).fetchall()
    connection.close()
    return found


def test_store_that_lends_no_lease_is_reported_once_and_calls_go_on(
    face: Face, folder: Path
) -> None:
    execute(folder, "ALTER TABLE Lease ADD COLUMN other")
    received: list[Any] = []
    f = opero(cache_backend=f"disk:{folder}", retries=0, on_event=received.append)(face.of(work))
    assert [face.run(f, n) for n in (1, 2, 1)] == [2, 4, 2]
    assert World.calls == 2
    reasons = [event.reason for event in received if isinstance(event, CacheSkipped)]
    assert len(reasons) == 1
    assert "other processes may compute the same: the store lends no lease" in reasons[0]


def test_lease_of_a_killed_process_runs_out(face: Face, folder: Path) -> None:
    f = opero(cache_backend=f"disk:{folder}", retries=0, deadline=60)(face.of(work))
    face.run(f, 1)
    Crowd.wait_for(lambda: not execute(folder, "SELECT * FROM Lease"))  # its own
    ((key,),) = execute(
        folder, "SELECT key FROM Cache WHERE key LIKE '%work%' AND key NOT LIKE '~%'"
    )
    f.cache.invalidate(1)
    until = time.time() + 0.05
    execute(folder, "INSERT INTO Lease VALUES (?, 'killed', ?)", key, until)
    assert face.run(f, 1) == 2
    assert time.time() >= until
    assert World.calls == 2


def test_lease_of_another_process_outlasts_a_call_that_is_not_ready_to_wait(
    face: Face, folder: Path
) -> None:
    f = opero(cache_backend=f"disk:{folder}", retries=0, deadline=1)(face.of(work))
    face.run(f.with_options(deadline=None), 1)
    Crowd.wait_for(lambda: not execute(folder, "SELECT * FROM Lease"))
    ((key,),) = execute(
        folder, "SELECT key FROM Cache WHERE key LIKE '%work%' AND key NOT LIKE '~%'"
    )
    f.cache.invalidate(1)
    execute(folder, "INSERT INTO Lease VALUES (?, 'another', ?)", key, time.time() + 9)
    with pytest.raises(DeadlineError, match="another caller's result"):
        face.run(f, 1)
    assert execute(folder, "SELECT owner FROM Lease") == [("another",)]


def test_leader_short_of_time_hands_its_flight_to_one_waiter(folder: Path) -> None:
    came: list[int] = []

    def key_of(x: int) -> int:
        came.append(x)
        return x

    f = opero(cache_backend=f"disk:{folder}", retries=0, cache_key=key_of)(work)
    f(1)
    Crowd.wait_for(lambda: not execute(folder, "SELECT * FROM Lease"))
    ((key,),) = execute(
        folder, "SELECT key FROM Cache WHERE key LIKE '%work%' AND key NOT LIKE '~%'"
    )
    f.cache.invalidate(1)
    execute(folder, "INSERT INTO Lease VALUES (?, 'another', ?)", key, time.time() + 9)
    came.clear()

    def slowly(x: int) -> int:
        Crowd.wait_for(lambda: len(came) == 3)  # the leader and both waiters
        time.sleep(0.05)
        return 2 * x

    World.body = slowly
    with ThreadPoolExecutor(3) as threads:
        leader = threads.submit(f.with_options(deadline=0.2), 1)
        time.sleep(0.02)
        waiters = [threads.submit(f.call, 1) for _ in range(2)]
        with pytest.raises(DeadlineError):
            leader.result()
        execute(folder, "DELETE FROM Lease")
        # Had both of them become leaders, none would have got the other's outcome.
        assert sorted(waiter.result().source for waiter in waiters) == ["fresh", "shared"]
    assert World.calls == 2
