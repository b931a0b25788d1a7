# this_file: tests/caching/stores/test_lease_store.py
"""What leases ask of their store, and when they are renewed and given back."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.caching.stores.test_lease import Busy, World, promised, slow, work
from tests.conftest import Face
from tests.crowd import Crowd

from opero import opero
from opero.caching import lease
from opero.errors import StoreError
from opero.events import CacheSkipped

if TYPE_CHECKING:
    from opero.testing import FakeClock

pytestmark = pytest.mark.internal


@pytest.fixture(autouse=True)
def world() -> type[World]:
    World.calls = World.running = World.most = 0
    World.body = None
    return World


class TestStore:
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
