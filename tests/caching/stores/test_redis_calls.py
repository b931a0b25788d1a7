# this_file: tests/caching/stores/test_redis_calls.py
"""Functions cached on a Redis server: where it is, its bad days, what is stored there. A real one is used."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from tests.caching.stores.host import run_guarded
from tests.redis_server import RedisServer

from opero import clear_cache, opero
from opero.core.cache import get_cache_context
from opero.errors import StoreError
from opero.events import CacheSkipped

if TYPE_CHECKING:
    from opero.testing import FakeClock


class World:
    """What the functions below do; they close over nothing, because that would be part of their names."""

    calls = 0
    value: Any = None
    meanwhile: Any = None


@pytest.fixture(autouse=True)
def world() -> None:
    World.calls, World.value, World.meanwhile = 0, None, None


def work(x: int = 0) -> Any:
    World.calls += 1
    if World.meanwhile is not None:
        World.meanwhile()
    return 2 * x if World.value is None else World.value


class Point:
    """What is no plain data."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point)

    def __hash__(self) -> int:
        return 1


class Skips(list[str]):
    """Why results were not cached."""

    def __call__(self, event: object) -> None:
        if isinstance(event, CacheSkipped):
            self.append(event.reason)


def keys(server: RedisServer) -> list[str]:
    """Return the names of all entries."""
    found = server.do("KEYS", "opero:cache:*")
    assert isinstance(found, list)
    return sorted(key.decode() for key in found if b"~" not in key)


