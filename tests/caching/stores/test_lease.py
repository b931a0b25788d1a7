# this_file: tests/caching/stores/test_lease.py
"""Of several processes that miss one key, one computes. Real processes, really killed, on each store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Self

import pytest
from tests.conftest import Face
from tests.crowd import Crowd

from opero import opero
from opero.caching import lease
from opero.errors import DeadlineError, StoreError
from opero.events import CacheSkipped

if TYPE_CHECKING:
    from opero.testing import FakeClock

pytestmark = pytest.mark.internal

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

    @pytest.fixture
    def owners(self, store: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Keys for which a lease was wanted."""
        wanted: list[str] = []
        monkeypatch.setattr(store, "acquire", _told(store.acquire, wanted))
        if hasattr(store, "aacquire"):
            monkeypatch.setattr(store, "aacquire", _told(store.aacquire, wanted))
        return wanted

    def test_a_hit_costs_nothing_and_a_miss_one_claim(
        self, face: Face, options: dict[str, Any], owners: list[str]
    ) -> None:
        f = opero(**options)(face.of(work))
        face.run(f, 1)
        assert len(owners) == 1
        face.run(f, 1)
        assert len(owners) == 1

    def test_miss_reads_the_store_once_where_no_other_process_computes(
        self, face: Face, options: dict[str, Any], store: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        f = opero(**options)(face.of(work))
        face.run(f, 1)
        reads = _counted_reads(store, monkeypatch)
        # As if the machine were never slow: a look is valid for some milliseconds.
        monkeypatch.setattr(lease, "_GATHER", 2.0)
        face.run(f, 2)
        assert len(reads) == 1
        face.run(f, 2)
        assert len(reads) == 2

    def test_look_that_is_too_old_is_repeated_once_the_lease_is_won(
        self, face: Face, options: dict[str, Any], store: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        f = opero(**options)(face.of(work))
        face.run(f, 1)
        reads = _counted_reads(store, monkeypatch)
        monkeypatch.setattr(lease, "_GATHER", 0.0)
        face.run(f, 2)
        assert len(reads) == 2

    def test_result_that_was_stored_between_look_and_lease_is_served(
        self, options: dict[str, Any], store: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        f, other = opero(**options)(work), opero(**options)(work)
        acquire = store.acquire

        def late(*args: Any) -> Any:
            monkeypatch.setattr(store, "acquire", acquire)
            other(1)
            lease._renewer.flush()
            time.sleep(lease._GATHER)
            return acquire(*args)

        monkeypatch.setattr(store, "acquire", late)
        receipt = f.call(1)
        assert (receipt.value, receipt.source, World.calls) == (2, "hit", 1)
        assert not lease._renewer._held

    def test_an_interrupted_caller_keeps_neither_flight_nor_lease(
        self, options: dict[str, Any], store: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        f, acquire = opero(**options)(work), store.acquire

        def interrupted(*args: Any) -> bool:
            acquire(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(store, "acquire", interrupted)
            with pytest.raises(KeyboardInterrupt):
                f(1)
        lease._renewer.flush()
        assert opero(**options)(work)(1) == f(1) == 2
        assert (World.calls, lease._renewer._held) == (1, {})

    def test_a_deadline_ends_the_wait(self, face: Face, options: dict[str, Any]) -> None:
        body = face.of(work)
        with Busy(face, opero(**options)(body)):
            other = opero(**options, deadline=0.2)(body)
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
            other = opero(**options, deadline=0.2)(body)
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

    def test_a_cancelled_leader_gives_its_lease_back(
        self, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "SECONDS", 60.0)

        async def main() -> None:
            leading = asyncio.create_task(opero(**options)(slow)(1))
            while not World.calls:  # noqa: ASYNC110 - a global tells, not an event
                await asyncio.sleep(0.01)
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)
            began = time.monotonic()
            assert await opero(**options)(slow)(1) == 1
            assert time.monotonic() - began < 50

        asyncio.run(main())
        assert World.calls == 2

    def test_a_call_that_takes_long_keeps_its_lease(
        self, face: Face, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "SECONDS", 2.0)
        monkeypatch.setattr(lease, "_RENEW_AFTER", 0.1)
        body = face.of(work)
        with Busy(face, opero(**options)(body)) as busy:
            threading.Timer(2.5, busy.let_go.set).start()
            assert face.run(opero(**options)(body), 1) == 2
        assert World.calls == 1

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

    def test_a_leader_that_stood_still_takes_nothing_from_its_successor(
        self,
        options: dict[str, Any],
        store: Any,
        owners: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Neither when it renews its lease nor when it gives it back."""
        monkeypatch.setattr(lease, "SECONDS", 0.1)
        monkeypatch.setattr(lease, "_RENEW_AFTER", 0.3)
        with Busy(Face(asynchronous=False), opero(**options)(work)):
            (key,) = set(owners)
            Crowd.wait_for(lambda: all(store.acquire([(key, "its successor")], 4)))
            Crowd.wait_for(lambda: not lease._renewer._held)  # a renewal was refused
        Crowd.wait_for(lambda: not lease._renewer._ending)
        assert not all(store.acquire([(key, "a third")], 4))

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    @pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
    def test_a_forked_child_gives_back_nothing_of_its_parent(
        self, options: dict[str, Any], store: Any, owners: list[str]
    ) -> None:
        parent = os.getpid()

        def body(x: int) -> int:
            World.value = child = os.fork()
            if child:
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                assert store.acquire([(owners[0], "another")], 60) == [False]
            return x

        World.body = body
        try:
            opero(**options)(work)(1)
        finally:
            if os.getpid() != parent:
                lease._renewer.flush()
                os._exit(0)

    def test_one_process_renews_an_entry(self, options: dict[str, Any], clock: FakeClock) -> None:
        options |= {"cache_ttl": 100, "cache_refresh": 0.5}
        first, second = opero(**options)(work), opero(**options)(work)
        assert first(1) == 2
        lease._renewer.flush()
        clock.advance(60)
        begun, let_go = threading.Event(), threading.Event()

        def body(x: int) -> int:
            begun.set()
            assert let_go.wait(20)
            return 3

        World.body = body
        assert first(1) == 2
        assert begun.wait(10)
        assert [second(1) for _ in range(20)] == [2] * 20
        time.sleep(0.05)
        let_go.set()
        Crowd.wait_for(lambda: second(1) == 3)
        assert World.calls == 2

    def test_so_does_one_of_event_loops(self, options: dict[str, Any], clock: FakeClock) -> None:
        options |= {"cache_ttl": 100, "cache_refresh": 0.5}

        async def main() -> None:
            World.body = asyncio.Event()
            World.body.set()
            first, second = opero(**options)(promised), opero(**options)(promised)
            assert await first(1) == 1
            await asyncio.to_thread(lease._renewer.flush)
            clock.advance(60)
            World.body.clear()
            assert await first(1) == 1
            while World.calls < 2:  # noqa: ASYNC110 - a global tells, not an event
                await asyncio.sleep(0.01)
            assert await asyncio.gather(*(second(1) for _ in range(20))) == [1] * 20
            await asyncio.sleep(0.05)
            World.body.set()
            while await second(1) == 1:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
            assert await second(1) == 2

        asyncio.run(main())
        assert World.calls == 2

    def test_what_another_process_has_just_renewed_is_not_renewed_again(
        self,
        options: dict[str, Any],
        store: Any,
        monkeypatch: pytest.MonkeyPatch,
        clock: FakeClock,
    ) -> None:
        """It was due when it was found, but is not when the lease has come."""
        options |= {"cache_ttl": 100, "cache_refresh": 0.5}
        first, second = opero(**options)(work), opero(**options)(work)
        first(1)
        lease._renewer.flush()
        clock.advance(60)
        acquire, acquired = store.acquire, threading.Event()

        def renew_before(*args: Any) -> Any:
            monkeypatch.setattr(store, "acquire", acquire)
            second.cache.refresh(1)
            granted = acquire(*args)
            acquired.set()
            return granted

        monkeypatch.setattr(store, "acquire", renew_before)
        assert first(1) == 2
        assert acquired.wait(10)
        time.sleep(0.05)
        assert World.calls == 2

    def test_a_store_without_leases_is_reported_once(
        self, face: Face, options: dict[str, Any], store: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*given: object) -> bool:
            raise StoreError("the server takes no writes")

        monkeypatch.setattr(store, "acquire", refuse)
        if hasattr(store, "aacquire"):
            monkeypatch.setattr(store, "aacquire", refuse)
        received: list[Any] = []
        f = opero(**options, on_event=received.append)(face.of(work))
        assert [face.run(f, n) for n in (1, 2)] == [2, 4]
        reported = [event.reason for event in received if isinstance(event, CacheSkipped)]
        assert len(reported) == 1
        assert "the server takes no writes" in reported[0]


def _told(acquire: Any, wanted: list[str]) -> Any:
    def acquire_and_note(owners: Any, seconds: float) -> Any:
        wanted.extend(key for key, _ in owners)
        return acquire(owners, seconds)

    return acquire_and_note


def _counted_reads(store: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that takes the key of each read."""
    reads: list[str] = []

    def counted(read: Any) -> Any:
        def get(key: str) -> Any:
            reads.append(key)
            return read(key)

        return get

    for verb in ("get", "aget"):
        if hasattr(store, verb):
            monkeypatch.setattr(store, verb, counted(getattr(store, verb)))
    return reads