class TestPlaces:
    def test_the_environment_says_where_the_server_is(
        self, face: Any, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gc.collect()  # functions of other tests, whose servers are gone
        f = opero(cache_backend="redis")(face.of(work))  # before the variable is set
        monkeypatch.setenv("OPERO_REDIS_URL", server.url)
        assert [face.run(f, 1), face.run(f, 1)] == [2, 2]
        assert (World.calls, f.cache.info().backend, f.cache.info().size) == (1, "redis", 1)
        assert all(key.startswith("opero:cache:opero:") for key in keys(server))
        assert clear_cache("opero", "redis") == 1

    def test_an_address_over_tcp(self, face: Any) -> None:
        with (
            tempfile.TemporaryDirectory(prefix="r-") as folder,
            RedisServer(Path(folder), "--port", str(port := free_port())),
        ):
            f = opero(cache_backend=f"redis://127.0.0.1:{port}/1")(face.of(work))
            assert [face.run(f, 1), face.run(f, 1), World.calls] == [2, 2, 1]

    def test_namespaces_are_taken_by_the_letter(self, face: Any, server: RedisServer) -> None:
        """Among functions and contexts, whatever a server takes for a wildcard."""
        names = ["*", "?", "[ab]", "a", "a*", "a\\*", "a:b"]
        cached = {
            name: opero(cache_backend=server.url, cache_namespace=name)(face.of(work))
            for name in names
        }
        for name, f in cached.items():
            face.run(f, 1)
            get_cache_context(server.url, cache_namespace=name).set("k", name)
        for gone, name in enumerate(names, 1):
            assert clear_cache(name, server.url) == 2
            assert len(keys(server)) == 2 * (len(names) - gone)
        for name in names:
            assert get_cache_context(server.url, cache_namespace=name).get("k") is None

    def test_contexts_share_what_functions_do_not(self, server: RedisServer) -> None:
        context = get_cache_context(server.url, cache_namespace="geo", cache_ttl="1h")
        context.set(("EUR", "USD"), {1.08})
        f = opero(cache_backend=server.url, cache_namespace="geo")(work)
        f(1)
        assert f.cache.clear() == 1
        again = get_cache_context(server.url, cache_namespace="geo")
        assert again.get(("EUR", "USD")) == {1.08}
        (name,) = keys(server)
        assert 3_500_000 < int(str(server.do("PTTL", name))) <= 3_600_000


class TestBadDays:
    """A call never fails because of the server, nor waits for it for long; when it is back it is used again."""

    def call(self, face: Any, f: Any, x: int = 1) -> float:
        """Return the seconds that a call takes."""
        began = time.monotonic()
        assert face.run(f, x) == 2 * x
        return time.monotonic() - began

    def test_a_server_that_is_not_there(self, face: Any, tmp_path: Path, clock: FakeClock) -> None:
        skips = Skips()
        place = f"unix://{tmp_path}/nobody"
        f = opero(cache_backend=place, on_event=skips)(face.of(work))
        assert sum(self.call(face, f) for _ in range(20)) < 20  # retries of the library's: minutes
        assert World.calls == 20
        assert "the store could not be read: the server cannot be reached" in skips
        assert sum("lends no lease" in reason for reason in skips) == 1
        assert f.cache.info().size is None
        with pytest.raises(StoreError, match="cannot be reached"):
            clear_cache("opero", place)

    def test_a_server_that_comes_later_is_used(self, face: Any, clock: FakeClock) -> None:
        with tempfile.TemporaryDirectory(prefix="r-") as folder:
            server = RedisServer(Path(folder))
            f = opero(cache_backend=server.url)(face.of(work))
            self.call(face, f)
            with server:
                for _ in range(20):  # a thread that gives a lease back may use the server first
                    clock.advance(60)  # the pause is over
                    self.call(face, f)
                    if f.stats.hits:
                        break
                assert f.stats.hits == 1

    def test_a_server_that_is_killed_and_started_again(
        self, face: Any, own_server: RedisServer, clock: FakeClock
    ) -> None:
        skips = Skips()
        f = opero(cache_backend=own_server.url, on_event=skips)(face.of(work))
        self.call(face, f), self.call(face, f)
        assert (World.calls, skips) == (1, [])
        own_server.kill()
        assert self.call(face, f) < 20
        assert World.calls == 2
        assert skips
        own_server.start()
        clock.advance(60)  # the pause is over
        del skips[:]
        self.call(face, f), self.call(face, f)
        assert (World.calls, skips) == (3, [])

    def test_a_server_that_hangs_costs_one_timeout(
        self, face: Any, own_server: RedisServer, clock: FakeClock
    ) -> None:
        skips = Skips()
        f = opero(cache_backend=own_server.url, on_event=skips)(face.of(work))
        self.call(face, f)
        own_server.freeze()
        try:
            assert sum(self.call(face, f) for _ in range(20)) < 20  # as many would be 40
        finally:
            own_server.thaw()
        assert "the store could not be read: the server does not answer" in skips

        def finds_it() -> bool:
            clock.advance(60)  # the pause is over
            made = World.calls
            self.call(face, f)
            return World.calls == made

        # What was stored before is still there; a thread that gives a lease back may be the first to try the server.
        assert any(finds_it() for _ in range(20))

    def test_a_server_that_dies_while_the_function_runs(
        self, face: Any, own_server: RedisServer
    ) -> None:
        skips = Skips()

        World.meanwhile = own_server.kill
        f = opero(cache_backend=own_server.url, on_event=skips)(face.of(work))
        self.call(face, f)
        assert any("could not be stored" in reason for reason in skips), skips

    def test_a_large_value_that_a_server_does_not_take_leaves_no_connection_open(
        self, face: Any, own_server: RedisServer
    ) -> None:
        World.value, World.meanwhile = bytes(20_000_000), own_server.freeze
        skips = Skips()
        f = opero(cache_backend=own_server.url, on_event=skips)(face.of(work))
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                assert face.run(f) == World.value
                gc.collect()
        finally:
            own_server.thaw()
        assert any("could not be stored" in reason for reason in skips), skips
        assert warned == []

    def test_what_is_there_and_cannot_be_read_is_a_miss(
        self, face: Any, server: RedisServer
    ) -> None:
        skips = Skips()
        f = opero(cache_backend=server.url, on_event=skips)(face.of(work))
        self.call(face, f)
        (name,) = keys(server)
        for foreign in (b"", b"op", b"\x80\x04K\x01.", server.do("GET", name)):
            assert isinstance(foreign, bytes)
            server.do("SET", name, foreign[:-1] + b"!")
            self.call(face, f)
        assert World.calls == 5
        assert all("cannot be read" in reason for reason in skips)
        self.call(face, f)
        assert World.calls == 5


class TestValues:
    @pytest.mark.parametrize(
        "value",
        [np.arange(2_000_000.0), pd.DataFrame({"n": np.arange(500_000), "t": "text"})],
        ids=["array", "frame"],
    )
    def test_large_arrays_and_frames(self, face: Any, server: RedisServer, value: Any) -> None:
        World.value = value
        f = opero(cache_backend=server.url)(face.of(work))
        for _ in range(2):
            assert bool(np.all(face.run(f) == value))
        assert World.calls == 1

    def test_what_another_secret_has_signed_is_a_miss(
        self, face: Any, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        World.value = Point()
        skips = Skips()
        f = opero(cache_backend=server.url, on_event=skips)(face.of(work))
        face.run(f, 1)
        monkeypatch.setenv("OPERO_CACHE_SECRET", "one that an attacker has made up")
        face.run(f, 1)
        assert World.calls == 2
        assert "its signature does not fit" in skips[0]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("transport", ["socket", "tcp", "nobody"])
def test_the_host_program_notices_nothing(tmp_path: Path, transport: str) -> None:
    """Whether the server is there or not."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="r-") as folder,
        RedisServer(Path(folder), "--port", str(port)) as server,
    ):
        if transport == "nobody":
            server.kill()
        run_guarded(
            """
            import asyncio
            from opero import opero, clear_cache
            from opero.core import get_cache_context
            from opero.errors import StoreError

            @opero(cache_backend="redis")
            def f(x):
                return [x] * 50_000
            @opero(cache_backend="redis")
            async def g(x):
                return {x}

            assert f(1) == f(1) == [1] * 50_000
            async def main():
                return [await g(1), await g(1)]
            assert asyncio.run(main()) == [{1}, {1}]
            if os.environ["HITS"] == "1":
                get_cache_context("redis").set("k", object)
            try:
                f.cache.info(), f.cache.invalidate(1), clear_cache(backend="redis")
            except StoreError:
                assert os.environ["HITS"] == "0"
            assert f.stats.hits == g.stats.hits == int(os.environ["HITS"])
            """,
            tmp_path,
            OPERO_REDIS_URL=f"redis://127.0.0.1:{port}/0" if transport == "tcp" else server.url,
            HITS="0" if transport == "nobody" else "1",
        )


def test_a_loop_that_is_not_run_by_asyncio_run_warns_of_nothing(server: RedisServer) -> None:
    f = opero(cache_backend=server.url)(awork)

    async def main() -> list[int]:
        return await asyncio.gather(*(f(n) for n in range(50)))

    loop = asyncio.new_event_loop()
    try:
        assert loop.run_until_complete(main()) == list(range(50))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def awork(x: int) -> int:
    return x
